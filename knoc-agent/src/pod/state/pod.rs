//! PURE: one pod as the machine sees it: its state, and what was seen of it.

use std::{net::Ipv4Addr, time::Duration};

use jiff::Timestamp;
use knoc_proto::{ids::PodUid, pb};

use super::{
    states::{BeforeJob, JobStage, State, Trouble},
    timeouts::Timeouts,
};
use crate::{
    pod::{outcome::Outcome, placement::Placement},
    scheduler::{JobRef, JobState, JobView},
};

/// The pause between two searches by name.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// How many searches by name must find nothing before a job counts as not accepted.
pub(crate) const LOOKS: u32 = 2;
/// The pause between two readings of the files of a job that ended without its report.
pub(crate) const FILES_AGAIN: Duration = Duration::from_secs(1);
/// The first and the longest pause between two readings of the report of a running pod whose shim has no link to the agent.
/// The pause grows by half while the report does not change.
pub(crate) const FILES_UNLINKED: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];
/// The pause between two cancellations of a job that does not end.
pub(crate) const CANCEL_AGAIN: Duration = Duration::from_secs(10);
/// How long to wait for the report of a job that the agent ended: it decides little more than exit codes.
pub(crate) const ENDED_BY_US: Duration = Duration::from_secs(10);
/// A job may outlive its final report this long (its epilog, a hanging file system) before it is cancelled.
pub(crate) const LINGER: Duration = Duration::from_mins(1);
/// How long after a pod's deadline the agent ends it: by then a shim that knew the deadline from its start has begun to.
pub(crate) const SHIM_FIRST: Duration = Duration::from_secs(2);
/// How many notes are kept for one pod.
pub(super) const NOTES: usize = 32;

/// What the machine must know of the pod and the site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The pod's UID.
    pub uid: PodUid,
    /// Its termination grace.
    pub grace: Duration,
    /// Its `activeDeadlineSeconds`.
    pub deadline: Option<Duration>,
    /// The site's timeouts.
    pub timeouts: Timeouts,
}

#[cfg(test)]
impl Facts {
    /// Those of a pod `u` in tests; each time is a second.
    pub(crate) fn of_u() -> Self {
        let second = Duration::from_secs(1);
        Self {
            uid: PodUid::try_from("u").unwrap(),
            grace: second,
            deadline: None,
            timeouts: Timeouts::each(second),
        }
    }
}

#[cfg(test)]
impl Pod {
    /// A pod `u` in tests, of which its shim has reported this.
    pub(crate) fn that_reports(report: Option<knoc_proto::pb::Report>) -> Self {
        let mut pod = Self::new(Facts::of_u(), jiff::Timestamp::UNIX_EPOCH);
        pod.report = report;
        pod
    }
}

/// One pod: the state, and what was seen of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Pod {
    /// The facts, which do not change by themselves.
    pub facts: Facts,
    /// The state of the machine.
    pub state: State,
    /// When the pod entered this state.
    pub since: Timestamp,
    /// Submissions so far.
    pub attempt: u32,
    /// The scheduler's last view of the placement's job.
    pub view: Option<JobView>,
    /// When `sbatch` was called, and when it had answered with the id of the placement's job. Together with the id these
    /// tell the job from somebody else's that got the same id later.
    pub sbatch: Option<(Timestamp, Timestamp)>,
    /// Since when the scheduler does not show the job.
    pub unseen: Option<Timestamp>,
    /// The shim's newest report.
    pub report: Option<pb::Report>,
    /// Set by `DeletePod`, never taken back.
    pub deletion: Option<Deletion>,
    /// Whether the shim's link is up.
    pub link: bool,
    /// When the report was last read because there was no link, or when the link or the job last changed.
    pub read_at: Timestamp,
    /// The pause before it is read again.
    pub read_pause: Duration,
    /// The end of `batch.out`, read when the job ended without a report.
    pub batch_tail: String,
    /// No shim had claimed the job directory when the files were last read.
    pub unclaimed: bool,
    /// The notes, which become Events.
    pub notes: Vec<pb::PodNote>,
    /// The address of its own that the pod has from its job's start until the job has ended. It is never another one.
    pub address: Option<Ipv4Addr>,
}

