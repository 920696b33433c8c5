//! Exec, attach, port-forward: relayed to the pod's shim as they are. Only the first message is looked at; the bytes of
//! both bodies are passed on.
//!
//! Both directions end on their own. A client that goes away cancels the shim's call; a link that breaks ends the
//! client's call at once, by name.

use knoc_proto::{
    bulk::{self, Messages, Nothing},
    ids::PodUid,
    pb::{
        ExecInput, ExecOutput, PortForwardInput, PortForwardOutput, exec_input::Input,
        port_forward_input,
    },
    reason::ErrorReason,
};
use tonic::{Code, Response, Status, Streaming};

use super::admit;
use crate::site::Site;

type Answer<T> = Result<Response<Nothing<T>>, Status>;

pub(super) async fn exec(site: &Site, mut inputs: Messages<ExecInput>) -> Answer<ExecOutput> {
    let Some(Input::Start(start)) = inputs.peek().await?.and_then(|first| first.input) else {
        return Err(misplaced("start"));
    };
    let uid = super::uid(&start.uid)?;
    let mut client = admit::running(site, &uid)?;
    let outputs = client.exec(bulk::request_body(inputs.into_body())).await;
    relay(uid, outputs)
}

pub(super) async fn attach(site: &Site, mut inputs: Messages<ExecInput>) -> Answer<ExecOutput> {
    let Some(Input::Attach(start)) = inputs.peek().await?.and_then(|first| first.input) else {
        return Err(misplaced("attach"));
    };
    let uid = super::uid(&start.uid)?;
    let mut client = admit::able(site, &uid, "attach")?;
    let outputs = client.attach(bulk::request_body(inputs.into_body())).await;
    relay(uid, outputs)
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
    let mut client = admit::able(site, &uid, "port-forward")?;
    let outputs = client
        .port_forward(bulk::request_body(inputs.into_body()))
        .await;
    relay(uid, outputs)
}

fn misplaced(name: &str) -> Status {
    ErrorReason::InvalidRequest.status(format!("the first message is `{name}`"))
}

/// What the client hears: the shim's answer as it is; where its link breaks, the stream fails by name.
fn relay<T: Send + 'static>(
    uid: PodUid,
    outputs: Result<Response<Streaming<T>>, Status>,
) -> Answer<T> {
    let outputs = outputs.map_err(|status| broken(&uid, status))?;
    let body = bulk::output_body(&outputs)
        .ok_or_else(|| ErrorReason::Internal.status("the shim answered with no stream"))?;
    let named = bulk::failing_by(body, move |status| broken(&uid, status));
    Ok(bulk::answer(named))
}

/// The shim's own refusals have a reason and pass as they are; what has none is the link's failure.
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
