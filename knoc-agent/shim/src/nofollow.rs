//! Access to files and folders that a container can write: no link is followed, and no pipe or device blocks the shim.
//!
//! A container may put a link, a pipe or a device anywhere in its volumes, at any time. So each component of a path is
//! opened relative to the one before (`openat`, `O_NOFOLLOW`), starting at `/`. The paths were canonical when they were
//! taken, so a link in one was put there since. All functions block on file work. `openat2` would do this in one call, but
//! needs Linux 5.6.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    path::{Component, Path},
};

use rustix::{
    fs::{FileType, Mode, OFlags, fstat, mkdirat, open, openat},
    io::Errno,
};

/// The modes of new folders and files, before the umask.
const FOLDER: Mode = Mode::from_raw_mode(0o777);
const FILE: Mode = Mode::from_raw_mode(0o666);

const READ: OFlags = OFlags::RDONLY.union(OFlags::NONBLOCK).union(OFlags::NOCTTY);
const APPEND: OFlags = OFlags::WRONLY
    .union(OFlags::APPEND)
    .union(OFlags::CREATE)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY);
const FOLDERS: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// The last `limit` bytes of the regular file `path`, an absolute path.
pub(crate) fn read_end(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    end_of(open_file(path, READ, Missing::Fail)?, limit)
}

/// The last `limit` bytes of the regular file `path` below the folder `base`, or of `base` itself if `path` is empty.
/// `base` may be open with `O_PATH`.
pub(crate) fn read_end_in(base: impl AsFd, path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    end_of(open_file_in(base, path, READ, Missing::Fail)?, limit)
}

fn end_of(mut file: File, limit: usize) -> io::Result<Vec<u8>> {
    let limit = u64::try_from(limit).unwrap_or_default();
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
    let mut text = Vec::new();
    file.take(limit).read_to_end(&mut text)?;
    Ok(text)
}

/// Creates the file `path` below the folder `base` if it does not exist, and its parent folders.
pub(crate) fn touch_in(base: impl AsFd, path: &Path) -> io::Result<()> {
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    open_file_in(base, path, APPEND, Missing::Create).map(drop)
}

/// Creates the folder `path` below the folder `base` if it does not exist, and its parent folders.
pub(crate) fn make_folder_in(base: impl AsFd, path: &Path) -> io::Result<()> {
    folder(base, path, Missing::Create).map(drop)
}

/// What to do about a folder that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    Create,
    Fail,
}

fn open_file(path: &Path, flags: OFlags, missing: Missing) -> io::Result<File> {
    let Ok(path) = path.strip_prefix("/") else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let root = open("/", FOLDERS, Mode::empty())?;
    if path.as_os_str().is_empty() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    open_file_in(root, path, flags, missing)
}

fn open_file_in(base: impl AsFd, path: &Path, flags: OFlags, missing: Missing) -> io::Result<File> {
    let flags = flags | OFlags::CLOEXEC;
    let file = if path.as_os_str().is_empty() {
        // The type is checked first, as opening a pipe or a device may have effects.
        regular(&base)?;
        let reopened = format!("/proc/self/fd/{}", base.as_fd().as_raw_fd());
        open(reopened, flags, Mode::empty())?
    } else {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let parent = folder(base, parent, missing)?;
        openat(&parent, name, flags | OFlags::NOFOLLOW, FILE)?
    };
    regular(&file)?;
    Ok(file.into())
}

fn regular(file: impl AsFd) -> io::Result<()> {
    if FileType::from_raw_mode(fstat(file)?.st_mode) == FileType::RegularFile {
        return Ok(());
    }
    Err(io::Error::other("not a regular file"))
}

/// Opens the folder `path` below `base` without following links.
fn folder(base: impl AsFd, path: &Path, missing: Missing) -> io::Result<OwnedFd> {
    let mut at = openat(&base, ".", FOLDERS, Mode::empty())?;
    for component in path.components() {
        let Component::Normal(name) = component else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        at = match openat(&at, name, FOLDERS, Mode::empty()) {
            Err(Errno::NOENT) if missing == Missing::Create => {
                match mkdirat(&at, name, FOLDER) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                openat(&at, name, FOLDERS, Mode::empty())?
            }
            other => other?,
        };
    }
    Ok(at)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "the test's own files")]
mod tests {
    use std::{fs, os::unix::fs::symlink, time::Instant};

    use super::*;

    fn touch(path: &Path) -> io::Result<()> {
        let root = open("/", FOLDERS, Mode::empty())?;
        touch_in(root, path.strip_prefix("/").map_err(io::Error::other)?)
    }

    fn world() -> (tempfile::TempDir, std::path::PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(root.path()).unwrap();
        fs::create_dir(path.join("home")).unwrap();
        fs::write(path.join("home/key"), "secret").unwrap();
        fs::create_dir(path.join("volume")).unwrap();
        (root, path)
    }

    #[test]
    fn a_regular_file_is_created_and_its_end_is_read() {
        let (_root, path) = world();
        let log = path.join("volume/a/b/log");
        touch(&log).unwrap();
        fs::write(&log, "0123456789").unwrap();
        touch(&log).unwrap();
        assert_eq!(read_end(&log, 4).unwrap(), b"6789");
        assert_eq!(read_end(&log, 40).unwrap(), b"0123456789");
        let base = File::open(path.join("volume/a")).unwrap();
        let rest = Path::new("b/log");
        assert_eq!(read_end_in(&base, rest, 4).unwrap(), b"6789");
        touch_in(&base, Path::new("b/new/log")).unwrap();
        let file = open(&log, OFlags::PATH, Mode::empty()).unwrap();
        assert_eq!(read_end_in(&file, Path::new(""), 4).unwrap(), b"6789");
        read_end_in(&base, Path::new(""), 4).unwrap_err();
        read_end_in(&base, Path::new("../a/b/log"), 4).unwrap_err();
    }

    #[test]
    fn no_link_is_followed_anywhere_in_a_path() {
        let (_root, path) = world();
        symlink(path.join("home/key"), path.join("volume/log")).unwrap();
        symlink(path.join("home"), path.join("volume/dir")).unwrap();
        symlink(path.join("home/new"), path.join("volume/dangling")).unwrap();
        for name in ["log", "dir/key"] {
            read_end(&path.join("volume").join(name), 4096).unwrap_err();
        }
        for name in ["dangling", "dangling/x", "dir/new", "dir/new/x"] {
            touch(&path.join("volume").join(name)).unwrap_err();
            let volume = File::open(path.join("volume")).unwrap();
            touch_in(&volume, Path::new(name)).unwrap_err();
            read_end_in(&volume, Path::new(name), 9).unwrap_err();
        }
        assert_eq!(fs::read_dir(path.join("home")).unwrap().count(), 1);
    }

    #[test]
    fn a_pipe_does_not_block() {
        let (_root, path) = world();
        let pipe = path.join("volume/log");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let began = Instant::now();
        read_end(&pipe, 4096).unwrap_err();
        touch(&pipe).unwrap_err();
        assert!(began.elapsed().as_secs() < 5);
        read_end(Path::new("/dev/zero"), 4096).unwrap_err();
    }
}
