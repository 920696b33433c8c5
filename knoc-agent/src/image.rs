//! Images: turns the image that a pod names into a file on the shared disk. Names are resolved, and
//! images are pulled and cached.
//!
//! ```text
//! name ──parse──► path under an allowed root ──────────────► config from the SIF itself
//!        └──────► registry name ──tag→digest──► layers ──check──► convert ──► state_dir/images/sha256-….sif + .json
//!                                (registry)    (by us)    │       (runtime)   (renamed into place)
//!                                                         └ a SIF file that was pushed (oras://), or that is in the site's
//!                                                           library (library://), is used as it is
//! ```
//!
//! This runs on the login node before `sbatch`. Pulls are single-flight: if many pods need one
//! image, all of them wait for one conversion, and only a few conversions run at once. Images are
//! cached by digest, so `Always` costs one request to the registry and `IfNotPresent` none. Owner
//! task: none; a pull lives as long as a caller waits for it.
//!
//! A pod may name any registry, so nothing that a registry does may exhaust the agent or make it
//! connect elsewhere:
//!
//! | bound | where |
//! |---|---|
//! | addresses, schemes, redirects, tokens, credentials | `guard`, `http`, `auth`, `login` |
//! | sizes of answers, numbers in lists | `registry`, `manifest` |
//! | concurrent requests and pulls, shared fairly | `slots` |
//! | the time of a check and a conversion that others wait for | `turn` |
//! | progress and size of a layer | `download` |
//! | the unpacked size of an image | `unpacked` |
//! | the cache | `room` |
//!
//! The credentials of a pod's pull secrets are sent to the registry that the pod names, and a cached
//! image that was pulled with credentials is for pods whose own could pull it (`access`). No path
//! outside the site's image roots is opened.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use knoc_contract::jobdir::StateDir;
use knoc_proto::pb;

use self::library::Library;
use crate::{
    command::{Command, CommandError, login_environment},
    config::{Compression, Config, Convert, Registry, RuntimeKind},
    policy::Live,
    scheduler::slurm::{OwnJobs, Size},
};

mod access;
mod auth;
mod blocking;
mod cache;
mod checks;
mod claims;
mod compression;
mod convert;
mod digest;
mod download;
mod file;
mod flight;
#[cfg(any(test, feature = "fuzzed"))]
pub mod fuzzed;
mod guard;
mod http;
mod in_use;
mod library;
mod local;
mod login;
mod manifest;
mod name;
mod progress;
mod pull;
pub mod reference;
mod registry;
mod resolve;
mod room;
mod sif;
mod slots;
mod survivors;
mod turn;
mod unpacked;
mod untrusted;

pub use login::{BadCredentials, Credential, Credentials, Login};
pub use name::{Name, NameError};
pub use progress::PullWatch;
pub use resolve::Images;
pub use room::Hold;

/// An image that a job can run.
#[derive(Debug)]
pub struct ResolvedImage {
    /// SIF file or sandbox directory; if the runtime needs no image, the name that the pod gave.
    pub path: PathBuf,
    /// `docker.io/library/busybox@sha256:…`, or the path of the image file.
    pub image_id: String,
    /// The image's own defaults; empty if it has none.
    pub config: pb::ImageConfig,
    /// Keeps a cached image from being removed until a job directory names it.
    pub hold: Option<Hold>,
    /// The identity of the file at the path that a pod named; a container starts only from this
    /// file.
    pub file: Option<pb::ImageFileId>,
}

/// Why there is no image. Each kind has a waiting reason in Kubernetes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageErrorKind {
    /// The name is invalid, or names a file outside the site's image roots. Trying again does not
    /// help.
    InvalidName,
    /// A source that is not supported, such as `shub://`, or `library://` where the site has no library.
    Unsupported,
    /// A registry that this site does not allow.
    Denied,
    /// The pull policy is Never and the image is not cached.
    NeverPull,
    /// The registry or the conversion failed; a later attempt may succeed.
    Pull,
}

/// An image could not be resolved. Shared by all callers that waited for one pull, so it keeps
/// texts, not source errors.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("image {image:?}: {message}")]
pub struct ImageError {
    /// The image as the pod names it.
    pub image: String,
    /// The kind of failure.
    pub kind: ImageErrorKind,
    /// The message of the registry or of Apptainer.
    pub message: String,
}

impl ImageError {
    fn new(image: &str, kind: ImageErrorKind, message: impl Into<String>) -> Self {
        Self {
            image: image.to_owned(),
            kind,
            message: message.into(),
        }
    }

