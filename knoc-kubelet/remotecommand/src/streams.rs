//! The streams of a client, whatever carries them: a SPDY or WebSocket session fills them, and relays read and write
//! them.
//!
//! The task that reads a connection holds a [`StreamSender`] for each stream, and a relay holds the [`StreamReader`] at
//! its other end; a [`StreamWriter`](crate::stream_writer::StreamWriter) is the opposite direction. The bytes that a
//! connection has received and nobody has read are bounded by its [`Budget`], however many streams it has: a full
//! budget stops reading from the socket. Nothing is ever dropped.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use knoc_proto::CHUNK;
use thiserror::Error;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};

/// How many pieces may wait in a stream; a further one stops reading from its connection.
const RECEIVE_QUEUE: usize = 8;
/// How many bytes may wait in all streams of a connection together: several times the bytes in flight between two hops.
pub(crate) const RECEIVE_BYTES: usize = 2 << 20;
/// The least weight of a piece: its entry in the queue and its allocation, so that empty pieces are not free.
const LEAST_WEIGHT: usize = 256;
/// Smaller pieces are copied out of the buffer into which they were read, because otherwise a small piece would keep
/// the whole buffer alive.
const COPIED: usize = 16 << 10;
/// How long a session may be idle: no stream is opened and no byte is transferred; pings do not count. The default of
/// the kubelet's `streamingConnectionIdleTimeout`
/// (<https://kubernetes.io/docs/reference/config-api/kubelet-config.v1beta1/>).
pub const IDLE: Duration = Duration::from_hours(4);

/// The time from the request to end a session until its connection is cut: enough for a status and for the client to
/// close.
pub const CLOSING_TIMEOUT: Duration = Duration::from_secs(3);

/// An event on the client's half of a stream.
#[derive(Debug)]
enum Item {
    /// Data, never empty. Its share of the budget is released when the data is read.
    Data {
        data: Bytes,
        _room: OwnedSemaphorePermit,
    },
    Fin,
    Reset,
}

/// How the client's half of a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The client has sent everything.
    Fin,
    /// The client has reset the stream.
    Reset,
    /// The connection has ended.
    Lost,
}

/// The number of bytes that a connection may still receive before some are read.
#[derive(Debug, Clone)]
pub(crate) struct Budget(Arc<Semaphore>);

impl Budget {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Semaphore::new(RECEIVE_BYTES)))
    }

    /// The bytes that were received and not read yet.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        RECEIVE_BYTES - self.0.available_permits()
    }
}

/// The session's end of a stream that the client writes.
#[derive(Debug)]
pub(crate) struct StreamSender {
    items: mpsc::Sender<Item>,
    budget: Budget,
}

/// Creates a stream that the client writes.
pub(crate) fn stream(budget: &Budget) -> (StreamSender, StreamReader) {
    let (queue, items) = mpsc::channel(RECEIVE_QUEUE);
    let sender = StreamSender {
        items: queue,
        budget: budget.clone(),
    };
    let reader = StreamReader {
        items,
        ahead: None,
        end: None,
    };
    (sender, reader)
}

impl StreamSender {
    /// Passes on a piece. Waits while the relay does not read, or while the connection holds too many bytes. If the
    /// [`StreamReader`] was dropped, the data is dropped too.
    pub(crate) async fn data(&self, data: Bytes) {
        if data.is_empty() || self.items.is_closed() {
            return;
        }
        let data = if data.len() < COPIED {
            Bytes::copy_from_slice(&data)
        } else {
            data
        };
        let weight = data.len().clamp(LEAST_WEIGHT, RECEIVE_BYTES);
        let weight = u32::try_from(weight).unwrap_or(u32::MAX);
        let room = tokio::select! {
            biased;
            // Queued data is released with the receiver, but other streams may hold the budget.
            () = self.items.closed() => return,
            room = Arc::clone(&self.budget.0).acquire_many_owned(weight) => room,
        };
        if let Ok(room) = room {
            drop(self.items.send(Item::Data { data, _room: room }).await);
        }
    }

    /// Whether nobody reads the stream any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.items.is_closed()
    }

    /// Reports that the client has sent everything.
    pub(crate) async fn finish(self) {
        drop(self.items.send(Item::Fin).await);
    }

    /// Reports that the client has reset the stream.
    pub(crate) async fn reset(self) {
        drop(self.items.send(Item::Reset).await);
    }
}

/// The receiving half of a stream: what a client sends.
#[derive(Debug)]
pub struct StreamReader {
    items: mpsc::Receiver<Item>,
    /// A piece that was taken but did not fit the previous message.
    ahead: Option<Bytes>,
    end: Option<End>,
}

impl StreamReader {
    /// The next bytes, never empty, or how the stream ended (every later call returns the same end). Waiting pieces are
    /// joined while they fit one message ([`CHUNK`]): each message costs every process that passes it on more than the
    /// copy. Cancel safe.
    pub async fn next(&mut self) -> Result<Bytes, End> {
        let first = match self.ahead.take() {
            Some(data) => data,
            None => self.piece().await?,
        };
        let (mut length, mut more) = (first.len(), Vec::new());
        while length < CHUNK
            && self.end.is_none()
            && let Ok(item) = self.items.try_recv()
        {
            match self.take(item) {
                Some(data) if length + data.len() <= CHUNK => {
                    length += data.len();
                    more.push(data);
                }
                ahead => {
                    self.ahead = ahead;
                    break;
                }
            }
        }
        if more.is_empty() {
            return Ok(first);
        }
        let mut joined = BytesMut::with_capacity(length);
        joined.extend_from_slice(&first);
        for data in &more {
            joined.extend_from_slice(data);
        }
        Ok(joined.freeze())
    }

