//! Exec, attach, port-forward and egress: streams are relayed to the pod's shim unchanged. Only the first
//! message is parsed; the bytes of both bodies are passed on as they are.
//!
//! Each direction ends on its own. A client that goes away cancels the shim's call; a link that
//! breaks ends the client's call at once, with an error that says so.

use std::time::Duration;

use knoc_contract::capability::{EGRESS, EXEC_IN_RANKS};
use knoc_link::{
    Peer,
    bulk::{self, Messages, NoMessages},
};
use knoc_proto::{
    ids::PodUid,
    pb::{
        EgressInput, EgressOutput, ExecInput, ExecOutput, PortForwardInput, PortForwardOutput,
        egress_input, exec_input::Input, port_forward_input,
    },
    reason::ErrorReason,
    text,
};
use tonic::{Code, Response, Status, Streaming};

use super::shim_link;
use crate::{egress::counts::Reason, shim_steps::Use, site::Site};

/// A shim answers within milliseconds, even if its job was resumed after the last poll.
const RESUMED: Duration = Duration::from_millis(500);
/// If a shim has not answered after this time, its job may be suspended, and Slurm is asked.
const SILENT: Duration = Duration::from_millis(1500);

/// How much of a Service's name an error shows.
const SERVICE: usize = 130;

type Answer<T> = Result<Response<NoMessages<T>>, Status>;

pub(super) async fn exec(site: &Site, mut inputs: Messages<ExecInput>) -> Answer<ExecOutput> {
    let Some(Input::Start(start)) = inputs.peek().await?.and_then(|first| first.input) else {
        return Err(misplaced("start"));
    };
    let uid = super::uid(&start.uid)?;
    let (mut client, used) = if start.rank > 0 {
        shim_link::client_with(site, &uid, EXEC_IN_RANKS).await?
    } else {
        shim_link::client(site, &uid).await?
    };
    let outputs = client.exec(bulk::request_body(inputs.into_body()));
    begin(site, uid, used, outputs).await
}

pub(super) async fn attach(site: &Site, mut inputs: Messages<ExecInput>) -> Answer<ExecOutput> {
    let Some(Input::Attach(start)) = inputs.peek().await?.and_then(|first| first.input) else {
        return Err(misplaced("attach"));
    };
    let uid = super::uid(&start.uid)?;
    let (mut client, used) = shim_link::client_with(site, &uid, "attach").await?;
    let outputs = client.attach(bulk::request_body(inputs.into_body()));
    begin(site, uid, used, outputs).await
}

pub(super) async fn port_forward(
    site: &Site,
    mut inputs: Messages<PortForwardInput>,
) -> Answer<PortForwardOutput> {
    let first = inputs.peek().await?.and_then(|first| first.input);
    let Some(port_forward_input::Input::Start(start)) = first else {
        return Err(misplaced("start"));
    };
    let uid = super::uid(&start.uid)?;
    let (mut client, used) = shim_link::client_with(site, &uid, "port-forward").await?;
    let outputs = client.port_forward(bulk::request_body(inputs.into_body()));
    begin(site, uid, used, outputs).await
}

/// A connection of the pod to a Service, for the kubelet that follows them, if the site lets pods reach the Service.
pub(super) async fn egress(
    site: &Site,
    peer: Option<&Peer>,
    mut inputs: Messages<EgressInput>,
) -> Answer<EgressOutput> {
    let first = inputs.peek().await?.and_then(|first| first.input);
    let Some(egress_input::Input::Start(start)) = first else {
        return Err(misplaced("start"));
    };
    let uid = super::uid(&start.uid)?;
    let pod = site.board.get(uid.as_str());
    let pod = pod.ok_or_else(|| ErrorReason::NotFound.status(format!("no pod {uid}")))?;
    site.egress.settle(&pod.node_name, peer, (&uid, start.id))?;
    if !site.policy.now().permits_egress(&start.service) {
        site.egress.refused(Reason::Policy);
        let service = text::quote(&start.service, SERVICE);
        let message = format!("Service {service} is not among policy.egress of the site file");
        return Err(ErrorReason::PolicyDenied.status(message));
    }
    let (mut client, used) = shim_link::linked_with(site, &uid, EGRESS)?;
    let outputs = client.egress_stream(bulk::request_body(inputs.into_body()));
    begin(site, uid, used, outputs).await
}

/// Waits for the shim's answer. Fails if Slurm has suspended the job, because the shim of a
/// suspended job cannot answer.
async fn begin<T: Send + 'static>(
    site: &Site,
    uid: PodUid,
    used: Option<Use>,
    outputs: impl Future<Output = Result<Response<Streaming<T>>, Status>>,
) -> Answer<T> {
    tokio::select! {
        // If both are ready, the job was resumed in the meantime, and the answer counts.
        biased;
        outputs = outputs => relay(uid, used, outputs),
        suspended = until_suspended(site, &uid) => Err(suspended),
    }
}

/// Returns when the job is known to be suspended. It may have been suspended after the last poll,
/// so a shim that does not answer soon is a reason to poll.
async fn until_suspended(site: &Site, uid: &PodUid) -> Status {
    let mut changes = site.board.subscribe();
    // The shim of a job that was resumed a moment ago answers before this.
    tokio::time::sleep(RESUMED).await;
    if let Some(suspended) = shim_link::suspended(site, uid) {
        return suspended;
    }
    tokio::time::sleep(SILENT).await;
    site.poll_soon.notify_one();
    loop {
        if let Some(suspended) = shim_link::suspended(site, uid) {
            return suspended;
        }
        if changes.changed().await.is_err() {
            // The agent is stopping, which ends the call in another way.
            return std::future::pending().await;
        }
    }
}

fn misplaced(name: &str) -> Status {
    ErrorReason::InvalidRequest.status(format!("the first message is `{name}`"))
}

/// The stream for the client: the shim's answer as it is. If the link breaks, the stream fails and
/// names the pod.
fn relay<T: Send + 'static>(
    uid: PodUid,
    used: Option<Use>,
    outputs: Result<Response<Streaming<T>>, Status>,
) -> Answer<T> {
    let outputs = outputs.map_err(|status| broken(&uid, status))?;
    let body = bulk::output_body(&outputs)
        .ok_or_else(|| ErrorReason::Internal.status("the shim answered with no stream"))?;
    let named = bulk::map_status(body, move |status| {
        // Held as long as the stream: a job step that carries the link goes on.
        let _used = &used;
        broken(&uid, status)
    });
    Ok(bulk::answer(named))
}

/// An error that the shim itself returned carries a reason and passes as it is; one without a
/// reason is a failure of the link.
fn broken(uid: &PodUid, status: Status) -> Status {
    if ErrorReason::of(&status).is_some() {
        return status;
    }
    tracing::debug!(%uid, code = ?status.code(), error = status.message(), "a stream broke");
    if status.code() == Code::ResourceExhausted {
        return ErrorReason::Overloaded.status(status.message());
    }
    let message =
        format!("the link to the job of pod {uid} broke: the job has ended, or was cut off");
    ErrorReason::ShimUnreachable.status(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_pass_and_what_has_none_is_the_links() {
        let uid = PodUid::try_from("u").unwrap();
        let own = broken(&uid, ErrorReason::NotListening.status("port 80"));
        assert_eq!(ErrorReason::of(&own), Some(ErrorReason::NotListening));
        assert_eq!(own.message(), "port 80");
        let cut = broken(&uid, Status::unknown("h2 protocol error"));
        assert_eq!(ErrorReason::of(&cut), Some(ErrorReason::ShimUnreachable));
        assert!(cut.message().contains("the link to the job of pod u broke"));
    }
}
