//! The node-local folders and files of one attempt. All functions block on file work, also in what the pod mounts.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
};

use knoc_contract::jobdir::atomic::FileError;
use knoc_proto::{expand::SubPathError, pb, pod};
use tokio::net::UnixListener;

use super::super::{
    environment::{self, TerminationLog},
    mount_points::{self, Link},
    mounts::{Mounts, NameError},
    nofollow,
    pod::{Pod, RESOLVER},
    resolver,
    role::ContainerSpec,
    scratch::{ScratchError, Trash},
    volumes::{Mounted, VolumeError},
};
use crate::{
    launch::contain::spec,
    runtime::{INSIDE, RuntimeError},
};

/// The temporary folders of a container, and their names in the runtime's work folder.
const TEMPORARY: [(&str, &str); 2] = [("/tmp", "tmp"), ("/var/tmp", "var_tmp")];

const PASSWD: &str = "/etc/passwd";
const HOSTS: &str = "/etc/hosts";

/// Why an attempt could not be prepared.
#[derive(Debug, thiserror::Error)]
pub(super) enum PrepareError {
    #[error("prepare the container's folders")]
    File(#[from] FileError),
    #[error("mount a volume")]
    Volume(#[from] VolumeError),
    #[error("expand a subPathExpr")]
    SubPath(#[from] SubPathError),
    /// Holds the helper's message.
    #[error("mount {0}")]
    Mount(String),
    #[error("mount")]
    Name(#[from] NameError),
    #[error(transparent)]
    Runtime(RuntimeError),
    #[error("start the container runtime")]
    Spawn(#[source] io::Error),
    #[error("prepare the container's pipes")]
    Pipes(#[source] io::Error),
}

/// The folders of one attempt. When dropped they are moved into the trash, which takes no time however much the container
/// wrote.
#[derive(Debug)]
pub(super) struct Folders {
    /// What the container sees as `/.knoc`. It can change everything in it.
    pub(super) shared: PathBuf,
    /// Receives what the container writes to its root.
    pub(super) root: PathBuf,
    /// Holds `/tmp` and `/var/tmp` if what is written to the root does not go to `root`, and beside them what comes from the image:
    /// the folders of its volumes, and its files if the runtime unpacks them.
    pub(super) work: PathBuf,
    /// Out of the container's reach: files that are mounted into it, and what [`Mounts`] mounts on.
    private: PathBuf,
    mounts: Mounts,
    /// Links that the launcher creates in the container.
    pub(super) links: Vec<Link>,
    /// Folders of the image that every user may write to.
    pub(super) temporary: Vec<String>,
    /// The volumes of the image that are mounted, by their paths in the container, and the folders that are mounted there.
    pub(super) image_volumes: Vec<(PathBuf, PathBuf)>,
    /// The volumes of the image that cannot be mounted.
    pub(super) left_out: Vec<String>,
    /// Whether anything is mounted.
    pub(super) isolated: bool,
    /// Whether the container's `/etc/passwd` comes from the runtime, and not from a volume.
    pub(super) settle: bool,
    pub(super) termination: TerminationLog,
    /// The volume that the termination message lies in.
    message: Option<OwnedFd>,
    trash: Trash,
}

impl Folders {
    pub(super) fn prepare(
        pod: &Pod,
        spec: &ContainerSpec,
        number: u32,
        values: &pb::PodValues,
    ) -> Result<Self, PrepareError> {
        let (id, container) = (spec.id, &spec.container);
        let folder = |kind: &str| pod.scratch.disk(&format!("{kind}{id}-{number}"));
        let (private, work) = (folder("p")?, folder("w")?);
        let mounts = environment::mounts(container, values, &pod.facts_now())?;
        let mut volumes = pod.volumes.mounts(&mounts)?;
        let (mut image_volumes, mut left_out) = (Vec::new(), Vec::new());
        if pod.runtime.isolates() {
            volumes.extend(pod.volumes.of_site(&volumes));
            share_memory(pod, &mut volumes)?;
            volumes.extend(pmix(pod));
            (image_volumes, left_out) = add_image_volumes(spec, &work, &mut volumes)?;
        }
        let targets: Vec<_> = volumes
            .iter()
            .map(|volume| (&*volume.target, volume.read_only))
            .collect();
        let termination = environment::termination_log(container, &targets);
        let mut folders = Self {
            shared: folder("c")?,
            root: folder("r")?,
            work,
            mounts: Mounts::new(&spec.image, pod.agent.clone(), private.clone()),
            private,
            links: Vec::new(),
            temporary: Vec::new(),
            image_volumes,
            left_out,
            settle: false,
            isolated: pod.runtime.isolates(),
            termination,
            message: None,
            trash: pod.scratch.trash(),
        };
        let message = message_in_volume(&folders.termination, &volumes);
        let mut message_at = None;
        if pod.runtime.isolates() {
            folders.add_files(pod, &mut volumes)?;
            mount_points::order(&mut volumes);
            message_at = message.and_then(|(target, rest)| {
                let mut targets = volumes.iter().map(|volume| &volume.target);
                Some((targets.position(|other| *other == target)?, rest))
            });
            folders.arrange(container, &mut volumes)?;
        }
        folders.mounts.set(volumes, message_at);
        Ok(folders)
    }

    /// Adds the files that every container gets unless the pod mounts its own.
    fn add_files(&self, pod: &Pod, volumes: &mut Vec<Mounted>) -> Result<(), PrepareError> {
        touch(&self.shared, "agent")?;
        match &self.termination {
            TerminationLog::Mounted { .. } => {}
            TerminationLog::Bind(target) => {
                let log = touch(&self.private, "termination-log")?;
                // By this name of the same file the launcher sees whether it is mounted.
                fs::hard_link(&log, self.shared.join("message")).ok();
                volumes.push(Mounted {
                    what: format!("terminationMessagePath \"{}\"", target.display()),
                    ..own_file(log, target, false)
                });
            }
            TerminationLog::Link { .. } => {
                touch(&self.shared, "termination-log")?;
            }
        }
        let mounts = |volumes: &[Mounted], target: &str| {
            let target = Path::new(target);
            volumes.iter().any(|volume| volume.target == target)
        };
        if !mounts(volumes, HOSTS) {
            let node = fs::read_to_string(HOSTS).unwrap_or_default();
            let text = environment::hosts(&node, &pod.facts_now(), &pod.spec().host_aliases);
            let source = self.write("hosts", &text)?;
            volumes.push(own_file(source, Path::new(HOSTS), false));
        }
        let replaced = pod.network.resolv_conf();
        let node = pod.nodes_resolver();
        let cluster = pod.cluster_dns();
        let text = match pod.resolver(cluster.as_ref()) {
            _ if mounts(volumes, RESOLVER) => None,
            Some(wanted) => {
                let node = node.unwrap_or_default();
                Some(resolver::resolv_conf(&node, wanted, cluster.as_ref()))
            }
            // A volume at `/etc` hides the file that the runtime mounts, but in Kubernetes every container has one.
            None if replaced.is_some() || mounts(volumes, "/etc") => node.ok(),
            None => None,
        };
        if let Some(text) = text {
            let source = self.write("resolv.conf", &text)?;
            volumes.push(own_file(source, Path::new(RESOLVER), true));
        }
        Ok(())
    }

    /// Prepares what the mounts need: temporary folders, links and mount points. `volumes` are in the order of mounting;
    /// those below `/dev` are moved.
    fn arrange(
        &mut self,
        container: &pb::Container,
        volumes: &mut [Mounted],
    ) -> Result<(), PrepareError> {
        if !container.read_only_root {
            let own = mount_points::of_the_image(&TEMPORARY.map(|(folder, _)| folder), volumes);
            self.temporary.extend(own.into_iter().map(str::to_owned));
        }
        self.settle = !mount_points::of_the_image(&[PASSWD], volumes).is_empty();
        self.links = mount_points::leave_devices(volumes);
        let mut parents = vec![(PathBuf::from(INSIDE), self.shared.clone())];
        // The runtime mounts these if the root has no folder on disk.
        for (target, name) in TEMPORARY {
            let source = self.work.join(name);
            fs::create_dir(&source)
                .and_then(|()| fs::set_permissions(&source, fs::Permissions::from_mode(0o1777)))
                .map_err(FileError::on("create", &source))?;
            parents.push((target.into(), source));
        }
        mount_points::set_mount_points(&parents, volumes);
        Ok(())
    }

    /// Writes a file that the container sees and cannot replace.
    fn write(&self, name: &str, text: &str) -> Result<PathBuf, FileError> {
        let path = touch(&self.private, name)?;
        let mut file = File::options()
            .write(true)
            .open(&path)
            .map_err(FileError::on("open", &path))?;
        file.write_all(text.as_bytes())
            .map_err(FileError::on("write", &path))?;
        Ok(path)
    }

    /// What the helper and the runtime mount.
    pub(super) fn mounts(&self) -> &Mounts {
        &self.mounts
    }

    /// Sets the descriptor of the volume that the termination message lies in.
    pub(super) fn message_below(&mut self, base: Option<OwnedFd>) {
        self.message = base;
    }

    /// Listens on the socket that the launcher connects to.
    pub(super) fn listen(&self) -> Result<UnixListener, PrepareError> {
        let path = self.shared.join("launch.sock");
        Ok(UnixListener::bind(&path).map_err(FileError::on("listen on", &path))?)
    }

    /// The last `limit` bytes of the program's termination message; empty if it is not a regular file.
    pub(super) fn termination_message(&self, limit: usize) -> Vec<u8> {
        let read = match &self.termination {
            TerminationLog::Mounted { rest, .. } => match &self.message {
                Some(base) => nofollow::read_end_in(base, rest, limit),
                None => return Vec::new(),
            },
            TerminationLog::Link { .. } => {
                nofollow::read_end(&self.shared.join("termination-log"), limit)
            }
            TerminationLog::Bind(_) => {
                nofollow::read_end(&self.private.join("termination-log"), limit)
            }
        };
        read.unwrap_or_default()
    }
}

/// Adds the `/dev/shm` that the containers of a pod share, as with other runtimes, unless they mount a volume there.
fn share_memory(pod: &Pod, volumes: &mut Vec<Mounted>) -> Result<(), PrepareError> {
    let target = Path::new(mount_points::SHARED_MEMORY);
    if volumes.iter().any(|volume| volume.target == target) {
        return Ok(());
    }
    let own = || pod.scratch.memory("shm");
    let shared = pod.shared.as_ref();
    let source = match shared.map_or_else(own, |shared| Ok(shared.memory.clone())) {
        // The container keeps the runtime's own `/dev/shm`, which holds nothing of the shim's.
        Err(ScratchError::NoMemory(_)) => return Ok(()),
        Err(ScratchError::File(error)) => return Err(error.into()),
        Ok(source) => source,
    };
    fs::set_permissions(&source, fs::Permissions::from_mode(0o1777))
        .map_err(FileError::on("set the mode of", &source))?;
    volumes.push(own_file(source, target, false));
    Ok(())
}

/// The folder of the node's PMIx server, at the path by which the rank's variables name it.
fn pmix(pod: &Pod) -> Option<Mounted> {
    let path = pod.shared.as_ref()?.pmix.clone()?;
    Some(own_file(path.clone(), &path, false))
}

/// The volumes of an image: where each is mounted, and the folder that is.
type Added = Vec<(PathBuf, PathBuf)>;

/// If the container's root is read-only, adds a writable folder for each volume that the image declares and the pod does
/// not mount, and returns them, and the paths of those that cannot be mounted: nobody who runs the image can change these. The
/// folder gets a copy of what the image has there once the container is set up. A writable root has the image's own folders.
fn add_image_volumes(
    spec: &ContainerSpec,
    work: &Path,
    volumes: &mut Vec<Mounted>,
) -> Result<(Added, Vec<String>), PrepareError> {
    let (mut added, mut left_out) = (Vec::new(), Vec::new());
    if !spec.container.read_only_root {
        return Ok((added, left_out));
    }
    let declared = spec.image.config.iter().flat_map(|config| &config.volumes);
    for (number, path) in declared.enumerate() {
        let target = Path::new(path);
        let mounted = volumes.iter();
        if mounted
            .clone()
            .any(|volume| target.starts_with(&volume.target))
        {
            continue;
        }
        if pod::device_problem(&spec.container, path).is_some() {
            left_out.push(path.clone());
            continue;
        }
        let source = work.join(format!("volume-{number}"));
        fs::create_dir(&source)
            .and_then(|()| fs::set_permissions(&source, fs::Permissions::from_mode(0o777)))
            .map_err(FileError::on("create", &source))?;
        volumes.push(own_file(source.clone(), target, false));
        added.push((target.to_owned(), source));
    }
    Ok((added, left_out))
}

/// A file or folder of the shim, which no container can replace.
fn own_file(source: PathBuf, target: &Path, read_only: bool) -> Mounted {
    Mounted {
        what: format!("{}", target.display()),
        source: spec::Source::Own(source),
        target: target.to_owned(),
        read_only,
        needs_descriptor: false,
        image: None,
        folder: None,
        point: None,
    }
}

/// PURE: the mount path of the volume that the termination message lies in, and the message's path in it.
fn message_in_volume(
    termination: &TerminationLog,
    volumes: &[Mounted],
) -> Option<(PathBuf, PathBuf)> {
    let TerminationLog::Mounted { mount, rest, .. } = termination else {
        return None;
    };
    Some((volumes.get(*mount)?.target.clone(), rest.clone()))
}

/// Creates an empty file.
fn touch(folder: &Path, name: &str) -> Result<PathBuf, FileError> {
    let path = folder.join(name);
    File::create(&path).map_err(FileError::on("create", &path))?;
    Ok(path)
}

impl Drop for Folders {
    fn drop(&mut self) {
        for folder in [&self.shared, &self.root, &self.work, &self.private] {
            self.trash.take(folder);
        }
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of the test's own")]
mod tests {
    use std::os::unix::fs::symlink;

    use super::{
        super::super::role::{RestartRule, Role, SlotId},
        *,
    };

    fn termination(kind: &str) -> TerminationLog {
        match kind {
            "own" => TerminationLog::Bind("/srv/x".into()),
            "link" => TerminationLog::Link {
                name: "/dev/termination-log".to_owned(),
                target: "/.knoc/termination-log".into(),
            },
            _ => TerminationLog::Mounted {
                path: "/data/dir/log".into(),
                mount: 0,
                rest: "dir/log".into(),
            },
        }
    }

    /// What the image has there is copied into them, and does not count as written by the container (`sizes`).
    #[test]
    fn the_volumes_of_an_image_lie_in_the_work_folder() {
        let work = tempfile::tempdir().unwrap();
        let config = pb::ImageConfig {
            volumes: ["/data", "/mine/sub", "/dev/nvidia0", "/dev/kfd"]
                .map(str::to_owned)
                .to_vec(),
            ..pb::ImageConfig::default()
        };
        let spec = ContainerSpec {
            id: SlotId::after(0),
            role: Role::Main,
            restart: RestartRule::Never,
            container: pb::Container {
                read_only_root: true,
                limits: Some(pb::Resources {
                    extended: [(pod::NVIDIA.to_owned(), 1)].into(),
                    ..pb::Resources::default()
                }),
                ..pb::Container::default()
            },
            image: pb::ResolvedImage {
                config: Some(config),
                ..pb::ResolvedImage::default()
            },
        };
        let mut volumes = vec![own_file("/elsewhere".into(), Path::new("/mine"), false)];
        let (added, left_out) = add_image_volumes(&spec, work.path(), &mut volumes).unwrap();
        let folder = |number: u8| work.path().join(format!("volume-{number}"));
        assert!(folder(0).is_dir());
        let expected = [("/data", 0), ("/dev/kfd", 3)];
        assert_eq!(
            added,
            expected.map(|(at, number)| (PathBuf::from(at), folder(number)))
        );
        assert_eq!(left_out, ["/dev/nvidia0"], "a device of the GPUs");
        assert_eq!(volumes.len(), 3);
    }

    /// The container can write to `/.knoc`: a link or a pipe that it puts there as its message is not read.
    #[test]
    fn a_message_is_a_plain_file_of_the_container() {
        let base = tempfile::tempdir().unwrap();
        let base = fs::canonicalize(base.path()).unwrap();
        let secret = base.join("key");
        fs::write(&secret, "secret").unwrap();
        let folder = |name: &str| {
            let path = base.join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let trash = Trash::create(base.join("trash")).unwrap();
        for kind in ["own", "link", "volume/dir"] {
            let (private, shared) = (folder("private"), folder("shared"));
            let termination = termination(kind);
            let log = match &termination {
                TerminationLog::Bind(_) => private.join("termination-log"),
                TerminationLog::Link { .. } => shared.join("termination-log"),
                TerminationLog::Mounted { .. } => folder("volume/dir").join("log"),
            };
            let volume = File::open(folder("volume")).unwrap();
            let mut folders = Folders {
                mounts: Mounts::new(
                    &pb::ResolvedImage::default(),
                    "/opt/knoc-agent".into(),
                    private.clone(),
                ),
                shared,
                root: folder("root"),
                work: folder("work"),
                private,
                links: Vec::new(),
                temporary: Vec::new(),
                image_volumes: Vec::new(),
                left_out: Vec::new(),
                settle: false,
                isolated: true,
                termination,
                message: None,
                trash: trash.clone(),
            };
            if kind == "volume/dir" {
                fs::write(&log, "hello").unwrap();
                assert_eq!(folders.termination_message(4096), b"", "not mounted yet");
                folders.message_below(Some(volume.into()));
            }
            fs::write(&log, "hello").unwrap();
            assert_eq!(folders.termination_message(4096), b"hello", "{kind}");
            only_a_plain_file_is_read(&folders, &log, &secret);
        }
    }

    fn only_a_plain_file_is_read(folders: &Folders, log: &Path, secret: &Path) {
        fs::remove_file(log).unwrap();
        symlink(secret, log).unwrap();
        assert_eq!(folders.termination_message(4096), b"");
        fs::remove_file(log).unwrap();
        nix::unistd::mkfifo(log, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(folders.termination_message(4096), b"");
    }
}
