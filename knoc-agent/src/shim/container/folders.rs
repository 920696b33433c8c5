//! The node-local folders and files of one attempt. Blocking file work, also on what the pod mounts.

use std::{
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use knoc_proto::pb;
use tokio::net::UnixListener;

use super::super::{
    beneath,
    environment::{self, TerminationLog},
    mounts::{Base, Mounts, NameError, Named},
    pod::Pod,
    scratch::remove_tree,
    volumes::VolumeError,
};
use crate::{
    jobdir::atomic::FileError,
    runtime::{Bind, RuntimeError},
};

/// The runtime's own temporary folders, which it mounts below what the pod mounts, and where they are on the host.
const TEMPORARY: [(&str, &str); 2] = [("/tmp", "tmp"), ("/var/tmp", "var_tmp")];

/// Why an attempt could not be prepared.
#[derive(Debug, thiserror::Error)]
pub(super) enum PrepareError {
    #[error("prepare the container's folders")]
    File(#[from] FileError),
    #[error("mount a volume")]
    Volume(#[from] VolumeError),
    /// The helper's message.
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

/// See the module. Removed when dropped.
#[derive(Debug)]
pub(super) struct Folders {
    /// What the container sees as `/.knoc`: it can change all that is in it.
    pub(super) shared: PathBuf,
    /// What the container writes to its root.
    pub(super) root: PathBuf,
    /// Its `/tmp` and `/var/tmp`.
    pub(super) work: PathBuf,
    /// What the container cannot reach: files of ours that are mounted, and the places of [`Mounts`].
    private: PathBuf,
    /// Files of ours that are mounted after the volumes.
    files: Vec<Bind>,
    mounts: Mounts,
    pub(super) termination: TerminationLog,
    /// What the message lies below, if not in one of these folders.
    message: Option<Base>,
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
        let private = pod.scratch.disk(&format!("p{id}"))?;
        let volumes = pod.volumes.mounts(&container.mounts)?;
        let temporary = TEMPORARY.iter().map(|(target, _)| Path::new(target));
        let targets: Vec<&Path> = temporary
            .chain(volumes.iter().map(|mounted| mounted.target.as_path()))
            .collect();
        let termination = environment::termination_log(container, &targets);
        let (message, in_volume) = message_place(&termination, &work);
        let hosts = !targets.contains(&Path::new("/etc/hosts"));
        let mut folders = Self {
            mounts: Mounts::new(pod.image(index), volumes, in_volume, private.clone()),
            shared,
            root,
            work,
            private,
            files: Vec::new(),
            termination,
            message,
        };
        if pod.runtime.isolates() {
            folders.fill(pod, hosts)?;
        }
        Ok(folders)
    }

    fn fill(&mut self, pod: &Pod, hosts: bool) -> Result<(), PrepareError> {
        touch(&self.shared, "agent")?;
        let bind = |source, target: &Path| Bind {
            source,
            target: target.to_owned(),
            read_only: false,
        };
        match (&self.termination, &self.message) {
            (TerminationLog::Mounted { rest, .. }, Some(Base::Folder(folder))) => {
                // A folder that cannot be written gives no message.
                beneath::touch(&folder.join(rest)).ok();
            }
            (TerminationLog::Mounted { .. }, _) => {}
            (TerminationLog::Bind(target), _) => {
                let log = touch(&self.private, "termination-log")?;
                self.files.push(bind(log, target));
            }
            (TerminationLog::Link { .. }, _) => {
                touch(&self.shared, "termination-log")?;
            }
        }
        if hosts {
            let target = Path::new("/etc/hosts");
            let node = fs::read_to_string(target).unwrap_or_default();
            let text = environment::hosts(&node, &pod.facts, &pod.spec().host_aliases);
            let source = touch(&self.private, "hosts")?;
            let mut file = File::options()
                .write(true)
                .open(&source)
                .map_err(FileError::on("open", &source))?;
            io::Write::write_all(&mut file, text.as_bytes())
                .map_err(FileError::on("write", &source))?;
            self.files.push(bind(source, target));
        }
        Ok(())
    }

    /// What the helper and the runtime are to mount.
    pub(super) fn mounts(&self) -> &Mounts {
        &self.mounts
    }

    /// With the files of ours.
    pub(super) fn binds(&self, named: &Named) -> Vec<Bind> {
        named.binds.iter().chain(&self.files).cloned().collect()
    }

    /// The descriptor of the volume that the termination message lies in.
    pub(super) fn message_below(&mut self, base: Option<OwnedFd>) {
        if let Some(base) = base {
            self.message = Some(Base::Descriptor(base));
        }
    }

    /// The socket that the launcher connects to.
    pub(super) fn listen(&self) -> Result<UnixListener, PrepareError> {
        let path = self.shared.join("launch.sock");
        Ok(UnixListener::bind(&path).map_err(FileError::on("listen on", &path))?)
    }

    /// The last `limit` bytes of what the program left as its message; nothing if it is no regular file.
    pub(super) fn termination_message(&self, limit: usize) -> Vec<u8> {
        let read = match &self.termination {
            TerminationLog::Mounted { rest, .. } => match &self.message {
                Some(base) => base.read_end(rest, limit),
                // Nothing was mounted.
                None => return Vec::new(),
            },
            TerminationLog::Link { .. } => {
                beneath::read_end(&self.shared.join("termination-log"), limit)
            }
            TerminationLog::Bind(_) => {
                beneath::read_end(&self.private.join("termination-log"), limit)
            }
        };
        read.unwrap_or_default()
    }
}

/// PURE: what the termination message lies below, if that is known before anything is mounted; else the index of its
/// volume, and its path there.
fn message_place(
    termination: &TerminationLog,
    work: &Path,
) -> (Option<Base>, Option<(usize, PathBuf)>) {
    let TerminationLog::Mounted { mount, rest } = termination else {
        return (None, None);
    };
    match TEMPORARY.get(*mount) {
        Some((_, name)) => (Some(Base::Folder(work.join(name))), None),
        None => (None, Some((mount - TEMPORARY.len(), rest.clone()))),
    }
}

/// An empty file of ours.
fn touch(folder: &Path, name: &str) -> Result<PathBuf, FileError> {
    let path = folder.join(name);
    File::create(&path).map_err(FileError::on("create", &path))?;
    Ok(path)
}

impl Drop for Folders {
    fn drop(&mut self) {
        for folder in [&self.shared, &self.root, &self.work, &self.private] {
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
        for place in ["own", "link", "tmp", "volume/dir"] {
            let private = folder("private");
            let (shared, work) = (folder("shared"), folder("work"));
            let mounted = |mount| TerminationLog::Mounted {
                mount,
                rest: "dir/log".into(),
            };
            let (log, termination) = match place {
                "own" => (
                    private.join("termination-log"),
                    TerminationLog::Bind("/srv/x".into()),
                ),
                "link" => (
                    shared.join("termination-log"),
                    TerminationLog::Link {
                        name: "/dev/termination-log".to_owned(),
                        target: "/.knoc/termination-log".into(),
                    },
                ),
                "tmp" => (folder("work/tmp/dir").join("log"), mounted(0)),
                _ => (folder("volume/dir").join("log"), mounted(2)),
            };
            let (message, in_volume) = message_place(&termination, &work);
            let volume = File::open(folder("volume")).unwrap();
            let image = pb::ResolvedImage::default();
            let mut folders = Folders {
                mounts: Mounts::new(&image, Vec::new(), in_volume.clone(), private.clone()),
                shared,
                root: folder("root"),
                work,
                private,
                files: Vec::new(),
                termination,
                message,
            };
            assert_eq!(in_volume.is_some(), place == "volume/dir");
            folders.message_below(in_volume.map(|_| volume.into()));
            fs::write(&log, "hello").unwrap();
            assert_eq!(folders.termination_message(4096), b"hello", "{place}");
            fs::remove_file(&log).unwrap();
            symlink(&secret, &log).unwrap();
            assert_eq!(folders.termination_message(4096), b"");
            fs::remove_file(&log).unwrap();
            nix::unistd::mkfifo(&log, nix::sys::stat::Mode::S_IRWXU).unwrap();
            assert_eq!(folders.termination_message(4096), b"");
        }
    }
}
