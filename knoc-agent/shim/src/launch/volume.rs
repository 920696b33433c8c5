//! Fills a volume that an image declares with what the image has in that folder, as container runtimes do. Only a container with a
//! read-only root has such volumes.
//!
//! The container runtime has mounted an empty folder of the shim over the image's. In a copy of the container's mount namespace that
//! mount is removed, and what appears is copied to the folder, which is standard output. What the image has is bounded by nobody, so
//! the copy is: in bytes, files and levels, of which each keeps two descriptors open. No link is followed. The folder gets the mode
//! that it has in the image: some programs do not take a folder to which everybody can write.

use std::{
    ffi::CStr,
    fs::File,
    io::{self, Read as _},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, RawMode, fchmod, fstat, mkdirat, openat,
        readlinkat, statat, symlinkat,
    },
    io::Errno,
};

/// What is copied at most.
const MOST: Left = Left {
    bytes: 16 << 30,
    files: 1_000_000,
    levels: 64,
};

const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);
const FOLDER: OFlags = READ.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW);
const NEW: OFlags = OFlags::WRONLY
    .union(OFlags::CREATE)
    .union(OFlags::EXCL)
    .union(OFlags::CLOEXEC);

/// What of a file's mode is copied: nothing that changes the user of whoever executes it.
const MODE: Mode = Mode::RWXU
    .union(Mode::RWXG)
    .union(Mode::RWXO)
    .union(Mode::SVTX);

/// What may still be copied.
struct Left {
    bytes: u64,
    files: u32,
    levels: usize,
}

/// A folder that is being copied.
struct Level {
    from: Dir,
    to: OwnedFd,
    /// The mode that the copy gets at the end: it may forbid to write.
    mode: Option<Mode>,
}

/// Enters a copy of the mount namespace, in which mounts can be removed without affecting the container.
pub(super) fn unshare_mounts() -> io::Result<()> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS)?;
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    Ok(mount(none, "/", none, flags, none)?)
}

/// Copies what the image has at `target` to standard output. The caller must be in the namespaces of the container and have rights
/// over them; afterwards the process must exit. Fails with `EFBIG` if it is too much.
pub(super) fn fill(target: &[u8]) -> io::Result<()> {
    unshare_mounts()?;
    match umount2(target, MntFlags::MNT_DETACH) {
        // The runtime has left it out, or nobody but the runtime may remove it: the volume stays empty.
        Err(nix::errno::Errno::ENOENT | nix::errno::Errno::EINVAL) => return Ok(()),
        removed => removed?,
    }
    let from = match openat(CWD, target, READ | OFlags::DIRECTORY, Mode::empty()) {
        // The image declares it, and has nothing there that this user may read.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) => return Ok(()),
        from => from?,
    };
    let to = rustix::stdio::stdout();
    let mode = top_mode(fstat(&from)?.st_mode);
    copy(from, to.try_clone_to_owned()?, MOST)?;
    // With root's rights in the container, its programs may become other users, who are not the owner.
    if !rustix::process::getuid().is_root() {
        fchmod(to, mode)?;
    }
    Ok(())
}

/// PURE: the mode of a volume, of which the program is the owner whoever that is in the image.
fn top_mode(of_image: RawMode) -> Mode {
    (Mode::from_raw_mode(of_image) & MODE) | Mode::RWXU
}

fn copy(from: OwnedFd, to: OwnedFd, mut left: Left) -> io::Result<()> {
    let mut levels = vec![Level {
        from: Dir::new(from)?,
        to,
        mode: None,
    }];
    while let Some(level) = levels.last_mut() {
        let Some(entry) = level.from.read() else {
            let done = levels.pop();
            if let Some((to, mode)) = done.and_then(|done| Some((done.to, done.mode?))) {
                fchmod(&to, mode)?;
            }
            continue;
        };
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        left.files = left.files.checked_sub(1).ok_or(Errno::FBIG)?;
        let below = copy_entry(level.from.fd()?, level.to.as_fd(), name, &mut left)?;
        if below.is_some() && levels.len() >= left.levels {
            return Err(Errno::FBIG.into());
        }
        levels.extend(below);
    }
    Ok(())
}

/// Copies one entry. What exists already stays: it is the mount point of a volume. What this user may not read is left out, as are
/// pipes, sockets and devices. Returns the folder, whose entries are still to be copied.
fn copy_entry(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    name: &CStr,
    left: &mut Left,
) -> io::Result<Option<Level>> {
    let found = match statat(from, name, AtFlags::SYMLINK_NOFOLLOW) {
        // This user may list the folder, and no more.
        Err(Errno::ACCESS) => return Ok(None),
        found => found?,
    };
    let mode = Mode::from_raw_mode(found.st_mode) & MODE;
    match FileType::from_raw_mode(found.st_mode) {
        FileType::Directory => copy_folder(from, to, name, mode),
        FileType::RegularFile => {
            copy_file(from, to, name, mode, left)?;
            Ok(None)
        }
        FileType::Symlink => {
            let target = readlinkat(from, name, Vec::new())?;
            match symlinkat(target, to, name) {
                Ok(()) | Err(Errno::EXIST) => Ok(None),
                Err(error) => Err(error.into()),
            }
        }
        FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::BlockDevice
        | FileType::Unknown => Ok(None),
    }
}

