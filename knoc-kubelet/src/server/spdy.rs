//! A SPDY/3.1 server session over any byte stream, as Go's spdystream expects it. Knows nothing of Kubernetes.
//!
//! Owner: the task that polls [`Session::run`], which reads, writes and answers pings; streams that the peer opens come
//! out of [`Incoming`], each with a bounded queue of what it receives. A queue that is full stops the reading of the
//! socket: nothing is ever dropped, and since the peer knows no flow control either, one slow stream holds up its
//! connection (as it does in every kubelet) and no other.
//!
//! The end: when `Incoming` and all halves of streams are dropped, what is queued is written, then GOAWAY, and the peer
//! gets [`LINGER`] to close. A peer that closes first ends `run` at once, and with it every stream.
//!
//! What a session never does: open streams of its own, wait for WINDOW_UPDATE, or lose the state of the header
//! compression over a refused stream.

pub(super) mod frame;
mod headers;
mod reader;
#[cfg(test)]
pub(super) mod tests;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::Instant;

use frame::Reset;
pub(super) use headers::Headers;
use writer::Out;

/// Streams that the peer may hold open at once; a port-forward of a browser has some dozens.
const MAX_STREAMS: usize = 1024;
/// Streams that wait to be taken out of [`Incoming`]; more stop the reading.
const INCOMING: usize = 16;
/// Pieces that wait in a stream: with reads of [`reader::CHUNK`], half a MiB.
const RECEIVE_QUEUE: usize = 8;
/// Frames that wait to be written, of all streams together.
const SEND_QUEUE: usize = 16;
/// As `streamingConnectionIdleTimeout` of a real kubelet: no stream opened, no byte moved.
const IDLE: Duration = Duration::from_hours(4);
/// How long the peer may take to close after our GOAWAY.
const LINGER: Duration = Duration::from_secs(2);

/// Why a session ended before its end.
#[derive(Debug, Error)]
pub(super) enum SessionError {
    #[error("read from the peer")]
    Read {
        #[source]
        source: std::io::Error,
    },
    #[error("write to the peer")]
    Write {
        #[source]
        source: std::io::Error,
    },
    #[error("understand the peer's frames")]
    Frame {
        #[source]
        source: frame::FrameError,
    },
    #[error("understand the peer's headers")]
    Headers {
        #[source]
        source: headers::HeaderError,
    },
    #[error("nothing moved for {} h", IDLE.as_secs() / 3600)]
    Idle,
}

/// When a byte last moved, shared by both directions.
#[derive(Debug, Clone)]
struct Activity {
    start: Instant,
    last: Arc<AtomicU64>,
}

impl Activity {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            last: Arc::default(),
        }
    }

    fn touch(&self) {
        let elapsed = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(elapsed, Ordering::Relaxed);
    }

    /// Returns when nothing has moved for [`IDLE`].
    async fn idle(&self) {
        loop {
            let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
            let deadline = self.start + last + IDLE;
            if deadline <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(deadline).await;
        }
    }
}

/// One connection; see the module.
#[derive(Debug)]
pub(super) struct Session<Io> {
    input: ReadHalf<Io>,
    output: WriteHalf<Io>,
    reader: reader::Reader,
    queue: mpsc::Receiver<Out>,
    activity: Activity,
}

/// The streams that the peer opens.
#[derive(Debug)]
pub(super) struct Incoming {
    streams: mpsc::Receiver<Stream>,
    /// Keeps the session open while no stream is.
    _open: mpsc::Sender<Out>,
}

impl Incoming {
    /// The next stream; `None` when the session has ended. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }
}

/// A stream that the peer has opened and that awaits its answer.
#[derive(Debug)]
pub(super) struct Stream {
    id: u32,
    headers: Headers,
    receiver: mpsc::Receiver<Bytes>,
    queue: mpsc::Sender<Out>,
}

impl Stream {
    pub(super) fn headers(&self) -> &Headers {
        &self.headers
    }

    /// Answers with no headers, as the peer expects; both halves are open then.
    pub(super) async fn accept(self) -> (Receiver, Sender) {
        // A queue that is closed means a session that has ended: both halves will say so.
        drop(self.queue.send(Out::Reply(self.id)).await);
        let sender = Sender {
            id: self.id,
            queue: self.queue,
        };
        (Receiver(self.receiver), sender)
    }

    /// Refuses it.
    pub(super) async fn refuse(self) {
        drop(self.queue.send(Out::Reset(self.id, Reset::Refused)).await);
    }
}

/// What the peer sends on a stream.
#[derive(Debug)]
pub(super) struct Receiver(mpsc::Receiver<Bytes>);

impl Receiver {
    /// The next bytes, never empty; `None` after the peer's FIN, its reset, or the end of the session. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<Bytes> {
        self.0.recv().await
    }
}

/// The session has ended: nothing more can be sent.
#[derive(Debug, Error)]
#[error("the connection has ended")]
pub(super) struct Closed;

/// What we send on a stream.
#[derive(Debug)]
pub(super) struct Sender {
    id: u32,
    queue: mpsc::Sender<Out>,
}

impl Sender {
    /// Queues bytes; waits while the peer does not read.
    pub(super) async fn send(&self, data: Bytes) -> Result<(), Closed> {
        let out = Out::Data {
            id: self.id,
            data,
            fin: false,
        };
        self.queue.send(out).await.map_err(|_| Closed)
    }

    /// The last bytes, then FIN: our half of the stream is closed.
    pub(super) async fn finish(self, data: Bytes) -> Result<(), Closed> {
        let out = Out::Data {
            id: self.id,
            data,
            fin: true,
        };
        self.queue.send(out).await.map_err(|_| Closed)
    }
}

/// Begins a session on a connection whose upgrade has been answered.
pub(super) fn session<Io>(io: Io) -> (Session<Io>, Incoming)
where
    Io: AsyncRead + AsyncWrite,
{
    let (input, output) = tokio::io::split(io);
    let (sender, queue) = mpsc::channel(SEND_QUEUE);
    let (incoming, streams) = mpsc::channel(INCOMING);
    let activity = Activity::new();
    let session = Session {
        input,
        output,
        reader: reader::Reader::new(incoming, sender.downgrade(), activity.clone()),
        queue,
        activity,
    };
    let incoming = Incoming {
        streams,
        _open: sender,
    };
    (session, incoming)
}

impl<Io> Session<Io>
where
    Io: AsyncRead + AsyncWrite,
{
    /// Reads and writes until either side has ended the session.
    pub(super) async fn run(self) -> Result<(), SessionError> {
        let Self {
            input,
            output,
            reader,
            queue,
            activity,
        } = self;
        let last = reader.last_id();
        let mut read = std::pin::pin!(reader.run(input));
        let written = tokio::select! {
            biased;
            ended = read.as_mut() => return ended,
            written = writer::run(output, queue, last, activity.clone()) => written,
            () = activity.idle() => return Err(SessionError::Idle),
        };
        // Closed last: closing before the peer has read all would lose what is on its way.
        let mut output = written?;
        let ended = tokio::time::timeout(LINGER, read).await;
        drop(tokio::time::timeout(LINGER, output.shutdown()).await);
        ended.unwrap_or(Ok(()))
    }
}
