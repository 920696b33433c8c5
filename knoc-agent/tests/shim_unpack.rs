//! The shim and an image that the runtime cannot mount. The runtime is a script that notes how it was called and starts nothing.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod harness;

use std::{os::unix::fs::PermissionsExt, path::Path};

use harness::{Job, sh, terminated};
use knoc_contract::{host::node_name, image_file::FileId, jobdir::atomic, walk};
use knoc_proto::pb;

/// It can neither mount nor unpack.
const RUNTIME: &str = "#!/bin/sh
kind=mounts
for word; do
    [ \"$word\" != --unsquash ] || kind=unpacks
done
echo \"$kind $APPTAINER_TMPDIR$APPTAINER_DISABLE_CACHE$SINGULARITY_DISABLE_CACHE\" >>'@CALLS@'
if [ $kind = mounts ]; then
    echo 'FATAL:   squashfuse_ll exited: @WHY@' >&2
else
    echo 'FATAL:   while extracting: No space left on device' >&2
fi
exit 255
";

/// What it says of the image.
const NO_ZSTD: &str = "Squashfs image uses another compression, this version supports only zlib.";
const NO_FUSE: &str = "fuse: device not found, try modprobe fuse first";

/// A SIF file whose partition begins with the superblock of a squashfs with this compression.
fn sif(compression: u16) -> Vec<u8> {
    let mut bytes = vec![0; 12_288];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(32, b"SIF_MAGIC\0");
    put(88, &1_u64.to_le_bytes());
    put(96, &4096_u64.to_le_bytes());
    // The descriptor: a partition, used, its id, where it begins, a squashfs, of the primary system.
    put(4096, &0x4004_u32.to_le_bytes());
    put(4100, &[1]);
    put(4101, &4_u32.to_le_bytes());
    put(4096 + 17, &8192_u64.to_le_bytes());
    put(4096 + 201, &1_u32.to_le_bytes());
    put(4096 + 205, &2_u32.to_le_bytes());
    put(8192, b"hsqs");
    put(8192 + 20, &compression.to_le_bytes());
    bytes
}

/// How such a pod ended.
struct Ran {
    ended: pb::Terminated,
    /// How the runtime was called.
    calls: Vec<String>,
    /// The compressions of which the agent learns that they cannot be mounted.
    unmounted: Vec<String>,
}

/// Runs a pod with such an image to its end.
async fn run(compression: u16, by_agent: bool, why: &str) -> Ran {
    run_pod(sh("a", "true"), compression, by_agent, why).await
}

async fn run_pod(container: pb::Container, compression: u16, by_agent: bool, why: &str) -> Ran {
    let mut job = Job::new(vec![container]);
    job.spec().volumes = vec![pb::Volume {
        name: "v".to_owned(),
        source: Some(pb::volume::Source::EmptyDir(pb::EmptyDir::default())),
    }];
    let path = |name: &str| job.dir.path().join(name);
    let (image, runtime, calls) = (path("a.sif"), path("apptainer"), path("calls"));
    atomic::write(&image, &sif(compression), 0o600).unwrap();
    let script = RUNTIME.replace("@CALLS@", &calls.display().to_string());
    let script = script.replace("@WHY@", why);
    atomic::write(&runtime, script.as_bytes(), 0o700).unwrap();
    std::fs::set_permissions(&runtime, PermissionsExt::from_mode(0o700)).unwrap();
    if !by_agent {
        let found = walk::owned(&image, false).unwrap();
        job.image_file = Some(FileId::of(&found).to_job(&node_name()));
    }
    job.image = image.display().to_string();
    "apptainer".clone_into(&mut job.file.runtime);
    job.file.runtime_path = runtime.display().to_string();
    // With these a runtime removes the image after it has unpacked it.
    for prefix in ["APPTAINER", "SINGULARITY"] {
        let (name, value) = (format!("{prefix}_DISABLE_CACHE"), "true".to_owned());
        job.file.runtime_env.insert(name, value);
    }
    let settings = job.file.settings.as_mut().unwrap();
    settings.network = pb::NetworkMode::Host.into();
    job.start();
    assert_eq!(job.code().await, 64, "{}", job.state_words());
    let report = job.report();
    // The Event is about images that were unpacked.
    let told = report
        .notes
        .iter()
        .any(|note| note.reason == "ImageUnpacked");
    assert!(!told, "{report:?}");
    let calls = std::fs::read_to_string(calls).unwrap();
    Ran {
        ended: terminated(&report.containers[0]),
        calls: calls.lines().map(|line| line.trim().to_owned()).collect(),
        unmounted: report.unmounted_compressions,
    }
}

#[tokio::test]
async fn an_image_in_another_compression_is_unpacked_below_the_folder_of_the_attempt() {
    let Ran {
        ended,
        calls,
        unmounted,
    } = run(6, true, NO_ZSTD).await;
    // The next image is to be one that this node can mount, all the more if it cannot unpack this one either.
    assert_eq!(unmounted, ["zstd"]);
    // A container has three kinds of root.
    assert_eq!(calls.len(), 6, "{calls:?}");
    assert!(calls[..3].iter().all(|call| call == "mounts"), "{calls:?}");
    for call in &calls[3..] {
        let folder = call.strip_prefix("unpacks ").unwrap();
        let name = Path::new(folder).file_name().unwrap().to_string_lossy();
        assert!(name.starts_with('w'), "{calls:?}");
        assert!(!Path::new(folder).exists(), "{folder} is left");
    }
    assert_eq!(ended.reason, "ContainerCannotRun");
    for words in ["supports only zlib", "No space left on device"] {
        assert!(ended.message.contains(words), "{}", ended.message);
    }
}

#[tokio::test]
async fn an_image_that_every_runtime_can_mount_is_never_unpacked() {
    let Ran {
        ended,
        calls,
        unmounted,
    } = run(1, true, NO_ZSTD).await;
    assert_eq!(calls, ["mounts"; 3]);
    assert!(unmounted.is_empty(), "{unmounted:?}");
    assert!(ended.message.contains("squashfuse_ll"), "{}", ended.message);
}

/// Whoever makes an image could make one that no runtime mounts, and the images of all others must not depend on it.
#[tokio::test]
async fn an_image_that_the_agent_has_not_converted_says_nothing_about_the_node() {
    let ran = run(6, false, NO_ZSTD).await;
    assert_eq!(ran.calls.len(), 6, "{:?}", ran.calls);
    assert!(ran.unmounted.is_empty(), "{:?}", ran.unmounted);
}

/// Otherwise the next image would be gzip, which is not unpacked, and pods that start slowly there would start no more.
#[tokio::test]
async fn a_node_that_mounts_no_image_says_nothing_about_the_compression() {
    let ran = run(6, true, NO_FUSE).await;
    assert_eq!(ran.calls.len(), 6, "{:?}", ran.calls);
    assert!(ran.unmounted.is_empty(), "{:?}", ran.unmounted);
}

/// Otherwise one full disk would turn the images of a whole site to gzip.
#[tokio::test]
async fn a_node_whose_disk_is_full_says_nothing_about_the_compression() {
    let full = "write to squashfs with zstd compression: No space left on device";
    let ran = run(6, true, full).await;
    assert_eq!(ran.calls.len(), 6, "{:?}", ran.calls);
    assert!(ran.unmounted.is_empty(), "{:?}", ran.unmounted);
}

/// Otherwise a pod could turn the images of a whole site to gzip, by a mount that fails.
#[tokio::test]
async fn what_a_pod_calls_its_mounts_says_nothing_about_the_node() {
    let mut pod = sh("a", "true");
    pod.mounts = vec![pb::Mount {
        volume: "v".to_owned(),
        path: "/squashfs/compression".to_owned(),
        ..Default::default()
    }];
    let ran = run_pod(pod, 6, true, "mount: /squashfs/compression: no such file").await;
    assert!(ran.unmounted.is_empty(), "{:?}", ran.unmounted);
}
