//! Sends a pod and its values to the agent (`EnsurePod`, `UpdateValues`): resolves, translates, calls, and handles
//! errors.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use knoc_proto::{pb, reason::ErrorReason};
use knoc_translate::{Missing, Unbound};
use prost::Message as _;

use super::worker::Worker;
use crate::pods::{
    resolve::{self, ResolveError},
    status::Rejection,
    store::PodView,
};

/// How long to wait before values are sent again that the agent asked for.
const RESEND_PAUSE: SignedDuration = SignedDuration::from_secs(5);

/// Why the values of a pod could not be made.
#[derive(Debug, thiserror::Error)]
enum NoValues {
    #[error(transparent)]
    Missing(#[from] Missing),
    #[error("resolve what the pod refers to")]
    Resolve(#[from] ResolveError),
}

impl Worker<'_> {
    /// Sends the pod to the agent; if that fails, records why the pod waits or was rejected.
    pub(super) async fn ensure(&mut self, pod: &Pod) {
        let shape = match knoc_translate::shape(pod) {
            Ok(shape) => self.context.node.of_this_cluster(shape),
            Err(problems) => {
                let generation = pod.metadata.generation.unwrap_or(1);
                self.reject(pod, generation, "UnsupportedPodSpec", &problems.join("; "));
                return;
            }
        };
        let Some(shape) = self.with_claims(pod, shape).await else {
            return;
        };
        let judged = self.memory.admission.judged >= shape.generation;
        if !judged || !self.context.node.knows_resources(&shape) {
            let message = "the agent has not reported yet which extended resources the site has";
            self.hold("", message);
            self.retry();
            return;
        }
        if let Some(lacking) = self.context.lacking(&shape) {
            // The pod waits and does not fail, because the agent may be upgraded.
            self.hold("", &lacking);
            self.retry();
            return;
        }
        let values = match self.values(pod).await {
            Ok(values) => values,
            Err(error) => {
                self.no_values(pod, &error);
                self.retry();
                return;
            }
        };
        let generation = shape.generation;
        let hash = contents(&values);
        knoc_proto::crash::point("kubelet.ensure.before");
        let answer = self.context.site.agent.ensure_pod(shape, values).await;
        knoc_proto::crash::point("kubelet.ensure.after");
        match answer {
            Ok(answer) => {
                self.memory.agent.ensured = generation;
                self.memory.values.sent = Some(hash);
                self.memory.status.hold = None;
                self.memory.attempts = 0;
                self.answered(answer.pod);
            }
            Err(status) => self.not_ensured(pod, generation, &status),
        }
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

    /// Sends the values again if they changed.
    pub(super) async fn refresh(&mut self, pod: &Pod) {
        let values = match self.values(pod).await {
            Ok(values) => values,
            Err(error) => {
                let error = knoc_proto::error::chain(&error);
                tracing::warn!(uid = %self.uid, %error, "could not refresh the values of a pod, its old ones stay");
                self.refresh_later(Duration::from_mins(1));
                return;
            }
        };
        let hash = contents(&values);
        if self.memory.values.sent == Some(hash) {
            return;
        }
        match self
            .context
            .site
            .agent
            .update_values(self.uid, values)
            .await
        {
            Ok(()) => self.memory.values.sent = Some(hash),
            Err(status) => {
                self.refresh_later(Duration::from_secs(10));
                self.failed("UpdateValues", &status);
            }
        }
    }

    async fn values(&mut self, pod: &Pod) -> Result<pb::PodValues, NoValues> {
        let now = Timestamp::now();
        let needs = knoc_translate::needs(pod);
        let allocatable = self.context.allocatable();
        let resolved = resolve::resolve(
            &self.context.api.client,
            &self.context.api.services,
            pod,
            &needs,
            &allocatable,
            &mut self.memory.values.tokens,
            now,
        )
        .await?;
        let knoc_translate::Values {
            mut values,
            skipped,
        } = knoc_translate::values(pod, &resolved)?;
        if !skipped.is_empty() {
            let text = format!(
                "Keys [{}] were skipped since they are considered invalid environment variable names.",
                skipped.join(", ")
            );
            self.record_once(pod, "InvalidEnvironmentVariableNames", &text);
        }
        self.memory.values.revision = self.memory.values.revision.max(now.as_millisecond() - 1) + 1;
        values.revision = self.memory.values.revision;
        self.memory.values.refresh_at =
            resolve::refresh_at(&needs, &self.memory.values.tokens, now);
        self.memory.values.metadata = Some(metadata(pod));
        self.plan(now);
        Ok(values)
    }

    /// Plans when to resolve the values again: as planned before; within a minute if an earlier process sent them; at
    /// once if labels or annotations changed that the pod reads.
    pub(super) fn plan_refresh(&mut self, view: &PodView, now: Timestamp) {
        let Some(observed) = &view.observed else {
            return;
        };
        if observed.phase() == pb::PodPhase::Finished {
            self.memory.values.refresh_at = None;
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
                if needs != knoc_translate::Needs::default() {
                    self.refresh_later(Duration::from_millis(rand::random_range(1000..60_000)));
                }
                self.memory.values.metadata = Some(metadata(&view.pod));
            }
            Some(before) if before != metadata(&view.pod) && reads_metadata(&view.pod) => {
                self.memory.values.refresh_at = Some(now);
            }
            Some(_) => {}
        }
        self.plan(now);
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
        if let Some(at) = self.memory.values.refresh_at {
            let wait = at.duration_since(now).max(SignedDuration::ZERO);
            self.revisit_in(Duration::try_from(wait).unwrap_or_default());
        }
    }
}

/// A hash of the values, without their revision.
fn contents(values: &pb::PodValues) -> u64 {
    let mut hasher = DefaultHasher::new();
    let bare = pb::PodValues {
        revision: 0,
        ..values.clone()
    };
    bare.encode_to_vec().hash(&mut hasher);
    hasher.finish()
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
