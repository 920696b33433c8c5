//! The node-local folders and files of one attempt. Blocking file work, also on what the pod mounts.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use knoc_proto::pb;
use tokio::net::UnixListener;

use super::super::{
    beneath,
    environment::{self, TerminationLog},
    places::{self, Link},
    pod::Pod,
    scratch::remove_tree,
    volumes::VolumeError,
};
use crate::{
    jobdir::atomic::FileError,
    runtime::{Bind, INSIDE, RuntimeError},
};

/// Why an attempt could not be prepared.
#[derive(Debug, thiserror::Error)]
pub(super) enum PrepareError {
    #[error("prepare the container's folders")]
    File(#[from] FileError),
    #[error("mount a volume")]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Runtime(RuntimeError),
    #[error("start the container runtime")]
    Spawn(#[source] io::Error),
    #[error("prepare the container's pipes")]
    Pipes(#[source] io::Error),
}

/// See the module. Removed when dropped.
#[derive(Debug)]
pub(super) struct Folders {
    /// What the container sees as `/.knoc`.
    pub(super) shared: PathBuf,
    /// What the container writes to its root.
    pub(super) root: PathBuf,
    /// Its `/tmp` and `/var/tmp` where its root has no folder of ours.
    pub(super) work: PathBuf,
    /// In the order of mounting.
    pub(super) binds: Vec<Bind>,
    /// To be made in the container.
    pub(super) links: Vec<Link>,
    /// Folders of the image that everybody may write to.
    pub(super) temporary: Vec<String>,
    /// Is the container's `/etc/passwd` the runtime's, and no volume's?
    pub(super) settle: bool,
    pub(super) termination: TerminationLog,
}

/// The temporary folders of a container, and what the runtime calls them in its work folder.
const TEMPORARY: [(&str, &str); 2] = [("/tmp", "tmp"), ("/var/tmp", "var_tmp")];

const PASSWD: &str = "/etc/passwd";

/// As with other runtimes, the containers of a pod have one `/dev/shm`, unless they mount a volume there.
fn share_memory(pod: &Pod, binds: &mut Vec<Bind>) -> Result<(), PrepareError> {
    let target = Path::new(places::SHARED_MEMORY);
    if binds.iter().any(|bind| bind.target == target) {
        return Ok(());
    }
    let source = pod.scratch.memory("shm")?;
    fs::set_permissions(&source, fs::Permissions::from_mode(0o1777))
        .map_err(FileError::on("set the mode of", &source))?;
    binds.push(Bind {
        source,
        target: target.into(),
        read_only: false,
    });
    Ok(())
}

impl Folders {
    pub(super) fn prepare(
        pod: &Pod,
        index: usize,
        number: u32,
        container: &pb::Container,
    ) -> Result<Self, PrepareError> {
        let id = format!("{index}-{number}");
        let shared = pod.scratch.disk(&format!("c{id}"))?;
        let root = pod.scratch.disk(&format!("r{id}"))?;
        let work = pod.scratch.disk(&format!("w{id}"))?;
        let mut binds = pod.volumes.binds(&container.mounts)?;
        if pod.runtime.isolates() {
            share_memory(pod, &mut binds)?;
        }
        // A link that is in a source by now is the pod's own wish; one that comes later is a container's.
        let mounted: Vec<Bind> = binds
            .iter()
            .map(|bind| Bind {
                source: fs::canonicalize(&bind.source).unwrap_or_else(|_| bind.source.clone()),
                ..bind.clone()
            })
            .collect();
        let termination = environment::termination_log(container, &mounted);
        let mut folders = Self {
            shared,
            root,
            work,
            binds,
            links: Vec::new(),
            temporary: Vec::new(),
            settle: false,
            termination,
        };
        if pod.runtime.isolates() {
            folders.fill(pod)?;
            folders.arrange(container)?;
        }
        Ok(folders)
    }

    /// The mounts in their order, with their mount points.
    fn arrange(&mut self, container: &pb::Container) -> Result<(), PrepareError> {
        if !container.read_only_root {
            let own = places::of_the_image(&TEMPORARY.map(|(folder, _)| folder), &self.binds);
            self.temporary.extend(own.into_iter().map(str::to_owned));
        }
        self.settle = !places::of_the_image(&[PASSWD], &self.binds).is_empty();
        places::order(&mut self.binds);
        self.links = places::leave_devices(&mut self.binds);
        let mut parents = vec![(PathBuf::from(INSIDE), self.shared.clone())];
        // Mounted where the root has no folder of ours.
        for (target, name) in TEMPORARY {
            let source = self.work.join(name);
            fs::create_dir(&source)
                .and_then(|()| fs::set_permissions(&source, fs::Permissions::from_mode(0o1777)))
                .map_err(FileError::on("create", &source))?;
            parents.push((target.into(), source));
        }
        for point in places::mount_points(&parents, &self.binds) {
            let made = if fs::metadata(point.source).is_ok_and(|source| source.is_dir()) {
                beneath::make_folder(&point.place)
            } else {
                beneath::touch(&point.place)
            };
            // It may be there in another form, or be a container's: then the runtime has its say.
            if let Err(error) = made {
                tracing::warn!("mount point {}: {error}", point.place.display());
            }
        }
        Ok(())
    }

    fn fill(&mut self, pod: &Pod) -> Result<(), PrepareError> {
        self.touch("agent")?;
        let log = self.touch("termination-log")?;
        match &self.termination {
            TerminationLog::Mounted(path) => {
                // A folder that cannot be written gives no message.
                beneath::touch(path).ok();
            }
            TerminationLog::Bind(target) => {
                let bind = Bind {
                    source: log,
                    target: target.clone(),
                    read_only: false,
                };
                self.binds.push(bind);
            }
            TerminationLog::Link { .. } => {}
        }
        let target = Path::new("/etc/hosts");
        if !self.mounts(target) {
            let node = fs::read_to_string(target).unwrap_or_default();
            let text = environment::hosts(&node, &pod.facts, &pod.spec().host_aliases);
            let source = self.touch("hosts")?;
            let mut file = File::options()
                .write(true)
                .open(&source)
                .map_err(FileError::on("open", &source))?;
            io::Write::write_all(&mut file, text.as_bytes())
                .map_err(FileError::on("write", &source))?;
            self.binds.push(Bind {
                source,
                target: target.into(),
                read_only: false,
            });
        }
        // A volume at `/etc` covers the runtime's own, but pods have this file everywhere.
        let target = Path::new("/etc/resolv.conf");
        if self.mounts(Path::new("/etc")) && !self.mounts(target) && target.exists() {
            self.binds.push(Bind {
                source: target.into(),
                target: target.into(),
                read_only: true,
            });
        }
        Ok(())
    }

    fn mounts(&self, target: &Path) -> bool {
        self.binds.iter().any(|bind| bind.target == target)
    }

    fn touch(&self, name: &str) -> Result<PathBuf, FileError> {
        let path = self.shared.join(name);
        File::create(&path).map_err(FileError::on("create", &path))?;
        Ok(path)
    }

    /// The socket that the launcher connects to.
    pub(super) fn listen(&self) -> Result<UnixListener, PrepareError> {
        let path = self.shared.join("launch.sock");
        Ok(UnixListener::bind(&path).map_err(FileError::on("listen on", &path))?)
    }

    /// The last `limit` bytes of what the program left as its message; nothing where it is no regular file.
    pub(super) fn termination_message(&self, limit: usize) -> Vec<u8> {
        let path = match &self.termination {
            TerminationLog::Mounted(path) => path.clone(),
            TerminationLog::Link { .. } | TerminationLog::Bind(_) => {
                self.shared.join("termination-log")
            }
        };
        beneath::read_end(&path, limit).unwrap_or_default()
    }
}

impl Drop for Folders {
    fn drop(&mut self) {
        for folder in [&self.shared, &self.root, &self.work] {
            remove_tree(folder);
        }
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of the test's own")]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// `/.knoc` is the container's: what it puts in the place of its message is not read through.
    #[test]
    fn a_message_is_a_plain_file_of_the_container() {
        let home = tempfile::tempdir().unwrap();
        let secret = home.path().join("key");
        fs::write(&secret, "secret").unwrap();
        let base = tempfile::tempdir().unwrap();
        let base = fs::canonicalize(base.path()).unwrap();
        let folder = |name: &str| {
            let path = base.join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        for place in ["own", "volume", "volume/dir"] {
            let shared = folder("shared");
            let log = match place {
                "own" => shared.join("termination-log"),
                place => folder("v0").join(place).join("log"),
            };
            fs::create_dir_all(log.parent().unwrap()).unwrap();
            let folders = Folders {
                shared,
                root: folder("root"),
                work: folder("work"),
                binds: Vec::new(),
                links: Vec::new(),
                temporary: Vec::new(),
                settle: false,
                termination: if place == "own" {
                    TerminationLog::Bind("/srv/x".into())
                } else {
                    TerminationLog::Mounted(log.clone())
                },
            };
            fs::write(&log, "hello").unwrap();
            assert_eq!(folders.termination_message(4096), b"hello");
            fs::remove_file(&log).unwrap();
            symlink(&secret, &log).unwrap();
            assert_eq!(folders.termination_message(4096), b"");
            fs::remove_file(&log).unwrap();
            nix::unistd::mkfifo(&log, nix::sys::stat::Mode::S_IRWXU).unwrap();
            assert_eq!(folders.termination_message(4096), b"");
        }
    }
}
