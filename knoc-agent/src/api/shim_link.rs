//! The link to the shim of a running pod, or why there is none.

use knoc_proto::{
    ids::PodUid,
    pb::{ContainerStatus, container_status::State},
    reason::ErrorReason,
};
use tonic::Status;

use crate::{shim_links::Client, shim_steps::Use, site::Site};

/// The client of a running pod's shim, and the use that keeps its link up if a job step carries it.
/// If compute nodes cannot reach the agent, such a step is started.
pub(super) async fn client(site: &Site, uid: &PodUid) -> Result<(Client, Option<Use>), Status> {
    let used = reach(site, uid).await?;
    let client = site.shim_links.client(uid);
    let client = client.ok_or_else(|| no_link(site, uid))?;
    Ok((client, used))
}

/// Like [`client`], for a shim that has `capability`.
pub(super) async fn client_with(
    site: &Site,
    uid: &PodUid,
    capability: &str,
) -> Result<(Client, Option<Use>), Status> {
    let used = reach(site, uid).await?;
    let found = site.shim_links.able(uid, capability);
    let client = found.unwrap_or_else(|| Err(no_link(site, uid)))?;
    Ok((client, used))
}

/// Like [`client_with`], for what the shim has announced over its link: if that is down, no job step is started.
pub(super) fn linked_with(
    site: &Site,
    uid: &PodUid,
    capability: &str,
) -> Result<(Client, Option<Use>), Status> {
    let used = site.shim_steps.held(uid);
    let found = site.shim_links.able(uid, capability);
    let client = found.unwrap_or_else(|| Err(no_link(site, uid)))?;
    Ok((client, used))
}

async fn reach(site: &Site, uid: &PodUid) -> Result<Option<Use>, Status> {
    if site.shim_links.client(uid).is_some() {
        return Ok(site.shim_steps.held(uid));
    }
    let runs = site.board.get(uid.as_str());
    if runs.is_none_or(|pod| pod.outcome.is_some()) || suspended(site, uid).is_some() {
        return Ok(None);
    }
    site.shim_steps.reach(uid).await
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
    // A node without an address of its own reports none.
    let started = |status: &ContainerStatus| matches!(status.state, Some(State::Running(_)));
    let idle = pod.host_ip.is_empty() && !pod.containers.iter().any(started);
    let idle = idle || pod.outcome.is_some();
    if idle {
        let phase = pod
            .phase()
            .as_str_name()
            .trim_start_matches("POD_PHASE_")
            .to_lowercase();
        return ErrorReason::NotRunning.status(format!("pod {uid} is {phase}"));
    }
    let (route, _) = site.shim_route.describe();
    let message = format!(
        "the shim of pod {uid} on {} has no link to the agent: can compute nodes reach {}? ({route})",
        pod.host_ip, site.config.listen.shim
    );
    ErrorReason::ShimUnreachable.status(message)
}
