//! The pod's node-local folders: on disk for sockets, roots and `emptyDir`, in memory for secrets and `emptyDir` volumes of
//! the medium `Memory`. Most functions block on file work.
//!
//! Both folders have mode 0700 and are removed at the end, whatever the containers did to them. Their names contain the
//! host and the process, so that a later shim of the same user recognises leftovers. The folder on disk may lie on a file
//! system that nodes share, and only the host of a process knows whether it lives.
//!
//! Nothing waits long for a removal. What an ended attempt wrote is moved into the [`Trash`], which a task of its own
//! empties. The removal at the end of the job is bounded in time; the next shim on this host removes the rest.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Once},
    time::{Duration, Instant},
};

use knoc_contract::{
    host::node_name, host_paths::SHIM_FOLDERS as PREFIX, jobdir::atomic::FileError, tree, walk,
};
use knoc_link::pki::hexadecimal;
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;

use super::{proc, ranks::node};

/// The node's file system in memory.
pub(crate) const MEMORY: &str = "/dev/shm";
const DEFAULT: &str = "/tmp";

/// In the name of a folder that the ranks of a pod on one node share, in place of the host.
const RANKS: &str = "ranks";

/// ramfs: a file system in memory like tmpfs, but without a size limit.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// How long the end of the job waits for the removal of what the pod's containers wrote.
pub(crate) const LAST_REMOVAL: Duration = Duration::from_secs(10);

/// How long leftovers of other shims are removed before the pod's own trash is emptied again.
const SWEEP: Duration = Duration::from_secs(30);

/// Where secrets and volumes in memory go if the node has no usable `/dev/shm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fallback {
    /// They are not stored, and the pod fails.
    Error,
    /// They are stored on disk, with a warning.
    Disk,
}

/// The node has no usable file system in memory for what must not be stored on a disk.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "Secrets, tokens and volumes of the medium Memory are kept in memory only, and {} cannot be used on node {node}: \
     {why}. Mount a writable tmpfs there, or let them lie on the node's disk by `memory_fallback = \"disk\"` under \
     [values] of the site file", path.display()
)]
pub(crate) struct NoMemory {
    path: PathBuf,
    node: String,
    why: String,
}

/// Why a folder could not be created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScratchError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    NoMemory(#[from] NoMemory),
}

/// The pod's node-local folders.
#[derive(Debug)]
pub(crate) struct Scratch {
    base: PathBuf,
    disk: PathBuf,
    memory: Result<PathBuf, NoMemory>,
    fallback: Fallback,
    trash: Trash,
    removal: Once,
}

impl Scratch {
    /// Creates the folders for this process; if `base` is empty, in `/tmp`.
    pub(crate) fn create(base: &str, fallback: Fallback) -> Result<Self, FileError> {
        let base = Path::new(if base.is_empty() { DEFAULT } else { base });
        Self::create_at(base, Path::new(MEMORY), fallback)
    }

    fn create_at(base: &Path, memory: &Path, fallback: Fallback) -> Result<Self, FileError> {
        let host = host_tag(&node_name());
        let pid = std::process::id();
        // The random part keeps other users from taking the name first, which would keep the pod from starting.
        let name = format!(
            "{PREFIX}-{host}-{pid}-{}-{:06x}",
            proc::start_time(pid).unwrap_or_default(),
            rand::random::<u32>() >> 8
        );
        let disk = base.join(&name);
        make(&disk)?;
        // No other user may replace a folder above, so a link that appears in a path below can only be a container's.
        let walked = walk::owned(&disk, false).map_err(|error| {
            fs::remove_dir(&disk).ok();
            let cure = "name another folder in job.scratch of the site file";
            io::Error::other(format!("{error}; {cure}"))
        });
        let disk = walked.map_err(FileError::on("use", &disk))?.path;
        let trash = Trash::create(disk.join("trash"))?;
        let memory = in_memory(memory, &name).map_err(|why| NoMemory {
            path: memory.to_owned(),
            node: node_name(),
            why,
        });
        Ok(Self {
            base: base.to_owned(),
            disk,
            memory,
            fallback,
            trash,
            removal: Once::new(),
        })
    }

