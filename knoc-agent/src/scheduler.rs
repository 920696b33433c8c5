//! The scheduler below the agent: what may be asked of it, and the two that there are.
//!
//! `slurm` is the real one, `local` runs jobs as process groups of the agent's own host. Both are
//! asked for all jobs in one [`Scheduler::round`]; nothing here polls by itself or keeps a task. The
//! scheduler owns one fact only: whether a job lives, and how it left.
//!
//! Who calls: pod actors (`submit`, `find`, `cancel`), the registry's one poll task (`round`,
//! `node_info`), `doctor`. What it never does: it decides nothing about a pod, and it never takes a
//! bare job id for an identity, since Slurm may give an id again: name and comment must agree.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use knoc_contract::jobdir::JobDirError;
use knoc_proto::ids::{JobId, PodUid};
use knoc_proto::pb;

use crate::command::CommandError;

pub mod local;
pub mod slurm;
mod view;

pub use view::{
    Accounting, JobExit, JobPhase, JobRef, JobState, JobView, Marks, Round, reason_never_ends,
};

/// What is needed to submit the job of a pod.
#[derive(Debug, Clone)]
pub struct SubmitRequest {
    /// The pod.
    pub uid: PodUid,
    /// Its shape.
    pub spec: Arc<pb::PodSpec>,
    /// UID of the cluster's kube-system namespace; empty for pods without Kubernetes.
    pub cluster_id: String,
    /// Grows with each submission of this pod.
    pub attempt: u32,
    /// Absolute path of the pod's job directory; it exists.
    pub jobdir: PathBuf,
    /// Absolute path of `versions/X.Y.Z/knoc-agent`.
    pub shim: PathBuf,
}

/// A job that was accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Submitted {
    /// Its id.
    pub job: JobId,
    /// When the scheduler was asked (after any wait for our own rate limit).
    pub began: Timestamp,
    /// When it had answered.
    pub ended: Timestamp,
    /// What the user of the pod should know of how it was submitted; a sentence each.
    pub notes: Vec<String>,
}

/// What would be submitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The batch script.
    pub script: String,
    /// What the pod asked for and the job does not ask for here, a sentence each.
    pub notes: Vec<String>,
}

/// What a refusal to submit means for the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusalKind {
    /// The same request will be refused again: the pod fails with the scheduler's words.
    Permanent,
    /// A limit stands in the way now: wait and try again.
    Throttled,
    /// Nobody answered, and nothing was accepted: try again.
    ControllerAway,
    /// The job may have been accepted: [`Scheduler::find`] before anything else.
    Ambiguous,
    /// The scheduler reported success and gave no job id. A wrapper may print none: [`Scheduler::find`], and if no job
    /// is found the same request is not repeated.
    NoJobId,
}

/// A job that was not accepted, or not surely.
#[derive(Debug, thiserror::Error)]
#[error("{words}")]
pub struct Refusal {
    /// What to do next.
    pub kind: RefusalKind,
    /// The scheduler's own words, or ours where it was never asked.
    pub words: String,
    /// The failed command, where there was one; its text repeats the words.
    pub command: Option<CommandError>,
}

impl Refusal {
    /// A refusal of our own, before the scheduler was asked.
    #[must_use]
    pub fn permanent(words: impl Into<String>) -> Self {
        Self {
            kind: RefusalKind::Permanent,
            words: words.into(),
            command: None,
        }
    }
}

/// How a job is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cancel {
    /// A queued job leaves the queue; a job that has started meanwhile is left alone.
    Queued,
    /// USR1 to the shim, which stops the containers with their grace. Only to one that says `stop-signal`: it ends others.
    Stop,
    /// TERM to the shim, which takes it for Slurm's own: it stops the containers before Slurm would kill it.
    Terminate,
    /// The job ends: TERM to all of it, KILL soon after.
    Kill,
}

