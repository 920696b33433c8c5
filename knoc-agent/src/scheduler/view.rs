//! What a scheduler says of jobs: pure types, Slurm's vocabulary.

use std::fmt;

use knoc_proto::ids::{JobId, PodUid};

/// A job of a pod, and what tells it from a stranger's job that was given the same id later.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobRef {
    /// The scheduler's id, which may be given to another job later.
    pub id: JobId,
    /// The pod.
    pub uid: PodUid,
    /// When `sbatch` was called and when it had answered with this id: Unix seconds of this host's clock. `None` if the
    /// job was found in another way.
    pub call: Option<(i64, i64)>,
    /// The submit time that the scheduler gave when the job was last seen: Unix seconds of its own clock.
    pub submitted_at: Option<i64>,
    /// The job had the name that we gave it when it was last seen.
    pub named: bool,
}

impl JobRef {
    /// A job of which nothing is known but its id and its pod.
    #[must_use]
    pub fn new(id: JobId, uid: PodUid) -> Self {
        Self {
            id,
            uid,
            call: None,
            submitted_at: None,
            named: false,
        }
    }

    /// Does `view` show this job?
    #[must_use]
    pub fn is(&self, view: &JobView) -> bool {
        self.id == view.id && self.uid == view.uid
    }
}

/// Which of the things that a job carries name its pod. Users, submit plugins and wrappers of `sbatch` may change each
/// of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Marks {
    /// The job's name.
    pub name: bool,
    /// Its comment.
    pub comment: bool,
    /// Its working directory, where the source tells it.
    pub directory: bool,
}

impl Marks {
    /// A job as we submit it.
    pub const ALL: Self = Self {
        name: true,
        comment: true,
        directory: true,
    };

    /// At least one of them names the pod.
    #[must_use]
    pub fn any(self) -> bool {
        self.name || self.comment || self.directory
    }

    /// At least two of them do: a job that carries only one may have been submitted by a program of the pod.
    #[must_use]
    pub fn sure(self) -> bool {
        u8::from(self.name) + u8::from(self.comment) + u8::from(self.directory) >= 2
    }
}

/// One job as the scheduler sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobView {
    /// The scheduler's id.
    pub id: JobId,
    /// The pod whose job it is.
    pub uid: PodUid,
    /// What of the job names the pod.
    pub marks: Marks,
    /// From the comment: the cluster that wanted it; empty for pods without Kubernetes, or where the
    /// source does not carry comments.
    pub cluster_id: String,
    /// From the comment: which submission of the pod this is; 0 where the source does not say.
    pub attempt: u32,
    /// Where it stands.
    pub state: JobState,
    /// Slurm's reason (`Priority`, `Resources` …); empty for none.
    pub reason: String,
    /// How the batch script ended, where the source knows.
    pub exit: Option<JobExit>,
    /// Node list, as Slurm writes it (`c[1-3]`).
    pub nodes: String,
    /// The partition, or several with commas while it is queued.
    pub partition: String,
    /// Unix seconds.
    pub submitted_at: Option<i64>,
    /// Unix seconds; `None` until it has started.
    pub started_at: Option<i64>,
    /// Unix seconds; `None` until it has ended.
    pub ended_at: Option<i64>,
    /// Unix seconds; the scheduler's guess for a queued job.
    pub estimated_start: Option<i64>,
    /// Minutes; `None`: unlimited or not known.
    pub time_limit_minutes: Option<i64>,
    /// How often Slurm started it again, where the source says.
    pub restarts: u32,
}

impl JobView {
    /// Its identity.
    #[must_use]
    pub fn job(&self) -> JobRef {
        JobRef {
            submitted_at: self.submitted_at,
            named: self.marks.name,
            ..JobRef::new(self.id.clone(), self.uid.clone())
        }
    }

    /// The reason never goes away by waiting.
    #[must_use]
    pub fn never_starts(&self) -> bool {
        self.state.phase() == JobPhase::Queued && reason_never_ends(&self.reason)
    }
}

/// How the batch script ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct JobExit {
    /// Exit code.
    pub code: i32,
    /// Signal, 0 for none.
    pub signal: i32,
}

