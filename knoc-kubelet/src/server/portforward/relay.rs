//! One forwarded connection: a pair of the client's streams and a call to the agent, half-closes kept.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use knoc_proto::ids::PodUid;
use knoc_proto::pb;
use knoc_proto::pb::{port_forward_input::Input, port_forward_output::Output};
use tokio::sync::mpsc;
use tracing::info;

use knoc_remotecommand::stream_writer::StreamWriter;
use knoc_remotecommand::streams::{End, StreamReader};

use super::super::Backend;
use super::super::limits::{Busy, Limit};
use super::super::remote::shown;
use super::super::stop::Stop;

/// Messages to the agent that wait; the next ones stop the reading from the client.
const INPUT_QUEUE: usize = 4;

/// Whose ports.
pub(super) struct Goal {
    pub(super) backend: Arc<dyn Backend>,
    /// The pod's name, for people.
    pub(super) pod: String,
    pub(super) uid: PodUid,
    /// Where each connection takes its place.
    pub(super) calls: Limit,
}

/// A pair of streams and the port that they are for.
pub(super) struct Connection {
    pub(super) port: u16,
    pub(super) reader: StreamReader,
    pub(super) data: StreamWriter,
    pub(super) error: StreamWriter,
}

/// Why a connection came to no end of its own.
enum Broken {
    /// The client's affair: it has gone, or wants no more.
    Client,
    /// The pod's side, or our own end; the text is for the client.
    Pod(String),
}

impl Connection {
    /// Relays until both directions have ended, or one has failed, or we end it.
    pub(super) async fn serve(self, goal: &Goal, stop: &Stop) {
        let Self {
            port,
            reader,
            data,
            error,
        } = self;
        let mut data = Some(data);
        let relayed = tokio::select! {
            biased;
            relayed = relay(goal, port, reader, &mut data) => relayed,
            why = stop.why() => Err(Broken::Pod(why)),
        };
        match relayed {
            Ok(()) => drop(error.finish(Bytes::new()).await),
            Err(Broken::Client) => error.reset().await,
            Err(Broken::Pod(reason)) => {
                let text = format!(
                    "error forwarding port {port} to pod {}, uid {}: {reason}",
                    goal.pod, goal.uid
                );
                info!("{text}");
                // With an end and not a reset, which may overtake the text at the client's.
                drop(error.finish(text.into()).await);
            }
        }
        // What is still open has not come to its end.
        if let Some(data) = data {
            data.reset().await;
        }
    }
}

async fn relay(
    goal: &Goal,
    port: u16,
    reader: StreamReader,
    data: &mut Option<StreamWriter>,
) -> Result<(), Broken> {
    let busy = |busy: Busy| Broken::Pod(busy.to_string());
    let _call = goal.calls.take().map_err(busy)?;
    let (queue, input) = mpsc::channel(INPUT_QUEUE);
    let start = Input::Start(pb::PortForwardStart {
        uid: goal.uid.to_string(),
        port: port.into(),
    });
    if queue.send(message(start)).await.is_err() {
        return Ok(());
    }
    let up = feed(reader, queue);
    let down = drain(&*goal.backend, input, data);
    tokio::select! {
        biased;
        ended = down => ended,
        Err(broken) = up => Err(broken),
    }
}

/// From the pod to the client. The call's end is the connection's; so is the end of the pod's bytes where the client
/// cannot be told of it in any other way, and could not end its own.
async fn drain(
    backend: &dyn Backend,
    input: mpsc::Receiver<pb::PortForwardInput>,
    data: &mut Option<StreamWriter>,
) -> Result<(), Broken> {
    let failed = |status: tonic::Status| Broken::Pod(shown(&status));
    let half_closes = matches!(data, Some(StreamWriter::Spdy(_)));
    let mut output = backend.port_forward(input).await.map_err(failed)?;
    while let Some(next) = output.next().await {
        match next.map_err(failed)?.output {
            Some(Output::Data(bytes)) => {
                if let Some(data) = data {
                    data.send(bytes).await.map_err(|_| Broken::Client)?;
                }
            }
            Some(Output::Closed(_)) => {
                finish(data).await?;
                if !half_closes {
                    return Ok(());
                }
            }
            Some(Output::Connected(_)) | None => {}
        }
    }
    finish(data).await
}

async fn finish(data: &mut Option<StreamWriter>) -> Result<(), Broken> {
    match data.take() {
        Some(data) => data.finish(Bytes::new()).await.map_err(|_| Broken::Client),
        None => Ok(()),
    }
}

/// From the client to the pod, then its end. Stays pending after an end in order: the pod may go on.
async fn feed(
    mut reader: StreamReader,
    queue: mpsc::Sender<pb::PortForwardInput>,
) -> Result<(), Broken> {
    let end = loop {
        match reader.next().await {
            // A call that takes no more has ended, which the other direction says.
            Ok(bytes) => drop(queue.send(message(Input::Data(bytes))).await),
            Err(end) => break end,
        }
    };
    match end {
        End::Fin => {
            drop(queue.send(message(Input::Closed(true))).await);
            std::future::pending().await
        }
        End::Reset | End::Lost => Err(Broken::Client),
    }
}

fn message(input: Input) -> pb::PortForwardInput {
    pb::PortForwardInput { input: Some(input) }
}
