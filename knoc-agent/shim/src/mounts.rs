//! How the runtime gets a container's image and volumes: by descriptor, or by name.
//!
//! By descriptor, the helper ([`crate::launch::contain`]) resolves and mounts each in namespaces of its own, so that what is
//! checked is what is mounted. If the runtime is set up as root (setuid), or the node has no user namespaces, the runtime
//! can only be given names; volumes whose path a container could change in between are then rejected.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use knoc_contract::setuid;
use knoc_proto::pb;
use rustix::io::Errno;

use super::{nofollow, volumes::Mounted};
use crate::{
    launch::contain::spec::{MountSpec, Point, PointBase, Source, SourceError},
    runtime::Bind,
};

/// The file with the number of user namespaces that a user may have.
const MOST_NAMESPACES: &str = "/proc/sys/user/max_user_namespaces";

/// Why something cannot be mounted by name.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NameError {
    #[error("{what}")]
    Source {
        what: String,
        #[source]
        source: SourceError,
    },
    #[error(
        "{what}: a hostPath, or a subPath of a writable volume or of an image, needs user namespaces, which this node or its \
         container runtime (setuid) does not use; mount a whole volume of another kind, or have the site allow user namespaces and \
         install the runtime without its setuid part"
    )]
    NeedsNamespaces { what: String },
}

/// Whether this node can mount by descriptor.
#[derive(Debug)]
pub(crate) struct Mounting {
    by_name: AtomicBool,
    /// Whether a container of this pod was started with namespaces.
    by_descriptor: AtomicBool,
    /// The names that `/etc/subuid` may have for this user.
    pub(crate) users: Vec<String>,
}

impl Mounting {
    pub(crate) fn of(job: &pb::JobFile) -> Self {
        let setuid = setuid::starter(&job.runtime, job.runtime_path.as_ref()).is_some();
        let uid = rustix::process::getuid();
        let entry = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid.as_raw()));
        // If only the site's directory service knows its accounts, the job's environment has the name.
        let named = ["USER", "LOGNAME"].map(|name| std::env::var(name).ok());
        let known = entry.ok().flatten().map(|entry| entry.name);
        let mut users = vec![uid.as_raw().to_string()];
        users.extend(named.into_iter().flatten().chain(known));
        Self {
            by_name: AtomicBool::new(setuid),
            by_descriptor: AtomicBool::new(false),
            users,
        }
    }

    pub(crate) fn by_name(&self) -> bool {
        self.by_name.load(Ordering::Relaxed)
    }

    /// Notes that namespaces can be created on this node.
    pub(crate) fn worked(&self) {
        self.by_descriptor.store(true, Ordering::Relaxed);
    }

    /// Whether the error means that this node never allows namespaces. Other errors come from limits of a user's namespaces
    /// and processes, which a container can provoke: they fail one start, and never lead to mounts by name.
    pub(crate) fn is_final(&self, errno: i32) -> bool {
        if self.by_descriptor.load(Ordering::Relaxed) {
            return false;
        }
        let never = [Errno::PERM, Errno::ACCESS, Errno::NOSYS, Errno::INVAL];
        let is = |known: &Errno| known.raw_os_error() == errno;
        let none_allowed =
            || std::fs::read_to_string(MOST_NAMESPACES).is_ok_and(|most| most.trim() == "0");
        never.iter().any(is) || is(&Errno::NOSPC) && none_allowed()
    }

    /// Notes that this node has no user namespaces, which does not change.
    pub(crate) fn only_by_name(&self) {
        self.by_name.store(true, Ordering::Relaxed);
    }
}

/// What a container mounts.
#[derive(Debug, Clone)]
pub(crate) struct Mounts {
    image: Source,
    image_path: String,
    volumes: Vec<Mounted>,
    /// The index of the volume that the termination message lies in, and its path there.
    message: Option<(usize, PathBuf)>,
    /// The agent's executable, from which the container's launcher is started.
    agent: PathBuf,
    /// The folder of the staging paths.
    staging: PathBuf,
}

/// The paths that the runtime is given.
#[derive(Debug)]
pub(crate) struct Named {
    pub(crate) image: PathBuf,
    /// The agent's executable.
    pub(crate) agent: PathBuf,
    pub(crate) binds: Vec<Bind>,
    /// The volume that the termination message lies in.
    pub(crate) base: Option<OwnedFd>,
}

