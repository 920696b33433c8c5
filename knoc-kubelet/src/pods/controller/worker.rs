//! One round for one pod: read what both sides know, decide, publish the status, act.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use knoc_proto::{capability, ids::PodUid, pb, reason::ErrorReason};
use knoc_translate::Grace;
use tokio::time::Instant;

use super::{admission, context::Context, ephemeral, memory::Memory};
use crate::{
    node::{self, allocations, predicates::Mismatch},
    pods::{
        decide::{self, AgentSide, Decision, Desired, Done, Present},
        events::{Note, about_pod},
        publish::{self, PublishError},
        resize,
        resolve::Room,
        status::{self, Hold, Rejection},
        store::PodView,
    },
};

/// The pause before the first retry; each further one is twice as long.
const BACKOFF: Duration = Duration::from_millis(250);
const BACKOFF_MOST: Duration = Duration::from_secs(10);
/// When the last DELETE is sent again, if an API server lost it. A finalizer may keep the object for days.
const RELEASE_AGAIN: Duration = Duration::from_mins(10);

/// What becomes of the ids that a pod asks for if its programs cannot have them.
const OWN_IDS: &str =
    "securityContext.runAsUser, runAsGroup: containers run as the HPC user of the agent";

/// What a worker returns.
pub(super) struct Round {
    /// None if nothing is left of the pod.
    pub(super) memory: Option<Memory>,
    /// When the pod is to be reconciled again at the latest.
    pub(super) again: Option<Duration>,
}

pub(super) async fn reconcile(context: Arc<Context>, uid: PodUid, memory: Memory) -> Round {
    let mut worker = Worker {
        context: &context,
        uid: &uid,
        memory,
        again: None,
        room: None,
    };
    let kept = worker.round().await;
    let Worker {
        memory,
        again,
        room,
        ..
    } = worker;
    drop(room);
    Round {
        memory: kept.then_some(memory),
        again,
    }
}

pub(super) struct Worker<'a> {
    pub(super) context: &'a Context,
    pub(super) uid: &'a PodUid,
    pub(super) memory: Memory,
    pub(super) again: Option<Duration>,
    /// What the values of the pod take until they are sent.
    pub(super) room: Room,
}

