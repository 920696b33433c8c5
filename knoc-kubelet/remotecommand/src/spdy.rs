//! A SPDY/3.1 server session over any byte stream, as Go's spdystream expects it. Knows nothing of Kubernetes.
//!
//! Owner: the task that polls [`Session::run`], which reads, writes and answers pings; streams that the peer opens come
//! out of [`Incoming`], each with a bounded queue of what it receives, all of them together within one [`Budget`]. A
//! queue that is full stops the reading of the socket: nothing is ever dropped, and since the peer knows no flow control
//! either, one slow stream holds up its connection (as it does in every kubelet) and no other.
//!
//! The end: when `Incoming` and all halves of streams are dropped, what is queued is written, then GOAWAY, and the peer
//! gets [`LINGER`] to close. A peer that closes first ends every stream at once, and `run` when our side is shut down. A GOAWAY of the peer
//! ends `Incoming`; streams that are open go on.
//!
//! What a session never does: open streams of its own, wait for WINDOW_UPDATE, or lose the state of the header
//! compression over a refused stream.

pub(crate) mod frame;
pub(crate) mod headers;
#[cfg(any(test, feature = "test-peer"))]
pub mod peer;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::streams::{Activity, Budget, Closed, IDLE, StreamReader};
use frame::Reset;
pub use headers::Headers;
use writer::Out;

/// Streams that the peer may hold open at once; a port-forward of a browser has some dozens.
const MAX_STREAMS: usize = 1024;
/// Streams that wait to be taken out of [`Incoming`]; more stop the reading.
const INCOMING: usize = 16;
/// Streams that a peer may open at once after a pause, and
const OPEN_BURST: u32 = 1024;
/// how many it may open each second in the long run; beyond that its socket is not read. Each costs a call to the agent.
const OPEN_RATE: u32 = 1000;
/// Frames that wait to be written, of all streams together; each of at most [`frame::MAX_DATA`], so a MiB in all.
const SEND_QUEUE: usize = 16;
/// How long the peer may take to close after our GOAWAY.
const LINGER: Duration = Duration::from_secs(2);

/// Why a session ended before its end.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The socket cannot be read.
    #[error("read from the peer")]
    Read {
        /// The error of the socket.
        #[source]
        source: std::io::Error,
    },
    /// The socket cannot be written.
    #[error("write to the peer")]
    Write {
        /// The error of the socket.
        #[source]
        source: std::io::Error,
    },
    /// The peer breaks the protocol's framing.
    #[error("understand the peer's frames")]
    Frame {
        /// Which rule it breaks.
        #[source]
        source: frame::FrameError,
    },
    /// A header block cannot be read.
    #[error("understand the peer's headers")]
    Headers {
        /// Which rule it breaks.
        #[source]
        source: headers::HeaderError,
    },
    /// No byte moved and no stream was opened for [`IDLE`].
    #[error("nothing moved for {} h", IDLE.as_secs() / 3600)]
    Idle,
}

/// One connection; see the module.
#[derive(Debug)]
pub struct Session<Io> {
    input: ReadHalf<Io>,
    output: WriteHalf<Io>,
    reader: reader::Reader,
    queue: mpsc::Receiver<Out>,
    activity: Activity,
}

/// The streams that the peer opens.
#[derive(Debug)]
pub struct Incoming {
    streams: mpsc::Receiver<Stream>,
    /// Keeps the session open while no stream is.
    _open: mpsc::Sender<Out>,
}

impl Incoming {
    /// The next stream; `None` when the session has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }
}

/// Counts against [`MAX_STREAMS`] while either half of a stream is in use.
type Slot = Arc<OwnedSemaphorePermit>;

/// A stream that the peer has opened and that awaits its answer.
#[derive(Debug)]
pub struct Stream {
    id: u32,
    headers: Headers,
    reader: StreamReader,
    queue: mpsc::Sender<Out>,
    slot: Slot,
}

impl Stream {
    /// The number that the peer gave it.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The headers with which the peer opened it.
    #[must_use]
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// Answers with no headers, as the peer expects; both halves are open then.
    pub async fn accept(self) -> (StreamReader, Sender) {
        // A queue that is closed means a session that has ended: both halves will say so.
        drop(self.queue.send(Out::Reply(self.id)).await);
        let sender = Sender {
            id: self.id,
            queue: self.queue,
            _slot: self.slot,
        };
        (self.reader, sender)
    }

    /// Refuses it.
    pub async fn refuse(self) {
        drop(self.queue.send(Out::Reset(self.id, Reset::Refused)).await);
    }
}

/// What we send on a stream.
#[derive(Debug)]
pub struct Sender {
    id: u32,
    queue: mpsc::Sender<Out>,
    _slot: Slot,
}

impl Sender {
    /// Queues bytes; waits while the peer does not read.
    pub async fn send(&self, data: Bytes) -> Result<(), Closed> {
        self.pieces(data, false).await
    }

    /// The last bytes, then FIN: our half of the stream is closed.
    pub async fn finish(self, data: Bytes) -> Result<(), Closed> {
        self.pieces(data, true).await
    }

    /// Gives the stream up: the peer shall neither expect more nor send more.
    pub async fn reset(self) {
        drop(self.queue.send(Out::Reset(self.id, Reset::Internal)).await);
    }

    async fn pieces(&self, mut data: Bytes, fin: bool) -> Result<(), Closed> {
        loop {
            let piece = data.split_to(data.len().min(frame::MAX_DATA));
            let last = data.is_empty();
            let out = Out::Data {
                id: self.id,
                data: piece,
                fin: fin && last,
            };
            self.queue.send(out).await.map_err(|_| Closed)?;
            if last {
                return Ok(());
            }
        }
    }
}

/// Begins a session on a connection whose upgrade has been answered.
pub fn session<Io>(io: Io) -> (Session<Io>, Incoming)
where
    Io: AsyncRead + AsyncWrite,
{
    let (input, output) = tokio::io::split(io);
    let (sender, queue) = mpsc::channel(SEND_QUEUE);
    let (incoming, streams) = mpsc::channel(INCOMING);
    let activity = Activity::new();
    let budget = Budget::new();
    let session = Session {
        input,
        output,
        reader: reader::Reader::new(incoming, sender.downgrade(), activity.clone(), budget),
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
    /// When a byte last moved.
    #[must_use]
    pub fn activity(&self) -> Activity {
        self.activity.clone()
    }

    /// What was received and waits.
    #[cfg(test)]
    fn budget(&self) -> Budget {
        self.reader.budget()
    }

    /// Reads and writes until either side has ended the session.
    pub async fn run(self) -> Result<(), SessionError> {
        let Self {
            input,
            mut output,
            reader,
            queue,
            activity,
        } = self;
        let last = reader.last_id();
        let mut read = std::pin::pin!(reader.run(input));
        let first = tokio::select! {
            biased;
            ended = read.as_mut() => Err(ended),
            written = writer::run(&mut output, queue, last, activity.clone()) => Ok(written),
            () = activity.overdue() => return Err(SessionError::Idle),
        };
        let ended = match first {
            Ok(written) => {
                written?;
                // Closed last: closing before the peer has read all would lose what is on its way.
                let ended = tokio::time::timeout(LINGER, read).await;
                ended.unwrap_or(Ok(()))
            }
            // Closed too: TLS has an end of its own, and so has a WebSocket that carries us.
            Err(ended) => ended,
        };
        drop(tokio::time::timeout(LINGER, output.shutdown()).await);
        ended
    }
}
