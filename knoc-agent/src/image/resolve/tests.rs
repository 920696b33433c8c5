//! Tests against a fake registry with one image, and a fake apptainer that writes a file and logs
//! its calls.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use knoc_contract::jobdir::StateDir;

use super::super::Bounds;
use super::super::digest::Digest;
use super::*;
use crate::{
    config::{Compression, Policy, Registry},
    policy::Live,
};

mod by_job;
mod cached;
mod compressed;
mod fake;
mod hostile;
mod library;
mod private;
mod pushed;

use self::fake::{CONFIG, Content, FakeRegistry, Reply, tar};

struct World {
    dir: tempfile::TempDir,
    registry: FakeRegistry,
    off: Arc<AtomicBool>,
    images: Images,
}

/// Logs its arguments, and creates a file from its layout.
const APPTAINER: &str = r#"echo "$@" >>"$LOG"
sleep 0.2
test -e "$FAIL" && { echo 'INFO:    Starting'; echo 'FATAL:   While making image: no space left' >&2; exit 255; }
cat layout/index.json >image.sif
"#;

fn layer() -> Vec<u8> {
    tar("etc/passwd", b"root:x:0:0\n")
}

fn one() -> Content {
    Content::default().with("library/one", &[layer()])
}

impl World {
    async fn new() -> Self {
        Self::of(one()).await
    }

    async fn of(content: Content) -> Self {
        let off = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&off);
        let registry = FakeRegistry::start(move |ask| {
            if flag.load(Ordering::SeqCst) {
                Reply::Close
            } else {
                content.answer(ask)
            }
        });
        let registry = registry.await;
        let dir = tempfile::tempdir().unwrap();
        let images = images(dir.path(), &registry.address);
        Self {
            dir,
            registry,
            off,
            images,
        }
    }

    fn again(&mut self) {
        self.images = Images::new(self.images.settings().clone());
    }

    fn pulls(&self) -> usize {
        std::fs::read_to_string(self.dir.path().join("log"))
            .unwrap_or_default()
            .lines()
            .count()
    }
}

fn write_program(path: &Path, script: &str) {
    let mut file = std::fs::File::create(path).unwrap();
    std::io::Write::write_all(&mut file, format!("#!/bin/sh\n{script}").as_bytes()).unwrap();
    file.set_permissions(PermissionsExt::from_mode(0o755))
        .unwrap();
}

fn images(dir: &Path, registry: &str) -> Images {
    let program = dir.join("apptainer");
    write_program(&program, APPTAINER);
    Images::new(settings(dir, registry, program))
}

fn settings(dir: &Path, registry: &str, program: PathBuf) -> Settings {
    let file = |name: &str| dir.join(name).display().to_string();
    let state = StateDir::new(dir);
    state.create().unwrap();
    Settings {
        program: Some(program),
        env: [
            ("PATH".to_owned(), "/usr/bin:/bin".to_owned()),
            ("LOG".to_owned(), file("log")),
            ("FAIL".to_owned(), file("fail")),
        ]
        .into(),
        state,
        roots: Vec::new(),
        trust_shared_roots: false,
        registries: vec![Registry {
            prefix: "docker.io".to_owned(),
            mirror: Some(registry.to_owned()),
            insecure: true,
            credentials: false,
        }],
        library: None,
        policy: Live::fixed(Policy::default()),
        compression: Compression::Gzip,
        jobs: None,
        limits: Bounds {
            size: 1 << 20,
            unpacked: 8 << 20,
            cache: 1 << 30,
            stall: Duration::from_secs(5),
        },
        concurrency: 2,
        registry_timeout: Duration::from_secs(5),
        pull_timeout: Duration::from_secs(20),
    }
}

fn manifest() -> String {
    let digest = Digest::of(&layer()).to_string();
    fake::manifest(&[(digest, layer().len())])
}

fn digest(text: &str) -> String {
    Digest::of(text.as_bytes()).to_string()
}

