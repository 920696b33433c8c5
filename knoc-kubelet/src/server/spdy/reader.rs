//! The receiving direction of a session: frames to streams.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::sync::mpsc;

use super::frame::{Decoder, Frame, Reset};
use super::headers::Inflater;
use super::writer::Out;
use super::{Activity, MAX_STREAMS, RECEIVE_QUEUE, SessionError, Stream};

/// What is read from the socket at once, and so the largest piece of a data frame.
pub(super) const CHUNK: usize = 64 << 10;

/// Owned by the session's task.
#[derive(Debug)]
pub(super) struct Reader {
    decoder: Decoder,
    inflater: Inflater,
    /// Streams whose peer half is open.
    streams: HashMap<u32, mpsc::Sender<Bytes>>,
    last: Arc<AtomicU32>,
    incoming: mpsc::Sender<Stream>,
    /// Weak: the reader must not keep the session open.
    queue: mpsc::WeakSender<Out>,
    activity: Activity,
}

impl Reader {
    pub(super) fn new(
        incoming: mpsc::Sender<Stream>,
        queue: mpsc::WeakSender<Out>,
        activity: Activity,
    ) -> Self {
        Self {
            decoder: Decoder::default(),
            inflater: Inflater::new(),
            streams: HashMap::new(),
            last: Arc::default(),
            incoming,
            queue,
            activity,
        }
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
            buffer.reserve(CHUNK);
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
                    self.streams.remove(&id);
                }
            }
            Frame::SynReply { block } => drop(self.inflater.headers(&block).map_err(inflated)?),
            Frame::Reset { id } => {
                self.activity.touch();
                self.streams.remove(&id);
            }
            // Odd ones are the peer's. One that finds the queue full is not answered: bytes are moving then.
            Frame::Ping { id } => {
                if id % 2 == 1
                    && let Some(queue) = self.queue.upgrade()
                {
                    drop(queue.try_send(Out::Ping(id)));
                }
            }
            Frame::GoAway | Frame::Other => {}
        }
        Ok(())
    }

    async fn open(&mut self, id: u32, fin: bool, headers: super::Headers) {
        let Some(queue) = self.queue.upgrade() else {
            return;
        };
        let last = self.last.load(Ordering::Relaxed);
        let refusal = if id.is_multiple_of(2) || id <= last {
            Some(Reset::Protocol)
        } else if self.streams.len() >= MAX_STREAMS {
            Some(Reset::Refused)
        } else {
            None
        };
        self.last.store(last.max(id), Ordering::Relaxed);
        if let Some(status) = refusal {
            drop(queue.send(Out::Reset(id, status)).await);
            return;
        }
        let (sender, receiver) = mpsc::channel(RECEIVE_QUEUE);
        let stream = Stream {
            id,
            headers,
            receiver,
            queue,
        };
        if let Err(mpsc::error::SendError(stream)) = self.incoming.send(stream).await {
            // Nobody takes streams any more.
            stream.refuse().await;
        } else if !fin {
            self.streams.insert(id, sender);
        }
    }

    async fn data(&mut self, id: u32, data: Bytes, fin: bool) {
        if let Some(stream) = self.streams.get(&id) {
            // A receiver that was dropped wants no more; the peer may go on.
            if !data.is_empty() {
                drop(stream.send(data).await);
            }
            if fin {
                self.streams.remove(&id);
            }
        } else if id > self.last.load(Ordering::Relaxed)
            && let Some(queue) = self.queue.upgrade()
        {
            drop(queue.try_send(Out::Reset(id, Reset::InvalidStream)));
        }
    }
}
