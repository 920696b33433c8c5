//! Task: one process exec'd into a running container, with its streams.
//!
//! `knoc-agent enter` joins the container's namespaces. The launch protocol runs over a socket pair, one end of which is
//! the helper's standard input. Bytes go both ways with back-pressure, each direction can be closed alone, and the exit
//! status comes last. When the client disconnects, the process gets HUP, then TERM, then KILL, and is always reaped. The kernel may
//! keep a killed process in an operation that nothing interrupts: a client whose container has ended gets its answer all the same, and
//! only this task goes on waiting.

mod capture;

use std::{
    convert::Infallible,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use knoc_contract::launch::{LaunchSpec, Window};
use knoc_proto::{
    CHUNK,
    error::chain,
    pb::{self, ExecOutput, exec_input::Input, exec_output::Output},
};
use rustix::process::Signal;
use tokio::{
    net::UnixStream,
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{
    children::{Child, Exit},
    container::Program,
    fdio::{self, Stream},
    handshake::{self, HandshakeError, Launched},
    inputs::Inputs,
    pod::Pod,
    signals,
};
use crate::launch::{enter, set_terminal_size};

pub(crate) use self::capture::{Captured, capture};

/// How long processes that a program left behind may keep its streams open without writing.
const DRAIN: Duration = Duration::from_secs(1);

/// The time from HUP to TERM, and from TERM to KILL, for a process whose client has disconnected.
const HANG_UP: Duration = Duration::from_secs(1);
const TERMINATE: Duration = Duration::from_secs(5);

/// How long a process may take to end that was killed because its container has ended.
const AFTER_KILL: Duration = Duration::from_secs(5);

/// The message of a process that did not end.
const STUCK: &str = "the container has ended, but the process was killed (SIGKILL) and has not ended: the kernel keeps it in an \
    operation that nothing interrupts (state D), as on a file system that hangs";

/// How long a process may take to start: its program may lie on a file system that hangs.
const LAUNCH: Duration = Duration::from_secs(30);

/// Exit codes as a shell uses them: the program cannot be executed, or was not found.
const CANNOT_EXECUTE: i32 = 126;
const NOT_FOUND: i32 = 127;

/// What to run, and where its output goes.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) pod: Arc<Pod>,
    pub(crate) program: Arc<Program>,
    pub(crate) start: pb::ExecStart,
    pub(crate) output: mpsc::Sender<Result<ExecOutput, Status>>,
}

/// Why a command was not started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecError {
    #[error("start the exec helper")]
    Spawn(#[source] io::Error),
    #[error("exec failed: unable to start container process")]
    Launch(#[source] HandshakeError),
    #[error(
        "exec failed: the process was not started within {} s; a file system of the container may hang",
        LAUNCH.as_secs()
    )]
    Slow,
    #[error("the client disconnected before the process was started")]
    Gone,
}

impl ExecError {
    fn code(&self) -> i32 {
        match self {
            Self::Launch(HandshakeError::Failed { errno, .. })
                if *errno == rustix::io::Errno::NOENT.raw_os_error() =>
            {
                NOT_FOUND
            }
            Self::Launch(_) | Self::Spawn(_) | Self::Slow | Self::Gone => CANNOT_EXECUTE,
        }
    }
}

/// Runs the process to its end. The last output is its exit.
pub(crate) async fn run(session: Session, input: impl Inputs) {
    let running = match begin(&session).await {
        Ok(running) => running,
        Err((error, helper)) => {
            let exit = pb::ExecExit {
                code: error.code(),
                signal: 0,
                error: chain(&error),
            };
            send(&session.output, Output::Exit(exit)).await;
            drop(session);
            if let Some(mut helper) = helper {
                // A file system that hangs may keep the killed helper alive. No client waits for it here.
                helper.wait().await;
            }
            return;
        }
    };
    let Running {
        mut child,
        pid,
        mut streams,
    } = running;
    let stdin = streams.stdin.take();
    send(&session.output, Output::Started(true)).await;
    let end = end_with(&session.program, pid, child.pid);
    let driving = drive(&session.output, &streams, stdin, input, &mut child, end);
    let ended = tokio::select! {
        biased;
        () = session.output.closed() => None,
        exit = driving => Some(exit),
    };
    if let Some(exit) = ended {
        send(&session.output, Output::Exit(answer(exit))).await;
        if exit.is_some() {
            return;
        }
    }
    // Nothing more is sent, and this ends the answer of a client that is still there.
    drop(session);
    // Output is still read while the process handles its signals, so that it does not die of a broken pipe first.
    tokio::select! {
        biased;
        () = hang_up(&mut child, pid) => {}
        never = streams.discard() => match never {},
    }
}