    async fn piece(&mut self) -> Result<Bytes, End> {
        if let Some(end) = self.end {
            return Err(end);
        }
        let item = self.items.recv().await;
        let data = item.and_then(|item| self.take(item));
        data.ok_or_else(|| *self.end.get_or_insert(End::Lost))
    }

    /// The bytes of an item; `None` if it is an end.
    fn take(&mut self, item: Item) -> Option<Bytes> {
        self.end = match item {
            Item::Data { data, .. } => return Some(data),
            Item::Fin => Some(End::Fin),
            Item::Reset => Some(End::Reset),
        };
        None
    }
}

/// The connection has ended, so nothing more can be sent.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the connection has ended")]
pub struct Closed;

/// The record of when a byte was last transferred, shared by both directions of a connection.
#[derive(Debug, Clone)]
pub struct Activity {
    start: Instant,
    last: Arc<AtomicU64>,
}

impl Activity {
    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            last: Arc::default(),
        }
    }

    pub(crate) fn touch(&self) {
        let elapsed = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(elapsed, Ordering::Relaxed);
    }

    /// Returns once nothing was transferred for [`IDLE`]. Cancel safe.
    pub async fn idle(&self) {
        self.still(IDLE).await;
    }

    /// Returns once nothing was transferred for [`IDLE`] and the relay has not ended the session since.
    pub(crate) async fn overdue(&self) {
        self.still(IDLE + CLOSING_TIMEOUT).await;
    }

    async fn still(&self, time: Duration) {
        loop {
            let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
            let deadline = self.start + last + time;
            if deadline <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(deadline).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn waiting_bytes_are_bounded_over_all_streams_of_a_connection() {
        let budget = Budget::new();
        let piece = Bytes::from(vec![1; 64 << 10]);
        let streams: Vec<_> = (0..100).map(|_| stream(&budget)).collect();
        let mut taken = 0;
        for (sender, _) in &streams {
            for _ in 1..RECEIVE_QUEUE {
                taken += usize::from(sender.data(piece.clone()).now_or_never().is_some());
            }
        }
        assert_eq!(
            taken,
            RECEIVE_BYTES >> 16,
            "no stream is full, the connection is"
        );
        assert_eq!(budget.held(), RECEIVE_BYTES);
        drop(streams);
        assert_eq!(budget.held(), 0, "data that nobody will read is dropped");
    }

    #[tokio::test]
    async fn reading_releases_budget_and_a_small_piece_keeps_no_large_buffer() {
        let budget = Budget::new();
        let (sender, mut reader) = stream(&budget);
        let buffer = Bytes::from(vec![1; 64 << 10]);
        sender.data(buffer.slice(..1)).await;
        assert!(buffer.is_unique(), "the piece is a copy");
        assert_eq!(budget.held(), LEAST_WEIGHT);
        assert_eq!(reader.next().await.unwrap().len(), 1);
        assert_eq!(budget.held(), 0);
        sender.data(Bytes::new()).await;
        sender.finish().await;
        assert_eq!(reader.next().await, Err(End::Fin));
        assert_eq!(reader.next().await, Err(End::Fin));
    }

    #[tokio::test]
    async fn pieces_that_wait_are_joined_up_to_a_message() {
        let budget = Budget::new();
        let (sender, mut reader) = stream(&budget);
        let piece = |byte: u8, length: usize| Bytes::from(vec![byte; length]);
        for (byte, length) in [(1, 1), (2, CHUNK - 1), (3, 1), (4, CHUNK), (5, 2)] {
            sender.data(piece(byte, length)).await;
        }
        sender.finish().await;
        let first = reader.next().await.unwrap();
        assert_eq!((first.len(), first[0], first[CHUNK - 1]), (CHUNK, 1, 2));
        assert_eq!(reader.next().await.unwrap(), piece(3, 1));
        assert_eq!(reader.next().await.unwrap(), piece(4, CHUNK));
        assert_eq!(reader.next().await.unwrap(), piece(5, 2));
        assert_eq!(reader.next().await, Err(End::Fin));
        assert_eq!(budget.held(), 0);
    }

    #[tokio::test]
    async fn a_large_piece_is_passed_on_without_a_copy() {
        let budget = Budget::new();
        let (sender, mut reader) = stream(&budget);
        let large = Bytes::from(vec![1; 2 * CHUNK]);
        sender.data(large.clone()).await;
        sender.data(Bytes::from("x")).await;
        assert_eq!(reader.next().await.unwrap().as_ptr(), large.as_ptr());
        assert_eq!(reader.next().await.unwrap(), "x");
    }

    #[tokio::test]
    async fn ends_are_distinguished_and_come_after_the_bytes() {
        let budget = Budget::new();
        for (how, end) in [(0, End::Fin), (1, End::Reset), (2, End::Lost)] {
            let (sender, mut reader) = stream(&budget);
            sender.data(Bytes::from("x")).await;
            match how {
                0 => sender.finish().await,
                1 => sender.reset().await,
                _ => drop(sender),
            }
            assert_eq!(reader.next().await.unwrap(), "x");
            assert_eq!(reader.next().await, Err(end));
        }
    }

    #[tokio::test]
    async fn data_of_a_stream_that_nobody_reads_is_dropped() {
        let budget = Budget::new();
        let (sender, reader) = stream(&budget);
        let (other, _held) = stream(&budget);
        for _ in 1..RECEIVE_QUEUE {
            other.data(Bytes::from(vec![0; 64 << 10])).await;
        }
        drop(reader);
        for _ in 0..1000 {
            sender.data(Bytes::from(vec![0; 64 << 10])).await;
        }
    }
}
