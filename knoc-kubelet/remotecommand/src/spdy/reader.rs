//! The receiving direction of a session, which distributes frames to streams.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    sync::{Semaphore, mpsc},
    time::Instant,
};

use super::{
    MAX_STREAMS, OPEN_BURST, OPEN_RATE, SessionError, Slot, Stream,
    frame::{Decoder, Frame, Reset},
    headers::Inflater,
    writer::Out,
};
use crate::streams::{self, Activity, Budget, StreamSender};

/// How many bytes are read from the socket at once, and so the size of the largest piece of a data frame.
const CHUNK: usize = 64 << 10;
/// If the buffer has less free space than this, it is reallocated.
const LEAST_ROOM: usize = CHUNK / 4;

/// The state of the receiving direction, owned by the session's task.
#[derive(Debug)]
pub(super) struct Reader {
    decoder: Decoder,
    inflater: Inflater,
    /// The streams whose half the peer has not closed, each with its permit of [`MAX_STREAMS`]. Our half may have
    /// ended: see `sweep`.
    streams: HashMap<u32, (StreamSender, Slot)>,
    slots: Arc<Semaphore>,
    budget: Budget,
    pace: OpenRate,
    last: Arc<AtomicU32>,
    /// `None` after the peer's GOAWAY.
    incoming: Option<mpsc::Sender<Stream>>,
    /// Weak, because the reader must not keep the session open.
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
            pace: OpenRate::new(),
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

    /// The highest stream id that the peer has used, for our GOAWAY.
    pub(super) fn last_id(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.last)
    }

    /// Reads until the peer closes the connection or violates the protocol.
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
            // Odd ids are the peer's pings. A ping is not answered if the queue is full: then data is being transferred
            // anyway.
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
            // Nobody accepts streams any more.
            stream.refuse().await;
        } else if fin {
            sender.finish().await;
        } else {
            self.streams.insert(id, (sender, slot));
        }
    }

    /// Forgets streams of which nobody holds a half, such as those that we have reset: a peer such as spdystream sends
    /// nothing more about them. Data that still arrives on them is dropped.
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

/// A token bucket that limits how fast streams are opened: [`OPEN_BURST`] deep, refilled at [`OPEN_RATE`].
#[derive(Debug)]
struct OpenRate {
    /// When the bucket would be full again.
    full_at: Instant,
}

impl OpenRate {
    fn new() -> Self {
        Self {
            full_at: Instant::now(),
        }
    }

    /// Takes a token, and waits for one if the bucket is empty.
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
        let mut pace = OpenRate::new();
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
