//! PURE: the states of a pod. States without a job and states with one are different types.

use std::time::Duration;

use jiff::Timestamp;

use crate::pod::{
    outcome::{Cause, Outcome},
    placement::Placement,
};

/// The reason that is shown right after a failed pull …
pub(super) const ERR_IMAGE_PULL: &str = "ErrImagePull";
/// … and the one from then on until the next pull.
pub(super) const IMAGE_PULL_BACK_OFF: &str = "ImagePullBackOff";
/// The reason of a name that names no image.
pub(super) const INVALID_IMAGE_NAME: &str = "InvalidImageName";
/// How long the error itself is shown.
const SHOW_ERROR: Duration = Duration::from_secs(1);

/// The state of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// No job is known to exist for the pod.
    BeforeJob(BeforeJob),
    /// The pod has a placement, whose job may be alive.
    WithJob {
        /// Where the pod runs.
        placement: Placement,
        /// How far the job has come.
        stage: JobStage,
    },
    /// The pod has ended. This state is final.
    Finished {
        /// How the pod ended.
        outcome: Outcome,
        /// The placement, while its job may still be there after the final report.
        lingering: Option<Placement>,
    },
    /// Kubernetes has let the pod go, and nothing of it is left on disk.
    Forgotten,
}

/// The states of a pod without a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BeforeJob {
    /// The record is on disk, and nothing else has been done yet.
    Accepted,
    /// Job directory, values and images are being prepared.
    Staging {
        /// Failed attempts.
        tries: u32,
        /// Why the last attempt failed, and when the next one is due.
        trouble: Option<Trouble>,
    },
    /// The scheduler refused the job for now.
    Throttled {
        /// Refusals in a row.
        tries: u32,
        /// A reason in CamelCase.
        reason: String,
        /// The scheduler's message.
        message: String,
        /// When to submit again.
        retry_at: Timestamp,
    },
    /// The intent to submit is on disk; the job may have been accepted.
    Submitting {
        /// Set if it is not known whether the job was accepted: the agent then looks for it by name.
        look: Option<Look>,
    },
}

impl BeforeJob {
    /// When the next attempt is due.
    #[must_use]
    pub fn wake(&self) -> Option<Timestamp> {
        match self {
            Self::Staging { trouble, .. } => trouble.as_ref().map(Trouble::wake),
            Self::Throttled { retry_at, .. } => Some(*retry_at),
            Self::Submitting { look } => look.as_ref().map(|look| look.at),
            Self::Accepted => None,
        }
    }
}

/// The stages of a pod that has a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobStage {
    /// The job waits in the queue.
    Queued {
        /// Since when it has waited for a reason that never ends.
        never: Option<Timestamp>,
    },
    /// The job has its nodes.
    Running,
    /// The agent is ending the job.
    Stopping {
        /// Why.
        cause: Cause,
        /// The last measure that was taken.
        how: Ending,
        /// When the next, harder measure is due.
        deadline: Timestamp,
    },
    /// The scheduler does not know the job.
    Lost {
        /// Since when it has been unknown.
        since: Timestamp,
        /// When to read the files again.
        look_at: Timestamp,
    },
    /// The job has ended, and its report is awaited.
    Settling {
        /// Why, if the agent ended the job.
        cause: Option<Cause>,
        /// When to stop waiting.
        until: Timestamp,
        /// When to read the files again.
        look_at: Timestamp,
    },
}

impl JobStage {
    /// Why the agent ended the job, if it did.
    #[must_use]
    pub fn cause(&self) -> Option<&Cause> {
        match self {
            Self::Stopping { cause, .. } => Some(cause),
            Self::Settling { cause, .. } => cause.as_ref(),
            Self::Queued { .. } | Self::Running | Self::Lost { .. } => None,
        }
    }
}

/// How hard the agent has tried to end a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It took the job out of the queue.
    Dequeued,
    /// It told the containers to end.
    Told,
    /// It cancelled the job.
    Cancelled,
}

/// A search for a job by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look {
    /// Searches that found nothing.
    pub tries: u32,
    /// When to search (again).
    pub at: Timestamp,
    /// Why it is not known whether the job exists.
    pub message: String,
    /// What to do if there is no job.
    pub otherwise: Otherwise,
}

/// What to do if the search by name finds no job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Otherwise {
    /// Submit the job again after a pause.
    Submit,
    /// Fail the pod: the same request would get the same answer.
    Reject,
}

/// What failed in staging.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The container that failed; empty for the pod as a whole.
    pub container: String,
    /// The image, if that is what failed; otherwise empty.
    pub image: String,
    /// `ErrImagePull`, `ImagePullBackOff`, `StagingFailed` …
    pub reason: String,
    /// The message for users.
    pub message: String,
}

/// Why staging cannot continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// What failed.
    pub failure: Failure,
    /// When it failed.
    pub since: Timestamp,
    /// When to try again.
    pub retry_at: Timestamp,
}

impl Trouble {
    /// When to try again, or before that to show that the agent waits.
    fn wake(&self) -> Timestamp {
        if self.failure.reason == ERR_IMAGE_PULL {
            (self.since + SHOW_ERROR).min(self.retry_at)
        } else {
            self.retry_at
        }
    }
}
