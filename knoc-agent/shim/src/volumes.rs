//! The pod's volumes on the node: `emptyDir`, files of `ConfigMaps`, Secrets and projections, and paths of the node.
//! Functions block on file work.
//!
//! Files have the layout of a kubelet's atomic writer: they lie in a folder for their revision, `..data` is a link to it,
//! and each name is a link through `..data`. A new revision is written into a new folder, then `..data` is replaced by a
//! rename, so a reader sees either all of the old or all of the new revision.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use knoc_contract::{
    host_paths::{HostPaths, Prefix},
    jobdir::atomic::FileError,
    tree,
};
use knoc_proto::{
    paths::{self, PathError},
    pb::{self, volume::Source},
    pod::PodValues,
};

use super::{
    scratch::{NoMemory, Scratch, ScratchError},
    sif::{self, Part, SifError},
};
use crate::launch::{
    contain::{
        host::{HostSource, Kind},
        spec::{self, Point},
    },
    network::protocol::Tmpfs,
};

/// The link to the folder of the current revision.
const DATA: &str = "..data";

/// Why a volume could not be given to a container.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    #[error("volume {volume:?}")]
    File {
        volume: String,
        #[source]
        source: FileError,
    },
    /// The node has no usable file system in memory.
    #[error("volume {volume:?}")]
    NoMemory {
        volume: String,
        #[source]
        source: NoMemory,
    },
    /// The pod has no such volume, or this version does not know its source.
    #[error("the pod has no volume {0:?} with a known source")]
    Unknown(String),
    /// The site file was changed between the pod's admission and the submission of its job.
    #[error("the site file no longer maps the volume {0:?} to a path of its nodes")]
    Unmapped(String),
    #[error("volume {volume:?}")]
    Image {
        volume: String,
        #[source]
        source: SifError,
    },
    #[error("volume {volume:?}: the path {path:?} is not valid")]
    Malformed {
        volume: String,
        path: String,
        #[source]
        source: PathError,
    },
}

impl VolumeError {
    fn malformed(volume: &str, path: &str) -> impl FnOnce(PathError) -> Self {
        let (volume, path) = (volume.to_owned(), path.to_owned());
        move |source| Self::Malformed {
            volume,
            path,
            source,
        }
    }
}

/// One mount of a container: a volume, or a file of the shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mounted {
    /// What error messages call it.
    pub(crate) what: String,
    pub(crate) source: spec::Source,
    /// The path in the container.
    pub(crate) target: PathBuf,
    pub(crate) read_only: bool,
    /// Whether a container can change what the source's path leads to, so that it must be mounted by descriptor.
    pub(crate) needs_descriptor: bool,
    /// If the source is an image file: the part of it whose files are mounted.
    pub(crate) image: Option<Part>,
    /// If only a folder of an image is mounted: its path there. [`super::inside`] mounts it over the whole of the image.
    pub(crate) folder: Option<PathBuf>,
    /// Where the mount point lies; set by [`super::mount_points`].
    pub(crate) point: Option<Point>,
}

/// A volume with a size limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Limit {
    pub(crate) volume: String,
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
}
/// The variable in which Slurm names the partition of a job.
const PARTITION: &str = "SLURM_JOB_PARTITION";

/// The volumes of one pod.
#[derive(Debug)]
pub(crate) struct Volumes {
    roots: Vec<Root>,
    /// What the site mounts into every container.
    site_binds: Vec<pb::SiteBind>,
    /// The paths of the node that the site lets pods mount.
    host_paths: HostPaths,
}

#[derive(Debug)]
struct Root {
    name: String,
    place: Place,
    /// How many bytes it may take at most.
    limit: Option<u64>,
    /// Whether it is an `emptyDir` in memory.
    memory: bool,
}

/// Where a volume lies.
#[derive(Debug)]
enum Place {
    /// In this folder of the shim, in which containers write.
    Folder(PathBuf),
    /// In this folder of the shim, in which only [`Volumes::write`] writes, never a container.
    Files(PathBuf),
    /// At a path of the node. It is opened when it is mounted.
    Host(pb::HostPath),
    /// In an image: a part of a file, or a sandbox.
    Image(spec::Source, Option<Part>),
}

