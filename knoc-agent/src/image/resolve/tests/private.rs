//! Tests of images that a registry gives only for credentials.

use base64::{Engine as _, prelude::BASE64_STANDARD};

use super::{fake::Ask, *};

pub(super) fn credential(password: &str, secret: &str) -> Credential {
    Credential {
        login: super::super::super::Login::new("ann", password),
        secret: secret.to_owned(),
    }
}

pub(super) fn header<'a>(ask: &'a Ask, name: &str) -> &'a str {
    let lines = ask.head.lines().filter_map(|line| line.split_once(": "));
    let mut named = lines.filter(|(found, _)| found.eq_ignore_ascii_case(name));
    named.next().map_or("", |(_, value)| value)
}

fn basic(password: &str) -> String {
    format!(
        "Basic {}",
        BASE64_STANDARD.encode(format!("ann:{password}"))
    )
}

fn denied(lines: &str) -> Reply {
    let body = r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#;
    Reply::Whole("401 Unauthorized", lines.to_owned(), body.into())
}

/// Answers for ann's password `good`, by a token of its own realm.
fn by_token(content: &Content, ask: &Ask) -> Reply {
    if ask.path.starts_with("/token") {
        if header(ask, "authorization") == basic("good") {
            return Reply::ok(r#"{"token":"of-ann","expires_in":300}"#);
        }
        return denied("");
    }
    if header(ask, "authorization") == "Bearer of-ann" {
        return content.answer(ask);
    }
    let host = header(ask, "host");
    denied(&format!(
        "WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"s\"\r\n"
    ))
}

impl World {
    /// A registry that pods name themselves.
    async fn private(answer: impl Fn(&Content, &Ask) -> Reply + Send + Sync + 'static) -> Self {
        let off = Arc::new(AtomicBool::new(false));
        let (content, flag) = (one(), Arc::clone(&off));
        let registry = FakeRegistry::start(move |ask| {
            if flag.load(Ordering::SeqCst) {
                Reply::Close
            } else {
                answer(&content, ask)
            }
        });
        let registry = registry.await;
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("apptainer");
        write_program(&program, APPTAINER);
        let mut settings = settings(dir.path(), &registry.address, program);
        settings.registries[0].prefix = registry.address.clone();
        Self {
            dir,
            registry,
            off,
            images: Images::new(settings),
        }
    }

    async fn ask(
        &self,
        policy: PullPolicy,
        credentials: &[Credential],
    ) -> Result<ResolvedImage, ImageError> {
        let name = format!("{}/library/one:v1", self.registry.address);
        self.images.resolve(&name, policy, credentials).await
    }
}

#[tokio::test]
async fn credentials_are_tried_in_their_order_until_one_fits() {
    let world = World::private(by_token).await;
    let none = world.ask(PullPolicy::Always, &[]).await.unwrap_err();
    assert_eq!(none.reason(), "ErrImagePull");
    assert!(none.message.contains("authentication required"), "{none}");
    let bad = [credential("bad", "u1"), credential("worse", "u1")];
    let bad = world.ask(PullPolicy::Always, &bad).await.unwrap_err();
    assert!(bad.message.contains("authentication required"), "{bad}");
    let both = [credential("bad", "u1"), credential("good", "u1")];
    let image = world.ask(PullPolicy::Always, &both).await.unwrap();
    assert!(image.path.is_file());
    assert_eq!(world.pulls(), 1);
    // A token is requested once.
    let tokens = world.registry.seen.count("GET", "/token");
    let good = [credential("good", "u1")];
    world.ask(PullPolicy::Always, &good).await.unwrap();
    assert_eq!(world.registry.seen.count("GET", "/token"), tokens);
}

#[tokio::test]
async fn a_registry_that_demands_a_password_gets_it_on_demand() {
    let world = World::private(|content, ask| {
        if header(ask, "authorization") == basic("good") {
            return content.answer(ask);
        }
        denied("WWW-Authenticate: Basic realm=\"r\"\r\n")
    })
    .await;
    let none = world.ask(PullPolicy::Always, &[]).await.unwrap_err();
    assert!(none.message.contains("imagePullSecret"), "{none}");
    let good = [credential("good", "u1")];
    world.ask(PullPolicy::IfNotPresent, &good).await.unwrap();
    let seen = world.registry.seen.asks.lock().unwrap();
    let first = seen
        .first()
        .map(|ask| header(ask, "authorization").to_owned());
    assert_eq!(first.as_deref(), Some(""), "nothing before it is demanded");
}

#[tokio::test]
async fn a_cached_private_image_is_only_for_pods_whose_credentials_could_pull_it() {
    let mut world = World::private(by_token).await;
    let first = [credential("good", "u1")];
    let image = world.ask(PullPolicy::IfNotPresent, &first).await.unwrap();
    for policy in [PullPolicy::IfNotPresent, PullPolicy::Always] {
        let none = world.ask(policy, &[]).await.unwrap_err();
        assert_eq!(none.reason(), "ErrImagePull", "{none}");
        let other = [credential("bad", "u2")];
        let other = world.ask(policy, &other).await.unwrap_err();
        assert_eq!(other.reason(), "ErrImagePull", "{other}");
    }
    let never = world.ask(PullPolicy::Never, &[]).await.unwrap_err();
    assert_eq!(never.reason(), "ErrImageNeverPull");
    assert!(never.message.contains("is present"), "{never}");
    // Another Secret with the same password: one answer of the registry, and no pull.
    let blobs = world.registry.seen.count("GET", "/blobs/");
    let second = [credential("good", "u2")];
    let again = world.ask(PullPolicy::IfNotPresent, &second).await.unwrap();
    assert_eq!(again.path, image.path);
    assert_eq!(world.registry.seen.count("GET", "/blobs/"), blobs);
    // What was seen once holds without the registry, after a restart too.
    world.off.store(true, Ordering::SeqCst);
    world.again();
    for policy in [PullPolicy::IfNotPresent, PullPolicy::Never] {
        world.ask(policy, &first).await.unwrap();
        world.ask(policy, &second).await.unwrap();
        let third = [credential("good", "u3")];
        world.ask(policy, &third).await.unwrap_err();
    }
    assert_eq!(world.pulls(), 1);
    // No password is on the disk.
    let record = std::fs::read_to_string(image.path.with_extension("json")).unwrap();
    assert!(record.contains("u1") && record.contains("u2"), "{record}");
    for secret in [
        "good".to_owned(),
        BASE64_STANDARD.encode("ann:good"),
        "of-ann".to_owned(),
    ] {
        assert!(!record.contains(&secret), "{record}");
    }
}

#[tokio::test]
async fn a_private_image_by_its_digest_is_asked_for_too() {
    let world = World::private(by_token).await;
    let good = [credential("good", "u1")];
    let image = world.ask(PullPolicy::IfNotPresent, &good).await.unwrap();
    let name = &image.image_id;
    for policy in [PullPolicy::IfNotPresent, PullPolicy::Always] {
        let none = world.images.resolve(name, policy, &[]).await.unwrap_err();
        assert_eq!(none.reason(), "ErrImagePull", "{none}");
        world.images.resolve(name, policy, &good).await.unwrap();
        let second = [credential("good", "u2")];
        world.images.resolve(name, policy, &second).await.unwrap();
    }
    assert_eq!(world.pulls(), 1);
}

#[tokio::test]
async fn another_repository_must_deliver_a_private_image_itself() {
    let world = World::private(|content, ask| {
        // This one claims to have every digest, and then gives the manifest without its layers.
        if let Some(rest) = ask.path.strip_prefix("/v2/evil/one/") {
            let path = format!("/v2/library/one/{rest}");
            if rest.starts_with("manifests/") {
                let ask = Ask {
                    path,
                    ..ask.clone()
                };
                return content.answer(&ask);
            }
            return Reply::not_found();
        }
        if let Some(rest) = ask.path.strip_prefix("/v2/honest/one/") {
            let path = format!("/v2/library/one/{rest}");
            let ask = Ask {
                path,
                ..ask.clone()
            };
            return content.answer(&ask);
        }
        by_token(content, ask)
    })
    .await;
    let good = [credential("good", "u1")];
    let image = world.ask(PullPolicy::IfNotPresent, &good).await.unwrap();
    let (_, digest) = image.image_id.split_once('@').unwrap();
    for tag in [":v1".to_owned(), format!("@{digest}")] {
        for policy in [PullPolicy::IfNotPresent, PullPolicy::Always] {
            let evil = format!("{}/evil/one{tag}", world.registry.address);
            let error = world.images.resolve(&evil, policy, &[]).await.unwrap_err();
            assert_eq!(error.reason(), "ErrImagePull", "{error}");
            world
                .images
                .resolve(&evil, policy, &good)
                .await
                .unwrap_err();
        }
    }
    let honest = format!("{}/honest/one:v1", world.registry.address);
    let own = world.images.resolve(&honest, PullPolicy::IfNotPresent, &[]);
    assert_eq!(own.await.unwrap().path, image.path);
    assert_eq!(world.pulls(), 1, "it was there already");
    // Now everybody is known to get it.
    world.ask(PullPolicy::Never, &[]).await.unwrap();
}

#[tokio::test]
async fn credentials_reach_no_mirror_that_the_site_did_not_name_for_them() {
    let world = World::new().await;
    let good = [credential("good", "u1")];
    let name = "library/one";
    world
        .images
        .resolve(name, PullPolicy::Always, &good)
        .await
        .unwrap();
    let seen = world.registry.seen.asks.lock().unwrap();
    for ask in seen.iter() {
        assert_eq!(header(ask, "authorization"), "", "{}", ask.head);
    }
}

#[tokio::test]
async fn pods_with_different_credentials_do_not_share_an_answer() {
    let world = World::private(by_token).await;
    let (good, bad) = ([credential("good", "u1")], [credential("bad", "u2")]);
    let (first, second, third) = tokio::join!(
        world.ask(PullPolicy::Always, &good),
        world.ask(PullPolicy::Always, &bad),
        world.ask(PullPolicy::Always, &[]),
    );
    first.unwrap();
    second.unwrap_err();
    third.unwrap_err();
}
