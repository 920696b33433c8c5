//! Files and folders at places that a container can write: no link on the way is followed, nothing is waited for.
//!
//! A container may put a link, a pipe or a device wherever its volumes are, also while we look. So each component is
//! opened from the one before (`openat`, `O_NOFOLLOW`), from `/` on: paths are canonical where they were taken, and a
//! link in them was put there since. Blocking file work. `openat2` would do it in one call, but needs Linux 5.6.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    os::fd::OwnedFd,
    path::{Component, Path},
};

use rustix::{
    fs::{FileType, Mode, OFlags, fstat, mkdirat, open, openat},
    io::Errno,
};

/// What a new folder or file allows, less the umask.
const FOLDER: Mode = Mode::from_raw_mode(0o777);
const FILE: Mode = Mode::from_raw_mode(0o666);

/// The last `limit` bytes of the regular file `path`, an absolute path.
pub(crate) fn read_end(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let mut file = open_file(path, flags, Missing::Fails)?;
    let limit = u64::try_from(limit).unwrap_or_default();
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
    let mut text = Vec::new();
    file.take(limit).read_to_end(&mut text)?;
    Ok(text)
}

/// Makes the file `path` where nothing is there, and the folders on the way.
pub(crate) fn touch(path: &Path) -> io::Result<()> {
    let flags =
        OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY;
    open_file(path, flags, Missing::Made).map(drop)
}

/// Makes the folder `path`, whose parent is there. One that is there already is fine, a link to one is not.
pub(crate) fn make_folder(path: &Path) -> io::Result<()> {
    folder(path, Missing::Made).map(drop)
}

/// What becomes of a folder on the way that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    Made,
    Fails,
}

fn open_file(path: &Path, flags: OFlags, missing: Missing) -> io::Result<File> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let parent = folder(parent, missing)?;
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(&parent, name, flags, FILE)?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("not a regular file"));
    }
    Ok(file.into())
}

fn folder(path: &Path, missing: Missing) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = open("/", flags, Mode::empty())?;
    for component in path.components() {
        let name = match component {
            Component::RootDir => continue,
            Component::Normal(name) => name,
            Component::CurDir | Component::ParentDir | Component::Prefix(_) => {
                return Err(io::ErrorKind::InvalidInput.into());
            }
        };
        at = match openat(&at, name, flags, Mode::empty()) {
            Err(Errno::NOENT) if missing == Missing::Made => {
                match mkdirat(&at, name, FOLDER) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                openat(&at, name, flags, Mode::empty())?
            }
            other => other?,
        };
    }
    Ok(at)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of the test's own")]
mod tests {
    use std::{fs, os::unix::fs::symlink, time::Instant};

    use super::*;

    fn world() -> (tempfile::TempDir, std::path::PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(root.path()).unwrap();
        fs::create_dir(path.join("home")).unwrap();
        fs::write(path.join("home/key"), "secret").unwrap();
        fs::create_dir(path.join("volume")).unwrap();
        (root, path)
    }

    #[test]
    fn a_plain_file_is_made_and_its_end_is_read() {
        let (_root, path) = world();
        let log = path.join("volume/a/b/log");
        touch(&log).unwrap();
        fs::write(&log, "0123456789").unwrap();
        touch(&log).unwrap();
        assert_eq!(read_end(&log, 4).unwrap(), b"6789");
        assert_eq!(read_end(&log, 40).unwrap(), b"0123456789");
    }

    #[test]
    fn no_link_is_followed_wherever_it_stands() {
        let (_root, path) = world();
        symlink(path.join("home/key"), path.join("volume/log")).unwrap();
        symlink(path.join("home"), path.join("volume/dir")).unwrap();
        symlink(path.join("home/new"), path.join("volume/dangling")).unwrap();
        for name in ["log", "dir/key"] {
            read_end(&path.join("volume").join(name), 4096).unwrap_err();
        }
        for name in ["dangling", "dangling/x", "dir/new", "dir/new/x"] {
            touch(&path.join("volume").join(name)).unwrap_err();
            make_folder(&path.join("volume").join(name)).unwrap_err();
        }
        assert_eq!(fs::read_dir(path.join("home")).unwrap().count(), 1);
    }

    #[test]
    fn a_pipe_holds_nobody_up() {
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
