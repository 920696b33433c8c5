//! One forwarded connection: relays between a pair of the client's streams and a call to the agent, including
//! half-closes.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use knoc_proto::{
    ids::PodUid,
    pb::{self, port_forward_input::Input, port_forward_output::Output},
};
use knoc_remotecommand::{
    stream_writer::StreamWriter,
    streams::{End, StreamReader},
};
use tokio::sync::mpsc;
use tracing::info;

use super::super::{
    Backend,
    limits::{Busy, Limit},
    remote::client_message,
    stop::Stop,
};

/// Messages that may wait for the agent; when the queue is full the client is not read.
const INPUT_QUEUE: usize = 4;

/// The pod to whose ports the session connects.
pub(super) struct ForwardTarget {
    pub(super) backend: Arc<dyn Backend>,
    /// The pod's name, for messages.
    pub(super) pod: String,
    pub(super) uid: PodUid,
    /// The limit on calls, of which each connection is one.
    pub(super) calls: Limit,
}

/// A pair of streams and the port that they connect to.
pub(super) struct Connection {
    pub(super) port: u16,
    pub(super) reader: StreamReader,
    pub(super) data: StreamWriter,
    pub(super) error: StreamWriter,
}

/// Why a connection ended early.
enum Broken {
    /// The client has gone or closed its streams.
    Client,
    /// The pod's side failed or the session was stopped; the text is for the client.
    Pod(String),
}

impl Connection {
    /// Relays until both directions have ended, one of them has failed, or the session is stopped.
    pub(super) async fn serve(self, target: &ForwardTarget, stop: &Stop) {
        let Self {
            port,
            reader,
            data,
            error,
        } = self;
        let mut data = Some(data);
        let relayed = tokio::select! {
            biased;
            relayed = relay(target, port, reader, &mut data) => relayed,
            why = stop.why() => Err(Broken::Pod(why)),
        };
        match relayed {
            Ok(()) => drop(error.finish(Bytes::new()).await),
            Err(Broken::Client) => error.reset().await,
            Err(Broken::Pod(reason)) => {
                let text = format!(
                    "error forwarding port {port} to pod {}, uid {}: {reason}",
                    target.pod, target.uid
                );
                info!("{text}");
                // Finished instead of reset, since a reset may reach the client before the text.
                drop(error.finish(text.into()).await);
            }
        }
        // The data stream is still open only if the connection ended early.
        if let Some(data) = data {
            data.reset().await;
        }
    }
}

async fn relay(
    target: &ForwardTarget,
    port: u16,
    reader: StreamReader,
    data: &mut Option<StreamWriter>,
) -> Result<(), Broken> {
    let busy = |busy: Busy| Broken::Pod(busy.to_string());
    let _call = target.calls.take().map_err(busy)?;
    let (queue, input) = mpsc::channel(INPUT_QUEUE);
    let start = Input::Start(pb::PortForwardStart {
        uid: target.uid.to_string(),
        port: port.into(),
    });
    if queue.send(message(start)).await.is_err() {
        return Ok(());
    }
    let up = feed(reader, queue);
    let down = drain(&*target.backend, input, data);
    tokio::select! {
        biased;
        ended = down => ended,
        Err(broken) = up => Err(broken),
    }
}

/// Relays from the pod to the client until the call ends. If the client's stream cannot be half-closed, the end of the
/// pod's bytes ends the connection too, since the client could not be told of it in another way.
async fn drain(
    backend: &dyn Backend,
    input: mpsc::Receiver<pb::PortForwardInput>,
    data: &mut Option<StreamWriter>,
) -> Result<(), Broken> {
    let failed = |status: tonic::Status| Broken::Pod(client_message(&status));
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

/// Relays from the client to the pod, then its end. Stays pending after a clean end, since the pod may go on.
async fn feed(
    mut reader: StreamReader,
    queue: mpsc::Sender<pb::PortForwardInput>,
) -> Result<(), Broken> {
    let end = loop {
        match reader.next().await {
            // If the call takes no more it has ended, which the other direction reports.
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
