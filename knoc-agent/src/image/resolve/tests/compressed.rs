//! Tests of how the files of new images are compressed: what the runtime is asked and told, and what happens if it fails.

use super::*;

/// Logs its arguments and creates a file. If `$FAIL` exists, its `build` fails, and if that has something in it, `pull` too.
const PROGRAM: &str = r#"echo "$@" >>"$LOG"
case "$1 $2" in
"build --help") echo '@HELP@'; exit 0 ;;
--version*) echo 'apptainer version 1.4.5'; exit 0 ;;
build*) test -e "$FAIL" && { echo 'FATAL:   While performing build: no such compressor' >&2; exit 255; } ;;
pull*) test -s "$FAIL" && { echo 'FATAL:   While making image: no space left' >&2; exit 255; } ;;
esac
cat layout/index.json >image.sif
"#;

const ABLE: &str = "      --mksquashfs-args string   extra arguments to pass to mksquashfs";
const OLD: &str = "      --notest                   build without running tests";

const ASKED: &str = "build --help";
const GZIP: &str = "pull --disable-cache --force image.sif oci:layout";
const ZSTD: &str = "build --disable-cache --force --notest --mksquashfs-args -comp zstd -Xcompression-level 3 image.sif oci:layout";

/// A registry with the images `image-0` and so on, and a runtime whose `build` has the options of `help`.
async fn world(compression: Compression, help: &str) -> World {
    let content = (0..3).fold(Content::default(), |content, number| {
        let name = format!("image-{number}");
        content.with(&format!("library/{name}"), &[tar(&name, b"")])
    });
    let registry = FakeRegistry::start(move |ask| content.answer(ask)).await;
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("apptainer");
    write_program(&program, &PROGRAM.replace("@HELP@", help));
    let settings = Settings {
        compression,
        ..settings(dir.path(), &registry.address, program)
    };
    World {
        dir,
        registry,
        off: Arc::default(),
        images: Images::new(settings),
    }
}

async fn pull(world: &World, number: usize) -> Result<(), String> {
    let name = format!("image-{number}");
    let image = world
        .images
        .resolve(&name, PullPolicy::IfNotPresent, &[])
        .await;
    let image = image.map_err(|error| error.message)?;
    assert!(image.path.is_file(), "{image:?}");
    Ok(())
}

/// What the runtime was called with.
fn calls(world: &World) -> Vec<String> {
    let log = std::fs::read_to_string(world.dir.path().join("log")).unwrap();
    log.lines().map(str::to_owned).collect()
}

/// What `doctor` says about the compression.
async fn found(world: &World) -> pb::Finding {
    let mut findings = world.images.checks().await.into_iter();
    let found = findings.find(|finding| finding.check == "images: compression");
    found.unwrap()
}

fn fail(world: &World, text: &[u8]) {
    let path = world.dir.path().join("fail");
    knoc_contract::jobdir::atomic::write(&path, text, 0o600).unwrap();
}

#[tokio::test]
async fn the_runtime_is_asked_once_and_then_compresses_with_zstd() {
    let world = world(Compression::Auto, ABLE).await;
    pull(&world, 0).await.unwrap();
    pull(&world, 1).await.unwrap();
    assert_eq!(calls(&world), [ASKED, ZSTD, ZSTD]);
    let finding = found(&world).await;
    assert_eq!(
        (finding.ok, finding.detail.as_str()),
        (true, "zstd"),
        "{finding:?}"
    );
    // An image that is in the cache stays as it is, whatever the setting is.
    let images = Images::new(Settings {
        compression: Compression::Lz4,
        ..world.images.settings().clone()
    });
    let before = calls(&world).len();
    let again = images.resolve("image-0", PullPolicy::IfNotPresent, &[]);
    again.await.unwrap();
    assert_eq!(calls(&world).len(), before);
}

#[tokio::test]
async fn an_older_runtime_converts_as_ever_and_a_site_that_wants_more_is_told() {
    for compression in [Compression::Auto, Compression::Zstd, Compression::Lz4] {
        let world = world(compression, OLD).await;
        pull(&world, 0).await.unwrap();
        assert_eq!(calls(&world), [ASKED, GZIP]);
        let finding = found(&world).await;
        assert_eq!(finding.ok, compression == Compression::Auto, "{finding:?}");
        assert!(finding.detail.contains("--mksquashfs-args"), "{finding:?}");
    }
    let world = world(Compression::Gzip, ABLE).await;
    pull(&world, 0).await.unwrap();
    assert_eq!(calls(&world), [GZIP], "nothing to ask");
}

#[tokio::test]
async fn a_compression_that_fails_fails_no_pod_and_is_not_tried_again() {
    let world = world(Compression::Auto, ABLE).await;
    fail(&world, b"");
    pull(&world, 0).await.unwrap();
    pull(&world, 1).await.unwrap();
    assert_eq!(calls(&world), [ASKED, ZSTD, GZIP, GZIP]);
    let finding = found(&world).await;
    assert!(
        !finding.ok && finding.detail.contains("no such compressor"),
        "{finding:?}"
    );
}

#[tokio::test]
async fn what_fails_with_gzip_too_says_nothing_about_the_compression() {
    let world = world(Compression::Auto, ABLE).await;
    fail(&world, b"both");
    let message = pull(&world, 0).await.unwrap_err();
    assert_eq!(message, "While making image: no space left");
    std::fs::remove_file(world.dir.path().join("fail")).unwrap();
    pull(&world, 0).await.unwrap();
    assert_eq!(calls(&world), [ASKED, ZSTD, GZIP, ZSTD]);
    assert!(found(&world).await.ok);
}

#[tokio::test]
async fn what_a_node_could_not_mount_is_not_written_any_more() {
    let world = world(Compression::Auto, ABLE).await;
    pull(&world, 0).await.unwrap();
    world.images.unread("n7", &["zstd".to_owned()]);
    pull(&world, 1).await.unwrap();
    // The image of before is still there for the other nodes.
    pull(&world, 0).await.unwrap();
    assert_eq!(calls(&world), [ASKED, ZSTD, GZIP]);
    let finding = found(&world).await;
    assert!(!finding.ok && finding.detail.contains("n7"), "{finding:?}");
    assert!(
        finding.cure.contains("compression = \"gzip\""),
        "{finding:?}"
    );
}
