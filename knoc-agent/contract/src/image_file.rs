//! The identity of an image file of the site when the pod was accepted, so that the job mounts this
//! file and no other.

use knoc_proto::pb;
use serde::{Deserialize, Serialize};

use crate::walk::Found;

/// Distinguishes a file from any other at the same path, as the agent saw it when the pod was
/// staged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// The device number. It is compared only on the host that looked it up, because each host has
    /// a device number of its own for a network file system.
    pub device: Option<u64>,
    /// The inode number.
    pub inode: u64,
    /// The image is an unpacked folder (sandbox). Its contents may change, so neither size nor
    /// times are compared.
    pub folder: bool,
    /// The size in bytes.
    pub size: u64,
    /// When the file's contents last changed, in nanoseconds since the epoch.
    pub modified: i64,
    /// When the inode last changed, in nanoseconds since the epoch.
    pub changed: i64,
}

impl FileId {
    /// The identity of an open file.
    #[must_use]
    pub fn of(found: &Found) -> Self {
        let stat = &found.stat;
        let nanos = |seconds: i64, nanos: u64| {
            let nanos = i64::try_from(nanos).unwrap_or_default();
            seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
        };
        Self {
            device: Some(stat.st_dev),
            inode: stat.st_ino,
            folder: found.is_folder(),
            size: u64::try_from(stat.st_size).unwrap_or_default(),
            modified: nanos(stat.st_mtime, stat.st_mtime_nsec),
            changed: nanos(stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    /// Reads the identity that the agent wrote into the job file; `host` is the host that reads it.
    #[must_use]
    pub fn from_job(file: &pb::ImageFileId, host: &str) -> Self {
        Self {
            device: Some(file.device).filter(|_| file.host == host),
            inode: file.inode,
            folder: file.folder,
            size: file.size,
            modified: file.modified_nanos,
            changed: file.changed_nanos,
        }
    }

    /// The identity as the job file states it; `host` is the host that looked it up.
    #[must_use]
    pub fn to_job(&self, host: &str) -> pb::ImageFileId {
        pb::ImageFileId {
            host: host.to_owned(),
            device: self.device.unwrap_or_default(),
            inode: self.inode,
            folder: self.folder,
            size: self.size,
            modified_nanos: self.modified,
            changed_nanos: self.changed,
        }
    }

    /// Names the first property in which two files differ; `None` if they are the same file.
    #[must_use]
    pub fn differs(&self, here: &Self) -> Option<&'static str> {
        let device = match (self.device, here.device) {
            (Some(a), Some(b)) => a != b,
            (None, _) | (_, None) => false,
        };
        let file = !self.folder;
        [
            (self.folder != here.folder, "kind of file"),
            (device, "device"),
            (self.inode != here.inode, "inode"),
            (file && self.size != here.size, "size"),
            (file && self.modified != here.modified, "modification time"),
            (file && self.changed != here.changed, "change time"),
        ]
        .into_iter()
        .find_map(|(differs, what)| differs.then_some(what))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::walk;

    #[test]
    fn a_file_id_survives_the_job_file() {
        let root = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(root.path()).unwrap();
        let id = FileId::of(&walk::owned(&root, false).unwrap());
        assert_eq!(FileId::from_job(&id.to_job("login"), "login"), id);
        assert_eq!(FileId::from_job(&id.to_job("login"), "c1").device, None);
    }
}
