//! What the ranks of a pod on one node share: a folder in memory, which has `/dev/shm` of all their containers, and the PID
//! namespace of the programs.
//!
//! Nobody on the node outlives all ranks, so nobody owns the folder. Whoever comes first creates it; each holds a shared
//! lock on it; whoever can turn that into an exclusive one is the last, and removes it. The kernel releases the locks of a
//! killed helper, and then the next shim of the account on this node, or the first helper of ranks there, removes the folder
//! ([`remove_unused`]).
//!
//! A file in the folder names the process that holds the PID namespace. Whoever locks the file first starts that process, and ends
//! after all other ranks on the node, because the process ends with its helper, and the programs with the process.
//!
//! All functions block on file work.

use std::{
    fs::{self, DirBuilder, File, TryLockError},
    io::{self, Read as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use knoc_contract::tree;
use knoc_link::file_lock;
use rustix::{
    fs::{FlockOperation, Mode, OFlags, Stat, flock, fstat, open},
    io::{Errno, retry_on_intr},
};

use crate::signals::Identity;

/// How often a folder is created again that another rank has just removed.
const TRIES: u32 = 100;

/// The longest name of a process, in bytes.
const NAME: u64 = 64;

/// What the containers of ranks mount and join in addition.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    /// Their `/dev/shm`.
    pub(crate) memory: PathBuf,
    /// Where the rank meets the PMIx server of its node, at the same path in the container.
    pub(crate) pmix: Option<PathBuf>,
    /// Names the PID namespace of the ranks, if there may be several on the node.
    pub(crate) processes: Option<Arc<NodeFolder>>,
}

/// The folder, which stays as long as this exists.
#[derive(Debug)]
pub(crate) struct NodeFolder {
    path: PathBuf,
    lock: File,
    /// Whether the process that holds the PID namespace is a child of this one.
    holds: AtomicBool,
}

impl NodeFolder {
    fn new(path: PathBuf, lock: File) -> Self {
        Self {
            path,
            lock,
            holds: AtomicBool::new(false),
        }
    }

    /// Creates the folder `name` in `base`, or joins the ranks that have created it.
    pub(crate) fn join(base: &Path, name: &str) -> io::Result<Self> {
        let path = base.join(name);
        for _ in 0..TRIES {
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                Ok(()) | Err(_) => {}
            }
            let lock = match open_own(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            take(&path, &|| lock.try_lock_shared())?;
            if is_at(&path, &fstat(&lock)?) {
                return Ok(Self::new(path, lock));
            }
        }
        Err(io::Error::other(format!(
            "{} is removed again and again",
            path.display()
        )))
    }

    /// The folder that the containers see, created if it is missing.
    pub(crate) fn memory(&self) -> io::Result<PathBuf> {
        let memory = self.path.join("shm");
        match DirBuilder::new().mode(0o700).create(&memory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            Ok(()) | Err(_) => Ok(memory),
        }
    }

    /// The file with the process that holds the PID namespace of the ranks, and that process if one is named. No other rank gets
    /// it as long as the file is open.
    pub(crate) fn holder(&self) -> io::Result<(File, Option<Identity>)> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let path = self.path.join("holder");
        let file = options.open(&path)?;
        take(&path, &|| file.try_lock())?;
        let mut name = String::new();
        (&file).take(NAME).read_to_string(&mut name)?;
        Ok((file, identity(&name)))
    }

    /// Names the process `holder`, a child of this one, in the file.
    pub(crate) fn name_holder(&self, file: &File, holder: Identity) -> io::Result<()> {
        self.holds.store(true, Ordering::Relaxed);
        let name = format!("{} {}", holder.pid, holder.start);
        file.set_len(0)?;
        file.write_all_at(name.as_bytes(), 0)
    }

    /// Whether the programs of the ranks on this node end with this process.
    pub(crate) fn holds(&self) -> bool {
        self.holds.load(Ordering::Relaxed)
    }

    /// Waits until no other rank uses the folder.
    pub(crate) fn wait_for_others(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| {
            flock(&self.lock, FlockOperation::LockExclusive)
        })?)
    }

    /// Removes the folder if no other rank uses it, at the latest at `until`. This one does not use it any more.
    pub(crate) fn leave(&self, until: Instant) -> io::Result<()> {
        match flock(&self.lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => Ok(()),
            Err(errno) => Err(errno.into()),
            // Of two that have waited for each other, one has removed it, and it may be there again for other ranks.
            Ok(()) if !is_at(&self.path, &fstat(&self.lock)?) => Ok(()),
            Ok(()) => tree::remove_until(&self.path, Some(until)),
        }
    }
}