    /// Removes both folders, secrets first, for at most [`LAST_REMOVAL`]. Only the first call does anything.
    pub(crate) fn remove(&self) {
        self.removal.call_once(|| {
            let until = Some(Instant::now() + LAST_REMOVAL);
            let memory = self.memory_folder().ok();
            let folders = [
                memory.map(|memory| memory.join(SECRETS)),
                memory.map(Path::to_owned),
                Some(self.disk.clone()),
            ];
            for folder in folders.into_iter().flatten() {
                if let Err(error) = tree::remove_until(&folder, until) {
                    let path = folder.display();
                    tracing::warn!(%path, %error, "left for the next shim on this host to remove");
                }
            }
        });
    }

    /// A folder on disk, created if it is missing.
    pub(crate) fn disk(&self, name: &str) -> Result<PathBuf, FileError> {
        subfolder(&self.disk, name)
    }

    /// The folder on disk in which [`Self::disk`] creates folders.
    pub(crate) fn disk_folder(&self) -> &Path {
        &self.disk
    }

    /// A folder in memory that containers write to, created if it is missing.
    pub(crate) fn memory(&self, name: &str) -> Result<PathBuf, ScratchError> {
        Ok(subfolder(self.memory_folder()?, name)?)
    }

    /// A folder in memory that only the shim writes to, created if it is missing.
    pub(crate) fn secrets(&self, name: &str) -> Result<PathBuf, ScratchError> {
        let secrets = subfolder(self.memory_folder()?, SECRETS)?;
        Ok(subfolder(&secrets, name)?)
    }

    /// Why secrets are stored on the node's disk, if they are.
    pub(crate) fn on_disk(&self) -> Option<String> {
        match (&self.memory, self.fallback) {
            (Err(no), Fallback::Disk) => Some(format!(
                "{} cannot be used on node {}: {}; Secrets, tokens and volumes of the medium Memory lie on its disk, as \
                 `memory_fallback` of the site file has it",
                no.path.display(),
                no.node,
                no.why
            )),
            _ => None,
        }
    }

    pub(crate) fn trash(&self) -> Trash {
        self.trash.clone()
    }

    fn memory_folder(&self) -> Result<&Path, NoMemory> {
        match (&self.memory, self.fallback) {
            (Ok(memory), _) => Ok(memory),
            (Err(_), Fallback::Disk) => Ok(&self.disk),
            (Err(no), Fallback::Error) => Err(no.clone()),
        }
    }
}

/// The name of the folder in memory that the ranks of this attempt share on `node`. It comes from the pod's private key, so that
/// no other user can take the name first: whoever connects to the shim's port learns the public key, and whoever is on a
/// node sees the names there.
pub(crate) fn of_ranks(key: &str, attempt: u32, node: &str) -> String {
    let tag = tag::<16>(format!("{RANKS} {attempt} {node} {key}").as_bytes());
    format!("{PREFIX}-{RANKS}-{tag}")
}

/// The folder, in the folder in memory, that only the shim writes to.
const SECRETS: &str = "secrets";

