//! Tests of images in the site's library (`library://`).

use super::{
    super::super::{library::Library, manifest::ARCHITECTURE},
    fake::Ask,
    private::{credential, header},
    pushed::sif,
    *,
};

const NAME: &str = "library://alice/tools/one:1";
const TOKEN: &str = "s3cr3t-of-the-site";

/// What a library says of a file.
fn about(file: &[u8]) -> String {
    let hash = hash(file);
    let size = file.len();
    format!(r#"{{"data":{{"hash":"{hash}","size":{size},"arch":"{ARCHITECTURE}"}}}}"#)
}

fn hash(file: &[u8]) -> String {
    Digest::of(file).to_string().replace(':', ".")
}

fn not_found() -> Reply {
    let body = r#"{"error":{"code":404,"message":"image not found"}}"#;
    Reply::Whole("404 Not Found", String::new(), body.into())
}

/// The answer of a library that has one container, with any tag.
fn answer(ask: &Ask, about: &str, file: &[u8]) -> Reply {
    let wanted = format!("?arch={ARCHITECTURE}");
    let path = ask.path.strip_suffix(&wanted).unwrap_or_default();
    if path.starts_with("/v1/images/alice/tools/one:") {
        Reply::ok(about)
    } else if path.starts_with("/v1/imagefile/alice/tools/one:") {
        Reply::ok(file)
    } else {
        not_found()
    }
}

/// A site with that library.
async fn world(answer: impl Fn(&Ask) -> Reply + Send + Sync + 'static) -> World {
    let off = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&off);
    let registry = FakeRegistry::start(move |ask| {
        if flag.load(Ordering::SeqCst) {
            Reply::Close
        } else {
            answer(ask)
        }
    });
    let registry = registry.await;
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("apptainer");
    write_program(&program, SIF);
    let mut settings = settings(dir.path(), &registry.address, program);
    let address = format!("http://{}", registry.address);
    settings.library = Some(Library::new(&address, None));
    World {
        dir,
        registry,
        off,
        images: Images::new(settings),
    }
}

#[tokio::test]
async fn a_file_of_the_library_is_used_as_it_is_and_kept_by_its_hash() {
    let mut world = world(|ask| answer(ask, &about(&sif()), &sif())).await;
    let host = world.registry.address.clone();
    let id = format!("library://{host}/alice/tools/one@{}", Digest::of(&sif()));
    let all = (0..20).map(|_| world.images.resolve(NAME, PullPolicy::Always, &[]));
    for image in futures::future::join_all(all).await {
        let image = image.unwrap();
        assert_eq!(image.config.cmd, ["200"]);
        assert_eq!(std::fs::read(&image.path).unwrap(), sif());
        assert_eq!(image.image_id, id);
        // It starts as a SIF file of the site does.
        assert_eq!(image.file.unwrap().size, 200);
    }
    // `list` and `dump`, and nothing was converted.
    assert_eq!(world.pulls(), 2);
    // `Always` asks for the hash.
    let asked = world.registry.seen.count("GET", "/v1/images/");
    let again = world.images.resolve(NAME, PullPolicy::Always, &[]);
    again.await.unwrap();
    assert_eq!(world.registry.seen.count("GET", "/v1/images/"), asked + 1);
    assert_eq!(world.registry.seen.count("GET", "/v1/imagefile/"), 1);
    // These need no answer.
    world.off.store(true, Ordering::SeqCst);
    world.again();
    let full = format!("library://{host}/alice/tools/one:1");
    let by_hash = format!("library://alice/tools/one:{}", hash(&sif()));
    for (name, policy) in [
        (NAME, PullPolicy::IfNotPresent),
        (full.as_str(), PullPolicy::Never),
        (id.as_str(), PullPolicy::Always),
        (by_hash.as_str(), PullPolicy::Always),
    ] {
        let kept = world.images.resolve(name, policy, &[]).await.unwrap();
        assert_eq!(kept.image_id, id, "{name}");
    }
    let asks = world.images.resolve(NAME, PullPolicy::Always, &[]);
    assert_eq!(asks.await.unwrap_err().reason(), "ErrImagePull");
}

#[tokio::test]
async fn what_is_not_the_file_that_the_library_describes_is_rejected() {
    let sif = sif();
    let text = b"not a SIF file, however long it may be, and a bit more of it".to_vec();
    let mut other = sif.clone();
    other[99] = 8;
    let small = about(&sif).replace("\"size\":200", "\"size\":5");
    let cases = [
        (about(&sif), other, "instead of sha256:"),
        (about(&text), text, "is not a SIF file"),
        (small, sif.clone(), "has 200 bytes"),
        (
            about(&sif).replace("sha256.", "sif."),
            sif.clone(),
            "the hash \"sif.",
        ),
        (
            about(&sif).replace(ARCHITECTURE, "riscv64"),
            sif,
            "for riscv64",
        ),
    ];
    for (about, file, expected) in cases {
        let world = world(move |ask| answer(ask, &about, &file)).await;
        let error = world.images.resolve(NAME, PullPolicy::Always, &[]).await;
        let error = error.unwrap_err();
        assert_eq!(error.reason(), "ErrImagePull", "{error}");
        assert!(error.message.contains(expected), "{expected}: {error}");
        assert!(error.message.contains("/alice/tools/one:1: "), "{error}");
    }
}

