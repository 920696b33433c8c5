//! What happens before the submission: the job directory, the shim's keys, the images, `job.pb`.
//!
//! Runs inside the actor's effect task; its outcome becomes `Staged` or `StageFailed`. Idempotent: after a restart all
//! of it is done again over what is there.

use std::{sync::Arc, time::Duration};

use knoc_proto::{error::chain, link::pinned::KeyPair, pb};
use tokio::{sync::mpsc, time::Instant};

use super::{
    actor::Input,
    state::{Event, Note},
};
use crate::{
    config::AtRest,
    jobdir::{JobDir, JobDirError, atomic},
    site::Site,
};

/// Why staging does not go on, in Kubernetes' words where it has some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageError {
    /// The container it is about; empty: the pod.
    pub container: String,
    /// `ErrImagePull`, `StagingFailed` …
    pub reason: String,
    /// For people.
    pub message: String,
}

impl StageError {
    fn files(error: &JobDirError) -> Self {
        let reason = "StagingFailed".to_owned();
        Self {
            container: String::new(),
            reason,
            message: chain(error),
        }
    }
}

/// A pull that takes longer than this is worth an Event.
const WORTH_A_NOTE: Duration = Duration::from_millis(300);

/// Where the image of `container` lies, fetched if need be. Tells the actor of pulls.
async fn image(
    site: &Site,
    container: &pb::Container,
    own: &mpsc::WeakSender<Input>,
) -> Result<pb::ResolvedImage, StageError> {
    let began = Instant::now();
    let resolving = site
        .images
        .resolve(&container.image, container.pull_policy());
    tokio::pin!(resolving);
    let mut pulling = false;
    let resolved = loop {
        tokio::select! {
            biased;
            resolved = &mut resolving => break resolved,
            () = tokio::time::sleep(WORTH_A_NOTE), if !pulling => {
                pulling = true;
                let message = format!("Pulling image {:?}", container.image);
                note(own, container, "Pulling", message).await;
            }
        }
    };
    let resolved = resolved.map_err(|error| StageError {
        container: container.name.clone(),
        reason: error.reason().to_owned(),
        message: error.to_string(),
    })?;
    let message = if pulling {
        let seconds = began.elapsed().as_secs_f64();
        format!(
            "Successfully pulled image {:?} in {seconds:.1}s",
            container.image
        )
    } else {
        format!(
            "Container image {:?} already present on machine",
            container.image
        )
    };
    note(own, container, "Pulled", message).await;
    Ok(pb::ResolvedImage {
        container: container.name.clone(),
        path: resolved.path.to_string_lossy().into_owned(),
        image_id: resolved.image_id,
        config: Some(resolved.config),
    })
}

async fn note(
    own: &mpsc::WeakSender<Input>,
    container: &pb::Container,
    reason: &'static str,
    message: String,
) {
    let container = container.name.clone();
    let note = Note {
        warning: false,
        reason,
        message,
        container,
    };
    if let Some(own) = own.upgrade() {
        // The actor is about to end: its notes with it.
        drop(own.send(Input::Event(Event::Note(note))).await);
    }
}

/// Makes the job directory with the pod's shape and values: what `EnsurePod` promises to be on disk, but the record.
pub(crate) fn accept(
    dir: &JobDir,
    spec: &pb::PodSpec,
    cluster_id: &str,
    values: &pb::PodValues,
    at_rest: AtRest,
) -> Result<(), JobDirError> {
    dir.create()?;
    if at_rest == AtRest::File {
        dir.write_values(values)?;
    }
    let job = pb::JobFile {
        spec: Some(spec.clone()),
        cluster_id: cluster_id.to_owned(),
        ..pb::JobFile::default()
    };
    dir.write_spec(&job)?;
    Ok(())
}

/// The shim's key pair, made where it is not there yet. Returns its pin.
pub(crate) fn link_pin(dir: &JobDir) -> Result<String, StageError> {
    let (cert, key) = dir.link_pair();
    let failed = |error: &(dyn std::error::Error + 'static)| StageError {
        container: String::new(),
        reason: "StagingFailed".to_owned(),
        message: chain(error),
    };
    if let Ok(pair) = KeyPair::from_files(&cert, &key) {
        return Ok(pair.spki().to_owned());
    }
    let pair = KeyPair::generate(&format!("knoc shim {}", dir.uid())).map_err(|e| failed(&e))?;
    atomic::replace(&key, pair.key_pem().as_bytes(), 0o600).map_err(|e| failed(&e))?;
    atomic::replace(&cert, pair.cert_pem().as_bytes(), 0o600).map_err(|e| failed(&e))?;
    Ok(pair.spki().to_owned())
}

/// Resolves the images and completes `job.pb`.
pub(crate) async fn stage(
    site: Arc<Site>,
    dir: JobDir,
    spec: Arc<pb::PodSpec>,
    cluster_id: String,
    own: mpsc::WeakSender<Input>,
) -> Result<(), StageError> {
    let containers = spec.init_containers.iter().chain(&spec.containers);
    let images = containers.map(|container| image(&site, container, &own));
    // Side by side: how many pulls really run at once is the image module's bound.
    let images = futures::future::try_join_all(images).await?;
    let job = job_file(&site, &spec, images, cluster_id);
    let written = tokio::task::spawn_blocking(move || dir.write_spec(&job)).await;
    match written {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(StageError::files(&error.into())),
        Err(error) => Err(StageError {
            container: String::new(),
            reason: "StagingFailed".to_owned(),
            message: chain(&error),
        }),
    }
}

/// `job.pb` of a pod whose images are known.
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
            scratch: config
                .job
                .scratch
                .clone()
                .unwrap_or_else(|| "/tmp".to_owned()),
            ..pb::ShimSettings::default()
        }),
        cluster_id,
    }
}
