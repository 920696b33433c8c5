//! Resolves a path component by component, and returns a descriptor of the file that was checked.
//!
//! A path that is checked by name and then used by name may lead elsewhere at the second time,
//! because a container or another user may replace any part of it in between. Therefore each
//! component is opened relative to the descriptor of the previous one (`openat`, `O_NOFOLLOW`), a
//! symbolic link is read through its own descriptor, and the caller uses the last descriptor, never
//! the name. `openat2` could do a part of this, but needs Linux 5.6 and does not check owners. All
//! functions block on file I/O.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::ffi::OsStringExt as _,
    },
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{FileType, Mode, OFlags, Stat, chmod, fstat, mkdirat, open, openat, readlinkat},
    io::Errno,
};

use crate::host_paths::Refusal;

/// The maximum number of links that are followed, the same as the kernel's.
const MAX_LINKS: u32 = 40;
/// The maximum depth. Each folder on the way is an open descriptor.
const MAX_DEPTH: usize = 256;
/// The maximum number of components, including those of the links.
const MAX_STEPS: u32 = 4096;

/// The mode of a new folder, before the umask.
const FOLDER: Mode = Mode::from_raw_mode(0o777);
const STICKY: u32 = 0o1000;
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Why a path could not be followed to its end.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// The path, or a link on the way, leads out of the folder that it must stay in.
    #[error("it leads out of its folder at {0:?}")]
    Leaves(PathBuf),
    /// The path has too many links, folders or components.
    #[error("it has too many links or folders (at {0:?})")]
    TooLong(PathBuf),
    /// Another user could replace the file at this component.
    #[error("{path:?} {why}")]
    Untrusted {
        /// The component.
        path: PathBuf,
        /// Which other user, or why.
        why: String,
    },
    /// The path leads to what must not be reached.
    #[error(
        "{0:?} is part of, or contains, what is never mounted because it can hold keys or KNoC's own files"
    )]
    Guarded(PathBuf),
    /// A missing folder must not be created there.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A system call failed.
    #[error("open {path:?}")]
    Io {
        /// How far the path was followed.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

impl WalkError {
    /// The errno of the failed call; 0 if no system call failed.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Io { source, .. } => source.raw_os_error().unwrap_or_default(),
            Self::Leaves(_)
            | Self::TooLong(_)
            | Self::Untrusted { .. }
            | Self::Guarded(_)
            | Self::Refused(_) => 0,
        }
    }
}

/// The file that a path led to.
#[derive(Debug)]
pub struct Found {
    /// The descriptor, opened with `O_PATH`.
    pub fd: OwnedFd,
    /// The file's `fstat(2)`.
    pub stat: Stat,
    /// The path without links, as it was during the walk. It serves messages and programs that
    /// cannot use a descriptor.
    pub path: PathBuf,
}

/// Identifies a file on this host, whatever its name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileKey {
    device: u64,
    inode: u64,
}

impl FileKey {
    /// The file with this `stat(2)`.
    #[must_use]
    pub fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        }
    }
}

impl Found {
    /// Whether it is a folder.
    #[must_use]
    pub fn is_folder(&self) -> bool {
        kind(&self.stat) == FileType::Directory
    }
}

/// Follows `path` inside the folder `root`. Links are followed if they stay inside; an absolute
/// link never does. With `make`, missing folders are created.
pub fn inside(root: &Path, path: &Path, make: bool) -> Result<Found, WalkError> {
    let make = if make { Make::Always } else { Make::Never };
    Walk::begin(root, Rules::Inside { make })?.follow(path)
}

/// Judges the place, by its path without links, at which a missing folder would be created.
pub type Judge<'a> = &'a dyn Fn(&Path) -> Result<(), Refusal>;

/// Like [`inside`], from a folder that is open already, and without ever entering one of `never`. Missing folders are
/// created if `make` is given and lets them be.
pub fn below(
    root: &Found,
    path: &Path,
    make: Option<Judge<'_>>,
    never: &[FileKey],
) -> Result<Found, WalkError> {
    let at = root.path.clone();
    let failed = |source: io::Error| WalkError::Io {
        path: at.clone(),
        source,
    };
    if !root.is_folder() {
        return Err(failed(Errno::NOTDIR.into()));
    }
    let fd = root.fd.try_clone().map_err(failed)?;
    let make = make.map_or(Make::Never, Make::If);
    let mut walk = Walk::from_folder(at, fd, Rules::Inside { make })?;
    walk.never = never.to_vec();
    walk.follow(path)
}

/// Follows the absolute `path`. Each component must belong to root or to this process's user, and
/// nobody else may be able to write it. A folder on the way may be writable if it has the sticky
/// bit, because others cannot replace files in it that are not theirs; a file in it must have no
/// other name. With `shared`, anybody may own and write any component.
pub fn owned(path: &Path, shared: bool) -> Result<Found, WalkError> {
    Walk::begin(Path::new("/"), Rules::Owned { shared, way: false })?.follow(path)
}

