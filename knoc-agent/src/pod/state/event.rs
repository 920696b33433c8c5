//! PURE: what can happen to a pod, and what the actor is told to do.

use std::time::Duration;

use knoc_proto::pb;

use super::pod::Facts;
use crate::scheduler::{Cancel, JobRef, JobView, SubmitErrorKind, Submitted};

/// All that can happen to a pod.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The actor has started: do what the state asks for. First event, also after a restart.
    Begin,
    /// The job directory is complete.
    Staged,
    /// Staging failed for now.
    StageFailed {
        /// The container it is about; empty: the pod.
        container: String,
        /// `ErrImagePull` …
        reason: String,
        /// The message for users.
        message: String,
    },
    /// The scheduler accepted the job.
    Submitted(Submitted),
    /// The scheduler did not accept the job, or did not say whether it did.
    SubmitFailed {
        /// What to do next.
        kind: SubmitErrorKind,
        /// The scheduler's message.
        message: String,
    },
    /// Jobs of this pod, by name, newest first.
    Found(Vec<JobView>),
    /// The look by name failed.
    FindFailed(String),
    /// One round of questions to the scheduler: the jobs of this pod, and whether it surely does not know ours.
    Round {
        /// All of this pod that it knows.
        jobs: Vec<JobView>,
        /// Neither the queue nor the accounting knows the job of the pod's placement.
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
    /// The pod shall end.
    Delete {
        /// Time for the containers; `None`: the pod's own.
        grace: Option<Duration>,
        /// The message for users.
        reason: String,
    },
    /// A newer generation of the shape.
    Update(Facts),
    /// Something worth an Event, from the actor's own work.
    Note(Note),
    /// The time that [`super::pod::Pod::wake`] named has come.
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
    /// The message for users.
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
    /// `sbatch`; answers `Submitted` or `SubmitFailed`.
    Submit,
    /// Look by name; answers `Found` or `FindFailed`.
    Find,
    /// End a job.
    Cancel {
        /// The job.
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
    /// Ask the scheduler soon, because a change is expected.
    PollSoon,
    /// Remove the job directory.
    Remove,
}
