//! Performs the machine's effects.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use knoc_contract::{
    capability::STOP_SIGNAL,
    jobdir::{JobDir, atomic::FileError},
};
use knoc_proto::{crash, error::chain, ids::JobId, pb, pod::PodSpec, reason::ErrorReason};
use tokio::task::{AbortHandle, JoinError};
use tonic::Request;

use super::{Actor, Resolved, Unsaved, images::name_images, write_record};
use crate::{
    pod::{
        input::RequestError,
        outcome::OVERDUE,
        record::Record,
        stage::{self, StageError},
        state::{BeforeJob, Effect, Event, Note, Pod, State},
    },
    scheduler::{Cancel, JobRef, SubmitErrorKind, SubmitRequest},
    shim_links::DEADLINE,
    shim_steps::Use,
    site::Site,
};

/// The step by which the pause between two tries to write a record grows, and the longest pause.
const SAVE_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];
/// How many bytes of the end of `batch.out` become part of a message.
const TAIL: u64 = 1024;

impl Actor {
    /// Performs `effects` in their order, after those that a failed write has held back. Long work
    /// runs in tasks of its own and answers with an event.
    pub(super) async fn perform(&mut self, pod: &Pod, effects: Vec<Effect>) {
        let unsaved = self.unsaved.take();
        let tries = unsaved.as_ref().map_or(0, |unsaved| unsaved.tries);
        let held = unsaved.into_iter().flat_map(|unsaved| {
            let again = std::iter::once(Effect::Persist);
            again.chain(unsaved.held)
        });
        // A forgotten pod has no record: the machine's state would be written as that of a newly
        // accepted pod.
        let forgotten = matches!(pod.state, State::Forgotten);
        let recorded = |effect: &Effect| !forgotten || *effect != Effect::Persist;
        let mut effects = held.chain(effects).filter(recorded);
        while let Some(effect) = effects.next() {
            if effect != Effect::Persist {
                self.perform_one(pod, effect).await;
            } else if let Err(error) = self.persist(pod).await {
                tracing::error!(uid = %self.uid, error, "the pod's record could not be written");
                return self.hold_back(effects.collect(), error, tries + 1);
            }
        }
    }

    /// Effects that follow a record rely on it, so they wait until it can be written.
    fn hold_back(&mut self, mut held: Vec<Effect>, why: String, tries: u32) {
        // No job is submitted without its intent on disk: the machine decides again.
        if held.contains(&Effect::Submit) {
            let kind = SubmitErrorKind::Throttled;
            let message = why.clone();
            let failed = Event::SubmitFailed { kind, message };
            self.effects.spawn(std::future::ready(failed));
        }
        held.retain(|effect| !matches!(effect, Effect::Persist | Effect::Submit));
        let [first, longest] = SAVE_AGAIN;
        let pause = first.saturating_mul(tries).min(longest);
        let at = Timestamp::now() + pause.mul_f64(rand::random_range(0.5..1.5));
        self.unsaved = Some(Unsaved {
            tries,
            at,
            why,
            held,
        });
    }

