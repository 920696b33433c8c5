//! A WebSocket server session that carries Kubernetes' channels. Knows nothing of what runs on them.
//!
//! Owner: the task that polls [`Session::run`], which reads, writes and answers pings. The channels are there from the
//! start: each one that the client may write has an [`StreamReader`], each one that it reads a [`Sender`]. As with SPDY a queue
//! that is full stops the reading of the socket, and all that waits is within one [`Budget`]. Messages of any size pass in
//! pieces. What is for a channel that the client may not write, or that does not exist, is let go, as upstream does.
//!
//! The end: when all senders are dropped, what is queued is written, then a close frame, and the peer gets [`LINGER`] to
//! close. A peer that closes first ends `run` at once, and with it every channel.

pub(crate) mod channel;
pub(crate) mod frame;
pub mod handshake;
#[cfg(test)]
mod tests;
pub mod tunnel;

use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures::FutureExt as _;
use knoc_link::bulk::Segments;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, WriteHalf};
use tokio::sync::mpsc;
use tracing::debug;

use crate::streams::{Activity, Budget, Closed, IDLE, StreamReader, StreamSender, stream};
pub use channel::Encoding;
use channel::{Messages, Said};
use frame::{Decoder, Event, Kind};

/// What is read from the socket at once, and so the largest piece of a message.
const CHUNK: usize = 64 << 10;
/// With less room than this the buffer is made anew.
const LEAST_ROOM: usize = CHUNK / 4;
/// Messages that wait to be written, of all channels together; each of at most 64 KiB.
const SEND_QUEUE: usize = 16;
/// When so much is encoded, it is written before more is taken.
const BATCH: usize = 128 << 10;
/// How long the peer may take to close after our close frame.
const LINGER: Duration = Duration::from_secs(2);
/// The code of an end in order.
const NORMAL: u16 = 1000;
/// The code for a peer that cannot be understood.
const PROTOCOL_ERROR: u16 = 1002;

/// Why a session ended before its end.
#[derive(Debug, Error)]
pub enum SocketError {
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
    /// A message cannot be read.
    #[error("understand the peer's messages")]
    Message {
        /// Which rule it breaks.
        #[source]
        source: channel::NotBase64,
    },
    /// No byte moved and no stream was opened for [`IDLE`].
    #[error("nothing moved for {} h", IDLE.as_secs() / 3600)]
    Idle,
}

/// What is to be written.
#[derive(Debug)]
enum Out {
    Data { channel: u8, data: Bytes },
    Pong(Bytes),
}

/// What we send on a channel.
#[derive(Debug, Clone)]
pub struct Sender {
    channel: u8,
    queue: mpsc::Sender<Out>,
    /// Of one message.
    most: usize,
}

impl Sender {
    /// Queues bytes; waits while the peer does not read. No bytes are no message.
    pub async fn send(&self, mut data: Bytes) -> Result<(), Closed> {
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(self.most));
            self.message(piece).await?;
        }
        Ok(())
    }

    /// An empty message: tells clients that the channels are open.
    pub async fn ready(&self) -> Result<(), Closed> {
        self.message(Bytes::new()).await
    }

    async fn message(&self, data: Bytes) -> Result<(), Closed> {
        let channel = self.channel;
        let out = Out::Data { channel, data };
        self.queue.send(out).await.map_err(|_| Closed)
    }
}

/// One connection; see the module.
#[derive(Debug)]
pub struct Session<Io> {
    io: Io,
    encoding: Encoding,
    /// By channel; none where the client may not write or has ended.
    senders: Vec<Option<StreamSender>>,
    budget: Budget,
    sender: mpsc::WeakSender<Out>,
    queue: mpsc::Receiver<Out>,
    activity: Activity,
}

/// The channels of a session, until they are taken.
#[derive(Debug)]
pub struct Channels {
    readers: Vec<Option<StreamReader>>,
    queue: mpsc::Sender<Out>,
    /// Of one message to the client.
    most: usize,
}

impl Channels {
    /// What the client writes on a channel; once.
    pub fn reader(&mut self, channel: u8) -> Option<StreamReader> {
        self.readers.get_mut(usize::from(channel))?.take()
    }

    /// What the client reads of a channel.
    #[must_use]
    pub fn sender(&self, channel: u8) -> Sender {
        Sender {
            channel,
            queue: self.queue.clone(),
            most: self.most,
        }
    }
}

/// Begins a session on a connection whose upgrade has been answered. `writable` says of each channel, by its number,
/// whether the client may write it.
pub fn session<Io>(io: Io, encoding: Encoding, writable: &[bool]) -> (Session<Io>, Channels)
where
    Io: AsyncRead + AsyncWrite,
{
    let budget = Budget::new();
    let (sender, queue) = mpsc::channel(SEND_QUEUE);
    let open = |writable: &bool| writable.then(|| stream(&budget)).unzip();
    let (senders, readers) = writable.iter().map(open).unzip();
    let session = Session {
        io,
        encoding,
        senders,
        budget: budget.clone(),
        sender: sender.downgrade(),
        queue,
        activity: Activity::new(),
    };
    let channels = Channels {
        readers,
        queue: sender,
        most: encoding.most(),
    };
    (session, channels)
}

