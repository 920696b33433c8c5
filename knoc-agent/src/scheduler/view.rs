//! PURE: what a scheduler reports about jobs, in Slurm's vocabulary.

use std::fmt;

use knoc_proto::ids::{JobId, PodUid};

/// A job of a pod, with what distinguishes it from another job that gets the same ID later.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobRef {
    /// The scheduler's ID, which may be reused for another job.
    pub id: JobId,
    /// The pod.
    pub uid: PodUid,
    /// When `sbatch` was called and when it had answered with this ID, in Unix seconds of this
    /// host's clock. `None` if the job was found in another way.
    pub call: Option<(i64, i64)>,
    /// The submit time that the scheduler reported when the job was last seen, in Unix seconds of
    /// the scheduler's clock.
    pub submitted_at: Option<i64>,
    /// Whether the job had the name that we gave it when it was last seen.
    pub named: bool,
}

impl JobRef {
    /// A job of which only the ID and the pod are known.
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

    /// Whether `view` shows this job.
    #[must_use]
    pub fn is(&self, view: &JobView) -> bool {
        self.id == view.id && self.uid == view.uid
    }
}

/// Which properties of a job name its pod. Users, submit plugins and wrappers of `sbatch` may
/// change each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Marks {
    /// The job's name does.
    pub name: bool,
    /// The job's comment does.
    pub comment: bool,
    /// The job's working directory does, if the source reports it.
    pub directory: bool,
}

impl Marks {
    /// A job as we submit it.
    pub const ALL: Self = Self {
        name: true,
        comment: true,
        directory: true,
    };

    /// Whether at least one of them names the pod.
    #[must_use]
    pub fn any(self) -> bool {
        self.name || self.comment || self.directory
    }

    /// Whether at least two of them name the pod. If only one does, a program of the pod may have
    /// submitted the job.
    #[must_use]
    pub fn sure(self) -> bool {
        u8::from(self.name) + u8::from(self.comment) + u8::from(self.directory) >= 2
    }
}

/// One job as the scheduler sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobView {
    /// The scheduler's ID.
    pub id: JobId,
    /// The pod whose job it is.
    pub uid: PodUid,
    /// Which properties of the job name the pod.
    pub marks: Marks,
    /// From the comment: the cluster of the pod; empty for pods without Kubernetes, or if the
    /// source does not report comments.
    pub cluster_id: String,
    /// From the comment: which submission of the pod this is; 0 if the source does not report it.
    pub attempt: u32,
    /// The job's state.
    pub state: JobState,
    /// Slurm's reason (`Priority`, `Resources` …); empty if there is none.
    pub reason: String,
    /// The exit status of the batch script, if the source reports it.
    pub exit: Option<JobExit>,
    /// Node list, as Slurm writes it (`c[1-3]`).
    pub nodes: String,
    /// The partition; while the job is queued, there may be several, separated by commas.
    pub partition: String,
    /// Time of submission, Unix seconds.
    pub submitted_at: Option<i64>,
    /// Start time, Unix seconds; `None` until it has started.
    pub started_at: Option<i64>,
    /// End time, Unix seconds; `None` until it has ended.
    pub ended_at: Option<i64>,
    /// The scheduler's estimate of a queued job's start, Unix seconds.
    pub estimated_start: Option<i64>,
    /// Time limit in minutes; `None` if it is unlimited or unknown.
    pub time_limit_minutes: Option<i64>,
    /// How often Slurm has restarted the job, if the source reports it.
    pub restarts: u32,
}

impl JobView {
    /// The identity of the job.
    #[must_use]
    pub fn job(&self) -> JobRef {
        JobRef {
            submitted_at: self.submitted_at,
            named: self.marks.name,
            ..JobRef::new(self.id.clone(), self.uid.clone())
        }
    }

    /// Whether the job will never start, however long it waits.
    #[must_use]
    pub fn never_starts(&self) -> bool {
        self.state.phase() == JobPhase::Queued && reason_never_ends(&self.reason)
    }
}

/// The exit status of the batch script.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct JobExit {
    /// Exit code.
    pub code: i32,
    /// Signal; 0 if there was none.
    pub signal: i32,
}

