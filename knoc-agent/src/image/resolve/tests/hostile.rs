//! Tests with registries that try to take more of the agent than an image needs: its memory, its
//! connections, its slots, its network.
//!
//! Each test uses a real socket and asserts what has reached the other end.

use std::{io::Write as _, time::Instant};

use super::fake::{Ask, MANIFEST_TYPE, Seen, manifest};
use super::*;

const MIB: usize = 1 << 20;
/// What the kernel's buffers hold in addition to what is read.
const BUFFERS: usize = 16 * MIB;
/// A rejection that takes longer came from the time-out of a whole pull; on a busy machine a
/// correct one takes time too.
const AT_ONCE: Duration = Duration::from_mins(1);

fn named(prefix: &str) -> Registry {
    Registry {
        prefix: prefix.to_owned(),
        mirror: None,
        insecure: true,
        credentials: false,
    }
}

/// The images of these registries, each of which the site file names.
struct Site {
    dir: tempfile::TempDir,
    images: Images,
}

impl Site {
    fn new(registries: &[&FakeRegistry]) -> Self {
        Self::with(registries, |_| {})
    }

    fn with(registries: &[&FakeRegistry], change: impl FnOnce(&mut Settings)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("apptainer");
        write_program(&program, APPTAINER);
        let mut settings = settings(dir.path(), "unused", program);
        let registries = registries.iter().map(|it| named(&it.address));
        settings.registries = registries.collect();
        change(&mut settings);
        Self {
            dir,
            images: Images::new(settings),
        }
    }

    async fn resolve(&self, registry: &FakeRegistry, name: &str) -> Result<ResolvedImage, String> {
        let image = format!("{}/{name}", registry.address);
        let resolved = self
            .images
            .resolve(&image, PullPolicy::IfNotPresent, &[])
            .await;
        resolved.map_err(|error| {
            assert_eq!(error.reason(), "ErrImagePull");
            error.message
        })
    }

    /// The message of the failure, which must not come from a time-out.
    async fn fails(&self, registry: &FakeRegistry, name: &str) -> String {
        let began = Instant::now();
        let message = self.resolve(registry, name).await.unwrap_err();
        assert!(
            began.elapsed() < AT_ONCE,
            "{:?}: {message}",
            began.elapsed()
        );
        message
    }
}

fn sent(seen: &Seen) -> usize {
    seen.sent.load(Ordering::SeqCst)
}

#[tokio::test]
async fn an_answer_without_end_is_read_up_to_its_limit() {
    let length = format!("Content-Length: {}\r\n", 400 * MIB);
    let chunked = "Transfer-Encoding: chunked\r\n".to_owned();
    for (what, lines) in [("a length", length), ("no length", chunked)] {
        let lines = lines.clone();
        let of_manifest = {
            let lines = lines.clone();
            FakeRegistry::start(move |ask| match ask.method.as_str() {
                "HEAD" => Reply::not_found(),
                _ => Reply::Endless(lines.clone()),
            })
        };
        let of_manifest = of_manifest.await;
        let message = Site::new(&[&of_manifest]).fails(&of_manifest, "one").await;
        assert!(
            message.contains("the manifest is longer than the 4194304 bytes"),
            "{message}"
        );
        assert!(
            sent(&of_manifest.seen) < 4 * MIB + BUFFERS,
            "{what}: {}",
            sent(&of_manifest.seen)
        );
        let of_config = {
            let (content, lines) = (one(), lines.clone());
            FakeRegistry::start(move |ask| {
                if ask.path.ends_with(&digest(CONFIG)) {
                    return Reply::Endless(lines.clone());
                }
                content.answer(ask)
            })
        };
        let of_config = of_config.await;
        let message = Site::new(&[&of_config])
            .fails(&of_config, "library/one")
            .await;
        assert!(message.contains("config is longer than"), "{message}");
        assert!(sent(&of_config.seen) < 4 * MIB + BUFFERS, "{what}");
        let realm = {
            let lines = lines.clone();
            FakeRegistry::start(move |_| Reply::Endless(lines.clone()))
        };
        let realm = realm.await;
        let url = format!("http://{}/token", realm.address);
        let registry = FakeRegistry::start(move |_| Reply::unauthorized(&url)).await;
        let message = Site::new(&[&registry, &realm])
            .fails(&registry, "one")
            .await;
        assert!(
            message.contains("the token is longer than the 65536 bytes"),
            "{message}"
        );
        assert!(sent(&realm.seen) < BUFFERS, "{what}: {}", sent(&realm.seen));
    }
}

