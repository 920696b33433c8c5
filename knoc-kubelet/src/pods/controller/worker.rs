//! One round for one pod: look at both sides, decide, publish, act.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use knoc_proto::{ids::PodUid, pb, reason::ErrorReason};
use knoc_translate::Grace;
use tokio::time::Instant;

use super::{
    admission,
    context::{Context, UNREACHABLE_AFTER},
    memory::Memory,
};
use crate::metrics::Patched;
use crate::node::{self, allocations, place::Misfit};
use crate::pods::{
    decide::{self, AgentSide, Decision, Desired, Done, Present},
    events::{Note, about_pod},
    publish::{self, PublishError},
    status::{self, Hold, Input, Rejection},
    store::PodView,
};

/// The first retry comes after this, each further one after twice as long.
const BACKOFF: Duration = Duration::from_millis(250);
const BACKOFF_MOST: Duration = Duration::from_secs(10);
/// The last DELETE is sent again after this, for an API server that lost it: a finalizer may keep the object for days.
const RELEASE_AGAIN: Duration = Duration::from_mins(10);

/// What a worker gives back.
pub(super) struct Round {
    /// None: nothing is left of the pod.
    pub(super) memory: Option<Memory>,
    /// Look again after this.
    pub(super) again: Option<Duration>,
}

pub(super) async fn reconcile(context: Arc<Context>, uid: PodUid, memory: Memory) -> Round {
    let mut worker = Worker {
        context: &context,
        uid: &uid,
        memory,
        again: None,
    };
    let kept = worker.round().await;
    let Worker { memory, again, .. } = worker;
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
}

