//! Opens a path of the compute node that the site lets pods mount (`hostPath` volumes and claims of such paths), checks its
//! type, and creates it if its type says so and if it may be written there.
//!
//! The site's prefix is trusted: links in it are followed. Below it the walk must stay below it, and it never enters what is
//! guarded. The place that was reached is judged again, by its path and by its inode, since links and other mounts may lead
//! from an allowed name to a guarded folder.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use knoc_contract::{
    host_paths::{HostPaths, Refusal},
    walk::{self, FileKey, Found, WalkError},
};
use knoc_proto::pb;
use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, openat, stat, statat},
    io::Errno,
};
use serde::{Deserialize, Serialize};

/// The mode of a new file.
const FILE: Mode = Mode::from_raw_mode(0o644);

/// A path of the compute node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostSource {
    /// The absolute path, as the pod names it.
    pub path: PathBuf,
    /// What of it is mounted, relative to it; empty for all of it.
    pub sub_path: PathBuf,
    pub kind: Kind,
    /// Whether the container may write.
    pub writes: bool,
    /// What the site lets pods mount.
    pub allowed: HostPaths,
}

/// What the path must be: the `type` of a `hostPath`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// Anything. A missing path becomes a folder, as with other container runtimes.
    Any,
    FolderOrCreate,
    Folder,
    FileOrCreate,
    File,
    Socket,
    CharacterDevice,
    BlockDevice,
}

impl From<pb::HostPathType> for Kind {
    fn from(kind: pb::HostPathType) -> Self {
        match kind {
            pb::HostPathType::Unspecified => Self::Any,
            pb::HostPathType::DirectoryOrCreate => Self::FolderOrCreate,
            pb::HostPathType::Directory => Self::Folder,
            pb::HostPathType::FileOrCreate => Self::FileOrCreate,
            pb::HostPathType::File => Self::File,
            pb::HostPathType::Socket => Self::Socket,
            pb::HostPathType::CharDevice => Self::CharacterDevice,
            pb::HostPathType::BlockDevice => Self::BlockDevice,
        }
    }
}

/// Why a host path cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Walk(#[from] WalkError),
    #[error("hostPath {0:?} doesn't exist")]
    Missing(PathBuf),
    #[error("hostPath type check failed: {path:?} is not a {wanted}, it's a {is}")]
    Type {
        path: PathBuf,
        wanted: &'static str,
        is: &'static str,
    },
    #[error("create {path:?}")]
    Create {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("resolve {path:?}, which the site file names")]
    Prefix {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl HostError {
    pub(crate) fn errno(&self) -> i32 {
        match self {
            Self::Walk(error) => error.errno(),
            Self::Create { source, .. } | Self::Prefix { source, .. } => {
                source.raw_os_error().unwrap_or_default()
            }
            Self::Missing(_) => Errno::NOENT.raw_os_error(),
            Self::Refused(_) | Self::Type { .. } => 0,
        }
    }
}

impl HostSource {
    /// Opens what is to be mounted.
    pub(crate) fn open(&self) -> Result<Found, HostError> {
        let prefix = self.allowed.judge(&self.path, self.writes)?;
        let root = fs::canonicalize(&prefix.path).map_err(|source| HostError::Prefix {
            path: prefix.path.clone(),
            source,
        })?;
        // The prefix covers the path.
        let rest = self.path.strip_prefix(&prefix.path).unwrap_or(&self.path);
        let guard = Guard::of(&self.allowed);
        guard.here.judge(&root.join(rest), self.writes)?;
        let found = self.volume(&root, rest, prefix.writable, &guard)?;
        self.check_type(&found)?;
        let found = if self.sub_path.as_os_str().is_empty() {
            found
        } else {
            guard.walk(&found, &self.sub_path, self.writes)?
        };
        guard.judge(&found, self.writes)?;
        Ok(found)
    }

    fn volume(
        &self,
        root: &Path,
        rest: &Path,
        writable: bool,
        guard: &Guard,
    ) -> Result<Found, HostError> {
        if rest.as_os_str().is_empty() {
            return Ok(walk::own(root)?);
        }
        let base = walk::own(root)?;
        let folders = writable && matches!(self.kind, Kind::Any | Kind::FolderOrCreate);
        if writable && self.kind == Kind::FileOrCreate {
            self.create_file(&base, rest, guard)?;
        }
        match guard.walk(&base, rest, folders) {
            Err(error) if error.errno() == Errno::NOENT.raw_os_error() => {
                Err(HostError::Missing(self.path.clone()))
            }
            other => Ok(other?),
        }
    }

    /// Creates an empty file, unless something is there. Its folder must exist.
    fn create_file(&self, base: &Found, rest: &Path, guard: &Guard) -> Result<(), HostError> {
        let (Some(parent), Some(name)) = (rest.parent(), rest.file_name()) else {
            return Ok(());
        };
        let parent = guard.walk(base, parent, false)?;
        let path = parent.path.join(name);
        if statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            return Ok(());
        }
        guard.here.judge(&path, true)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        match openat(&parent.fd, name, flags, FILE) {
            Ok(_) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(HostError::Create {
                path: self.path.clone(),
                source: errno.into(),
            }),
        }
    }

    fn check_type(&self, found: &Found) -> Result<(), HostError> {
        let (wanted, what) = match self.kind {
            Kind::Any => return Ok(()),
            Kind::Folder | Kind::FolderOrCreate => (FileType::Directory, "directory"),
            Kind::File | Kind::FileOrCreate => (FileType::RegularFile, "file"),
            Kind::Socket => (FileType::Socket, "socket file"),
            Kind::CharacterDevice => (FileType::CharacterDevice, "character device"),
            Kind::BlockDevice => (FileType::BlockDevice, "block device"),
        };
        let is = FileType::from_raw_mode(found.stat.st_mode);
        if is == wanted {
            return Ok(());
        }
        Err(HostError::Type {
            path: self.path.clone(),
            wanted: what,
            is: match is {
                FileType::Directory => "Directory",
                FileType::RegularFile => "File",
                FileType::Socket => "Socket",
                FileType::CharacterDevice => "CharDevice",
                FileType::BlockDevice => "BlockDevice",
                FileType::Symlink | FileType::Fifo | FileType::Unknown => "file of another type",
            },
        })
    }
}

