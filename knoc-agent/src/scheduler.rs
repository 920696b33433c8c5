//! The scheduler interface, and its two implementations.
//!
//! `slurm` uses a real Slurm; `local` runs jobs as process groups on the agent's own host. Both
//! report all jobs in one [`Scheduler::round`]; nothing here polls on its own or keeps a task. The
//! scheduler owns one fact only: whether a job is alive, and how it ended.
//!
//! Callers are the pod actors (`submit`, `find`, `cancel`), the registry's poll task (`round`,
//! `node_info`) and `doctor`. This module decides nothing about a pod, and it never identifies a
//! job by its ID alone, because Slurm may reuse an ID: see [`JobRef`].

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use knoc_contract::jobdir::JobDirError;
use knoc_proto::{
    ids::{JobId, PodUid},
    pb,
    pod::PodSpec,
};

use crate::command::{Command, CommandError};

pub mod local;
pub mod slurm;
mod view;

pub use view::{
    Accounting, JobExit, JobPhase, JobRef, JobState, JobView, Marks, Round, reason_never_ends,
};

/// What is needed to submit a pod's job.
#[derive(Debug, Clone)]
pub struct SubmitRequest {
    /// The pod.
    pub uid: PodUid,
    /// The pod's spec, as it was checked.
    pub spec: Arc<PodSpec>,
    /// UID of the cluster's kube-system namespace; empty for pods without Kubernetes.
    pub cluster_id: String,
    /// Counts the submissions of this pod.
    pub attempt: u32,
    /// Absolute path of the pod's job directory; it exists.
    pub jobdir: PathBuf,
    /// Absolute path of `versions/X.Y.Z/knoc-agent`, the program that the job runs.
    pub shim: PathBuf,
}

/// A job that the scheduler accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Submitted {
    /// The job's ID.
    pub job: JobId,
    /// When the scheduler was called, after any wait for our own rate limit.
    pub began: Timestamp,
    /// When it had answered.
    pub ended: Timestamp,
    /// What the pod's user should know about the submission, one sentence each.
    pub notes: Vec<String>,
}

/// What would be submitted for a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// The batch script.
    pub script: String,
    /// What the pod asks for and the job does not request, one sentence each.
    pub notes: Vec<String>,
}

/// What a failed submission means for the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SubmitErrorKind {
    /// The same request will be refused again: the pod fails with the scheduler's message.
    Permanent,
    /// A limit is reached at the moment: wait and try again.
    Throttled,
    /// The scheduler did not answer, and nothing was accepted: try again.
    ControllerAway,
    /// The job may have been accepted: call [`Scheduler::find`] before anything else.
    Ambiguous,
    /// The scheduler reported success without a job ID, as a wrapper may do: call
    /// [`Scheduler::find`]. If it finds no job, the same request is not repeated.
    NoJobId,
}

/// A job was not accepted, or it is not known whether it was.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct SubmitError {
    /// What to do next.
    pub kind: SubmitErrorKind,
    /// The scheduler's own message, or ours if the scheduler was not called.
    pub message: String,
    /// The failed command, if there was one; its text contains the message.
    pub command: Option<CommandError>,
}

impl SubmitError {
    /// An error of our own, before the scheduler was called.
    #[must_use]
    pub fn permanent(message: impl Into<String>) -> Self {
        Self {
            kind: SubmitErrorKind::Permanent,
            message: message.into(),
            command: None,
        }
    }
}

/// How a job is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cancel {
    /// Removes a queued job; a job that has started in the meantime keeps running.
    Queued,
    /// Sends USR1 to the shim, which stops the containers within their grace period. Used only if
    /// the shim has the capability `stop-signal`: USR1 ends other shims.
    Stop,
    /// Sends TERM to the shim, as Slurm does: the shim stops the containers before Slurm would kill
    /// it.
    Terminate,
    /// Ends the job: TERM to all of its processes, then KILL.
    Kill,
}

/// The scheduler could not be called, or its answer could not be parsed.
#[derive(Debug, thiserror::Error)]
pub enum SchedulerError {
    /// A command failed; the message is Slurm's.
    #[error("call the scheduler")]
    Command(#[from] CommandError),
    /// The answer does not have the form of any known version.
    #[error("read the answer of {program}: {problem}")]
    Answer {
        /// The program that answered.
        program: &'static str,
        /// What is wrong with the answer.
        problem: String,
    },
    /// A file of the local scheduler cannot be read or written.
    #[error("read or write the records of the jobs on this host")]
    State(#[from] JobDirError),
    /// The agent is stopping.
    #[error("the agent is stopping")]
    Stopping,
}

/// The scheduler of this site.
#[derive(Debug)]
pub enum Scheduler {
    /// Slurm, through its commands.
    Slurm(Box<slurm::Slurm>),
    /// Process groups on this host.
    Local(local::Local),
}

impl Scheduler {
    /// The scheduler's name, `slurm` or `local`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Slurm(_) => "slurm",
            Self::Local(_) => "local",
        }
    }

