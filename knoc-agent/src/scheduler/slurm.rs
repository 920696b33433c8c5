//! Slurm by its own commands.

use knoc_proto::ids::PodUid;
use knoc_proto::pb;

use super::{
    Cancel, JobRef, JobView, Refusal, Rendered, Round, SchedulerError, SubmitRequest, Submitted,
};

mod settings;

pub use settings::Settings;

/// The Slurm of this site.
#[derive(Debug)]
pub struct Slurm {
    settings: Settings,
}

impl Slurm {
    /// Asks nothing yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings }
    }

    /// What it was made with.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) async fn version(&self) -> Result<String, SchedulerError> {
        Err(SchedulerError::Answer {
            program: "sbatch",
            problem: String::new(),
        })
    }
    pub(super) fn render(&self, _request: &SubmitRequest) -> Result<Rendered, Refusal> {
        Err(Refusal::permanent(""))
    }
    pub(super) async fn submit(&self, _request: &SubmitRequest) -> Result<Submitted, Refusal> {
        Err(Refusal::permanent(""))
    }
    pub(super) async fn find(&self, _uid: &PodUid) -> Result<Vec<JobView>, SchedulerError> {
        Ok(Vec::new())
    }
    pub(super) async fn cancel(&self, _job: &JobRef, _how: Cancel) -> Result<(), SchedulerError> {
        Ok(())
    }
    pub(super) async fn round(&self, _known: &[JobRef]) -> Result<Round, SchedulerError> {
        Ok(Round::default())
    }
    pub(super) async fn node_info(&self) -> Result<pb::NodeInfo, SchedulerError> {
        Ok(pb::NodeInfo::default())
    }
}
