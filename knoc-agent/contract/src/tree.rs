//! Removes folder trees, whatever a program has left in them. The agent and the shim use it.
//!
//! A container may leave a tree that is deeper than a path can name, has millions of entries, or
//! has folders that even their owner cannot open. In the shim, a container may still change the
//! tree while it is removed. Therefore:
//!
//! - Each folder is opened relative to the descriptor of its parent, and no link is followed.
//! - At most [`OPEN`] folders are open at once. A folder that lies deeper is moved to the top of the
//!   tree, where the next pass finds it. So the tree's depth costs neither stack, nor memory, nor
//!   descriptors.
//! - Other file systems are never entered.
//! - The caller may set a deadline. Another call can remove what is left.
//!
//! All functions block on file I/O.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
    time::Instant,
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, chmod, fchmod, fstat, openat, renameat, unlinkat,
    },
    io::Errno,
};

/// How many folders of one tree are open at once. Few trees that people make are deeper.
const OPEN: usize = 32;

/// The flags with which a folder is opened. `NONBLOCK` matters only if the entry is not a folder
/// after all.
const FOLDER: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

/// The permissions that the owner needs to empty a folder.
const RIGHTS: Mode = Mode::RWXU;

/// Removes `path`, which may be of any kind, and everything below it. It is not an error if it does
/// not exist.
pub fn remove(path: &Path) -> io::Result<()> {
    remove_until(path, None)
}

/// Like [`remove`], but fails with the error `TimedOut` at the time `until`.
pub fn remove_until(path: &Path, until: Option<Instant>) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = match openat(CWD, parent, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        parent => parent?,
    };
    let name = CString::new(name.as_encoded_bytes())?;
    let gone = match open_folder(parent.as_fd(), &name) {
        Ok(folder) => {
            empty_folder(folder.as_fd(), until)?;
            unlinkat(&parent, &name, AtFlags::REMOVEDIR)
        }
        Err(Errno::NOTDIR | Errno::LOOP) => unlinkat(&parent, &name, AtFlags::empty()),
        Err(error) => Err(error),
    };
    match gone {
        Err(Errno::NOENT) => Ok(()),
        gone => Ok(gone?),
    }
}

/// Removes everything in the folder `path`, but not the folder itself.
pub fn empty_until(path: &Path, until: Option<Instant>) -> io::Result<()> {
    empty_folder(openat(CWD, path, FOLDER, Mode::empty())?.as_fd(), until)
}

fn empty_folder(top: BorrowedFd<'_>, until: Option<Instant>) -> io::Result<()> {
    loop {
        let mut pass = Pass {
            top,
            device: fstat(top)?.st_dev,
            until,
            progress: false,
            left: None,
        };
        pass.run()?;
        match pass {
            // Some file systems skip entries of a folder that changes while it is listed, and
            // folders were moved up.
            Pass { progress: true, .. } => {}
            Pass { left: None, .. } => return Ok(()),
            Pass {
                left: Some(error), ..
            } => return Err(error.into()),
        }
    }
}

/// One walk over the tree that removes what it can.
struct Pass<'a> {
    top: BorrowedFd<'a>,
    /// The device number of the tree's file system.
    device: u64,
    until: Option<Instant>,
    /// Whether anything was removed or moved up.
    progress: bool,
    /// Why the first remaining entry could not be removed.
    left: Option<Errno>,
}

/// A folder that is being emptied.
struct Level {
    folder: Dir,
    /// The folder's name in the level above; the top has none.
    name: CString,
}

