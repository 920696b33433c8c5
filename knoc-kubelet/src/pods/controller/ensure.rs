//! Sends a pod and its values to the agent (`EnsurePod`, `UpdateValues`): resolves, translates, calls, and handles
//! errors.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use knoc_proto::{capability, pb, reason::ErrorReason};
use knoc_translate::{BadSecret, Lacking, Missing, Unbound};

use super::{ephemeral, hashes::Hashes, worker::Worker};
use crate::{
    agent::Sent,
    pods::{
        resolve::{self, ResolveError},
        status::{self, Rejection},
        store::PodView,
    },
};

/// How long to wait before values are sent again that the agent asked for.
const RESEND_PAUSE: SignedDuration = SignedDuration::from_secs(5);
/// How long the refresh of a pod waits for room that other pods take.
const BUSY_PAUSE: Duration = Duration::from_secs(2);
/// How soon the values of a pod are resolved again at the earliest, however often its objects change.
const SOONEST: Duration = Duration::from_secs(1);
/// When to try again if a refresh is due that could not be done.
const NOT_DONE: Duration = Duration::from_secs(5);
/// After a restart the values of all pods are resolved again, within this time for each of them.
const AFTER_RESTART: Duration = Duration::from_millis(10);

/// The beginning of an Event about values that are not applied.
const STALE: &str = "The pod keeps its present files and variables";

