//! Against a registry of one image, and an apptainer that writes a file and counts.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::config::Registry;

const CONFIG: &str = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"config":{"Cmd":["/bin/sh"],"Entrypoint":["/e"],"Env":["A=b"],"WorkingDir":"/w","User":"7"}}"#;

fn digest(text: &str) -> String {
    use std::fmt::Write as _;
    Sha256::digest(text)
        .iter()
        .fold("sha256:".to_owned(), |mut hex, byte| {
            write!(hex, "{byte:02x}").unwrap();
            hex
        })
}

fn manifest() -> String {
    let (config, size) = (digest(CONFIG), CONFIG.len());
    format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":{size}}},"layers":[]}}"#
    )
}

/// Answers GET and HEAD of `library/one`, and 404 to all else; or nothing while it is off.
struct FakeRegistry {
    address: String,
    off: Arc<AtomicBool>,
    _task: AbortOnDropHandle<()>,
}

async fn serve(mut stream: TcpStream, off: Arc<AtomicBool>) {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
        text.extend_from_slice(&buffer[..n]);
        if !text.ends_with(b"\r\n\r\n") {
            continue;
        }
        if off.load(Ordering::SeqCst) {
            return;
        }
        let head = String::from_utf8_lossy(&text).into_owned();
        text.clear();
        let path = head.split(' ').nth(1).unwrap_or_default();
        let (status, kind, body) = match path.strip_prefix("/v2/") {
            Some("") => ("200 OK", "application/json", "{}".to_owned()),
            Some(rest) if rest.starts_with("library/one/manifests/") => (
                "200 OK",
                "application/vnd.oci.image.manifest.v1+json",
                manifest(),
            ),
            Some(rest) if rest == format!("library/one/blobs/{}", digest(CONFIG)) => {
                ("200 OK", "application/octet-stream", CONFIG.to_owned())
            }
            _ => {
                let words =
                    r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#;
                ("404 Not Found", "application/json", words.to_owned())
            }
        };
        let (length, digest) = (body.len(), digest(&body));
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nDocker-Content-Digest: {digest}\r\n\r\n"
        );
        let body = if head.starts_with("HEAD") { "" } else { &body };
        if stream
            .write_all(format!("{answer}{body}").as_bytes())
            .await
            .is_err()
        {
            return;
        }
    }
}

impl FakeRegistry {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let off = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&off);
        let accept = async move {
            let mut tasks = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                tasks.spawn(serve(stream, Arc::clone(&flag)));
            }
        };
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(accept);
        let whole = async move { while tasks.join_next().await.is_some() {} };
        #[expect(
            clippy::disallowed_methods,
            reason = "owned by the handle, which aborts it"
        )]
        let task = AbortOnDropHandle::new(tokio::spawn(whole));
        Self {
            address,
            off,
            _task: task,
        }
    }
}

struct World {
    dir: tempfile::TempDir,
    registry: FakeRegistry,
    images: Images,
}

