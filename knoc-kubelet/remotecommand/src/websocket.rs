//! The server side of a WebSocket session that carries Kubernetes' channels. It does not know what runs on them.
//!
//! The task that polls [`Session::run`] owns the session: it reads, writes and answers pings. The channels exist from
//! the start: each channel that the client may write has a [`StreamReader`], and each that it reads has a [`Sender`].
//! As with SPDY, a full queue stops reading from the socket, and all buffered bytes are within one [`Budget`]. Messages
//! of any size are passed on in pieces. Data for a channel that the client may not write, or that does not exist, is
//! dropped, as upstream does.
//!
//! When all senders have been dropped, the queued data and a close frame are written, and the peer gets [`LINGER`] to
//! close the connection. A peer that closes first ends `run` and every channel at once.

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
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, WriteHalf},
    sync::mpsc,
};
use tracing::debug;

use self::{
    channel::{Meaning, Messages},
    frame::{Decoder, Event, Kind},
};
use crate::streams::{Activity, Budget, Closed, IDLE, StreamReader, StreamSender, stream};

pub use channel::Encoding;

/// How many bytes are read from the socket at once, and so the size of the largest piece of a message.
const CHUNK: usize = 64 << 10;
/// If the buffer has less free space than this, it is reallocated.
const LEAST_ROOM: usize = CHUNK / 4;
/// How many messages of all channels together may wait to be written, each of at most 64 KiB.
const SEND_QUEUE: usize = 16;
/// Once this many bytes are encoded, they are written before more messages are taken.
const BATCH: usize = 128 << 10;
/// How long the peer may take to close the connection after our close frame.
const LINGER: Duration = Duration::from_secs(2);
/// The close code of a normal end (RFC 6455, section 7.4.1).
const NORMAL: u16 = 1000;
/// The close code for a peer that violates the protocol.
const PROTOCOL_ERROR: u16 = 1002;

/// Why a session ended abnormally.
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
    /// The peer violates the framing protocol.
    #[error("decode the peer's frames")]
    Frame {
        /// The rule that it violates.
        #[source]
        source: frame::FrameError,
    },
    /// A message cannot be read.
    #[error("decode the peer's messages")]
    Message {
        /// The rule that it violates.
        #[source]
        source: channel::NotBase64,
    },
    /// No byte was transferred and no stream was opened for [`IDLE`].
    #[error("no data was transferred for {} h", IDLE.as_secs() / 3600)]
    Idle,
}

/// A message that is to be written.
#[derive(Debug)]
enum Out {
    Data { channel: u8, data: Bytes },
    Pong(Bytes),
}

/// The sending half of a channel.
#[derive(Debug, Clone)]
pub struct Sender {
    channel: u8,
    queue: mpsc::Sender<Out>,
    /// The most bytes of one message.
    most: usize,
}

impl Sender {
    /// Queues bytes, and waits while the peer does not read. Empty data is not sent. Not cancel safe: part of the bytes
    /// may be queued.
    pub async fn send(&self, mut data: Bytes) -> Result<(), Closed> {
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(self.most));
            self.message(piece).await?;
        }
        Ok(())
    }

    /// Sends an empty message, which tells clients that the channels are open.
    pub async fn ready(&self) -> Result<(), Closed> {
        self.message(Bytes::new()).await
    }

    async fn message(&self, data: Bytes) -> Result<(), Closed> {
        let channel = self.channel;
        let out = Out::Data { channel, data };
        self.queue.send(out).await.map_err(|_| Closed)
    }
}

/// A session on one connection; see the module documentation.
#[derive(Debug)]
pub struct Session<Io> {
    io: Io,
    encoding: Encoding,
    /// The client's data by channel; `None` if the client may not write the channel or has ended it.
    senders: Vec<Option<StreamSender>>,
    budget: Budget,
    sender: mpsc::WeakSender<Out>,
    queue: mpsc::Receiver<Out>,
    activity: Activity,
}

/// The channels of a session, each of which can be taken once.
#[derive(Debug)]
pub struct Channels {
    readers: Vec<Option<StreamReader>>,
    queue: mpsc::Sender<Out>,
    /// The most bytes of one message to the client.
    most: usize,
}

impl Channels {
    /// Takes the half of a channel that the client writes; `None` if it was taken before or the client may not write
    /// it.
    pub fn reader(&mut self, channel: u8) -> Option<StreamReader> {
        self.readers.get_mut(usize::from(channel))?.take()
    }

    /// The half of a channel that the client reads.
    #[must_use]
    pub fn sender(&self, channel: u8) -> Sender {
        Sender {
            channel,
            queue: self.queue.clone(),
            most: self.most,
        }
    }
}

/// Starts a session on a connection whose upgrade has been answered. `writable` says for each channel number whether
/// the client may write the channel.
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
    /// The record of when a byte was last transferred.
    pub fn activity(&self) -> Activity {
        self.activity.clone()
    }

    /// The bytes that were received and not read yet.
    #[cfg(test)]
    pub(crate) fn budget(&self) -> Budget {
        self.budget.clone()
    }

    /// Reads and writes until either side has ended the session. Not cancel safe: dropping the future ends the session
    /// without a close frame.
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
                // The connection is closed last: closing it before the peer has read everything would lose data in
                // flight.
                let ended = tokio::time::timeout(LINGER, read).await;
                ended.unwrap_or(Ok(()))
            }
            Err(Ok(())) => {
                // The answer to the peer's close frame; the peer may have left already.
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
    /// Weak, because the reader must not keep the session open.
    queue: mpsc::WeakSender<Out>,
    activity: Activity,
    _budget: Budget,
}

impl Reader {
    /// Reads until the peer closes the connection or violates the protocol.
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
            // TLS yields one record at a time: records that are already there are added to the same piece.
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
                let meaning = self.messages.piece(data, last);
                match meaning.map_err(|source| SocketError::Message { source })? {
                    Some(Meaning::Data { channel, data }) => {
                        if let Some(Some(sender)) = self.senders.get(usize::from(channel)) {
                            sender.data(data).await;
                        }
                    }
                    Some(Meaning::Close { channel }) => {
                        let sender = self.senders.get_mut(usize::from(channel));
                        if let Some(sender) = sender.and_then(Option::take) {
                            sender.finish().await;
                        }
                    }
                    None => {}
                }
            }
            // A ping is not answered if the queue is full: then data is being transferred anyway.
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

/// Writes until no sender is left.
async fn write<Io: AsyncWrite>(
    output: &mut WriteHalf<Io>,
    mut queue: mpsc::Receiver<Out>,
    encoding: Encoding,
    activity: &Activity,
) -> Result<(), SocketError> {
    // Data is written in the slices in which it was queued.
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