#[tokio::test]
async fn a_name_becomes_a_file_with_its_config() {
    let world = World::new().await;
    let image = world
        .images
        .resolve("one:v1", PullPolicy::IfNotPresent, &[])
        .await
        .unwrap();
    let expected = digest(&manifest());
    assert_eq!(image.image_id, format!("docker.io/library/one@{expected}"));
    assert_eq!(
        image.path,
        world
            .dir
            .path()
            .join(format!("images/{}.sif", expected.replace(':', "-")))
    );
    // The fake converts the layout whose blobs were checked.
    let index = std::fs::read_to_string(&image.path).unwrap();
    assert!(index.contains("manifests"), "{index}");
    let log = std::fs::read_to_string(world.dir.path().join("log")).unwrap();
    assert_eq!(log, "pull --disable-cache --force image.sif oci:layout\n");
    let config = image.config;
    assert_eq!(
        (config.entrypoint, config.cmd),
        (vec!["/e".to_owned()], vec!["/bin/sh".to_owned()])
    );
    assert_eq!(
        (config.working_dir.as_str(), config.user.as_str()),
        ("/w", "7")
    );
    assert_eq!(
        std::fs::read_dir(world.dir.path().join("images/.tmp"))
            .unwrap()
            .count(),
        0
    );
}

#[tokio::test]
async fn many_pods_pull_once() {
    let world = World::new().await;
    let names = [
        "one",
        "one:latest",
        "docker.io/library/one",
        "one:v1",
        "docker://one",
    ];
    let asks = names.iter().cycle().take(50);
    let all = asks.map(|name| world.images.resolve(name, PullPolicy::Always, &[]));
    for image in futures::future::join_all(all).await {
        assert!(image.unwrap().path.is_file());
    }
    assert_eq!(world.pulls(), 1);
}

#[tokio::test]
async fn the_same_name_in_two_registries_is_two_images() {
    let other = Content::default().with("library/one", &[tar("etc/passwd", b"other:x:0:0\n")]);
    let registry = FakeRegistry::start(move |ask| other.answer(ask)).await;
    let mut world = World::new().await;
    let mut settings = world.images.settings().clone();
    settings.registries.push(Registry {
        prefix: registry.address.clone(),
        mirror: None,
        insecure: true,
        credentials: false,
    });
    world.images = Images::new(settings);
    let first = "docker.io/library/one:v1".to_owned();
    let second = format!("{}/library/one:v1", registry.address);
    let (mut paths, mut digests) = (Vec::new(), Vec::new());
    for name in [first, second] {
        let image = world
            .images
            .resolve(&name, PullPolicy::IfNotPresent, &[])
            .await
            .unwrap();
        let (_, digest) = image.image_id.split_once('@').unwrap();
        digests.push(digest.to_owned());
        paths.push(image.path);
    }
    assert_ne!(digests[0], digests[1]);
    assert_ne!(paths[0], paths[1]);
}

#[tokio::test]
async fn policies() {
    let mut world = World::new().await;
    let never = world
        .images
        .resolve("one", PullPolicy::Never, &[])
        .await
        .unwrap_err();
    assert_eq!(never.reason(), "ErrImageNeverPull");
    world
        .images
        .resolve("one", PullPolicy::Always, &[])
        .await
        .unwrap();
    // From here on the registry does not answer; a restarted agent still has its cache.
    world.off.store(true, Ordering::SeqCst);
    world.again();
    world
        .images
        .resolve("one", PullPolicy::IfNotPresent, &[])
        .await
        .unwrap();
    world
        .images
        .resolve("one", PullPolicy::Never, &[])
        .await
        .unwrap();
    let always = world
        .images
        .resolve("one", PullPolicy::Always, &[])
        .await
        .unwrap_err();
    assert_eq!(
        (always.reason(), always.retryable()),
        ("ErrImagePull", true)
    );
    assert_eq!(world.pulls(), 1);
}

#[tokio::test]
async fn failures_keep_the_message_and_are_retried() {
    let world = World::new().await;
    let missing = world
        .images
        .resolve("two", PullPolicy::IfNotPresent, &[])
        .await
        .unwrap_err();
    assert_eq!(missing.reason(), "ErrImagePull");
    assert!(
        missing
            .message
            .ends_with("library/two:latest: manifest unknown"),
        "{missing}"
    );
    let fail = world.dir.path().join("fail");
    std::fs::File::create(&fail).unwrap();
    let failed = world
        .images
        .resolve("one", PullPolicy::IfNotPresent, &[])
        .await
        .unwrap_err();
    assert_eq!(failed.message, "While making image: no space left");
    std::fs::remove_file(fail).unwrap();
    world
        .images
        .resolve("one", PullPolicy::IfNotPresent, &[])
        .await
        .unwrap();
    assert_eq!(world.pulls(), 2);
}