/// The request to end the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deletion {
    /// Time for the containers, from the moment they are told.
    pub grace: Duration,
    /// The message for users.
    pub reason: String,
}

impl Pod {
    /// The pause before try `tries + 1` of what failed: see [`Timeouts`].
    pub(super) fn pause(&self, tries: u32) -> Duration {
        self.facts.timeouts.pause(&self.facts.uid, tries)
    }

    /// The report has changed, or something that it depends on: it is read again soon if there is no link.
    pub(super) fn read_soon(&mut self, now: Timestamp) {
        self.read_at = now;
        self.read_pause = FILES_UNLINKED[0];
    }

    /// The report is read now because there is no link.
    pub(super) fn read_unlinked(&mut self, now: Timestamp) {
        self.read_at = now;
        self.read_pause = self.read_pause.mul_f32(1.5).min(FILES_UNLINKED[1]);
    }

    /// How long the scheduler may leave a job out of its answers before users are told.
    pub(super) fn lag(&self) -> Duration {
        self.facts.timeouts.lag()
    }

    /// A pod that was just accepted.
    #[must_use]
    pub fn new(facts: Facts, now: Timestamp) -> Self {
        Self {
            facts,
            state: State::BeforeJob(BeforeJob::Accepted),
            since: now,
            attempt: 0,
            view: None,
            sbatch: None,
            unseen: None,
            report: None,
            deletion: None,
            link: false,
            read_at: now,
            read_pause: FILES_UNLINKED[0],
            batch_tail: String::new(),
            unclaimed: false,
            notes: Vec::new(),
            address: None,
        }
    }

