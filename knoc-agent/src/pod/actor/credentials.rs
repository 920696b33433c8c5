//! The credentials for a pod's images, which are in memory only (ADR 0108).
//!
//! The kubelet sends them with the pod, and again when they change. If an agent's restart loses them before the images
//! are there, staging waits, and the pod is published as wanting values: the kubelet then sends both again.

use std::sync::Arc;

use super::Actor;
use crate::{
    image::Credentials,
    pod::{
        input::RequestError,
        state::{BeforeJob, Event, Pod, State},
    },
};

impl Actor {
    /// Uses the credentials of a request that was accepted. A pod that waits for its images tries again with them at once.
    pub(super) async fn take_credentials(
        &mut self,
        pod: Pod,
        answer: &Result<(), RequestError>,
        credentials: Option<Credentials>,
    ) -> Pod {
        let credentials = credentials.filter(|_| answer.is_ok());
        let pod = self.use_credentials(pod, credentials).await;
        self.add_ephemeral(&pod);
        let pod = self.update_images(pod).await;
        // They may be wanted no longer.
        self.show(&pod);
        pod
    }

    async fn use_credentials(&mut self, pod: Pod, credentials: Option<Credentials>) -> Pod {
        let Some(credentials) = credentials.map(Arc::new) else {
            return pod;
        };
        // The kubelet may not know yet that the images are there.
        if !self.needs_credentials(&pod) || self.credentials.as_ref() == Some(&credentials) {
            return pod;
        }
        self.credentials = Some(credentials);
        if self.looks_for_image(&pod) {
            self.ephemeral.retry_now();
            self.updates.retry_now();
        }
        // What is being looked up goes on with the earlier ones.
        if before_images(&pod) && self.staging.is_empty() {
            return self.apply(pod, Event::LookAgain).await;
        }
        pod
    }

    /// Whether the images cannot be looked up, because an earlier agent process had the credentials.
    pub(super) fn lacks_credentials(&self) -> bool {
        self.credentials.is_none() && !self.spec.image_pull_secrets.is_empty()
    }

    /// Whether an image of the pod, also of an ephemeral container or another one for a container, is still to be looked up.
    pub(super) fn needs_credentials(&self, pod: &Pod) -> bool {
        let over = pod.is_finished() || pod.deletion.is_some();
        let lacks = || {
            self.ephemeral.lacks_image(pod, &self.spec)
                || self.updates.looks_for_image(pod, &self.spec)
        };
        !over && (before_images(pod) || lacks())
    }

    /// Whether the kubelet is to send the credentials again.
    pub(super) fn wants_credentials(&self, pod: &Pod) -> bool {
        let needed = before_images(pod) || self.looks_for_image(pod);
        needed && pod.deletion.is_none() && self.lacks_credentials()
    }

    /// The credentials; none if the pod has none.
    pub(super) fn known_credentials(&self) -> Arc<Credentials> {
        self.credentials.clone().unwrap_or_default()
    }
}

/// Whether the images are still to be found for the first time.
pub(super) fn before_images(pod: &Pod) -> bool {
    matches!(
        pod.state,
        State::BeforeJob(BeforeJob::Accepted | BeforeJob::Staging { .. })
    )
}