/// PURE: what a client is told of the end; `None` if the process was killed and has not ended.
fn answer(exit: Option<Exit>) -> pb::ExecExit {
    let error = if exit.is_none() { STUCK } else { "" };
    let killed = Signal::KILL.as_raw();
    let Exit { code, signal } = exit.unwrap_or(Exit {
        code: 128 + killed,
        signal: killed,
    });
    pb::ExecExit {
        code,
        signal,
        error: error.to_owned(),
    }
}

struct Running {
    child: Child,
    /// The process itself, a child of the helper.
    pid: Option<u32>,
    streams: Streams,
}

/// The shim's ends of the process's streams.
#[derive(Default)]
struct Streams {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    /// Used instead of the other three if there is a terminal.
    terminal: Option<Stream>,
}

impl Streams {
    /// Reads all output and drops it. Never returns.
    async fn discard(&self) -> Infallible {
        let take = async |stream: &Option<Stream>| {
            let Some(stream) = stream else { return };
            let mut buffer = vec![0; 4096];
            while stream.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
        };
        tokio::join!(take(&self.stdout), take(&self.stderr), take(&self.terminal));
        std::future::pending().await
    }
}

/// Starts the helper and the process. On failure also returns the helper, which was killed and must be reaped.
async fn begin(session: &Session) -> Result<Running, (ExecError, Option<Child>)> {
    let start = &session.start;
    let spec = spec(&session.program.spec, start);
    let early = |error| (ExecError::Spawn(error), None);
    let (theirs, mut streams) = stdio(start).map_err(early)?;
    let (child, socket) = spawn(&session.pod, &session.program).map_err(early)?;
    let launched = launch(socket, &spec, theirs, &session.output).await;
    let opened = launched.and_then(|Launched { pid, master, .. }| {
        let terminal = master.map(Stream::new).transpose();
        Ok((pid, terminal.map_err(ExecError::Spawn)?))
    });
    match opened {
        Ok((pid, terminal)) => {
            streams.terminal = terminal;
            Ok(Running {
                child,
                pid,
                streams,
            })
        }
        Err(error) => {
            signals::send(child.pid, Signal::KILL);
            Err((error, Some(child)))
        }
    }
}

/// Starts the process. Gives up if the client disconnects, or after [`LAUNCH`].
async fn launch(
    socket: UnixStream,
    spec: &LaunchSpec,
    stdio: Vec<OwnedFd>,
    output: &mpsc::Sender<Result<ExecOutput, Status>>,
) -> Result<Launched, ExecError> {
    tokio::select! {
        biased;
        launched = handshake::launch(socket, spec, stdio) => launched.map_err(ExecError::Launch),
        () = output.closed() => Err(ExecError::Gone),
        () = sleep(LAUNCH) => Err(ExecError::Slow),
    }
}

/// The launch specification of the process. Its environment, working directory and ids are the container's.
fn spec(container: &LaunchSpec, start: &pb::ExecStart) -> LaunchSpec {
    let mut spec = LaunchSpec {
        argv: start
            .command
            .iter()
            .map(|argument| argument.clone().into_bytes())
            .collect(),
        tty: start.tty.then(|| window(start.size.as_ref())),
        create_cwd: false,
        links: Vec::new(),
        temporary: Vec::new(),
        settle: false,
        descriptor: None,
        // The helper joins the user namespace of the program.
        uid: None,
        gid: None,
        ..container.clone()
    };
    if start.tty && !spec.env.iter().any(|entry| entry.starts_with(b"TERM=")) {
        spec.env.push(b"TERM=xterm".to_vec());
    }
    spec
}

pub(super) fn window(size: Option<&pb::TerminalSize>) -> Window {
    let clamp = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    size.map_or(Window { cols: 80, rows: 24 }, |size| Window {
        cols: clamp(size.width),
        rows: clamp(size.height),
    })
}

