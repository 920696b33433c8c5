//! The work before the submission: the job directory, the shim's keys, the images, and `job.pb`.
//!
//! A task of the actor looks up and pulls the images, since that may take long. The actor itself
//! then writes `job.pb`, since the shape may have changed in the meantime. The outcome is `Staged`
//! or `StageFailed`. Staging is idempotent: after a restart it is repeated over what exists.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use knoc_contract::jobdir::{
    JobDir, JobDirError,
    atomic::{self, FileError},
};
use knoc_link::{CredentialsError, pinned::KeyPair};
use knoc_proto::{
    error::chain,
    pb,
    pod::{PodSpec, no_privileges},
};
use prost::Message as _;
use tokio::{sync::mpsc, time::Instant};

use super::{
    input::Input,
    non_root,
    record::Record,
    state::{Event, Note},
};
use crate::{
    config::{MemoryFallback, UserIds},
    image::{Credentials, Hold, PullWatch},
    site::Site,
};

/// Why staging cannot continue, with Kubernetes' reasons where they exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageError {
    /// The container that failed; empty for the pod as a whole.
    pub container: String,
    /// The container's image, if that is what failed; otherwise empty.
    pub image: String,
    /// `ErrImagePull`, `StagingFailed` …
    pub reason: String,
    /// The message for users.
    pub message: String,
}

impl StageError {
    /// An error that does not concern a single container.
    pub(crate) fn of_pod(error: &(dyn std::error::Error + 'static)) -> Self {
        let reason = "StagingFailed".to_owned();
        Self {
            container: String::new(),
            image: String::new(),
            reason,
            message: chain(error),
        }
    }
}

/// How many images of one pod are looked up at the same time: a pod may have hundreds of
/// containers.
const IMAGES_AT_ONCE: usize = 4;
/// A pull that takes longer than this gets an Event.
const WORTH_A_NOTE: Duration = Duration::from_millis(300);
/// Then its progress gets an Event after this time, and after twice as long each time.
const PROGRESS: Duration = Duration::from_secs(30);
/// An image in the cache is found faster than this, even on a shared file system.
const CACHE_LOOKUP: Duration = Duration::from_millis(50);

/// The images of a pod. They stay in the cache until this is dropped, which happens once `job.pb`
/// names them.
#[derive(Debug, Default)]
pub(crate) struct Found {
    images: Vec<pb::ResolvedImage>,
    _holds: Vec<Hold>,
}

impl Found {
    fn new(all: Vec<(pb::ResolvedImage, Option<Hold>)>) -> Self {
        let (images, holds): (_, Vec<_>) = all.into_iter().unzip();
        Self {
            images,
            _holds: holds.into_iter().flatten().collect(),
        }
    }

    /// The images' locations, in the order of the containers.
    pub(crate) fn images(&self) -> &[pb::ResolvedImage] {
        &self.images
    }
}

/// An image that a pod needs.
#[derive(Debug, Clone)]
struct Wanted {
    /// The container; of a volume the first one that mounts it.
    container: pb::Container,
    image: String,
    policy: pb::PullPolicy,
    /// The volume that it is for; empty: for the container itself.
    volume: String,
}

impl Wanted {
    fn of_container(container: &pb::Container) -> Self {
        Self {
            image: container.image.clone(),
            policy: container.pull_policy(),
            volume: String::new(),
            container: container.clone(),
        }
    }

    fn of_volume(spec: &PodSpec, volume: &pb::Volume) -> Option<Self> {
        let Some(pb::volume::Source::Image(image)) = &volume.source else {
            return None;
        };
        let mut all = spec.all_containers();
        let mounts = |one: &&pb::Container| one.mounts.iter().any(|it| it.volume == volume.name);
        Some(Self {
            container: all.find(mounts).cloned().unwrap_or_default(),
            image: image.reference.clone(),
            policy: image.pull_policy(),
            volume: volume.name.clone(),
        })
    }