impl<Io> Session<Io>
where
    Io: AsyncRead + AsyncWrite,
{
    /// When a byte last moved.
    pub fn activity(&self) -> Activity {
        self.activity.clone()
    }

    /// What was received and waits.
    #[cfg(test)]
    pub(crate) fn budget(&self) -> Budget {
        self.budget.clone()
    }

    /// Reads and writes until either side has ended the session.
    pub async fn run(self) -> Result<(), SocketError> {
        let (input, mut output) = tokio::io::split(self.io);
        let reader = Reader {
            messages: Messages::new(self.encoding),
            senders: self.senders,
            queue: self.sender,
            activity: self.activity.clone(),
            _budget: self.budget,
        };
        let mut read = std::pin::pin!(reader.run(input));
        let first = tokio::select! {
            biased;
            ended = read.as_mut() => Err(ended),
            written = write(&mut output, self.queue, self.encoding, &self.activity) => Ok(written),
            () = self.activity.overdue() => return Err(SocketError::Idle),
        };
        let ended = match first {
            Ok(written) => {
                written?;
                close(&mut output, NORMAL).await?;
                // Closed last: closing before the peer has read all would lose what is on its way.
                let ended = tokio::time::timeout(LINGER, read).await;
                ended.unwrap_or(Ok(()))
            }
            Err(Ok(())) => {
                // The answer to its close frame; it may be gone already.
                drop(tokio::time::timeout(LINGER, close(&mut output, NORMAL)).await);
                Ok(())
            }
            Err(Err(error)) => {
                drop(tokio::time::timeout(LINGER, close(&mut output, PROTOCOL_ERROR)).await);
                Err(error)
            }
        };
        drop(tokio::time::timeout(LINGER, output.shutdown()).await);
        ended
    }
}

/// The receiving direction.
#[derive(Debug)]
struct Reader {
    messages: Messages,
    senders: Vec<Option<StreamSender>>,
    /// Weak: the reader must not keep the session open.
    queue: mpsc::WeakSender<Out>,
    activity: Activity,
    _budget: Budget,
}

impl Reader {
    /// Reads until the peer closes or cannot be understood.
    async fn run(mut self, input: impl AsyncRead) -> Result<(), SocketError> {
        let mut input = std::pin::pin!(input);
        let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::new());
        loop {
            if buffer.capacity() - buffer.len() < LEAST_ROOM {
                buffer.reserve(CHUNK);
            }
            let read = input.read_buf(&mut buffer).await;
            if read.map_err(|source| SocketError::Read { source })? == 0 {
                return Ok(());
            }
            // TLS gives a record at a time: what is there already belongs to the same piece.
            while buffer.capacity() - buffer.len() >= LEAST_ROOM
                && let Some(Ok(1..)) = input.read_buf(&mut buffer).now_or_never()
            {}
            loop {
                let event = decoder.decode(&mut buffer);
                match event.map_err(|source| SocketError::Frame { source })? {
                    Some(Event::Close(code)) => {
                        debug!(?code, "the client closes its WebSocket");
                        return Ok(());
                    }
                    Some(event) => self.take(event).await?,
                    None => break,
                }
            }
        }
    }

    async fn take(&mut self, event: Event) -> Result<(), SocketError> {
        match event {
            Event::Data { data, last, .. } => {
                self.activity.touch();
                let said = self.messages.piece(data, last);
                match said.map_err(|source| SocketError::Message { source })? {
                    Some(Said::Data { channel, data }) => {
                        if let Some(Some(sender)) = self.senders.get(usize::from(channel)) {
                            sender.data(data).await;
                        }
                    }
                    Some(Said::Close { channel }) => {
                        let sender = self.senders.get_mut(usize::from(channel));
                        if let Some(sender) = sender.and_then(Option::take) {
                            sender.finish().await;
                        }
                    }
                    None => {}
                }
            }
            // One that finds the queue full is not answered: bytes are moving then.
            Event::Ping(payload) => {
                if let Some(queue) = self.queue.upgrade() {
                    drop(queue.try_send(Out::Pong(payload)));
                }
            }
            Event::Pong | Event::Close(_) => {}
        }
        Ok(())
    }
}

/// Writes until nobody can queue any more.
async fn write<Io: AsyncWrite>(
    output: &mut WriteHalf<Io>,
    mut queue: mpsc::Receiver<Out>,
    encoding: Encoding,
    activity: &Activity,
) -> Result<(), SocketError> {
    // Data stays the slices in which it came.
    let mut wire = Segments::default();
    while let Some(first) = queue.recv().await {
        let mut next = Some(first);
        while let Some(out) = next {
            match out {
                Out::Data { channel, data } => {
                    activity.touch();
                    channel::put(&mut wire, encoding, channel, data);
                }
                Out::Pong(payload) => {
                    frame::put_head(&mut wire, Kind::Pong, payload.len());
                    wire.put(payload);
                }
            }
            next = if wire.remaining() < BATCH {
                queue.try_recv().ok()
            } else {
                None
            };
        }
        flush(output, &mut wire).await?;
    }
    Ok(())
}

async fn close<Io: AsyncWrite>(output: &mut WriteHalf<Io>, code: u16) -> Result<(), SocketError> {
    let mut wire = Segments::default();
    frame::put_head(&mut wire, Kind::Close, 2);
    wire.put_u16(code);
    flush(output, &mut wire).await
}

async fn flush<Io: AsyncWrite>(
    output: &mut WriteHalf<Io>,
    wire: &mut Segments,
) -> Result<(), SocketError> {
    let written = async {
        output.write_all_buf(wire).await?;
        output.flush().await
    };
    written
        .await
        .map_err(|source| SocketError::Write { source })
}
