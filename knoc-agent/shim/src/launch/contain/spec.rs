//! What the shim sends to [`super`]: the runtime's arguments, and the mounts to make before the runtime is executed.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
};

use knoc_contract::{
    host::node_name,
    image_file::FileId,
    walk::{self, Found, WalkError},
};
use knoc_proto::pb;
use serde::{Deserialize, Serialize};

use super::host::{HostError, HostSource};
use crate::{
    launch::{beside::Beside, ids::Ids},
    nofollow,
};

/// The message to the helper. Both ends are the same binary, so it needs no version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContainSpec {
    /// The runtime's arguments, program first.
    pub argv: Vec<OsString>,
    /// The names that `/etc/subuid` may have for this user.
    pub users: Vec<String>,
    /// Whether the container's programs have root's rights inside: `--fakeroot`.
    pub root: bool,
    /// The ids that are mapped in the pod's user namespace, if the pod has a network of its own. The descriptors of the
    /// user namespace, of the network namespace and, if it has volumes in memory with a size, of the mount namespace come with
    /// this message.
    pub network: Option<Ids>,
    /// In the order of mounting.
    pub mounts: Vec<MountSpec>,
    /// The process whose PID namespace the container shares. The helper enters that process's user namespace instead of one of
    /// its own.
    pub beside: Option<Beside>,
}

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MountSpec {
    /// What error messages call it: `volume "data", path "a/b"`.
    pub what: String,
    /// What is mounted.
    pub source: Source,
    /// The path that the helper binds the source to, and from which the runtime mounts it. It does not exist yet, and no
    /// container sees it.
    pub staging: PathBuf,
    /// The mount point in the container, if it lies in another mount.
    pub point: Option<Point>,
    /// Whether the mount is read-only.
    pub read_only: bool,
    /// The path of the termination message below the source, if it lies there. The helper creates the file and sends the
    /// source's descriptor to the shim.
    pub message: Option<PathBuf>,
}

/// A mount point that lies in another mount. It is created if it is missing, as a folder or a file, as its source is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Point {
    /// The mount that it lies in.
    pub base: PointBase,
    /// Its path in that mount.
    pub rest: PathBuf,
}

/// What a mount point lies in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum PointBase {
    /// A folder of the shim on the host.
    Folder(PathBuf),
    /// The source of an earlier mount, by its index.
    Mount(usize),
}

impl Point {
    /// Creates the mount point. `opened` are the sources of the earlier mounts.
    pub(crate) fn make(&self, folder: bool, opened: &[Found]) -> io::Result<()> {
        let own;
        let base = match &self.base {
            PointBase::Folder(path) => {
                own = walk::own(path).map_err(io::Error::other)?;
                &own
            }
            PointBase::Mount(index) => opened.get(*index).ok_or(io::ErrorKind::NotFound)?,
        };
        if folder {
            nofollow::make_folder_in(&base.fd, &self.rest)
        } else {
            nofollow::touch_in(&base.fd, &self.rest)
        }
    }
}

/// The source of a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Source {
    /// `path` inside the shim's folder `root`. Links in it cannot lead out of `root`.
    Inside {
        /// The folder's canonical path.
        root: PathBuf,
        /// Relative to `root`; empty for `root` itself.
        path: PathBuf,
        /// Whether missing folders are created.
        make: bool,
    },
    /// An image file or sandbox.
    Image {
        /// The image's absolute path.
        path: PathBuf,
        /// What the agent found there, if others might have changed it since.
        expected: Option<FileId>,
    },
    /// A file or folder that nobody else can reach.
    Own(PathBuf),
    /// A path of the node that the site lets pods mount.
    Host(HostSource),
}

/// Why a source cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    #[error(transparent)]
    Walk(#[from] WalkError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(
        "it was replaced or changed after the pod was accepted ({0}); delete the pod and create it again to run what \
         is there now"
    )]
    Changed(&'static str),
}

impl SourceError {
    pub(crate) fn errno(&self) -> i32 {
        match self {
            Self::Walk(error) => error.errno(),
            Self::Host(error) => error.errno(),
            Self::Changed(_) => 0,
        }
    }
}

impl Source {
    /// This image.
    pub(crate) fn of_image(image: &pb::ResolvedImage) -> Self {
        let host = node_name();
        let file = image.file.as_ref();
        Self::Image {
            path: image.path.clone().into(),
            expected: file.map(|file| FileId::from_job(file, &host)),
        }
    }

