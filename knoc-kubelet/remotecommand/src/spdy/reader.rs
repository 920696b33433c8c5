//! The receiving direction of a session: frames to streams.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use super::frame::{Decoder, Frame, Reset};
use super::headers::Inflater;
use super::writer::Out;
use super::{MAX_STREAMS, OPEN_BURST, OPEN_RATE, SessionError, Slot, Stream};
use crate::streams::{self, Activity, Budget, StreamSender};

/// What is read from the socket at once, and so the largest piece of a data frame.
const CHUNK: usize = 64 << 10;
/// With less room than this the buffer is made anew.
const LEAST_ROOM: usize = CHUNK / 4;

/// Owned by the session's task.
#[derive(Debug)]
pub(super) struct Reader {
    decoder: Decoder,
    inflater: Inflater,
    /// Streams whose peer half is open, each with its place among [`MAX_STREAMS`]. Ours may have ended: see `sweep`.
    streams: HashMap<u32, (StreamSender, Slot)>,
    slots: Arc<Semaphore>,
    budget: Budget,
    pace: Pace,
    last: Arc<AtomicU32>,
    /// None after the peer's GOAWAY.
    incoming: Option<mpsc::Sender<Stream>>,
    /// Weak: the reader must not keep the session open.
    queue: mpsc::WeakSender<Out>,
    activity: Activity,
}

impl Reader {
    pub(super) fn new(
        incoming: mpsc::Sender<Stream>,
        queue: mpsc::WeakSender<Out>,
        activity: Activity,
        budget: Budget,
    ) -> Self {
        Self {
            decoder: Decoder::default(),
            inflater: Inflater::new(),
            streams: HashMap::new(),
            slots: Arc::new(Semaphore::new(MAX_STREAMS)),
            budget,
            pace: Pace::new(),
            last: Arc::default(),
            incoming: Some(incoming),
            queue,
            activity,
        }
    }

    #[cfg(test)]
    pub(super) fn budget(&self) -> Budget {
        self.budget.clone()
    }

    /// The highest stream id seen so far, for GOAWAY.
    pub(super) fn last_id(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.last)
    }

    /// Reads until the peer closes or cannot be understood.
    pub(super) async fn run(mut self, input: impl AsyncRead) -> Result<(), SessionError> {
        let mut input = std::pin::pin!(input);
        let mut buffer = BytesMut::new();
        loop {
            if buffer.capacity() - buffer.len() < LEAST_ROOM {
                buffer.reserve(CHUNK);
            }
            let read = input.read_buf(&mut buffer).await;
            if read.map_err(|source| SessionError::Read { source })? == 0 {
                return Ok(());
            }
            loop {
                let decoded = self.decoder.decode(&mut buffer);
                match decoded.map_err(|source| SessionError::Frame { source })? {
                    Some(frame) => self.take(frame).await?,
                    None => break,
                }
            }
        }
    }

    async fn take(&mut self, frame: Frame) -> Result<(), SessionError> {
        let inflated = |source| SessionError::Headers { source };
        match frame {
            Frame::SynStream { id, fin, block } => {
                self.activity.touch();
                let headers = self.inflater.headers(&block).map_err(inflated)?;
                self.open(id, fin, headers).await;
            }
            Frame::Data { id, data, fin } => {
                self.activity.touch();
                self.data(id, data, fin).await;
            }
            Frame::Headers { id, fin, block } => {
                self.inflater.headers(&block).map_err(inflated)?;
                if fin {
                    self.finish(id).await;
                }
            }
            Frame::SynReply { block } => drop(self.inflater.headers(&block).map_err(inflated)?),
            Frame::Reset { id } => {
                self.activity.touch();
                if let Some((sender, _)) = self.streams.remove(&id) {
                    sender.reset().await;
                }
            }
            // Odd ones are the peer's. One that finds the queue full is not answered: bytes are moving then.
            Frame::Ping { id } => {
                if id % 2 == 1
                    && let Some(queue) = self.queue.upgrade()
                {
                    drop(queue.try_send(Out::Ping(id)));
                }
            }
            Frame::GoAway => self.incoming = None,
            Frame::Other => {}
        }
        Ok(())
    }

    async fn open(&mut self, id: u32, fin: bool, headers: super::Headers) {
        self.pace.wait().await;
        let Some(queue) = self.queue.upgrade() else {
            return;
        };
        let last = self.last.load(Ordering::Relaxed);
        self.last.store(last.max(id), Ordering::Relaxed);
        let wrong = id.is_multiple_of(2) || id <= last;
        if self.slots.available_permits() == 0 {
            self.sweep();
        }
        let slot = Arc::clone(&self.slots).try_acquire_owned();
        let (slot, incoming) = match (slot, &self.incoming) {
            (Ok(slot), Some(incoming)) if !wrong => (Arc::new(slot), incoming),
            (_, _) => {
                let status = if wrong {
                    Reset::Protocol
                } else {
                    Reset::Refused
                };
                drop(queue.send(Out::Reset(id, status)).await);
                return;
            }
        };
        let (sender, reader) = streams::stream(&self.budget);
        let stream = Stream {
            id,
            headers,
            reader,
            queue,
            slot: Arc::clone(&slot),
        };
        if let Err(mpsc::error::SendError(stream)) = incoming.send(stream).await {
            // Nobody takes streams any more.
            stream.refuse().await;
        } else if fin {
            sender.finish().await;
        } else {
            self.streams.insert(id, (sender, slot));
        }
    }

    /// Lets go of streams of which we hold neither half, such as those that we have reset: a peer such as spdystream
    /// says nothing more of them. What still comes on them is let go.
    fn sweep(&mut self) {
        self.streams
            .retain(|_, (sender, slot)| !sender.is_closed() || Arc::strong_count(slot) > 1);
    }

    async fn data(&mut self, id: u32, data: Bytes, fin: bool) {
        if let Some((sender, _)) = self.streams.get(&id) {
            sender.data(data).await;
            if fin {
                self.finish(id).await;
            }
        } else if id > self.last.load(Ordering::Relaxed)
            && let Some(queue) = self.queue.upgrade()
        {
            drop(queue.try_send(Out::Reset(id, Reset::InvalidStream)));
        }
    }

    async fn finish(&mut self, id: u32) {
        if let Some((sender, _)) = self.streams.remove(&id) {
            sender.finish().await;
        }
    }
}

/// A bucket of streams that may be opened: [`OPEN_BURST`] deep, filled at [`OPEN_RATE`].
#[derive(Debug)]
struct Pace {
    /// When the bucket would be full again.
    full_at: Instant,
}

impl Pace {
    fn new() -> Self {
        Self {
            full_at: Instant::now(),
        }
    }

    /// Takes one, waiting for it where the bucket is empty.
    async fn wait(&mut self) {
        let each = Duration::from_secs(1) / OPEN_RATE;
        let now = Instant::now();
        self.full_at = self.full_at.max(now) + each;
        let empty_until = self.full_at.checked_sub(each * OPEN_BURST);
        if let Some(until) = empty_until.filter(|until| *until > now) {
            tokio::time::sleep_until(until).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_of_streams_then_the_rate() {
        let start = Instant::now();
        let mut pace = Pace::new();
        for _ in 0..OPEN_BURST {
            pace.wait().await;
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        for _ in 0..2 * OPEN_RATE {
            pace.wait().await;
        }
        let took = start.elapsed();
        assert!((1900..2100).contains(&took.as_millis()), "{took:?}");
    }
}
