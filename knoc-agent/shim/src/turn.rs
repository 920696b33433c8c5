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
    fs::{self, File, OpenOptions},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use knoc_contract::host_paths::SHIM_FOLDERS as PREFIX;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
};
use rustix::{fs::OFlags, process::getuid};
use tokio::{
    sync::{Semaphore, oneshot},
    time::timeout,
};

use super::scratch::MEMORY;

/// How long a container waits for its turn. The setup of others may hang, on a file system that does not answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The stack of a thread that does nothing but wait.
const STACK: usize = 64 << 10;

/// How many threads of this process wait at most. One goes on after [`PATIENCE`], for as long as the setup of another job hangs.
const THREADS: usize = 32;

/// The threads that may still be started.
static WAITING: Semaphore = Semaphore::const_new(THREADS);

/// The processors of the node. The C library counts those that Slurm has given to this job, and jobs of one processor each would
/// wait for each other on a node that has enough for all.
const ONLINE: &str = "/sys/devices/system/cpu/online";

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
    let path = PathBuf::from(format!("{MEMORY}/{PREFIX}-turns-{uid}"));
    // A setup waits now and then, so that one for each processor would leave some idle.
    let turns = Turns {
        path: &path,
        places: processors()?.saturating_mul(3) / 2,
        patience: PATIENCE,
        waiting: &WAITING,
    };
    turns.take(first_place()).await
}

/// The processors of the node that run.
fn processors() -> Option<i64> {
    count(&fs::read_to_string(ONLINE).ok()?)
}

/// PURE: how many processors a list such as `0-3,8` names.
fn count(list: &str) -> Option<i64> {
    let mut all = 0;
    for range in list.trim().split(',') {
        let (lowest, highest) = range.split_once('-').unwrap_or((range, range));
        let ends: [u32; 2] = [lowest.parse().ok()?, highest.parse().ok()?];
        all += i64::from(ends[1]) - i64::from(ends[0]) + 1;
    }
    Some(all)
}

/// Where the next container of this process looks first. Processes share the places evenly, and so do the containers of one.
fn first_place() -> i64 {
    static CONTAINERS: AtomicU32 = AtomicU32::new(0);
    let container = CONTAINERS.fetch_add(1, Ordering::Relaxed);
    i64::from(std::process::id()) + i64::from(container)
}

/// The places of a file.
struct Turns<'a> {
    path: &'a Path,
    places: i64,
    patience: Duration,
    waiting: &'static Semaphore,
}