/// Slurm's job states, all of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum JobState {
    /// Waits for resources or its turn.
    Pending,
    /// Has its nodes, which are being prepared (boot, prolog).
    Configuring,
    /// Runs.
    Running,
    /// Has ended; its processes are being cleaned up, and its final state is not known yet.
    Completing,
    /// Stopped, and its resources were released to other jobs.
    Suspended,
    /// Stopped by a signal, but keeps its resources.
    Stopped,
    /// Is changing its size.
    Resizing,
    /// Is being signalled.
    Signaling,
    /// Is staging out files.
    StageOut,
    /// Is going back into the queue.
    Requeued,
    /// Went back into the queue and is held there.
    RequeueHold,
    /// Requeued by a federation.
    RequeueFed,
    /// Held after an exit code that the site configured as special.
    SpecialExit,
    /// Held, because its reservation was deleted.
    ResvDelHold,
    /// Ended with exit code 0.
    Completed,
    /// Ended with a non-zero exit code.
    Failed,
    /// Cancelled by a user or an administrator.
    Cancelled {
        /// Numeric user ID of who cancelled it, if the accounting database says.
        by: Option<u32>,
    },
    /// Reached its time limit.
    Timeout,
    /// Ended because one of its processes was killed for lack of memory.
    OutOfMemory,
    /// Ended because a node failed.
    NodeFail,
    /// Could not start, because a node did not boot.
    BootFail,
    /// Ended in favour of a job with higher priority.
    Preempted,
    /// Slurm's own `--deadline` passed.
    Deadline,
    /// Runs in another cluster of a federation.
    Revoked,
    /// Could not be launched on its node.
    LaunchFailed,
    /// Could not start, because its node could not be reconfigured.
    ReconfigFail,
    /// A state that no known version has.
    Unknown(String),
}

/// What a state means for a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum JobPhase {
    /// Not started, or back in the queue.
    Queued,
    /// Holds its resources.
    Running,
    /// Has ended and never runs again, unless it is requeued by hand.
    Ended,
}

impl JobState {
    /// Parses Slurm's long name (`NODE_FAIL`, `CANCELLED by 2001`, `CANCELLED+`).
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

    /// What the state means for a pod. An unknown state counts as queued, so nothing is decided
    /// from it.
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

    /// Whether the job was ended by the infrastructure and not by itself.
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

/// Reasons of pending jobs that do not go away by waiting.
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

/// What stands in place of a reason once the prolog has failed; `scontrol` writes it with underscores.
const LAUNCH_FAILED: &str = "launch failed requeued held";

/// Whether this reason does not go away by waiting: a user must change the job, or the site its
/// configuration. Whoever holds a job, an administrator too, means to release it.
#[must_use]
pub fn reason_never_ends(reason: &str) -> bool {
    let word = reason.split([' ', ',', ':']).next().unwrap_or_default();
    NEVER.contains(&word.trim_matches(['(', ')']))
        || reason.replace('_', " ").contains(LAUNCH_FAILED)
}

/// Whether the accounting database answered in a round.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Accounting {
    /// It was not queried.
    #[default]
    NotAsked,
    /// It answered.
    Answered,
    /// This site has no accounting storage.
    Disabled,
    /// It did not answer; this is its message.
    Away(String),
}

/// The answer to one batched query.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Round {
    /// All jobs that were asked for, and all others whose name or comment names a pod.
    pub jobs: Vec<JobView>,
    /// Jobs asked for that neither the queue nor the accounting database has. Filled only if both
    /// answered (or there is no accounting storage): a job is never missing because a query failed.
    pub missing: Vec<JobRef>,
    /// Whether the accounting database answered.
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
            "(launch failed requeued held)",
            "launch_failed_requeued_held",
        ] {
            assert!(reason_never_ends(reason), "{reason}");
        }
        for reason in [
            "Priority",
            "Resources",
            "BeginTime",
            "",
            "QOSMaxJobsPerUserLimit",
            "JobHeldUser",
            "JobHeldAdmin",
        ] {
            assert!(!reason_never_ends(reason), "{reason}");
        }
    }
}
