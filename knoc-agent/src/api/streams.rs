//! Exec, attach, port-forward: relayed to the pod's shim as they are. Only the first message is looked at.
//!
//! Both directions end on their own. A client that goes away cancels the shim's call; a link that breaks ends the
//! client's call at once, by name.

use std::future::ready;

use futures::{Stream, StreamExt as _};
use knoc_proto::{
    ids::PodUid,
    pb::{
        ExecInput, ExecOutput, PortForwardInput, PortForwardOutput, exec_input::Input,
        port_forward_input,
    },
    reason::ErrorReason,
};
use tonic::{Code, Response, Status, Streaming};

use super::{Answers, admit};
use crate::site::Site;

type Answer<T> = Result<Response<Answers<T>>, Status>;

pub(super) async fn exec(site: &Site, mut inputs: Streaming<ExecInput>) -> Answer<ExecOutput> {
    let first = inputs.message().await?;
    let Some(Input::Start(start)) = first.as_ref().and_then(|first| first.input.as_ref()) else {
        return Err(misplaced("start"));
    };
    let uid = super::uid(&start.uid)?;
    let mut client = admit::running(site, &uid)?;
    let outputs = client.exec(whole(first, inputs)).await;
    relay(uid, outputs)
}

pub(super) async fn attach(site: &Site, mut inputs: Streaming<ExecInput>) -> Answer<ExecOutput> {
    let first = inputs.message().await?;
    let Some(Input::Attach(start)) = first.as_ref().and_then(|first| first.input.as_ref()) else {
        return Err(misplaced("attach"));
    };
    let uid = super::uid(&start.uid)?;
    let mut client = admit::able(site, &uid, "attach")?;
    let outputs = client.attach(whole(first, inputs)).await;
    relay(uid, outputs)
}

pub(super) async fn port_forward(
    site: &Site,
    mut inputs: Streaming<PortForwardInput>,
) -> Answer<PortForwardOutput> {
    let first = inputs.message().await?;
    let Some(port_forward_input::Input::Start(start)) =
        first.as_ref().and_then(|first| first.input.as_ref())
    else {
        return Err(misplaced("start"));
    };
    let uid = super::uid(&start.uid)?;
    let mut client = admit::able(site, &uid, "port-forward")?;
    let outputs = client.port_forward(whole(first, inputs)).await;
    relay(uid, outputs)
}

fn misplaced(name: &str) -> Status {
    ErrorReason::InvalidRequest.status(format!("the first message is `{name}`"))
}

/// What the shim hears. A broken stream ends here; the answer's end, which is dropped with it, cancels the shim's side.
fn whole<T: Send + 'static>(
    first: Option<T>,
    rest: Streaming<T>,
) -> impl Stream<Item = T> + Send + 'static {
    let rest = rest.take_while(|input| ready(input.is_ok()));
    let rest = rest.filter_map(|input| ready(input.ok()));
    futures::stream::iter(first).chain(rest)
}

/// What the client hears.
fn relay<T: Send + 'static>(
    uid: PodUid,
    outputs: Result<Response<Streaming<T>>, Status>,
) -> Answer<T> {
    match outputs {
        Ok(outputs) => Ok(Response::new(relayed(uid, outputs))),
        Err(status) => Err(broken(&uid, status)),
    }
}

/// The shim's messages as they are; where its link breaks, the stream fails by name.
pub(super) fn relayed<T: Send + 'static>(
    uid: PodUid,
    outputs: Response<Streaming<T>>,
) -> Answers<T> {
    let outputs = outputs.into_inner();
    let outputs = outputs.map(move |item| item.map_err(|status| broken(&uid, status)));
    outputs.boxed()
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