    async fn perform_one(&mut self, pod: &Pod, effect: Effect) {
        match effect {
            // It begins once they are there.
            Effect::Stage if self.lacks_credentials() => {}
            Effect::Stage => {
                let (site, spec) = (Arc::clone(&self.site), Arc::clone(&self.spec));
                let credentials = self.known_credentials();
                let work = stage::resolve(site, spec, credentials, self.own.clone());
                self.staging.spawn(work);
            }
            Effect::Submit => {
                let request = SubmitRequest {
                    uid: self.uid.clone(),
                    spec: Arc::clone(&self.spec),
                    cluster_id: self.cluster_id.clone(),
                    attempt: pod.attempt,
                    jobdir: self.dir.path().to_owned(),
                    shim: self.site.versions.program_or_own(&self.version),
                };
                self.effects.spawn(submit(Arc::clone(&self.site), request));
            }
            Effect::Find => {
                self.effects
                    .spawn(find(Arc::clone(&self.site), self.uid.clone(), pod.since));
            }
            Effect::Cancel { job, how } => {
                let work = cancel(Arc::clone(&self.site), job, how);
                self.cancels.retain(|cancel| !cancel.is_finished());
                self.cancels.push(self.effects.spawn(work));
            }
            Effect::Stop { job, grace } => {
                // Rounded up: nothing is killed before its grace period is over.
                let whole = u64::from(grace.subsec_nanos() > 0).saturating_add(grace.as_secs());
                let request = pb::StopRequest {
                    grace_seconds: whole.try_into().unwrap_or(i64::MAX),
                    reason: why_stopped(pod),
                };
                let signal = stop_signal(pod.report.as_ref());
                self.effects
                    .spawn(stop(Arc::clone(&self.site), job, request, signal));
            }
            Effect::ReadFiles => {
                if self.reading.as_ref().is_none_or(AbortHandle::is_finished) {
                    self.reading = Some(self.effects.spawn(read_files(self.dir.clone())));
                }
            }
            // The caller does this, because it knows which effects wait for it.
            Effect::Persist => {}
            Effect::CleanUp => self.clean_up().await,
            Effect::PollSoon => self.site.poll_soon.notify_one(),
            Effect::Remove => {
                self.finish_cancels().await;
                self.remove().await;
            }
        }
    }

    /// An effect that ends a job is not aborted when the pod is forgotten, because afterwards
    /// nobody knows the job. Each one has its own deadline.
    async fn finish_cancels(&mut self) {
        while self.cancels.iter().any(|cancel| !cancel.is_finished()) {
            // Nobody waits for the other effects' answers.
            if self.effects.join_next().await.is_none() {
                return;
            }
        }
    }

    /// Writes the record.
    pub(super) async fn persist(&self, pod: &Pod) -> Result<(), String> {
        let submitting = matches!(
            pod.state,
            State::BeforeJob(BeforeJob::Submitting { look: None })
        );
        if submitting {
            crash::point("agent.record.before");
        }
        let record = Record::of(pod, &self.cluster_id, self.values.revision);
        let (dir, lease) = (self.dir.clone(), self.site.lease.clone());
        let written = tokio::task::spawn_blocking(move || {
            // The records belong to the newer agent; this one must not write them.
            match lease.fenced() {
                Some(fenced) => Err(chain(&fenced)),
                None => write_record(&dir, &record).map_err(|error| chain(&error)),
            }
        })
        .await;
        if submitting {
            crash::point("agent.record.after");
        }
        written.map_err(|error| chain(&error))?
    }

    /// The error for every request once a newer agent has taken over the pods, else `None`.
    pub(super) async fn fenced(&self) -> Option<RequestError> {
        let lease = self.site.lease.clone();
        // A check that failed tells nothing.
        let looked = tokio::task::spawn_blocking(move || lease.fenced()).await;
        let fenced = looked.ok().flatten()?;
        Some(RequestError::new(ErrorReason::ShuttingDown, chain(&fenced)))
    }

