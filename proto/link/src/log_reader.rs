//! Reads a container's log over a link that may be lost meanwhile, without a lost or doubled byte.
//!
//! Each chunk says where the next one begins. If the stream breaks, the request is sent again with that position, over
//! whatever connection there is by then, until the peer answers or [`GIVE_UP`] has passed. A peer that sends no positions
//! is too old for that; its log ends with the first error.
//!
//! Nothing runs in the background: a reader that is dropped asks no more.
use std::{future::Future, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use knoc_proto::{pb, reason::ErrorReason};
use tokio::time::Instant;
use tonic::{Code, Status};

/// The pause before the first attempt to continue; each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MOST: Duration = Duration::from_secs(5);
/// How long a log may be interrupted. An agent that moves to another host needs two minutes at most.
pub const GIVE_UP: Duration = Duration::from_mins(5);

/// Where a log comes from.
pub trait Source: Send + 'static {
    /// The chunks of one request.
    type Chunks: Stream<Item = Result<pb::LogChunk, Status>> + Send + Unpin + 'static;

    /// Sends the request over a connection that is up, or can be opened.
    fn open(
        &self,
        request: pb::ReadLogsRequest,
    ) -> impl Future<Output = Result<Self::Chunks, Status>> + Send;

    /// Fails if an interrupted log is no longer wanted, for example because its pod was deleted.
    fn wanted(&self) -> Result<(), Status> {
        Ok(())
    }

    /// The log was interrupted with this status, and will be continued.
    fn interrupted(&self, status: &Status);
}

/// Sends the request; fails if the first answer is an error. The bytes of the log follow; the last item is an error if the
/// log is not complete. Cancel safe.
pub async fn read<S: Source>(
    source: S,
    mut request: pb::ReadLogsRequest,
) -> Result<impl Stream<Item = Result<Bytes, Status>> + Send + use<S>, Status> {
    request.positions = true;
    let chunks = source.open(request.clone()).await?;
    let reader = Reader {
        source,
        request,
        chunks: Some(chunks),
        opened: Instant::now(),
        lost: None,
        pause: PAUSE,
    };
    Ok(stream::unfold(reader, async |mut reader| {
        let item = reader.next().await?;
        if item.is_err() {
            reader.chunks = None;
        }
        Some((item, reader))
    }))
}

struct Reader<S: Source> {
    source: S,
    /// Its `from` is the position that was reached; None if the peer has sent none.
    request: pb::ReadLogsRequest,
    /// None once the log has ended.
    chunks: Option<S::Chunks>,
    /// When `chunks` was opened.
    opened: Instant,
    /// When the log was interrupted, until a chunk comes again.
    lost: Option<Instant>,
    pause: Duration,
}

impl<S: Source> Reader<S> {
    async fn next(&mut self) -> Option<Result<Bytes, Status>> {
        loop {
            let broken = match self.chunks.as_mut()?.next().await {
                Some(Ok(chunk)) => match self.take(chunk) {
                    Ok(bytes) if !bytes.is_empty() => return Some(Ok(bytes)),
                    Ok(_) => continue,
                    Err(status) => return Some(Err(status)),
                },
                Some(Err(status)) => status,
                None if self.request.from.is_none() => return None,
                None => Status::unavailable("the stream ended before the log"),
            };
            if let Err(status) = self.resume(broken).await {
                return Some(Err(status));
            }
        }
    }

    /// Takes the bytes of a chunk, and remembers where the next one begins.
    fn take(&mut self, chunk: pb::LogChunk) -> Result<Bytes, Status> {
        let resumed = self.lost.take().is_some();
        if resumed && chunk.next.is_none() {
            return Err(Status::unimplemented(
                "the log was interrupted, and the agent that answers now is too old to continue it",
            ));
        }
        if chunk.next.is_some() {
            self.request.from = chunk.next;
        }
        let mut ended = chunk.end;
        if self.request.limit_bytes > 0 {
            let count = i64::try_from(chunk.data.len()).unwrap_or(i64::MAX);
            let left = self.request.limit_bytes.saturating_sub(count);
            ended |= left <= 0;
            // 0 would mean that there is no limit.
            self.request.limit_bytes = left.max(1);
        }
        if ended {
            self.chunks = None;
        }
        Ok(chunk.data)
    }

    /// Opens the log again at the position that was reached. The error says why that is impossible.
    async fn resume(&mut self, mut status: Status) -> Result<(), Status> {
        if self.request.from.is_none() || !is_interruption(&status) {
            return Err(status);
        }
        self.chunks = None;
        if self.opened.elapsed() > PAUSE_MOST {
            self.pause = PAUSE;
        }
        if self.lost.is_none() {
            self.source.interrupted(&status);
        }
        let give_up = *self.lost.get_or_insert_with(Instant::now) + GIVE_UP;
        loop {
            let pause = self.pause.mul_f64(rand::random_range(0.5..1.5));
            self.pause = (self.pause * 2).min(PAUSE_MOST);
            tokio::time::sleep_until(give_up.min(Instant::now() + pause)).await;
            self.source.wanted()?;
            let opening = self.source.open(self.request.clone());
            match tokio::time::timeout_at(give_up, opening).await {
                Ok(Ok(chunks)) => {
                    self.chunks = Some(chunks);
                    self.opened = Instant::now();
                    return Ok(());
                }
                Ok(Err(error)) if is_interruption(&error) => status = error,
                Ok(Err(error)) => return Err(error),
                Err(_) => {}
            }
            if Instant::now() >= give_up {
                let text = format!(
                    "the log was interrupted, and could not be continued for {} min: {}",
                    GIVE_UP.as_secs() / 60,
                    status.message()
                );
                return Err(Status::unavailable(text));
            }
        }
    }
}

/// PURE: whether a stream that ended with this status may be continued. A status without a reason is not the agent's own
/// word: it is what HTTP/2 makes of a connection that was lost.
fn is_interruption(status: &Status) -> bool {
    match ErrorReason::of(status) {
        Some(
            ErrorReason::ShuttingDown | ErrorReason::ShimUnreachable | ErrorReason::Overloaded,
        ) => true,
        Some(_) => false,
        None => !matches!(
            status.code(),
            Code::Unimplemented
                | Code::InvalidArgument
                | Code::NotFound
                | Code::PermissionDenied
                | Code::Unauthenticated
                | Code::OutOfRange
        ),
    }
}

#[cfg(test)]
mod tests;