impl Mounts {
    pub(crate) fn new(image: &pb::ResolvedImage, agent: PathBuf, staging: PathBuf) -> Self {
        Self {
            image: Source::of_image(image),
            image_path: image.path.clone(),
            volumes: Vec::new(),
            message: None,
            agent,
            staging,
        }
    }

    /// Sets the volumes, in the order of mounting, and where among them the termination message lies.
    pub(crate) fn set(&mut self, volumes: Vec<Mounted>, message: Option<(usize, PathBuf)>) {
        (self.volumes, self.message) = (volumes, message);
    }

    fn image_what(&self) -> String {
        format!("image {:?}", self.image_path)
    }

    fn staging_of(&self, index: usize) -> PathBuf {
        self.staging.join(format!("m{index}"))
    }

    fn staged_agent(&self) -> PathBuf {
        self.staging.join("agent")
    }

    /// Everything that the helper mounts.
    pub(crate) fn specs(&self) -> Vec<MountSpec> {
        let image = MountSpec {
            what: self.image_what(),
            source: self.image.clone(),
            staging: self.staging.join("image"),
            point: None,
            read_only: false,
            message: None,
        };
        let volumes = self.volumes.iter().enumerate().map(|(index, mounted)| {
            let message = self.message.as_ref().filter(|(mount, _)| *mount == index);
            MountSpec {
                what: mounted.what.clone(),
                source: mounted.source.clone(),
                staging: self.staging_of(index),
                point: mounted.point.clone().map(after_image),
                read_only: mounted.read_only,
                message: message.map(|(_, rest)| rest.clone()),
            }
        });
        // Root in the container's user namespace could undo a read-only mount that the runtime makes.
        let agent = MountSpec {
            what: "KNoC's launcher".to_owned(),
            source: Source::Own(self.agent.clone()),
            staging: self.staged_agent(),
            point: None,
            read_only: true,
            message: None,
        };
        let first = std::iter::once(image);
        first.chain(volumes).chain([agent]).collect()
    }

    /// The paths for the runtime once the helper has mounted everything.
    pub(crate) fn staged(&self) -> Named {
        let volumes = self.volumes.iter().enumerate();
        Named {
            image: self.staging.join("image"),
            agent: self.staged_agent(),
            binds: volumes
                .map(|(index, mounted)| bind(mounted, self.staging_of(index)))
                .collect(),
            base: None,
        }
    }

    /// The folders of images that are still to be mounted over the whole of each: what error messages call it, the path in the
    /// container, and that in the image.
    pub(crate) fn folders(&self) -> impl Iterator<Item = (&str, &Path, &Path)> {
        let volumes = self.volumes.iter();
        volumes.filter_map(|one| Some((&*one.what, &*one.target, one.folder.as_deref()?)))
    }

    /// Replaces the staging paths in a message of the runtime by the names of what is mounted there, which users know.
    pub(crate) fn with_own_names(&self, message: &str) -> String {
        let image = self.staging.join("image");
        let mut message = message.replace(&*image.to_string_lossy(), &self.image_path);
        // In reverse order, as `m1` is a prefix of `m10`.
        for (index, mounted) in self.volumes.iter().enumerate().rev() {
            let staged = self.staging_of(index);
            message = message.replace(&*staged.to_string_lossy(), &mounted.what);
        }
        message
    }

    /// Whether the pod names one of its mounts in a way that brings this word, in lower case, into a message of the runtime.
    pub(crate) fn mention(&self, word: &str) -> bool {
        let has = |text: &str| text.to_ascii_lowercase().contains(word);
        let mut volumes = self.volumes.iter();
        volumes.any(|mounted| has(&mounted.what) || has(&mounted.target.to_string_lossy()))
    }

