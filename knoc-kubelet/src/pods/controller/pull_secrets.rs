//! The credentials of a pod's `imagePullSecrets`: read again and again for as long as the agent needs them for the images.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use knoc_proto::pb::{self, PodPhase, container_status::State};
use knoc_translate::Lacking;

use super::{ensure::NoValues, worker::Worker};
use crate::pods::{resolve, status, store::PodView};

/// The shortest and the longest time between two reads, in seconds.
const READ_AGAIN: std::ops::RangeInclusive<u64> = 10..=20;

impl Worker<'_> {
    /// The credentials for the pod's images; `None` if it has no pull secrets, or the images are there already.
    pub(super) async fn pull_credentials(
        &mut self,
        pod: &Pod,
        now: Timestamp,
    ) -> Result<Option<pb::PullCredentials>, NoValues> {
        let names = knoc_translate::pull_secrets(pod);
        let observed = self.context.pods.store.observed(self.uid);
        let findings = self.context.pods.store.findings(self.uid);
        let findings = findings.unwrap_or_default();
        let not_sent = self.not_sent(pod, &findings.rejected);
        let waits = observed.is_none_or(|it| waits_for_images(pod, &it, not_sent));
        if names.is_empty() || !waits {
            return Ok(None);
        }
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let client = &self.context.api.client;
        let (secrets, _room) = resolve::pull_secrets(client, namespace, &names).await?;
        let found = knoc_translate::pull_credentials(pod, &secrets)?;
        if !found.missing.is_empty() {
            let text = format!(
                "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                found.missing.join(", ")
            );
            self.record_once(pod, "FailedToRetrieveImagePullSecret", &text);
        }
        for text in &found.unused {
            self.record_once(pod, "FailedToRetrieveImagePullSecret", text);
        }
        let soon = now.checked_add(read_again()).ok();
        let refresh_at = &mut self.memory.values.refresh_at;
        *refresh_at = [*refresh_at, soon].into_iter().flatten().min();
        Ok(Some(found.credentials))
    }

    /// The ephemeral containers of the pod that the agent does not get.
    pub(super) fn not_sent<'b>(&'b self, pod: &Pod, rejected: &'b [String]) -> NotSent<'b> {
        NotSent {
            rejected,
            lacking: &self.memory.values.lacking,
            all: self.memory.agent.refused >= pod.metadata.generation.unwrap_or(1),
        }
    }

    /// When a new process reads the pull secrets of a pod that an earlier one sent.
    pub(super) fn pull_secrets_due(view: &PodView) -> Option<Duration> {
        let observed = view.observed.as_deref();
        let waits = observed.is_some_and(|it| waits_for_images(&view.pod, it, NotSent::default()));
        let due = waits && !knoc_translate::pull_secrets(&view.pod).is_empty();
        due.then(|| read_again().unsigned_abs())
    }
}

fn read_again() -> SignedDuration {
    let seconds = rand::random_range(READ_AGAIN);
    SignedDuration::try_from(Duration::from_secs(seconds)).unwrap_or(SignedDuration::ZERO)
}

/// What the agent does not get, and for which it needs no image.
#[derive(Clone, Copy, Default)]
pub(super) struct NotSent<'a> {
    /// What the verdict table rejects; an ephemeral container is rejected alone.
    rejected: &'a [String],
    /// The ephemeral containers that wait for what their variables refer to.
    lacking: &'a [Lacking],
    /// Whether the agent does not take this generation of the pod.
    all: bool,
}

impl NotSent<'_> {
    pub(super) fn has(&self, name: &str) -> bool {
        self.all
            || self.lacking.iter().any(|lacks| lacks.container == name)
            || status::refused(self.rejected, name).is_some()
    }
}

/// Does the agent lack images of the pod: at first, of an ephemeral container that was added to it, or another one for a
/// container?
fn waits_for_images(pod: &Pod, observed: &pb::PodObserved, not_sent: NotSent<'_>) -> bool {
    let spec = pod.spec.as_ref();
    let mut ephemeral = spec
        .iter()
        .flat_map(|spec| spec.ephemeral_containers.iter().flatten());
    let waits = |name: &str| {
        let mut statuses = observed.ephemeral_containers.iter();
        let status = statuses.find(|status| status.name == name);
        match status.and_then(|status| status.state.as_ref()) {
            None => !not_sent.has(name),
            Some(state) => matches!(state, State::Waiting(_)),
        }
    };
    let others = || {
        let containers = spec.iter().flat_map(|spec| {
            let init = spec.init_containers.iter().flatten();
            init.chain(&spec.containers)
        });
        let statuses = || observed.init_containers.iter().chain(&observed.containers);
        let image = |name: &str| {
            let status = statuses().find(|one| one.name == name)?;
            // The job has that one already, even if the container never starts again.
            Some(status.image_of_next_start())
        };
        containers
            .map(|container| (image(&container.name), &container.image))
            .any(|(known, wanted)| {
                // A container of which nothing is known yet has no image.
                known.is_some_and(|known| !known.is_empty()) && known != wanted.as_deref()
            })
    };
    match observed.phase() {
        PodPhase::Unspecified | PodPhase::Accepted | PodPhase::Staging => true,
        PodPhase::Finished => false,
        PodPhase::Throttled
        | PodPhase::Submitting
        | PodPhase::Queued
        | PodPhase::Running
        | PodPhase::Stopping
        | PodPhase::Lost => {
            let others = !not_sent.all && !observed.images_are_fixed && others();
            others || ephemeral.any(|container| waits(&container.name))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn waits(image: &str, next_image: &str, refused: bool) -> bool {
        waits_beside(pb::PodObserved::default(), (image, next_image), refused)
    }

    fn waits_beside(
        others: pb::PodObserved,
        (image, next_image): (&str, &str),
        refused: bool,
    ) -> bool {
        let pod = json!({"spec": {"containers": [{"name": "main", "image": "new"}]}});
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let observed = pb::PodObserved {
            phase: PodPhase::Running.into(),
            containers: vec![pb::ContainerStatus {
                name: "main".to_owned(),
                image: image.to_owned(),
                next_image: next_image.to_owned(),
                ..pb::ContainerStatus::default()
            }],
            ..others
        };
        let not_sent = NotSent {
            all: refused,
            ..NotSent::default()
        };
        waits_for_images(&pod, &observed, not_sent)
    }

    #[test]
    fn credentials_are_sent_until_the_job_has_the_image_that_the_pod_names() {
        assert!(waits("old", "", false));
        assert!(waits("old", "older", false));
        assert!(!waits("new", "", false));
        // It has ended for good, or is being stopped.
        assert!(!waits("old", "new", false));
        assert!(
            !waits("old", "", true),
            "the agent does not take the change"
        );
        let fixed = pb::PodObserved {
            images_are_fixed: true,
            ..pb::PodObserved::default()
        };
        assert!(
            !waits_beside(fixed, ("old", ""), false),
            "the job does not take the change"
        );
    }
}
