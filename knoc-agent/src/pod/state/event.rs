//! PURE: the events of a pod, and the effects that the actor performs.

use std::time::Duration;

use knoc_proto::pb;

use super::pod::Facts;
use crate::scheduler::{Cancel, JobRef, JobView, SubmitErrorKind, Submitted};

/// An event of a pod.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The actor has started. This is the first event, also after a restart; it repeats what the
    /// state needs.
    Begin,
    /// The job directory is complete.
    Staged,
    /// Staging failed; it will be tried again.
    StageFailed {
        /// The container that failed; empty for the pod as a whole.
        container: String,
        /// The image, if that is what failed; otherwise empty.
        image: String,
        /// `ErrImagePull` and other reasons in CamelCase.
        reason: String,
        /// The message for users.
        message: String,
    },
    /// The images that the pod needs, or the credentials for them, have changed; nothing is being looked up.
    LookAgain,
    /// The scheduler accepted the job.
    Submitted(Submitted),
    /// The scheduler did not accept the job, or did not say whether it did.
    SubmitFailed {
        /// Decides what to do next.
        kind: SubmitErrorKind,
        /// The scheduler's message.
        message: String,
    },
    /// The search by name found these jobs, newest first.
    Found(Vec<JobView>),
    /// The search by name failed.
    FindFailed(String),
    /// One poll of the scheduler: the jobs of this pod, and whether it definitely does not know the
    /// placement's job.
    Round {
        /// All jobs of this pod that the scheduler knows.
        jobs: Vec<JobView>,
        /// Neither the queue nor the accounting knows the job of the pod's placement.
        missing: bool,
    },
    /// The shim's report, from the link or the file.
    Report(Box<pb::Report>),
    /// The shim's link came up (`true`) or went down.
    Link(bool),
    /// The files were read, and there is no final report.
    Files {
        /// The end of `batch.out`.
        batch_tail: String,
        /// Whether a shim has claimed the job directory; `true` if that cannot be determined.
        claimed: bool,
    },
    /// The pod is to end.
    Delete {
        /// The grace period for the containers; `None` means the pod's own.
        grace: Option<Duration>,
        /// The message for users.
        reason: String,
    },
    /// A newer generation of the shape.
    Update(Facts),
    /// The actor's own work produced something worth an Event.
    Note(Note),
    /// The time that [`super::pod::Pod::wake`] returned has come.
    Tick,
    /// The pod may be forgotten.
    Forget,
}

/// Something worth an Event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// A warning, or a normal Event.
    pub warning: bool,
    /// A reason in CamelCase.
    pub reason: &'static str,
    /// The message for users.
    pub message: String,
    /// The container that it concerns; empty for the pod as a whole.
    pub container: String,
}

/// What the actor is to do. Effects are performed in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Write the record, synced, before any later effect.
    Persist,
    /// Complete the job directory; answers `Staged` or `StageFailed`.
    Stage,
    /// Call `sbatch`; answers `Submitted` or `SubmitFailed`.
    Submit,
    /// Search for the job by name; answers `Found` or `FindFailed`.
    Find,
    /// End a job with Slurm.
    Cancel {
        /// The job.
        job: JobRef,
        /// The signal to send, or a cancellation.
        how: Cancel,
    },
    /// Tell the containers to end, through the link or with a signal to the batch script.
    Stop {
        /// The job.
        job: JobRef,
        /// The grace period for the containers.
        grace: Duration,
    },
    /// Read the report and the batch output; answers `Report` or `Files`.
    ReadFiles,
    /// Remove the staged values.
    CleanUp,
    /// Ask the scheduler soon, because a change is expected.
    PollSoon,
    /// Remove the job directory.
    Remove,
}