#[tokio::test]
async fn doctor_says_what_is_there() {
    let world = World::new().await;
    write_program(
        &world.dir.path().join("apptainer"),
        "echo 'apptainer version 1.4.5'",
    );
    let findings = world.images.checks().await;
    let all: Vec<(bool, &str)> = findings.iter().map(|f| (f.ok, f.check.as_str())).collect();
    let expected = [
        (true, "images: runtime"),
        (true, "runtime: exec"),
        (true, "images: compression"),
        (true, "images: cache"),
        (true, "images: mirror of docker.io"),
    ];
    assert_eq!(all, expected, "{findings:?}");
    world.off.store(true, Ordering::SeqCst);
    let findings = world.images.checks().await;
    assert!(!findings.last().unwrap().ok, "{findings:?}");
}

#[tokio::test]
async fn without_a_runtime_an_image_is_only_a_name() {
    let world = World::new().await;
    let settings = Settings {
        program: None,
        ..world.images.settings().clone()
    };
    let images = Images::new(settings);
    let image = images
        .resolve("Whatever it is", PullPolicy::Always, &[])
        .await
        .unwrap();
    assert_eq!(image.image_id, "Whatever it is");
    images.check("oras://x/y").unwrap();
}

#[tokio::test]
async fn a_source_is_rejected_before_the_pod_is_accepted_and_a_bad_name_waits() {
    let world = World::new().await;
    world.images.check("oras://x/y").unwrap();
    let error = world.images.check("library://x/y").unwrap_err();
    assert_eq!(error.kind, ImageErrorKind::Unsupported);
    world.images.check("Whatever it is").unwrap();
    let waits = world
        .images
        .resolve("Whatever it is", PullPolicy::IfNotPresent, &[]);
    assert_eq!(waits.await.unwrap_err().reason(), "InvalidImageName");
}

/// Handles `sif list` and `sif dump` of a file whose config gives its own size as the command.
const SIF: &str = r#"echo "$@" >>"$LOG"
test -e "$FAIL" && { echo 'FATAL:   no such host file system' >&2; exit 255; }
for last; do sif=$last; done
case $2 in
list) echo '1    |1       |NONE    |32176-32233               |JSON.Generic' ;;
dump) echo "{\"Cmd\":[\"$(stat -Lc %s "$sif")\"]}" ;;
esac
"#;

fn write_sif(path: &Path, padding: usize) {
    let mut bytes = vec![0; 32];
    bytes.extend_from_slice(b"SIF_MAGIC");
    bytes.resize(bytes.len() + padding, 0);
    knoc_contract::jobdir::atomic::write(path, &bytes, 0o600).unwrap();
}

#[tokio::test]
async fn a_sif_is_asked_once_and_again_when_it_is_another() {
    let world = World::new().await;
    write_program(&world.dir.path().join("apptainer"), SIF);
    let sif = world.dir.path().join("one.sif");
    write_sif(&sif, 10);
    let images = Images::new(Settings {
        roots: vec![world.dir.path().to_owned()],
        ..world.images.settings().clone()
    });
    let name = sif.display().to_string();
    let ask = || images.resolve(&name, PullPolicy::IfNotPresent, &[]);
    let fail = world.dir.path().join("fail");
    std::fs::File::create(&fail).unwrap();
    let failed = ask().await.unwrap_err();
    assert_eq!(failed.message, "no such host file system");
    assert!(failed.retryable());
    std::fs::remove_file(fail).unwrap();
    let all = futures::future::join_all((0..50).map(|_| ask())).await;
    for image in all {
        assert_eq!(image.unwrap().config.cmd, ["51"]);
    }
    ask().await.unwrap();
    // One failure, then `list` and `dump` once each.
    assert_eq!(world.pulls(), 3);
    write_sif(&sif, 20);
    assert_eq!(ask().await.unwrap().config.cmd, ["61"]);
    assert_eq!(world.pulls(), 5);
}