impl Pass<'_> {
    fn run(&mut self) -> io::Result<()> {
        let top = openat(self.top, c".", FOLDER, Mode::empty())?;
        let mut levels = vec![Level {
            folder: Dir::new(top)?,
            name: CString::default(),
        }];
        while let Some(level) = levels.last_mut() {
            if self.until.is_some_and(|until| Instant::now() >= until) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let entry = match level.folder.read() {
                Some(Ok(entry)) => entry,
                end => {
                    if let Some(Err(error)) = end {
                        self.left.get_or_insert(error);
                    }
                    let done = levels.pop();
                    if let (Some(done), Some(above)) = (done, levels.last()) {
                        let removed = unlinkat(above.folder.fd()?, &done.name, AtFlags::REMOVEDIR);
                        self.note(removed);
                    }
                    continue;
                }
            };
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let is_folder = matches!(entry.file_type(), FileType::Directory | FileType::Unknown);
            let deep = levels.len() >= OPEN;
            if let Some(level) = levels.last()
                && let Some(folder) = self.take(level.folder.fd()?, name, is_folder, deep)
            {
                levels.push(Level {
                    folder: Dir::new(folder)?,
                    name: name.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Removes an entry. If it is a folder that must be emptied first, returns the folder.
    fn take(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CStr,
        is_folder: bool,
        deep: bool,
    ) -> Option<OwnedFd> {
        if !is_folder {
            match unlinkat(parent, name, AtFlags::empty()) {
                // The entry has become a folder since it was listed.
                Err(Errno::ISDIR | Errno::PERM) => {}
                removed => {
                    self.note(removed);
                    return None;
                }
            }
        }
        match unlinkat(parent, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(Errno::NOTDIR) => {
                let removed = unlinkat(parent, name, AtFlags::empty());
                self.note(removed);
                return None;
            }
            removed => {
                self.note(removed);
                return None;
            }
        }
        match self.enter(parent, name) {
            Ok(_) if deep => {
                let up = CString::new(format!(".knoc-up-{:016x}", rand::random::<u64>()));
                let moved = renameat(parent, name, self.top, up.unwrap_or_default());
                self.note(moved);
                None
            }
            Ok(folder) => Some(folder),
            Err(error) => {
                self.note(Err(error));
                None
            }
        }
    }

    fn enter(&self, parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
        let folder = open_folder(parent, name)?;
        if fstat(&folder)?.st_dev == self.device {
            Ok(folder)
        } else {
            Err(Errno::XDEV)
        }
    }

    fn note(&mut self, done: Result<(), Errno>) {
        match done {
            Ok(()) => self.progress = true,
            Err(Errno::NOENT) => {}
            Err(error) => {
                self.left.get_or_insert(error);
            }
        }
    }
}

/// Opens a folder, and gives it all permissions of its owner if they are missing.
fn open_folder(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let folder = match openat(parent, name, FOLDER, Mode::empty()) {
        Err(Errno::ACCESS) => {
            let path = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let closed = openat(parent, name, path, Mode::empty())?;
            // This is the only way to change the mode of a file that was opened with `O_PATH`.
            chmod(format!("/proc/self/fd/{}", closed.as_raw_fd()), RIGHTS)?;
            openat(&closed, c".", FOLDER, Mode::empty())?
        }
        folder => folder?,
    };
    if !Mode::from_raw_mode(fstat(&folder)?.st_mode).contains(RIGHTS) {
        // A folder of another user may still be writable for us.
        fchmod(&folder, RIGHTS).ok();
    }
    Ok(folder)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of the test's own")]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
        time::Duration,
    };

    use rustix::fs::mkdirat;

    use super::*;

    /// Creates nested folders below `top`, `depth` levels deep.
    fn nest(top: &Path, depth: usize) {
        let mut at = openat(CWD, top, FOLDER, Mode::empty()).unwrap();
        for _ in 0..depth {
            mkdirat(&at, c"d", RIGHTS).unwrap();
            at = openat(&at, c"d", FOLDER, Mode::empty()).unwrap();
        }
        openat(&at, c"file", OFlags::CREATE | OFlags::WRONLY, RIGHTS).unwrap();
    }

    /// Runs `work` with so little stack that a recursion over thousands of folders would abort the
    /// process.
    fn with_little_stack(work: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            let builder = std::thread::Builder::new().stack_size(128 << 10);
            builder
                .spawn_scoped(scope, work)
                .unwrap()
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
    }

    #[test]
    fn a_tree_deeper_than_any_path_and_any_stack_is_removed() {
        let base = tempfile::tempdir().unwrap();
        let tree = base.path().join("tree");
        fs::create_dir_all(tree.join("beside/x")).unwrap();
        nest(&tree, 15_000);
        nest(&tree.join("beside"), 300);
        with_little_stack(|| remove(&tree).unwrap());
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_of_very_many_entries_is_removed() {
        let base = tempfile::tempdir().unwrap();
        let tree = base.path().join("tree");
        for folder in ["a", "b/c"] {
            let folder = tree.join(folder);
            fs::create_dir_all(&folder).unwrap();
            for n in 0..20_000 {
                if n % 4 == 0 {
                    fs::create_dir(folder.join(n.to_string())).unwrap();
                } else {
                    symlink("/", folder.join(n.to_string())).unwrap();
                }
            }
        }
        with_little_stack(|| remove(&tree).unwrap());
        assert!(!tree.exists());
    }

    /// A folder without its owner's permissions cannot be emptied before they are set. (Root does
    /// not need them.)
    #[test]
    fn folders_that_are_closed_to_their_owner_are_removed() {
        let base = tempfile::tempdir().unwrap();
        let tree = base.path().join("tree");
        for mode in [0o000, 0o100, 0o200, 0o400, 0o500] {
            let outer = tree.join(format!("{mode:o}"));
            let inner = outer.join("inner");
            fs::create_dir_all(inner.join("empty")).unwrap();
            fs::write(inner.join("file"), "").unwrap();
            fs::write(outer.join("file"), "").unwrap();
            for folder in [inner.join("empty"), inner, outer] {
                fs::set_permissions(folder, fs::Permissions::from_mode(mode)).unwrap();
            }
        }
        fs::set_permissions(&tree, fs::Permissions::from_mode(0o000)).unwrap();
        remove(&tree).unwrap();
        assert!(!tree.exists());
    }

    #[test]
    fn no_link_is_followed_and_all_other_files_are_removed() {
        let base = tempfile::tempdir().unwrap();
        let home = base.path().join("home");
        fs::create_dir(&home).unwrap();
        fs::write(home.join("key"), "secret").unwrap();
        let tree = base.path().join("tree");
        fs::create_dir(&tree).unwrap();
        symlink(&home, tree.join("out")).unwrap();
        nix::unistd::mkfifo(&tree.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        drop(std::os::unix::net::UnixListener::bind(tree.join("sock")).unwrap());
        remove(&tree).unwrap();
        let link = base.path().join("link");
        symlink(&home, &link).unwrap();
        remove(&link).unwrap();
        remove(&link).unwrap();
        remove(&base.path().join("none/below")).unwrap();
        let left: Vec<_> = fs::read_dir(base.path()).unwrap().collect();
        assert_eq!(left.len(), 1);
        assert_eq!(fs::read_to_string(home.join("key")).unwrap(), "secret");
    }

    #[test]
    fn a_removal_that_takes_too_long_is_given_up_and_another_goes_on() {
        let base = tempfile::tempdir().unwrap();
        let tree = base.path().join("tree");
        fs::create_dir(&tree).unwrap();
        nest(&tree, 2_000);
        let now = Instant::now();
        let error = remove_until(&tree, Some(now)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(tree.exists());
        empty_until(&tree, Some(now + Duration::from_mins(2))).unwrap();
        assert_eq!(fs::read_dir(&tree).unwrap().count(), 0);
    }
}
