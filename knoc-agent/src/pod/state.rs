//! PURE: the machine of one pod: `step(pod, event, now) -> (pod, effects)`. The diagram is in [`super`].
//!
//! Holds no clock, no file, no process. Deadlines live in the states and are reported by [`Pod::wake`]; the actor
//! sleeps until then and sends [`Event::Tick`]. Effects are performed in their order: [`Effect::Persist`] before
//! [`Effect::Submit`] is what makes a crash between them harmless.

mod ending;
mod job;
mod patience;
mod submit;

use std::time::Duration;

use jiff::Timestamp;
use knoc_proto::{
    ids::{JobId, PodUid},
    pb,
};

use super::outcome::{Cause, Outcome};
use crate::scheduler::{Cancel, JobRef, JobState, JobView, RefusalKind, Submitted};
pub use patience::Patience;

/// Looks by name this long after the last fruitless look.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// So many looks by name must find nothing before a job counts as not accepted.
pub(crate) const LOOKS: u32 = 2;
/// Between two readings of the files of a job that ended without its report.
pub(crate) const FILES_AGAIN: Duration = Duration::from_secs(1);
/// Between two readings of the report of a pod that runs where its shim has no link to us.
pub(crate) const FILES_UNLINKED: Duration = Duration::from_secs(10);
/// Between two cancellations of a job that does not go.
pub(crate) const CANCEL_AGAIN: Duration = Duration::from_secs(10);
/// How long the report of a job that we ended may take to show: it decides little more than exit codes.
pub(crate) const ENDED_BY_US: Duration = Duration::from_secs(10);
/// A job may outlive its final report this long (its epilog, a hanging file system) before it is cancelled.
pub(crate) const LINGER: Duration = Duration::from_mins(1);
/// How long a pod's deadline may be over before we end it: by then a shim that knew it from its start has begun to.
pub(crate) const SHIM_FIRST: Duration = Duration::from_secs(2);
/// Notes kept of one pod.
const NOTES: usize = 32;

/// What the machine must know of the pod and the site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The pod.
    pub uid: PodUid,
    /// Its termination grace.
    pub grace: Duration,
    /// Its `activeDeadlineSeconds`.
    pub deadline: Option<Duration>,
    /// The site's patience.
    pub patience: Patience,
}

/// One pod: the state, and what was seen of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Pod {
    /// What does not change by itself.
    pub facts: Facts,
    /// Where it stands.
    pub state: State,
    /// Since when.
    pub since: Timestamp,
    /// Submissions so far.
    pub attempt: u32,
    /// The newest that the scheduler said of the pod's job.
    pub view: Option<JobView>,
    /// When `sbatch` was called, and when it had answered with the id of the pod's job. With the id these tell the job
    /// from a stranger's that got the same id later.
    pub sbatch: Option<(Timestamp, Timestamp)>,
    /// Since when the scheduler does not show the job.
    pub unseen: Option<Timestamp>,
    /// The shim's newest report.
    pub report: Option<pb::Report>,
    /// Set by `DeletePod`, never taken back.
    pub deletion: Option<Deletion>,
    /// Is the shim's link up?
    pub link: bool,
    /// When the report was last read for want of a link, or the link or the job came.
    pub read_at: Timestamp,
    /// The end of `batch.out`, read when the job ended without a report.
    pub batch_tail: String,
    /// No shim had claimed the job directory when the files were last read.
    pub unclaimed: bool,
    /// What is worth an Event.
    pub notes: Vec<pb::PodNote>,
}

/// The wish that the pod ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deletion {
    /// Time for the containers, from the moment they are told.
    pub grace: Duration,
    /// For people.
    pub reason: String,
}