#[tokio::test]
async fn a_layer_that_is_longer_than_announced_is_cut_off() {
    let content = one();
    let registry = FakeRegistry::start(move |ask| {
        if ask.path.ends_with(&Digest::of(&layer()).to_string()) {
            return Reply::Endless("Transfer-Encoding: chunked\r\n".to_owned());
        }
        content.answer(ask)
    });
    let registry = registry.await;
    let message = Site::new(&[&registry])
        .fails(&registry, "library/one")
        .await;
    assert!(
        message.contains("is longer than the 2048 bytes that its manifest announces"),
        "{message}"
    );
    assert!(sent(&registry.seen) < BUFFERS);
}

#[tokio::test]
async fn six_hundred_images_open_few_connections() {
    let names: Vec<String> = (0..600).map(|number| format!("image-{number}")).collect();
    // The registry gets some of the requests; the others are rejected.
    let all = names
        .iter()
        .step_by(10)
        .fold(Content::default(), |content, name| {
            content.with(name, &[tar(name, b"")])
        });
    let registry = FakeRegistry::start(move |ask| all.answer(ask)).await;
    let site = Site::with(&[&registry], |settings| {
        settings.concurrency = 8;
        let program = settings.program.as_ref().unwrap();
        write_program(program, "cat layout/index.json >image.sif\n");
    });
    let all = names.iter().map(|name| site.resolve(&registry, name));
    let all = futures::future::join_all(all).await;
    assert_eq!(all.iter().filter(|image| image.is_ok()).count(), 60);
    // Short requests, and the layers of two pulls.
    let most = registry.seen.most.load(Ordering::SeqCst);
    assert!(most <= 4 + 2 * 3, "{most} connections at the same time");
}

#[tokio::test]
async fn slow_layers_do_not_delay_other_registries() {
    let slow = FakeRegistry::start(|ask| {
        let content = (0..4).fold(Content::default(), |content, number| {
            content.with(
                &format!("slow-{number}"),
                &[tar(&format!("{number}"), b"slow")],
            )
        });
        let layer = ask.path.contains("/blobs/") && !ask.path.ends_with(&digest(CONFIG));
        if layer {
            return Reply::Trickle(2048, Duration::from_secs(1));
        }
        content.answer(ask)
    });
    let slow = slow.await;
    let content = one();
    let quick = FakeRegistry::start(move |ask| content.answer(ask)).await;
    // Another host than that of the slow one, which has two names here and is one registry.
    let quick_name = quick.address.replace("127.0.0.1", "localhost");
    let other_name = slow.address.replace("127.0.0.1", "127.1");
    let site = Site::with(&[&slow], |settings| {
        settings.limits.stall = Duration::from_mins(1);
        settings
            .registries
            .extend([named(&quick_name), named(&other_name)]);
    });
    let image = format!("{quick_name}/library/one");
    let names: Vec<String> = (0..4)
        .map(|number| match number % 2 {
            0 => format!("{}/slow-{number}", slow.address),
            _ => format!("{other_name}/slow-{number}"),
        })
        .collect();
    let resolve = |image| site.images.resolve(image, PullPolicy::IfNotPresent, &[]);
    let slow_ones = names.iter().map(|name| resolve(name));
    let mut slow_ones = std::pin::pin!(futures::future::join_all(slow_ones));
    let begun = async {
        while slow.seen.count("GET", "/blobs/") < 2 * 2 {
            tokio::task::yield_now().await;
        }
        resolve(&image).await
    };
    tokio::select! {
        biased;
        ended = &mut slow_ones => unreachable!("{ended:?}"),
        image = tokio::time::timeout(AT_ONCE, begun) => drop(image.unwrap().unwrap()),
    }
    assert_eq!(
        slow.seen.count("GET", "/blobs/"),
        2 * 2,
        "config and layer of two pulls"
    );
}

#[tokio::test]
async fn a_layer_without_progress_fails_and_makes_place() {
    for reply in [
        Reply::Stall(2048),
        Reply::Trickle(2048, Duration::from_millis(50)),
    ] {
        let content = one();
        let registry = FakeRegistry::start(move |ask| {
            if ask.path.ends_with(&Digest::of(&layer()).to_string()) {
                return reply.clone();
            }
            content.answer(ask)
        });
        let registry = registry.await;
        let site = Site::with(&[&registry], |settings| {
            settings.limits.stall = Duration::from_millis(400);
        });
        let message = site.fails(&registry, "library/one").await;
        assert!(
            message.contains("makes too little progress") && message.contains("limits.image_stall"),
            "{message}"
        );
    }
}