/// Like [`owned`], for a folder that is only on the way to the file that is used: the folder itself
/// may have the sticky bit.
pub fn owned_way(path: &Path) -> Result<Found, WalkError> {
    let (shared, way) = (false, true);
    Walk::begin(Path::new("/"), Rules::Owned { shared, way })?.follow(path)
}

/// Opens `path` and follows all links. For paths that only root and this process's user can change.
pub fn own(path: &Path) -> Result<Found, WalkError> {
    let failed = |errno: Errno| WalkError::Io {
        path: path.to_owned(),
        source: errno.into(),
    };
    let fd = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let stat = fstat(&fd).map_err(failed)?;
    let path = path.to_owned();
    Ok(Found { fd, stat, path })
}

/// Whether missing folders are created.
#[derive(Clone, Copy)]
enum Make<'a> {
    Never,
    Always,
    If(Judge<'a>),
}

#[derive(Clone, Copy)]
enum Rules<'a> {
    Inside {
        make: Make<'a>,
    },
    /// The last component is itself on the way to something else.
    Owned {
        shared: bool,
        way: bool,
    },
}

/// What was found at one component.
enum Step {
    Folder(OwnedFd, Stat),
    File(OwnedFd, Stat),
    Link(PathBuf),
}

struct Walk<'a> {
    rules: Rules<'a>,
    root: PathBuf,
    /// The root, then each folder on the way with its name.
    folders: Vec<(OwnedFd, Stat, OsString)>,
    ahead: VecDeque<OsString>,
    /// What is never entered.
    never: Vec<FileKey>,
}

