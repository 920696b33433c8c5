//! Between a client's streams and the agent's `Exec`: bytes both ways, untouched, with back-pressure end to end.
//!
//! Output is complete before the status is sent, since clients stop on it. A client that goes ends the call to the
//! agent, and so the process. Nothing here buffers more than a few pieces.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, future};
use knoc_proto::pb;
use knoc_proto::pb::{exec_input::Input, exec_output::Output};
use thiserror::Error;
use tokio::sync::mpsc;
use tracing::debug;

use super::remotecommand::{Ending, Resizes, Role, Version, Wanted};
use super::spdy::{Incoming, Receiver, Sender};
use super::{Backend, Context};

/// How long a client may take to open its streams, as upstream.
const STREAMS_DEADLINE: Duration = Duration::from_secs(30);
/// Messages to the agent that wait; the next ones stop the reading from the client.
const INPUT_QUEUE: usize = 4;

/// Why no command was started.
#[derive(Debug, Error)]
pub(super) enum RemoteError {
    #[error("the client opened {opened} of {expected} streams in {} s", STREAMS_DEADLINE.as_secs())]
    Streams { opened: usize, expected: usize },
    #[error("the client left before its streams were open")]
    Left,
}

/// The streams of a client, as far as it opened them.
#[derive(Debug, Default)]
struct Streams {
    error: Option<Sender>,
    stdin: Option<Receiver>,
    stdout: Option<Sender>,
    stderr: Option<Sender>,
    resize: Option<Receiver>,
}

impl Streams {
    /// Keeps the half that carries something; what a client sends on the other is thrown away.
    fn take(&mut self, role: Role, receiver: Receiver, sender: Sender) {
        match role {
            Role::Error => self.error = Some(sender),
            Role::Stdout => self.stdout = Some(sender),
            Role::Stderr => self.stderr = Some(sender),
            Role::Stdin => self.stdin = Some(receiver),
            Role::Resize => self.resize = Some(receiver),
        }
    }
}

/// Takes the client's streams and runs the command.
pub(super) async fn spdy(
    context: &Context,
    mut incoming: Incoming,
    start: pb::ExecStart,
    version: Version,
) -> Result<(), RemoteError> {
    let wanted = Wanted {
        stdin: start.stdin,
        stdout: start.stdout,
        stderr: start.stderr,
        tty: start.tty,
    };
    let expected = wanted.streams(version);
    let mut streams = Streams::default();
    let mut opened = 0;
    let all = async {
        while opened < expected {
            let stream = incoming.next().await.ok_or(RemoteError::Left)?;
            let kind = stream.headers().get("streamtype").unwrap_or_default();
            let Some(role) = Role::parse(kind) else {
                debug!(kind, "refused a stream of unknown type");
                stream.refuse().await;
                continue;
            };
            let (receiver, sender) = stream.accept().await;
            streams.take(role, receiver, sender);
            opened += 1;
        }
        Ok(())
    };
    match tokio::time::timeout(STREAMS_DEADLINE, all).await {
        Ok(taken) => taken?,
        Err(_) => return Err(RemoteError::Streams { opened, expected }),
    }
    let mut error = streams.error.take();
    let ending = run(&*context.backend, start, &mut streams).await;
    for sender in [streams.stdout.take(), streams.stderr.take()]
        .into_iter()
        .flatten()
    {
        // A client that has gone needs no end.
        drop(sender.finish(Bytes::new()).await);
    }
    if let Some(error) = error.take() {
        drop(error.finish(ending.status(version).into()).await);
    }
    Ok(())
}

/// Relays until the command has ended and all of its output is handed over.
async fn run(backend: &dyn Backend, start: pb::ExecStart, streams: &mut Streams) -> Ending {
    let (queue, input) = mpsc::channel(INPUT_QUEUE);
    let first = Input::Start(start);
    if queue.send(message(first)).await.is_err() {
        return lost("the relay ended");
    }
    let stdin = feed(streams.stdin.take(), queue.clone());
    let resize = resizes(streams.resize.take(), queue);
    // Input never ends the relay: its future stays pending, and with it the agent's half of the call open.
    let feeds = async {
        future::join(stdin, resize).await;
        future::pending::<()>().await;
    };
    let output = async {
        let called = backend.exec(input).await;
        let mut output = match called {
            Ok(output) => output,
            Err(status) => return lost(status.message()),
        };
        while let Some(next) = output.next().await {
            match next.map(|message| message.output) {
                Ok(Some(Output::Stdout(data))) => hand_over(streams.stdout.as_ref(), data).await,
                Ok(Some(Output::Stderr(data))) => hand_over(streams.stderr.as_ref(), data).await,
                Ok(Some(Output::Exit(exit))) => return exit.into(),
                Ok(Some(Output::Started(_)) | None) => {}
                Err(status) => return lost(status.message()),
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

fn lost(reason: &str) -> Ending {
    Ending::Failed(reason.to_owned())
}

fn message(input: Input) -> pb::ExecInput {
    pb::ExecInput { input: Some(input) }
}

/// To a client that has gone there is nothing to hand over; the end of its connection ends the relay.
async fn hand_over(stream: Option<&Sender>, data: Bytes) {
    if let Some(stream) = stream
        && !data.is_empty()
    {
        drop(stream.send(data).await);
    }
}

/// Standard input, then its end. Keeps its place in the queue open until the end of the call.
async fn feed(stdin: Option<Receiver>, queue: mpsc::Sender<pb::ExecInput>) {
    if let Some(mut stdin) = stdin {
        while let Some(data) = stdin.next().await {
            if queue.send(message(Input::Stdin(data))).await.is_err() {
                return;
            }
        }
        drop(queue.send(message(Input::StdinClosed(true))).await);
    }
    future::pending::<()>().await;
}

async fn resizes(stream: Option<Receiver>, queue: mpsc::Sender<pb::ExecInput>) {
    let Some(mut stream) = stream else { return };
    let mut resizes = Resizes::default();
    while let Some(bytes) = stream.next().await {
        for size in resizes.feed(&bytes) {
            if queue.send(message(Input::Resize(size))).await.is_err() {
                return;
            }
        }
    }
}
