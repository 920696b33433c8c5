//! Carries one connection from the cluster to a port of a pod: a call of `PortForward`, as for `kubectl port-forward`. [`halves`]
//! copies the bytes.

use std::time::Duration;

use knoc_link::bulk::{self, Messages};
use knoc_proto::pb::{self, port_forward_input::Input, port_forward_output::Output};
use tokio::{net::TcpStream, sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{places::Activity, plan::PodPort};
use crate::{
    agent::Agent,
    halves::{self, OnWriteError, Part},
    metrics::traffic::Direction,
    server::prepare,
};

/// How long the agent and the shim may take to connect to the pod. The shim tries for five seconds.
const CONNECT: Duration = Duration::from_secs(10);
/// Messages that may wait for the agent; beyond that the client is not read.
const QUEUE: usize = 4;

type ToPod = mpsc::Sender<pb::PortForwardInput>;
type FromPod = Messages<pb::PortForwardOutput>;

/// Carries the connection until it ends. If the pod cannot be reached, or if either side breaks, the client's connection is reset.
pub(super) async fn run(
    agent: &Agent,
    stream: TcpStream,
    to: &PodPort,
    traffic: &Direction,
    activity: &Activity,
) -> Result<(), Status> {
    // These options are improvements only: keepalive finds clients that are gone.
    prepare(&stream).ok();
    // If this function ends early, it drops the guard, which resets the connection.
    let (reader, guard) = halves::split(stream);
    let (input, output) = connect(agent, to).await?;
    let open = traffic.made();
    let wrap = |part: Part| match part {
        Part::Data(data) => {
            activity.note();
            open.add_to_pod(data.len());
            message(Input::Data(data))
        }
        Part::Closed => message(Input::Closed(true)),
    };
    let counted = |message| {
        let part = part(message);
        if let Some(Part::Data(data)) = &part {
            activity.note();
            open.add_from_pod(data.len());
        }
        part
    };
    let to_client = halves::to_socket(output, guard, || OnWriteError::Break, counted);
    let from_client = halves::until_broken(&reader, &input, wrap);
    // The call ends when both directions have ended. If the client's connection breaks, the call is dropped before its input:
    // the end of the input would be the end of the data.
    let ended = tokio::select! {
        biased;
        ended = to_client => ended,
        broken = from_client => Err(broken),
    };
    if let Err(broken) = ended {
        tracing::debug!(%to, %broken, "a relayed connection broke");
    }
    Ok(())
}

async fn connect(agent: &Agent, to: &PodPort) -> Result<(ToPod, FromPod), Status> {
    let (queue, input) = mpsc::channel(QUEUE);
    let start = Input::Start(pb::PortForwardStart {
        uid: to.uid.to_string(),
        port: to.number.into(),
    });
    let connected = async {
        // The channel is empty.
        queue.send(message(start)).await.ok();
        let mut client = agent.bulk().await;
        let call = client.port_forward(bulk::request(ReceiverStream::new(input)));
        let answer = call.await.inspect_err(|status| agent.noticed(status))?;
        let mut output: FromPod = bulk::output(&answer);
        match output.message().await?.and_then(|first| first.output) {
            Some(Output::Connected(_)) => Ok(output),
            Some(Output::Data(_) | Output::Closed(_)) | None => {
                Err(Status::internal("the shim did not begin with `connected`"))
            }
        }
    };
    let connected = timeout(CONNECT, connected).await;
    let connected =
        connected.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")));
    Ok((queue, connected?))
}

fn part(message: pb::PortForwardOutput) -> Option<Part> {
    match message.output? {
        Output::Data(data) => Some(Part::Data(data)),
        Output::Closed(_) => Some(Part::Closed),
        Output::Connected(_) => None,
    }
}

fn message(input: Input) -> pb::PortForwardInput {
    pb::PortForwardInput { input: Some(input) }
}
