//! Container runtimes: PURE argv of the process that brings up a container and runs our launcher in it.
//!
//! The trait is as narrow as the shim needs: what a container is, as a command line. The program's own argv,
//! environment, directory and stdio travel by the launch protocol and never appear here.

mod apptainer;
mod process;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

/// Where the launcher and its socket lie inside a container.
pub(crate) const INSIDE: &str = knoc_proto::pod::KNOC_FOLDER;

/// A path of the host seen in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bind {
    /// On the host.
    pub source: PathBuf,
    /// In the container.
    pub target: PathBuf,
    /// Not writable there.
    pub read_only: bool,
}

/// How the container sees the image's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Root {
    /// Writable; what is written goes to this node-local folder.
    Overlay(PathBuf),
    /// Writable; what is written goes to memory, 64 MB at most by default.
    Memory,
    /// Not writable.
    ReadOnly,
}

/// Whose GPUs a container sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Gpus {
    /// NVIDIA's.
    pub nvidia: bool,
    /// AMD's.
    pub amd: bool,
}

/// A container to be brought up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sandbox {
    /// SIF file or sandbox folder; empty where the runtime needs none.
    pub image: PathBuf,
    /// Our own executable on the host.
    pub agent: PathBuf,
    /// Node-local folder of this attempt: holds `launch.sock`, and an empty file `agent` to bind over.
    pub folder: PathBuf,
    /// In the order of mounting.
    pub binds: Vec<Bind>,
    /// The pod's host name; empty: the node's.
    pub hostname: String,
    /// How the container sees the image's files.
    pub root: Root,
    /// Node-local folder that holds `/tmp` and `/var/tmp` where what is written to the root goes to no folder; `None`:
    /// they are the image's, and as writable as its root.
    pub work: Option<PathBuf>,
    /// Root's rights inside, by a mapped user namespace.
    pub fakeroot: bool,
    /// The driver's files and devices that it sees.
    pub gpus: Gpus,
}

/// Why a container cannot be brought up with this runtime.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum RuntimeError {
    /// No runtime of this name.
    #[error("there is no container runtime {0:?}")]
    Unknown(String),
    /// The runtime's option syntax has no form for it.
    #[error("the path {0:?} cannot be given to the container runtime")]
    Path(PathBuf),
    /// The runtime has no mounts.
    #[error("the process runtime mounts nothing: {0:?}")]
    NoMounts(PathBuf),
}

/// A runtime: see the module.
pub(crate) trait Runtime: std::fmt::Debug + Send + Sync {
    /// Its stable name.
    fn name(&self) -> &'static str;

    /// Does each container have a PID namespace of its own?
    fn isolates(&self) -> bool;

    /// The roots to try for a writable one, best first: not every site allows each.
    fn writable_roots(&self, overlay: &Path) -> Vec<Root>;

    /// The arguments, program first.
    fn argv(&self, sandbox: &Sandbox) -> Result<Vec<OsString>, RuntimeError>;
}

/// The runtime called `name`, whose executable is `path`.
pub(crate) fn by_name(name: &str, path: &Path) -> Result<Box<dyn Runtime>, RuntimeError> {
    match name {
        "apptainer" => Ok(Box::new(apptainer::Apptainer::new(
            path,
            apptainer::Flavour::Apptainer,
        ))),
        "singularity" => Ok(Box::new(apptainer::Apptainer::new(
            path,
            apptainer::Flavour::Singularity,
        ))),
        "process" => Ok(Box::new(process::Process)),
        other => Err(RuntimeError::Unknown(other.to_owned())),
    }
}
