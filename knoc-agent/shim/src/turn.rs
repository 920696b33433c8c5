//! Turns: how many containers of this account begin at once on a compute node.
//!
//! A runtime that sets up a container needs about a tenth of a second of processor time. If many jobs begin at once on a
//! node that gives them no processors of their own, each one's setup takes as long as all of them together, and a program that
//! ends meanwhile waits for a processor before anybody learns of it. So at most three containers for two processors are set up at a time, and the others wait.
//!
//! A turn is a lock on one byte of a file in the node's memory, which the kernel releases with the process, and gives to whoever has waited
//! for the longest time. Turns are a courtesy, not a rule: without the file, which another user may have created first, and
//! after [`PATIENCE`], a container begins without one.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use knoc_contract::host_paths::SHIM_FOLDERS as PREFIX;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
    unistd::{SysconfVar, sysconf},
};
use rustix::{fs::OFlags, process::getuid};
use tokio::{sync::oneshot, time::timeout};

use super::scratch::MEMORY;

/// How long a container waits for its turn. The setup of others may hang, on a file system that does not answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The stack of a thread that does nothing but wait.
const STACK: usize = 64 << 10;

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
    // A setup waits now and then, so that one for each processor would leave some idle.
    let places = processors.saturating_mul(3) / 2;
    take_of(&path, places, PATIENCE).await
}

/// Waits for one of `places` in the file at `path`.
async fn take_of(path: &Path, places: i64, patience: Duration) -> Option<Turn> {
    let file = open(path)?;
    // The processes share the places evenly.
    let own = i64::from(std::process::id()) % places.max(1);
    for place in (own..places).chain(0..own) {
        match lock(&file, place, Wait::No) {
            Ok(()) => return Some(Turn { _file: file }),
            Err(Errno::EAGAIN | Errno::EACCES) => {}
            Err(_) => return None,
        }
    }
    let (turn, taken) = oneshot::channel();
    // A thread of its own, which no other work waits for: it cannot be told to stop. If nobody waits for the turn any more, it gives
    // it back.
    let waiting = move || {
        if lock(&file, own, Wait::Yes).is_ok() {
            turn.send(Turn { _file: file }).ok();
        }
    };
    let thread = std::thread::Builder::new().stack_size(STACK);
    thread.spawn(waiting).ok()?;
    timeout(patience, taken).await.ok()?.ok()
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

/// Whether to wait for a place that is taken.
#[derive(Debug, Clone, Copy)]
enum Wait {
    Yes,
    No,
}

/// Takes the place.
fn lock(file: &File, place: i64, wait: Wait) -> Result<(), Errno> {
    let short = |number: i32| i16::try_from(number).map_err(|_| Errno::EINVAL);
    let lock = libc::flock {
        l_type: short(libc::F_WRLCK)?,
        l_whence: short(libc::SEEK_SET)?,
        l_start: place,
        l_len: 1,
        l_pid: 0,
    };
    loop {
        let how = match wait {
            Wait::Yes => FcntlArg::F_OFD_SETLKW(&lock),
            Wait::No => FcntlArg::F_OFD_SETLK(&lock),
        };
        match fcntl(file, how) {
            Err(Errno::EINTR) => {}
            other => return other.map(drop),
        }
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

    const LONG: Duration = Duration::from_mins(1);

    #[tokio::test]
    async fn a_place_is_one_containers_until_it_gives_it_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("turns");
        let first = take_of(&path, 2, LONG).await.unwrap();
        let second = take_of(&path, 2, LONG).await.unwrap();
        let mut third = Box::pin(take_of(&path, 2, LONG));
        assert!(futures::poll!(&mut third).is_pending(), "both are taken");
        drop((first, second));
        third.await.unwrap();
    }

    #[tokio::test]
    async fn a_turn_that_comes_too_late_is_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("turns");
        let first = take_of(&path, 1, LONG).await.unwrap();
        assert!(take_of(&path, 1, Duration::from_millis(1)).await.is_none());
        drop(first);
        // The thread that waited has it for a moment.
        take_of(&path, 1, LONG).await.unwrap();
    }

    #[tokio::test]
    async fn without_a_file_there_are_no_turns() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing/turns");
        assert!(take_of(&missing, 1, LONG).await.is_none());
    }

    #[tokio::test]
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