#[tokio::test]
async fn a_cached_container_image_is_no_file_of_a_library_that_names_its_digest() {
    let (content, claimed) = (one(), digest(&manifest()).replace(':', "."));
    let claimed = format!(r#"{{"data":{{"hash":"{claimed}","size":200}}}}"#);
    let world = world(move |ask| {
        if ask.path.starts_with("/v2/") {
            content.answer(ask)
        } else {
            answer(ask, &claimed, &sif())
        }
    })
    .await;
    write_program(&world.dir.path().join("apptainer"), APPTAINER);
    let image = world.images.resolve("one:v1", PullPolicy::Always, &[]);
    image.await.unwrap();
    let error = world.images.resolve(NAME, PullPolicy::Always, &[]).await;
    let error = error.unwrap_err();
    assert!(error.message.contains("instead of sha256:"), "{error}");
}

#[tokio::test]
async fn a_library_says_why_and_no_answer_of_it_is_read_without_a_limit() {
    let world = world(|ask| {
        if ask.path.contains("endless") {
            Reply::Endless(String::new())
        } else if ask.path.contains("/evil:") {
            // It begins as the agent's own messages do.
            let (host, more) = (header(ask, "host"), "x".repeat(5000));
            let message = format!(r"library://{host}/evil:latest: \n\u001b[2J{more}");
            let body = format!(r#"{{"error":{{"message":"{message}"}}}}"#);
            Reply::Whole("403 Forbidden", String::new(), body.into())
        } else {
            not_found()
        }
    })
    .await;
    for (name, expected) in [
        ("library://other", "image not found"),
        ("library://a/endless/b:1", "is longer than"),
        ("library://evil", "\\u{a}\\u{1b}[2Jx"),
    ] {
        let error = world.images.resolve(name, PullPolicy::Always, &[]).await;
        let error = error.unwrap_err().message;
        assert!(error.contains(expected), "{name}: {error}");
        let control = error.chars().any(char::is_control);
        assert!(error.len() < 1200 && !control, "{name}: {error}");
    }
}

/// A world whose library demands the token of the site, and redirects to a store.
async fn with_token(store: &FakeRegistry, named: bool) -> World {
    let location = format!("http://{}/blob", store.address);
    let mut world = world(move |ask| {
        if header(ask, "authorization") != format!("Bearer {TOKEN}") {
            return Reply::Whole("401 Unauthorized", String::new(), Vec::new());
        }
        if ask.path.starts_with("/v1/imagefile/") {
            return Reply::redirect(&location);
        }
        answer(ask, &about(&sif()), &[])
    })
    .await;
    let mut settings = world.images.settings().clone();
    let token = world.dir.path().join("token");
    knoc_contract::jobdir::atomic::write(&token, TOKEN.as_bytes(), 0o600).unwrap();
    let address = format!("http://{}", world.registry.address);
    settings.library = Some(Library::new(&address, Some(token)));
    if named {
        settings.registries.push(Registry {
            prefix: store.address.clone(),
            mirror: None,
            insecure: true,
            credentials: false,
        });
    }
    world.images = Images::new(settings);
    world
}

#[tokio::test]
async fn the_token_of_the_site_is_for_the_library_alone_and_what_it_gives_for_every_pod() {
    let store = FakeRegistry::start(|_| Reply::ok(sif())).await;
    let refused = with_token(&store, false).await;
    let error = refused.images.resolve(NAME, PullPolicy::Always, &[]).await;
    let error = error.unwrap_err().message;
    assert!(error.contains("loopback"), "{error}");
    let world = with_token(&store, true).await;
    let own = [credential("good", "u1")];
    let first = world.images.resolve(NAME, PullPolicy::Always, &own).await;
    let first = first.unwrap();
    for credentials in [&[][..], &[credential("other", "u2")]] {
        let kept = world.images.resolve(NAME, PullPolicy::Never, credentials);
        assert_eq!(kept.await.unwrap().path, first.path);
    }
    for ask in store.seen.asks.lock().unwrap().iter() {
        assert_eq!(header(ask, "authorization"), "", "{}", ask.head);
    }
    for ask in world.registry.seen.asks.lock().unwrap().iter() {
        let sent = header(ask, "authorization");
        assert_eq!(sent, format!("Bearer {TOKEN}"), "{}", ask.head);
    }
    let record = std::fs::read_to_string(first.path.with_extension("json")).unwrap();
    assert!(!record.contains(TOKEN), "{record}");
    assert!(!format!("{:?}", world.images.settings()).contains(TOKEN));
    let token = world.dir.path().join("token");
    std::fs::set_permissions(token, PermissionsExt::from_mode(0o644)).unwrap();
    let open = world.images.resolve(NAME, PullPolicy::Always, &[]).await;
    let open = open.unwrap_err();
    assert!(open.message.contains("mode 0600"), "{open}");
    let findings = world.images.checks().await;
    let last = findings.last().unwrap();
    assert!(last.check == "images: library" && !last.ok, "{last:?}");
}

#[tokio::test]
async fn names_of_other_libraries_are_rejected_before_the_pod_is_accepted() {
    let world = world(|_| not_found()).await;
    world.images.check("library://x/y").unwrap();
    for name in ["library://other.example.org/a/b/c", "shub://x/y"] {
        let error = world.images.check(name).unwrap_err();
        assert_eq!(error.kind, ImageErrorKind::Unsupported, "{error}");
    }
    // Several tags are for a push.
    world.images.check("library://a/b/c:1,2").unwrap();
    let waits = world
        .images
        .resolve("library://a/b/c:1,2", PullPolicy::Always, &[]);
    assert_eq!(waits.await.unwrap_err().reason(), "InvalidImageName");
    let mut settings = world.images.settings().clone();
    settings.policy = Live::fixed(Policy {
        registries: vec!["docker.io".to_owned()],
        ..Policy::default()
    });
    let error = Images::new(settings).check("library://x/y").unwrap_err();
    assert_eq!(error.kind, ImageErrorKind::Denied, "{error}");
    let findings = world.images.checks().await;
    let last = findings.last().unwrap();
    assert!(last.check == "images: library" && last.ok, "{last:?}");
}
