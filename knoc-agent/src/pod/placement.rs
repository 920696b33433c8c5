//! PURE: where a pod runs, apart from the pod itself.
//!
//! A pod is what Kubernetes asked for; its placement is what Slurm was given for it. Record, claim, job name and
//! [`JobRef`] refer to the placement. The one kind today is a job of the pod's own. A task of a job array, a share of a
//! gang's allocation and a slot of a pilot job will be further variants: each says here which job it belongs to, how
//! that job is referred to, and whether ending the pod may cancel it.

use jiff::Timestamp;
use knoc_proto::ids::{JobId, PodUid};

use crate::scheduler::{JobRef, JobView};

/// Where a pod runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// A job that was submitted for this pod alone.
    OwnJob {
        /// The job's id.
        job: JobId,
    },
}

impl Placement {
    /// A job that was submitted for the pod alone.
    #[must_use]
    pub fn own_job(job: JobId) -> Self {
        Self::OwnJob { job }
    }

    /// The job whose life decides whether the pod lives.
    #[must_use]
    pub fn job(&self) -> &JobId {
        match self {
            Self::OwnJob { job } => job,
        }
    }

    /// Follows the claim of the job directory, which `claimant` holds. Returns the job that it replaces, or `None` if
    /// the placement is that job already.
    pub fn follow_claim(&mut self, claimant: &JobId) -> Option<JobId> {
        match self {
            Self::OwnJob { job } if job == claimant => None,
            Self::OwnJob { job } => Some(std::mem::replace(job, claimant.clone())),
        }
    }

    /// The job, as queries to the scheduler name it. `seen` is the scheduler's last view of any of
    /// the pod's jobs; `sbatch` is when the call that submitted the job began and ended.
    #[must_use]
    pub fn job_ref(
        &self,
        pod: &PodUid,
        seen: Option<&JobView>,
        sbatch: Option<(Timestamp, Timestamp)>,
    ) -> JobRef {
        let job = self.job();
        let seen = seen.filter(|view| view.id == *job);
        JobRef {
            call: sbatch.map(|(began, ended)| (began.as_second(), ended.as_second())),
            submitted_at: seen.and_then(|view| view.submitted_at),
            named: seen.is_some_and(|view| view.marks.name),
            ..JobRef::new(job.clone(), pod.clone())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placement_follows_the_claim() {
        let job = |id: &str| JobId::try_from(id).unwrap();
        let mut placement = Placement::own_job(job("1"));
        assert_eq!(placement.follow_claim(&job("1")), None);
        assert_eq!(placement.follow_claim(&job("2")), Some(job("1")));
        assert_eq!(placement, Placement::own_job(job("2")));
    }
}