impl<'a> Walk<'a> {
    fn begin(root: &Path, rules: Rules<'a>) -> Result<Self, WalkError> {
        let failed = |errno: Errno| WalkError::Io {
            path: root.to_owned(),
            source: errno.into(),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = open(root, flags, Mode::empty()).map_err(failed)?;
        Self::from_folder(root.to_owned(), fd, rules)
    }

    fn from_folder(root: PathBuf, fd: OwnedFd, rules: Rules<'a>) -> Result<Self, WalkError> {
        let stat = fstat(&fd).map_err(|errno| WalkError::Io {
            path: root.clone(),
            source: errno.into(),
        })?;
        Ok(Self {
            rules,
            root,
            folders: vec![(fd, stat, OsString::new())],
            ahead: VecDeque::new(),
            never: Vec::new(),
        })
    }

    /// The path so far, with one more component.
    fn at(&self, name: &OsStr) -> PathBuf {
        let mut path = self.root.clone();
        path.extend(self.folders.iter().skip(1).map(|(_, _, name)| name));
        if !name.is_empty() {
            path.push(name);
        }
        path
    }

    fn follow(mut self, path: &Path) -> Result<Found, WalkError> {
        self.enqueue(path)?;
        let (mut links, mut steps) = (0, 0);
        while let Some(name) = self.ahead.pop_front() {
            steps += 1;
            if steps > MAX_STEPS || links > MAX_LINKS || self.folders.len() > MAX_DEPTH {
                return Err(WalkError::TooLong(self.at(&name)));
            }
            if name == ".." {
                self.up()?;
                continue;
            }
            match self.step(&name)? {
                Step::Folder(fd, stat) => self.folders.push((fd, stat, name)),
                Step::Link(target) => {
                    links += 1;
                    self.enqueue(&target)?;
                }
                Step::File(fd, stat) => {
                    let path = self.at(&name);
                    if !self.ahead.is_empty() {
                        let source = Errno::NOTDIR.into();
                        return Err(WalkError::Io { path, source });
                    }
                    return Ok(Found { fd, stat, path });
                }
            }
        }
        self.last_folder()
    }

    /// Queues the components that are to be followed next. An absolute path begins at the root
    /// again.
    fn enqueue(&mut self, path: &Path) -> Result<(), WalkError> {
        if path.is_absolute() {
            match self.rules {
                Rules::Inside { .. } => return Err(WalkError::Leaves(path.to_owned())),
                Rules::Owned { .. } => self.folders.truncate(1),
            }
        }
        let mut first = Vec::new();
        for component in path.components() {
            match component {
                Component::Normal(name) => first.push(name.to_owned()),
                Component::ParentDir => first.push("..".into()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
        if first.len() + self.ahead.len() > MAX_STEPS as usize {
            return Err(WalkError::TooLong(path.to_owned()));
        }
        for name in first.into_iter().rev() {
            self.ahead.push_front(name);
        }
        Ok(())
    }

    fn up(&mut self) -> Result<(), WalkError> {
        if self.folders.len() > 1 {
            self.folders.pop();
            return Ok(());
        }
        match self.rules {
            Rules::Inside { .. } => Err(WalkError::Leaves(self.at(OsStr::new("..")))),
            // The parent of the root is the root.
            Rules::Owned { .. } => Ok(()),
        }
    }

    fn step(&self, name: &OsStr) -> Result<Step, WalkError> {
        let failed = |errno: Errno| WalkError::Io {
            path: self.at(name),
            source: errno.into(),
        };
        let fd = match self.open(name) {
            Err(Errno::NOENT) => self.make(name)?,
            opened => opened.map_err(failed)?,
        };
        let stat = fstat(&fd).map_err(failed)?;
        if self.never.contains(&FileKey::of(&stat)) {
            return Err(WalkError::Guarded(self.at(name)));
        }
        let kind = kind(&stat);
        if let Rules::Owned { shared: false, .. } = self.rules {
            // A link has no mode of its own; a folder may have the sticky bit if it is not the end.
            let writable = kind != FileType::Symlink
                && stat.st_mode & WRITABLE_BY_OTHERS != 0
                && !(kind == FileType::Directory && stat.st_mode & STICKY != 0);
            self.trust(name, &stat, writable)?;
            if kind == FileType::RegularFile {
                self.trust_name(name, &stat)?;
            }
        }
        if kind == FileType::Symlink {
            let target = readlinkat(&fd, "", Vec::new()).map_err(failed)?;
            return Ok(Step::Link(OsString::from_vec(target.into_bytes()).into()));
        }
        if kind == FileType::Directory {
            return Ok(Step::Folder(fd, stat));
        }
        Ok(Step::File(fd, stat))
    }

    fn trust(&self, name: &OsStr, stat: &Stat, writable: bool) -> Result<(), WalkError> {
        let own = rustix::process::getuid().as_raw();
        match distrust(stat.st_uid, own, writable.then_some(stat.st_mode)) {
            None => Ok(()),
            Some(why) => Err(WalkError::Untrusted {
                path: self.at(name),
                why,
            }),
        }
    }

    /// Whoever can write a folder can give a name there to a file of another folder, whoever owns the
    /// file, unless the kernel forbids it (`fs.protected_hardlinks`).
    fn trust_name(&self, name: &OsStr, stat: &Stat) -> Result<(), WalkError> {
        let (_, above, _) = self.folders.last().ok_or_else(|| WalkError::Io {
            path: self.at(name),
            source: Errno::BADF.into(),
        })?;
        if stat.st_nlink < 2 || above.st_mode & WRITABLE_BY_OTHERS == 0 {
            return Ok(());
        }
        Err(WalkError::Untrusted {
            path: self.at(name),
            why: "has another name too, and others may have given it this one".to_owned(),
        })
    }

    fn open(&self, name: &OsStr) -> Result<OwnedFd, Errno> {
        let (at, _, _) = self.folders.last().ok_or(Errno::BADF)?;
        let at = at.as_fd();
        // Asking for a folder first makes an automounter mount the file system that belongs there.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(at, name, flags | OFlags::DIRECTORY, Mode::empty()) {
            Err(Errno::NOTDIR | Errno::LOOP) => openat(at, name, flags, Mode::empty()),
            other => other,
        }
    }

    /// Creates a missing folder, if that is wanted and allowed there, and opens it.
    fn make(&self, name: &OsStr) -> Result<OwnedFd, WalkError> {
        let failed = |errno: Errno| WalkError::Io {
            path: self.at(name),
            source: errno.into(),
        };
        match self.rules {
            Rules::Inside { make: Make::Always } => {}
            Rules::Inside {
                make: Make::If(judge),
            } => judge(&self.at(name))?,
            Rules::Inside { make: Make::Never } | Rules::Owned { .. } => {
                return Err(failed(Errno::NOENT));
            }
        }
        let (at, above, _) = self.folders.last().ok_or_else(|| failed(Errno::BADF))?;
        let made = match mkdirat(at.as_fd(), name, FOLDER) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(errno) => return Err(failed(errno)),
        };
        let folder = self.open(name).map_err(failed)?;
        let inherits = matches!(self.rules, Rules::Inside { make: Make::Always });
        if made && inherits && fstat(&folder).is_ok_and(|stat| kind(&stat) == FileType::Directory) {
            // As in a kubelet. If it fails, the folder has the mode of one that a program of the pod creates.
            let rights = Mode::from_raw_mode(above.st_mode & FOLDER.as_raw_mode());
            chmod(format!("/proc/self/fd/{}", folder.as_raw_fd()), rights).ok();
        }
        Ok(folder)
    }

    /// The walk ends at a folder. The sticky bit does not protect it, because its contents are
    /// used.
    fn last_folder(mut self) -> Result<Found, WalkError> {
        let path = self.at(OsStr::new(""));
        let Some((fd, stat, name)) = self.folders.pop() else {
            return Err(WalkError::Leaves(path));
        };
        if let Rules::Owned { shared: false, way } = self.rules
            && !self.folders.is_empty()
        {
            let protected = way && stat.st_mode & STICKY != 0;
            let writable = stat.st_mode & WRITABLE_BY_OTHERS != 0 && !protected;
            self.trust(&name, &stat, writable)?;
        }
        Ok(Found { fd, stat, path })
    }
}

/// PURE: which other user than root and `own` could replace the file, and why. `mode` is given if
/// others may write it.
fn distrust(owner: u32, own: u32, mode: Option<u32>) -> Option<String> {
    if owner != 0 && owner != own {
        return Some(format!("belongs to user {owner}"));
    }
    mode.map(|mode| format!("may be written by others (mode {:03o})", mode & 0o777))
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of the test's own")]
mod tests;
