//! The pod's node-local folders: on disk for sockets, roots and emptyDir, in memory for secrets. Blocking file work.
//!
//! Both are 0700, named after this host and process so that a later shim of the same user can tell a leftover, and
//! removed at the end, whatever the containers made of their permissions. The folder may lie on a file system that
//! nodes share: whether a process lives is known on its own host only.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

use super::{pod::node_name, proc};
use crate::{jobdir::atomic::FileError, walk};

const PREFIX: &str = "knoc-shim";
const MEMORY: &str = "/dev/shm";
const DEFAULT: &str = "/tmp";

/// See the module.
#[derive(Debug)]
pub(crate) struct Scratch {
    disk: PathBuf,
    memory: PathBuf,
}

impl Scratch {
    /// Makes the folders for this process; `base` empty: `/tmp`. Without a writable `/dev/shm` both are on disk.
    pub(crate) fn create(base: &str) -> Result<Self, FileError> {
        let base = Path::new(if base.is_empty() { DEFAULT } else { base });
        let host = host_tag(&node_name());
        sweep(base, &host);
        sweep(Path::new(MEMORY), &host);
        let pid = std::process::id();
        let name = format!(
            "{PREFIX}-{host}-{pid}-{}",
            proc::start_time(pid).unwrap_or_default()
        );
        let disk = base.join(&name);
        make(&disk)?;
        // Later a link in a path below can only be a container's: nobody else may replace a folder above.
        let walked = walk::owned(&disk, false).map_err(|error| {
            fs::remove_dir(&disk).ok();
            let cure = "name another folder in job.scratch of the site file";
            io::Error::other(format!("{error}; {cure}"))
        });
        let disk = walked.map_err(FileError::on("use", &disk))?.path;
        let memory = Path::new(MEMORY).join(&name);
        let memory = if make(&memory).is_ok() {
            memory
        } else {
            let beside = disk.join("memory");
            make(&beside)?;
            beside
        };
        Ok(Self { disk, memory })
    }

    /// Removes both.
    pub(crate) fn remove(&self) {
        remove_tree(&self.memory);
        remove_tree(&self.disk);
    }

    /// A sub-folder on disk, made where it is missing.
    pub(crate) fn disk(&self, name: &str) -> Result<PathBuf, FileError> {
        subfolder(&self.disk, name)
    }

    /// A sub-folder in memory, made where it is missing.
    pub(crate) fn memory(&self, name: &str) -> Result<PathBuf, FileError> {
        subfolder(&self.memory, name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.remove();
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

/// Removes a tree with all force its owner has. What cannot be removed stays: the node's own cleaning takes it.
pub(crate) fn remove_tree(path: &Path) {
    if fs::remove_dir_all(path).is_err() {
        open_up(path);
        fs::remove_dir_all(path).ok();
    }
}

/// Folders without their owner's rights cannot be emptied.
fn open_up(folder: &Path) {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).ok();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path());
        }
    }
}

/// A host's name, short: sockets lie in the folder, and their paths are limited to 107 bytes.
fn host_tag(name: &str) -> String {
    let digest = Sha256::digest(name.as_bytes());
    let bytes: Vec<String> = digest
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    bytes.concat()
}

/// Removes what killed shims of this user left on this host.
fn sweep(base: &Path, host: &str) {
    let own = rustix::process::getuid().as_raw();
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(id) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else {
            continue;
        };
        let mut parts = id.split('-').skip(1);
        if parts.next() != Some(host) {
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
            remove_tree(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_others_can_replace_is_not_used() {
        let base = tempfile::tempdir().unwrap();
        let shared = base.path().join("shared");
        fs::create_dir(&shared).unwrap();
        let mode = |mode| fs::set_permissions(&shared, fs::Permissions::from_mode(mode)).unwrap();
        mode(0o777);
        let error = Scratch::create(shared.to_str().unwrap()).unwrap_err();
        let text = knoc_proto::error::chain(&error);
        assert!(text.contains("job.scratch"), "{text}");
        mode(0o1777);
        Scratch::create(shared.to_str().unwrap()).unwrap();
    }

    #[test]
    fn leftovers_are_swept_and_live_folders_are_not() {
        let base = tempfile::tempdir().unwrap();
        let named = |host: &str| {
            let tag = host_tag(host);
            base.path().join(format!("knoc-shim-{tag}-4194305-1"))
        };
        let dead = named(&node_name());
        // There it may live.
        let elsewhere = named("another-node");
        fs::create_dir(&elsewhere).unwrap();
        let locked = dead.join("locked");
        fs::create_dir_all(locked.join("inner")).unwrap();
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o0)).unwrap();
        let other = base.path().join("knoc-shim-x");
        fs::create_dir(&other).unwrap();
        let scratch = Scratch::create(base.path().to_str().unwrap()).unwrap();
        assert!(!dead.exists());
        assert!(other.exists() && elsewhere.exists());
        let folder = scratch.disk("a").unwrap();
        assert_eq!(scratch.disk("a").unwrap(), folder);
        sweep(base.path(), &host_tag(&node_name()));
        assert!(folder.is_dir());
        let memory = scratch.memory("m").unwrap();
        drop(scratch);
        assert!(!folder.exists() && !memory.exists());
    }
}
