//! The pod's volumes on the node: `emptyDir`, and files of `ConfigMaps`, Secrets and projections. Blocking file work.
//!
//! Files are laid out as a kubelet's atomic writer does: they lie in a folder of their revision, `..data` leads to it,
//! and each name leads through `..data`. A new revision is written beside, then `..data` is renamed over: a reader sees
//! all of the old or all of the new.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink},
    path::{Component, Path, PathBuf},
};

use knoc_proto::pb::{self, volume::Source};

use super::{beneath, scratch::Scratch};
use crate::{jobdir::atomic::FileError, runtime::Bind};

/// The link to the folder of the current revision.
const DATA: &str = "..data";

/// Why a volume could not be given to a container.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    /// The file system refused.
    #[error("volume {volume:?}")]
    File {
        volume: String,
        #[source]
        source: FileError,
    },
    /// The shape names none.
    #[error("no volume is called {0:?}")]
    Unknown(String),
    /// A path that leaves its volume.
    #[error("the path {path:?} leaves volume {volume:?}")]
    Path { volume: String, path: String },
}

/// The volumes of one pod.
#[derive(Debug)]
pub(crate) struct Volumes {
    roots: Vec<Root>,
}

#[derive(Debug)]
struct Root {
    name: String,
    path: PathBuf,
    /// Written by [`Volumes::write`], and never by containers.
    files: bool,
    /// Not ours: nothing is made in it.
    foreign: bool,
}

impl Volumes {
    /// Makes the folders; those of files are empty until [`Self::write`].
    pub(crate) fn create(volumes: &[pb::Volume], scratch: &Scratch) -> Result<Self, VolumeError> {
        let mut roots = Vec::new();
        for (index, volume) in volumes.iter().enumerate() {
            let folder = format!("v{index}");
            let failed = |source| VolumeError::File {
                volume: volume.name.clone(),
                source,
            };
            let (path, files, foreign) = match &volume.source {
                Some(Source::EmptyDir(empty)) => {
                    let made = if empty.memory {
                        scratch.memory(&folder)
                    } else {
                        scratch.disk(&folder)
                    };
                    (made.map_err(failed)?, false, false)
                }
                Some(Source::Files(_)) => (scratch.memory(&folder).map_err(failed)?, true, false),
                Some(Source::HostPath(host)) => (PathBuf::from(&host.path), false, true),
                None => return Err(VolumeError::Unknown(volume.name.clone())),
            };
            if !foreign {
                let open = fs::Permissions::from_mode(if files { 0o755 } else { 0o777 });
                fs::set_permissions(&path, open)
                    .map_err(FileError::on("set the mode of", &path))
                    .map_err(failed)?;
            }
            roots.push(Root {
                name: volume.name.clone(),
                path,
                files,
                foreign,
            });
        }
        Ok(Self { roots })
    }