#[tokio::test]
async fn what_does_not_answer_ends_with_its_time() {
    let registry = FakeRegistry::start(|_| Reply::Stall(100)).await;
    let site = Site::with(&[&registry], |settings| {
        settings.registry_timeout = Duration::from_millis(400);
    });
    let began = Instant::now();
    let message = site.resolve(&registry, "one").await.unwrap_err();
    assert!(message.contains("did not answer within 400ms"), "{message}");
    assert!(began.elapsed() < AT_ONCE);
}

/// A service of the login node that the site file does not name.
async fn bystander() -> FakeRegistry {
    FakeRegistry::start(|_| Reply::ok(r#"{"token":"t"}"#)).await
}

/// Realms that lead to this host or nowhere, with `PORT` for a service's port, and why they are
/// rejected.
const REALMS: [(&str, &str); 14] = [
    ("http://127.0.0.1:PORT/token", "is a loopback address"),
    ("https://127.0.0.1:PORT/token", "is a loopback address"),
    ("http://localhost:PORT/token", "is a loopback address"),
    ("http://127.1:PORT/token", "is a loopback address"),
    ("http://2130706433:PORT/token", "is a loopback address"),
    ("http://[::ffff:127.0.0.1]:PORT/", "is a loopback address"),
    ("http://0.0.0.0:PORT/token", "is an unspecified address"),
    ("http://[::]:PORT/token", "is an unspecified address"),
    ("http://169.254.169.254/latest", "is a metadata service"),
    ("http://[fe80::1]/token", "is a link-local address"),
    ("ftp://127.0.0.1:PORT/", "the scheme \"ftp\" is not https"),
    ("file:///etc/passwd", "refused"),
    ("/token", "it has no scheme"),
    ("http://u:p@127.0.0.1:PORT/", "it holds a user name"),
];

#[tokio::test]
async fn a_token_realm_on_this_host_is_refused_however_it_is_written() {
    let service = bystander().await;
    let port = service.address.rsplit_once(':').unwrap().1;
    for (realm, why) in REALMS {
        let realm = realm.replace("PORT", port);
        let registry = FakeRegistry::start({
            let realm = realm.clone();
            move |_| Reply::unauthorized(&realm)
        });
        let registry = registry.await;
        let message = Site::new(&[&registry]).fails(&registry, "one").await;
        assert!(message.contains(why), "{realm}: {message}");
    }
    assert_eq!(
        service.seen.total.load(Ordering::SeqCst),
        0,
        "it received no request"
    );
}

#[tokio::test]
async fn a_registry_or_a_redirect_on_this_host_is_refused_unless_it_is_named() {
    let service = bystander().await;
    let url = format!("http://{}/secret", service.address);
    let registry = FakeRegistry::start(move |_| Reply::redirect(&url)).await;
    let message = Site::new(&[&registry]).fails(&registry, "one").await;
    assert!(
        message.contains("/secret is refused: 127.0.0.1 is a loopback address"),
        "{message}"
    );
    assert!(message.contains("prefix of a [[registry]]"), "{message}");
    let message = Site::new(&[]).fails(&service, "one").await;
    assert!(message.contains("is a loopback address"), "{message}");
    let site = Site::with(&[], |settings| {
        // A mirror is named too, but another port of its host is not.
        settings.registries = vec![Registry {
            prefix: "127.0.0.1:1".to_owned(),
            mirror: Some("localhost".to_owned()),
            insecure: true,
            credentials: false,
        }];
    });
    let message = site.fails(&service, "one").await;
    assert!(message.contains("is a loopback address"), "{message}");
    assert_eq!(
        service.seen.total.load(Ordering::SeqCst),
        0,
        "it received no request"
    );
}

#[tokio::test]
async fn plain_http_is_only_for_what_is_named_insecure() {
    let service = bystander().await;
    // The service is named by two hosts, but without plain HTTP.
    let other_host = service.address.replace("127.0.0.1", "localhost");
    let secure = [&service.address, &other_host].map(|name| Registry {
        insecure: false,
        ..named(name)
    });
    let site = |registry: &FakeRegistry| {
        Site::with(&[registry], |settings| {
            settings.registries.extend(secure.clone());
        })
    };
    // An insecure registry leads to another host, which would get a pod's credentials.
    let to = format!("http://{other_host}/secret");
    for reply in [Reply::redirect(&to), Reply::unauthorized(&to)] {
        let registry = FakeRegistry::start(move |_| reply.clone()).await;
        let message = site(&registry).fails(&registry, "one").await;
        assert!(
            message.contains("is refused: plain HTTP is allowed only"),
            "{message}"
        );
    }
    assert_eq!(
        service.seen.total.load(Ordering::SeqCst),
        0,
        "it received no request"
    );
    // Its own host is accessed over plain HTTP already, so that another port may be, too.
    let url = format!("http://{}/token", service.address);
    let registry = FakeRegistry::start(move |_| Reply::unauthorized(&url)).await;
    let site = site(&registry);
    let message = site.resolve(&registry, "one").await.unwrap_err();
    assert!(!message.contains("is refused"), "{message}");
    assert!(service.seen.total.load(Ordering::SeqCst) > 0);
    let source = format!("{}/one", service.address);
    let message = site.images.resolve(&source, PullPolicy::Always, &[]).await;
    let message = message.unwrap_err().message;
    assert!(
        message.contains("plain HTTP needs insecure = true"),
        "{message}"
    );
}

#[tokio::test]
async fn redirects_end_and_carry_no_token() {
    let endless = FakeRegistry::start(|ask| Reply::redirect(&ask.path)).await;
    let message = Site::new(&[&endless]).fails(&endless, "one").await;
    assert!(message.contains("redirects more than 5 times"), "{message}");
    // The blobs are at a blob store; the registry demands a token, and the store must not receive it.
    let content = one();
    let store = FakeRegistry::start(move |ask| content.answer(ask)).await;
    let realm = bystander().await;
    let (to, url) = (
        store.address.clone(),
        format!("http://{}/token", realm.address),
    );
    let content = one();
    let registry = FakeRegistry::start(move |ask| {
        if !ask.head.contains("authorization: Bearer t\r\n") {
            Reply::unauthorized(&url)
        } else if ask.path.contains("/blobs/") {
            Reply::redirect(&format!("http://{to}{}", ask.path))
        } else {
            content.answer(ask)
        }
    });
    let registry = registry.await;
    let site = Site::new(&[&registry, &store, &realm]);
    site.resolve(&registry, "library/one").await.unwrap();
    let asks = store.seen.asks.lock().unwrap().clone();
    assert_eq!(asks.len(), 2, "the config and a layer");
    let told = asks
        .iter()
        .filter(|ask| ask.head.to_lowercase().contains("authorization"));
    assert_eq!(told.count(), 0, "{asks:?}");
    assert_eq!(
        realm.seen.total.load(Ordering::SeqCst),
        1,
        "a token is used for several requests"
    );
}

#[tokio::test]
async fn content_other_than_announced_is_rejected() {
    let config = digest(CONFIG);
    let layer_digest = Digest::of(&layer()).to_string();
    let other = CONFIG.replace("/bin/sh", "/bin/xx");
    let mut flipped = layer();
    flipped[600] ^= 1;
    for (what, content) in [
        ("config", one().falsified(&config, other.as_bytes())),
        ("layer", one().falsified(&layer_digest, &flipped)),
    ] {
        let registry = FakeRegistry::start(move |ask| content.answer(ask)).await;
        let message = Site::new(&[&registry])
            .fails(&registry, "library/one")
            .await;
        assert!(
            message.contains("sent content with digest"),
            "{what}: {message}"
        );
    }
    let content = one();
    let registry = FakeRegistry::start(move |ask| content.answer(ask)).await;
    let wrong = format!("library/one@sha256:{}", "a".repeat(64));
    let message = Site::new(&[&registry]).fails(&registry, &wrong).await;
    assert!(message.contains("sent content with digest"), "{message}");
    let lying = FakeRegistry::start(|ask| {
        if ask.method == "HEAD" {
            return Reply::not_found();
        }
        let head = format!("Docker-Content-Digest: sha256:{}\r\n", "b".repeat(64));
        Reply::Whole("200 OK", head, manifest(&[]).into())
    });
    let lying = lying.await;
    let message = Site::new(&[&lying]).fails(&lying, "one").await;
    assert!(message.contains("sent content with digest"), "{message}");
}

fn text_of(name: &str, text: String) -> impl Fn(&Ask) -> Reply + Send + Sync + 'static {
    let content = Content::default().text(name, text);
    move |ask| content.answer(ask)
}

#[tokio::test]
async fn content_that_no_honest_image_has_is_rejected_by_its_name() {
    let digest = digest("x");
    let huge = manifest(&[(digest.clone(), 1 << 40)]);
    let many = manifest(&vec![(digest.clone(), 1); 501]);
    let chart = manifest(&[(digest.clone(), 1)]).replace("image.layer.v1.tar", "helm.chart");
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{MANIFEST_TYPE}","digest":"{digest}","size":1,"platform":{{"os":"plan9","architecture":"amd64"}}}}]}}"#
    );
    let sizes = manifest(&[(digest.clone(), 1 << 19), (digest.clone(), 0)]);
    let both = manifest(&[]).replace("\"layers\":[]", "\"layers\":[],\"manifests\":[]");
    let entries = format!(
        "{{\"schemaVersion\":2,\"manifests\":[{}]}}",
        vec!["{}"; 900_000].join(",")
    );
    for (text, why) in [
        (huge, "limits.image_size of the site file is 1048576"),
        (many, "more than 500 elements"),
        (sizes, "with different sizes"),
        (chart, "not a container image"),
        (index, "only for [\"plan9/amd64\"]"),
        (both, "an index and an image at once"),
        (entries, "the manifest cannot be read"),
        (
            r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(),
            "schema 1",
        ),
        ("{}".to_owned(), "neither `config` nor `manifests`"),
        ("[".repeat(4000), "the manifest cannot be read"),
    ] {
        let config = Content::default().with("unused", &[]);
        let (text, config) = (text_of("one", text), config);
        let registry = FakeRegistry::start(move |ask| {
            if ask.path.contains("/blobs/") {
                return config.answer(ask);
            }
            text(ask)
        });
        let registry = registry.await;
        let message = Site::new(&[&registry]).fails(&registry, "one").await;
        assert!(message.contains(why), "{why}: {message}");
        assert!(message.len() < 2000, "{}", message.len());
    }
}

