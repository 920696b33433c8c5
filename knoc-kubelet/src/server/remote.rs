//! Relays between a client's streams and the agent's `Exec` or `Attach`: unchanged bytes in both directions, with
//! back-pressure end to end, whatever carries the client's streams.
//!
//! All output is sent before the status, since clients stop at the status. If the client goes, the call to the agent
//! ends, and with it the process of an exec. Only a few pieces are buffered.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, future};
use knoc_proto::{
    pb::{self, exec_input::Input, exec_output::Output},
    reason::ErrorReason,
    text,
};
use knoc_remotecommand::{
    protocol::{Ending, Resizes, Role, Version, Wanted},
    spdy::Incoming,
    stream_writer::StreamWriter,
    streams::{Closed, End, StreamReader},
    websocket::Channels,
};
use thiserror::Error;
use tokio::sync::mpsc;
use tracing::debug;

use super::{Backend, ExecStream, stop::Stop};

/// The longest message of the agent that is passed on, in bytes.
const MESSAGE: usize = 4 << 10;
/// How long a client may take to open its streams, as in Kubernetes.
pub(super) const STREAMS_DEADLINE: Duration = Duration::from_secs(30);
/// Messages that may wait for the agent; when the queue is full the client is not read.
const INPUT_QUEUE: usize = 4;

/// Why nothing was started.
#[derive(Debug, Error)]
pub(super) enum RemoteError {
    #[error("the client opened {opened} of {expected} streams in {} s", STREAMS_DEADLINE.as_secs())]
    Streams { opened: usize, expected: usize },
    #[error("the client left before its streams were open")]
    Left,
}

/// What the agent is asked to run.
#[derive(Debug)]
pub(super) enum Start {
    /// A new process in the container.
    Exec(pb::ExecStart),
    /// The running program of the container.
    Attach(pb::AttachStart),
}

impl Start {
    /// The verb for logs and metrics.
    pub(super) fn verb(&self) -> &'static str {
        match self {
            Self::Exec(_) => "exec",
            Self::Attach(_) => "attach",
        }
    }

    fn stdin(&self) -> bool {
        match self {
            Self::Exec(start) => start.stdin,
            Self::Attach(start) => start.stdin,
        }
    }

    /// The beginning of error messages, as in Kubernetes.
    fn about(&self) -> &'static str {
        match self {
            Self::Exec(_) => "executing command in",
            Self::Attach(_) => "attaching to",
        }
    }

    /// The status for the client. An attach always succeeds: the pod's status has the exit code of the container.
    fn ending(&self, exit: pb::ExecExit) -> Ending {
        match self {
            _ if !exit.error.is_empty() => Ending::Failed(self.about(), exit.error),
            Self::Exec(_) => Ending::Exited(exit.code),
            Self::Attach(_) => Ending::Exited(0),
        }
    }

    fn message(&self) -> pb::ExecInput {
        message(match self {
            Self::Exec(start) => Input::Start(start.clone()),
            Self::Attach(start) => Input::Attach(start.clone()),
        })
    }

    async fn call(
        &self,
        backend: &dyn Backend,
        input: mpsc::Receiver<pb::ExecInput>,
    ) -> Result<ExecStream, tonic::Status> {
        match self {
            Self::Exec(_) => backend.exec(input).await,
            Self::Attach(_) => backend.attach(input).await,
        }
    }
}

/// The streams that a client has opened.
#[derive(Debug, Default)]
pub(super) struct Streams {
    error: Option<StreamWriter>,
    stdin: Option<StreamReader>,
    stdout: Option<StreamWriter>,
    stderr: Option<StreamWriter>,
    resize: Option<StreamReader>,
}

impl Streams {
    /// Stores the half of a stream that is used; bytes that a client sends on the other half are discarded.
    fn take(&mut self, role: Role, reader: Option<StreamReader>, writer: StreamWriter) {
        match role {
            Role::Error => self.error = Some(writer),
            Role::Stdout => self.stdout = Some(writer),
            Role::Stderr => self.stderr = Some(writer),
            Role::Stdin => self.stdin = reader,
            Role::Resize => self.resize = reader,
        }
    }

    /// Accepts the streams that a SPDY client opens, until it has opened all that it wants.
    pub(super) async fn of_spdy(
        mut incoming: Incoming,
        wanted: Wanted,
        version: Version,
    ) -> Result<Self, RemoteError> {
        let expected = wanted.streams(version);
        let mut streams = Self::default();
        let mut opened = Vec::new();
        let all = async {
            while opened.len() < expected {
                let stream = incoming.next().await.ok_or(RemoteError::Left)?;
                let kind = stream.headers().get("streamtype").unwrap_or_default();
                let role = Role::parse(kind).filter(|role| !opened.contains(role));
                let Some(role) = role else {
                    debug!(
                        stream = stream.id(),
                        "rejected a stream whose type is unknown or already open"
                    );
                    stream.refuse().await;
                    continue;
                };
                let (reader, sender) = stream.accept().await;
                streams.take(role, Some(reader), StreamWriter::Spdy(sender));
                opened.push(role);
            }
            Ok(())
        };
        match tokio::time::timeout(STREAMS_DEADLINE, all).await {
            Ok(taken) => taken.map(|()| streams),
            Err(_) => Err(RemoteError::Streams {
                opened: opened.len(),
                expected,
            }),
        }
    }