/// What is guarded, as it is on this node.
struct Guard {
    /// The policy with all links resolved.
    here: HostPaths,
    /// The guarded files and folders.
    within: Vec<FileKey>,
    /// The folders that contain them.
    above: Vec<FileKey>,
}

impl Guard {
    fn of(allowed: &HostPaths) -> Self {
        let mut here = allowed.clone();
        for prefix in &mut here.prefixes {
            prefix.path = resolved(&prefix.path);
        }
        here.home = here.home.as_deref().map(resolved);
        // What does not exist on this node may appear later, so its name stays guarded.
        let real: Vec<PathBuf> = allowed.guarded.iter().map(|path| resolved(path)).collect();
        here.guarded.extend(real.iter().cloned());
        let keys = |paths: &mut dyn Iterator<Item = &Path>| -> Vec<FileKey> {
            paths.filter_map(key).collect()
        };
        let within = keys(&mut real.iter().map(PathBuf::as_path));
        let above = keys(&mut real.iter().flat_map(|path| path.ancestors().skip(1)));
        Self {
            here,
            within,
            above,
        }
    }

    /// Follows `path` below `base`, never into what is guarded. With `make`, missing folders are created where a container
    /// may write: a link may have led to a place where it may not.
    fn walk(&self, base: &Found, path: &Path, make: bool) -> Result<Found, WalkError> {
        let judge = |place: &Path| self.here.judge(place, true).map(drop);
        let make: Option<walk::Judge<'_>> = if make { Some(&judge) } else { None };
        walk::below(base, path, make, &self.within)
    }

    fn judge(&self, found: &Found, writes: bool) -> Result<(), HostError> {
        self.here.judge(&found.path, writes)?;
        let key = FileKey::of(&found.stat);
        if self.within.contains(&key) || self.above.contains(&key) {
            let path = found.path.clone();
            return Err(WalkError::Guarded(path).into());
        }
        Ok(())
    }
}

/// The path without links, as far as it exists.
fn resolved(path: &Path) -> PathBuf {
    let mut missing = Vec::new();
    for ancestor in path.ancestors() {
        if let Ok(mut real) = fs::canonicalize(ancestor) {
            real.extend(missing.iter().rev());
            return real;
        }
        missing.extend(ancestor.file_name());
    }
    path.to_owned()
}

