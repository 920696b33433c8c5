//! What all pods of this agent share.

use std::{path::PathBuf, sync::Arc};

use knoc_contract::jobdir::StateDir;
use knoc_proto::{crash, error::chain, ids::PodUid};
use tokio::sync::{Notify, Semaphore};

use crate::{
    config::Config,
    image::Images,
    lease::{Holder, LeaseError},
    policy::Live,
    registry::board::Board,
    scheduler::{Scheduler, SubmitError, SubmitErrorKind},
    shim_links::ShimLinks,
    versions::Versions,
};

/// What starts containers here: found once, at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeInfo {
    /// `apptainer`, `singularity` or `process`.
    pub name: String,
    /// Its executable; empty for `process`.
    pub path: PathBuf,
    /// As it says itself.
    pub version: String,
    /// Can processes be exec'd into its containers? Not where it sets them up as root.
    pub exec: bool,
}

/// New pods that are put on disk at the same time: 8 threads each.
pub const ACCEPTING: usize = 8;

/// What all pods of this agent share.
#[derive(Debug)]
pub struct Site {
    /// The site file, as it was at the start.
    pub config: Config,
    /// Its `[policy]`, as it is now.
    pub policy: Live,
    /// The files.
    pub state: StateDir,
    /// Who owns the jobs.
    pub scheduler: Scheduler,
    /// What starts containers.
    pub runtime: RuntimeInfo,
    /// Where images come from.
    pub images: Images,
    /// The right to submit.
    pub lease: Holder,
    /// What new jobs exec.
    pub shim: PathBuf,
    /// What older jobs exec, too.
    pub versions: Versions,
    /// What outsiders see.
    pub board: Board,
    /// Links of live shims.
    pub shim_links: ShimLinks,
    /// Wakes the poller: something is expected.
    pub poll_soon: Arc<Notify>,
    /// Bounds how many new pods are put on disk at the same time: each syncs its files by as many threads.
    pub accepting: Semaphore,
    /// A pod's actor ends: its handle may go.
    pub ended: tokio::sync::mpsc::Sender<PodUid>,
}

impl Site {
    /// May a job be submitted now? Reads the lease file: for [`Scheduler::submit`], which asks at the last moment.
    pub async fn may_submit(&self) -> Result<(), SubmitError> {
        let lease = self.lease.clone();
        let message = match tokio::task::spawn_blocking(move || lease.check()).await {
            Ok(Ok(())) => {
                crash::point("agent.sbatch.before");
                return Ok(());
            }
            Ok(Err(error @ LeaseError::Fenced { .. })) => {
                tracing::error!(error = chain(&error), "not submitting");
                chain(&error)
            }
            Ok(Err(error)) => chain(&error),
            Err(error) => chain(&error),
        };
        Err(SubmitError {
            kind: SubmitErrorKind::Throttled,
            message,
            command: None,
        })
    }
}