    /// Writes the files of all volumes that `values` has.
    pub(crate) fn write(&self, values: &pb::PodValues) -> Result<(), VolumeError> {
        for root in self.roots.iter().filter(|root| root.files) {
            let files = values.files.iter().find(|files| files.volume == root.name);
            let files = files.map_or(&[][..], |files| &files.files);
            for file in files {
                if !is_inside(Path::new(&file.path)) {
                    let (volume, path) = (root.name.clone(), file.path.clone());
                    return Err(VolumeError::Path { volume, path });
                }
            }
            let revision = format!("..{}", values.revision);
            replace(&root.path, &revision, files).map_err(|source| VolumeError::File {
                volume: root.name.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// What a container's mounts bind.
    pub(crate) fn binds(&self, mounts: &[pb::Mount]) -> Result<Vec<Bind>, VolumeError> {
        mounts.iter().map(|mount| self.bind(mount)).collect()
    }

    fn bind(&self, mount: &pb::Mount) -> Result<Bind, VolumeError> {
        let root = self.roots.iter().find(|root| root.name == mount.volume);
        let root = root.ok_or_else(|| VolumeError::Unknown(mount.volume.clone()))?;
        let bind = |source| Bind {
            source,
            target: PathBuf::from(&mount.path),
            read_only: mount.read_only || root.files,
        };
        if mount.sub_path.is_empty() {
            return Ok(bind(root.path.clone()));
        }
        let leaves = || VolumeError::Path {
            volume: root.name.clone(),
            path: mount.sub_path.clone(),
        };
        if !is_inside(Path::new(&mount.sub_path)) {
            return Err(leaves());
        }
        let failed = |source: FileError| VolumeError::File {
            volume: root.name.clone(),
            source,
        };
        let resolve = |path: &Path| {
            fs::canonicalize(path)
                .map_err(FileError::on("resolve", path))
                .map_err(failed)
        };
        // Links made by an earlier container must not lead out of the volume: each component is resolved before the
        // next is looked at, and before anything is made below it.
        let top = resolve(&root.path)?;
        let makes = !root.files && !root.foreign;
        let mut source = top.clone();
        for component in Path::new(&mount.sub_path).components() {
            let next = source.join(component);
            let missing = fs::symlink_metadata(&next)
                .is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
            if missing && makes {
                beneath::make_folder(&next)
                    .map_err(FileError::on("create", &next))
                    .map_err(failed)?;
                source = next;
                continue;
            }
            source = resolve(&next)?;
            if !source.starts_with(&top) {
                return Err(leaves());
            }
        }
        Ok(bind(source))
    }
}

fn is_inside(path: &Path) -> bool {
    // Names that begin with two dots are the writer's own.
    !path.as_os_str().is_empty()
        && !path.as_os_str().as_encoded_bytes().starts_with(b"..")
        && path
            .components()
            .all(|component| matches!(component, Component::Normal(_)))
}

fn replace(folder: &Path, revision: &str, files: &[pb::VolumeFile]) -> Result<(), FileError> {
    let new = folder.join(revision);
    // An earlier try may have left a part of it.
    fs::remove_dir_all(&new).ok();
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
    if let Some(old) = old.filter(|old| old != Path::new(revision)) {
        fs::remove_dir_all(folder.join(old)).ok();
    }
    Ok(())
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
        if !keep {
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
        // Not by open's mode, from which the umask takes.
        file.set_permissions(fs::Permissions::from_mode(mode & 0o777))
    };
    write().map_err(FileError::on("write", path))
}

/// Makes `name` in `folder` a link to `target`, in one step.
fn relink(folder: &Path, target: &str, name: &str) -> Result<(), FileError> {
    // One writer makes one link after the other. A name made of `name` could be longer than a file's may be.
    let temporary = folder.join("..tmp");
    fs::remove_file(&temporary).ok();
    symlink(target, &temporary).map_err(FileError::on("link", &temporary))?;
    let name = folder.join(name);
    fs::rename(&temporary, &name).map_err(FileError::on("rename over", &name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, data: &'static str, mode: u32) -> pb::VolumeFile {
        pb::VolumeFile {
            path: path.to_owned(),
            data: data.into(),
            mode,
        }
    }

    fn values(revision: i64, files: Vec<pb::VolumeFile>) -> pb::PodValues {
        let files = vec![pb::VolumeFiles {
            volume: "cm".to_owned(),
            files,
        }];
        pb::PodValues {
            revision,
            files,
            ..Default::default()
        }
    }

    fn mount(volume: &str, sub_path: &str) -> pb::Mount {
        let (volume, sub_path) = (volume.to_owned(), sub_path.to_owned());
        pb::Mount {
            volume,
            path: "/data".to_owned(),
            sub_path,
            read_only: false,
        }
    }

    fn volumes() -> (tempfile::TempDir, Scratch, Volumes) {
        let base = tempfile::tempdir().unwrap();
        let scratch = Scratch::create(base.path().to_str().unwrap()).unwrap();
        let volume = |name: &str, source| pb::Volume {
            name: name.to_owned(),
            source: Some(source),
        };
        let all = [
            volume("cm", Source::Files(pb::FilesVolume {})),
            volume("empty", Source::EmptyDir(pb::EmptyDir::default())),
        ];
        let volumes = Volumes::create(&all, &scratch).unwrap();
        (base, scratch, volumes)
    }

    #[test]
    fn files_are_replaced_at_once_and_modes_are_kept() {
        let (_base, _scratch, volumes) = volumes();
        let bind = volumes.binds(&[mount("cm", "")]).unwrap().remove(0);
        assert!(bind.read_only);
        let first = vec![
            file("a", "1", 0o640),
            file("dir/b", "2", 0o400),
            file("gone", "", 0o644),
        ];
        volumes.write(&values(1, first)).unwrap();
        let read = |name: &str| fs::read_to_string(bind.source.join(name));
        assert_eq!(read("dir/b").unwrap(), "2");
        let mode = fs::metadata(bind.source.join("a"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o640);
        assert_eq!(
            fs::read_link(bind.source.join("a")).unwrap(),
            Path::new("..data/a")
        );
        volumes
            .write(&values(2, vec![file("a", "new", 0o644)]))
            .unwrap();
        assert_eq!(read("a").unwrap(), "new");
        assert!(read("gone").is_err() && read("dir/b").is_err());
        let left: BTreeSet<_> = fs::read_dir(&bind.source)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(
            left,
            BTreeSet::from(["..2", "..data", "a"].map(str::to_owned))
        );
    }

    #[test]
    fn the_longest_key_is_a_file() {
        let (_base, _scratch, volumes) = volumes();
        let (key, name) = ("k".repeat(253), "n".repeat(255));
        for revision in [1, 2] {
            let files = vec![file(&key, "1", 0o644), file(&name, "2", 0o644)];
            volumes.write(&values(revision, files)).unwrap();
        }
        let folder = volumes.binds(&[mount("cm", "")]).unwrap().remove(0).source;
        assert_eq!(fs::read_to_string(folder.join(key)).unwrap(), "1");
        assert_eq!(fs::read_to_string(folder.join(name)).unwrap(), "2");
    }

    #[test]
    fn nothing_is_made_outside_of_a_volume() {
        let (base, _scratch, volumes) = volumes();
        let home = base.path().join("home");
        fs::create_dir(&home).unwrap();
        let root = volumes
            .binds(&[mount("empty", "")])
            .unwrap()
            .remove(0)
            .source;
        symlink(&home, root.join("out")).unwrap();
        symlink(home.join("new"), root.join("dangling")).unwrap();
        fs::create_dir(root.join("real")).unwrap();
        symlink("real", root.join("within")).unwrap();
        for path in [
            "out",
            "out/x",
            "out/x/y",
            "dangling",
            "dangling/x",
            "within/../../x",
        ] {
            assert!(volumes.binds(&[mount("empty", path)]).is_err(), "{path}");
        }
        assert_eq!(fs::read_dir(&home).unwrap().count(), 0);
        let bind = volumes.binds(&[mount("empty", "within/x/y")]).unwrap();
        assert!(bind[0].source.ends_with("real/x/y") && bind[0].source.is_dir());
    }

    #[test]
    fn paths_stay_in_their_volume() {
        let (_base, _scratch, volumes) = volumes();
        for bad in ["../x", "/x", "a/../../x", ""] {
            let written = volumes.write(&values(1, vec![file(bad, "", 0o644)]));
            assert!(matches!(written, Err(VolumeError::Path { .. })), "{bad}");
        }
        let bind = volumes.binds(&[mount("empty", "a/b")]).unwrap().remove(0);
        assert!(bind.source.is_dir() && !bind.read_only);
        symlink("/", bind.source.join("root")).unwrap();
        assert!(volumes.binds(&[mount("empty", "a/b/root/etc")]).is_err());
        assert!(volumes.binds(&[mount("empty", "../cm")]).is_err());
        assert!(volumes.binds(&[mount("none", "")]).is_err());
        volumes
            .write(&values(1, vec![file("a", "1", 0o644)]))
            .unwrap();
        let bind = volumes.binds(&[mount("cm", "a")]).unwrap().remove(0);
        assert_eq!(fs::read_to_string(bind.source).unwrap(), "1");
    }
}