/// Slurm's job states, all of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum JobState {
    /// Waits for resources or its turn.
    Pending,
    /// Has its nodes, which get ready (boot, prolog).
    Configuring,
    /// Runs.
    Running,
    /// Has ended, its processes are being cleaned up. How it ended is not said yet.
    Completing,
    /// Stopped with its allocation taken away.
    Suspended,
    /// Stopped by a signal, keeps its allocation.
    Stopped,
    /// Changes its size.
    Resizing,
    /// Being signalled.
    Signaling,
    /// Stages out files.
    StageOut,
    /// Goes back into the queue.
    Requeued,
    /// Went back into the queue and is held there.
    RequeueHold,
    /// Requeued by a federation.
    RequeueFed,
    /// Held after an exit code that the site calls special.
    SpecialExit,
    /// Held: its reservation was deleted.
    ResvDelHold,
    /// Ended with exit code 0.
    Completed,
    /// Ended with another exit code.
    Failed,
    /// Cancelled.
    Cancelled {
        /// Numeric user id of who did it, where the accounting says.
        by: Option<u32>,
    },
    /// Reached its time limit.
    Timeout,
    /// A process of it was killed for memory.
    OutOfMemory,
    /// A node failed.
    NodeFail,
    /// The launch failed, as a node could not boot.
    BootFail,
    /// Ended for a more important job.
    Preempted,
    /// Slurm's own `--deadline` passed.
    Deadline,
    /// Runs in another cluster of a federation.
    Revoked,
    /// The launch failed on the node.
    LaunchFailed,
    /// The node could not be reconfigured for it.
    ReconfigFail,
    /// A state that no known version has.
    Unknown(String),
}

/// What a state means for a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum JobPhase {
    /// Not started, or back in the queue.
    Queued,
    /// Holds its allocation.
    Running,
    /// Never runs again. Terminal unless the job is requeued by hand.
    Ended,
}

impl JobState {
    /// From Slurm's long name (`NODE_FAIL`, `CANCELLED by 2001`, `CANCELLED+`).
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let word = text
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .trim_end_matches('+');
        if word == "CANCELLED" {
            return Self::Cancelled {
                by: text.rsplit(' ').next().and_then(|n| n.parse().ok()),
            };
        }
        let known = STATES.iter().find(|(name, _)| *name == word);
        known.map_or_else(
            || Self::Unknown(text.to_owned()),
            |(_, state)| state.clone(),
        )
    }

    /// What it means for a pod. An unknown state counts as queued: nothing is decided from it.
    #[must_use]
    pub fn phase(&self) -> JobPhase {
        match self {
            Self::Pending
            | Self::Configuring
            | Self::Requeued
            | Self::RequeueHold
            | Self::RequeueFed
            | Self::SpecialExit
            | Self::ResvDelHold
            | Self::Unknown(_) => JobPhase::Queued,
            Self::Running
            | Self::Completing
            | Self::Suspended
            | Self::Stopped
            | Self::Resizing
            | Self::Signaling
            | Self::StageOut => JobPhase::Running,
            Self::Completed
            | Self::Failed
            | Self::Cancelled { .. }
            | Self::Timeout
            | Self::OutOfMemory
            | Self::NodeFail
            | Self::BootFail
            | Self::Preempted
            | Self::Deadline
            | Self::Revoked
            | Self::LaunchFailed
            | Self::ReconfigFail => JobPhase::Ended,
        }
    }

    /// Ended by the infrastructure, not by itself.
    #[must_use]
    pub fn is_disruption(&self) -> bool {
        matches!(
            self,
            Self::NodeFail
                | Self::BootFail
                | Self::Preempted
                | Self::LaunchFailed
                | Self::ReconfigFail
                | Self::Revoked
        )
    }
}