impl Place {
    /// Where this volume lies. Creates `folder` for it, unless it is a path of the node.
    fn create(
        volume: &pb::Volume,
        folder: &str,
        scratch: &Scratch,
        host_paths: &pb::HostPathPolicy,
        images: &[pb::ResolvedImage],
    ) -> Result<Self, VolumeError> {
        let failed = |source| VolumeError::File {
            volume: volume.name.clone(),
            source,
        };
        let kept = |error| match error {
            ScratchError::File(source) => failed(source),
            ScratchError::NoMemory(source) => VolumeError::NoMemory {
                volume: volume.name.clone(),
                source,
            },
        };
        let open = |path: &PathBuf, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))
                .map_err(FileError::on("set the mode of", path))
                .map_err(failed)
        };
        Ok(match &volume.source {
            Some(Source::EmptyDir(empty)) => {
                let made = if empty.memory {
                    scratch.memory(folder)
                } else {
                    scratch.disk(folder).map_err(ScratchError::from)
                };
                let path = made.map_err(kept)?;
                open(&path, 0o777)?;
                Self::Folder(path)
            }
            Some(Source::Files(_)) => {
                let path = scratch.secrets(folder).map_err(kept)?;
                open(&path, 0o755)?;
                Self::Files(path)
            }
            Some(Source::HostPath(host)) => Self::Host(host.clone()),
            Some(Source::Image(_)) => Self::in_image(&volume.name, images)?,
            Some(
                Source::Nfs(pb::NfsVolume { read_only, .. })
                | Source::Csi(pb::CsiVolume { read_only, .. }),
            ) => {
                let mapped = host_paths.mapped.get(&volume.name);
                let path = mapped.ok_or_else(|| VolumeError::Unmapped(volume.name.clone()))?;
                Self::Host(pb::HostPath {
                    path: path.clone(),
                    r#type: pb::HostPathType::Directory.into(),
                    read_only: *read_only,
                    ..pb::HostPath::default()
                })
            }
            None => return Err(VolumeError::Unknown(volume.name.clone())),
        })
    }

    /// Where the volume of this name lies in the image that was resolved for it.
    fn in_image(volume: &str, images: &[pb::ResolvedImage]) -> Result<Self, VolumeError> {
        let image = images.iter().find(|image| image.volume == volume);
        let image = image.ok_or_else(|| VolumeError::Unknown(volume.to_owned()))?;
        let (source, path) = (spec::Source::of_image(image), Path::new(&image.path));
        let part = source.is_image_file().then(|| sif::part(path)).transpose();
        let part = part.map_err(|source| VolumeError::Image {
            volume: volume.to_owned(),
            source,
        })?;
        Ok(Self::Image(source, part))
    }
}

impl Volumes {
    /// Creates the folders. Those for files are empty until [`Self::write`].
    pub(crate) fn create(
        volumes: &[pb::Volume],
        scratch: &Scratch,
        host_paths: &pb::HostPathPolicy,
        images: &[pb::ResolvedImage],
    ) -> Result<Self, VolumeError> {
        let mut roots = Vec::new();
        for (index, volume) in volumes.iter().enumerate() {
            roots.push(Root {
                name: volume.name.clone(),
                place: Place::create(volume, &folder_name(index), scratch, host_paths, images)?,
                limit: limit(volume),
                memory: is_in_memory(volume),
            });
        }
        Ok(Self {
            roots,
            site_binds: Vec::new(),
            host_paths: host_paths.into(),
        })
    }

    /// Adds what the site mounts into every container of a job in this partition.
    pub(crate) fn with_site_binds(mut self, binds: &[pb::SiteBind]) -> Self {
        let partition = std::env::var(PARTITION).unwrap_or_default();
        self.site_binds = of_partition(binds, &partition);
        self
    }

    /// The mounts of the site, except at places where the container mounts something else.
    pub(crate) fn of_site(&self, mounts: &[Mounted]) -> Vec<Mounted> {
        let binds = self.site_binds.iter().filter(|bind| {
            let mut targets = mounts.iter().map(|mount| &mount.target);
            targets.all(|target| target != Path::new(&bind.target))
        });
        let mounted = |bind: &pb::SiteBind| {
            let path = PathBuf::from(&bind.path);
            let prefix = Prefix {
                path: path.clone(),
                writable: bind.writable,
            };
            let source = HostSource {
                path,
                sub_path: PathBuf::new(),
                kind: Kind::Any,
                writes: bind.writable,
                allowed: HostPaths {
                    prefixes: vec![prefix],
                    ..self.host_paths.clone()
                },
            };
            Mounted {
                what: format!(
                    "the site's mount {:?} (`[[bind]]` of the site file)",
                    bind.path
                ),
                source: spec::Source::Host(source),
                target: PathBuf::from(&bind.target),
                read_only: !bind.writable,
                // Only the site names the path.
                needs_descriptor: false,
                image: None,
                folder: None,
                point: None,
            }
        };
        binds.map(mounted).collect()
    }