impl Turns<'_> {
    /// Waits for the place that `first` leads to, unless another one is free.
    async fn take(&self, first: i64) -> Option<Turn> {
        let file = open(self.path)?;
        let places = self.places.max(1);
        let own = first % places;
        for place in (own..places).chain(0..own) {
            match lock(&file, place, Wait::No) {
                Ok(()) => return Some(Turn { _file: file }),
                Err(Errno::EAGAIN | Errno::EACCES) => {}
                Err(_) => return None,
            }
        }
        let permit = self.waiting.try_acquire().ok()?;
        let (turn, taken) = oneshot::channel();
        // A thread of its own, which no other work waits for: it cannot be told to stop. If nobody waits for the turn any more, it
        // gives it back.
        let waiting = move || {
            if lock(&file, own, Wait::Yes).is_ok() {
                turn.send(Turn { _file: file }).ok();
            }
            drop(permit);
        };
        let thread = std::thread::Builder::new().stack_size(STACK);
        thread.spawn(waiting).ok()?;
        timeout(self.patience, taken).await.ok()?.ok()
    }
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

    use std::{os::unix::fs::PermissionsExt as _, task::Poll};

    use nix::{
        sched::{CpuSet, sched_getaffinity, sched_setaffinity},
        unistd::Pid,
    };

    use super::*;

    const LONG: Duration = Duration::from_mins(1);

    fn turns(path: &Path, places: i64) -> Turns<'_> {
        Turns {
            path,
            places,
            patience: LONG,
            waiting: &WAITING,
        }
    }

    #[tokio::test]
    async fn a_place_is_one_containers_until_it_gives_it_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("turns");
        let turns = turns(&path, 2);
        let first = turns.take(0).await.unwrap();
        let second = turns.take(0).await.unwrap();
        let mut third = Box::pin(turns.take(0));
        assert!(futures::poll!(&mut third).is_pending(), "both are taken");
        drop((first, second));
        third.await.unwrap();
    }

    /// Otherwise the containers of a pod that begin together would all wait for one place, while others are free.
    #[tokio::test]
    async fn containers_of_one_process_wait_for_different_places() {
        assert_ne!(first_place(), first_place());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("turns");
        let turns = turns(&path, 2);
        let both = (turns.take(0).await.unwrap(), turns.take(1).await.unwrap());
        let (mut third, mut fourth) = (Box::pin(turns.take(2)), Box::pin(turns.take(3)));
        assert!(futures::poll!(&mut third).is_pending());
        assert!(futures::poll!(&mut fourth).is_pending());
        drop(both);
        let (third, fourth) = tokio::join!(third, fourth);
        assert!(third.is_some() && fourth.is_some());
    }

    #[tokio::test]
    async fn a_turn_that_comes_too_late_is_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("turns");
        let turns = turns(&path, 1);
        let first = turns.take(0).await.unwrap();
        let hasty = Turns {
            patience: Duration::from_millis(1),
            ..turns
        };
        assert!(hasty.take(0).await.is_none());
        drop(first);
        // The thread that waited has it for a moment.
        let patient = Turns {
            patience: LONG,
            ..hasty
        };
        patient.take(0).await.unwrap();
    }

    /// Its containers may be restarted for days, while the setup of another job hangs.
    #[tokio::test]
    async fn a_process_has_a_limit_of_threads_that_wait() {
        static ONE: Semaphore = Semaphore::const_new(1);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("turns");
        let turns = Turns {
            waiting: &ONE,
            ..turns(&path, 1)
        };
        let first = turns.take(0).await.unwrap();
        let mut waits = Box::pin(turns.take(0));
        assert!(futures::poll!(&mut waits).is_pending());
        let beyond = futures::poll!(Box::pin(turns.take(0)));
        assert!(
            matches!(beyond, Poll::Ready(None)),
            "it begins at once, without a turn"
        );
        drop(first);
        waits.await.unwrap();
        // The thread has ended, or is about to.
        let _again = tokio::time::timeout(LONG, ONE.acquire()).await.unwrap();
    }

    #[test]
    fn the_processors_are_those_of_the_node_and_not_those_of_the_job() {
        for (list, number) in [
            ("0\n", Some(1)),
            ("0-1\n", Some(2)),
            ("0-3,8,10-11\n", Some(7)),
            ("\n", None),
            ("0-x\n", None),
        ] {
            assert_eq!(count(list), number, "{list:?}");
        }
        let all = processors();
        assert!(all.is_some_and(|all| all > 0), "{all:?}");
        let bound = std::thread::spawn(|| {
            let own = Pid::from_raw(0);
            let allowed = sched_getaffinity(own).unwrap();
            let mut numbers = 0..CpuSet::count();
            let first = numbers.find(|cpu| allowed.is_set(*cpu).unwrap()).unwrap();
            let mut one = CpuSet::new();
            one.set(first).unwrap();
            sched_setaffinity(own, &one).unwrap();
            processors()
        });
        assert_eq!(bound.join().unwrap(), all);
    }

    #[tokio::test]
    async fn without_a_file_there_are_no_turns() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing/turns");
        assert!(turns(&missing, 1).take(0).await.is_none());
    }

    #[tokio::test]
    async fn a_file_that_others_may_use_is_not_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("turns");
        File::create(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert!(turns(&path, 1).take(0).await.is_none());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        assert!(turns(&link, 1).take(0).await.is_none());
    }
}