    /// All images of a pod: those of the containers, then those of the volumes.
    fn all(spec: &PodSpec) -> Vec<Self> {
        let volumes = spec.volumes.iter();
        let volumes = volumes.filter_map(|volume| Self::of_volume(spec, volume));
        let containers = spec.all_containers().map(Self::of_container);
        containers.chain(volumes).collect()
    }
}

/// The location of an image, pulled if necessary. Tells the actor about pulls.
async fn image(
    site: &Site,
    spec: &PodSpec,
    wanted: Wanted,
    credentials: &Credentials,
    own: &mpsc::WeakSender<Input>,
) -> Result<(pb::ResolvedImage, Option<Hold>), StageError> {
    let container = &wanted.container;
    let began = Instant::now();
    let watch = PullWatch::default();
    let resolving = site.images.resolve_watched(
        &wanted.image,
        wanted.policy,
        credentials.of(&wanted.image),
        &watch,
    );
    tokio::pin!(resolving);
    let mut next = WORTH_A_NOTE;
    let resolved = loop {
        tokio::select! {
            biased;
            resolved = &mut resolving => break resolved,
            () = tokio::time::sleep_until(began + next) => {
                let first = next == WORTH_A_NOTE;
                let how_far = watch.progress().filter(|_| !first);
                let how_far = how_far.map_or_else(String::new, |text| format!(": {text}"));
                let message = format!("Pulling image {:?}{how_far}", wanted.image);
                note(own, container, "Pulling", message).await;
                next = if first { PROGRESS } else { next.saturating_mul(2) };
            }
        }
    };
    let resolved = resolved.map_err(|error| StageError {
        container: container.name.clone(),
        image: wanted.image.clone(),
        reason: error.reason().to_owned(),
        message: error.waiting(),
    })?;
    match pulled(&wanted.image, &watch, began.elapsed()) {
        Some(message) => note(own, container, "Pulled", message).await,
        None => tell(own, present(&container.name, &wanted.image)).await,
    }
    answer(spec, &wanted, resolved).map_err(|message| StageError {
        container: container.name.clone(),
        image: String::new(),
        reason: "CreateContainerConfigError".to_owned(),
        message,
    })
}

/// The message about an image that was pulled; `None` if it was there already.
fn pulled(image: &str, watch: &PullWatch, took: Duration) -> Option<String> {
    let (waited, bytes) = watch.pulled()?;
    let (alone, took) = (
        took.saturating_sub(waited).as_secs_f64(),
        took.as_secs_f64(),
    );
    Some(format!(
        "Successfully pulled image {image:?} in {alone:.3}s ({took:.3}s including waiting). Image size: {bytes} bytes."
    ))
}

async fn note(
    own: &mpsc::WeakSender<Input>,
    container: &pb::Container,
    reason: &'static str,
    message: String,
) {
    let container = container.name.clone();
    tell(
        own,
        Note {
            warning: false,
            reason,
            message,
            container,
        },
    )
    .await;
}

async fn tell(own: &mpsc::WeakSender<Input>, note: Note) {
    if let Some(own) = own.upgrade() {
        // The send fails only if the actor is about to end, and its notes end with it.
        drop(own.send(Input::Event(Event::Note(note))).await);
    }
}

/// The note about an image that needed no pull.
fn present(container: &str, image: &str) -> Note {
    Note {
        warning: false,
        reason: "Pulled",
        message: format!(
            "Container image {image:?} already present on machine and can be accessed by the pod"
        ),
        container: container.to_owned(),
    }
}

/// The notes about the images of a pod none of which needed a pull.
pub(crate) fn all_present(spec: &PodSpec) -> Vec<Note> {
    let all = Wanted::all(spec).into_iter();
    all.map(|wanted| present(&wanted.container.name, &wanted.image))
        .collect()
}

/// The image of a container that was not part of the pod, or had another image, when the pod was admitted, if the site's
/// policy allows it.
pub(crate) async fn image_of(
    site: &Site,
    spec: &PodSpec,
    container: pb::Container,
    credentials: &Credentials,
    own: &mpsc::WeakSender<Input>,
) -> Result<Found, StageError> {
    allowed(site, &container)?;
    let wanted = Wanted::of_container(&container);
    let found = image(site, spec, wanted, credentials, own).await?;
    Ok(Found::new(vec![found]))
}

/// Whether the site's policy allows the privileges and the image of the container.
fn allowed(site: &Site, container: &pb::Container) -> Result<(), StageError> {
    let refused = |reason: &str, message: String| StageError {
        container: container.name.clone(),
        image: String::new(),
        reason: reason.to_owned(),
        message,
    };
    if container.privileged && !site.policy.now().maps_privileged() {
        let message = no_privileges(&container.name);
        return Err(refused("CreateContainerConfigError", message));
    }
    let checked = site.images.check(&container.image);
    checked.map_err(|error| refused(error.reason(), error.to_string()))
}

/// The image, without a note. `None` if there is none yet; the usual staging then reports the reason.
async fn image_without_note(
    site: &Site,
    spec: &PodSpec,
    wanted: Wanted,
    credentials: &Credentials,
) -> Option<(pb::ResolvedImage, Option<Hold>)> {
    let credentials = credentials.of(&wanted.image);
    let resolved = site
        .images
        .resolve(&wanted.image, wanted.policy, credentials);
    let resolved = resolved.await.ok()?;
    answer(spec, &wanted, resolved).ok()
}

/// The images of a pod if all of them are found within [`CACHE_LOOKUP`]. Otherwise the pod is staged as
/// usual.
pub(crate) async fn cached_images(
    site: &Site,
    spec: &PodSpec,
    credentials: Arc<Credentials>,
) -> Option<Found> {
    let resolving = Wanted::all(spec).into_iter();
    let resolving = resolving.map(|wanted| image_without_note(site, spec, wanted, &credentials));
    let resolving: Vec<_> = resolving.collect();
    let resolving = stream::iter(resolving).buffered(IMAGES_AT_ONCE);
    let found = tokio::time::timeout(CACHE_LOOKUP, resolving.collect::<Vec<_>>());
    let found: Option<Vec<_>> = found.await.ok()?.into_iter().collect();
    found.map(Found::new)
}

/// The resolved image as the job file has it, or why the container must not be started with it.
fn answer(
    spec: &PodSpec,
    wanted: &Wanted,
    resolved: crate::image::ResolvedImage,
) -> Result<(pb::ResolvedImage, Option<Hold>), String> {
    let of_container = wanted.volume.is_empty();
    if of_container {
        let own_file = resolved.file.is_some();
        non_root::check(spec, &wanted.container, &resolved.config.user, own_file)?;
    }
    let image = pb::ResolvedImage {
        container: if of_container {
            wanted.container.name.clone()
        } else {
            String::new()
        },
        volume: wanted.volume.clone(),
        path: resolved.path.to_string_lossy().into_owned(),
        image_id: resolved.image_id,
        config: Some(resolved.config),
        file: resolved.file,
        image: wanted.image.clone(),
    };
    Ok((image, resolved.hold))
}

/// Why the job directory of a new pod could not be created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AcceptError {
    /// The keys of the shim's link could not be created.
    #[error("make the keys of the shim's link")]
    Keys {
        #[source]
        source: CredentialsError,
    },
    #[error(transparent)]
    JobDir(#[from] JobDirError),
}

impl From<FileError> for AcceptError {
    fn from(error: FileError) -> Self {
        Self::JobDir(error.into())
    }
}

/// Creates the job directory of a new pod, which `EnsurePod` promises to be on disk. Returns the
/// pin of the shim's key.
///
/// Nothing was there before, so no file is replaced: all files are written, then synced
/// concurrently. A crash in between leaves a folder without a complete record. Nothing was promised
/// about it, and the next start removes it.
pub(crate) fn accept(
    dir: &JobDir,
    job: &pb::JobFile,
    record: &Record,
    values: Option<pb::PodValues>,
) -> Result<String, AcceptError> {
    let pair = KeyPair::generate(&format!("knoc shim {}", dir.uid()));
    let pair = pair.map_err(|source| AcceptError::Keys { source })?;
    dir.create()?;
    let (cert, key) = dir.link_pair();
    let record_path = dir.record_path();
    let record = serde_json::to_vec_pretty(record).map_err(|source| JobDirError::Json {
        path: record_path.clone(),
        source,
    })?;
    let mut files = vec![
        (key, pair.key_pem().as_bytes().to_vec()),
        (cert, pair.cert_pem().as_bytes().to_vec()),
        (dir.spec_path(), job.encode_to_vec()),
        (record_path, record),
    ];
    files.extend(values.map(|values| {
        let path = dir.values_dir().join(values.revision.to_string());
        (path, values.encode_to_vec())
    }));
    let parent = dir.path().parent().unwrap_or_else(|| dir.path());
    atomic::create_together(&files, &[dir.path(), &dir.values_dir(), parent], 0o600)?;
    Ok(pair.spki().to_owned())
}

/// Creates the shim's key pair if it does not exist. Returns its pin.
pub(crate) fn link_pin(dir: &JobDir) -> Result<String, StageError> {
    let (cert, key) = dir.link_pair();
    if let Ok(pair) = KeyPair::from_files(&cert, &key) {
        return Ok(pair.spki().to_owned());
    }
    let pair = KeyPair::generate(&format!("knoc shim {}", dir.uid()))
        .map_err(|e| StageError::of_pod(&e))?;
    atomic::replace(&key, pair.key_pem().as_bytes(), 0o600).map_err(|e| StageError::of_pod(&e))?;
    atomic::replace(&cert, pair.cert_pem().as_bytes(), 0o600)
        .map_err(|e| StageError::of_pod(&e))?;
    Ok(pair.spki().to_owned())
}

/// The locations of a pod's images, pulled if necessary.
pub(crate) async fn resolve(
    site: Arc<Site>,
    spec: Arc<PodSpec>,
    credentials: Arc<Credentials>,
    own: mpsc::WeakSender<Input>,
) -> Result<Found, StageError> {
    let images = Wanted::all(&spec).into_iter();
    let images = images.map(|wanted| image(&site, &spec, wanted, &credentials, &own));
    // Collected, because a stream over the borrowing iterator is not `Send` and could not be
    // spawned.
    let images: Vec<_> = images.collect();
    // The image module bounds how many pulls run at the same time, over all pods.
    let images = stream::iter(images).buffered(IMAGES_AT_ONCE);
    images.try_collect().await.map(Found::new)
}

/// The `job.pb` of a pod whose images are known.
pub(crate) fn job_file(
    site: &Site,
    spec: &pb::PodSpec,
    images: Vec<pb::ResolvedImage>,
    cluster_id: String,
) -> pb::JobFile {
    let config = &site.config;
    let millis =
        |duration: std::time::Duration| duration.as_millis().try_into().unwrap_or(i64::MAX);
    pb::JobFile {
        spec: Some(spec.clone()),
        images,
        runtime: site.runtime.name.clone(),
        runtime_path: site.runtime.path.to_string_lossy().into_owned(),
        runtime_env: config.env.clone().into_iter().collect(),
        settings: Some(pb::ShimSettings {
            log_max_bytes: config.logs.max_bytes,
            log_max_files: config.logs.max_files,
            backoff_initial_ms: millis(config.backoff.initial),
            backoff_max_ms: millis(config.backoff.max),
            values_wait_ms: millis(config.values.wait),
            scratch: config
                .job
                .scratch
                .clone()
                .unwrap_or_else(|| "/tmp".to_owned()),
            log_debug: tracing::enabled!(tracing::Level::DEBUG),
            memory_on_disk: config.values.memory_fallback == MemoryFallback::Disk,
            log_max_pod_bytes: config.logs.max_pod_bytes,
            network: pb::NetworkMode::from(config.job.network).into(),
            network_ipv6: config.job.network_ipv6,
            node_dns_suffixes: config.job.node_dns_suffixes.clone(),
            own_ids: config.job.user_ids == UserIds::Own,
        }),
        cluster_id,
        version: site.versions.own().to_owned(),
        site_binds: config.site_binds(),
        host_paths: Some(pb::HostPathPolicy {
            mapped: site.policy.now().all_mapped(&spec.volumes),
            ..(&site.host_paths()).into()
        }),
        egress: site.egress.network(&spec.node_name),
        srun: spec
            .job
            .as_ref()
            .filter(|job| job.mpi.is_some())
            .and_then(|_| site.scheduler.srun())
            .map(|srun| srun.to_string_lossy().into_owned())
            .unwrap_or_default(),
    }
}
