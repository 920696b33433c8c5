//! PURE: container runtimes, as the argv of the process that creates a container and runs KNoC's launcher in it.
//!
//! The trait is as narrow as the shim needs: it turns the description of a container into a command line. The program's own
//! argv, environment, working directory and stdio go by the launch protocol and never appear here.

mod apptainer;
mod process;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use crate::sif::Part;

/// Where the launcher and its socket lie inside a container.
pub(crate) const INSIDE: &str = knoc_proto::pod::KNOC_FOLDER;

/// A path of the host that is mounted into the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bind {
    /// The path on the host.
    pub source: PathBuf,
    /// The path in the container.
    pub target: PathBuf,
    /// Whether the mount is read-only.
    pub read_only: bool,
    /// If the source is an image file: the part of it whose files are mounted.
    pub image: Option<Part>,
}

/// How the container sees the image's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Root {
    /// Writable; changes go to this node-local folder.
    Overlay(PathBuf),
    /// Writable; changes go to memory, 64 MB at most by default.
    Memory,
    /// Read-only.
    ReadOnly,
}

/// Node-local folder for `/tmp` and `/var/tmp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Work {
    /// Used if changes of the root do not go to a folder.
    Spare(PathBuf),
    /// Always used, because the image is a folder of another user: in a user namespace the kernel's overlay creates nothing in the
    /// image's own folders then, not even in those that everybody may write.
    Needed(PathBuf),
}

/// The vendors whose GPUs a container sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Gpus {
    pub nvidia: bool,
    pub amd: bool,
}

/// The container to create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sandbox {
    /// SIF file or sandbox folder; empty if the runtime needs none.
    pub image: PathBuf,
    /// The agent's executable on the host.
    pub agent: PathBuf,
    /// Node-local folder of this attempt: holds `launch.sock`, and the empty file `agent` as a mount point.
    pub folder: PathBuf,
    /// The mounts, in the order of mounting.
    pub binds: Vec<Bind>,
    /// The pod's host name; empty if the container keeps the node's.
    pub hostname: String,
    /// How the container sees the image's files.
    pub root: Root,
    /// What `/tmp` and `/var/tmp` are made of. If it is `None` they are the image's own, and as writable as its root.
    pub work: Option<Work>,
    /// Whether the program has root's rights inside, by a mapped user namespace.
    pub fakeroot: bool,
    /// The GPUs whose devices and driver files the container sees.
    pub gpus: Gpus,
    /// Whether the runtime's own PID namespace is that of the container, which shares it with others.
    pub shares_processes: bool,
    /// Whether the runtime unpacks the image's files instead of mounting them.
    pub unpacked: bool,
}

/// Whether a message of a runtime may say that it could not mount the files of an image, by itself, the kernel or squashfuse, or
/// could not unpack them, which it does without being told if it has no squashfuse. Nothing depends on it but a further try to
/// start the container.
pub(crate) fn names_squashfs(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    ["squashfs", "squashfuse", COMPRESSION]
        .iter()
        .any(|word| message.contains(word))
}

/// The word by which such a message says that the compression of the image is the reason.
pub(crate) const COMPRESSION: &str = "compression";

/// What says that the file system is the reason, as a full one is, and nothing about what the runtime can mount or unpack.
const OTHER_REASONS: [&str; 3] = ["no space left", "quota exceeded", "input/output error"];

/// Whether such a message says that the compression of the image is the reason, and nothing else.
pub(crate) fn blames_compression(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    let has = |word: &str| message.contains(word);
    has(COMPRESSION) && !OTHER_REASONS.into_iter().any(has)
}

/// Why a container cannot be brought up with this runtime.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum RuntimeError {
    #[error("there is no container runtime {0:?}")]
    Unknown(String),
    /// The runtime's option syntax cannot express the path.
    #[error("the path {0:?} cannot be given to the container runtime")]
    Path(PathBuf),
    #[error("the runtime \"process\" cannot mount volumes, but the pod mounts one at {0:?}")]
    NoMounts(PathBuf),
}

/// A container runtime.
pub(crate) trait Runtime: std::fmt::Debug + Send + Sync {
    /// Its stable name, which is the prefix of container ids.
    fn name(&self) -> &'static str;

    /// Whether each container has a PID namespace of its own.
    fn isolates(&self) -> bool;

    /// The kinds of root to try if it should be writable, best first: not every site allows each.
    fn writable_roots(&self, overlay: &Path) -> Vec<Root>;

    /// The arguments of the runtime's process, program first.
    fn argv(&self, sandbox: &Sandbox) -> Result<Vec<OsString>, RuntimeError>;
}

/// The runtime called `name`, whose executable is `path`.
pub(crate) fn by_name(name: &str, path: &Path) -> Result<Box<dyn Runtime>, RuntimeError> {
    match name {
        "apptainer" => Ok(Box::new(apptainer::Apptainer::new(
            path,
            apptainer::Flavour::Apptainer,
        ))),
        "singularity" => Ok(Box::new(apptainer::Apptainer::new(
            path,
            apptainer::Flavour::Singularity,
        ))),
        "process" => Ok(Box::new(process::Process)),
        other => Err(RuntimeError::Unknown(other.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runtimes_say_of_an_image_that_they_cannot_mount_is_known() {
        for message in [
            "FATAL:   container creation failed: image driver squashfuse_ll instance exited with error: squashfuse_ll exited: \
             Squashfs image uses zstd compression, this version supports only xz, zlib.",
            "FATAL:   container creation failed: mount hook function failure: mount /proc/self/fd/3->/var/lib/apptainer/mnt/session/rootfs \
             error: while mounting image /proc/self/fd/3: kernel reported a bad superblock for squashfs image partition, possible \
             causes are that your kernel doesn't support the compression algorithm or the image is corrupted",
            "FATAL:   while extracting /images/a.sif: root filesystem extraction failed: extract command failed: Filesystem uses zstd \
             compression, this is unsupported by this version",
        ] {
            assert!(names_squashfs(message), "{message}");
            assert!(blames_compression(message), "{message}");
        }
        // A node without FUSE mounts no image, however it is compressed.
        let no_fuse = "FATAL:   container creation failed: image driver mount failure: image driver squashfuse_ll instance exited with \
            error: squashfuse_ll exited: fuse: device not found, try 'modprobe fuse' first";
        assert!(names_squashfs(no_fuse) && !blames_compression(no_fuse));
        // A full disk, or one that fails, is none of the compression's.
        for reason in [
            "write_block failed to write to output file: No space left on device",
            "Disk quota exceeded",
            "Input/output error",
        ] {
            let full = format!(
                "FATAL:   while extracting /images/a.sif: root filesystem extraction failed: extract command failed: Filesystem uses \
                 zstd compression; FATAL ERROR: {reason}"
            );
            assert!(
                names_squashfs(&full) && !blames_compression(&full),
                "{full}"
            );
        }
        assert!(!names_squashfs(
            "FATAL:   container creation failed: mount /data: no such file or directory"
        ));
        assert!(!names_squashfs("fuse-overlayfs: cannot mount"));
    }
}