    /// The paths for the runtime if there is no helper: those that the sources have now. Blocks on file work.
    pub(crate) fn names(&self) -> Result<Named, NameError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |source| NameError::Source { what, source }
        };
        let mut named = Named {
            image: self.image.open().map_err(failed(&self.image_what()))?.path,
            agent: self.agent.clone(),
            binds: Vec::new(),
            base: None,
        };
        let mut opened = Vec::new();
        for (index, mounted) in self.volumes.iter().enumerate() {
            if mounted.needs_descriptor {
                let what = mounted.what.clone();
                return Err(NameError::NeedsNamespaces { what });
            }
            let found = mounted.source.open().map_err(failed(&mounted.what))?;
            if let Some(point) = &mounted.point {
                // If this fails, the mount point may exist already. If it does not, the runtime reports the error.
                let folder = mounted.source.is_folder(&found);
                point.make(folder, &opened).ok();
            }
            named.binds.push(bind(mounted, found.path.clone()));
            if let Some((_, rest)) = self.message.as_ref().filter(|(mount, _)| *mount == index) {
                if !mounted.read_only {
                    // If the folder is not writable, the launcher says so.
                    nofollow::touch_in(&found.fd, rest).ok();
                }
                named.base = found.fd.try_clone().ok();
            }
            opened.push(found);
        }
        Ok(named)
    }
}

/// Shifts the index of a volume by one, as the helper mounts the image first.
fn after_image(point: Point) -> Point {
    let base = match point.base {
        PointBase::Mount(index) => PointBase::Mount(index + 1),
        folder @ PointBase::Folder(_) => folder,
    };
    Point { base, ..point }
}

fn bind(mounted: &Mounted, source: PathBuf) -> Bind {
    Bind {
        source,
        target: mounted.target.clone(),
        read_only: mounted.read_only,
        image: mounted.image,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(root: &Path, path: &str, needs_descriptor: bool) -> Mounts {
        let volume = Mounted {
            what: format!("volume \"v\", path {path:?}"),
            source: Source::Inside {
                root: root.to_owned(),
                path: path.into(),
                make: true,
            },
            target: "/v".into(),
            read_only: false,
            needs_descriptor,
            image: None,
            folder: None,
            point: None,
        };
        let image = pb::ResolvedImage {
            path: root.display().to_string(),
            ..pb::ResolvedImage::default()
        };
        let mut mounts = Mounts::new(&image, "/opt/knoc-agent".into(), "/staging".into());
        mounts.set(vec![volume], Some((0, "log".into())));
        mounts
    }

    #[test]
    fn without_namespaces_a_writable_subpath_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let root = std::fs::canonicalize(root.path()).unwrap();
        let error = mounts(&root, "sub", true).names().unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("volume \"v\", path \"sub\": ") && text.contains("user namespaces"),
            "{text}"
        );
        // Nothing was created, and what no container can change is mounted by name.
        assert!(!root.join("sub").exists());
        let named = mounts(&root, "", false).names().unwrap();
        assert_eq!((&named.image, &named.binds[0].source), (&root, &root));
        assert!(named.base.is_some() && root.join("log").is_file());
    }

    #[test]
    fn no_container_can_make_its_pod_mount_by_name() {
        let mounting = Mounting::of(&pb::JobFile::default());
        let never = [Errno::PERM, Errno::ACCESS, Errno::NOSYS, Errno::INVAL];
        // Too many processes, open files or namespaces of this user, and too little memory.
        let passing = [Errno::AGAIN, Errno::MFILE, Errno::NOSPC, Errno::NOMEM];
        for errno in never {
            assert!(mounting.is_final(errno.raw_os_error()), "{errno}");
        }
        for errno in passing {
            assert!(!mounting.is_final(errno.raw_os_error()), "{errno}");
        }
        assert!(!mounting.is_final(0));
        mounting.worked();
        assert!(!mounting.is_final(Errno::PERM.raw_os_error()));
    }

    #[test]
    fn the_helper_mounts_what_the_runtime_is_told() {
        let mounts = mounts(Path::new("/r"), "sub", true);
        let (specs, named) = (mounts.specs(), mounts.staged());
        let staged: Vec<&Path> = specs.iter().map(|spec| spec.staging.as_path()).collect();
        assert_eq!(staged, [&named.image, &named.binds[0].source, &named.agent]);
        assert!(specs[2].read_only, "no container can write our program");
        assert_eq!(specs[1].message.as_deref(), Some(Path::new("log")));
        let message = mounts.with_own_names("stat /staging/image, mount /staging/m0: no");
        assert_eq!(message, "stat /r, mount volume \"v\", path \"sub\": no");
        assert!(mounts.mention("\"sub\"") && !mounts.mention("compression"));
    }
}