    pub(super) async fn remove(&self) {
        let (dir, site, version) = (
            self.dir.clone(),
            Arc::clone(&self.site),
            self.version.clone(),
        );
        let removed = tokio::task::spawn_blocking(move || {
            dir.remove()?;
            if site.versions.release(&version) {
                site.versions.prune();
            }
            Ok::<_, FileError>(())
        });
        match removed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(uid = %self.uid, error = chain(&error), "remove"),
            Err(error) => tracing::warn!(uid = %self.uid, error = chain(&error), "remove"),
        }
    }

    /// Staging has ended: completes `job.pb` with the present shape. `None` if staging was given
    /// up.
    pub(super) async fn resolved(&mut self, done: Result<Resolved, JoinError>) -> Option<Event> {
        let resolved = match done {
            Err(error) if error.is_cancelled() => return None,
            done => done.unwrap_or_else(|error| Err(StageError::of_pod(&error))),
        };
        let completed = match resolved {
            Ok(found) => self.complete(found).await,
            Err(error) => Err(error),
        };
        if completed.is_ok() {
            self.credentials = None;
            self.name_own_version().await;
        }
        Some(match completed {
            Ok(()) => Event::Staged,
            Err(StageError {
                container,
                image,
                reason,
                message,
            }) => Event::StageFailed {
                container,
                image,
                reason,
                message,
            },
        })
    }

    /// A pod that this agent stages runs this agent's version, so the version of an older agent may
    /// be removed.
    async fn name_own_version(&mut self) {
        let own = self.site.versions.own().to_owned();
        let before = std::mem::replace(&mut self.version, own);
        if !self.site.versions.release(&before) {
            return;
        }
        let site = Arc::clone(&self.site);
        let pruned = tokio::task::spawn_blocking(move || site.versions.prune()).await;
        if let Err(error) = pruned {
            tracing::warn!(uid = %self.uid, error = chain(&error), "prune");
        }
    }

    async fn complete(&mut self, found: stage::Found) -> Result<(), StageError> {
        let images = found.images().to_vec();
        let mut job = stage::job_file(&self.site, &self.spec, images, self.cluster_id.clone());
        let (dir, lease) = (self.dir.clone(), self.site.lease.clone());
        let written = tokio::task::spawn_blocking(move || {
            if let Some(fenced) = lease.fenced() {
                return Err(StageError::of_pod(&fenced));
            }
            if job.egress.is_none() {
                // After a start of the agent no kubelet may have described the network yet. It was known when the pod came.
                job.egress = dir.spec().ok().and_then(|before| before.egress);
            }
            dir.write_spec(&job)
                .map_err(|error| StageError::of_pod(&error))
        });
        let written = written.await;
        written.unwrap_or_else(|error| Err(StageError::of_pod(&error)))?;
        self.updates.staged(found.images());
        Ok(())
    }

    /// Writes the newer generation of the shape into `job.pb`; the rest of the file stays.
    pub(super) async fn rewrite_spec(&self, spec: Arc<PodSpec>) -> Result<(), RequestError> {
        let dir = self.dir.clone();
        let written = tokio::task::spawn_blocking(move || {
            let mut job = dir.spec()?;
            // Afterwards the shape does not say any more which image a location is of.
            name_images(&mut job);
            job.spec = Some((**spec).clone());
            dir.write_spec(&job)?;
            Ok::<_, knoc_contract::jobdir::JobDirError>(())
        });
        let failed = |error: &(dyn std::error::Error + 'static)| {
            RequestError::new(
                ErrorReason::Internal,
                format!("write the shape: {}", chain(error)),
            )
        };
        written
            .await
            .map_err(|e| failed(&e))?
            .map_err(|e| failed(&e))
    }
}

async fn submit(site: Arc<Site>, request: SubmitRequest) -> Event {
    let answer = site.scheduler.submit(&request, site.may_submit()).await;
    crash::point("agent.sbatch.after");
    match answer {
        Ok(submitted) => Event::Submitted(submitted),
        Err(error) => Event::SubmitFailed {
            kind: error.kind,
            message: error.message,
        },
    }
}

async fn find(site: Arc<Site>, uid: knoc_proto::ids::PodUid, since: Timestamp) -> Event {
    match site.scheduler.find(&uid, since).await {
        Ok(jobs) => Event::Found(jobs),
        Err(error) => Event::FindFailed(chain(&error)),
    }
}

async fn cancel(site: Arc<Site>, job: JobRef, how: Cancel) -> Event {
    let event = match site.scheduler.cancel(&job, how).await {
        Ok(()) => Event::Tick,
        // The state's deadline leads to another try.
        Err(error) => Event::Note(Note {
            warning: true,
            reason: "SlurmCancelFailed",
            message: format!("cancel job {}: {}", job.id, chain(&error)),
            container: String::new(),
        }),
    };
    site.poll_soon.notify_one();
    event
}