/// Where a pod stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// On disk, nothing done yet.
    Accepted,
    /// Job directory, values, images.
    Staging {
        /// Failed attempts.
        tries: u32,
        /// Why the last one failed, and when the next one is due.
        trouble: Option<Trouble>,
    },
    /// Refused for now.
    Throttled {
        /// Refusals in a row.
        tries: u32,
        /// CamelCase.
        reason: String,
        /// The scheduler's words.
        message: String,
        /// When to try again.
        retry_at: Timestamp,
    },
    /// The intent is on disk; the job may or may not be accepted.
    Submitting {
        /// Set where it is not known whether the job was accepted: looking for it by name.
        look: Option<Look>,
    },
    /// The job waits.
    Queued {
        /// Which.
        job: JobId,
        /// Since when its reason is one that never ends.
        never: Option<Timestamp>,
    },
    /// The job has its nodes.
    Running {
        /// Which.
        job: JobId,
    },
    /// The job is being ended by us.
    Stopping {
        /// Which.
        job: JobId,
        /// Why.
        cause: Cause,
        /// What was done last.
        how: Ending,
        /// When the next, harder measure is due.
        deadline: Timestamp,
    },
    /// The scheduler does not know the job.
    Lost {
        /// Which.
        job: JobId,
        /// Since when.
        since: Timestamp,
        /// When to read the files again.
        look_at: Timestamp,
    },
    /// The job ended; its report is awaited.
    Settling {
        /// Which.
        job: JobId,
        /// Where we ended it.
        cause: Option<Cause>,
        /// When to stop waiting.
        until: Timestamp,
        /// When to read the files again.
        look_at: Timestamp,
    },
    /// Ended for good.
    Finished {
        /// How.
        outcome: Outcome,
        /// The job that may still linger after its final report.
        lingering: Option<JobId>,
    },
    /// Let go of: nothing is left on disk.
    Forgotten,
}

/// How hard a job is being ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Taken out of the queue.
    Dequeued,
    /// The containers were told.
    Told,
    /// The job was cancelled.
    Cancelled,
}

/// Looking for a job by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look {
    /// Looks that found nothing.
    pub tries: u32,
    /// When to look (again).
    pub at: Timestamp,
    /// Why it is not known.
    pub message: String,
    /// What to do if there is none.
    pub otherwise: Otherwise,
}

/// What to do if a look by name finds no job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Otherwise {
    /// Submit it again, after a pause.
    Submit,
    /// The pod has failed: the same request would be answered in the same way.
    Refuse,
}

/// Why staging does not go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// The container it is about; empty: the pod.
    pub container: String,
    /// `ErrImagePull`, `ImagePullBackOff`, `StagingFailed` …
    pub reason: String,
    /// For people.
    pub message: String,
    /// Since when.
    pub since: Timestamp,
    /// When to try again.
    pub retry_at: Timestamp,
}

/// All that can happen to a pod.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The actor has started: do what the state asks for. First event, also after a restart.
    Begin,
    /// All is in the job directory.
    Staged,
    /// Staging failed for now.
    StageFailed {
        /// The container it is about; empty: the pod.
        container: String,
        /// `ErrImagePull` …
        reason: String,
        /// For people.
        message: String,
    },
    /// The scheduler took the job.
    Submitted(Submitted),
    /// It did not, or not surely.
    Refused {
        /// What to do next.
        kind: RefusalKind,
        /// Its words.
        words: String,
    },
    /// Jobs of this pod, by name, newest first.
    Found(Vec<JobView>),
    /// The look by name failed.
    FindFailed(String),
    /// One round of the scheduler: the jobs of this pod, and whether ours is surely unknown.
    Round {
        /// All of this pod that it knows.
        jobs: Vec<JobView>,
        /// Neither queue nor accounting know the pod's job.
        missing: bool,
    },
    /// The shim's report, by link or file.
    Report(Box<pb::Report>),
    /// The shim's link came or went.
    Link(bool),
    /// The files were read: no final report there.
    Files {
        /// The end of `batch.out`.
        batch_tail: String,
        /// A shim has claimed the job directory, or it is not known.
        claimed: bool,
    },
    /// The pod is to end.
    Delete {
        /// Time for the containers; `None`: the pod's own.
        grace: Option<Duration>,
        /// For people.
        reason: String,
    },
    /// A newer generation of the shape.
    Update(Facts),
    /// Something worth an Event, from the actor's own work.
    Note(Note),
    /// The time that [`Pod::wake`] named has come.
    Tick,
    /// The pod may be forgotten.
    Forget,
}

/// Something worth an Event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Warning, or normal.
    pub warning: bool,
    /// CamelCase.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// The container it is about, or empty.
    pub container: String,
}

/// What the actor is to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Write the record, synced, before any later effect.
    Persist,
    /// Make the job directory complete; answers `Staged` or `StageFailed`.
    Stage,
    /// `sbatch`; answers `Submitted` or `Refused`.
    Submit,
    /// Look by name; answers `Found` or `FindFailed`.
    Find,
    /// End a job.
    Cancel {
        /// Which.
        job: JobRef,
        /// How hard.
        how: Cancel,
    },
    /// Tell the containers to end: by the link, else by a signal to the batch script.
    Stop {
        /// Which job.
        job: JobRef,
        /// Time for the containers.
        grace: Duration,
    },
    /// Read report and batch output; answers `Report` or `Files`.
    ReadFiles,
    /// Unlink the values.
    CleanUp,
    /// Ask the scheduler soon: something is expected.
    Hurry,
    /// Remove the job directory.
    Remove,
}

