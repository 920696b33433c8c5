//! One task for each pod. It takes an input, steps the machine, writes the record, performs the
//! effects, and publishes the result.
//!
//! Inputs come from the API (with a reply), the poller (rounds), the shim's link (reports) and the
//! actor's own effect tasks, which live in a `JoinSet` and end with the actor. The machine decides;
//! the actor only performs. The record is written before any effect that follows `Persist`. A
//! shim's final report is published at once, since the report itself is on disk already.

mod address;
mod create;
mod credentials;
mod effects;
mod ephemeral;
mod images;
mod reach;
mod values;

use std::{cmp::Ordering, sync::Arc, time::Duration};

use jiff::Timestamp;
use knoc_contract::jobdir::{JobDir, JobDirError};
use knoc_proto::{
    crash,
    error::chain,
    ids::PodUid,
    pb,
    pod::{PodSpec, PodValues},
    reason::ErrorReason,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{AbortHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

use super::{
    input::{Input, RequestError, Wanted},
    publish::observed,
    record::Record,
    stage::{self, StageError},
    state::{Effect, Event, Facts, Pod, State, Timeouts, step},
};
use crate::{config::Config, image::Credentials, site::Site};

/// A pod that was found on disk.
#[derive(Debug)]
pub struct Restored {
    /// The pod, as its record states it.
    pub pod: Pod,
    /// The pod's shape.
    pub spec: PodSpec,
    /// The cluster that wants the pod.
    pub cluster_id: String,
    /// The version that its job execs (`JobFile.version`).
    pub version: String,
    /// The newest accepted revision of its values.
    pub values_revision: i64,
}

/// The actor of a pod before it knows the pod.
#[derive(Debug)]
pub struct NewActor {
    site: Arc<Site>,
    uid: PodUid,
    /// Sends reports from the effects and from the shim's link.
    own: mpsc::WeakSender<Input>,
    /// Tells the poller about the job.
    wants: watch::Sender<Wanted>,
}

/// The task of one pod.
#[derive(Debug)]
struct Actor {
    site: Arc<Site>,
    uid: PodUid,
    dir: JobDir,
    /// Sends reports from the effects and from the shim's link.
    own: mpsc::WeakSender<Input>,
    spec: Arc<PodSpec>,
    cluster_id: String,
    /// The version that its job execs, as its job directory states it.
    version: String,
    values: values::Held,
    ephemeral: ephemeral::Adding,
    updates: images::Updates,
    /// The credentials for its images: from the request that brought them until the images are there.
    credentials: Option<Arc<Credentials>>,
    effects: JoinSet<Event>,
    /// The effects that are ending a job.
    cancels: Vec<AbortHandle>,
    /// Looks up the images; one task at a time.
    staging: JoinSet<Resolved>,
    /// Reads the files. There is only one such task at a time, however long the file system hangs.
    reading: Option<AbortHandle>,
    /// Set while the newest record is not on disk.
    unsaved: Option<Unsaved>,
    /// Tells the poller about the job.
    wants: watch::Sender<Wanted>,
}

/// The locations of a pod's images, or why they are not known.
type Resolved = Result<stage::Found, StageError>;

/// A record that could not be written.
#[derive(Debug)]
struct Unsaved {
    /// Consecutive failures.
    tries: u32,
    /// When to try again at the latest.
    at: Timestamp,
    /// Why it could not be written.
    why: String,
    /// The effects to perform once it is on disk.
    held: Vec<Effect>,
}

/// What the machine must know about the pod and the site.
#[must_use]
pub fn facts(spec: &PodSpec, config: &Config) -> Facts {
    let limits = &config.limits;
    Facts {
        uid: spec.uid().clone(),
        grace: spec.grace(),
        deadline: spec.deadline(),
        timeouts: Timeouts {
            report_grace: limits.report_grace,
            never_ends_after: limits.never_ends_after,
            lost_after: limits.lost_after,
            stop_slack: limits.stop_slack,
            backoff_initial: config.backoff.initial,
            backoff_max: config.backoff.max,
        },
    }
}

impl NewActor {
    /// The actor for the pod `uid`. Its inputs come through the channel of `own`.
    #[must_use]
    pub fn new(
        site: Arc<Site>,
        uid: PodUid,
        own: mpsc::WeakSender<Input>,
        wants: watch::Sender<Wanted>,
    ) -> Self {
        Self {
            site,
            uid,
            own,
            wants,
        }
    }

    /// Runs until the pod is forgotten, or until `stop`. It stops only between inputs, so no record
    /// is left half written. A pod that was `restored` comes with a sender, which is answered once
    /// the pod is on the board.
    pub async fn run(
        self,
        restored: Option<(Restored, oneshot::Sender<()>)>,
        mut inputs: mpsc::Receiver<Input>,
        stop: CancellationToken,
    ) {
        let (site, uid) = (Arc::clone(&self.site), self.uid.clone());
        let begun = match restored {
            Some((restored, published)) => Some(self.adopt(restored, published).await),
            None => self.create(&mut inputs).await,
        };
        if let Some((actor, pod)) = begun {
            Box::pin(actor.run(pod, &mut inputs, &stop)).await;
        }
        if !stop.is_cancelled() {
            site.shim_links.forget(&uid);
            site.shim_steps.forget(&uid);
            site.mesh.take_back(&uid);
            site.board.remove(uid.as_str());
            // Closed before the end is announced: whoever learns of the end removes a handle that
            // nobody serves any more.
            drop(inputs);
            // The registry may already be gone; then nobody holds a handle.
            drop(site.ended.send(uid).await);
        }
    }

    /// Makes the actor of a pod with this shape.
    fn of(self, spec: PodSpec, cluster_id: String) -> Actor {
        let Self {
            site,
            uid,
            own,
            wants,
        } = self;
        Actor {
            dir: site.state.pod(&uid),
            version: site.versions.own().to_owned(),
            spec: Arc::new(spec),
            cluster_id,
            site,
            uid,
            own,
            wants,
            values: values::Held::default(),
            ephemeral: ephemeral::Adding::default(),
            updates: images::Updates::default(),
            credentials: None,
            unsaved: None,
            effects: JoinSet::new(),
            cancels: Vec::new(),
            staging: JoinSet::new(),
            reading: None,
        }
    }
}

impl Actor {
    /// Takes inputs until the pod is forgotten, or until `stop`.
    async fn run(
        mut self,
        mut pod: Pod,
        inputs: &mut mpsc::Receiver<Input>,
        stop: &CancellationToken,
    ) {
        loop {
            let wake = self.wake(&pod);
            let input = tokio::select! {
                // Shutdown first, then finished effects, then requests, so that requests cannot
                // starve the effects' answers.
                biased;
                () = stop.cancelled() => break,
                Some(done) = self.effects.join_next() => match done {
                    Ok(event) => Input::Event(event),
                    Err(error) if error.is_cancelled() => continue,
                    Err(error) => {
                        tracing::error!(uid = %self.uid, error = chain(&error), "a task of the pod panicked");
                        continue;
                    }
                },
                Some(done) = self.staging.join_next() => match self.resolved(done).await {
                    Some(event) => Input::Event(event),
                    None => continue,
                },
                Some(progress) = self.ephemeral.next() => {
                    self.ephemeral_step(&pod, progress).await;
                    continue;
                }
                Some(progress) = self.updates.next() => {
                    pod = self.image_step(pod, progress).await;
                    continue;
                }
                input = inputs.recv() => match input {
                    Some(input) => input,
                    None => break,
                },
                () = sleep_until(wake) => Input::Event(Event::Tick),
            };
            pod = Box::pin(self.take(pod, input)).await;
            if matches!(pod.state, State::Forgotten) {
                break;
            }
        }
        // Running effects end with the actor. If sbatch has begun, its job is found by name after
        // the restart.
        self.effects.shutdown().await;
        self.staging.shutdown().await;
        self.ephemeral.end().await;
        self.updates.end().await;
    }

    async fn take(&mut self, pod: Pod, input: Input) -> Pod {
        let asked = !matches!(input, Input::Event(_) | Input::Link);
        if asked && let Some(error) = self.fenced().await {
            input.reject(error);
            return pod;
        }
        match input {
            Input::Link => self.relink(pod).await,
            Input::Event(event) => self.step(pod, event).await,
            Input::Ensure {
                spec,
                values,
                credentials,
                cluster_id,
                reply,
            } => {
                let (pod, answer) = self.ensure_again(pod, *spec, &values, &cluster_id).await;
                let answer = match answer {
                    Ok(()) => self.update_values(&pod, *values).await,
                    Err(error) => Err(error),
                };
                let pod = self.take_credentials(pod, &answer, credentials).await;
                drop(reply.send(answer.map(|()| (self.observed(&pod), false))));
                pod
            }
            Input::Values {
                values,
                credentials,
                reply,
            } => {
                let result = self.check_and_update_values(&pod, *values).await;
                let pod = self.take_credentials(pod, &result, credentials).await;
                drop(reply.send(result));
                pod
            }
            Input::Delete {
                grace,
                reason,
                reply,
            } => {
                let pod = self.apply(pod, Event::Delete { grace, reason }).await;
                drop(reply.send(self.saved().map(|()| self.observed(&pod))));
                pod
            }
            Input::Address { reply } => self.tell_address(pod, reply).await,
            Input::Forget { reply } => self.forget(pod, reply).await,
        }
    }

    async fn step(&mut self, pod: Pod, event: Event) -> Pod {
        let reported = matches!(event, Event::Report(_));
        if let Event::Report(report) = &event {
            self.site.shim_steps.reported(&self.uid, report);
            let unmounted = &report.unmounted_compressions;
            self.site.images.unread(&report.hostname, unmounted);
        }
        let pod = self.apply(pod, event).await;
        self.push_values(&pod, reported);
        self.add_ephemeral(&pod);
        self.update_images(pod).await
    }

    async fn forget(&mut self, pod: Pod, reply: super::input::Reply<()>) -> Pod {
        let pod = self.apply(pod, Event::Forget).await;
        drop(reply.send(self.forgotten(&pod)));
        pod
    }

    /// The answer to `ForgetPod`.
    fn forgotten(&self, pod: &Pod) -> Result<(), RequestError> {
        if matches!(pod.state, State::Forgotten) {
            return Ok(());
        }
        let message = format!("pod {} is not finished", self.uid);
        Err(RequestError::new(ErrorReason::NotFinished, message))
    }

    async fn relink(&mut self, pod: Pod) -> Pod {
        let up = self.site.shim_links.client(&self.uid).is_some();
        if up {
            self.linked();
            self.updates.linked();
        }
        let pod = self.apply(pod, Event::Link(up)).await;
        self.push_values(&pod, false);
        self.add_ephemeral(&pod);
        self.update_images(pod).await
    }

    /// Handles `EnsurePod` for a pod that exists: the same shape, an older generation, or a newer
    /// one that changes only what may change. The same generation may still add ephemeral
    /// containers, which the kubelet sends once it has what they refer to.
    async fn ensure_again(
        &mut self,
        pod: Pod,
        spec: PodSpec,
        values: &PodValues,
        cluster_id: &str,
    ) -> (Pod, Result<(), RequestError>) {
        if cluster_id != self.cluster_id {
            let message = format!("pod {} belongs to cluster {:?}", self.uid, self.cluster_id);
            return (
                pod,
                Err(RequestError::new(ErrorReason::ClusterMismatch, message)),
            );
        }
        let generations = spec.generation().cmp(&self.spec.generation());
        let conflict = match generations {
            Ordering::Less => return (pod, Ok(())),
            Ordering::Equal if !super::update::same(&self.spec, &spec) => Some(format!(
                "pod {} exists with another shape of this generation",
                self.uid
            )),
            Ordering::Equal if !super::update::adds(&self.spec, &spec) => return (pod, Ok(())),
            Ordering::Equal | Ordering::Greater => super::update::allowed(&self.spec, &spec).err(),
        };
        if let Some(message) = conflict {
            return (
                pod,
                Err(RequestError::new(ErrorReason::SpecConflict, message)),
            );
        }
        // A container that is added finds its variables, even if this process ends right after the shape was written.
        if super::update::adds(&self.spec, &spec)
            && let Err(error) = self.update_values(&pod, values.clone()).await
        {
            return (pod, Err(error));
        }
        let spec = Arc::new(super::update::merged(&self.spec, spec));
        if let Err(error) = self.rewrite_spec(Arc::clone(&spec)).await {
            return (pod, Err(error));
        }
        let facts = facts(&spec, &self.site.config);
        let before = std::mem::replace(&mut self.spec, spec);
        let pod = self.apply(pod, Event::Update(facts)).await;
        if !super::update::changes_images(&before, &self.spec) {
            return (pod, Ok(()));
        }
        // What was looked up is not wanted any more.
        self.staging.shutdown().await;
        self.updates.renamed(&before, &self.spec);
        if credentials::before_images(&pod) {
            // They are for the images of the older shape. The request has those for the newer one, or they are asked for.
            self.credentials = None;
        }
        (self.apply(pod, Event::LookAgain).await, Ok(()))
    }

    /// Performs one step and its effects.
    async fn apply(&mut self, pod: Pod, event: Event) -> Pod {
        let final_report = matches!(&event, Event::Report(report) if report.r#final);
        if final_report {
            crash::point("agent.report.before");
        }
        let (pod, effects) = step(pod, event, Timestamp::now());
        if pod.is_finished() || pod.deletion.is_some() {
            // The images are for a pod that is no longer wanted.
            self.staging.abort_all();
            self.ephemeral.abort();
            self.updates.abort();
            self.credentials = None;
        }
        if final_report {
            self.show(&pod);
        }
        self.perform(&pod, effects).await;
        self.take_address_back(&pod);
        if final_report {
            crash::point("agent.report.after");
        }
        self.show(&pod);
        pod
    }

    /// Whether the newest record is on disk.
    fn saved(&self) -> Result<(), RequestError> {
        let Some(unsaved) = &self.unsaved else {
            return Ok(());
        };
        let message = format!("the pod's record could not be written: {}", unsaved.why);
        Err(RequestError::new(ErrorReason::Internal, message))
    }

    /// When the actor must act without an input.
    fn wake(&self, pod: &Pod) -> Option<Timestamp> {
        let save = self.unsaved.as_ref().map(|unsaved| unsaved.at);
        [pod.wake(), save].into_iter().flatten().min()
    }

    fn observed(&self, pod: &Pod) -> pb::PodObserved {
        let mut observed = observed(pod, &self.spec, &self.cluster_id);
        observed.values_wanted = self.wants_values(pod) || self.wants_credentials(pod);
        observed.ephemeral_containers = self.ephemeral.statuses(pod, &self.spec);
        self.updates.show(pod, &mut observed);
        observed
    }

    fn show(&self, pod: &Pod) {
        let wanted = Wanted {
            job: pod.job(),
            poll_soon: pod.poll_soon(),
        };
        self.wants.send_if_modified(|known| {
            let news = *known != wanted;
            *known = wanted;
            news
        });
        self.site.board.publish(self.observed(pod));
    }
}

/// Reads the job directory of a pod. `None` if it has no record, because it was only half created
/// or half removed.
pub fn restore(dir: &JobDir, config: &Config) -> Result<Option<Restored>, JobDirError> {
    let Some(record) = knoc_contract::jobdir::read_json::<Record>(&dir.record_path())? else {
        return Ok(None);
    };
    let job = dir.spec()?;
    // The report is not essential: the shim and Slurm will report again. Without this pod, its job
    // would be lost.
    let report = dir.report().unwrap_or_else(|error| {
        tracing::warn!(
            uid = dir.uid(),
            error = chain(&error),
            "a report cannot be read"
        );
        None
    });
    let Ok(uid) = PodUid::try_from(dir.uid()) else {
        return Ok(None);
    };
    let spec = PodSpec::accepted_before(uid, job.spec.unwrap_or_default());
    let facts = facts(&spec, config);
    let cluster_id = record.cluster_id.clone();
    let values_revision = record.values_revision;
    Ok(Some(Restored {
        pod: record.restore(facts, report),
        spec,
        cluster_id,
        version: job.version,
        values_revision,
    }))
}

pub(crate) fn write_record(dir: &JobDir, record: &Record) -> Result<(), JobDirError> {
    knoc_contract::jobdir::write_json(&dir.record_path(), record)
}

fn not_found(uid: &PodUid) -> RequestError {
    RequestError::new(ErrorReason::NotFound, format!("no pod {uid}"))
}

async fn sleep_until(at: Option<Timestamp>) {
    match at {
        Some(at) => {
            let left = at.duration_since(Timestamp::now());
            // Never early: a tick before its time does nothing.
            tokio::time::sleep(Duration::try_from(left).unwrap_or_default()).await;
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