impl Worker<'_> {
    /// False where nothing is left of the pod.
    async fn round(&mut self) -> bool {
        let now = Timestamp::now();
        let agent = self.agent_side();
        let view = self.context.pods.store.by_uid(self.uid);
        if let Some(view) = &view {
            if !self.judge(view, agent).await {
                return true;
            }
            self.tell_notes(view);
            self.tell_containers(view);
            self.plan_refresh(view, now);
        }
        let decision = decide::decide(self.desired(view.as_ref()), agent, self.done(now));
        tracing::debug!(uid = %self.uid, ?decision, "round");
        match (decision, &view) {
            (Decision::Drop, _) => {
                self.context.node.allocations().release(self.uid);
                self.context.pods.store.forget(self.uid);
                return false;
            }
            (Decision::Ensure, Some(view)) => self.ensure(&view.pod).await,
            (Decision::Lose, _) => self.memory.agent.lost = true,
            (_, _) => {}
        }
        // A status that cannot be written holds up no deletion.
        if let Some(view) = &view
            && !self.publish(view).await
            && !matches!(decision, Decision::Stop(_))
        {
            return true;
        }
        if matches!(
            decision,
            Decision::Reject | Decision::Lose | Decision::Settle
        ) {
            self.go_on_when_terminal();
        }
        match (decision, &view) {
            (Decision::Refresh, Some(view)) => self.refresh(&view.pod).await,
            (Decision::Stop(grace), _) => {
                if let Some(view) = &view {
                    self.tell_killing(view);
                }
                self.stop(grace, view.is_none()).await;
            }
            (Decision::Release, Some(view)) => self.release(&view.pod).await,
            (Decision::Forget, _) => self.forget().await,
            (_, _) => {}
        }
        true
    }

    /// The terminal phase is published: what waited for it need not wait for the watch.
    fn go_on_when_terminal(&self) {
        let view = self.context.pods.store.by_uid(self.uid);
        if view.is_some_and(|view| status::is_terminal(&view.pod)) {
            self.context.pods.queue.push(self.uid);
        }
    }

    fn desired(&self, view: Option<&PodView>) -> Desired {
        let Some(view) = view else {
            let seen = self.context.pods.store.was_seen(self.uid);
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
            refused: self.memory.admission.rejection.is_some(),
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

    /// Admission: only for pods that were never accepted, so only when the agent has said which ones it has. False: it could
    /// not be judged, and is tried again.
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
        let admitted = match admission::admit(&view.pod, &findings) {
            Ok(shape) if !accepted && !terminal => match self.place(&view.pod).await {
                Some(Ok(())) => self.allocate(&shape),
                Some(Err(misfit)) => Err(admission::misfit(misfit)),
                None => return false,
            },
            Ok(_) => Ok(()),
            Err(rejection) => Err(rejection),
        };
        self.memory.admission.judged = generation;
        match admitted {
            Ok(()) if !accepted && !terminal && !findings.mapped.is_empty() => {
                self.tell(&view.pod, false, "Mapped", &findings.mapped.join("; "));
            }
            Ok(()) => {}
            Err(rejection) if accepted => {
                let known = view.observed.as_ref().map_or(0, |one| one.spec_generation);
                if !terminal && known < generation {
                    self.tell_unsupported_change(&view.pod, rejection.why());
                }
            }
            Err(rejection) => {
                if !terminal {
                    self.tell(&view.pod, true, &rejection.reason, &rejection.message);
                }
                self.memory.admission.rejection = Some(rejection);
            }
        }
        true
    }

    /// Does the agent have the pod, or had it once? Then it is never rejected any more, whatever it is changed to.
    pub(super) fn accepted(&self, pod: &Pod) -> bool {
        let known = self.context.pods.store.observed(self.uid).is_some();
        known || self.memory.agent.ensured > 0 || ran(pod)
    }

    /// Does a new pod belong on this node? Before one fails for it the Node is read again: its labels may be newer than what
    /// was last seen. None: it cannot be read.
    async fn place(&mut self, pod: &Pod) -> Option<Result<(), Misfit>> {
        let Some(spec) = &pod.spec else {
            return Some(Ok(()));
        };
        if self.context.node.fits(spec).is_ok() {
            return Some(Ok(()));
        }
        let client = self.context.api.client.clone();
        match node::place(client, self.context.node.name()).await {
            Ok(place) => Some(place.fits(spec)),
            Err(error) => {
                let error = knoc_proto::error::chain(&error);
                tracing::warn!(uid = %self.uid, %error, "a new pod is not judged yet, trying again");
                self.retry();
                None
            }
        }
    }

    /// What a new pod requests, beside all that was accepted before, by this process or an earlier one.
    fn allocate(&self, shape: &pb::PodSpec) -> Result<(), Rejection> {
        let allocatable = self.context.node.allocatable();
        let mut allocations = self.context.node.allocations();
        if allocations.first_time() {
            for view in self.context.pods.store.pods() {
                let ended = status::is_terminal(&view.pod)
                    || observed_phase(&view) == Some(pb::PodPhase::Finished);
                if !ended && (view.observed.is_some() || ran(&view.pod)) {
                    let amounts =
                        knoc_translate::shape(&view.pod).map(|shape| allocations::requests(&shape));
                    allocations.hold(&view.uid, amounts.unwrap_or_default());
                }
            }
        }
        allocations
            .ask(self.uid, allocations::requests(shape), &allocatable)
            .map_err(|short| admission::out_of(&short))
    }

    /// Writes the status where it differs; false where there is no point in going on.
    async fn publish(&mut self, view: &PodView) -> bool {
        // What this round did may have changed both.
        let observed = match self.context.pods.store.observed(self.uid) {
            None if self.memory.agent.lost => Some(Arc::new(lost(view))),
            observed => observed,
        };
        let input = Input {
            pod: &view.pod,
            observed: observed.as_deref(),
            hold: self.memory.status.hold.as_ref(),
            // What the agent has says itself how it goes.
            rejection: self
                .memory
                .admission
                .rejection
                .as_ref()
                .filter(|_| observed.is_none()),
            unreachable: self.unreachable(),
            judged: self.judged(&view.pod),
            now: Timestamp::now(),
        };
        let Some(patch) =
            status::status(&input).and_then(|wanted| publish::patch(&view.pod, &wanted))
        else {
            return true;
        };
        let sent = (patch, view.pod.metadata.resource_version.clone());
        if self.memory.status.sent.as_ref() == Some(&sent) {
            // The API server does not keep all that we say (an older one).
            return true;
        }
        let began = Instant::now();
        let answer = publish::send(&self.context.api.client, &view.pod, &sent.0).await;
        let result = match &answer {
            Ok(_) => Patched::Ok,
            Err(PublishError::Gone) => Patched::Gone,
            Err(_) => Patched::Error,
        };
        self.context
            .process
            .metrics
            .patched(result, began.elapsed());
        match answer {
            Ok(pod) => {
                self.memory.status.sent = Some((sent.0, pod.metadata.resource_version.clone()));
                self.context.pods.store.refresh_desired(self.uid, pod);
                true
            }
            Err(PublishError::Gone) => {
                // The watch will say so; if it does not, look again.
                self.look_after(Duration::from_secs(1));
                false
            }
            Err(error) => {
                let error = knoc_proto::error::chain(&error);
                tracing::warn!(uid = %self.uid, %error, "status not written, trying again");
                // What else is due comes after the status, so no earlier than the next try.
                self.again = None;
                self.retry();
                false
            }
        }
    }

    /// The pod's generation, where it was judged: not while the link is down.
    fn judged(&self, pod: &Pod) -> Option<i64> {
        let generation = pod.metadata.generation;
        generation.filter(|generation| self.memory.admission.judged >= *generation)
    }

    fn unreachable(&self) -> bool {
        *self.context.pods.listed.borrow()
            && self.context.site.link.borrow().down_for() >= UNREACHABLE_AFTER
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

    /// The last DELETE. The agent is told first: where we die before `ForgetPod`, its record says by itself that it is
    /// nobody's any more. Sent once: the API server itself removes the object when its last finalizer goes.
    async fn release(&mut self, pod: &Pod) {
        let known = self.context.pods.store.observed(self.uid);
        if known.is_some_and(|observed| !observed.deleting) {
            return self.stop(Grace::NONE, false).await;
        }
        let waited = self.memory.released.map(|at| at.elapsed());
        if let Some(left) = waited.and_then(|waited| RELEASE_AGAIN.checked_sub(waited)) {
            return self.look_after(left);
        }
        match publish::release(&self.context.api.client, pod).await {
            Ok(()) | Err(PublishError::Gone) => {
                self.memory.released = Some(Instant::now());
                self.look_after(RELEASE_AGAIN);
            }
            Err(error) => {
                let error = knoc_proto::error::chain(&error);
                tracing::warn!(uid = %self.uid, %error, "the last delete failed, trying again");
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

    /// What the agent answered, and the next round at once.
    pub(super) fn answered(&self, pod: Option<pb::PodObserved>) {
        if let Some(pod) = pod {
            self.context.pods.store.answer_observed(self.uid, pod);
        }
    }

    /// A call to the agent failed: log it once, and see when to try again.
    pub(super) fn failed(&mut self, call: &str, status: &tonic::Status) {
        let error = knoc_proto::error::chain(status);
        match ErrorReason::of(status) {
            Some(ErrorReason::StaleLeader) => {
                tracing::error!(%error, "another kubelet leads");
                self.context.process.deposed.cancel();
            }
            Some(ErrorReason::NotFound) => {
                // The watch is behind or ahead; it will say what is.
                self.look_after(Duration::from_secs(1));
            }
            _ => {
                tracing::warn!(uid = %self.uid, call, %error, "the agent refused or failed, trying again");
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
        self.look_after(delay.mul_f64(rand::random_range(0.75..1.25)));
    }

    pub(super) fn look_after(&mut self, after: Duration) {
        self.again = Some(self.again.map_or(after, |again| again.min(after)));
    }

    pub(super) fn tell(&self, pod: &Pod, warning: bool, reason: &str, message: &str) {
        self.context.api.events.tell(Note {
            object: about_pod(pod, ""),
            warning,
            reason: reason.to_owned(),
            message: message.to_owned(),
            at: Timestamp::now(),
            salt: 0,
        });
    }
}

/// Where the pod stands, as the agent last said.
fn observed_phase(view: &PodView) -> Option<pb::PodPhase> {
    view.observed.as_ref().map(|observed| observed.phase())
}

/// What stands for a pod that the agent does not know (any more) and that will not be sent again: it ran, or it is being
/// deleted.
fn lost(view: &PodView) -> pb::PodObserved {
    let message = if ran(&view.pod) {
        "the agent does not know this pod any more, although it ran"
    } else {
        "the pod was deleted before it ran, the agent does not know it"
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

/// Does the status in the API server say that a container ran?
fn ran(pod: &Pod) -> bool {
    let Some(status) = &pod.status else {
        return false;
    };
    if status.phase.as_deref() == Some("Running") {
        return true;
    }
    let lists = [&status.init_container_statuses, &status.container_statuses];
    lists.into_iter().flatten().flatten().any(|one| {
        one.state
            .as_ref()
            .is_some_and(|state| state.running.is_some() || state.terminated.is_some())
    })
}