const STATES: &[(&str, JobState)] = &[
    ("PENDING", JobState::Pending),
    ("CONFIGURING", JobState::Configuring),
    ("POWER_UP_NODE", JobState::Configuring),
    ("RUNNING", JobState::Running),
    ("UPDATE_DB", JobState::Running),
    ("COMPLETING", JobState::Completing),
    ("SUSPENDED", JobState::Suspended),
    ("STOPPED", JobState::Stopped),
    ("RESIZING", JobState::Resizing),
    ("SIGNALING", JobState::Signaling),
    ("STAGE_OUT", JobState::StageOut),
    ("REQUEUED", JobState::Requeued),
    ("REQUEUE_HOLD", JobState::RequeueHold),
    ("REQUEUE_FED", JobState::RequeueFed),
    ("SPECIAL_EXIT", JobState::SpecialExit),
    ("RESV_DEL_HOLD", JobState::ResvDelHold),
    ("COMPLETED", JobState::Completed),
    ("FAILED", JobState::Failed),
    ("TIMEOUT", JobState::Timeout),
    ("OUT_OF_MEMORY", JobState::OutOfMemory),
    ("NODE_FAIL", JobState::NodeFail),
    ("BOOT_FAIL", JobState::BootFail),
    ("PREEMPTED", JobState::Preempted),
    ("DEADLINE", JobState::Deadline),
    ("REVOKED", JobState::Revoked),
    ("LAUNCH_FAILED", JobState::LaunchFailed),
    ("RECONFIG_FAIL", JobState::ReconfigFail),
];

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, _)) = STATES.iter().find(|(_, known)| known == self) {
            return f.write_str(name);
        }
        if let Self::Cancelled { by: Some(uid) } = self {
            return write!(f, "CANCELLED by {uid}");
        }
        f.write_str(if let Self::Unknown(text) = self {
            text
        } else {
            "CANCELLED"
        })
    }
}

/// Reasons of pending jobs that no waiting cures.
const NEVER: &[&str] = &[
    "AccountingPolicy",
    "AssocGrpBillingMinutes",
    "AssocMaxCpuPerJobLimit",
    "AssocMaxMemPerJob",
    "AssocMaxNodePerJobLimit",
    "AssocMaxWallDurationPerJobLimit",
    "BadConstraints",
    "DeadLine",
    "DependencyNeverSatisfied",
    "InvalidAccount",
    "InvalidQOS",
    "JobHeldAdmin",
    "JobHoldMaxRequeue",
    "JobLaunchFailure",
    "PartitionConfig",
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "QOSMaxCpuPerJobLimit",
    "QOSMaxMemoryPerJob",
    "QOSMaxNodePerJobLimit",
    "QOSMaxWallDurationPerJobLimit",
    "QOSMinCpuNotSatisfied",
    "QOSMinGRES",
    "QOSMinMemory",
    "QOSTimeLimit",
    "ReservationDeleted",
];

/// No waiting cures this reason; somebody must change the job or the site.
#[must_use]
pub fn reason_never_ends(reason: &str) -> bool {
    let word = reason.split([' ', ',', ':']).next().unwrap_or_default();
    NEVER.contains(&word.trim_matches(['(', ')']))
}

/// What the accounting could say in a round.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Accounting {
    /// Nothing was asked of it.
    #[default]
    NotAsked,
    /// It answered.
    Answered,
    /// This site has none.
    Disabled,
    /// It did not answer; its words.
    Away(String),
}

/// The answer to one batched question.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Round {
    /// All jobs that were asked for, and all others whose name or comment names a pod.
    pub jobs: Vec<JobView>,
    /// Jobs asked for that neither queue nor accounting knows. Only filled where both answered (or
    /// there is no accounting): a job is never missing because somebody did not answer.
    pub missing: Vec<JobRef>,
    /// Whether the accounting was there.
    pub accounting: Accounting,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_by_name() {
        for (name, state) in STATES {
            assert_eq!(&JobState::parse(name), state, "{name}");
        }
        assert_eq!(
            JobState::parse("CANCELLED by 2001"),
            JobState::Cancelled { by: Some(2001) }
        );
        assert_eq!(
            JobState::parse("CANCELLED+"),
            JobState::Cancelled { by: None }
        );
        assert_eq!(JobState::parse("CANCELLED").to_string(), "CANCELLED");
        let strange = JobState::parse("DANCING");
        assert_eq!(strange, JobState::Unknown("DANCING".to_owned()));
        assert_eq!(strange.phase(), JobPhase::Queued);
    }

    #[test]
    fn reasons_that_never_end() {
        for reason in [
            "PartitionTimeLimit",
            "(DependencyNeverSatisfied)",
            "BadConstraints",
        ] {
            assert!(reason_never_ends(reason), "{reason}");
        }
        for reason in [
            "Priority",
            "Resources",
            "BeginTime",
            "",
            "QOSMaxJobsPerUserLimit",
        ] {
            assert!(!reason_never_ends(reason), "{reason}");
        }
    }
}
