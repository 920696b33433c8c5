//! Publishes the status of a pod: computes it, lets [`urgency`] say how long the change may wait, and sends it.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use knoc_proto::pb;
use tokio::time::Instant;

use super::{
    context::UNREACHABLE_AFTER,
    worker::{Worker, ran},
};
use crate::{
    metrics::PatchResult,
    pods::{
        publish::{self, PublishError},
        status::{self, Input},
        store::PodView,
        urgency::{self, Patience},
    },
};

impl Worker<'_> {
    /// Writes the status if it differs and the change may not wait any longer. Returns false if the round must not
    /// continue.
    pub(super) async fn publish(&mut self, view: &PodView) -> bool {
        let wanted = self.wanted(view);
        let patch = wanted.and_then(|wanted| {
            let patch = publish::patch(&view.pod, &wanted)?;
            Some((patch, urgency::delay(&view.pod, &wanted, self.patience())))
        });
        let Some((patch, delay)) = patch else {
            self.memory.status.differs_since = None;
            return true;
        };
        let observed = self.context.pods.store.observed(self.uid);
        let job = observed.as_ref().and_then(|observed| observed.job.as_ref());
        let patch = publish::with_job(patch, &view.pod, job.map_or("", |job| &job.id));
        let sent = (patch, view.pod.metadata.resource_version.clone());
        let before = self.memory.status.sent.as_ref();
        let repeats = before.is_some_and(|(before, version)| {
            *version == sent.1 && publish::repeats(before, &sent.0)
        });
        if repeats {
            self.memory.status.differs_since = None;
            return true;
        }
        let now = Instant::now();
        let since = *self.memory.status.differs_since.get_or_insert(now);
        if let Some(left) = delay.checked_sub(now.duration_since(since))
            && !left.is_zero()
        {
            self.revisit_in(left);
            return true;
        }
        self.send_status(view, sent).await
    }

    /// How long changes may wait for which nobody waits.
    pub(super) fn patience(&self) -> Patience {
        Patience::with(self.context.pods.store.count())
    }

    /// The status that the pod should have; None if its phase in the API server is terminal.
    fn wanted(&self, view: &PodView) -> Option<PodStatus> {
        // This round may have changed both.
        let observed = match self.context.pods.store.observed(self.uid) {
            None if self.memory.agent.lost => Some(Arc::new(lost(view))),
            observed => observed,
        };
        let rejection = self.memory.admission.rejection.as_ref();
        let findings = self.context.pods.store.findings(self.uid);
        let findings = findings.unwrap_or_default();
        status::status(&Input {
            refused: &findings.rejected,
            pod: &view.pod,
            observed: observed.as_deref(),
            hold: self.memory.status.hold.as_ref(),
            lacking: &self.memory.values.lacking,
            // A pod that the agent has reports its state itself.
            rejection: rejection.filter(|_| observed.is_none()),
            unreachable: self.unreachable(),
            pod_ip: self.context.node.identity().pod_ip,
            judged: self.judged(&view.pod),
            now: Timestamp::now(),
        })
    }

    async fn send_status(
        &mut self,
        view: &PodView,
        sent: (serde_json::Value, Option<String>),
    ) -> bool {
        let began = Instant::now();
        let writing = self.context.api.events.status_write();
        let answer = publish::send(&self.context.api.client, &view.pod, &sent.0).await;
        drop(writing);
        let result = match &answer {
            Ok(_) => PatchResult::Ok,
            Err(PublishError::Gone) => PatchResult::Gone,
            Err(_) => PatchResult::Error,
        };
        self.context
            .process
            .metrics
            .patched(result, began.elapsed());
        match answer {
            Ok(pod) => {
                self.memory.status.differs_since = None;
                self.memory.status.sent = Some((sent.0, pod.metadata.resource_version.clone()));
                self.context.pods.store.refresh_desired(self.uid, pod);
                true
            }
            Err(PublishError::Gone) => {
                // The watch will bring the deletion; look again in case it does not.
                self.revisit_in(Duration::from_secs(1));
                false
            }
            Err(error) => {
                let error = knoc_proto::error::chain(&error);
                tracing::warn!(uid = %self.uid, %error, "could not write the status of a pod, trying again");
                // Everything else comes after the status, so no earlier than the next try.
                self.again = None;
                self.retry();
                false
            }
        }
    }

    /// The pod's generation if it was judged, which needs the link.
    fn judged(&self, pod: &Pod) -> Option<i64> {
        let generation = pod.metadata.generation;
        generation.filter(|generation| self.memory.admission.judged >= *generation)
    }

    fn unreachable(&self) -> bool {
        *self.context.pods.listed.borrow()
            && self.context.site.link.borrow().down_for() >= UNREACHABLE_AFTER
    }
}

/// Stands for the observation of a pod that the agent does not know and that will not be sent again, since it ran or is
/// being deleted.
fn lost(view: &PodView) -> pb::PodObserved {
    let message = if ran(&view.pod) {
        "the agent no longer knows this pod, although it ran"
    } else {
        "the pod was deleted before it ran"
    };
    pb::PodObserved {
        uid: view.uid.to_string(),
        spec_generation: view.pod.metadata.generation.unwrap_or(1),
        phase: pb::PodPhase::Finished.into(),
        outcome: Some(pb::Outcome {
            kind: pb::OutcomeKind::Failed.into(),
            reason: "ContainerStatusUnknown".to_owned(),
            message: message.to_owned(),
            ..pb::Outcome::default()
        }),
        ..pb::PodObserved::default()
    }
}