impl Drop for Scratch {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Whether users may write to a folder and replace what others have in it.
const WRITABLE_BY_OTHERS: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// Creates the folder `name` in `parent`, which must be a file system in memory where no other user can replace the folder.
/// Otherwise returns the reason.
fn in_memory(parent: &Path, name: &str) -> Result<PathBuf, String> {
    let kind = statfs(parent).map_err(|errno| errno.desc().to_owned())?;
    if ![TMPFS_MAGIC, RAMFS_MAGIC].contains(&kind.filesystem_type()) {
        return Err("it is not a tmpfs".to_owned());
    }
    let meta = fs::metadata(parent).map_err(|error| error.to_string())?;
    let mode = meta.mode() & 0o7777;
    if mode & WRITABLE_BY_OTHERS != 0 && mode & STICKY == 0 {
        return Err(format!(
            "other users can replace what is in it (mode {mode:04o} lacks the sticky bit)"
        ));
    }
    let folder = parent.join(name);
    let created = DirBuilder::new().mode(0o700).create(&folder);
    created.map_err(|error| error.to_string())?;
    Ok(folder)
}

/// The folder into which folders are moved that are to be removed. It is on the same file system, so that a rename is
/// enough. [`keep_clean`] empties it.
#[derive(Debug, Clone)]
pub(crate) struct Trash {
    folder: Arc<Path>,
    news: Arc<Notify>,
}

impl Trash {
    pub(crate) fn create(folder: PathBuf) -> Result<Self, FileError> {
        make(&folder)?;
        Ok(Self {
            folder: folder.into(),
            news: Arc::new(Notify::new()),
        })
    }

    /// Moves `path` into the trash. If that fails, it stays until the end of the job.
    pub(crate) fn take(&self, path: &Path) {
        let new = format!("{:016x}", rand::random::<u64>());
        match fs::rename(path, self.folder.join(new)) {
            Ok(()) => self.news.notify_one(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                let path = path.display();
                tracing::warn!(%path, %error, "cannot be moved to the trash; it is removed at the end of the job");
            }
        }
    }

    /// Removes what is in the trash. Returns `false` if some of it is left.
    fn empty(&self, until: Option<Instant>) -> bool {
        match tree::empty_until(&self.folder, until) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => {
                tracing::warn!(%error, "what an ended attempt wrote is not removed yet");
                false
            }
        }
    }
}

/// Task: empties the trash whenever something is put into it, and otherwise removes what killed shims left behind. It uses
/// one blocking thread at most. Ends when it is dropped.
pub(crate) async fn keep_clean(scratch: Cleaner) {
    let mut leftovers = true;
    loop {
        let cleaner = scratch.clone();
        let round = move || {
            cleaner.trash.empty(None);
            leftovers && !cleaner.sweep(Instant::now() + SWEEP)
        };
        // A panic during the removal must not stop the pod.
        leftovers = tokio::task::spawn_blocking(round).await.unwrap_or(false);
        if !leftovers {
            scratch.trash.news.notified().await;
        }
    }
}

/// What [`keep_clean`] cleans.
#[derive(Debug, Clone)]
pub(crate) struct Cleaner {
    trash: Trash,
    base: PathBuf,
}

impl Cleaner {
    pub(crate) fn of(scratch: &Scratch) -> Self {
        Self {
            trash: scratch.trash(),
            base: scratch.base.clone(),
        }
    }

    /// Removes leftovers of other shims. Returns `false` if the time was not sufficient.
    fn sweep(&self, until: Instant) -> bool {
        let host = host_tag(&node_name());
        let folders = [self.base.as_path(), Path::new(MEMORY)];
        folders.into_iter().all(|base| sweep(base, &host, until))
    }
}

fn make(folder: &Path) -> Result<(), FileError> {
    let made = DirBuilder::new().mode(0o700).create(folder);
    made.map_err(FileError::on("create", folder))
}

fn subfolder(parent: &Path, name: &str) -> Result<PathBuf, FileError> {
    let folder = parent.join(name);
    match make(&folder) {
        Err(error) if error.source.kind() != io::ErrorKind::AlreadyExists => Err(error),
        Ok(()) | Err(_) => Ok(folder),
    }
}

/// A short form of a host's name: sockets lie in the folder, and their paths are limited to 107 bytes.
fn host_tag(name: &str) -> String {
    tag::<4>(name.as_bytes())
}

/// The first bytes of a digest, in hexadecimal digits.
fn tag<const BYTES: usize>(text: &[u8]) -> String {
    let digest = Sha256::digest(text);
    hexadecimal(digest.get(..BYTES).unwrap_or_default())
}

