//! PURE: decides whose job it is that Slurm shows.
//!
//! Once `sbatch` has answered, a job is known by its ID. Its name, comment and working directory
//! only help to find it: users (`scontrol update`), submit plugins and wrappers of `sbatch` change
//! them. But the ID alone is not enough either, because a controller that was killed soon after a
//! submission reuses the ID. So a job with the ID is the pod's job if one of these holds:
//!
//! * its name, comment or working directory names the pod,
//! * its submit time is the one that Slurm reported for the job earlier,
//! * Slurm has not shown the job before, and it was submitted while our `sbatch` ran, by the
//!   controller's clock,
//! * it was requeued, which sets a later submit time and counts its restarts.

use std::path::Path;

use super::parse::{Detail, Row};
use crate::scheduler::{JobRef, Marks};

/// Submit times are whole seconds, and the controller's clock is known to the second.
const TOLERANCE: i64 = 1;

/// The owner of a job that has the ID of one of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ownership {
    /// It is the pod's job.
    Ours(Marks),
    /// It is another job: the ID was reused.
    Stranger,
    /// Not enough is known; [`decide`] settles it with the controller's answer.
    Doubt,
}

/// Decides whether `row`, which has the ID of `job`, is the job of this pod.
#[must_use]
pub(super) fn judge(row: &Row, job: &JobRef, pods: &Path) -> Ownership {
    let marks = row.marks(&job.uid, pods);
    if row.id != job.id {
        return Ownership::Stranger;
    }
    if marks.any() {
        return Ownership::Ours(marks);
    }
    // A later job of another pod of ours.
    if row.names(pods).is_some() {
        return Ownership::Stranger;
    }
    let ours = match (job.submitted_at, row.submitted_at) {
        (_, None) => false,
        (Some(known), Some(at)) => known == at,
        (None, Some(at)) => job.call.is_some_and(|call| within(call, at, 0)),
    };
    if ours {
        Ownership::Ours(marks)
    } else {
        Ownership::Doubt
    }
}

/// Settles a doubt with the controller's full answer about the job. `ahead` is how many seconds the
/// controller's clock is ahead of this host's; `None` if it could not be determined.
#[must_use]
pub(super) fn decide(
    row: &Row,
    detail: &Detail,
    job: &JobRef,
    pods: &Path,
    ahead: Option<i64>,
) -> Ownership {
    let own = pods.join(job.uid.as_str());
    let marks = Marks {
        directory: detail.directory.as_ref() == Some(&own),
        ..row.marks(&job.uid, pods)
    };
    let ours = match (job.submitted_at, row.submitted_at) {
        (_, None) => false,
        (Some(known), Some(at)) => known == at || (detail.restarts > 0 && at > known),
        (None, Some(at)) => job
            .call
            .is_some_and(|call| within(call, at, ahead.unwrap_or(0))),
    };
    if marks.any() || ours {
        Ownership::Ours(marks)
    } else {
        Ownership::Stranger
    }
}

/// Whether the controller, whose clock is `ahead` of ours, accepted the job while `sbatch` ran.
fn within((began, ended): (i64, i64), submitted: i64, ahead: i64) -> bool {
    let at = submitted.saturating_sub(ahead);
    (began.saturating_sub(TOLERANCE)..=ended.saturating_add(TOLERANCE)).contains(&at)
}

#[cfg(test)]
mod tests;