fn key(path: &Path) -> Option<FileKey> {
    stat(path).ok().map(|stat| FileKey::of(&stat))
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of the test's own")]
mod tests {
    use std::os::unix::{fs::PermissionsExt as _, fs::symlink, net::UnixListener};

    use knoc_contract::host_paths::Prefix;

    use super::*;

    struct World {
        _folder: tempfile::TempDir,
        root: PathBuf,
        allowed: HostPaths,
    }

    /// `real/data` is read-only, `real/scratch` is writable and named through a link, and `home/.ssh` is guarded.
    fn world() -> World {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        for name in ["real/data/set", "real/scratch/u", "home/.ssh", "home/bin"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::write(root.join("real/data/set/file"), "data").unwrap();
        fs::write(root.join("home/.ssh/id"), "key").unwrap();
        symlink(root.join("real/scratch"), root.join("scratch")).unwrap();
        let prefix = |name: &str, writable| Prefix {
            path: root.join(name),
            writable,
        };
        let allowed = HostPaths {
            prefixes: vec![
                prefix("real/data", false),
                prefix("scratch", true),
                prefix("home", false),
            ],
            guarded: vec![root.join("home/.ssh"), root.join("real/scratch/own/state")],
            home: Some(root.join("home")),
        };
        World {
            _folder: folder,
            root,
            allowed,
        }
    }

    impl World {
        fn source(&self, path: &str, kind: Kind, writes: bool) -> HostSource {
            HostSource {
                path: self.root.join(path),
                sub_path: PathBuf::new(),
                kind,
                writes,
                allowed: self.allowed.clone(),
            }
        }

        /// The path below the root that this leads to, or the error.
        fn open(&self, path: &str, kind: Kind, writes: bool) -> Result<String, String> {
            let found = self.source(path, kind, writes).open();
            let found = found.map_err(|error| knoc_proto::error::chain(&error))?;
            let below = found.path.strip_prefix(&self.root);
            let below = below.map_err(|error| error.to_string())?;
            Ok(below.display().to_string())
        }
    }

    fn refused(result: Result<String, String>, why: &str) {
        let error = result.unwrap_err();
        assert!(error.contains(why), "{error}");
    }

    #[test]
    fn each_type_is_checked_and_created_only_if_it_says_so() {
        let world = world();
        let at = |name: &str| world.root.join("real/scratch").join(name);
        let _socket = UnixListener::bind(at("socket")).unwrap();
        fs::write(at("file"), "").unwrap();
        for (kind, right) in [
            (Kind::Folder, "u"),
            (Kind::File, "file"),
            (Kind::Socket, "socket"),
        ] {
            for name in ["u", "file", "socket"] {
                let opened = world.open(&format!("scratch/{name}"), kind, true);
                if name == right {
                    assert_eq!(opened, Ok(format!("real/scratch/{name}")));
                } else {
                    refused(opened, "hostPath type check failed: ");
                }
            }
            refused(world.open("scratch/none", kind, true), "doesn't exist");
        }
        refused(
            world.open("scratch/file", Kind::FolderOrCreate, true),
            "is not a directory, it's a File",
        );
        assert!(!at("none").exists());
        let created = world.open("scratch/new/er", Kind::FolderOrCreate, true);
        assert_eq!(created.as_deref(), Ok("real/scratch/new/er"));
        let mode = fs::metadata(at("new/er")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777 & !0o755, 0, "{mode:o}");
        assert!(world.open("scratch/any", Kind::Any, true).is_ok() && at("any").is_dir());
        assert!(
            world
                .open("scratch/new/f", Kind::FileOrCreate, true)
                .is_ok()
        );
        assert!(at("new/f").is_file());
        // As on any node, only the file is created, not its folder.
        world
            .open("scratch/no/f", Kind::FileOrCreate, true)
            .unwrap_err();
        assert!(!at("no").exists());
    }

    #[test]
    fn nothing_is_created_below_a_read_only_prefix() {
        let world = world();
        for kind in [Kind::Any, Kind::FolderOrCreate, Kind::FileOrCreate] {
            refused(world.open("real/data/new", kind, false), "doesn't exist");
        }
        refused(world.open("real/data/set", Kind::Any, true), "read-only");
        let mut source = world.source("real/data/set", Kind::Any, false);
        source.sub_path = "new".into();
        source.open().unwrap_err();
        assert_eq!(
            fs::read_dir(world.root.join("real/data")).unwrap().count(),
            1
        );
        source.sub_path = "file".into();
        assert!(!source.open().unwrap().is_folder());
    }

    #[test]
    fn links_stay_below_the_prefix() {
        let world = world();
        let at = |name: &str| world.root.join("real/scratch").join(name);
        symlink("u", at("within")).unwrap();
        symlink("../data", at("out")).unwrap();
        symlink(world.root.join("real/data"), at("absolute")).unwrap();
        symlink("../../home", at("home")).unwrap();
        assert_eq!(
            world.open("scratch/within/x", Kind::FolderOrCreate, true),
            Ok("real/scratch/u/x".to_owned())
        );
        for name in ["out", "out/set", "absolute", "home/bin", "home/new"] {
            refused(
                world.open(&format!("scratch/{name}"), Kind::Any, true),
                "leads out",
            );
        }
        let mut source = world.source("scratch/u", Kind::Any, true);
        symlink("../../data", at("u/out")).unwrap();
        source.sub_path = "out/set".into();
        let error = source.open().unwrap_err();
        assert!(error.to_string().contains("leads out"), "{error}");
    }

    #[test]
    fn no_name_leads_to_what_is_guarded() {
        let mut world = world();
        symlink(".ssh", world.root.join("home/keys")).unwrap();
        for path in ["home/keys", "home/keys/id", "home/.ssh", "home"] {
            refused(world.open(path, Kind::Any, false), "never mounted");
        }
        assert_eq!(
            world.open("home/bin", Kind::Any, false),
            Ok("home/bin".into())
        );
        // It does not exist yet, and no pod can create it either.
        refused(
            world.open("scratch/own/state/x", Kind::Any, true),
            "never mounted",
        );
        assert!(!world.root.join("real/scratch/own/state").exists());
        // The folder is known by its inode, whatever its name is.
        let key = world.root.join("home/.ssh/id");
        fs::hard_link(&key, world.root.join("home/bin/id")).unwrap();
        world.allowed.guarded.push(key);
        refused(world.open("home/bin/id", Kind::Any, false), "never mounted");
    }

    #[test]
    fn a_link_into_a_read_only_prefix_gives_no_right_to_write() {
        let mut world = world();
        let inner = world.root.join("real/scratch/ro");
        fs::create_dir(&inner).unwrap();
        symlink("ro", world.root.join("real/scratch/rw")).unwrap();
        world.allowed.prefixes.push(Prefix {
            path: inner,
            writable: false,
        });
        refused(world.open("scratch/rw", Kind::Any, true), "read-only");
        assert!(world.open("scratch/rw", Kind::Any, false).is_ok());
        // Nor to create anything, even if the container would not write.
        for kind in [Kind::Any, Kind::FolderOrCreate, Kind::FileOrCreate] {
            refused(world.open("scratch/rw/new", kind, false), "read-only");
            refused(world.open("scratch/rw/new", kind, true), "read-only");
        }
        let mut source = world.source("scratch/rw", Kind::Any, false);
        source.sub_path = "new".into();
        source.open().unwrap_err();
        let inner = fs::read_dir(world.root.join("real/scratch/ro"));
        assert_eq!(inner.unwrap().count(), 0);
    }

    #[test]
    fn nothing_is_created_behind_a_link_to_what_is_guarded() {
        let mut world = world();
        let outer = world.root.join("real/scratch/own");
        fs::create_dir(&outer).unwrap();
        symlink("own", world.root.join("real/scratch/link")).unwrap();
        world.allowed.guarded.push(outer.join("keys"));
        refused(
            world.open("scratch/link/keys/x", Kind::FolderOrCreate, true),
            "never mounted",
        );
        refused(
            world.open("scratch/link/keys", Kind::FileOrCreate, true),
            "never mounted",
        );
        assert_eq!(fs::read_dir(&outer).unwrap().count(), 0);
    }

    #[test]
    fn what_is_guarded_by_a_name_with_links_is_guarded_before_it_exists() {
        let mut world = world();
        world.allowed.guarded = vec![world.root.join("scratch/own/state")];
        world.allowed.prefixes.push(Prefix {
            path: world.root.join("real/scratch"),
            writable: true,
        });
        for kind in [Kind::Any, Kind::FolderOrCreate] {
            refused(
                world.open("real/scratch/own/state/x", kind, true),
                "never mounted",
            );
        }
        assert!(!world.root.join("real/scratch/own").exists());
    }

    #[test]
    fn a_folder_that_contains_what_is_guarded_is_known_by_its_inode() {
        let world = world();
        let mut guard = Guard::of(&world.allowed);
        // Another mount may show it by another name.
        guard.here.guarded.clear();
        let home = walk::own(&world.root.join("home")).unwrap();
        let refused = guard.judge(&home, false).unwrap_err();
        assert!(
            matches!(refused, HostError::Walk(WalkError::Guarded(_))),
            "{refused}"
        );
        let bin = walk::own(&world.root.join("home/bin")).unwrap();
        guard.judge(&bin, false).unwrap();
    }
}