    /// The name and version, such as `slurm 24.11.5`.
    pub async fn version(&self) -> Result<String, SchedulerError> {
        match self {
            Self::Slurm(slurm) => slurm.version().await,
            Self::Local(_) => Ok(format!("local {}", env!("CARGO_PKG_VERSION"))),
        }
    }

    /// What [`Self::submit`] would submit. PURE apart from the partition limits of the last
    /// [`Self::node_info`].
    pub fn render(&self, request: &SubmitRequest) -> Result<Rendered, SubmitError> {
        match self {
            Self::Slurm(slurm) => slurm.render(request),
            Self::Local(local) => local.render(request),
        }
    }

    /// Submits a job. Waits for our own rate limit first; `allowed` is checked after any wait,
    /// right before the job is submitted, and its error is returned. After
    /// [`SubmitErrorKind::Ambiguous`] or a crash, it must not be called again for a pod until
    /// [`Self::find`] has found no job.
    ///
    /// Cancel safety: if the call is dropped, the outcome is ambiguous.
    pub async fn submit(
        &self,
        request: &SubmitRequest,
        allowed: impl Future<Output = Result<(), SubmitError>>,
    ) -> Result<Submitted, SubmitError> {
        match self {
            Self::Slurm(slurm) => slurm.submit(request, allowed).await,
            Self::Local(local) => local.submit(request, allowed).await,
        }
    }

    /// All jobs of a pod that the scheduler finds by name, comment or working directory, including
    /// ended ones, newest first. No job submitted before `since` is returned.
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

    /// Ends a job. It is not an error if the job has ended already, or if its ID belongs to another
    /// job by now.
    pub async fn cancel(&self, job: &JobRef, how: Cancel) -> Result<(), SchedulerError> {
        match self {
            Self::Slurm(slurm) => slurm.cancel(job, how).await,
            Self::Local(local) => local.cancel(job, how).await,
        }
    }

    /// The state of all jobs at once. `known` are the jobs that the caller waits for: those that
    /// have left the queue are looked up in the accounting database; those found in neither are in
    /// [`Round::missing`].
    pub async fn round(&self, known: &[JobRef]) -> Result<Round, SchedulerError> {
        match self {
            Self::Slurm(slurm) => slurm.round(known).await,
            Self::Local(local) => local.round(known).await,
        }
    }

    /// The site's capacity and partitions. `scheduler`, `pid_isolation` and `pod_limit` are left
    /// unset.
    pub async fn node_info(&self) -> Result<pb::NodeInfo, SchedulerError> {
        match self {
            Self::Slurm(slurm) => slurm.node_info().await,
            Self::Local(local) => Ok(local.node_info()),
        }
    }

    /// The command that runs `program` inside a running job, as one process on the job's first node,
    /// whose standard input and output are its own. The job is not disturbed.
    #[must_use]
    pub fn enter(&self, job: &JobId, program: &Path, args: [&OsStr; 2]) -> Command {
        match self {
            Self::Slurm(slurm) => slurm.enter(job, program, args),
            Self::Local(local) => local.enter(program, args),
        }
    }

    /// The absolute path of srun, with which a job starts the ranks of its pod; `None` if this
    /// scheduler's jobs have none.
    #[must_use]
    pub fn srun(&self) -> Option<PathBuf> {
        match self {
            Self::Slurm(slurm) => Some(slurm.settings().find(&slurm.settings().srun)),
            Self::Local(_) => None,
        }
    }

    /// Whether this text, of a command of [`Self::enter`] that failed, means that the site permits
    /// no such command.
    #[must_use]
    pub fn is_refusal(&self, text: &str) -> bool {
        match self {
            Self::Slurm(slurm) => slurm.is_refusal(text),
            Self::Local(_) => false,
        }
    }

    /// The scheduler's findings for `doctor`.
    pub async fn checks(&self) -> Vec<pb::Finding> {
        match self {
            Self::Slurm(slurm) => slurm.checks().await,
            Self::Local(local) => vec![local.check()],
        }
    }

    /// The shortest sensible interval between two rounds while a change is expected.
    #[must_use]
    pub fn round_interval(&self) -> Duration {
        match self {
            Self::Slurm(slurm) => slurm.settings().round_interval,
            Self::Local(_) => local::ROUND_INTERVAL,
        }
    }
}
