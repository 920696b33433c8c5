//! `record.json`: what the agent must know about a pod after a restart.
//!
//! PURE conversions between [`Pod`] and [`Record`]; the caller reads and writes the file. The
//! format is a versioned protocol between agents of different releases: fields are only ever added,
//! with a default that keeps the old behaviour. The pod's shape is in `job.pb`, its containers'
//! states in `report.pb`.
//!
//! `placement` says where the pod runs. Agents before it knew only jobs of the pod's own, and wrote
//! the job's ID as `job`. That field is still read, and still written for an agent that is
//! downgraded.

use std::{net::Ipv4Addr, time::Duration};

use jiff::Timestamp;
use knoc_proto::{
    ids::{JobId, PodUid},
    pb,
    pod::LONGEST,
};
use serde::{Deserialize, Serialize};

use super::{
    outcome::{Cause, OVERDUE, Outcome},
    placement::Placement,
    state::{BeforeJob, Deletion, Ending, Facts, JobStage, Pod, State},
};
use crate::scheduler::{JobExit, JobState, JobView, Marks};

/// The version of the format; newer agents must still read it.
const VERSION: u32 = 1;

/// The content of `record.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The UID of the cluster that wanted the pod.
    #[serde(default)]
    pub cluster_id: String,
    /// The newest accepted revision of the values.
    #[serde(default)]
    pub values_revision: i64,
    phase: Phase,
    since: Timestamp,
    #[serde(default)]
    attempt: u32,
    #[serde(default)]
    placement: Option<RecordedPlacement>,
    /// The job's ID if the pod has a job of its own, for agents before `placement`.
    #[serde(default)]
    job: Option<JobId>,
    #[serde(default)]
    sbatch: Option<(Timestamp, Timestamp)>,
    #[serde(default)]
    view: Option<View>,
    #[serde(default)]
    deletion: Option<RecordedDeletion>,
    /// The job is being ended because of the pod's own deadline; older agents read a deletion.
    #[serde(default)]
    overdue: bool,
    #[serde(default)]
    batch_tail: String,
    #[serde(default)]
    notes: Vec<RecordedNote>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    address: Option<Ipv4Addr>,
    /// Since when the queued job has waited for a reason that never ends; older agents count anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    never: Option<Timestamp>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RecordedPlacement {
    OwnJob { job: JobId },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Phase {
    Accepted,
    Staging,
    Throttled {
        tries: u32,
        reason: String,
        message: String,
        retry_at: Timestamp,
    },
    Submitting,
    Queued,
    Running,
    Stopping {
        cause: RecordedCause,
        how: How,
        deadline: Timestamp,
    },
    Lost,
    Settling {
        cause: Option<RecordedCause>,
        until: Timestamp,
    },
    Finished(RecordedOutcome),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RecordedCause {
    Deleted(String),
    NeverStarts(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum How {
    Dequeued,
    Told,
    Cancelled,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct RecordedDeletion {
    grace_seconds: u64,
    reason: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct RecordedOutcome {
    succeeded: bool,
    reason: String,
    message: String,
    disruption: bool,
    finished_at: Timestamp,
    /// The job may still exist.
    lingering: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct RecordedNote {
    sequence: i64,
    warning: bool,
    reason: String,
    message: String,
    container: String,
    at: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    count: i32,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the form that serde calls"
)]
fn is_zero(count: &i32) -> bool {
    *count == 0
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct View {
    id: JobId,
    state: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    exit: Option<(i32, i32)>,
    #[serde(default)]
    nodes: String,
    #[serde(default)]
    partition: String,
    #[serde(default)]
    submitted_at: Option<i64>,
    #[serde(default)]
    started_at: Option<i64>,
    #[serde(default)]
    ended_at: Option<i64>,
    #[serde(default)]
    time_limit_minutes: Option<i64>,
    #[serde(default)]
    restarts: u32,
}

impl Record {
    /// Whether the pod has finished and its job has gone, so that nothing uses the files it named.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(&self.phase, Phase::Finished(outcome) if !outcome.lingering)
    }

    /// The record of `pod`.
    #[must_use]
    pub fn of(pod: &Pod, cluster_id: &str, values_revision: i64) -> Self {
        Self {
            version: VERSION,
            cluster_id: cluster_id.to_owned(),
            values_revision,
            phase: phase(&pod.state),
            since: pod.since,
            attempt: pod.attempt,
            placement: pod.placement().map(placement),
            job: pod.placement().map(|placement| placement.job().clone()),
            sbatch: pod.sbatch,
            view: pod.view.as_ref().map(view),
            deletion: pod.deletion.as_ref().map(|deletion| RecordedDeletion {
                grace_seconds: deletion.grace.as_secs(),
                reason: deletion.reason.clone(),
            }),
            overdue: pod.is_overdue(),
            batch_tail: pod.batch_tail.clone(),
            notes: pod.notes.iter().map(note).collect(),
            address: pod.address,
            never: never(&pod.state),
        }
    }

    /// Restores the pod, with the report from its job directory.
    #[must_use]
    pub fn restore(self, facts: Facts, report: Option<pb::Report>) -> Pod {
        let older = self.job.map(Placement::own_job);
        let placement = self.placement.map(unplacement).or(older);
        let mut state = state(self.phase, placement, self.since);
        if self.overdue {
            make_overdue(&mut state);
        }
        if let State::WithJob {
            stage: JobStage::Queued { never },
            ..
        } = &mut state
        {
            *never = self.never;
        }
        let mut pod = Pod::new(facts, self.since);
        pod.view = self.view.map(|view| unview(view, &pod.facts.uid));
        pod.state = state;
        pod.attempt = self.attempt;
        pod.sbatch = self.sbatch;
        pod.deletion = self.deletion.map(|deletion| Deletion {
            // An older agent accepted any number.
            grace: Duration::from_secs(deletion.grace_seconds).min(LONGEST),
            reason: deletion.reason,
        });
        pod.batch_tail = self.batch_tail;
        pod.notes = self.notes.into_iter().map(unnote).collect();
        pod.address = self.address;
        // Takes what the shim noted while no agent was running. Two notes are the same if text and
        // time are.
        for note in report.iter().flat_map(|report| &report.notes) {
            let same = |known: &pb::PodNote| {
                (known.at, &known.reason, &known.message) == (note.at, &note.reason, &note.message)
            };
            if !pod.notes.iter().any(same) {
                pod.push_note(note.clone());
            }
        }
        pod.report = report;
        pod
    }
}

fn placement(placement: &Placement) -> RecordedPlacement {
    match placement {
        Placement::OwnJob { job } => RecordedPlacement::OwnJob { job: job.clone() },
    }
}

fn unplacement(placement: RecordedPlacement) -> Placement {
    match placement {
        RecordedPlacement::OwnJob { job } => Placement::OwnJob { job },
    }
}

fn never(state: &State) -> Option<Timestamp> {
    if let State::WithJob {
        stage: JobStage::Queued { never },
        ..
    } = state
    {
        *never
    } else {
        None
    }
}

fn make_overdue(state: &mut State) {
    if let State::WithJob {
        stage:
            JobStage::Stopping { cause, .. }
            | JobStage::Settling {
                cause: Some(cause), ..
            },
        ..
    } = state
    {
        *cause = Cause::Deadline;
    }
}

fn phase(state: &State) -> Phase {
    match state {
        State::BeforeJob(before) => phase_before_job(before),
        State::WithJob { stage, .. } => phase_with_job(stage),
        State::Finished { outcome, lingering } => {
            Phase::Finished(recorded(outcome, lingering.is_some()))
        }
        // A forgotten pod has no record.
        State::Forgotten => Phase::Accepted,
    }
}

fn phase_before_job(before: &BeforeJob) -> Phase {
    match before {
        BeforeJob::Accepted => Phase::Accepted,
        BeforeJob::Staging { .. } => Phase::Staging,
        BeforeJob::Throttled {
            tries,
            reason,
            message,
            retry_at,
        } => Phase::Throttled {
            tries: *tries,
            reason: reason.clone(),
            message: message.clone(),
            retry_at: *retry_at,
        },
        BeforeJob::Submitting { .. } => Phase::Submitting,
    }
}

fn phase_with_job(stage: &JobStage) -> Phase {
    match stage {
        JobStage::Queued { .. } => Phase::Queued,
        JobStage::Running => Phase::Running,
        JobStage::Stopping {
            cause: why,
            how,
            deadline,
        } => Phase::Stopping {
            cause: cause(why),
            how: (*how).into(),
            deadline: *deadline,
        },
        JobStage::Lost { .. } => Phase::Lost,
        JobStage::Settling {
            cause: why, until, ..
        } => Phase::Settling {
            cause: why.as_ref().map(cause),
            until: *until,
        },
    }
}

/// This version never writes a phase with a job but without a placement. If it finds one, it looks
/// for the job by name.
fn state(phase: Phase, placement: Option<Placement>, since: Timestamp) -> State {
    let stage = match phase {
        Phase::Accepted => return State::BeforeJob(BeforeJob::Accepted),
        Phase::Staging => {
            let (tries, trouble) = (0, None);
            return State::BeforeJob(BeforeJob::Staging { tries, trouble });
        }
        Phase::Throttled {
            tries,
            reason,
            message,
            retry_at,
        } => {
            return State::BeforeJob(BeforeJob::Throttled {
                tries,
                reason,
                message,
                retry_at,
            });
        }
        Phase::Submitting => return State::BeforeJob(BeforeJob::Submitting { look: None }),
        Phase::Finished(outcome) => {
            return State::Finished {
                lingering: placement.filter(|_| outcome.lingering),
                outcome: unrecorded(outcome),
            };
        }
        Phase::Queued => JobStage::Queued { never: None },
        Phase::Running => JobStage::Running,
        Phase::Stopping {
            cause,
            how,
            deadline,
        } => JobStage::Stopping {
            cause: uncause(cause),
            how: how.into(),
            deadline,
        },
        Phase::Lost => JobStage::Lost {
            since,
            look_at: since,
        },
        Phase::Settling { cause, until } => JobStage::Settling {
            cause: cause.map(uncause),
            until,
            look_at: since,
        },
    };
    match placement {
        Some(placement) => State::WithJob { placement, stage },
        None => State::BeforeJob(BeforeJob::Submitting { look: None }),
    }
}

fn recorded(outcome: &Outcome, lingering: bool) -> RecordedOutcome {
    RecordedOutcome {
        succeeded: outcome.succeeded,
        reason: outcome.reason.clone(),
        message: outcome.message.clone(),
        disruption: outcome.disruption,
        finished_at: outcome.finished_at,
        lingering,
    }
}

fn unrecorded(outcome: RecordedOutcome) -> Outcome {
    Outcome {
        succeeded: outcome.succeeded,
        reason: outcome.reason,
        message: outcome.message,
        disruption: outcome.disruption,
        finished_at: outcome.finished_at,
    }
}

impl From<Ending> for How {
    fn from(how: Ending) -> Self {
        match how {
            Ending::Dequeued => Self::Dequeued,
            Ending::Told => Self::Told,
            Ending::Cancelled => Self::Cancelled,
        }
    }
}

impl From<How> for Ending {
    fn from(how: How) -> Self {
        match how {
            How::Dequeued => Self::Dequeued,
            How::Told => Self::Told,
            How::Cancelled => Self::Cancelled,
        }
    }
}

fn cause(cause: &Cause) -> RecordedCause {
    match cause {
        Cause::Deleted(message) => RecordedCause::Deleted(message.clone()),
        Cause::NeverStarts(reason) => RecordedCause::NeverStarts(reason.clone()),
        // `Record::overdue` is set too.
        Cause::Deadline => RecordedCause::Deleted(OVERDUE.to_owned()),
    }
}

fn uncause(cause: RecordedCause) -> Cause {
    match cause {
        RecordedCause::Deleted(message) => Cause::Deleted(message),
        RecordedCause::NeverStarts(reason) => Cause::NeverStarts(reason),
    }
}

fn view(view: &JobView) -> View {
    View {
        id: view.id.clone(),
        state: view.state.to_string(),
        reason: view.reason.clone(),
        exit: view.exit.map(|exit| (exit.code, exit.signal)),
        nodes: view.nodes.clone(),
        partition: view.partition.clone(),
        submitted_at: view.submitted_at,
        started_at: view.started_at,
        ended_at: view.ended_at,
        time_limit_minutes: view.time_limit_minutes,
        restarts: view.restarts,
    }
}

fn unview(view: View, uid: &PodUid) -> JobView {
    JobView {
        id: view.id,
        uid: uid.clone(),
        // Not kept: before such a job is cancelled, it is looked up.
        marks: Marks::default(),
        cluster_id: String::new(),
        attempt: 0,
        state: JobState::parse(&view.state),
        reason: view.reason,
        exit: view.exit.map(|(code, signal)| JobExit { code, signal }),
        nodes: view.nodes,
        partition: view.partition,
        submitted_at: view.submitted_at,
        started_at: view.started_at,
        ended_at: view.ended_at,
        estimated_start: None,
        time_limit_minutes: view.time_limit_minutes,
        restarts: view.restarts,
    }
}

fn note(note: &pb::PodNote) -> RecordedNote {
    RecordedNote {
        sequence: note.sequence,
        warning: note.warning,
        reason: note.reason.clone(),
        message: note.message.clone(),
        container: note.container.clone(),
        at: note.at,
        count: note.count,
    }
}

fn unnote(note: RecordedNote) -> pb::PodNote {
    pb::PodNote {
        sequence: note.sequence,
        warning: note.warning,
        reason: note.reason,
        message: note.message,
        container: note.container,
        at: note.at,
        count: note.count,
    }
}

#[cfg(test)]
mod tests;
