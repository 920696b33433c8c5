//! Turns: how many containers of this account begin at once on a compute node.
//!
//! A runtime that sets up a container needs about a tenth of a second of processor time. If many jobs begin at once on a
//! node that gives them no processors of their own, each one's setup takes as long as all of them together, and a program that
//! ends meanwhile waits for a processor before anybody learns of it. So at most [`EACH`] containers per processor are set up at
//! a time, and the others wait. The sum of the work is the same; the first ones are done earlier, and the last ones not later.
//!
//! A turn is a lock on one byte of a file in the node's memory, which the kernel releases with the process. Turns are a
//! courtesy, not a rule: without the file, which another user may have created first, and after [`PATIENCE`], a container
//! begins without one.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use knoc_contract::host_paths::SHIM_FOLDERS as PREFIX;
use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
    unistd::{SysconfVar, sysconf},
};
use rustix::{fs::OFlags, process::getuid};

use super::scratch::MEMORY;

/// How many containers are set up at a time for each processor of the node.
const EACH: i64 = 2;

/// How long a container waits for its turn. The setup of others may hang, on a file system that does not answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The pause between two looks. The kernel would wake a blocked thread, but threads are few, and one that waits for a lock cannot
/// be told to stop.
const LOOK: Duration = Duration::from_millis(25);

/// A turn, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    /// Its description holds the lock.
    _file: File,
}

/// Waits for a turn, at most [`PATIENCE`]. Returns `None` if there is none to be had.
///
/// Cancel safe: a wait that is dropped holds nothing.
pub(crate) async fn take() -> Option<Turn> {
    let uid = getuid().as_raw();
    let processors = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten()?;
    let path = PathBuf::from(format!("{MEMORY}/{PREFIX}-turns-{uid}"));
    take_of(&path, processors.saturating_mul(EACH), PATIENCE).await
}

/// Waits for one of `places` in the file at `path`.
async fn take_of(path: &Path, places: i64, patience: Duration) -> Option<Turn> {
    let file = open(path)?;
    let looking = async {
        // Each process begins with another place, so that the first look finds a free one more often.
        let first = i64::from(std::process::id()) % places.max(1);
        loop {
            for place in (first..places).chain(0..first) {
                if is_taken(&file, place)? {
                    return Some(());
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(patience, looking).await.ok()??;
    Some(Turn { _file: file })
}

/// Opens the file, which must be this user's own.
fn open(path: &Path) -> Option<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .ok()?;
    let found = file.metadata().ok()?;
    let own = found.is_file() && found.uid() == getuid().as_raw();
    let others = found.mode() & 0o077;
    (own && others == 0).then_some(file)
}

/// Takes the place, if it is free. `None` if the file system has no locks.
fn is_taken(file: &File, place: i64) -> Option<bool> {
    let lock = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).ok()?,
        l_whence: i16::try_from(libc::SEEK_SET).ok()?,
        l_start: place,
        l_len: 1,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Some(true),
        Err(nix::Error::EAGAIN | nix::Error::EACCES) => Some(false),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        reason = "panicking on an unexpected result is how a test fails"
    )]

    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const LONG: Duration = Duration::from_mins(10);

    #[tokio::test(start_paused = true)]
    async fn a_place_is_one_containers_until_it_gives_it_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("turns");
        let first = take_of(&path, 2, LONG).await.unwrap();
        let second = take_of(&path, 2, LONG).await.unwrap();
        let mut third = Box::pin(take_of(&path, 2, LONG));
        let early = tokio::time::timeout(Duration::from_secs(1), &mut third).await;
        assert!(early.is_err(), "both places are taken");
        drop(first);
        third.await.unwrap();
        drop(second);
    }

    #[tokio::test(start_paused = true)]
    async fn a_container_begins_without_a_turn_when_its_patience_ends_or_there_is_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("turns");
        let held = take_of(&path, 1, LONG).await;
        assert!(held.is_some());
        assert!(take_of(&path, 1, PATIENCE).await.is_none());
        assert!(
            take_of(&folder.path().join("missing/turns"), 1, LONG)
                .await
                .is_none()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_others_may_use_is_not_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("turns");
        File::create(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert!(take_of(&path, 1, LONG).await.is_none());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        assert!(take_of(&link, 1, LONG).await.is_none());
    }
}