fn stdio(start: &pb::ExecStart) -> io::Result<(Vec<OwnedFd>, Streams)> {
    if start.tty {
        return Ok((Vec::new(), Streams::default()));
    }
    let null = || -> io::Result<OwnedFd> {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")?;
        Ok(file.into())
    };
    let mut streams = Streams::default();
    let mut theirs = Vec::with_capacity(3);
    theirs.push(if start.stdin {
        let (fd, ours) = fdio::input_pipe()?;
        streams.stdin = Some(ours);
        fd
    } else {
        null()?
    });
    for (wanted, ours) in [
        (start.stdout, &mut streams.stdout),
        (start.stderr, &mut streams.stderr),
    ] {
        theirs.push(if wanted {
            let (reader, fd) = fdio::output_pipe()?;
            *ours = Some(reader);
            fd
        } else {
            null()?
        });
    }
    Ok((theirs, streams))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the shim's one module that starts exec helpers"
)]
fn spawn(pod: &Pod, program: &Program) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = StdUnixStream::pair()?;
    // The first message to the helper; an empty socket takes it at once.
    program.kept.send(&ours, program.shown)?;
    ours.set_nonblocking(true)?;
    let mut command = Command::new(&pod.agent);
    command
        .arg("enter")
        .args(enter::arguments(program.identity, program.beside))
        .env_clear()
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let child = pod.children.spawn_helper(&mut command)?;
    // The command still holds the helper's end of the socket, and the shim would never see the end of file.
    drop(command);
    Ok((child, UnixStream::from_std(ours)?))
}

/// Copies all streams until the process has ended and its output is drained. Returns `None` if it has not ended when `end` has, since
/// it should have ended before.
async fn drive(
    output: &mpsc::Sender<Result<ExecOutput, Status>>,
    streams: &Streams,
    stdin: Option<Stream>,
    input: impl Inputs,
    child: &mut Child,
    end: impl Future<Output = ()>,
) -> Option<Exit> {
    let Streams {
        stdin: _,
        stdout,
        stderr,
        terminal,
    } = streams;
    let ended = CancellationToken::new();
    let copying = async {
        let both = [stdout.as_ref(), terminal.as_ref()]
            .into_iter()
            .flatten()
            .next();
        tokio::join!(
            copy(both, Output::Stdout, output, &ended),
            copy(stderr.as_ref(), Output::Stderr, output, &ended),
        );
    };
    let feeding = feed(input, stdin, terminal.as_ref());
    tokio::pin!(copying, feeding, end);
    let (mut exit, mut copied, mut fed, mut overdue) = (None, false, false, false);
    loop {
        tokio::select! {
            biased;
            () = &mut copying, if !copied => copied = true,
            status = child.wait(), if exit.is_none() => {
                exit = Some(status);
                ended.cancel();
            }
            () = &mut end, if !overdue => overdue = true,
            () = &mut feeding, if !fed && exit.is_none() => fed = true,
        }
        // What has ended still has output.
        if copied && exit.is_some() || overdue && exit.is_none() {
            return exit;
        }
    }
}

async fn copy(
    stream: Option<&Stream>,
    wrap: fn(Bytes) -> Output,
    output: &mpsc::Sender<Result<ExecOutput, Status>>,
    ended: &CancellationToken,
) {
    let Some(stream) = stream else { return };
    loop {
        let silence = async {
            ended.cancelled().await;
            tokio::time::sleep(DRAIN).await;
        };
        let data = tokio::select! {
            biased;
            read = stream.read_chunk(CHUNK) => read.unwrap_or_default(),
            () = silence => Bytes::new(),
        };
        if data.is_empty() || !send(output, wrap(data)).await {
            return;
        }
    }
}

/// Handles the client's messages: input, the end of input, new window sizes.
async fn feed(mut input: impl Inputs, mut stdin: Option<Stream>, terminal: Option<&Stream>) {
    while let Some(message) = input.next().await {
        match message.input {
            Some(Input::Stdin(data)) => {
                if let Some(sink) = terminal.or(stdin.as_ref())
                    && sink.write_all(&data).await.is_err()
                {
                    // The process has closed its input: further input is read and dropped.
                    stdin = None;
                }
            }
            Some(Input::StdinClosed(_)) => stdin = None,
            Some(Input::Resize(size)) => {
                if let Some(terminal) = terminal {
                    set_terminal_size(terminal.fd(), window(Some(&size)));
                }
            }
            Some(Input::Start(_) | Input::Attach(_)) | None => {}
        }
    }
}

