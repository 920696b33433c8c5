//! `EnsurePod` and `UpdateValues`: resolve, translate, call, and what a refusal means.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use knoc_proto::{pb, reason::ErrorReason};
use knoc_translate::Missing;
use prost::Message as _;

use super::worker::Worker;
use crate::pods::{
    resolve::{self, ResolveError},
    status::Rejection,
    store::PodView,
};

/// Between two answers to the agent's wish for values.
const WISH_PAUSE: SignedDuration = SignedDuration::from_secs(5);

/// Why there are no values.
#[derive(Debug, thiserror::Error)]
enum NoValues {
    #[error(transparent)]
    Missing(#[from] Missing),
    #[error("resolve what the pod refers to")]
    Resolve(#[from] ResolveError),
}

impl Worker<'_> {
    /// Makes the agent have the pod, or remembers why it has not.
    pub(super) async fn ensure(&mut self, pod: &Pod) {
        let shape = match knoc_translate::shape(pod) {
            Ok(shape) => shape,
            Err(problems) => {
                let generation = pod.metadata.generation.unwrap_or(1);
                self.refused(pod, generation, "UnsupportedPodSpec", &problems.join("; "));
                return;
            }
        };
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

    fn no_values(&mut self, pod: &Pod, error: &NoValues) {
        let message = knoc_proto::error::chain(error);
        if let NoValues::Missing(Missing::Mounts(mounts)) = error {
            for mount in mounts {
                self.tell_once(pod, "FailedMount", mount);
            }
            self.hold("", &message);
            return;
        }
        self.tell_once(pod, "Failed", &format!("Error: {message}"));
        self.hold("CreateContainerConfigError", &message);
    }

    fn not_ensured(&mut self, pod: &Pod, generation: i64, status: &tonic::Status) {
        use ErrorReason as R;
        let message = status.message();
        match R::of(status) {
            Some(R::InvalidSpec | R::InvalidRequest | R::Unsupported) => {
                self.refused(pod, generation, "UnsupportedPodSpec", message);
            }
            Some(R::PermissionDenied) => self.refused(pod, generation, "NotAllowed", message),
            Some(R::SpecConflict) => {
                self.memory.agent.ensured = generation;
                self.tell(pod, true, "SpecConflict", message);
            }
            _ => {
                self.hold("", &format!("the agent does not take the pod: {message}"));
                self.failed("EnsurePod", status);
            }
        }
    }

    /// The pod is not taken as it is. What was accepted before goes on as it was accepted: then only the change is refused.
    fn refused(&mut self, pod: &Pod, generation: i64, reason: &str, message: &str) {
        if self.accepted(pod) {
            self.memory.agent.ensured = self.memory.agent.ensured.max(generation);
            self.tell_unsupported_change(pod, message);
            if self.context.pods.store.observed(self.uid).is_none() {
                // The agent lost it before it ran: it may take it again when the site file or its version changes.
                self.hold("", &format!("the agent does not take the pod: {message}"));
                self.retry();
            }
            return;
        }
        let rejection = Rejection::new(reason, message);
        self.tell(pod, true, reason, &rejection.message);
        self.memory.admission.rejection = Some(rejection);
    }

    /// Sends the values again where they changed.
    pub(super) async fn refresh(&mut self, pod: &Pod) {
        let values = match self.values(pod).await {
            Ok(values) => values,
            Err(error) => {
                let error = knoc_proto::error::chain(&error);
                tracing::warn!(uid = %self.uid, %error, "values not refreshed, the old ones stay");
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
            self.tell_once(pod, "InvalidEnvironmentVariableNames", &text);
        }
        self.memory.values.revision = self.memory.values.revision.max(now.as_millisecond() - 1) + 1;
        values.revision = self.memory.values.revision;
        self.memory.values.refresh_at =
            resolve::refresh_at(&needs, &self.memory.values.tokens, now);
        self.memory.values.metadata = Some(metadata(pod));
        self.plan(now);
        Ok(values)
    }

    /// When the values are to be looked at: as planned; soon for a pod of an earlier process; at once where labels or
    /// annotations changed that the pod may read.
    pub(super) fn plan_refresh(&mut self, view: &PodView, now: Timestamp) {
        let Some(observed) = &view.observed else {
            return;
        };
        if observed.phase() == pb::PodPhase::Finished {
            self.memory.values.refresh_at = None;
            return;
        }
        if observed.values_wanted {
            self.answer_wish(now);
        } else {
            self.memory.values.wish_answered = None;
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

    /// The agent has lost the values (it keeps them in memory, or the job runs again): they are sent whatever was sent
    /// before, but not again and again before the job can have taken them.
    fn answer_wish(&mut self, now: Timestamp) {
        let again = self
            .memory
            .values
            .wish_answered
            .and_then(|at| at.checked_add(WISH_PAUSE).ok());
        if let Some(again) = again.filter(|again| *again > now) {
            let soonest = self
                .memory
                .values
                .refresh_at
                .map_or(again, |at| at.min(again));
            self.memory.values.refresh_at = Some(soonest);
        } else {
            self.memory.values.wish_answered = Some(now);
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

    /// Comes back when the refresh is due.
    fn plan(&mut self, now: Timestamp) {
        if let Some(at) = self.memory.values.refresh_at {
            let wait = at.duration_since(now).max(SignedDuration::ZERO);
            self.look_after(Duration::try_from(wait).unwrap_or_default());
        }
    }
}

/// What the values hold, whatever their revision.
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