/// Removes what killed shims of this user left on this host. Returns `false` if the time was not sufficient. What cannot
/// be removed for another reason is left to the node's own clean-up.
fn sweep(base: &Path, host: &str, until: Instant) -> bool {
    let own = rustix::process::getuid().as_raw();
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(id) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else {
            continue;
        };
        let mut parts = id.split('-').skip(1);
        let whose = parts.next();
        if whose == Some(RANKS) {
            // One that ranks use, or that belongs to somebody else, stays.
            let removed = node::remove_unused(&entry.path(), until);
            if removed.is_err_and(|error| error.kind() == io::ErrorKind::TimedOut) {
                return false;
            }
        }
        if whose != Some(host) {
            continue;
        }
        let pid = parts.next().and_then(|pid| pid.parse().ok());
        let start: Option<u64> = parts.next().and_then(|start| start.parse().ok());
        let (Some(pid), Some(start)) = (pid, start) else {
            continue;
        };
        let ours = fs::symlink_metadata(entry.path())
            .is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == own);
        if ours && proc::start_time(pid) != Some(start) {
            match tree::remove_until(&entry.path(), Some(until)) {
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return false,
                Err(error) => {
                    let path = entry.path();
                    tracing::warn!(path = %path.display(), %error, "cannot remove what another shim left behind");
                }
                Ok(()) => {}
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};

    use super::*;

    /// Creates `depth` nested folders below `top`.
    fn nest(top: &Path, depth: usize) {
        let folder = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut at = openat(CWD, top, folder, Mode::empty()).unwrap();
        for _ in 0..depth {
            mkdirat(&at, c"d", Mode::RWXU).unwrap();
            at = openat(&at, c"d", folder, Mode::empty()).unwrap();
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_mins(5)
    }

    #[test]
    fn a_folder_that_others_can_replace_is_not_used() {
        let base = tempfile::tempdir().unwrap();
        let shared = base.path().join("shared");
        fs::create_dir(&shared).unwrap();
        let mode = |mode| fs::set_permissions(&shared, fs::Permissions::from_mode(mode)).unwrap();
        mode(0o777);
        let error = Scratch::create(shared.to_str().unwrap(), Fallback::Error).unwrap_err();
        let text = knoc_proto::error::chain(&error);
        assert!(text.contains("job.scratch"), "{text}");
        mode(0o1777);
        Scratch::create(shared.to_str().unwrap(), Fallback::Error).unwrap();
    }

    #[test]
    fn leftovers_are_swept_and_live_folders_are_not() {
        let base = tempfile::tempdir().unwrap();
        let named = |host: &str| {
            let tag = host_tag(host);
            base.path().join(format!("knoc-shim-{tag}-4194305-1"))
        };
        let dead = named(&node_name());
        // Its shim may still run on that node.
        let elsewhere = named("another-node");
        fs::create_dir(&elsewhere).unwrap();
        let locked = dead.join("locked");
        fs::create_dir_all(locked.join("inner")).unwrap();
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o0)).unwrap();
        let other = base.path().join("knoc-shim-x");
        fs::create_dir(&other).unwrap();
        let scratch = Scratch::create(base.path().to_str().unwrap(), Fallback::Error).unwrap();
        let folder = scratch.disk("a").unwrap();
        let host = host_tag(&node_name());
        assert!(!sweep(base.path(), &host, Instant::now()));
        assert!(dead.exists());
        assert!(sweep(base.path(), &host, soon()));
        assert!(!dead.exists());
        assert!(other.exists() && elsewhere.exists() && folder.is_dir());
        assert_eq!(scratch.disk("a").unwrap(), folder);
        let memory = scratch.memory("m").unwrap();
        let secrets = scratch.secrets("v").unwrap();
        drop(scratch);
        assert!(!folder.exists() && !memory.exists() && !secrets.exists());
    }

    #[test]
    fn nobody_else_can_name_the_folder_of_ranks_and_a_leftover_is_swept() {
        let name = of_ranks("private", 1, "c1");
        assert_eq!(name, of_ranks("private", 1, "c1"));
        for other in [
            of_ranks("another", 1, "c1"),
            of_ranks("private", 2, "c1"),
            of_ranks("private", 1, "c2"),
        ] {
            assert_ne!(name, other);
        }
        let base = tempfile::tempdir().unwrap();
        let folder = node::NodeFolder::join(base.path(), &name).unwrap();
        nest(&folder.memory().unwrap(), 3);
        let host = host_tag(&node_name());
        assert!(sweep(base.path(), &host, soon()));
        assert!(base.path().join(&name).exists(), "a rank uses it");
        drop(folder);
        assert!(!sweep(base.path(), &host, Instant::now()));
        assert!(sweep(base.path(), &host, soon()));
        assert!(!base.path().join(&name).exists());
    }

    /// Neither the restart of a container nor other containers wait for the removal.
    #[tokio::test]
    async fn what_an_attempt_wrote_is_out_of_the_way_at_once_and_removed_by_the_task() {
        let base = tempfile::tempdir().unwrap();
        let scratch = Scratch::create(base.path().to_str().unwrap(), Fallback::Error).unwrap();
        let work = scratch.disk("w0-0").unwrap();
        nest(&work, 15_000);
        let trash = scratch.trash();
        trash.take(&work);
        trash.take(&work);
        assert!(!work.exists());
        let count = || fs::read_dir(&trash.folder).unwrap().count();
        assert_eq!(count(), 1);
        let clean = keep_clean(Cleaner::of(&scratch));
        let emptied = async {
            while count() > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            biased;
            () = clean => {}
            done = tokio::time::timeout(Duration::from_mins(2), emptied) => done.expect("not removed"),
        }
    }

    #[test]
    fn memory_in_which_others_could_replace_the_folder_is_not_used() {
        let base = tempfile::tempdir().unwrap();
        let memory = tempfile::tempdir_in(MEMORY).unwrap();
        for (mode, usable) in [(0o777, false), (0o770, false), (0o1777, true)] {
            fs::set_permissions(memory.path(), fs::Permissions::from_mode(mode)).unwrap();
            let scratch = Scratch::create_at(base.path(), memory.path(), Fallback::Error).unwrap();
            match scratch.secrets("v0") {
                Ok(folder) => assert!(usable && folder.starts_with(memory.path()), "{mode:o}"),
                Err(error) => assert!(!usable && error.to_string().contains("sticky"), "{error}"),
            }
        }
    }

    #[test]
    fn without_a_file_system_in_memory_secrets_lie_nowhere_unless_the_site_says_so() {
        let base = tempfile::tempdir().unwrap();
        let plain = std::env::var_os("CARGO_MANIFEST_DIR").unwrap();
        let missing = base.path().join("none");
        for memory in [missing.as_path(), Path::new(&plain), Path::new("/proc")] {
            let make = |name: &str, fallback| {
                let base = base.path().join(name);
                fs::create_dir_all(&base).unwrap();
                Scratch::create_at(&base, memory, fallback).unwrap()
            };
            let scratch = make("error", Fallback::Error);
            for error in [scratch.secrets("v0"), scratch.memory("v1")] {
                let text = error.unwrap_err().to_string();
                assert!(text.contains(memory.to_str().unwrap()), "{text}");
                assert!(text.contains("memory_fallback = \"disk\""), "{text}");
            }
            assert_eq!(scratch.on_disk(), None);
            let files = fs::read_dir(&scratch.disk).unwrap().count();
            assert_eq!(files, 1, "only the trash lies on disk");
            let scratch = make("disk", Fallback::Disk);
            assert!(scratch.secrets("v0").unwrap().starts_with(&scratch.disk));
            assert!(scratch.on_disk().unwrap().contains("disk"));
        }
        let scratch = Scratch::create(base.path().to_str().unwrap(), Fallback::Disk).unwrap();
        assert!(scratch.secrets("v0").unwrap().starts_with(MEMORY));
        assert_eq!(scratch.on_disk(), None);
    }
}