/// Kills the process when its container ends, which matters if there is no PID namespace: the end of the process then ends its
/// streams. Returns when it should have ended.
async fn end_with(program: &Program, pid: Option<u32>, helper: u32) {
    let mut ended = program.hub.ended();
    // A dropped sender means that the container has ended, too.
    ended.wait_for(Option::is_some).await.map(drop).ok();
    match pid {
        Some(pid) => signals::to_group(pid, Signal::KILL),
        None => signals::send(helper, Signal::KILL),
    }
    sleep(AFTER_KILL).await;
}

/// Ends a process whose client has disconnected.
async fn hang_up(child: &mut Child, pid: Option<u32>) {
    // Its number may be that of another process by now.
    if child.ended.is_some() {
        return;
    }
    // The process leads its session. If its pid is not known, the helper is signalled, whose death kills the process.
    let helper = child.pid;
    let signal = |signal| match pid {
        Some(pid) => signals::to_group(pid, signal),
        None => signals::send(helper, signal),
    };
    for (send, wait) in [(Signal::HUP, HANG_UP), (Signal::TERM, TERMINATE)] {
        signal(send);
        if timeout(wait, child.wait()).await.is_ok() {
            return;
        }
    }
    signal(Signal::KILL);
    signals::send(helper, Signal::KILL);
    child.wait().await;
}

pub(super) async fn send(
    output: &mpsc::Sender<Result<ExecOutput, Status>>,
    message: Output,
) -> bool {
    output
        .send(Ok(ExecOutput {
            output: Some(message),
        }))
        .await
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The launcher at the other end of the socket never answers.
    async fn unanswered(output: &mpsc::Sender<Result<ExecOutput, Status>>) -> ExecError {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let spec = LaunchSpec::default();
        let launching = launch(ours, &spec, Vec::new(), output);
        let launched = timeout(LAUNCH * 2, launching).await;
        launched.expect("the launch still waits").unwrap_err()
    }

    #[tokio::test(start_paused = true)]
    async fn the_shim_gives_up_a_launcher_that_never_answers() {
        let (output, client) = mpsc::channel(1);
        assert!(matches!(unanswered(&output).await, ExecError::Slow));
        drop(client);
        assert!(matches!(unanswered(&output).await, ExecError::Gone));
    }

    /// A client that sends nothing.
    struct Silent;

    impl Inputs for Silent {
        async fn next(&mut self) -> Option<pb::ExecInput> {
            std::future::pending().await
        }
    }

    const KILLED: Exit = Exit {
        code: 137,
        signal: 9,
    };

    #[tokio::test(start_paused = true)]
    async fn a_client_is_answered_though_the_killed_process_does_not_end() {
        let (output, _client) = mpsc::channel(1);
        let (mut child, ends) = Child::that_stays(u32::MAX);
        let streams = Streams::default();
        let end = sleep(AFTER_KILL);
        let driving = drive(&output, &streams, None, Silent, &mut child, end);
        let driven = timeout(AFTER_KILL * 2, driving).await;
        assert_eq!(driven.expect("the client still waits"), None);
        let told = answer(None);
        assert!(told.code == 137 && told.error == STUCK, "{told:?}");
        // Its task goes on waiting, and may ask again.
        ends.send((KILLED, None)).unwrap();
        for _ in 0..2 {
            assert_eq!(child.wait().await, KILLED);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_killed_process_that_has_ended_is_no_error() {
        let (output, _client) = mpsc::channel(1);
        let (mut child, ends) = Child::that_stays(u32::MAX);
        ends.send((KILLED, None)).unwrap();
        let streams = Streams::default();
        let end = std::future::ready(());
        let driven = drive(&output, &streams, None, Silent, &mut child, end).await;
        assert_eq!(driven, Some(KILLED));
        assert_eq!(answer(driven).error, "");
    }
}