#[tokio::test]
async fn an_image_that_is_too_large_when_unpacked_is_never_converted() {
    let mut bomb = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut archive = tar("zeros", &[]);
    archive.truncate(512);
    archive[124..136].copy_from_slice(b"00040000000\0");
    super::super::super::unpacked::tests::seal(&mut archive);
    bomb.write_all(&archive).unwrap();
    bomb.write_all(&vec![0; 16 * MIB]).unwrap();
    let bomb = bomb.finish().unwrap();
    assert!(bomb.len() < MIB);
    let content = Content::default().with("bomb", &[bomb]);
    let registry = FakeRegistry::start(move |ask| content.answer(ask)).await;
    let site = Site::new(&[&registry]);
    let message = site.fails(&registry, "bomb").await;
    assert!(
        message.contains("larger than allowed when unpacked"),
        "{message}"
    );
    assert!(
        message.contains("limits.image_unpacked of the site file is 8388608"),
        "{message}"
    );
    assert!(
        !site.dir.path().join("log").exists(),
        "the runtime was not called"
    );
}

#[tokio::test]
async fn a_registrys_message_is_escaped_and_truncated() {
    let message = format!(
        r#"{{"errors":[{{"message":"no\nERROR fake \u001b[2J {}"}}]}}"#,
        "x".repeat(5000)
    );
    let registry = FakeRegistry::start(move |_| {
        Reply::Whole("403 Forbidden", String::new(), message.clone().into())
    });
    let registry = registry.await;
    let message = Site::new(&[&registry]).fails(&registry, "one").await;
    assert!(
        message.contains("no\\u{a}ERROR fake \\u{1b}[2J"),
        "{message}"
    );
    assert!(
        message.len() < 1200 && !message.chars().any(char::is_control),
        "{message}"
    );
}

#[tokio::test]
async fn only_registries_that_the_site_allows_are_asked() {
    let registry = bystander().await;
    let site = Site::with(&[&registry], |settings| {
        settings.policy = Live::fixed(Policy {
            registries: vec!["quay.io".to_owned()],
            ..Policy::default()
        });
    });
    let image = format!("{}/one", registry.address);
    let denied = site.images.check(&image).unwrap_err();
    assert!(
        denied.message.contains("is not among policy.registries"),
        "{denied}"
    );
    assert!(denied.message.contains(&registry.address), "{denied}");
    site.images.check("quay.io/a/b").unwrap();
    site.images.check("QUAY.io/a/b").unwrap();
    // A pod that was admitted before the policy changed.
    let denied = site.images.resolve(&image, PullPolicy::Always, &[]).await;
    assert!(!denied.unwrap_err().retryable());
    assert_eq!(registry.seen.total.load(Ordering::SeqCst), 0);
}
