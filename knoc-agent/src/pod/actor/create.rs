//! Creates the actor's pod: from disk after a restart, or for `EnsurePod`.
//!
//! All files that `EnsurePod` promises are written first and then synced concurrently, since each
//! sync waits for the disk and delays `sbatch`. If the images are at hand, the first record already
//! says that a job is being submitted.

use std::sync::Arc;

use jiff::Timestamp;
use knoc_proto::{crash, error::chain, pb, pod::PodValues, reason::ErrorReason};
use tokio::sync::{mpsc, oneshot};

use super::{
    Actor, NewActor, Restored, credentials::before_images, facts, images::name_images, not_found,
};
use crate::{
    config::AtRest,
    pod::{
        input::{Input, Reply, RequestError},
        record::Record,
        stage,
        state::{BeforeJob, Effect, Event, Pod, State, step},
    },
};

/// A new pod, and its first effects.
struct Begun {
    pod: Pod,
    effects: Vec<Effect>,
}

impl NewActor {
    /// Restores a pod that was found on disk.
    pub(super) async fn adopt(
        self,
        restored: Restored,
        published: oneshot::Sender<()>,
    ) -> (Actor, Pod) {
        let Restored {
            mut pod,
            spec,
            cluster_id,
            version,
            values_revision,
        } = restored;
        let mut actor = self.of(spec, cluster_id);
        actor.version = version;
        actor.take_up_address(&mut pod);
        actor.take_up(&pod, values_revision).await;
        // The registry may have stopped waiting.
        published.send(()).ok();
        let pod = actor.apply(pod, Event::Begin).await;
        (actor, pod)
    }

    /// The first input must create the pod; any other is answered with "not found".
    pub(super) async fn create(self, inputs: &mut mpsc::Receiver<Input>) -> Option<(Actor, Pod)> {
        loop {
            match inputs.recv().await? {
                Input::Ensure {
                    spec,
                    values,
                    credentials,
                    cluster_id,
                    reply,
                } => {
                    let mut actor = self.of(*spec, cluster_id);
                    actor.credentials = credentials.map(Arc::new);
                    let pod = actor.accept(*values, reply).await?;
                    return Some((actor, pod));
                }
                other @ (Input::Event(_)
                | Input::Link
                | Input::Values { .. }
                | Input::Address { .. }
                | Input::Delete { .. }
                | Input::Forget { .. }) => other.reject(not_found(&self.uid)),
            }
        }
    }
}

impl Actor {
    /// Reads what the record does not state, and publishes the pod.
    async fn take_up(&mut self, pod: &Pod, values_revision: i64) {
        let dir = self.dir.clone();
        if !pod.is_finished() {
            let read = tokio::task::spawn_blocking(move || {
                (stage::link_pin(&dir), dir.values(), dir.spec())
            });
            match read.await {
                Ok((pin, staged, job)) => {
                    self.expect_link(pin);
                    if !before_images(pod) {
                        self.take_up_images(job.unwrap_or_default());
                    }
                    let staged = staged.ok().flatten().map_or(0, |staged| staged.revision);
                    self.values.revision = values_revision.max(staged);
                }
                Err(error) => tracing::error!(uid = %self.uid, error = chain(&error), "restore"),
            }
        }
        self.show(pod);
    }

    /// What the job file names.
    fn take_up_images(&mut self, mut job: pb::JobFile) {
        name_images(&mut job);
        // Of several for one container the first one counts.
        self.updates.staged(job.images.iter().rev());
    }

    async fn accept(
        &mut self,
        values: PodValues,
        reply: Reply<(pb::PodObserved, bool)>,
    ) -> Option<Pod> {
        if let Some(error) = self.fenced().await {
            drop(reply.send(Err(error)));
            return None;
        }
        let now = Timestamp::now();
        let pod = Pod::new(facts(&self.spec, &self.site.config), now);
        let images = stage::cached_images(&self.site, &self.spec, self.known_credentials()).await;
        let begun = match &images {
            Some(_) => self.begin(pod, now),
            None => Begun {
                pod,
                effects: Vec::new(),
            },
        };
        if let Err(error) = self.put_on_disk(&begun.pod, images, values).await {
            drop(reply.send(Err(error)));
            return None;
        }
        let Begun { pod, effects } = begun;
        let submitting = matches!(pod.state, State::BeforeJob(BeforeJob::Submitting { .. }));
        self.show(&pod);
        self.perform(&pod, effects).await;
        drop(reply.send(Ok((self.observed(&pod), true))));
        if submitting {
            self.credentials = None;
            return Some(pod);
        }
        Some(self.apply(pod, Event::Begin).await)
    }

    /// Steps the pod up to the submission, whose record is written together with the other files.
    fn begin(&self, pod: Pod, now: Timestamp) -> Begun {
        let (pod, _) = step(pod, Event::Begin, now);
        let notes = stage::all_present(&self.spec).into_iter();
        let pod = notes.fold(pod, |pod, note| step(pod, Event::Note(note), now).0);
        let (pod, mut effects) = step(pod, Event::Staged, now);
        effects.retain(|effect| *effect != Effect::Persist);
        Begun { pod, effects }
    }

    /// Writes all files of a new pod.
    async fn put_on_disk(
        &mut self,
        pod: &Pod,
        found: Option<stage::Found>,
        values: PodValues,
    ) -> Result<(), RequestError> {
        let at_rest = self.site.config.values.at_rest;
        self.values.revision = values.revision;
        let record = Record::of(pod, &self.cluster_id, self.values.revision);
        let cluster_id = self.cluster_id.clone();
        // The images stay in the cache until the job file names them.
        let found = found.unwrap_or_default();
        let staged_images = found.images().to_vec();
        let job = stage::job_file(&self.site, &self.spec, staged_images.clone(), cluster_id);
        let staged = (at_rest == AtRest::File).then(|| (*values).clone());
        let dir = self.dir.clone();
        // The semaphore is never closed; an error would only mean that there is no bound.
        let permit = self.site.accepting.acquire().await;
        crash::point("agent.record.before");
        let written =
            tokio::task::spawn_blocking(move || stage::accept(&dir, &job, &record, staged)).await;
        drop(permit);
        drop(found);
        crash::point("agent.record.after");
        let failed = |error: &(dyn std::error::Error + 'static)| {
            let message = format!("accept pod: {}", chain(error));
            RequestError::new(ErrorReason::Internal, message)
        };
        let pin = match written {
            Ok(Ok(pin)) => pin,
            Ok(Err(error)) => {
                // A pod that was rejected leaves nothing on disk: the next start would restore a whole record.
                self.remove().await;
                return Err(failed(&error));
            }
            Err(error) => {
                self.remove().await;
                return Err(failed(&error));
            }
        };
        self.updates.staged(&staged_images);
        self.expect_link(Ok(pin));
        self.hold(values);
        Ok(())
    }

    fn expect_link(&self, pin: Result<String, stage::StageError>) {
        match (pin, self.own.upgrade()) {
            (Ok(pin), Some(own)) => {
                let links = &self.site.shim_links;
                links.expect(&self.uid, &self.spec, pin, own);
            }
            (Err(error), _) => tracing::warn!(uid = %self.uid, error = error.message, "link keys"),
            (Ok(_), None) => {}
        }
    }
}
