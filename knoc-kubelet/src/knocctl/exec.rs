//! `knocctl exec`: a command in a container, with its input, output, terminal and exit code.
//!
//! Bytes pass untouched both ways. Input and resizes go through one bounded channel, which gRPC's flow
//! control empties; the end of input is passed on as such (half-close), output goes on after it.

use std::{io, process::ExitCode};

use bytes::BytesMut;
use futures::StreamExt as _;
use knoc_proto::pb::{ExecExit, ExecInput, ExecStart, exec_input::Input, exec_output::Output};
use tokio::{
    io::AsyncReadExt as _,
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{
    CtlError, Global, find, logs, output,
    session::{Session, asked},
    terminal::{self, Raw},
};

/// Messages on the way to the link: enough to keep it busy, few enough to stop reading in time.
const QUEUE: usize = 8;
/// What one read of standard input may bring.
const CHUNK: usize = 32 << 10;
/// The code of a command that could not be started and has none of its own, as a shell has it.
const CANNOT_START: u8 = 126;

/// Arguments of `exec`.
#[derive(Debug, clap::Args)]
pub(super) struct Exec {
    /// Name, NAMESPACE/NAME, or uid
    pod: String,
    /// The container, where the pod has several
    #[arg(short, long)]
    container: Option<String>,
    /// Passes standard input on
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Gives the command a terminal
    #[arg(short = 't', long)]
    tty: bool,
    /// The command and its arguments, after `--`
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Exec {
    pub(super) async fn run(mut self, global: &Global) -> Result<ExitCode, CtlError> {
        let mut session = Session::open(global)?;
        let pod = find::one(&mut session, global.namespace.as_deref(), &self.pod).await?;
        let container = logs::container(&pod, self.container.as_deref());
        if self.tty && !(self.stdin && terminal::is_one()) {
            if self.stdin {
                output::complain("note: standard input is no terminal, so the command gets none");
                self.tty = false;
            } else if !terminal::is_one() {
                self.tty = false;
            }
        }
        let start = self.start(pod.uid, container);
        let (sender, receiver) = mpsc::channel(QUEUE);
        let first = ExecInput {
            input: Some(Input::Start(start)),
        };
        if sender.send(first).await.is_err() {
            return Err(cut_short());
        }
        let what = format!("run {:?} in {}", self.command.join(" "), self.pod);
        let call = session.client.exec(ReceiverStream::new(receiver));
        let stream = asked(&what, call).await?;
        // From here on the terminal is raw; every way out of this function restores it.
        let raw = if self.tty && self.stdin {
            Some(Raw::enter()?)
        } else {
            None
        };
        let result = self.converse(stream, sender, &what).await;
        drop(raw);
        Ok(finish(result?))
    }

    fn start(&self, uid: String, container: String) -> ExecStart {
        ExecStart {
            uid,
            container,
            command: self.command.clone(),
            stdin: self.stdin,
            stdout: true,
            // A terminal has one stream.
            stderr: !self.tty,
            tty: self.tty,
            size: if self.tty { terminal::size() } else { None },
        }
    }

    /// Both directions until the command's exit.
    async fn converse(
        &self,
        stream: Streaming<knoc_proto::pb::ExecOutput>,
        sender: mpsc::Sender<ExecInput>,
        what: &str,
    ) -> Result<ExecExit, CtlError> {
        let mut signals = Signals::new(self.tty)?;
        let input = pump(sender, self.stdin, self.tty);
        let output = receive(stream, what);
        tokio::pin!(input, output);
        let mut input_open = true;
        loop {
            // Output first: its end is the end, whatever input there still is. Then signals, then input.
            tokio::select! {
                biased;
                exit = &mut output => return exit,
                name = signals.next() => return Err(CtlError::Signal { name }),
                ended = &mut input, if input_open => {
                    ended?;
                    input_open = false;
                }
            }
        }
    }
}

fn cut_short() -> CtlError {
    CtlError::CutShort {
        what: "run the command".to_owned(),
    }
}

/// The code to end with.
fn finish(exit: ExecExit) -> ExitCode {
    let code = u8::try_from(exit.code.rem_euclid(256)).unwrap_or(1);
    if exit.error.is_empty() {
        return ExitCode::from(code);
    }
    let error = CtlError::NotStarted { words: exit.error };
    super::report(&error);
    ExitCode::from(if code == 0 { CANNOT_START } else { code })
}

/// Standard input and resizes, until the input ends (resizes go on) or the command does.
async fn pump(sender: mpsc::Sender<ExecInput>, stdin: bool, tty: bool) -> Result<(), CtlError> {
    let resizes = async {
        if !tty {
            return Ok(());
        }
        let failed = |source| CtlError::Terminal {
            what: "watch the size",
            source,
        };
        let mut changed = signal(SignalKind::window_change()).map_err(failed)?;
        while changed.recv().await.is_some() {
            let Some(size) = terminal::size() else {
                continue;
            };
            if !send(&sender, Input::Resize(size)).await {
                break;
            }
        }
        Ok(())
    };
    let bytes = async {
        if !stdin {
            return Ok(());
        }
        copy_input(&sender, tokio::io::stdin()).await
    };
    let (sizes, copied) = futures::join!(resizes, bytes);
    sizes.and(copied)
}

async fn copy_input(
    sender: &mpsc::Sender<ExecInput>,
    mut input: impl tokio::io::AsyncRead + Unpin,
) -> Result<(), CtlError> {
    let mut buffer = BytesMut::with_capacity(CHUNK);
    loop {
        buffer.reserve(CHUNK);
        let read = input.read_buf(&mut buffer).await;
        let count = read.map_err(|source| CtlError::Input { source })?;
        let message = if count == 0 {
            Input::StdinClosed(true)
        } else {
            Input::Stdin(buffer.split().freeze())
        };
        if !send(sender, message).await || count == 0 {
            return Ok(());
        }
    }
}

/// False where nobody listens any more.
async fn send(sender: &mpsc::Sender<ExecInput>, input: Input) -> bool {
    sender.send(ExecInput { input: Some(input) }).await.is_ok()
}

/// Output until the exit.
async fn receive(
    mut stream: Streaming<knoc_proto::pb::ExecOutput>,
    what: &str,
) -> Result<ExecExit, CtlError> {
    while let Some(message) = stream.next().await {
        let message = message.map_err(|source| CtlError::Agent {
            what: what.to_owned(),
            source,
        })?;
        match message.output {
            Some(Output::Stdout(bytes)) => output::pass(&bytes).await?,
            Some(Output::Stderr(bytes)) => output::pass_error(&bytes).await?,
            Some(Output::Exit(exit)) => return Ok(exit),
            Some(Output::Started(_)) | None => {}
        }
    }
    Err(cut_short())
}

/// The signals that end us; with a terminal in raw mode they would leave it so.
struct Signals {
    terminate: Signal,
    hangup: Signal,
    interrupt: Option<Signal>,
}

impl Signals {
    /// In raw mode `^C` is a byte; an interrupt from elsewhere still ends us tidily.
    fn new(tty: bool) -> Result<Self, CtlError> {
        let on = |kind| {
            let failed = |source: io::Error| CtlError::Terminal {
                what: "watch signals",
                source,
            };
            signal(kind).map_err(failed)
        };
        let interrupt = if tty {
            Some(on(SignalKind::interrupt())?)
        } else {
            None
        };
        Ok(Self {
            terminate: on(SignalKind::terminate())?,
            hangup: on(SignalKind::hangup())?,
            interrupt,
        })
    }

    async fn next(&mut self) -> &'static str {
        let interrupt = async {
            match &mut self.interrupt {
                Some(interrupt) => interrupt.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hangup.recv() => "SIGHUP",
            _ = interrupt => "SIGINT",
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        exec: Exec,
    }

    fn parsed(arguments: &[&str]) -> Result<Exec, String> {
        let line = Line::try_parse_from(["exec"].iter().chain(arguments));
        line.map(|line| line.exec)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_stands_after_two_dashes() {
        let exec = parsed(&["web", "-it", "-c", "main", "--", "sh", "-c", "echo -i"]).unwrap();
        assert!(exec.stdin && exec.tty);
        assert_eq!(exec.command, ["sh", "-c", "echo -i"]);
        let start = exec.start("u".into(), "main".into());
        assert!(start.tty && start.stdout && !start.stderr);
        parsed(&["web", "sh"]).unwrap_err();
        parsed(&["web"]).unwrap_err();
    }

    #[tokio::test]
    async fn input_is_passed_as_it_is_and_closed() {
        let (sender, mut receiver) = mpsc::channel(QUEUE);
        let bytes = b"\x00\xff\r\n\x03".as_slice();
        copy_input(&sender, bytes).await.unwrap();
        let first = receiver.recv().await.unwrap().input.unwrap();
        assert_eq!(first, Input::Stdin(Bytes::from_static(bytes)));
        let last = receiver.recv().await.unwrap().input.unwrap();
        assert_eq!(last, Input::StdinClosed(true));
    }

    #[tokio::test]
    async fn input_stops_when_nobody_listens() {
        let (sender, receiver) = mpsc::channel(1);
        drop(receiver);
        copy_input(&sender, tokio::io::repeat(7)).await.unwrap();
    }

    #[test]
    fn codes_pass_through() {
        let exit = |code, error: &str| {
            let exit = ExecExit {
                code,
                error: error.into(),
                ..ExecExit::default()
            };
            format!("{:?}", finish(exit))
        };
        assert_eq!(exit(7, ""), format!("{:?}", ExitCode::from(7)));
        assert_eq!(exit(143, ""), format!("{:?}", ExitCode::from(143)));
        assert_eq!(
            exit(0, "no such file"),
            format!("{:?}", ExitCode::from(126))
        );
        assert_eq!(
            exit(127, "no such file"),
            format!("{:?}", ExitCode::from(127))
        );
    }
}
