//! The server side of a SPDY/3.1 session over any byte stream, as Go's spdystream expects it. It knows nothing of
//! Kubernetes.
//!
//! The task that polls [`Session::run`] owns the session: it reads, writes and answers pings. [`Incoming`] yields the
//! streams that the peer opens. Each has a bounded queue of received data, and all together have one [`Budget`]. A full
//! queue stops reading from the socket: nothing is ever dropped. Since the peer does not implement flow control, one
//! slow stream stalls its connection (as in every kubelet), but no other connection.
//!
//! When `Incoming` and all halves of streams have been dropped, the queued data and a GOAWAY are written, and the peer
//! gets [`LINGER`] to close the connection. A peer that closes first ends every stream at once, and `run` when our side
//! is shut down. A GOAWAY of the peer ends `Incoming`, while open streams continue.
//!
//! A session never opens streams of its own, never waits for WINDOW_UPDATE, and never loses the state of the header
//! compression because of a refused stream.

pub(crate) mod frame;
pub(crate) mod headers;
#[cfg(any(test, feature = "test-peer"))]
pub mod peer;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf},
    sync::{OwnedSemaphorePermit, mpsc},
};

use self::{frame::Reset, writer::Out};
use crate::streams::{Activity, Budget, Closed, IDLE, StreamReader};

pub use headers::Headers;

/// How many streams the peer may have open at once; a port-forward of a browser has some dozens.
const MAX_STREAMS: usize = 1024;
/// How many streams may wait in [`Incoming`]; a further one stops reading.
const INCOMING: usize = 16;
/// How many streams a peer may open at once after a pause.
const OPEN_BURST: u32 = 1024;
/// How many streams a peer may open per second in the long run; if it opens more, its socket is not read. Each costs a
/// call to the agent.
const OPEN_RATE: u32 = 1000;
/// How many frames of all streams together may wait to be written, each of at most [`frame::MAX_DATA`], so 1 MiB in
/// all.
const SEND_QUEUE: usize = 16;
/// How long the peer may take to close the connection after our GOAWAY.
const LINGER: Duration = Duration::from_secs(2);

/// Why a session ended abnormally.
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
    /// The peer violates the framing protocol.
    #[error("decode the peer's frames")]
    Frame {
        /// The rule that it violates.
        #[source]
        source: frame::FrameError,
    },
    /// A header block cannot be read.
    #[error("decode the peer's headers")]
    Headers {
        /// The rule that it violates.
        #[source]
        source: headers::HeaderError,
    },
    /// No byte was transferred and no stream was opened for [`IDLE`].
    #[error("no data was transferred for {} h", IDLE.as_secs() / 3600)]
    Idle,
}

/// A session on one connection; see the module documentation.
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
    /// Keeps the session open while it has no streams.
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

/// A stream that the peer has opened and that has not been answered.
#[derive(Debug)]
pub struct Stream {
    id: u32,
    headers: Headers,
    reader: StreamReader,
    queue: mpsc::Sender<Out>,
    slot: Slot,
}

impl Stream {
    /// The stream id, which the peer has chosen.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The headers with which the peer opened it.
    #[must_use]
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// Accepts the stream without response headers, as the peer expects; then both halves are open.
    pub async fn accept(self) -> (StreamReader, Sender) {
        // If the queue is closed, the session has ended, and both halves will report that.
        drop(self.queue.send(Out::Reply(self.id)).await);
        let sender = Sender {
            id: self.id,
            queue: self.queue,
            _slot: self.slot,
        };
        (self.reader, sender)
    }

    /// Refuses the stream.
    pub async fn refuse(self) {
        drop(self.queue.send(Out::Reset(self.id, Reset::Refused)).await);
    }
}

/// The sending half of a stream.
#[derive(Debug)]
pub struct Sender {
    id: u32,
    queue: mpsc::Sender<Out>,
    _slot: Slot,
}

impl Sender {
    /// Queues bytes, and waits while the peer does not read. Not cancel safe: part of the bytes may be queued.
    pub async fn send(&self, data: Bytes) -> Result<(), Closed> {
        self.pieces(data, false).await
    }

    /// Sends the last bytes and FIN, which closes our half of the stream.
    pub async fn finish(self, data: Bytes) -> Result<(), Closed> {
        self.pieces(data, true).await
    }

    /// Resets the stream: the peer must neither expect nor send more data.
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

/// Starts a session on a connection whose upgrade has been answered.
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
    /// The record of when a byte was last transferred.
    #[must_use]
    pub fn activity(&self) -> Activity {
        self.activity.clone()
    }

    /// The bytes that were received and not read yet.
    #[cfg(test)]
    fn budget(&self) -> Budget {
        self.reader.budget()
    }

    /// Reads and writes until either side has ended the session. Not cancel safe: dropping the future ends the session
    /// without a GOAWAY.
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
                // The connection is closed last: closing it before the peer has read everything would lose data in
                // flight.
                let ended = tokio::time::timeout(LINGER, read).await;
                ended.unwrap_or(Ok(()))
            }
            // It is also shut down: TLS has a close message of its own, and so has a WebSocket that carries the
            // session.
            Err(ended) => ended,
        };
        drop(tokio::time::timeout(LINGER, output.shutdown()).await);
        ended
    }
}
