//! A command that runs, as a stream of bytes.
//!
//! Its standard input and output are one end of a socket pair: half-close and vectored writes work as over a socket, and
//! 64 KiB of a pipe are no limit. Whoever reads from the stream also drains the command's stderr, so no task is needed.
use std::{
    any::Any,
    collections::VecDeque,
    fmt, io,
    os::fd::OwnedFd,
    pin::Pin,
    process::{ExitStatus, Stdio},
    task::{Context, Poll, ready},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::UnixStream,
    process::{Child, ChildStderr, Command},
    time::Sleep,
};

use super::{
    failure::{Cause, CommandFailure},
    marker::{self, Found, Speaks},
};

/// The last bytes of stderr that are kept.
const KEPT: usize = 4 << 10;
/// How long a command whose output has ended may take to end itself.
const ENDING: Duration = Duration::from_secs(2);

/// What the command needs until its marker has come, such as a folder with its key.
#[derive(Default)]
pub(crate) struct Held(Option<Box<dyn Any + Send + Sync>>);

impl Held {
    /// Holds `value`.
    pub(in crate::carrier) fn new(value: impl Any + Send + Sync) -> Self {
        Self(Some(Box::new(value)))
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Held").field(&self.0.is_some()).finish()
    }
}

/// The connection over a command.
#[derive(Debug)]
pub struct CommandIo {
    stream: UnixStream,
    /// What came behind the marker in the same read.
    replay: VecDeque<u8>,
    running: Running,
}

#[derive(Debug)]
struct Running {
    child: Child,
    /// `None` once it is closed.
    stderr: Option<ChildStderr>,
    said: VecDeque<u8>,
    /// Runs since the command's output has ended.
    ending: Option<Pin<Box<Sleep>>>,
    held: Held,
}

impl CommandIo {
    /// Starts a command in a process group of its own. It inherits the environment, and gets these variables.
    pub(in crate::carrier) fn start(
        words: &[String],
        held: Held,
        variables: &[(&str, &str)],
    ) -> Result<Self, CommandFailure> {
        let start = || {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            let input = OwnedFd::from(theirs.try_clone()?);
            let mut child = command(words)
                .envs(variables.iter().copied())
                .stdin(Stdio::from(input))
                .stdout(Stdio::from(OwnedFd::from(theirs)))
                .stderr(Stdio::piped())
                .process_group(0)
                .kill_on_drop(true)
                .spawn()?;
            let stderr = child.stderr.take();
            Ok((UnixStream::from_std(ours)?, child, stderr))
        };
        let (stream, child, stderr) = start().map_err(CommandFailure::not_started)?;
        let running = Running {
            child,
            stderr,
            said: VecDeque::new(),
            ending: None,
            held,
        };
        Ok(Self {
            stream,
            replay: VecDeque::new(),
            running,
        })
    }

    /// The stream behind the marker, which has to come in time.
    pub(super) async fn after_marker(
        mut self,
        speaks: Speaks,
        limit: Duration,
    ) -> Result<Self, CommandFailure> {
        let found = tokio::time::timeout(limit, self.find_marker()).await;
        let found = found.unwrap_or_else(|_| Err(self.failure(Cause::Late)))?;
        if found == speaks {
            // It has read its files: no copy of a key outlives the login.
            self.running.held = Held::default();
            Ok(self)
        } else {
            Err(self.failure(Cause::OtherSpeech(found)))
        }
    }

    async fn find_marker(&mut self) -> Result<Speaks, CommandFailure> {
        let mut seen = Vec::new();
        let mut searched = 0;
        loop {
            match marker::find(&seen, searched) {
                Found::NotYet(next) => searched = next,
                Found::Link(speaks, begin) => {
                    self.replay.extend(&seen[begin..]);
                    return Ok(speaks);
                }
                Found::Unknown => return Err(self.failure(Cause::NoMarker)),
                Found::TooMuch => return Err(CommandFailure::too_much(self.running.said())),
            }
            match self.read_buf(&mut seen).await {
                Ok(0) => return Err(self.failure(Cause::NoMarker)),
                Ok(_) => {}
                Err(error) => {
                    return Err(match error.downcast::<CommandFailure>() {
                        Ok(failure) => failure,
                        Err(error) => CommandFailure {
                            source: Some(error),
                            ..self.failure(Cause::Other)
                        },
                    });
                }
            }
        }
    }