/// Takes a lock that another rank holds only for a moment, unless it hangs.
fn take(path: &Path, attempt: &dyn Fn() -> Result<(), TryLockError>) -> io::Result<()> {
    if file_lock::wait(path, attempt)? {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "{} cannot be locked",
        path.display()
    )))
}

/// Removes the folder at `path` if no rank uses it.
pub(crate) fn remove_unused(path: &Path, until: Instant) -> io::Result<()> {
    let lock = open_own(path)?;
    NodeFolder::new(path.to_owned(), lock).leave(until)
}

/// PURE: the process that the text names.
fn identity(name: &str) -> Option<Identity> {
    let (pid, start) = name.split_once(' ')?;
    Some(Identity {
        pid: pid.parse().ok()?,
        start: start.parse().ok()?,
    })
}

/// Opens the folder, which must belong to this user alone.
fn open_own(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = open(path, flags, Mode::empty())?;
    let stat = fstat(&folder)?;
    let own = stat.st_uid == rustix::process::getuid().as_raw();
    if !own || stat.st_mode & 0o077 != 0 {
        return Err(io::Error::other(format!(
            "{} belongs to another user, or others may use it",
            path.display()
        )));
    }
    Ok(folder.into())
}

/// Whether the folder that was opened is still the one at `path`.
fn is_at(path: &Path, opened: &Stat) -> bool {
    fs::symlink_metadata(path)
        .is_ok_and(|found| found.ino() == opened.st_ino && found.dev() == opened.st_dev)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, time::Duration};

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn the_last_rank_on_a_node_removes_what_all_have_shared() {
        let base = tempfile::tempdir().unwrap();
        let first = NodeFolder::join(base.path(), "ranks").unwrap();
        let second = NodeFolder::join(base.path(), "ranks").unwrap();
        fs::File::create(first.memory().unwrap().join("segment")).unwrap();
        assert!(second.memory().unwrap().join("segment").exists());
        first.leave(soon()).unwrap();
        drop(first);
        assert!(base.path().join("ranks/shm/segment").exists());
        second.leave(soon()).unwrap();
        assert!(!base.path().join("ranks").exists());
    }

    #[test]
    fn the_rank_that_holds_the_processes_names_the_holder_and_waits_for_the_others() {
        let base = tempfile::tempdir().unwrap();
        let first = NodeFolder::join(base.path(), "ranks").unwrap();
        let second = NodeFolder::join(base.path(), "ranks").unwrap();
        let holder = Identity::of(std::process::id()).unwrap();
        let stale = Identity {
            pid: u32::MAX,
            start: u64::MAX,
        };
        for (named, next) in [(None, stale), (Some(stale), holder)] {
            let (file, found) = first.holder().unwrap();
            assert_eq!(found, named);
            first.name_holder(&file, next).unwrap();
        }
        assert_eq!(second.holder().unwrap().1, Some(holder));
        assert!(first.holds() && !second.holds());
        let waits = std::thread::spawn(move || {
            first.wait_for_others().unwrap();
            first.leave(soon()).unwrap();
        });
        assert!(base.path().join("ranks").exists() && !waits.is_finished());
        second.leave(soon()).unwrap();
        drop(second);
        waits.join().unwrap();
        assert!(!base.path().join("ranks").exists());
    }

    #[test]
    fn a_folder_that_is_another_one_by_now_stays() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("ranks");
        let old = NodeFolder::join(base.path(), "ranks").unwrap();
        fs::rename(&path, base.path().join("aside")).unwrap();
        let _new = NodeFolder::join(base.path(), "ranks").unwrap();
        old.leave(soon()).unwrap();
        assert!(path.exists());
    }

    #[test]
    fn what_killed_ranks_leave_is_removed_and_what_is_used_stays() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("ranks");
        let folder = NodeFolder::join(base.path(), "ranks").unwrap();
        remove_unused(&path, soon()).unwrap();
        assert!(path.exists());
        drop(folder);
        remove_unused(&path, soon()).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_folder_that_others_may_use_or_a_link_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let open_to_all = base.path().join("open");
        fs::create_dir(&open_to_all).unwrap();
        fs::set_permissions(&open_to_all, fs::Permissions::from_mode(0o755)).unwrap();
        let error = NodeFolder::join(base.path(), "open").unwrap_err();
        assert!(error.to_string().contains("others may use it"), "{error}");
        std::os::unix::fs::symlink(&open_to_all, base.path().join("link")).unwrap();
        assert!(NodeFolder::join(base.path(), "link").is_err());
    }
}