impl Pod {
    /// A pod just accepted.
    #[must_use]
    pub fn new(facts: Facts, now: Timestamp) -> Self {
        Self {
            facts,
            state: State::Accepted,
            since: now,
            attempt: 0,
            view: None,
            sbatch: None,
            unseen: None,
            report: None,
            deletion: None,
            link: false,
            read_at: now,
            batch_tail: String::new(),
            unclaimed: false,
            notes: Vec::new(),
        }
    }

    /// The pod's job, where it has one that may be alive.
    #[must_use]
    pub fn job(&self) -> Option<JobRef> {
        let id = match &self.state {
            State::Queued { job, .. }
            | State::Running { job }
            | State::Stopping { job, .. }
            | State::Lost { job, .. }
            | State::Settling { job, .. } => job,
            State::Finished { lingering, .. } => lingering.as_ref()?,
            State::Accepted
            | State::Staging { .. }
            | State::Throttled { .. }
            | State::Submitting { .. }
            | State::Forgotten => return None,
        };
        Some(self.job_ref(id))
    }

    /// Is a change of the job expected within seconds?
    #[must_use]
    pub fn hurried(&self) -> bool {
        match &self.state {
            State::Queued { .. }
            | State::Stopping { .. }
            | State::Settling { .. }
            | State::Lost { .. } => true,
            State::Running { .. } => !self.link || self.unseen.is_some(),
            State::Finished { lingering, .. } => lingering.is_some(),
            State::Accepted
            | State::Staging { .. }
            | State::Throttled { .. }
            | State::Submitting { .. }
            | State::Forgotten => false,
        }
    }

    /// When [`Event::Tick`] is due.
    #[must_use]
    pub fn wake(&self) -> Option<Timestamp> {
        match &self.state {
            State::Staging { trouble, .. } => trouble.as_ref().map(|trouble| {
                if trouble.reason == submit::ERR_IMAGE_PULL {
                    (trouble.since + submit::SHOW_ERROR).min(trouble.retry_at)
                } else {
                    trouble.retry_at
                }
            }),
            State::Throttled { retry_at, .. } => Some(*retry_at),
            State::Submitting { look } => look.as_ref().map(|look| look.at),
            State::Queued { never, .. } => {
                never.map(|at| at + self.facts.patience.never_ends_after)
            }
            State::Stopping { deadline, .. } => Some(*deadline),
            State::Lost { look_at, .. } => Some(*look_at),
            State::Settling { until, look_at, .. } => Some((*until).min(*look_at)),
            State::Running { .. } => {
                // Where compute nodes cannot reach us the report file is all that says how the pod is.
                let read = (!self.link).then(|| self.read_at + FILES_UNLINKED);
                read.into_iter().chain(self.overdue_at()).min()
            }
            State::Accepted | State::Finished { .. } | State::Forgotten => None,
        }
    }

    /// When we end a running pod for its own deadline: one that was lowered after its shim had read it. Counted, as the
    /// shim counts it, from when the shim began.
    #[must_use]
    pub(crate) fn overdue_at(&self) -> Option<Timestamp> {
        let (deadline, report) = (self.facts.deadline?, self.report.as_ref()?);
        // What waits again begins anew, and says so with its first report; what is suspended could not obey.
        let runs = self.view.as_ref().is_none_or(|view| {
            view.state == JobState::Running && i64::from(view.restarts) <= report.restart.into()
        });
        let ends_already = report.ended_by() != pb::EndedBy::Unspecified;
        if !runs || ends_already || report.started_at <= 0 {
            return None;
        }
        let began = Timestamp::from_nanosecond(report.started_at.into()).ok()?;
        began.checked_add(deadline.checked_add(SHIM_FIRST)?).ok()
    }

    /// How it ended, where it has.
    #[must_use]
    pub fn outcome(&self) -> Option<&Outcome> {
        if let State::Finished { outcome, .. } = &self.state {
            Some(outcome)
        } else {
            None
        }
    }

    /// Why staging does not go on.
    #[must_use]
    pub fn trouble(&self) -> Option<&Trouble> {
        if let State::Staging { trouble, .. } = &self.state {
            trouble.as_ref()
        } else {
            None
        }
    }

