//! Jobs as process groups of the agent's own host.

use std::path::PathBuf;
use std::time::Duration;

use knoc_proto::ids::PodUid;
use knoc_proto::pb;

use super::{
    Cancel, JobRef, JobView, Refusal, Rendered, Round, SchedulerError, SubmitRequest, Submitted,
};

/// A round costs a few reads of /proc.
pub const ROUND_INTERVAL: Duration = Duration::from_millis(200);

/// What it needs of the site file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// Jobs that run at once; more wait with the reason `Resources`. 0: no limit.
    pub max_running: usize,
    /// PATH of the batch script; empty: a usual one.
    pub path: String,
    /// Lines of the batch script before the shim. The site's own words, never a pod's.
    pub prelude: String,
    /// Time limit for pods that name none; `None`: unlimited.
    pub default_time_minutes: Option<i64>,
}

/// The embedded scheduler.
#[derive(Debug)]
pub struct Local {
    settings: Settings,
    pods: PathBuf,
}

impl Local {
    /// `pods` is the folder of the job directories, `state_dir/pods`: jobs of earlier agents are
    /// found again there.
    #[must_use]
    pub fn new(settings: Settings, pods: PathBuf) -> Self {
        Self { settings, pods }
    }
    pub(super) fn render(&self, _request: &SubmitRequest) -> Result<Rendered, Refusal> {
        Err(Refusal::permanent(format!(
            "{:?}{:?}",
            self.pods, self.settings
        )))
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
    pub(super) fn node_info(&self) -> pb::NodeInfo {
        pb::NodeInfo::default()
    }
}
