//! Task: serves one client that is attached to a container's main process.
//!
//! The client gets the program's output from the moment it attaches, and the program gets the client's input. When the
//! program ends, its exit status is the last output. A client that disconnects does not affect the program, except that
//! its input is closed if `stdinOnce` is set. A client that lags is detached, with the reason in `error`, so that the
//! program never waits for it.

pub(crate) mod hub;

use std::{sync::Arc, time::Duration};

use knoc_contract::logs::cri;
use knoc_link::bulk::Messages;
use knoc_proto::{
    pb::{self, ExecOutput, exec_input::Input, exec_output::Output},
    reason::ErrorReason,
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tonic::Status;

use self::hub::{Hub, LAG, Next, Queue};
use super::{
    children::Exit,
    exec::{send, window},
    fdio::Stream,
};
use crate::launch::set_terminal_size;

/// After a client's input has ended, the client is detached once the program has been silent for `SILENCE`, and after
/// `SILENCE_TIMEOUT` in any case.
const SILENCE: Duration = Duration::from_secs(1);
const SILENCE_TIMEOUT: Duration = Duration::from_secs(5);

/// The exit code that is sent with an `error`, because the program's own is not known yet.
const DETACHED: i32 = 1;

/// One attached client, and the streams that it asked for.
#[derive(Debug)]
pub(crate) struct Session {
    hub: Arc<Hub>,
    queue: Arc<Queue>,
    stdin: Option<hub::Input>,
    output: mpsc::Sender<Result<ExecOutput, Status>>,
}

impl Session {
    /// Attaches a client, which gets all output from now on. Fails if the client asks for a stream that the container
    /// does not have.
    pub(crate) fn new(
        name: &str,
        hub: Arc<Hub>,
        start: &pb::AttachStart,
        output: mpsc::Sender<Result<ExecOutput, Status>>,
    ) -> Result<Self, Status> {
        let has = hub.terminal().is_some();
        if start.tty != has {
            let has = if has { "has a" } else { "has no" };
            let message = format!(
                "container {name} {has} terminal, and the client must attach with the same `tty` setting"
            );
            return Err(ErrorReason::InvalidRequest.status(message));
        }
        let failed = |why: hub::AttachError| {
            let reason = match why {
                hub::AttachError::TooMany => ErrorReason::Overloaded,
                hub::AttachError::NoStdin
                | hub::AttachError::StdinClosed
                | hub::AttachError::StdinTaken => ErrorReason::InvalidRequest,
            };
            reason.status(format!("attach to container {name}: {why}"))
        };
        let queue = hub.attach(start.stdout, start.stderr).map_err(failed)?;
        let stdin = start.stdin.then(|| hub.stdin().map_err(failed));
        let stdin = stdin.transpose()?;
        if let (Some(terminal), Some(size)) = (hub.terminal(), &start.size) {
            set_terminal_size(terminal.fd(), window(Some(size)));
        }
        Ok(Self {
            hub,
            queue,
            stdin,
            output,
        })
    }
}

/// Serves the client until the program ends or the client disconnects.
pub(crate) async fn run(session: Session, input: Messages<pb::ExecInput>) {
    let Session {
        hub,
        queue,
        stdin,
        output,
    } = session;
    if !send(&output, Output::Started(true)).await {
        return;
    }
    let stays = stdin.as_ref().is_none_or(|stdin| stdin.once);
    let delivering = deliver(&hub, &queue, &output);
    let feeding = feed(input, stdin, hub.terminal());
    tokio::pin!(delivering, feeding);
    let mut fed: Option<Instant> = None;
    let exit = loop {
        let silence = fed.map(|at| (queue.last().max(at) + SILENCE).min(at + SILENCE_TIMEOUT));
        tokio::select! {
            biased;
            () = output.closed() => return,
            exit = &mut delivering => break exit,
            () = &mut feeding, if fed.is_none() => fed = Some(Instant::now()),
            () = until(silence), if !stays => {
                if silence.is_some_and(|_| fed.is_some_and(|at| over(&queue, at))) {
                    break pb::ExecExit::default();
                }
            }
        }
    };
    send(&output, Output::Exit(exit)).await;
}

/// Whether the wait that began when the input ended, at `fed`, is over. The program may have written in the meantime.
fn over(queue: &Queue, fed: Instant) -> bool {
    let now = Instant::now();
    now >= queue.last().max(fed) + SILENCE || now >= fed + SILENCE_TIMEOUT
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Sends output until the program ends or the client has lagged.
async fn deliver(
    hub: &Hub,
    queue: &Queue,
    output: &mpsc::Sender<Result<ExecOutput, Status>>,
) -> pb::ExecExit {
    let mut ended = hub.ended();
    loop {
        let (next, exit) = tokio::select! {
            biased;
            next = queue.next() => (Some(next), None),
            exit = ended.wait_for(Option::is_some) => (queue.try_next(), Some(exit.ok().and_then(|exit| *exit))),
        };
        match (next, exit) {
            (Some(Next::Data(kind, data)), _) => {
                let message = match kind {
                    cri::Stream::Stdout => Output::Stdout(data),
                    cri::Stream::Stderr => Output::Stderr(data),
                };
                send(output, message).await;
            }
            (Some(Next::Lagged), _) => return detached(lagged()),
            (None, Some(Some(Exit { code, signal }))) => {
                return pb::ExecExit {
                    code,
                    signal,
                    error: String::new(),
                };
            }
            (None, Some(None)) => {
                return detached("the shim lost track of the program before it ended".to_owned());
            }
            (None, None) => {}
        }
    }
}

fn detached(error: String) -> pb::ExecExit {
    pb::ExecExit {
        code: DETACHED,
        signal: 0,
        error,
    }
}

fn lagged() -> String {
    format!(
        "detached: the client read its output too slowly, and more than {} MiB were waiting for it; the program goes on, and its log has all output",
        LAG >> 20
    )
}

/// Handles the client's messages until its input ends. Dropping `stdin` closes the program's input if it belongs to this
/// client alone.
async fn feed(
    mut input: Messages<pb::ExecInput>,
    mut stdin: Option<hub::Input>,
    terminal: Option<&Arc<Stream>>,
) {
    let stays = stdin.as_ref().is_none_or(|stdin| stdin.once);
    // A client that has disconnected is noticed at the output.
    while let Ok(Some(message)) = input.message().await {
        match message.input {
            Some(Input::Stdin(data)) => {
                if let Some(Err(_closed)) = match &stdin {
                    Some(stdin) => Some(stdin.sender.send(data).await),
                    None => None,
                } {
                    // The program has closed its input: further input is read and dropped.
                    stdin = None;
                }
            }
            Some(Input::StdinClosed(_)) => {
                stdin = None;
                if !stays {
                    return;
                }
            }
            Some(Input::Resize(size)) => {
                if let Some(terminal) = terminal {
                    set_terminal_size(terminal.fd(), window(Some(&size)));
                }
            }
            Some(Input::Start(_) | Input::Attach(_)) | None => {}
        }
    }
}