/// Tells the containers to stop through the shim's link or, without a link, with a signal to the
/// batch script.
async fn stop(site: Arc<Site>, job: JobRef, request: pb::StopRequest, signal: Cancel) -> Event {
    let grace = request.grace_seconds;
    let _used = link_for_stop(&site, &job).await;
    if let Some(mut client) = site.shim_links.client(&job.uid) {
        let mut request = Request::new(request);
        request.set_timeout(DEADLINE);
        match client.stop(request).await {
            Ok(_) => return Event::Tick,
            Err(status) => {
                tracing::info!(uid = %job.uid, error = status.message(), "stop by the link");
            }
        }
    }
    // Without it, the shim takes the pod's own.
    let dir = site.state.pod(&job.uid);
    let write = move || dir.write_stop_grace(grace).map_err(|error| chain(&error));
    let written = tokio::task::spawn_blocking(write).await;
    if let Err(error) = written.unwrap_or_else(|error| Err(chain(&error))) {
        tracing::warn!(uid = %job.uid, error, "the job is not told the grace period of this stop");
    }
    cancel(site, job, signal).await
}

/// If compute nodes cannot reach the agent, a job step carries the link; the signal is slower and
/// cannot carry the reason of the stop. If the step takes long, the signal has to do.
async fn link_for_stop(site: &Site, job: &JobRef) -> Option<Use> {
    if site.shim_links.client(&job.uid).is_some() {
        return site.shim_steps.held(&job.uid);
    }
    let reaching = tokio::time::timeout(DEADLINE, site.shim_steps.reach(&job.uid));
    match reaching.await {
        Ok(Ok(used)) => used,
        Ok(Err(status)) => {
            tracing::info!(uid = %job.uid, error = status.message(), "stop by a signal");
            None
        }
        Err(_) => None,
    }
}

/// The reason that the shim is given for the stop.
fn why_stopped(pod: &Pod) -> String {
    if pod.is_overdue() {
        return OVERDUE.to_owned();
    }
    let deletion = pod.deletion.as_ref();
    deletion.map_or_else(String::new, |deletion| deletion.reason.clone())
}

/// The signal that tells this shim to stop. After USR1 a shim takes the whole grace period. An
/// older shim would be killed by USR1, or would ignore it (see the batch script), so a shim whose
/// capabilities are old or not known gets TERM; it then takes the shorter grace period that Slurm
/// allows.
fn stop_signal(report: Option<&pb::Report>) -> Cancel {
    let knows = report.is_some_and(|report| {
        let mut all = report.capabilities.iter();
        all.any(|capability| capability == STOP_SIGNAL)
    });
    if knows {
        Cancel::Stop
    } else {
        Cancel::Terminate
    }
}

/// Reads the report file or, without one, the output of the batch script.
async fn read_files(dir: JobDir) -> Event {
    let read = tokio::task::spawn_blocking(move || match dir.report() {
        Ok(Some(report)) if report.r#final => Event::Report(Box::new(report)),
        Ok(Some(report)) if JobId::try_from(report.job_id.as_str()).is_ok() => {
            Event::Report(Box::new(report))
        }
        Ok(_) => Event::Files {
            batch_tail: tail(&dir),
            claimed: dir.is_claimed(),
        },
        Err(error) => Event::Files {
            batch_tail: format!("{}; {}", chain(&error), tail(&dir)),
            claimed: true,
        },
    });
    read.await.unwrap_or_else(|error| Event::Files {
        batch_tail: chain(&error),
        claimed: true,
    })
}

fn tail(dir: &JobDir) -> String {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let read = || {
        let mut file = std::fs::File::open(dir.batch_out())?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.take(TAIL).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    // The output only explains the end, so an unreadable file counts as empty.
    read().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_shim_that_knows_the_stop_signal_gets_it() {
        let able = |capabilities: &[&str]| pb::Report {
            capabilities: capabilities.iter().map(ToString::to_string).collect(),
            ..pb::Report::default()
        };
        assert_eq!(stop_signal(None), Cancel::Terminate);
        assert_eq!(stop_signal(Some(&able(&["stats"]))), Cancel::Terminate);
        let new = able(&["stats", STOP_SIGNAL]);
        assert_eq!(stop_signal(Some(&new)), Cancel::Stop);
    }
}