const APPTAINER: &str = r#"echo "$@" >>"$LOG"
for last; do uri=$last; done
file=$(echo "$@" | sed 's/.* \([^ ]*image.sif\) .*/\1/')
sleep 0.2
test -e "$FAIL" && { echo 'INFO:    Starting'; echo 'FATAL:   While making image: no space left' >&2; exit 255; }
echo "$uri" >"$file"
"#;

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let registry = FakeRegistry::start().await;
        let program = dir.path().join("apptainer");
        write_program(&program, APPTAINER);
        let images = Images::new(settings(dir.path(), &registry.address, program));
        Self {
            dir,
            registry,
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

fn settings(dir: &Path, registry: &str, program: PathBuf) -> Settings {
    let file = |name: &str| dir.join(name).display().to_string();
    let cache = dir.join("images");
    std::fs::create_dir(&cache).unwrap();
    Settings {
        program: Some(program),
        env: [
            ("PATH".to_owned(), "/usr/bin:/bin".to_owned()),
            ("LOG".to_owned(), file("log")),
            ("FAIL".to_owned(), file("fail")),
        ]
        .into(),
        cache,
        roots: Vec::new(),
        trust_shared_roots: false,
        registries: vec![Registry {
            prefix: "docker.io".to_owned(),
            mirror: Some(registry.to_owned()),
            insecure: true,
        }],
        concurrency: 2,
        registry_timeout: Duration::from_secs(5),
        pull_timeout: Duration::from_secs(20),
    }
}

#[tokio::test]
async fn a_name_becomes_a_file_with_its_config() {
    let world = World::new().await;
    let image = world
        .images
        .resolve("one:v1", PullPolicy::IfNotPresent)
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
    let uri = std::fs::read_to_string(&image.path).unwrap();
    assert_eq!(
        uri,
        format!(
            "docker://{}/library/one@{expected}\n",
            world.registry.address
        )
    );
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
    let all = asks.map(|name| world.images.resolve(name, PullPolicy::Always));
    for image in futures::future::join_all(all).await {
        assert!(image.unwrap().path.is_file());
    }
    assert_eq!(world.pulls(), 1);
}

#[tokio::test]
async fn policies() {
    let mut world = World::new().await;
    let never = world
        .images
        .resolve("one", PullPolicy::Never)
        .await
        .unwrap_err();
    assert_eq!(never.reason(), "ErrImageNeverPull");
    world
        .images
        .resolve("one", PullPolicy::Always)
        .await
        .unwrap();
    // From here on the registry does not answer; a restarted agent knows what it had.
    world.registry.off.store(true, Ordering::SeqCst);
    world.again();
    world
        .images
        .resolve("one", PullPolicy::IfNotPresent)
        .await
        .unwrap();
    world
        .images
        .resolve("one", PullPolicy::Never)
        .await
        .unwrap();
    let always = world
        .images
        .resolve("one", PullPolicy::Always)
        .await
        .unwrap_err();
    assert_eq!(
        (always.reason(), always.retryable()),
        ("ErrImagePull", true)
    );
    assert_eq!(world.pulls(), 1);
}

#[tokio::test]
async fn failures_keep_the_words_and_are_tried_again() {
    let world = World::new().await;
    let missing = world
        .images
        .resolve("two", PullPolicy::IfNotPresent)
        .await
        .unwrap_err();
    assert_eq!(missing.reason(), "ErrImagePull");
    assert!(
        missing
            .words
            .ends_with("library/two:latest: manifest unknown"),
        "{missing}"
    );
    let fail = world.dir.path().join("fail");
    std::fs::File::create(&fail).unwrap();
    let failed = world
        .images
        .resolve("one", PullPolicy::IfNotPresent)
        .await
        .unwrap_err();
    assert_eq!(failed.words, "While making image: no space left");
    std::fs::remove_file(fail).unwrap();
    world
        .images
        .resolve("one", PullPolicy::IfNotPresent)
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
        (true, "images: cache"),
        (true, "images: mirror of docker.io"),
    ];
    assert_eq!(all, expected, "{findings:?}");
    world.registry.off.store(true, Ordering::SeqCst);
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
        .resolve("Whatever it is", PullPolicy::Always)
        .await
        .unwrap();
    assert_eq!(image.image_id, "Whatever it is");
    images.check("oras://x/y").unwrap();
}

#[tokio::test]
async fn a_source_is_refused_before_the_pod_is_taken_and_a_bad_name_waits() {
    let world = World::new().await;
    let refused = world.images.check("oras://x/y").unwrap_err();
    assert_eq!(refused.kind, ImageErrorKind::Unsupported);
    world.images.check("Whatever it is").unwrap();
    let waits = world
        .images
        .resolve("Whatever it is", PullPolicy::IfNotPresent);
    assert_eq!(waits.await.unwrap_err().reason(), "InvalidImageName");
}

/// `sif list` and `sif dump` of a file whose config names its own size as the command.
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
    crate::jobdir::atomic::write(path, &bytes, 0o600).unwrap();
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
    let ask = || images.resolve(&name, PullPolicy::IfNotPresent);
    let fail = world.dir.path().join("fail");
    std::fs::File::create(&fail).unwrap();
    let failed = ask().await.unwrap_err();
    assert_eq!(failed.words, "no such host file system");
    assert!(failed.retryable());
    std::fs::remove_file(fail).unwrap();
    let all = futures::future::join_all((0..50).map(|_| ask())).await;
    for image in all {
        assert_eq!(image.unwrap().config.cmd, ["51"]);
    }
    ask().await.unwrap();
    // One failure, then `list` and `dump` once.
    assert_eq!(world.pulls(), 3);
    write_sif(&sif, 20);
    assert_eq!(ask().await.unwrap().config.cmd, ["61"]);
    assert_eq!(world.pulls(), 5);
}