fn copy_folder(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    name: &CStr,
    mode: Mode,
) -> io::Result<Option<Level>> {
    let from = match openat(from, name, FOLDER, Mode::empty()) {
        Err(Errno::ACCESS) => return Ok(None),
        from => from?,
    };
    let mode = match mkdirat(to, name, Mode::RWXU) {
        Ok(()) => Some(mode),
        Err(Errno::EXIST) => None,
        Err(error) => return Err(error.into()),
    };
    let to = match openat(to, name, FOLDER, Mode::empty()) {
        // The mount point of a file.
        Err(Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        to => to?,
    };
    let from = Dir::new(from)?;
    Ok(Some(Level { from, to, mode }))
}

fn copy_file(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    name: &CStr,
    mode: Mode,
    left: &mut Left,
) -> io::Result<()> {
    let from = match openat(from, name, READ | OFlags::NOFOLLOW, Mode::empty()) {
        Err(Errno::ACCESS) => return Ok(()),
        from => File::from(from?),
    };
    let mut to = match openat(to, name, NEW, Mode::RUSR | Mode::WUSR) {
        Err(Errno::EXIST) => return Ok(()),
        to => File::from(to?),
    };
    let copied = io::copy(&mut from.take(left.bytes.saturating_add(1)), &mut to)?;
    left.bytes = left.bytes.checked_sub(copied).ok_or(Errno::FBIG)?;
    Ok(fchmod(&to, mode)?)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of the test's own")]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
        path::Path,
    };

    use super::*;

    fn filled(from: &Path, to: &Path, left: Left) -> io::Result<()> {
        let open = |path: &Path| OwnedFd::from(File::open(path).unwrap());
        copy(open(from), open(to), left)
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn files_folders_and_links_are_copied_with_their_modes() {
        let base = tempfile::tempdir().unwrap();
        let (from, to) = (base.path().join("from"), base.path().join("to"));
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("a/b/file"), "text").unwrap();
        set_mode(&from.join("a/b/file"), 0o4640);
        set_mode(&from.join("a/b"), 0o555);
        symlink("/etc/passwd", from.join("a/link")).unwrap();
        nix::unistd::mkfifo(&from.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        set_mode(&to, 0o777);
        filled(&from, &to, MOST).unwrap();
        assert_eq!(fs::read_to_string(to.join("a/b/file")).unwrap(), "text");
        assert_eq!(mode(&to.join("a/b/file")), 0o640);
        assert_eq!(mode(&to.join("a/b")), 0o555);
        let link = fs::read_link(to.join("a/link")).unwrap();
        assert_eq!(link, Path::new("/etc/passwd"));
        assert!(!to.join("pipe").exists());
        assert_eq!(mode(&to), 0o777);
        for tree in [&from, &to] {
            set_mode(&tree.join("a/b"), 0o755);
        }
    }

    #[test]
    fn a_folder_that_this_user_can_only_list_is_copied_without_what_is_in_it() {
        let base = tempfile::tempdir().unwrap();
        let (from, to) = (base.path().join("from"), base.path().join("to"));
        fs::create_dir_all(from.join("a")).unwrap();
        fs::create_dir(&to).unwrap();
        for file in [from.join("a/file"), from.join("file")] {
            fs::write(file, "text").unwrap();
        }
        set_mode(&from.join("a"), 0o444);
        let done = filled(&from, &to, MOST);
        set_mode(&from.join("a"), 0o755);
        done.unwrap();
        assert_eq!(mode(&to.join("a")), 0o444);
        assert_eq!(fs::read_to_string(to.join("file")).unwrap(), "text");
        set_mode(&to.join("a"), 0o755);
        let is_root = rustix::process::getuid().is_root();
        assert_eq!(to.join("a/file").exists(), is_root);
    }

    #[test]
    fn the_mode_of_a_volume_is_that_of_the_image_and_lets_its_owner_write() {
        for (of_image, wanted) in [
            (0o040_700, 0o700),
            (0o041_777, 0o1777),
            (0o040_555, 0o755),
            (0o046_750, 0o750),
        ] {
            assert_eq!(top_mode(of_image).as_raw_mode(), wanted, "{of_image:o}");
        }
    }

    #[test]
    fn the_mount_points_of_volumes_stay() {
        let base = tempfile::tempdir().unwrap();
        let (from, to) = (base.path().join("from"), base.path().join("to"));
        for folder in [from.join("folder"), from.join("mixed"), to.join("folder")] {
            fs::create_dir_all(folder).unwrap();
        }
        for file in [from.join("file"), from.join("folder/file")] {
            fs::write(file, "image").unwrap();
        }
        for file in [to.join("file"), to.join("mixed")] {
            fs::write(file, "").unwrap();
        }
        filled(&from, &to, MOST).unwrap();
        let read = |name: &str| fs::read_to_string(to.join(name)).unwrap();
        assert_eq!(read("file"), "");
        assert_eq!(read("mixed"), "");
        assert_eq!(read("folder/file"), "image");
    }

    #[test]
    fn what_is_too_much_is_an_error() {
        let base = tempfile::tempdir().unwrap();
        let from = base.path().join("from");
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::write(from.join("a/b/file"), "text").unwrap();
        for (number, (bytes, files, levels, fits)) in [
            (4, 3, 3, true),
            (3, 3, 3, false),
            (4, 2, 3, false),
            (4, 3, 2, false),
        ]
        .into_iter()
        .enumerate()
        {
            let to = base.path().join(number.to_string());
            fs::create_dir(&to).unwrap();
            let left = Left {
                bytes,
                files,
                levels,
            };
            let done = filled(&from, &to, left);
            let errno = done.err().and_then(|error| error.raw_os_error());
            let wanted = (!fits).then_some(nix::libc::EFBIG);
            assert_eq!(errno, wanted, "{bytes} {files} {levels}");
        }
    }
}
