//! The local side of one exec or attach call: standard input and output, the terminal and its size, signals, and the exit
//! code.
//!
//! Bytes pass unchanged in both directions. Input and resizes go through one bounded channel, which drains at the speed of
//! gRPC's flow control. The end of input is passed on (half-close), and output continues after it.

use std::{io, process::ExitCode};

use bytes::BytesMut;
use futures::StreamExt as _;
use knoc_proto::CHUNK;
use knoc_proto::pb::{ExecExit, ExecInput, ExecOutput, exec_input::Input, exec_output::Output};
use tokio::{
    io::AsyncReadExt as _,
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{
    CtlError, output,
    terminal::{self, Raw},
};

/// Messages that may wait for the link: enough to keep it busy, few enough that reading stops soon if the link is slow.
pub(super) const QUEUE: usize = 8;
/// The exit code for a command that could not be started and has none of its own, as in a shell.
const CANNOT_START: u8 = 126;

/// Which parts of the local terminal the call uses.
#[derive(Debug, Clone, Copy)]
pub(super) struct Local {
    /// Standard input is passed on.
    pub(super) stdin: bool,
    /// The program has a terminal: the local one is in raw mode until the call ends, and is restored however it ends.
    pub(super) tty: bool,
}

/// The input of a call, which begins with `first`, and what sends the rest of it.
pub(super) fn input(first: Input) -> (mpsc::Sender<ExecInput>, ReceiverStream<ExecInput>) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    // The queue is empty, so there is room.
    sender.try_send(ExecInput { input: Some(first) }).ok();
    (sender, ReceiverStream::new(receiver))
}

/// Passes both directions on until the program exits.
pub(super) async fn run(
    stream: Streaming<ExecOutput>,
    sender: mpsc::Sender<ExecInput>,
    Local { stdin, tty }: Local,
    what: &str,
) -> Result<ExecExit, CtlError> {
    let raw = tty && stdin && terminal::is_one();
    let restored = raw.then(Raw::enter).transpose()?;
    let mut signals = Signals::new(tty)?;
    let input = pump(sender, stdin, tty);
    let output = receive(stream, what);
    tokio::pin!(input, output);
    let mut input_open = true;
    let result = loop {
        // Output comes first, because the call ends with it even if there is more input; then signals, then input.
        tokio::select! {
            biased;
            exit = &mut output => break exit,
            name = signals.next() => break Err(CtlError::Signal { name }),
            ended = &mut input, if input_open => {
                if let Err(error) = ended {
                    break Err(error);
                }
                input_open = false;
            }
        }
    };
    drop(restored);
    result
}

/// The exit code of knocctl. If the agent sent an error instead of the program's own exit, `error` wraps its message.
pub(super) fn exit_code(exit: ExecExit, error: impl FnOnce(String) -> CtlError) -> ExitCode {
    let code = u8::try_from(exit.code.rem_euclid(256)).unwrap_or(1);
    if exit.error.is_empty() {
        return ExitCode::from(code);
    }
    super::report(&error(exit.error));
    ExitCode::from(if code == 0 { CANNOT_START } else { code })
}

/// Sends standard input and resizes until the command ends. If the input ends first, resizes continue.
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

/// Returns false if the receiver is gone.
async fn send(sender: &mpsc::Sender<ExecInput>, input: Input) -> bool {
    sender.send(ExecInput { input: Some(input) }).await.is_ok()
}

/// Prints output until the program exits; returns how it exited.
async fn receive(mut stream: Streaming<ExecOutput>, what: &str) -> Result<ExecExit, CtlError> {
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
    Err(CtlError::CutShort {
        what: what.to_owned(),
    })
}

/// The signals that end knocctl. They are handled, because their default action would leave the terminal in raw mode.
pub(super) struct Signals {
    terminate: Signal,
    hangup: Signal,
    interrupt: Option<Signal>,
}

impl Signals {
    /// In raw mode `^C` arrives as a byte; a SIGINT from another process still ends knocctl and restores the terminal.
    pub(super) fn new(tty: bool) -> Result<Self, CtlError> {
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

    pub(super) async fn next(&mut self) -> &'static str {
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

    use super::*;

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
    async fn input_stops_if_the_receiver_is_gone() {
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
            let error = |message| CtlError::NotStarted { message };
            format!("{:?}", exit_code(exit, error))
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
