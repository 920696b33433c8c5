//! What the ranks of a pod on one node share: a folder in memory, which is `/dev/shm` of all their containers.
//!
//! Nobody on the node outlives all ranks, so nobody owns the folder. Whoever comes first creates it; each holds a shared
//! lock on it; whoever can turn that into an exclusive one is the last, and removes it. The kernel releases the locks of a
//! killed helper, and then the next shim of the account on this node, or the first helper of ranks there, removes the folder
//! ([`remove_unused`]).
//! All functions block on file work.

use std::{
    fs::{self, DirBuilder},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    time::Instant,
};

use knoc_contract::tree;
use rustix::{
    fs::{FlockOperation, Mode, OFlags, Stat, flock, fstat, open},
    io::Errno,
};

/// How often a folder is created again that another rank has just removed.
const TRIES: u32 = 100;

/// What the containers of ranks mount in addition.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    /// Their `/dev/shm`.
    pub(crate) memory: PathBuf,
    /// Where the rank meets the PMIx server of its node, at the same path in the container.
    pub(crate) pmix: Option<PathBuf>,
}

/// The folder, which stays as long as this exists.
#[derive(Debug)]
pub(crate) struct NodeFolder {
    path: PathBuf,
    lock: OwnedFd,
}

impl NodeFolder {
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
            flock(&lock, FlockOperation::LockShared)?;
            if is_at(&path, &fstat(&lock)?) {
                return Ok(Self { path, lock });
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

    /// Removes the folder if no other rank uses it, at the latest at `until`.
    pub(crate) fn leave(self, until: Instant) -> io::Result<()> {
        match flock(&self.lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => Ok(()),
            Err(errno) => Err(errno.into()),
            Ok(()) => tree::remove_until(&self.path, Some(until)),
        }
    }
}

/// Removes the folder at `path` if no rank uses it.
pub(crate) fn remove_unused(path: &Path, until: Instant) -> io::Result<()> {
    let lock = open_own(path)?;
    let folder = NodeFolder {
        path: path.to_owned(),
        lock,
    };
    folder.leave(until)
}

/// Opens the folder, which must belong to this user alone.
fn open_own(path: &Path) -> io::Result<OwnedFd> {
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
    Ok(folder)
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
        assert!(base.path().join("ranks/shm/segment").exists());
        second.leave(soon()).unwrap();
        assert!(!base.path().join("ranks").exists());
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
