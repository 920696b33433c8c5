//! Volumes in memory with a size: each is a tmpfs of its own, in a mount namespace of the helper's.
//!
//! Only in a user namespace may an ordinary account mount a tmpfs, and only there is it seen: the helpers that start containers
//! join the mount namespace, and the shim gets a descriptor of each volume. They disappear with the last process that sees them.

use std::{fs::File, io, os::fd::OwnedFd};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use rustix::fs::{Mode, OFlags, open};

use super::protocol::Tmpfs;

/// The mount namespace of this process.
const NAMESPACE: &str = "/proc/self/ns/mnt";

/// Leaves the node's mount namespace. The node's later mounts still appear, and mounts made here never appear on the node.
pub(super) fn leave_node() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let flags = MsFlags::MS_SLAVE | MsFlags::MS_REC;
    Ok(mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)?)
}

/// Mounts a volume. Returns the mount namespace and the volume.
pub(super) fn mount_volume(volume: &Tmpfs) -> io::Result<Vec<OwnedFd>> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let options = options(volume.bytes);
    let kind = Some("tmpfs");
    mount(
        kind,
        volume.path.as_path(),
        kind,
        flags,
        Some(options.as_str()),
    )?;
    let namespace = File::open(NAMESPACE)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(&volume.path, flags, Mode::empty())?;
    Ok(vec![namespace.into(), root])
}

/// PURE: the options of the mount. Any user of the pod may write, as in every `emptyDir`.
fn options(bytes: u64) -> String {
    format!("size={bytes},mode=0777")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_is_in_bytes_and_everybody_may_write() {
        assert_eq!(options(1 << 20), "size=1048576,mode=0777");
    }
}