    /// The pull policy is Never, and the image is not cached or not for this pod.
    fn never(image: &str, present: bool) -> Self {
        let message = if present {
            format!(
                "Container image {image:?} is present, but no credential of the pod has been seen to pull it, and the pull policy is Never"
            )
        } else {
            format!("Container image {image:?} is not present with pull policy of Never")
        };
        Self::new(image, ImageErrorKind::NeverPull, message)
    }

    /// The message of the container's status.
    #[must_use]
    pub fn waiting(&self) -> String {
        let (image, message) = (&self.image, &self.message);
        match self.kind {
            ImageErrorKind::InvalidName if !image.starts_with('/') => format!(
                "Failed to apply default image tag {image:?}: couldn't parse image name {image:?}: invalid reference format: {message}"
            ),
            ImageErrorKind::InvalidName | ImageErrorKind::Unsupported | ImageErrorKind::Denied => {
                format!("Failed to inspect image {image:?}: {message}")
            }
            ImageErrorKind::Pull if image.starts_with('/') => self.to_string(),
            ImageErrorKind::Pull | ImageErrorKind::NeverPull => message.clone(),
        }
    }

    /// The waiting reason of the container's status.
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

    /// Whether a later attempt may succeed with the same pod.
    #[must_use]
    pub fn retryable(&self) -> bool {
        match self.kind {
            ImageErrorKind::InvalidName | ImageErrorKind::Unsupported | ImageErrorKind::Denied => {
                false
            }
            // A user may put the image there by hand; the kubelet waits too.
            ImageErrorKind::NeverPull | ImageErrorKind::Pull => true,
        }
    }
}

/// What image resolution needs from the site file.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The container runtime; if `None`, containers are processes of the host and images are only
    /// names.
    pub program: Option<PathBuf>,
    /// The whole environment of the runtime's commands.
    pub env: BTreeMap<String, String>,
    /// The state directory: it holds the cache, and the job directories that name the images in
    /// use.
    pub state: StateDir,
    /// Directories under which pods may name image files and sandboxes.
    pub roots: Vec<PathBuf>,
    /// Whether other users may own and write the files under the roots.
    pub trust_shared_roots: bool,
    /// Mirrors; the first match wins.
    pub registries: Vec<Registry>,
    /// The site's library, if it has one.
    pub(crate) library: Option<Library>,
    /// The current policy, which says which images pods may name.
    pub policy: Live,
    /// How the files of new images are compressed.
    pub compression: Compression,
    /// Submits the jobs that convert images; if `None`, they are converted on the login node.
    pub(crate) jobs: Option<Arc<OwnJobs>>,
    /// Limits on sizes and times.
    pub limits: Bounds,
    /// How many conversions may run at the same time.
    pub concurrency: usize,
    /// The deadline of one request to a registry.
    pub registry_timeout: Duration,
    /// The deadline of one conversion.
    pub pull_timeout: Duration,
}

/// What one image, and all of them together, may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The largest size of an image by its manifest, in bytes.
    pub size: u64,
    /// The largest unpacked size of an image, in bytes.
    pub unpacked: u64,
    /// The largest size of all cached images and of what pulls have on disk, in bytes.
    pub cache: u64,
    /// How long a layer may make too little progress.
    pub stall: Duration,
}

impl Settings {
    /// The settings of the site file; `program` is the site's container runtime, if one was found.
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
            library: library(site),
            policy,
            compression: site.images.compression,
            jobs: jobs(site),
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

    /// A command of the runtime, with the environment of the site file.
    fn command(&self) -> Option<Command> {
        let command = Command::new(self.program.as_ref()?);
        Some(command.envs(&self.env).env("LC_ALL", "C"))
    }
}

/// The site's library.
fn library(site: &Config) -> Option<Library> {
    let address = site.images.library.as_deref()?;
    Some(Library::new(address, site.images.library_token.clone()))
}

/// What submits the jobs that convert images, if the site wants jobs for that.
fn jobs(site: &Config) -> Option<Arc<OwnJobs>> {
    if site.images.convert == Convert::Login {
        return None;
    }
    let limits = Size {
        partition: site.images.convert_partition.clone(),
        cpus: site.images.convert_cpus,
        memory: site.images.convert_memory,
        time: site.images.convert_time,
    };
    Some(Arc::new(OwnJobs::new(site.into(), limits)))
}

/// The runtime's own version text, such as `apptainer 1.4.5`.
pub async fn runtime_version(settings: &Settings) -> Result<String, CommandError> {
    let Some(command) = settings.command() else {
        return Ok("process".to_owned());
    };
    let output = command.arg("--version").run().await?;
    // "apptainer version 1.4.5", "singularity-ce version 4.1.0-bookworm".
    Ok(output.text().trim().replace(" version ", " "))
}
