//! Writes files so that readers see either all of a file or none of it, even after a crash.
//!
//! All functions block on file I/O: async callers use `spawn_blocking`. A temporary file beside the
//! target is written, synced and renamed over it; then the folder is synced.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

/// A file operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("{action} {}", path.display())]
pub struct FileError {
    /// The operation, as a verb: "write", "rename over" …
    pub action: &'static str,
    /// The file's path.
    pub path: PathBuf,
    /// The system's error.
    #[source]
    pub source: io::Error,
}

impl FileError {
    /// For `map_err`: adds the operation and the path.
    pub fn on(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self {
            action,
            path,
            source,
        }
    }

    /// Whether the file does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// Distinguishes the temporary files of one process. The process ID distinguishes those of
/// processes on one host.
static COUNTER: AtomicU64 = AtomicU64::new(0);

/// A name beside `path` that no other writer uses, on this host or on another that shares the file
/// system.
pub(crate) fn temporary(path: &Path) -> PathBuf {
    let n = COUNTER.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let random: u64 = rand::random();
    path.with_file_name(format!(".{name}.{}.{n}.{random:016x}", std::process::id()))
}

/// Creates `path` with `mode` and the contents `bytes`, synced. Fails if it exists.
pub(crate) fn create_synced(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(FileError::on("create", path))?;
    file.write_all(bytes)
        .map_err(FileError::on("write", path))?;
    file.sync_all().map_err(FileError::on("sync", path))
}

/// Gives the file `own` the further name `path`, and returns whether it got it: of several processes that try,
/// on whichever hosts of one file system, exactly one does. Link(2). The folder is synced then.
pub(crate) fn link_once(own: &Path, path: &Path) -> Result<bool, FileError> {
    match fs::hard_link(own, path) {
        Ok(()) => {}
        // An NFS client may repeat a request that has succeeded; the link count tells.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let links = fs::metadata(own)
                .map_err(FileError::on("stat", own))?
                .nlink();
            if links < 2 {
                return Ok(false);
            }
        }
        Err(error) => return Err(FileError::on("link", path)(error)),
    }
    sync_parent(path)?;
    Ok(true)
}

/// Creates `path` with `mode` and the contents `bytes`, complete from its first moment on. Returns whether this
/// call did it; `false` if the file was there. Of several processes, one does.
pub fn create_once(path: &Path, bytes: &[u8], mode: u32) -> Result<bool, FileError> {
    let own = temporary(path);
    let created = create_synced(&own, bytes, mode).and_then(|()| link_once(&own, path));
    // The temporary name is no longer needed. The outcome is the same if it cannot be removed.
    drop(fs::remove_file(&own));
    created
}

/// Replaces `path` with a file that has the contents `bytes` and the permission bits `mode`. File
/// and folder are synced.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    replace(path, bytes, mode)?;
    sync_parent(path)
}

/// Like [`write()`], but does not sync the folder: for several files in one folder, the last of
/// which is written with [`write()`].
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    let temporary = temporary(path);
    let written = create_synced(&temporary, bytes, mode)
        .and_then(|()| fs::rename(&temporary, path).map_err(FileError::on("rename over", path)));
    if written.is_err() {
        // The first error is the one to report; a leftover temporary file is removed together with
        // the folder.
        drop(fs::remove_file(&temporary));
    }
    written
}

/// Writes `files` that nobody reads yet, and syncs them and `folders` concurrently, which takes a
/// file system about one commit. This is not atomic: the caller must be able to recognise an
/// incomplete set.
pub fn create_together(
    files: &[(PathBuf, Vec<u8>)],
    folders: &[&Path],
    mode: u32,
) -> Result<(), FileError> {
    let mut open = Vec::with_capacity(files.len() + folders.len());
    for (path, bytes) in files {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(mode);
        let mut file = options.open(path).map_err(FileError::on("create", path))?;
        file.write_all(bytes)
            .map_err(FileError::on("write", path))?;
        open.push((file, path.as_path()));
    }
    for folder in folders {
        let handle = File::open(folder).map_err(FileError::on("open", folder))?;
        open.push((handle, folder));
    }
    let sync = |(file, path): (File, &Path)| file.sync_all().map_err(FileError::on("sync", path));
    std::thread::scope(|scope| {
        let mut syncing = Vec::with_capacity(open.len());
        for (file, path) in open {
            // Login nodes limit the number of threads per user. A file without a thread is synced
            // here, one after the other.
            let own = file.try_clone().map_err(FileError::on("sync", path))?;
            let spawned =
                std::thread::Builder::new().spawn_scoped(scope, move || sync((own, path)));
            match spawned {
                Ok(handle) => syncing.push((handle, path)),
                Err(_) => sync((file, path))?,
            }
        }
        let lost = || io::Error::other("the thread that synced it has ended");
        syncing.into_iter().try_for_each(|(one, path)| {
            one.join()
                .unwrap_or_else(|_| Err(FileError::on("sync", path)(lost())))
        })
    })
}

/// Syncs the parent folder of `path`, so that its entry is durable.
pub fn sync_parent(path: &Path) -> Result<(), FileError> {
    let parent = path.parent().unwrap_or_else(|| Path::new("/"));
    File::open(parent)
        .and_then(|folder| folder.sync_all())
        .map_err(FileError::on("sync", parent))
}

/// Creates `path` and its parents with mode 0700; existing folders are not changed.
pub fn create_dir(path: &Path) -> Result<(), FileError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(FileError::on("create folder", path))
}

/// Reads a whole file.
pub fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    fs::read(path).map_err(FileError::on("read", path))
}

/// Reads a whole file; `None` if it does not exist.
pub fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    match read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Like [`read_optional`], but reads at most `most` + 1 bytes, so that the caller can tell that the
/// file is too long.
pub fn read_bounded(path: &Path, most: usize) -> Result<Option<Vec<u8>>, FileError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(FileError::on("open", path))?,
    };
    let most = u64::try_from(most).unwrap_or(u64::MAX);
    let mut bytes = Vec::new();
    file.take(most.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(FileError::on("read", path))?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn replaces_whole_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        write(&path, b"one", 0o600).unwrap();
        write(&path, b"two", 0o600).unwrap();
        assert_eq!(read(&path).unwrap(), b"two");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_folder_is_named() {
        let error = write(Path::new("/nonexistent/x"), b"", 0o600).unwrap_err();
        assert!(
            error.to_string().starts_with("create /nonexistent/."),
            "{error}"
        );
        assert!(error.is_not_found());
        assert!(
            read_optional(Path::new("/nonexistent/x"))
                .unwrap()
                .is_none()
        );
    }
}
