//! Makes a mount read-only and, if it is a path of the node or a sandbox, everything that is mounted below it.

use std::{
    ffi::OsString,
    io::{self, Read as _},
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};
use rustix::fs::{StatVfsMountFlags, statvfs};

/// The mounts of this process's mount namespace.
const MOUNTS: &str = "/proc/self/mountinfo";
/// No node has as many mounts as fit into this.
const MAX_MOUNTS: u64 = 64 << 20;

/// Makes the mount at `staging` read-only. With `all`, also the mounts below it; and what the node mounts later does not
/// appear there, as it would be writable.
pub(super) fn remount(staging: &Path, all: bool) -> io::Result<()> {
    if !all {
        return one(staging);
    }
    let alone = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(None::<&str>, staging, None::<&str>, alone, None::<&str>)?;
    let mut text = Vec::new();
    let file = std::fs::File::open(MOUNTS)?;
    file.take(MAX_MOUNTS).read_to_end(&mut text)?;
    for point in at_or_below(&text, staging) {
        one(&point)?;
    }
    Ok(())
}

fn one(point: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | locked_flags(point)?;
    let (source, target) = (Some("none"), point);
    Ok(mount(source, target, None::<&str>, flags, None::<&str>)?)
}

/// The flags of the mount that a remount in another user namespace must not clear.
fn locked_flags(point: &Path) -> io::Result<MsFlags> {
    let has = statvfs(point)?.f_flag;
    let pairs = [
        (StatVfsMountFlags::NOSUID, MsFlags::MS_NOSUID),
        (StatVfsMountFlags::NODEV, MsFlags::MS_NODEV),
        (StatVfsMountFlags::NOEXEC, MsFlags::MS_NOEXEC),
        (StatVfsMountFlags::NOATIME, MsFlags::MS_NOATIME),
        (StatVfsMountFlags::NODIRATIME, MsFlags::MS_NODIRATIME),
        (StatVfsMountFlags::RELATIME, MsFlags::MS_RELATIME),
    ];
    let set = pairs.into_iter().filter(|(flag, _)| has.contains(*flag));
    Ok(set.fold(MsFlags::empty(), |all, (_, flag)| all | flag))
}

/// PURE: the mount points at `staging` and below it, in the order of mounting, from the text of `mountinfo`. The last mount
/// at a point is the one that is seen there.
fn at_or_below(mountinfo: &[u8], staging: &Path) -> Vec<PathBuf> {
    let mut points = Vec::new();
    for line in mountinfo.split(|byte| *byte == b'\n') {
        // The fifth field is the mount point.
        let Some(point) = line.split(|byte| *byte == b' ').nth(4) else {
            continue;
        };
        let point = PathBuf::from(OsString::from_vec(unescaped(point)));
        if point.starts_with(staging) && !points.contains(&point) {
            points.push(point);
        }
    }
    points
}

/// PURE: a field of `mountinfo`, in which the kernel writes blanks and backslashes as `\ooo`.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let code = after
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        let code = code.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match (*first, code) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            (byte, _) => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_mounts_below_are_found_whatever_their_names_are() {
        let text = b"22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
            40 22 8:1 /data /s/m1 rw - ext4 /dev/sda1 rw\n\
            41 40 0:40 / /s/m1/a\\040b\\134c rw - nfs h:/x rw\n\
            42 41 0:41 / /s/m1/a\\040b\\134c/deep rw - nfs h:/y rw\n\
            43 22 8:1 / /s/m10 rw - ext4 /dev/sda1 rw\n\
            44 40 0:40 / /s/m1/a\\040b\\134c rw - nfs h:/x rw\nbroken\n";
        let points = at_or_below(text, Path::new("/s/m1"));
        let wanted = ["/s/m1", "/s/m1/a b\\c", "/s/m1/a b\\c/deep"];
        assert_eq!(points, wanted.map(PathBuf::from));
    }
}