/// Why the values of a pod could not be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoValues {
    #[error(transparent)]
    Missing(#[from] Missing),
    #[error("resolve what the pod refers to")]
    Resolve(#[from] ResolveError),
    #[error(transparent)]
    PullSecret(#[from] BadSecret),
}

impl Worker<'_> {
    /// Sends the pod to the agent; if that fails, records why the pod waits or was rejected.
    pub(super) async fn ensure(&mut self, pod: &Pod) {
        let shape = match knoc_translate::shape(pod) {
            Ok(shape) => self.without_refused(self.context.node.of_this_cluster(shape)),
            Err(problems) => {
                let generation = pod.metadata.generation.unwrap_or(1);
                self.reject(pod, generation, "UnsupportedPodSpec", &problems.join("; "));
                return;
            }
        };
        let Some(mut shape) = self.with_claims(pod, shape).await else {
            return;
        };
        let judged = self.memory.admission.judged >= shape.generation;
        if !judged || !self.context.node.knows_resources(&shape) {
            let message = "the agent has not reported yet which extended resources the site has";
            self.hold("", message);
            self.retry();
            return;
        }
        if let Some(why) = self.context.node.lacks_range(&shape) {
            self.hold("", &why);
            self.retry();
            return;
        }
        if let Some(lacking) = self.context.lacking(&shape) {
            // The pod waits and does not fail, because the agent may be upgraded.
            self.hold("", &lacking);
            self.retry();
            return;
        }
        let (sent, lacking) = match self.values(pod).await {
            Ok(sent) => sent,
            Err(error) => {
                self.no_values(pod, &error);
                self.retry();
                return;
            }
        };
        if !lacking.is_empty() && !self.context.agent_knows(capability::LATE_EPHEMERAL) {
            // This agent takes no container after its generation.
            self.ephemeral_waits(pod, &lacking);
            self.retry();
            return self.update_values(pod, sent).await;
        }
        let lacks = |name: &str| lacking.iter().any(|one| one.container == name);
        shape.ephemeral_containers.retain(|one| !lacks(&one.name));
        self.send(pod, shape, sent, &lacking).await;
    }

    /// Calls `EnsurePod` without the ephemeral containers that lack something.
    async fn send(&mut self, pod: &Pod, shape: pb::PodSpec, sent: Sent, lacking: &[Lacking]) {
        if self.memory.agent.ensured == 0 {
            self.context
                .site
                .network
                .wait(&self.context.site.link)
                .await;
        }
        let generation = shape.generation;
        let hashes = Hashes::of(&sent.values, sent.pull_credentials.as_ref());
        knoc_proto::crash::point("kubelet.ensure.before");
        let answer = self.context.site.agent.ensure_pod(shape, sent).await;
        knoc_proto::crash::point("kubelet.ensure.after");
        match answer {
            Ok(answer) => {
                self.memory.agent.ensured = generation;
                self.memory.values.sent = Some(hashes);
                self.memory.status.hold = None;
                self.memory.attempts = 0;
                self.ephemeral_waits(pod, lacking);
                self.answered(answer.pod);
            }
            Err(status) => self.not_ensured(pod, generation, &status),
        }
    }

    /// The shape without the ephemeral containers that are rejected: each is rejected alone.
    fn without_refused(&self, mut shape: pb::PodSpec) -> pb::PodSpec {
        if !shape.ephemeral_containers.is_empty() {
            let findings = self.context.pods.store.findings(self.uid);
            let rejected = findings.unwrap_or_default();
            let refused = |name: &str| status::refused(&rejected.rejected, name).is_some();
            shape.ephemeral_containers.retain(|one| !refused(&one.name));
        }
        shape
    }

    /// These ephemeral containers wait for what their variables refer to. The pod runs without them.
    fn ephemeral_waits(&mut self, pod: &Pod, lacking: &[Lacking]) {
        let messages = lacking.iter().flat_map(|one| &one.messages);
        let messages: Vec<_> = messages.map(String::as_str).collect();
        if messages.is_empty() {
            return;
        }
        let message = messages.join("; ");
        self.record_once(pod, "Failed", &format!("Error: {message}"));
    }

    /// Is there an ephemeral container that the agent could be sent and does not have?
    fn has_new_ephemeral(&self, pod: &Pod) -> bool {
        let Some(observed) = self.context.pods.store.observed(self.uid) else {
            return false;
        };
        let findings = self.context.pods.store.findings(self.uid);
        let findings = findings.unwrap_or_default();
        let not_sent = self.not_sent(pod, &findings.rejected);
        ephemeral::unknown(pod, &observed).any(|name| !not_sent.has(name))
    }

    /// The shape with the volumes of its claims; otherwise records why the pod waits or was rejected.
    async fn with_claims(&mut self, pod: &Pod, mut shape: pb::PodSpec) -> Option<pb::PodSpec> {
        let names = knoc_translate::needs(pod).claims;
        if names.is_empty() {
            return Some(shape);
        }
        let found = resolve::claims(&self.context.api.client, pod, &names).await;
        let bound = match found {
            Ok(mut found) => {
                if self.accepted(pod) {
                    // A claim that is deleted stays until the pods that use it are gone.
                    let claims = found.values_mut().filter_map(|found| found.claim.as_mut());
                    claims.for_each(|claim| claim.metadata.deletion_timestamp = None);
                }
                knoc_translate::bind_claims(pod, &mut shape, &found)
            }
            Err(error) => Err(Unbound::Waits(vec![knoc_proto::error::chain(&error)])),
        };
        match bound {
            Ok(()) => Some(shape),
            Err(Unbound::Never(problems)) => {
                let problems = problems.join("; ");
                self.reject(pod, shape.generation, "UnsupportedPodSpec", &problems);
                None
            }
            Err(Unbound::Waits(why)) => {
                let message = why.join("; ");
                self.record_once(pod, "FailedMount", &message);
                self.hold("", &message);
                self.retry();
                None
            }
        }
    }

    fn no_values(&mut self, pod: &Pod, error: &NoValues) {
        let message = knoc_proto::error::chain(error);
        if let NoValues::Missing(Missing::Mounts(mounts)) = error {
            for mount in mounts {
                self.record_once(pod, "FailedMount", mount);
            }
            self.hold("", &message);
            return;
        }
        if let NoValues::Resolve(ResolveError::TooMuch(why)) = error {
            self.record_once(pod, "FailedMount", why);
            self.hold("", why);
            return;
        }
        if let NoValues::Resolve(ResolveError::Busy) = error {
            self.hold("", &message);
            return;
        }
        if let NoValues::PullSecret(_) = error {
            self.record_once(pod, "FailedToRetrieveImagePullSecret", &message);
            self.hold("ErrImagePull", &message);
            return;
        }
        self.record_once(pod, "Failed", &format!("Error: {message}"));
        self.hold("CreateContainerConfigError", &message);
    }

    fn not_ensured(&mut self, pod: &Pod, generation: i64, status: &tonic::Status) {
        use ErrorReason as R;
        let message = status.message();
        match R::of(status) {
            Some(R::InvalidSpec | R::InvalidRequest | R::Unsupported) => {
                self.reject(pod, generation, "UnsupportedPodSpec", message);
            }
            Some(R::PermissionDenied) => self.reject(pod, generation, "NotAllowed", message),
            Some(R::SpecConflict) => {
                self.memory.agent.ensured = generation;
                self.memory.agent.refused = generation;
                self.record(pod, true, "SpecConflict", message);
            }
            _ => {
                self.hold("", &format!("the agent did not accept the pod: {message}"));
                self.failed("EnsurePod", status);
            }
        }
    }

    /// The agent or the translation rejects the pod. If an earlier generation was accepted only the change is rejected,
    /// and the pod goes on as it was accepted.
    fn reject(&mut self, pod: &Pod, generation: i64, reason: &str, message: &str) {
        if self.accepted(pod) {
            self.memory.agent.ensured = self.memory.agent.ensured.max(generation);
            self.memory.agent.refused = generation;
            self.record_unsupported_change(pod, message);
            if self.context.pods.store.observed(self.uid).is_none() {
                // The agent lost the pod before it ran. It may accept it again after its site file or its version
                // changed.
                self.hold("", &format!("the agent did not accept the pod: {message}"));
                self.retry();
            }
            return;
        }
        let rejection = Rejection::new(reason, message);
        self.record(pod, true, reason, &rejection.message);
        self.memory.admission.rejection = Some(rejection);
    }

    /// Sends the values again if they changed, and ephemeral containers that lack nothing any more.
    pub(super) async fn refresh(&mut self, pod: &Pod) {
        let (sent, lacking) = match self.values(pod).await {
            Ok(sent) => sent,
            Err(NoValues::Resolve(ResolveError::Busy)) => {
                self.refresh_later(BUSY_PAUSE.mul_f64(rand::random_range(0.5..1.5)));
                return;
            }
            Err(error) => {
                self.record_stale(pod, &error);
                self.refresh_later(Duration::from_mins(1));
                return;
            }
        };
        self.ephemeral_waits(pod, &lacking);
        let late = self.context.agent_knows(capability::LATE_EPHEMERAL);
        if late && self.has_new_ephemeral(pod) {
            self.ensure(pod).await;
            if self.has_new_ephemeral(pod) {
                // The generation is not newer than that of the agent, so nothing else leads here again.
                self.memory.values.refresh_at = Some(Timestamp::now());
            }
            return;
        }
        self.update_values(pod, sent).await;
    }

    /// Sends these values if they differ from those that the agent has.
    async fn update_values(&mut self, pod: &Pod, sent: Sent) {
        let hashes = Hashes::of(&sent.values, sent.pull_credentials.as_ref());
        if self
            .memory
            .values
            .sent
            .is_some_and(|before| before.covers(hashes))
        {
            return;
        }
        match self.context.site.agent.update_values(self.uid, sent).await {
            Ok(()) => self.memory.values.sent = Some(hashes),
            Err(status) => {
                if ErrorReason::of(&status) == Some(ErrorReason::InvalidSpec) {
                    let message = format!("{STALE}: {}", status.message());
                    self.record_once(pod, "FailedMount", &message);
                    // The same values would be rejected again.
                    self.memory.values.sent = Some(hashes);
                    return;
                }
                self.refresh_later(Duration::from_secs(10));
                self.failed("UpdateValues", &status);
            }
        }
    }

    /// The values of an accepted pod cannot be made any more: it keeps those that it has.
    fn record_stale(&mut self, pod: &Pod, error: &NoValues) {
        let messages = match error {
            NoValues::Missing(Missing::Mounts(mounts)) => mounts.clone(),
            NoValues::Missing(Missing::Variables(variables)) => variables.clone(),
            NoValues::Resolve(ResolveError::TooMuch(why)) => vec![(*why).to_owned()],
            NoValues::Resolve(_) | NoValues::PullSecret(_) => {
                let error = knoc_proto::error::chain(error);
                tracing::warn!(uid = %self.uid, %error, "could not refresh the values of a pod, its old ones stay");
                return;
            }
        };
        for message in messages {
            self.record_once(pod, "FailedMount", &format!("{STALE}: {message}"));
        }
    }

    /// What is sent for the pod, and what the variables of ephemeral containers lack.
    async fn values(&mut self, pod: &Pod) -> Result<(Sent, Vec<Lacking>), NoValues> {
        let now = Timestamp::now();
        let needs = knoc_translate::needs(pod);
        let references = &self.context.api.references;
        self.memory.values.read = Some((now, references.level()));
        let allocatable = self.context.allocatable();
        // What an earlier answer took in this round.
        self.room = None;
        let (resolved, trust, room) = resolve::resolve(
            &self.context.api.client,
            &self.context.api.services,
            pod,
            &needs,
            &allocatable,
            &mut self.memory.values.tokens,
            now,
        )
        .await?;
        self.room = room;
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let made = knoc_translate::values(pod, &resolved);
        let complete = made.as_ref().is_ok_and(|it| it.lacking.is_empty());
        let objects = resolve::versions(namespace, &needs, &resolved, &trust, complete);
        self.memory.values.look_at = Some(now)
            .filter(|_| !objects.is_empty())
            .and_then(resolve::look_at);
        // What is missing is watched too: the pod goes on as soon as it appears.
        references.follow(self.uid, objects);
        let knoc_translate::Values {
            mut values,
            skipped,
            lacking,
        } = made?;
        if !skipped.is_empty() {
            let text = format!(
                "Keys [{}] were skipped since they are considered invalid environment variable names.",
                skipped.join(", ")
            );
            self.record_once(pod, "InvalidEnvironmentVariableNames", &text);
        }
        self.memory.values.revision = self.memory.values.revision.max(now.as_millisecond() - 1) + 1;
        values.revision = self.memory.values.revision;
        self.memory.values.refresh_at = resolve::renew_at(&self.memory.values.tokens);
        self.memory.values.metadata = Some(metadata(pod));
        self.memory.values.lacking.clone_from(&lacking);
        let pull_credentials = self.pull_credentials(pod, now).await;
        self.plan(now);
        let sent = Sent {
            values,
            pull_credentials: pull_credentials?,
        };
        Ok((sent, lacking))
    }

    /// Plans when to resolve the values again: when a token is due; soon if an earlier process sent them, or if an object
    /// changed to which the pod refers; at once if labels or annotations changed that the pod reads.
    pub(super) fn plan_refresh(&mut self, view: &PodView, now: Timestamp) {
        let Some(observed) = &view.observed else {
            if status::is_terminal(&view.pod) {
                // It was rejected or lost after its objects were read.
                self.context.api.references.forget(self.uid);
            }
            return;
        };
        if observed.phase() == pb::PodPhase::Finished {
            self.memory.values.refresh_at = None;
            self.memory.values.look_at = None;
            self.context.api.references.forget(self.uid);
            return;
        }
        if observed.values_wanted {
            self.resend_values(now);
        } else {
            self.memory.values.resent_at = None;
        }
        match self.memory.values.metadata {
            None => {
                let needs = knoc_translate::needs(&view.pod);
                if let Some(after) = Self::pull_secrets_due(view) {
                    self.refresh_later(after);
                } else if needs != knoc_translate::Needs::default()
                    || ephemeral::unknown(&view.pod, observed).next().is_some()
                {
                    let pods = self.context.pods.store.count().try_into();
                    let most = AFTER_RESTART.saturating_mul(pods.unwrap_or(u32::MAX));
                    let most = most.clamp(SOONEST, Duration::from_mins(1));
                    self.refresh_later(most.mul_f64(rand::random_range(0.0..1.0)));
                }
                self.memory.values.metadata = Some(metadata(&view.pod));
            }
            Some(before) if before != metadata(&view.pod) && reads_metadata(&view.pod) => {
                self.memory.values.refresh_at = Some(now);
            }
            Some(_) => {}
        }
        self.refresh_changed(now);
        self.plan(now);
    }

    /// Plans a refresh if an object has changed since it was read, or if it was not watched for a while.
    fn refresh_changed(&mut self, now: Timestamp) {
        let Some((read_at, level)) = self.memory.values.read else {
            return;
        };
        let references = &self.context.api.references;
        let values = &mut self.memory.values;
        if let Some(pause) = references.changed_since(self.uid, level) {
            let soonest = read_at.checked_add(SOONEST).unwrap_or(now);
            let at = now.checked_add(pause).unwrap_or(now).max(soonest);
            values.refresh_at = Some(values.refresh_at.map_or(at, |before| before.min(at)));
        }
        if values.look_at.is_some_and(|at| at <= now) {
            if references.all_watched(self.uid) {
                values.look_at = resolve::look_at(now);
            } else {
                values.look_at = None;
                values.refresh_at = Some(now);
            }
        }
    }

    /// The agent has lost the values (it keeps them in memory, or the job was requeued). They are sent again even if
    /// they did not change, but at most every [`RESEND_PAUSE`], so that the job has time to take them.
    fn resend_values(&mut self, now: Timestamp) {
        let again = self
            .memory
            .values
            .resent_at
            .and_then(|at| at.checked_add(RESEND_PAUSE).ok());
        if let Some(again) = again.filter(|again| *again > now) {
            let soonest = self
                .memory
                .values
                .refresh_at
                .map_or(again, |at| at.min(again));
            self.memory.values.refresh_at = Some(soonest);
        } else {
            self.memory.values.resent_at = Some(now);
            self.memory.values.sent = None;
            self.memory.values.refresh_at = Some(now);
        }
    }

    fn refresh_later(&mut self, after: Duration) {
        let after = SignedDuration::try_from(after).unwrap_or(SignedDuration::from_mins(1));
        let now = Timestamp::now();
        self.memory.values.refresh_at = now.checked_add(after).ok();
        self.plan(now);
    }

    /// Schedules the next round for when the refresh is due.
    fn plan(&mut self, now: Timestamp) {
        let values = &self.memory.values;
        if let Some(at) = values.refresh_at.into_iter().chain(values.look_at).min() {
            let wait = Duration::try_from(at.duration_since(now)).unwrap_or_default();
            // What is due is done in this round, unless the link is down or the pod is being ended.
            self.revisit_in(if wait.is_zero() { NOT_DONE } else { wait });
        }
    }
}

fn metadata(pod: &Pod) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&pod.metadata.labels, &pod.metadata.annotations).hash(&mut hasher);
    hasher.finish()
}

/// Does a volume of the pod show its labels or annotations?
fn reads_metadata(pod: &Pod) -> bool {
    let volumes = pod
        .spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten());
    let items = volumes.flat_map(|volume| {
        let own = volume
            .downward_api
            .iter()
            .flat_map(|source| source.items.iter().flatten());
        let projected = volume
            .projected
            .iter()
            .flat_map(|source| source.sources.iter().flatten());
        let projected = projected
            .filter_map(|source| source.downward_api.as_ref())
            .flat_map(|source| source.items.iter().flatten());
        own.chain(projected)
    });
    items
        .filter_map(|item| item.field_ref.as_ref())
        .any(|field| {
            field.field_path.starts_with("metadata.labels")
                || field.field_path.starts_with("metadata.annotations")
        })
}
