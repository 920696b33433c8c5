//! What all pods of this agent share.

use std::{path::PathBuf, sync::Arc};

use knoc_contract::{host_paths::HostPaths, jobdir::StateDir};
use knoc_proto::{crash, error::chain, ids::PodUid};
use tokio::sync::{Notify, Semaphore};

use crate::{
    config::Config,
    egress::Egress,
    image::Images,
    lease::{Holder, LeaseError},
    mesh::Mesh,
    policy::Live,
    registry::board::Board,
    scheduler::{Scheduler, SubmitError, SubmitErrorKind},
    shim_links::ShimLinks,
    shim_route::ShimRoute,
    shim_steps::ShimSteps,
    versions::Versions,
};

/// The container runtime, which is looked up once, at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeInfo {
    /// `apptainer`, `singularity` or `process`.
    pub name: String,
    /// The path of its executable; empty for `process`.
    pub path: PathBuf,
    /// The version that it reports.
    pub version: String,
    /// Whether processes can be executed in its containers. They cannot if it sets up containers as
    /// root.
    pub exec: bool,
}

/// How many new pods are put on disk at the same time; each uses 8 threads.
pub const ACCEPTING: usize = 8;

/// What all pods of this agent share.
#[derive(Debug)]
pub struct Site {
    /// The site file, as it was when the agent started.
    pub config: Config,
    /// Its present `[policy]`.
    pub policy: Live,
    /// Where the agent's unix socket may be, which no pod sees.
    pub sockets: Vec<PathBuf>,
    /// The state directory.
    pub state: StateDir,
    /// What runs the jobs.
    pub scheduler: Scheduler,
    /// What runs the containers.
    pub runtime: RuntimeInfo,
    /// Resolves and pulls images.
    pub images: Images,
    /// The lease, which is the right to submit jobs.
    pub lease: Holder,
    /// The program that new jobs exec.
    pub shim: PathBuf,
    /// The installed versions, including those that older jobs exec.
    pub versions: Versions,
    /// The published state of the pods.
    pub board: Board,
    /// The links to the kubelets of `[[dial_out]]`.
    pub dial_out: crate::dial_out::DialStates,
    /// What pods open to the cluster.
    pub egress: Egress,
    /// The pods that have addresses of their own.
    pub mesh: Mesh,
    /// The links of running shims.
    pub shim_links: ShimLinks,
    /// How shims are reached.
    pub shim_route: ShimRoute,
    /// The links that job steps carry.
    pub shim_steps: ShimSteps,
    /// Wakes the poller if a change is expected.
    pub poll_soon: Arc<Notify>,
    /// Bounds how many new pods are put on disk at the same time: each one syncs its files with
    /// several threads.
    pub accepting: Semaphore,
    /// Tells the registry that a pod's actor ends, so that it can drop the handle.
    pub ended: tokio::sync::mpsc::Sender<PodUid>,
}

impl Site {
    /// What pods may mount of the compute nodes now.
    #[must_use]
    pub fn host_paths(&self) -> HostPaths {
        self.config.host_paths(&self.policy.now(), &self.sockets)
    }

    /// Fails if this agent may not submit a job now. It reads the lease file; [`Scheduler::submit`]
    /// calls it at the last moment.
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
