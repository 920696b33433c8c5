//! The node-local folders and files of one attempt. Blocking file work, also on what the pod mounts.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use knoc_proto::pb;
use tokio::net::UnixListener;

use super::super::{
    beneath,
    environment::{self, TerminationLog},
    pod::Pod,
    scratch::Trash,
    volumes::VolumeError,
};
use crate::{
    jobdir::atomic::FileError,
    runtime::{Bind, RuntimeError},
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

/// See the module. When dropped they go into the trash, so it takes no time whatever the container wrote.
#[derive(Debug)]
pub(super) struct Folders {
    /// What the container sees as `/.knoc`.
    pub(super) shared: PathBuf,
    /// What the container writes to its root.
    pub(super) root: PathBuf,
    /// Its `/tmp` and `/var/tmp`.
    pub(super) work: PathBuf,
    pub(super) binds: Vec<Bind>,
    pub(super) termination: TerminationLog,
    trash: Trash,
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
        let binds = pod.volumes.binds(&container.mounts)?;
        // The runtime's own temporary folders are mounted too, below what the pod mounts.
        let temporary = |target: &str, name: &str| Bind {
            source: work.join(name),
            target: target.into(),
            read_only: false,
        };
        let mut mounted = vec![temporary("/tmp", "tmp"), temporary("/var/tmp", "var_tmp")];
        // A link that is in a source by now is the pod's own wish; one that comes later is a container's.
        mounted.extend(binds.iter().map(|bind| Bind {
            source: fs::canonicalize(&bind.source).unwrap_or_else(|_| bind.source.clone()),
            ..bind.clone()
        }));
        let termination = environment::termination_log(container, &mounted);
        let mut folders = Self {
            shared,
            root,
            work,
            binds,
            termination,
            trash: pod.scratch.trash(),
        };
        if pod.runtime.isolates() {
            folders.fill(pod)?;
        }
        Ok(folders)
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
        if !self.binds.iter().any(|bind| bind.target == target) {
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
        Ok(())
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
            self.trash.take(folder);
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
        let trash = Trash::create(base.join("trash")).unwrap();
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
                termination: if place == "own" {
                    TerminationLog::Bind("/srv/x".into())
                } else {
                    TerminationLog::Mounted(log.clone())
                },
                trash: trash.clone(),
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
