//! The link to the shim of a running pod, or why there is none.

use knoc_proto::{ids::PodUid, reason::ErrorReason};
use tonic::Status;

use crate::{shim_links::Client, site::Site};

/// The client of a running pod's shim.
pub(super) fn client(site: &Site, uid: &PodUid) -> Result<Client, Status> {
    site.shim_links
        .client(uid)
        .ok_or_else(|| no_link(site, uid))
}

/// The client of a running pod's shim that has `capability`.
pub(super) fn client_with(site: &Site, uid: &PodUid, capability: &str) -> Result<Client, Status> {
    let found = site.shim_links.able(uid, capability);
    found.unwrap_or_else(|| Err(no_link(site, uid)))
}

/// Why nothing in the pod's job can answer, if Slurm is known to have suspended it.
pub(super) fn suspended(site: &Site, uid: &PodUid) -> Option<Status> {
    let pod = site.board.get(uid.as_str())?;
    let job = pod.job.as_ref()?;
    let stopped = ["SUSPENDED", "STOPPED"].contains(&job.state.as_str());
    (stopped && pod.outcome.is_none()).then(|| {
        let message = format!(
            "job {} of pod {uid} is suspended ({}): nothing in it can answer until it is resumed (`scontrol resume {}`)",
            job.id, job.state, job.id
        );
        ErrorReason::NotRunning.status(message)
    })
}

/// Why a pod's shim has no link.
fn no_link(site: &Site, uid: &PodUid) -> Status {
    let Some(pod) = site.board.get(uid.as_str()) else {
        return ErrorReason::NotFound.status(format!("no pod {uid}"));
    };
    if let Some(suspended) = suspended(site, uid) {
        return suspended;
    }
    let idle = pod.host_ip.is_empty() || pod.outcome.is_some();
    if idle {
        let phase = pod
            .phase()
            .as_str_name()
            .trim_start_matches("POD_PHASE_")
            .to_lowercase();
        return ErrorReason::NotRunning.status(format!("pod {uid} is {phase}"));
    }
    let message = format!(
        "the shim of pod {uid} on {} has no link to the agent: can compute nodes reach {}?",
        pod.host_ip, site.config.listen.shim
    );
    ErrorReason::ShimUnreachable.status(message)
}