impl Worker<'_> {
    /// One round. Returns false if nothing is left of the pod.
    async fn round(&mut self) -> bool {
        let now = Timestamp::now();
        let agent = self.agent_side();
        let view = self.context.pods.store.by_uid(self.uid);
        if let Some(view) = &view {
            if !self.judge(view, agent).await {
                return true;
            }
            self.record_notes(view);
            self.record_resize(&view.pod);
            self.record_late_options(&view.pod);
            self.record_containers(view);
            self.plan_refresh(view, now);
        }
        let decision = decide::decide(self.desired(view.as_ref()), agent, self.done(now));
        tracing::debug!(uid = %self.uid, ?decision, "round");
        match (decision, &view) {
            (Decision::Drop, _) => {
                self.context.node.allocations().release(self.uid);
                self.context.pods.store.forget(self.uid);
                self.context.api.references.forget(self.uid);
                return false;
            }
            (Decision::Ensure, Some(view)) => self.ensure(&resize::as_accepted(&view.pod)).await,
            (Decision::MarkLost, _) => self.memory.agent.lost = true,
            (_, _) => {}
        }
        // A status that cannot be written does not delay a deletion.
        if let Some(view) = &view
            && !self.publish(view).await
            && !matches!(decision, Decision::Stop(_))
        {
            return true;
        }
        if matches!(
            decision,
            Decision::Reject | Decision::MarkLost | Decision::Settle
        ) {
            self.go_on_when_terminal();
        }
        match (decision, &view) {
            (Decision::Refresh, Some(view)) => self.refresh(&resize::as_accepted(&view.pod)).await,
            (Decision::Stop(grace), _) => {
                if let Some(view) = &view {
                    self.record_killing(view);
                }
                self.stop(grace, view.is_none()).await;
            }
            (Decision::Release, Some(view)) => self.release(&view.pod).await,
            (Decision::Forget, _) => self.forget().await,
            (_, _) => {}
        }
        true
    }

    /// If the terminal phase is published, the next step follows at once instead of when the watch brings the change.
    fn go_on_when_terminal(&self) {
        let view = self.context.pods.store.by_uid(self.uid);
        if view.is_some_and(|view| status::is_terminal(&view.pod)) {
            self.context.pods.queue.push(self.uid);
        }
    }

    fn desired(&self, view: Option<&PodView>) -> Desired {
        let Some(view) = view else {
            let seen = self.context.pods.store.has_seen(self.uid);
            return if seen { Desired::Gone } else { Desired::Unseen };
        };
        let meta = &view.pod.metadata;
        let annotations = meta.annotations.as_ref();
        Desired::Present(Present {
            generation: meta.generation.unwrap_or(1),
            terminal: status::is_terminal(&view.pod),
            ran: ran(&view.pod),
            deletion: meta
                .deletion_timestamp
                .is_some()
                .then(|| Grace::of_field(meta.deletion_grace_period_seconds)),
            rejected: self.memory.admission.rejection.is_some(),
            mirror: annotations.is_some_and(|map| map.contains_key("kubernetes.io/config.mirror")),
        })
    }

    fn agent_side(&self) -> AgentSide {
        if !self.context.knows() {
            return AgentSide::Unknown;
        }
        match self.context.pods.store.observed(self.uid) {
            None => AgentSide::Absent,
            Some(observed) => AgentSide::Known {
                phase: observed.phase(),
                generation: observed.spec_generation,
                deleting: observed.deleting,
            },
        }
    }

    fn done(&self, now: Timestamp) -> Done {
        Done {
            ensured: self.memory.agent.ensured,
            stop: self.memory.agent.stop,
            refresh_due: self.memory.values.refresh_at.is_some_and(|at| at <= now),
        }
    }

    /// Admits the pod. Only a pod that was never accepted can be rejected, so this waits until the agent has reported
    /// its pods. Returns false if the pod could not be judged, and schedules a retry.
    async fn judge(&mut self, view: &PodView, agent: AgentSide) -> bool {
        let terminal = status::is_terminal(&view.pod);
        if terminal || observed_phase(view) == Some(pb::PodPhase::Finished) {
            self.context.node.allocations().release(self.uid);
        }
        let generation = view.pod.metadata.generation.unwrap_or(1);
        if agent == AgentSide::Unknown || self.memory.admission.judged >= generation {
            return true;
        }
        if terminal && self.memory.admission.rejection.is_some() {
            return true;
        }
        let accepted = self.accepted(&view.pod);
        let findings = self
            .context
            .pods
            .store
            .findings(self.uid)
            .unwrap_or_default();
        let maps_privileged = self.context.node.maps_privileged();
        let shape = admission::admit(&view.pod, &findings, maps_privileged);
        let keeps_ids = shape.as_ref().is_ok_and(|shape| self.keeps_ids(shape));
        let admitted = match shape {
            // [`Self::ensure`] waits too, and says for what.
            Ok(shape) if !accepted && !terminal && !self.context.node.knows_resources(&shape) => {
                return true;
            }
            Ok(shape) if !accepted && !terminal => match self.fits_node(&view.pod).await {
                Some(Ok(())) => self.allocate_with_fresh_node(&shape).await,
                Some(Err(mismatch)) => Err(admission::mismatch(mismatch)),
                None => return false,
            },
            Ok(_) => Ok(()),
            Err(rejection) => Err(rejection),
        };
        self.memory.admission.judged = generation;
        match admitted {
            Ok(()) if !accepted && !terminal => {
                self.record_mapped(&view.pod, findings.mapped.clone(), keeps_ids);
            }
            Ok(()) if !terminal => {
                self.record_mapped(&view.pod, ephemeral::mapped(view, &findings.mapped), false);
            }
            Ok(()) => {}
            Err(rejection) if accepted => {
                let known = view.observed.as_ref().map_or(0, |one| one.spec_generation);
                if !terminal && known < generation {
                    self.record_unsupported_change(&view.pod, rejection.why());
                }
            }
            Err(rejection) => {
                if !terminal {
                    self.record(&view.pod, true, &rejection.reason, &rejection.message);
                }
                self.memory.admission.rejection = Some(rejection);
            }
        }
        true
    }

    fn record_mapped(&self, pod: &Pod, mut mapped: Vec<String>, keeps_ids: bool) {
        if keeps_ids {
            mapped.push(OWN_IDS.to_owned());
        }
        if !mapped.is_empty() {
            self.record(pod, false, "Mapped", &mapped.join("; "));
        }
    }

    /// Whether it is known before the pod runs that its programs do not see themselves as the user and the group that it asks for.
    fn keeps_ids(&self, shape: &pb::PodSpec) -> bool {
        let mut containers = shape.init_containers.iter().chain(&shape.containers);
        let asks = containers.any(|one| one.run_as_user.is_some() || one.run_as_group.is_some());
        let ranks = shape.job.as_ref().is_some_and(|job| job.mpi.is_some());
        let able = !ranks && self.context.agent_knows(capability::USER_IDS);
        asks && !able
    }

    /// Does the agent have the pod, or did it once? Such a pod is never rejected, whatever it is changed to.
    pub(super) fn accepted(&self, pod: &Pod) -> bool {
        let known = self.context.pods.store.observed(self.uid).is_some();
        known || self.memory.agent.ensured > 0 || ran(pod)
    }

    /// Does a new pod match this node's labels and taints? Before a pod is rejected the Node is read again, since its
    /// labels may be newer than those last seen. None if it cannot be read.
    async fn fits_node(&mut self, pod: &Pod) -> Option<Result<(), Mismatch>> {
        let Some(spec) = &pod.spec else {
            return Some(Ok(()));
        };
        if self.context.node.fits(spec).is_ok() {
            return Some(Ok(()));
        }
        let client = self.context.api.client.clone();
        match node::attributes(client, self.context.node.name()).await {
            Ok(attributes) => Some(attributes.fits(spec)),
            Err(error) => {
                let error = knoc_proto::error::chain(&error);
                tracing::warn!(uid = %self.uid, %error, "could not read the Node to admit a new pod, trying again");
                self.retry();
                None
            }
        }
    }

    /// Allocates the pod's resources. Before a new pod fails for a foreign resource, the Node is read again: its capacity may
    /// have been raised since it was last seen.
    async fn allocate_with_fresh_node(&mut self, shape: &pb::PodSpec) -> Result<(), Rejection> {
        let answer = self.allocate(shape);
        let Err(rejection) = &answer else {
            return answer;
        };
        if !rejection.reason.contains('/') {
            return answer;
        }
        let client = self.context.api.client.clone();
        match node::read(client, self.context.node.name()).await {
            Ok(node) => self.context.node.see_foreign(&node),
            Err(error) => {
                let error = knoc_proto::error::chain(&error);
                tracing::warn!(uid = %self.uid, %error, "could not read the Node to admit a new pod, which is judged by the resources last seen");
            }
        }
        self.allocate(shape)
    }

    /// Allocates what a new pod requests, if the node has it beside all pods that this process or an earlier one
    /// accepted.
    fn allocate(&self, shape: &pb::PodSpec) -> Result<(), Rejection> {
        let allocatable = self.context.node.allocatable();
        let mut allocations = self.context.node.allocations();
        if allocations.first_time() {
            for view in self.context.pods.store.pods() {
                let ended = status::is_terminal(&view.pod)
                    || observed_phase(&view) == Some(pb::PodPhase::Finished);
                if !ended && (view.observed.is_some() || ran(&view.pod)) {
                    let amounts = knoc_translate::shape(&resize::as_accepted(&view.pod))
                        .map(|shape| allocations::requests(&shape));
                    allocations.hold(&view.uid, amounts.unwrap_or_default());
                }
            }
        }
        allocations
            .allocate(self.uid, allocations::requests(shape), &allocatable)
            .map_err(|short| admission::out_of(&short))
    }

    async fn stop(&mut self, grace: Grace, gone: bool) {
        let reason = if gone {
            "the pod is gone from Kubernetes"
        } else {
            "deleted in Kubernetes"
        };
        let agent = &self.context.site.agent;
        match agent.delete_pod(self.uid, Some(grace), reason).await {
            Ok(answer) => {
                self.memory.attempts = 0;
                let told = self.memory.agent.stop.map_or(grace, |told| told.min(grace));
                self.memory.agent.stop = Some(told);
                self.answered(answer.pod);
            }
            Err(status) => self.failed("DeletePod", &status),
        }
    }

    /// Sends the last DELETE. The agent is told of the deletion before: if this process dies before `ForgetPod`, the
    /// agent's record says that the pod is being deleted. Sent only once: the API server removes the object with its
    /// last finalizer.
    async fn release(&mut self, pod: &Pod) {
        let known = self.context.pods.store.observed(self.uid);
        if known.is_some_and(|observed| !observed.deleting) {
            return self.stop(Grace::NONE, false).await;
        }
        let waited = self.memory.released.map(|at| at.elapsed());
        if let Some(left) = waited.and_then(|waited| RELEASE_AGAIN.checked_sub(waited)) {
            return self.revisit_in(left);
        }
        match publish::release(&self.context.api.client, pod).await {
            Ok(()) | Err(PublishError::Gone) => {
                self.memory.released = Some(Instant::now());
                self.revisit_in(RELEASE_AGAIN);
            }
            Err(error) => {
                let error = knoc_proto::error::chain(&error);
                tracing::warn!(uid = %self.uid, %error, "could not delete the pod from Kubernetes, trying again");
                self.retry();
            }
        }
    }

    async fn forget(&mut self) {
        match self.context.site.agent.forget_pod(self.uid).await {
            Ok(()) => {
                self.context.pods.store.remove_observed(self.uid);
                self.context.pods.queue.push(self.uid);
            }
            Err(status) if ErrorReason::of(&status) == Some(ErrorReason::NotFound) => {
                self.context.pods.store.remove_observed(self.uid);
                self.context.pods.queue.push(self.uid);
            }
            Err(status) => self.failed("ForgetPod", &status),
        }
    }

    /// Stores what the agent answered.
    pub(super) fn answered(&self, pod: Option<pb::PodObserved>) {
        if let Some(pod) = pod {
            self.context.pods.store.answer_observed(self.uid, pod);
        }
    }

    /// A call to the agent failed: logs it and schedules the retry.
    pub(super) fn failed(&mut self, call: &str, status: &tonic::Status) {
        let error = knoc_proto::error::chain(status);
        match ErrorReason::of(status) {
            Some(ErrorReason::StaleLeader) => {
                tracing::error!(%error, "another kubelet has become the leader, this one stops");
                self.context.process.deposed.cancel();
            }
            Some(ErrorReason::NotFound) => {
                // The watch is behind or ahead, and will bring the current state.
                self.revisit_in(Duration::from_secs(1));
            }
            _ => {
                tracing::warn!(uid = %self.uid, call, %error, "a call to the agent failed, trying again");
                self.retry();
            }
        }
    }

    pub(super) fn hold(&mut self, reason: &str, message: &str) {
        self.memory.status.hold = Some(Hold {
            reason: reason.to_owned(),
            message: message.to_owned(),
        });
    }

    pub(super) fn retry(&mut self) {
        let shift = self.memory.attempts.min(6);
        self.memory.attempts = self.memory.attempts.saturating_add(1);
        let delay = BACKOFF.saturating_mul(1 << shift).min(BACKOFF_MOST);
        self.revisit_in(delay.mul_f64(rand::random_range(0.75..1.25)));
    }

    pub(super) fn revisit_in(&mut self, after: Duration) {
        self.again = Some(self.again.map_or(after, |again| again.min(after)));
    }

    pub(super) fn record(&self, pod: &Pod, warning: bool, reason: &str, message: &str) {
        self.context.api.events.record(Note {
            object: about_pod(pod, ""),
            warning,
            reason: reason.to_owned(),
            message: message.to_owned(),
            at: Timestamp::now(),
            salt: 0,
            times: 1,
        });
    }
}