/// The scheduler could not be asked, or its answer not be read.
#[derive(Debug, thiserror::Error)]
pub enum SchedulerError {
    /// A command failed; its words are Slurm's.
    #[error("ask the scheduler")]
    Command(#[from] CommandError),
    /// The answer is not what any known version says.
    #[error("read the answer of {program}: {problem}")]
    Answer {
        /// Which program's.
        program: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A file of the local scheduler.
    #[error("keep the jobs of this host")]
    State(#[from] JobDirError),
    /// The agent stops.
    #[error("the agent stops")]
    Stopping,
}

/// The scheduler of this site.
#[derive(Debug)]
pub enum Scheduler {
    /// Slurm, by its own commands.
    Slurm(Box<slurm::Slurm>),
    /// Process groups on this host.
    Local(local::Local),
}

impl Scheduler {
    /// `slurm` or `local`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Slurm(_) => "slurm",
            Self::Local(_) => "local",
        }
    }

    /// The version as people know it: `slurm 24.11.5`.
    pub async fn version(&self) -> Result<String, SchedulerError> {
        match self {
            Self::Slurm(slurm) => slurm.version().await,
            Self::Local(_) => Ok(format!("local {}", env!("CARGO_PKG_VERSION"))),
        }
    }

    /// What [`Self::submit`] would submit. Pure but for what the last [`Self::node_info`] taught.
    pub fn render(&self, request: &SubmitRequest) -> Result<Rendered, Refusal> {
        match self {
            Self::Slurm(slurm) => slurm.render(request),
            Self::Local(local) => local.render(request),
        }
    }

    /// Submits a job. Waits for our own rate limit first; `allowed` is asked after any wait, right before the job is
    /// submitted, and its refusal is the answer. Not to be called again for a pod after
    /// [`RefusalKind::Ambiguous`] or a crash before [`Self::find`] said that there is no job.
    ///
    /// Cancel safety: a dropped call is ambiguous.
    pub async fn submit(
        &self,
        request: &SubmitRequest,
        allowed: impl Future<Output = Result<(), Refusal>>,
    ) -> Result<Submitted, Refusal> {
        match self {
            Self::Slurm(slurm) => slurm.submit(request, allowed).await,
            Self::Local(local) => local.submit(request, allowed).await,
        }
    }

    /// All jobs of a pod that the scheduler knows by name, comment or working directory, ended ones too, newest first.
    /// None of them was submitted before `since`.
    pub async fn find(
        &self,
        uid: &PodUid,
        since: Timestamp,
    ) -> Result<Vec<JobView>, SchedulerError> {
        match self {
            Self::Slurm(slurm) => slurm.find(uid, since).await,
            Self::Local(local) => local.find(uid).await,
        }
    }

    /// Ends a job. A job that is gone already, or whose id is another's by now, is no error.
    pub async fn cancel(&self, job: &JobRef, how: Cancel) -> Result<(), SchedulerError> {
        match self {
            Self::Slurm(slurm) => slurm.cancel(job, how).await,
            Self::Local(local) => local.cancel(job, how).await,
        }
    }

    /// The state of all jobs at once. `known` are the jobs that the caller waits for: those that left
    /// the queue are looked up in the accounting; those that nobody knows are in [`Round::missing`].
    pub async fn round(&self, known: &[JobRef]) -> Result<Round, SchedulerError> {
        match self {
            Self::Slurm(slurm) => slurm.round(known).await,
            Self::Local(local) => local.round(known).await,
        }
    }

    /// Capacity and partitions. `scheduler`, `pid_isolation` and `pod_limit` are left unset.
    pub async fn node_info(&self) -> Result<pb::NodeInfo, SchedulerError> {
        match self {
            Self::Slurm(slurm) => slurm.node_info().await,
            Self::Local(local) => Ok(local.node_info()),
        }
    }

    /// The scheduler's part of `doctor`'s check-list.
    pub async fn checks(&self) -> Vec<pb::Finding> {
        match self {
            Self::Slurm(slurm) => slurm.checks().await,
            Self::Local(local) => vec![local.check()],
        }
    }

    /// The shortest sensible time between two rounds while something is awaited.
    #[must_use]
    pub fn round_interval(&self) -> Duration {
        match self {
            Self::Slurm(slurm) => slurm.settings().round_interval,
            Self::Local(_) => local::ROUND_INTERVAL,
        }
    }
}
