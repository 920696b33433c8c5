//! From the image a pod names to a file on the shared disk: resolved, pulled, kept.
//!
//! ```text
//! name ──parse──► path under an allowed root ──────────────► config from the SIF itself
//!        └──────► registry name ──tag→digest──► layers ──check──► convert ──► state_dir/images/sha256-….sif + .json
//!                                (registry)    (by us)            (runtime)   (renamed into place)
//! ```
//!
//! Runs on the login node before `sbatch`. A pull is single-flight: many pods with one image wait for one conversion,
//! and at most a few run at once. The digest is what is kept, so that `Always` costs one question to the registry and
//! `IfNotPresent` none. Owner task: none; a pull lives as long as anybody waits for it.
//!
//! A registry is whoever a pod names, so nothing it does may exhaust the agent or lead it elsewhere:
//!
//! | bound | where |
//! |---|---|
//! | addresses, schemes, redirects, tokens | `guard`, `http`, `auth` |
//! | sizes of answers, numbers in lists | `registry`, `manifest` |
//! | questions and pulls at once, shared fairly | `slots` |
//! | progress and size of a layer | `download` |
//! | what an image is unpacked | `unpacked` |
//! | the cache | `room` |
//!
//! What it never does: it gives no credentials to a registry (pull secrets are refused at admission), and it takes no
//! path outside the site's roots.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use knoc_contract::jobdir::StateDir;
use knoc_proto::pb;

use crate::command::{Command, CommandError, login_environment};
use crate::config::{Config, Registry, RuntimeKind};
use crate::policy::Live;

mod auth;
mod cache;
mod checks;
mod claims;
mod digest;
mod download;
mod file;
mod flight;
#[cfg(any(test, feature = "fuzzed"))]
pub mod fuzzed;
mod guard;
mod http;
mod in_use;
mod local;
mod manifest;
mod name;
mod pull;
pub mod reference;
mod registry;
mod resolve;
mod room;
mod sif;
mod slots;
mod unpacked;
mod words;

pub use name::{Name, NameError};
pub use resolve::Images;
pub use room::Hold;

/// An image that a job can run.
#[derive(Debug)]
pub struct ResolvedImage {
    /// SIF file or sandbox folder; what the pod named, where the runtime needs no image.
    pub path: PathBuf,
    /// `docker.io/library/busybox@sha256:…`, or the path.
    pub image_id: String,
    /// The image's own defaults; empty where it has none.
    pub config: pb::ImageConfig,
    /// Keeps an image of the cache there until a job directory names it.
    pub hold: Option<Hold>,
    /// What was found at a path that a pod named; a container starts only from that.
    pub file: Option<pb::ImageFileId>,
}

/// Why there is no image; Kubernetes has a word for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageErrorKind {
    /// The name cannot be one, or names a file that this site does not serve. Trying again does not help.
    InvalidName,
    /// A source that is refused by name, such as `oras://`.
    Unsupported,
    /// A registry that this site does not allow.
    Denied,
    /// The policy is Never and the image is not here.
    NeverPull,
    /// Registry or conversion failed; it may work later.
    Pull,
}

/// There is no image. Shared by all who waited for one pull, so it keeps texts, not causes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("image {image:?}: {words}")]
pub struct ImageError {
    /// As the pod names it.
    pub image: String,
    /// What kind of failure.
    pub kind: ImageErrorKind,
    /// The registry's or Apptainer's own words.
    pub words: String,
}

impl ImageError {
    fn new(image: &str, kind: ImageErrorKind, words: impl Into<String>) -> Self {
        Self {
            image: image.to_owned(),
            kind,
            words: words.into(),
        }
    }

    /// The container's waiting reason.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self.kind {
            ImageErrorKind::InvalidName | ImageErrorKind::Unsupported | ImageErrorKind::Denied => {
                "InvalidImageName"
            }
            ImageErrorKind::NeverPull => "ErrImageNeverPull",
            ImageErrorKind::Pull => "ErrImagePull",
        }
    }

    /// May it work later, with nothing changed in the pod?
    #[must_use]
    pub fn retryable(&self) -> bool {
        match self.kind {
            ImageErrorKind::InvalidName | ImageErrorKind::Unsupported | ImageErrorKind::Denied => {
                false
            }
            // Somebody may put the image there by hand; the kubelet waits too.
            ImageErrorKind::NeverPull | ImageErrorKind::Pull => true,
        }
    }
}

/// What it needs of the site file.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `None`: containers are processes of the host, images are only names.
    pub program: Option<PathBuf>,
    /// Of the runtime's commands, and the whole of it.
    pub env: BTreeMap<String, String>,
    /// The cache is in it, and the job directories that name what is in use.
    pub state: StateDir,
    /// Folders under which pods may name image files and sandboxes.
    pub roots: Vec<PathBuf>,
    /// Others may own and write what lies under the roots.
    pub trust_shared_roots: bool,
    /// Mirrors, first match wins.
    pub registries: Vec<Registry>,
    /// Says which images pods may name, as the site file has it now.
    pub policy: Live,
    /// Sizes and patience.
    pub limits: Bounds,
    /// Conversions at the same time.
    pub concurrency: usize,
    /// Of one question to a registry.
    pub registry_timeout: Duration,
    /// Of one conversion.
    pub pull_timeout: Duration,
}

/// What one image, and all of them, may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of an image by its manifest.
    pub size: u64,
    /// Bytes of an image that is unpacked.
    pub unpacked: u64,
    /// Bytes of all images in the cache.
    pub cache: u64,
    /// How long a layer may make too little progress.
    pub stall: Duration,
}

impl Settings {
    /// As the site file has it; `program` is what the site's runtime was found to be.
    #[must_use]
    pub fn of_site(site: &Config, program: Option<PathBuf>, state: StateDir, policy: Live) -> Self {
        let none = matches!(site.runtime, RuntimeKind::Process);
        let mut env = login_environment();
        env.insert("PATH".to_owned(), "/usr/local/bin:/usr/bin:/bin".to_owned());
        env.extend(site.env.clone());
        Self {
            program: program.filter(|_| !none),
            env,
            state,
            roots: site.image_roots.clone(),
            trust_shared_roots: site.trust_shared_roots,
            registries: site.registries.clone(),
            policy,
            limits: Bounds {
                size: site.limits.image_size,
                unpacked: site.limits.image_unpacked,
                cache: site.limits.image_cache,
                stall: site.limits.image_stall,
            },
            concurrency: site.limits.image_concurrency.max(1),
            registry_timeout: Duration::from_secs(30),
            pull_timeout: Duration::from_hours(1),
        }
    }

    /// A command of the runtime.
    fn command(&self) -> Option<Command> {
        let command = Command::new(self.program.as_ref()?);
        Some(command.envs(&self.env).env("LC_ALL", "C"))
    }
}

/// `apptainer 1.4.5`, as the program itself says.
pub async fn runtime_version(settings: &Settings) -> Result<String, CommandError> {
    let Some(command) = settings.command() else {
        return Ok("process".to_owned());
    };
    let output = command.arg("--version").run().await?;
    // "apptainer version 1.4.5", "singularity-ce version 4.1.0-bookworm".
    Ok(output.text().trim().replace(" version ", " "))
}