    fn failure(&self, cause: Cause) -> CommandFailure {
        CommandFailure::of(cause, self.running.said())
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the only place of the link where a process starts"
)]
fn command(words: &[String]) -> Command {
    let mut command = Command::new(words.first().map_or("", String::as_str));
    command.args(words.iter().skip(1));
    command
}

impl Running {
    /// Reads what is there of stderr, and wakes the caller for more.
    fn drain(&mut self, cx: &mut Context<'_>) {
        let mut space = [0; 1024];
        while let Some(stderr) = &mut self.stderr {
            let mut buf = ReadBuf::new(&mut space);
            match Pin::new(stderr).poll_read(cx, &mut buf) {
                Poll::Pending => return,
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => {
                    self.said.extend(buf.filled());
                    let excess = self.said.len().saturating_sub(KEPT);
                    self.said.drain(..excess);
                }
                Poll::Ready(Ok(()) | Err(_)) => self.stderr = None,
            }
        }
    }

    fn said(&self) -> String {
        let bytes: Vec<u8> = self.said.iter().copied().collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }

    /// Waits for the end of a command whose output has ended. `Ok` if it has ended well.
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CommandFailure>> {
        let ending = &mut self.ending;
        let ending = ending.get_or_insert_with(|| Box::pin(tokio::time::sleep(ENDING)));
        let late = ending.as_mut().poll(cx).is_ready();
        let waited = std::pin::pin!(self.child.wait()).poll(cx);
        let status = match waited {
            Poll::Ready(Ok(status)) => Some(status),
            Poll::Ready(Err(_)) => None,
            Poll::Pending if late => None,
            Poll::Pending => return Poll::Pending,
        };
        // What it wrote last.
        self.drain(cx);
        if status.is_some_and(|status| status.success()) {
            return Poll::Ready(Ok(()));
        }
        let said = self.said();
        Poll::Ready(Err(CommandFailure {
            cause: Cause::of(status.and_then(|status| status.code()), &said),
            ended: status.map(|status: ExitStatus| status.to_string()),
            stderr: said,
            source: None,
        }))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // With ssh's own children, such as that of a jump host. The runtime kills and reaps the command itself.
        let pid = self.child.id().and_then(|pid| i32::try_from(pid).ok());
        if let Some(pid) = pid.and_then(Pid::from_raw) {
            kill_process_group(pid, Signal::KILL).ok();
        }
    }
}

impl CommandIo {
    /// The end of the stream, or its error, with the cause that the command gives.
    fn poll_end(&mut self, cx: &mut Context<'_>, end: io::Result<()>) -> Poll<io::Result<()>> {
        let ended = ready!(self.running.poll_ended(cx));
        Poll::Ready(ended.map_err(io::Error::other).and(end))
    }

    /// The result of a write; if it failed, with the cause that the command gives.
    fn poll_written(
        &mut self,
        cx: &mut Context<'_>,
        written: io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        match written {
            Ok(written) => Poll::Ready(Ok(written)),
            Err(error) => self.poll_end(cx, Err(error)).map_ok(|()| 0),
        }
    }
}

impl AsyncRead for CommandIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.running.drain(cx);
        if !this.replay.is_empty() {
            let now = this.replay.len().min(buf.remaining());
            let bytes: Vec<u8> = this.replay.drain(..now).collect();
            buf.put_slice(&bytes);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        match ready!(Pin::new(&mut this.stream).poll_read(cx, buf)) {
            Ok(()) if buf.filled().len() > before || buf.remaining() == 0 => Poll::Ready(Ok(())),
            end => this.poll_end(cx, end),
        }
    }
}

impl AsyncWrite for CommandIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, buf));
        this.poll_written(cx, written)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        match ready!(Pin::new(&mut this.stream).poll_write_vectored(cx, bufs)) {
            Ok(written) => Poll::Ready(Ok(written)),
            Err(error) => this.poll_end(cx, Err(error)).map_ok(|()| 0),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