    /// Takes the channels of a WebSocket, and tells the client that they are open.
    pub(super) async fn of_websocket(mut channels: Channels, wanted: Wanted) -> Self {
        let mut streams = Self::default();
        for role in wanted.roles() {
            let channel = role as u8;
            let sender = channels.sender(channel);
            streams.take(
                role,
                channels.reader(channel),
                StreamWriter::Channel(sender),
            );
        }
        let lowest = [&streams.stdout, &streams.stderr, &streams.error];
        if let Some(StreamWriter::Channel(sender)) = lowest.into_iter().flatten().next() {
            // A client that has gone already ends the session.
            drop(sender.ready().await);
        }
        streams
    }
}

/// Runs the command on the client's streams, and tells the client how it ended or why it was stopped.
pub(super) async fn serve(
    backend: &dyn Backend,
    start: Start,
    mut streams: Streams,
    version: Version,
    stop: &Stop,
) {
    let ending = tokio::select! {
        biased;
        ending = run(backend, &start, &mut streams) => ending,
        why = stop.why() => Ending::Failed(start.about(), why),
    };
    for writer in [streams.stdout.take(), streams.stderr.take()]
        .into_iter()
        .flatten()
    {
        // If the client has gone nothing needs to be ended.
        drop(writer.finish(Bytes::new()).await);
    }
    if let Some(error) = streams.error.take() {
        drop(error.finish(ending.status(version).into()).await);
    }
}

/// Relays until the process has ended and all of its output has been sent.
async fn run(backend: &dyn Backend, start: &Start, streams: &mut Streams) -> Ending {
    let lost = |reason: &str| Ending::Failed(start.about(), reason.to_owned());
    let (queue, input) = mpsc::channel(INPUT_QUEUE);
    if queue.send(start.message()).await.is_err() {
        return lost("the relay ended");
    }
    // The input of a client is discarded if the container has none.
    let stdin = streams.stdin.take().filter(|_| start.stdin());
    let stdin = feed(stdin, queue.clone());
    let resize = resizes(streams.resize.take(), queue);
    // The end of input does not end the relay: its future stays pending and keeps the agent's half of the call open.
    let feeds = async {
        future::join(stdin, resize).await;
        future::pending::<()>().await;
    };
    let output = async {
        let mut output = match start.call(backend, input).await {
            Ok(output) => output,
            Err(status) => return lost(&client_message(&status)),
        };
        while let Some(next) = output.next().await {
            let handed = match next.map(|message| message.output) {
                Ok(Some(Output::Stdout(data))) => send_output(streams.stdout.as_ref(), data).await,
                Ok(Some(Output::Stderr(data))) => send_output(streams.stderr.as_ref(), data).await,
                Ok(Some(Output::Exit(exit))) => return start.ending(exit),
                Ok(Some(Output::Started(_)) | None) => Ok(()),
                Err(status) => return lost(&broken_off(&status)),
            };
            if handed.is_err() {
                return lost("the client has gone");
            }
        }
        lost("the connection to the compute node ended before the command")
    };
    tokio::select! {
        biased;
        ending = output => ending,
        () = feeds => lost("the relay ended"),
    }
}

/// The message of the agent, made safe for the client's terminal.
pub(super) fn client_message(status: &tonic::Status) -> String {
    text::message(status.message(), MESSAGE)
}

/// Why a stream that was open has ended. A status without a reason is not the agent's own word: it is what HTTP/2 makes of
/// a connection that was lost.
fn broken_off(status: &tonic::Status) -> String {
    let message = client_message(status);
    match ErrorReason::of(status) {
        Some(_) => message,
        None => format!("the link to the agent was lost: {message}"),
    }
}

fn message(input: Input) -> pb::ExecInput {
    pb::ExecInput { input: Some(input) }
}

async fn send_output(stream: Option<&StreamWriter>, data: Bytes) -> Result<(), Closed> {
    match stream {
        Some(stream) if !data.is_empty() => stream.send(data).await,
        _ => Ok(()),
    }
}

/// Relays standard input, then its end. Keeps its sender of the queue until the end of the call.
async fn feed(stdin: Option<StreamReader>, queue: mpsc::Sender<pb::ExecInput>) {
    if let Some(mut stdin) = stdin {
        let end = loop {
            match stdin.next().await {
                Ok(data) => {
                    if queue.send(message(Input::Stdin(data))).await.is_err() {
                        return;
                    }
                }
                Err(end) => break end,
            }
        };
        // A lost connection ends the call; it is not the end of the input.
        if end != End::Lost {
            drop(queue.send(message(Input::StdinClosed(true))).await);
        }
    }
    future::pending::<()>().await;
}

async fn resizes(stream: Option<StreamReader>, queue: mpsc::Sender<pb::ExecInput>) {
    let Some(mut stream) = stream else { return };
    let mut resizes = Resizes::default();
    while let Ok(bytes) = stream.next().await {
        for size in resizes.feed(&bytes) {
            if queue.send(message(Input::Resize(size))).await.is_err() {
                return;
            }
        }
    }
}