    /// Whether it is an image in one file, which the runtime mounts as a folder.
    pub(crate) fn is_image_file(&self) -> bool {
        match self {
            Self::Image { expected, .. } => !expected.as_ref().is_some_and(|file| file.folder),
            Self::Inside { .. } | Self::Own(_) | Self::Host(_) => false,
        }
    }

    /// Whether it is a folder in the container. `found` is what it led to.
    pub(crate) fn is_folder(&self, found: &Found) -> bool {
        found.is_folder() || self.is_image_file()
    }

    /// Whether the node may have mounted other file systems below it. `found` is what it led to.
    pub(crate) fn is_of_node(&self, found: &Found) -> bool {
        match self {
            Self::Host(_) => true,
            // A sandbox is a folder of the site.
            Self::Image { .. } => found.is_folder(),
            Self::Inside { .. } | Self::Own(_) => false,
        }
    }

    /// Opens what is to be mounted.
    pub(crate) fn open(&self) -> Result<Found, SourceError> {
        match self {
            Self::Inside { root, path, make } => Ok(walk::inside(root, path, *make)?),
            Self::Own(path) => Ok(walk::own(path)?),
            Self::Host(host) => Ok(host.open()?),
            Self::Image { path, expected } => open_image(path, expected.as_ref()),
        }
    }
}

fn open_image(path: &Path, expected: Option<&FileId>) -> Result<Found, SourceError> {
    let Some(expected) = expected else {
        // The image lies in the agent's own cache.
        return Ok(walk::own(path)?);
    };
    // The agent has checked who owns the folders above. Here the file must be the one that the agent saw, whoever owns it.
    let found = walk::owned(path, true)?;
    let here = FileId::of(&found);
    match expected.differs(&here) {
        Some(what) => Err(SourceError::Changed(what)),
        None => Ok(found),
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of the test's own")]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn an_image_that_was_swapped_after_staging_is_not_opened() {
        let root = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(root.path()).unwrap();
        let (image, other) = (root.join("a.sif"), root.join("private.sif"));
        fs::write(&image, "image").unwrap();
        fs::write(&other, "other").unwrap();
        let staged = FileId::of(&walk::owned(&image, false).unwrap());
        let open = |expected: &FileId| open_image(&image, Some(expected)).map(|found| found.path);
        assert_eq!(open(&staged).unwrap(), image);
        // On another host the device is another, and is not known there.
        let mut elsewhere = staged.clone();
        elsewhere.device = Some(1);
        assert!(open(&elsewhere).is_err());
        elsewhere.device = None;
        open(&elsewhere).unwrap();
        let swaps: [(&str, &dyn Fn()); 3] = [
            ("a link", &|| {
                fs::rename(&image, root.join("aside")).unwrap();
                symlink(&other, &image).unwrap();
            }),
            ("another file", &|| {
                fs::remove_file(&image).unwrap();
                fs::write(&image, "ima9e").unwrap();
            }),
            ("other bytes", &|| fs::write(&image, "more bytes").unwrap()),
        ];
        for (what, swap) in swaps {
            swap();
            let error = open(&staged).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("create it again"), "{what}: {text}");
        }
        fs::remove_file(&image).unwrap();
        assert!(matches!(
            open(&staged).unwrap_err(),
            SourceError::Walk(WalkError::Io { .. })
        ));
    }

    #[test]
    fn what_the_node_may_have_mounted_below_a_source_is_read_only_with_it() {
        let root = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(root.path()).unwrap();
        let (sandbox, file) = (root.join("box"), root.join("a.sif"));
        fs::create_dir(&sandbox).unwrap();
        fs::write(&file, "image").unwrap();
        let of_node = |source: &Source| source.is_of_node(&source.open().unwrap());
        let image = |path: &Path| Source::Image {
            path: path.to_owned(),
            expected: None,
        };
        assert!(of_node(&image(&sandbox)));
        assert!(!of_node(&image(&file)));
        assert!(!of_node(&Source::Own(sandbox)));
    }

    #[test]
    fn a_sandbox_may_change_inside_but_not_be_another() {
        let root = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(root.path()).unwrap();
        let sandbox = root.join("box");
        fs::create_dir(&sandbox).unwrap();
        let staged = FileId::of(&walk::owned(&sandbox, false).unwrap());
        fs::write(sandbox.join("new"), "").unwrap();
        open_image(&sandbox, Some(&staged)).unwrap();
        fs::rename(&sandbox, root.join("aside")).unwrap();
        fs::create_dir(&sandbox).unwrap();
        open_image(&sandbox, Some(&staged)).unwrap_err();
    }
}
