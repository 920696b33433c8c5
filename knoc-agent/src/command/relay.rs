//! A child process whose standard input and output are one stream of bytes.
//!
//! The stream can be boxed and passed on; whoever drops it closes the child's standard input, which
//! asks the child to end. [`Relay::ended`] waits for the child and then ends what is left of its
//! process group. Cancel safety: dropping the relay kills the process group.

use std::{
    io,
    pin::Pin,
    process::{ExitStatus, Stdio},
    task::{Context, Poll},
    time::Duration,
};

use nix::sys::signal::{Signal, killpg};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    process::{Child, ChildStderr, ChildStdin, ChildStdout},
};
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};

use super::{Capture, Command, CommandError, CommandErrorKind, Group, own_session, spawn_error};

/// How long a child may take to end after its standard input was closed, and again after SIGTERM.
const END: Duration = Duration::from_secs(5);
/// How long its standard error is read after it has ended.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The running child.
pub struct Relay {
    child: Child,
    group: Group,
    stderr: Option<ChildStderr>,
    errors: Capture,
    /// Cancelled when the stream was dropped.
    dropped: CancellationToken,
    /// Ends the stream from this side.
    close: CancellationToken,
}

/// Standard output and input of the child.
pub struct Stream {
    stdout: ChildStdout,
    stdin: ChildStdin,
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
    _dropped: DropGuard,
}

impl std::fmt::Debug for Relay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Relay").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").finish_non_exhaustive()
    }
}

impl Command {
    /// Starts the command in a session of its own. Its deadline does not apply; of its standard
    /// error, as much as its capture limit is kept.
    pub fn relay(self) -> Result<(Relay, Stream), CommandError> {
        let program = self.program.clone();
        self.start_relay()
            .map_err(|kind| CommandError { program, kind })
    }

    fn start_relay(self) -> Result<(Relay, Stream), CommandErrorKind> {
        let mut command = self.std_command(Stdio::piped(), Stdio::piped())?;
        command.stdin(Stdio::piped());
        own_session(&mut command);
        let spawned = tokio::process::Command::from(command).spawn();
        let mut child = spawned.map_err(spawn_error)?;
        let group = Group::of(&child);
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let (Some(stdin), Some(stdout)) = (stdin, stdout) else {
            return Err(CommandErrorKind::Spawn(io::Error::other("it has no pipes")));
        };
        let (dropped, close) = (CancellationToken::new(), CancellationToken::new());
        let stream = Stream {
            stdout,
            stdin,
            closed: Box::pin(close.clone().cancelled_owned()),
            _dropped: dropped.clone().drop_guard(),
        };
        let relay = Relay {
            stderr: child.stderr.take(),
            errors: Capture::new(self.capture),
            child,
            group,
            dropped,
            close,
        };
        Ok((relay, stream))
    }
}

impl Relay {
    /// Cancelled, it ends the stream: its reader sees the end of the connection.
    #[must_use]
    pub fn closer(&self) -> CancellationToken {
        self.close.clone()
    }

    /// Waits until the child has ended, or the stream was dropped; then ends the child if it does
    /// not end by itself. Returns what it wrote to standard error and how it ended, as one text
    /// without line breaks. Call it once.
    pub async fn ended(&mut self) -> String {
        let status = self.status().await;
        let mut text = self.errors.message();
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => text = format!("{text} ({status})"),
            Err(error) => text = format!("{text} ({error})"),
        }
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// Waits for the end, and reads standard error meanwhile.
    async fn status(&mut self) -> io::Result<ExitStatus> {
        let mut errors = std::pin::pin!(self.errors.fill(self.stderr.take()));
        let mut ending = std::pin::pin!(end(&mut self.child, &self.group, &self.dropped));
        let mut read = false;
        let status = loop {
            tokio::select! {
                status = &mut ending => break status,
                _ = &mut errors, if !read => read = true,
            }
        };
        if !read {
            // A descendant may keep the pipe open.
            tokio::time::timeout(LAST_WORDS, errors).await.ok();
        }
        status
    }
}

/// Waits until the child has ended, or `dropped`; then ends the child.
async fn end(
    child: &mut Child,
    group: &Group,
    dropped: &CancellationToken,
) -> io::Result<ExitStatus> {
    tokio::select! {
        status = child.wait() => return status,
        () = dropped.cancelled() => {}
    }
    for signal in [None, Some(Signal::SIGTERM)] {
        if let (Some(signal), Some(group)) = (signal, group.0) {
            killpg(group, signal).ok();
        }
        if let Ok(status) = tokio::time::timeout(END, child.wait()).await {
            return status;
        }
    }
    child.start_kill().ok();
    child.wait().await
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.closed.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stdout).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stdin).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stdin).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stdin).poll_shutdown(cx)
    }
}