/// The pod's phase as the agent last reported it.
fn observed_phase(view: &PodView) -> Option<pb::PodPhase> {
    view.observed.as_ref().map(|observed| observed.phase())
}

/// Does the status in the API server say that a container ran? One with an id may have: while its postStart hook runs, it
/// is shown as waiting.
pub(super) fn ran(pod: &Pod) -> bool {
    let Some(status) = &pod.status else {
        return false;
    };
    if status.phase.as_deref() == Some("Running") {
        return true;
    }
    let lists = [&status.init_container_statuses, &status.container_statuses];
    lists.into_iter().flatten().flatten().any(|one| {
        let state = one.state.as_ref();
        let id = one.container_id.as_deref().unwrap_or_default();
        !id.is_empty()
            || state.is_some_and(|state| state.running.is_some() || state.terminated.is_some())
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_container_that_waits_may_have_run_if_it_has_an_id() {
        let of = |id: &str, state: Value| {
            let container = json!({
                "name": "main", "image": "busybox", "imageID": "", "ready": false, "restartCount": 0,
                "containerID": id, "state": state,
            });
            let status = json!({"phase": "Pending", "containerStatuses": [container]});
            ran(&serde_json::from_value(json!({"metadata": {}, "status": status})).unwrap())
        };
        let waits = || json!({"waiting": {"reason": "ContainerCreating"}});
        assert!(!of("", waits()));
        assert!(of("apptainer://12.main.0", waits()));
        assert!(of("", json!({"running": {}})));
    }
}