    /// The folder of an `emptyDir`.
    pub(crate) fn folder(&self, volume: &str) -> Option<&Path> {
        let root = self.roots.iter().find(|root| root.name == volume)?;
        match &root.place {
            Place::Folder(path) => Some(path),
            Place::Files(_) | Place::Host(_) | Place::Image(..) => None,
        }
    }

    /// The `emptyDir` volumes in memory with a size limit. None is larger than the memory of the job, if that is known (not 0).
    pub(crate) fn in_memory(&self, job_bytes: i64) -> Vec<Tmpfs> {
        let most = u64::try_from(job_bytes).unwrap_or_default();
        let most = if most == 0 { u64::MAX } else { most };
        let volume = |root: &Root| match &root.place {
            Place::Folder(path) => Some(Tmpfs {
                path: path.clone(),
                bytes: root.limit?.min(most),
            }),
            Place::Files(_) | Place::Host(_) | Place::Image(..) => None,
        };
        let roots = self.roots.iter().filter(|root| root.memory);
        roots.filter_map(volume).collect()
    }

    /// The `emptyDir` volumes with a size limit.
    pub(crate) fn limits(&self) -> Vec<Limit> {
        let limit = |root: &Root| match &root.place {
            Place::Folder(path) => Some(Limit {
                volume: root.name.clone(),
                path: path.clone(),
                bytes: root.limit?,
            }),
            Place::Files(_) | Place::Host(_) | Place::Image(..) => None,
        };
        self.roots.iter().filter_map(limit).collect()
    }