    /// Ended for good?
    #[must_use]
    pub fn is_finished(&self) -> bool {
        matches!(self.state, State::Finished { .. } | State::Forgotten)
    }

    fn job_ref(&self, id: &JobId) -> JobRef {
        let view = self.view.as_ref().filter(|view| view.id == *id);
        let seconds =
            |(began, ended): (Timestamp, Timestamp)| (began.as_second(), ended.as_second());
        JobRef {
            call: self.sbatch.map(seconds),
            submitted_at: view.and_then(|view| view.submitted_at),
            named: view.is_some_and(|view| view.marks.name),
            ..JobRef::new(id.clone(), self.facts.uid.clone())
        }
    }

    fn enter(&mut self, state: State, now: Timestamp) {
        self.state = state;
        self.since = now;
    }

    fn note(&mut self, warning: bool, reason: &str, message: impl Into<String>, now: Timestamp) {
        self.note_of("", warning, reason, message, now);
    }

    /// The same of one container.
    fn note_of(
        &mut self,
        container: &str,
        warning: bool,
        reason: &str,
        message: impl Into<String>,
        now: Timestamp,
    ) {
        self.push_note(pb::PodNote {
            container: container.to_owned(),
            warning,
            reason: reason.to_owned(),
            message: message.into(),
            at: nanos(now),
            ..pb::PodNote::default()
        });
    }

    pub(super) fn push_note(&mut self, mut note: pb::PodNote) {
        note.sequence = self.notes.last().map_or(1, |last| last.sequence + 1);
        self.notes.push(note);
        let surplus = self.notes.len().saturating_sub(NOTES);
        self.notes.drain(..surplus);
    }
}

/// Unix nanoseconds, as the messages have them.
pub(crate) fn nanos(at: Timestamp) -> i64 {
    i64::try_from(at.as_nanosecond()).unwrap_or(i64::MAX)
}

/// One step of the machine.
#[must_use]
pub fn step(mut pod: Pod, event: Event, now: Timestamp) -> (Pod, Vec<Effect>) {
    let effects = match event {
        Event::Begin => submit::begin(&mut pod, now),
        Event::Staged => submit::staged(&mut pod, now),
        Event::StageFailed {
            container,
            reason,
            message,
        } => submit::stage_failed(&mut pod, container, reason, message, now),
        Event::Submitted(submitted) => submit::submitted(&mut pod, submitted, now),
        Event::Refused { kind, words } => submit::refused(&mut pod, kind, words, now),
        Event::Found(jobs) => submit::found(&mut pod, jobs, now),
        Event::FindFailed(message) => submit::find_failed(&mut pod, message, now),
        Event::Round { jobs, missing } => job::round(&mut pod, jobs, missing, now),
        Event::Report(report) => job::report(&mut pod, *report, now),
        Event::Files {
            batch_tail,
            claimed,
        } => job::files(&mut pod, batch_tail, claimed, now),
        Event::Link(up) => {
            pod.link = up;
            pod.read_at = now;
            // A link that breaks may mean that the job has ended.
            if up || pod.job().is_none() {
                Vec::new()
            } else {
                vec![Effect::Hurry]
            }
        }
        Event::Delete { grace, reason } => ending::delete(&mut pod, grace, reason, now),
        Event::Update(facts) => {
            pod.facts = facts;
            vec![Effect::Persist]
        }
        Event::Note(note) => {
            pod.push_note(pb::PodNote {
                warning: note.warning,
                reason: note.reason.to_owned(),
                message: note.message,
                container: note.container,
                at: nanos(now),
                sequence: 0,
            });
            Vec::new()
        }
        Event::Tick => tick(&mut pod, now),
        Event::Forget => ending::forget(&mut pod, now),
    };
    (pod, effects)
}

fn tick(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    if pod.wake().is_none_or(|at| now < at) {
        return Vec::new();
    }
    match &pod.state {
        State::Staging { .. } | State::Throttled { .. } | State::Submitting { .. } => {
            submit::tick(pod, now)
        }
        State::Queued { .. }
        | State::Running { .. }
        | State::Lost { .. }
        | State::Settling { .. } => job::tick(pod, now),
        State::Stopping { .. } => ending::tick(pod, now),
        State::Accepted | State::Finished { .. } | State::Forgotten => Vec::new(),
    }
}

#[cfg(test)]
mod tests;