    /// Whether nothing of the pod runs any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        match &self.state {
            State::Finished { lingering, .. } => lingering.is_none(),
            State::Forgotten => true,
            State::BeforeJob(_) | State::WithJob { .. } => false,
        }
    }

    /// Where the pod runs, if it has a placement whose job may be alive.
    #[must_use]
    pub fn placement(&self) -> Option<&Placement> {
        match &self.state {
            State::WithJob { placement, .. } => Some(placement),
            State::Finished { lingering, .. } => lingering.as_ref(),
            State::BeforeJob(_) | State::Forgotten => None,
        }
    }

    /// The job of the placement, if there is one that may be alive.
    #[must_use]
    pub fn job(&self) -> Option<JobRef> {
        let placement = self.placement()?;
        Some(placement.job_ref(&self.facts.uid, self.view.as_ref(), self.sbatch))
    }

    /// Whether a change of the job is expected within seconds.
    #[must_use]
    pub fn poll_soon(&self) -> bool {
        match &self.state {
            State::WithJob { stage, .. } => match stage {
                JobStage::Queued { .. }
                | JobStage::Stopping { .. }
                | JobStage::Settling { .. }
                | JobStage::Lost { .. } => true,
                JobStage::Running => !self.link || self.unseen.is_some(),
            },
            State::Finished { lingering, .. } => lingering.is_some(),
            State::BeforeJob(_) | State::Forgotten => false,
        }
    }

    /// When [`super::Event::Tick`] is due.
    #[must_use]
    pub fn wake(&self) -> Option<Timestamp> {
        match &self.state {
            State::BeforeJob(before) => before.wake(),
            State::WithJob { stage, .. } => self.wake_with_job(stage),
            State::Finished { .. } | State::Forgotten => None,
        }
    }

    fn wake_with_job(&self, stage: &JobStage) -> Option<Timestamp> {
        match stage {
            JobStage::Queued { never } => never.map(|at| at + self.facts.timeouts.never_ends_after),
            JobStage::Stopping { deadline, .. } => Some(*deadline),
            JobStage::Lost { look_at, .. } => Some(*look_at),
            JobStage::Settling { until, look_at, .. } => Some((*until).min(*look_at)),
            JobStage::Running => {
                // If compute nodes cannot reach the agent, the report file is all that says how the pod is.
                let read = (!self.link).then(|| self.read_at + self.read_pause);
                read.into_iter().chain(self.overdue_at()).min()
            }
        }
    }

    /// When the agent ends a running pod because of the pod's own deadline, which was lowered after the shim had read
    /// it. It counts from when the shim began, as the shim counts it.
    #[must_use]
    pub(crate) fn overdue_at(&self) -> Option<Timestamp> {
        let (deadline, report) = (self.facts.deadline?, self.report.as_ref()?);
        // A job that waits again starts over, and says so with its first report; a suspended one could not obey.
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

    /// How the pod ended, if it has.
    #[must_use]
    pub fn outcome(&self) -> Option<&Outcome> {
        if let State::Finished { outcome, .. } = &self.state {
            Some(outcome)
        } else {
            None
        }
    }

    /// Why staging cannot continue.
    #[must_use]
    pub fn trouble(&self) -> Option<&Trouble> {
        if let State::BeforeJob(BeforeJob::Staging { trouble, .. }) = &self.state {
            trouble.as_ref()
        } else {
            None
        }
    }

    /// Whether the pod has ended for good.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        matches!(self.state, State::Finished { .. } | State::Forgotten)
    }

    /// Whether the agent is ending the pod's job because the pod's own deadline is over.
    #[must_use]
    pub fn is_overdue(&self) -> bool {
        use crate::pod::outcome::Cause;
        match &self.state {
            State::WithJob { stage, .. } => stage.cause() == Some(&Cause::Deadline),
            State::BeforeJob(_) | State::Finished { .. } | State::Forgotten => false,
        }
    }

    /// The stage of the job, if the pod has one.
    pub(super) fn stage(&self) -> Option<&JobStage> {
        match &self.state {
            State::WithJob { stage, .. } => Some(stage),
            State::BeforeJob(_) | State::Finished { .. } | State::Forgotten => None,
        }
    }

    /// The stage of the job, to be changed in place.
    pub(super) fn stage_mut(&mut self) -> Option<&mut JobStage> {
        match &mut self.state {
            State::WithJob { stage, .. } => Some(stage),
            State::BeforeJob(_) | State::Finished { .. } | State::Forgotten => None,
        }
    }

    pub(super) fn enter(&mut self, state: State, now: Timestamp) {
        self.state = state;
        self.since = now;
    }

    /// Enters a state without a job.
    pub(super) fn enter_before_job(&mut self, before: BeforeJob, now: Timestamp) {
        self.enter(State::BeforeJob(before), now);
    }

    /// Enters a stage of the job; the placement stays. A pod without a job is left as it is.
    pub(super) fn enter_stage(&mut self, next: JobStage, now: Timestamp) {
        if let State::WithJob { stage, .. } = &mut self.state {
            *stage = next;
            self.since = now;
        }
    }

    pub(super) fn note(
        &mut self,
        warning: bool,
        reason: &str,
        message: impl Into<String>,
        now: Timestamp,
    ) {
        self.note_of("", warning, reason, message, now);
    }

    /// Adds a note about one container.
    pub(super) fn note_of(
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

    /// Adds a note about one container, which takes the place of the one before of this text. Its Event counts both.
    pub(super) fn note_again(
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
            count: 1,
            message: message.into(),
            at: nanos(now),
            ..pb::PodNote::default()
        });
    }

    pub(in crate::pod) fn push_note(&mut self, mut note: pb::PodNote) {
        // A restart of the agent loses the notes since the last record, and the kubelet may have read them: what comes later must
        // be newer all the same.
        let next = self
            .notes
            .last()
            .map(|last| last.sequence.saturating_add(1));
        note.sequence = note.at.max(next.unwrap_or(1));
        if note.count > 0 {
            // What repeats itself takes one place.
            let same = |one: &pb::PodNote| {
                let texts = (&one.reason, &one.message, &one.container);
                one.count > 0 && texts == (&note.reason, &note.message, &note.container)
            };
            self.notes.retain(|one| !same(one));
        }
        self.notes.push(note);
        let surplus = self.notes.len().saturating_sub(NOTES);
        self.notes.drain(..surplus);
    }
}

/// Unix nanoseconds, as the messages have them.
pub(crate) fn nanos(at: Timestamp) -> i64 {
    i64::try_from(at.as_nanosecond()).unwrap_or(i64::MAX)
}