    /// Writes the files that `values` has into their volumes.
    pub(crate) fn write(&self, values: &PodValues) -> Result<(), VolumeError> {
        for root in &self.roots {
            let Place::Files(folder) = &root.place else {
                continue;
            };
            let files = values.files.iter().find(|files| files.volume == root.name);
            let files = files.map_or(&[][..], |files| &files.files);
            let revision = format!("..{}", values.revision);
            replace(folder, &revision, files).map_err(|source| VolumeError::File {
                volume: root.name.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// The sources and targets of a container's mounts. The sources are resolved later, when they are mounted.
    pub(crate) fn mounts(&self, mounts: &[pb::Mount]) -> Result<Vec<Mounted>, VolumeError> {
        mounts.iter().map(|mount| self.mount(mount)).collect()
    }

    fn mount(&self, mount: &pb::Mount) -> Result<Mounted, VolumeError> {
        let root = self.roots.iter().find(|root| root.name == mount.volume);
        let root = root.ok_or_else(|| VolumeError::Unknown(mount.volume.clone()))?;
        let target = paths::in_container(&mount.path)
            .map_err(VolumeError::malformed(&root.name, &mount.path))?;
        let sub_path = if mount.sub_path.is_empty() {
            ".".to_owned()
        } else {
            paths::in_volume(&mount.sub_path)
                .map_err(VolumeError::malformed(&root.name, &mount.sub_path))?
        };
        let whole = sub_path == ".";
        let (path, what) = if whole {
            (PathBuf::new(), format!("volume {:?}", root.name))
        } else {
            let what = format!("volume {:?}, path {sub_path:?}", root.name);
            (PathBuf::from(sub_path), what)
        };
        let mounted = |source, read_only: bool, needs_descriptor| Mounted {
            what,
            source,
            target: PathBuf::from(&target),
            read_only: mount.read_only || read_only,
            needs_descriptor,
            image: None,
            folder: None,
            point: None,
        };
        let inside = |root: &PathBuf, path, make| spec::Source::Inside {
            root: root.clone(),
            path,
            make,
        };
        Ok(match &root.place {
            Place::Folder(folder) => mounted(inside(folder, path, true), false, !whole),
            Place::Files(folder) => mounted(inside(folder, path, false), true, false),
            Place::Image(source, part) => Mounted {
                image: *part,
                folder: (!whole).then_some(path),
                // The helper that mounts a folder needs rights in the container's user namespace.
                ..mounted(source.clone(), true, !whole)
            },
            Place::Host(host) => {
                let source = spec::Source::Host(HostSource {
                    path: PathBuf::from(&host.path),
                    sub_path: path,
                    kind: host.r#type().into(),
                    writes: !mount.read_only && !host.read_only,
                    allowed: self.host_paths.clone(),
                });
                mounted(source, host.read_only, true)
            }
        })
    }
}

/// PURE: the binds of a job in this partition.
fn of_partition(binds: &[pb::SiteBind], partition: &str) -> Vec<pb::SiteBind> {
    let has = |bind: &&pb::SiteBind| {
        bind.partitions.is_empty() || bind.partitions.iter().any(|name| name == partition)
    };
    binds.iter().filter(has).cloned().collect()
}

fn replace(folder: &Path, revision: &str, files: &[pb::VolumeFile]) -> Result<(), FileError> {
    let new = folder.join(revision);
    // An earlier try may have left a partial folder.
    tree::remove(&new).map_err(FileError::on("remove", &new))?;
    make(&new)?;
    for file in files {
        let path = new.join(&file.path);
        if let Some(parent) = path.parent() {
            make(parent)?;
        }
        write(&path, &file.data, file.mode)?;
    }
    let old = fs::read_link(folder.join(DATA)).ok();
    relink(folder, revision, DATA)?;
    let names: BTreeSet<&str> = files
        .iter()
        .filter_map(|file| file.path.split('/').next())
        .collect();
    for name in &names {
        let target = format!("{DATA}/{name}");
        if fs::read_link(folder.join(name)).ok() != Some(PathBuf::from(&target)) {
            relink(folder, &target, name)?;
        }
    }
    remove_stale(folder, &names)?;
    if let Some(old) = old.filter(|old| is_revision(old) && old != Path::new(revision)) {
        tree::remove(&folder.join(old)).ok();
    }
    Ok(())
}

/// PURE: whether it is the name of a folder that [`replace`] creates, and not a path to somewhere else.
fn is_revision(link: &Path) -> bool {
    let name = link.to_str().unwrap_or_default();
    name.len() > 2 && name.starts_with("..") && !name.contains('/')
}

fn remove_stale(folder: &Path, names: &BTreeSet<&str>) -> Result<(), FileError> {
    for entry in fs::read_dir(folder)
        .map_err(FileError::on("list", folder))?
        .flatten()
    {
        let name = entry.file_name();
        let keep = name
            .to_str()
            .is_some_and(|name| name.starts_with("..") || names.contains(name));
        // All names that the shim created are links; any other file is a mount point for a container's mount.
        let ours = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        if ours && !keep {
            fs::remove_file(entry.path()).ok();
        }
    }
    Ok(())
}

fn make(folder: &Path) -> Result<(), FileError> {
    let made = DirBuilder::new().recursive(true).mode(0o755).create(folder);
    made.map_err(FileError::on("create", folder))
}

fn write(path: &Path, data: &[u8], mode: u32) -> Result<(), FileError> {
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(data)?;
        // Set explicitly, as the umask applies to the mode of `open`.
        file.set_permissions(fs::Permissions::from_mode(mode & 0o777))
    };
    write().map_err(FileError::on("write", path))
}

/// Replaces `name` in `folder` by a link to `target`, atomically.
fn relink(folder: &Path, target: &str, name: &str) -> Result<(), FileError> {
    // There is one writer, so the name is free. A name derived from `name` could be longer than a file name may be.
    let temporary = folder.join("..tmp");
    fs::remove_file(&temporary).ok();
    symlink(target, &temporary).map_err(FileError::on("link", &temporary))?;
    let name = folder.join(name);
    fs::rename(&temporary, &name).map_err(FileError::on("rename over", &name))
}

/// The name of the shim's folder for the volume at this place in the pod.
pub(crate) fn folder_name(index: usize) -> String {
    format!("v{index}")
}

/// Whether it is an `emptyDir` in memory.
pub(crate) fn is_in_memory(volume: &pb::Volume) -> bool {
    matches!(&volume.source, Some(Source::EmptyDir(empty)) if empty.memory)
}

/// The size limit of an `emptyDir`; as in Kubernetes, 0 is none.
fn limit(volume: &pb::Volume) -> Option<u64> {
    match &volume.source {
        Some(Source::EmptyDir(empty)) => {
            let limit = u64::try_from(empty.size_limit_bytes).ok();
            limit.filter(|bytes| *bytes > 0)
        }
        Some(
            Source::Files(_)
            | Source::HostPath(_)
            | Source::Image(_)
            | Source::Nfs(_)
            | Source::Csi(_),
        )
        | None => None,
    }
}

#[cfg(test)]
mod tests;
