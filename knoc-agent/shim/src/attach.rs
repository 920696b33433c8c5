//! Task: one client attached to a container's own program.
//!
//! Gives it the program's output from now on and the program its input, until the program ends: then its exit is the
//! last output. A client that goes away changes nothing for the program, save that stdinOnce closes its input. A
//! client that lags is detached with the reason as `error`: the program never waits for it.

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

/// How long the program must be silent, after a client's input has ended, for the client to be detached; and how long
/// that is waited for.
const SILENCE: Duration = Duration::from_secs(1);
const SILENCE_TIMEOUT: Duration = Duration::from_secs(5);

/// The code that goes with an `error`: the program's own is not known yet.
const DETACHED: i32 = 1;

/// One client with what it asked for.
#[derive(Debug)]
pub(crate) struct Session {
    hub: Arc<Hub>,
    queue: Arc<Queue>,
    stdin: Option<hub::Input>,
    output: mpsc::Sender<Result<ExecOutput, Status>>,
}

impl Session {
    /// Attaches: output counts from here on. Refuses by name what the container does not have.
    pub(crate) fn new(
        name: &str,
        hub: Arc<Hub>,
        start: &pb::AttachStart,
        output: mpsc::Sender<Result<ExecOutput, Status>>,
    ) -> Result<Self, Status> {
        let has = hub.terminal().is_some();
        if start.tty != has {
            let has = if has { "has a" } else { "has no" };
            let message = format!("container {name} {has} terminal: attach the same way");
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

/// Serves the client until the program, or the client, is gone.
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

/// Is the wait after the end of the input, at `fed`, over? The program may have written meanwhile.
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

/// Output until the program's end, or until the client has lagged.
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
                return detached("the end of the program was not seen".to_owned());
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
        "detached: the client took its output too slowly, more than {} MiB waited for it; the program goes on, and its log has all of it",
        LAG >> 20
    )
}

/// Takes the client's messages until its input ends. The drop of `stdin` is what closes the input of a single client.
async fn feed(
    mut input: Messages<pb::ExecInput>,
    mut stdin: Option<hub::Input>,
    terminal: Option<&Arc<Stream>>,
) {
    let stays = stdin.as_ref().is_none_or(|stdin| stdin.once);
    // Whether the client is gone shows at the output.
    while let Ok(Some(message)) = input.message().await {
        match message.input {
            Some(Input::Stdin(data)) => {
                if let Some(Err(_closed)) = match &stdin {
                    Some(stdin) => Some(stdin.sender.send(data).await),
                    None => None,
                } {
                    // The program has closed its input: what still comes is taken and dropped.
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
