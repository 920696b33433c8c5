//! Converts between messages and the body of an HTTP/2 stream by gRPC's framing: a flag and a length before each
//! message.
//!
//! See "Length-Prefixed-Message" and "Trailers" in the
//! [protocol](https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md).
use std::{
    collections::VecDeque,
    fmt,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BufMut as _, Bytes};
use futures::{Stream, StreamExt as _};
use http::HeaderMap;
use http_body::{Body as _, Frame};
use prost::Message;
use tonic::{Code, Status, body::Body};

use super::segments::Segments;
use crate::MAX_MESSAGE;

/// The bytes before a message: a flag (one byte) and the length (four bytes).
const HEAD: usize = 5;

/// The side that reads a body, or writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Reads requests, which end without a status, and writes responses.
    Server,
    /// Reads responses, which end with a status, and writes requests.
    Client,
}

/// The messages of a body, as they arrive.
pub struct Messages<T> {
    body: Body,
    side: Side,
    received: Segments,
    ended: bool,
    cancelled: bool,
    message: PhantomData<fn() -> T>,
}

impl<T> fmt::Debug for Messages<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Messages")
            .field("side", &self.side)
            .field("waiting", &self.received.remaining())
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl<T: Message + Default> Messages<T> {
    pub(super) fn new(body: Body, side: Side) -> Self {
        Self {
            body,
            side,
            received: Segments::default(),
            ended: false,
            cancelled: false,
            message: PhantomData,
        }
    }

    /// A response without messages.
    pub(super) fn none() -> Self {
        Self {
            ended: true,
            ..Self::new(Body::empty(), Side::Client)
        }
    }

    /// The next message; `None` if the stream has ended successfully, or if these are requests and the client has cancelled the
    /// call ([`is_cancelled`](Self::is_cancelled)). Fails with the peer's status, or if the bytes are
    /// not valid messages of at most [`MAX_MESSAGE`] bytes; after an error the stream has ended. Cancel safe.
    pub async fn message(&mut self) -> Result<Option<T>, Status> {
        std::future::poll_fn(|cx| self.poll_message(cx, Self::take))
            .await
            .transpose()
    }

    /// The message that [`Self::message`] will return, without taking it. Cancel safe.
    pub async fn peek(&mut self) -> Result<Option<T>, Status> {
        let look = |received: &mut Segments| Self::take(&mut received.clone());
        std::future::poll_fn(|cx| self.poll_message(cx, look))
            .await
            .transpose()
    }

    /// Whether these are requests that ended because the client cancelled the call, and not with their regular end.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled
    }

    /// The rest of the stream, from the first message that was not taken, as a body.
    #[must_use]
    pub fn into_body(mut self) -> Body {
        let mut received = std::mem::take(&mut self.received);
        Body::new(Joined {
            first: std::iter::from_fn(|| received.pop()).collect(),
            rest: self.body,
        })
    }

    /// Takes the first message, if it has arrived completely.
    fn take(received: &mut Segments) -> Result<Option<T>, Status> {
        let Some([flag, length @ ..]) = received.first::<HEAD>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if flag != 0 {
            return Err(Status::internal(
                "received a compressed message, although no compression was negotiated",
            ));
        }
        if length > MAX_MESSAGE {
            let text = format!("a message of {length} bytes; the limit is {MAX_MESSAGE}");
            return Err(Status::out_of_range(text));
        }
        if received.remaining() - HEAD < length {
            return Ok(None);
        }
        received.advance(HEAD);
        let message = T::decode(received.take(length));
        let undecodable = |error: prost::DecodeError| Status::internal(error.to_string());
        message.map(Some).map_err(undecodable)
    }

    fn poll_message(
        &mut self,
        cx: &mut Context<'_>,
        mut take: impl FnMut(&mut Segments) -> Result<Option<T>, Status>,
    ) -> Poll<Option<Result<T, Status>>> {
        loop {
            match take(&mut self.received) {
                Ok(Some(message)) => return Poll::Ready(Some(Ok(message))),
                Ok(None) if self.ended => return Poll::Ready(None),
                Ok(None) => {}
                Err(status) => {
                    self.ended = true;
                    self.received = Segments::default();
                    return Poll::Ready(Some(Err(status)));
                }
            }
            let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
            if let Err(status) = self.frame(frame) {
                self.ended = true;
                self.received = Segments::default();
                return Poll::Ready(Some(Err(status)));
            }
        }
    }

    fn frame(&mut self, frame: Option<Result<Frame<Bytes>, Status>>) -> Result<(), Status> {
        match frame {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => self.received.push(data),
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    return self.end(Some(&trailers));
                }
            },
            None => return self.end(None),
            // The client has cancelled the call: its messages end here.
            Some(Err(status)) if self.side == Side::Server && status.code() == Code::Cancelled => {
                self.ended = true;
                self.cancelled = true;
                self.received = Segments::default();
            }
            Some(Err(status)) => return Err(status),
        }
        Ok(())
    }

    /// Handles the end of the body.
    fn end(&mut self, trailers: Option<&HeaderMap>) -> Result<(), Status> {
        self.ended = true;
        if self.side == Side::Client {
            let status = trailers.and_then(Status::from_header_map);
            let status =
                status.unwrap_or_else(|| Status::unknown("the response ended without a status"));
            if status.code() != Code::Ok {
                return Err(status);
            }
        }
        if self.received.has_remaining() {
            return Err(Status::internal("the stream ended within a message"));
        }
        Ok(())
    }
}

impl<T: Message + Default> Stream for Messages<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_message(cx, Self::take)
    }
}

/// A body that yields slices first, and then the rest of another body.
struct Joined {
    first: VecDeque<Bytes>,
    rest: Body,
}

impl http_body::Body for Joined {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.first.pop_front() {
            Some(slice) => Poll::Ready(Some(Ok(Frame::data(slice)))),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_empty() && self.rest.is_end_stream()
    }
}

/// The body of a request with these messages.
pub(super) fn encode_request<S>(messages: S) -> Body
where
    S: Stream<Item: Message> + Send + 'static,
{
    Body::new(Encoding {
        messages: Box::pin(messages.map(Ok)),
        side: Side::Client,
        waiting: Segments::default(),
        ended: false,
    })
}

/// The body of a response with these messages. It ends with the first error as its status, or with a success.
pub fn encode<T, S>(messages: S) -> Body
where
    T: Message,
    S: Stream<Item = Result<T, Status>> + Send + 'static,
{
    Body::new(Encoding {
        messages: Box::pin(messages),
        side: Side::Server,
        waiting: Segments::default(),
        ended: false,
    })
}

struct Encoding<S> {
    messages: Pin<Box<S>>,
    /// The side that writes the body.
    side: Side,
    waiting: Segments,
    ended: bool,
}

impl<T, S> http_body::Body for Encoding<S>
where
    T: Message,
    S: Stream<Item = Result<T, Status>>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(slice) = self.waiting.pop() {
            return Poll::Ready(Some(Ok(Frame::data(slice))));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        let status = match ready!(self.messages.as_mut().poll_next(cx)) {
            Some(Ok(message)) => {
                put(&mut self.waiting, &message);
                return Poll::Ready(self.waiting.pop().map(|slice| Ok(Frame::data(slice))));
            }
            Some(Err(status)) => status,
            None => Status::new(Code::Ok, ""),
        };
        self.ended = true;
        Poll::Ready(match self.side {
            Side::Server => Some(trailers(&status)),
            Side::Client => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.ended && !self.waiting.has_remaining()
    }
}

fn put(waiting: &mut Segments, message: &impl Message) {
    let length = message.encoded_len();
    waiting.put_u8(0);
    waiting.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    message.encode_raw(waiting);
}

fn trailers(status: &Status) -> Result<Frame<Bytes>, Status> {
    let mut trailers = HeaderMap::new();
    status.add_header(&mut trailers)?;
    Ok(Frame::trailers(trailers))
}

/// Passes on the body of a response. If its status is an error or missing, `map` replaces the status.
pub fn map_status(body: Body, map: impl Fn(Status) -> Status + Send + Unpin + 'static) -> Body {
    Body::new(MappedStatus {
        body,
        map,
        ended: false,
    })
}

struct MappedStatus<F> {
    body: Body,
    map: F,
    ended: bool,
}

impl<F: Fn(Status) -> Status + Unpin> http_body::Body for MappedStatus<F> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let status = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => match frame.trailers_ref().map(Status::from_header_map) {
                None => return Poll::Ready(Some(Ok(frame))),
                Some(Some(status)) if status.code() == Code::Ok => {
                    self.ended = true;
                    return Poll::Ready(Some(Ok(frame)));
                }
                Some(status) => status,
            },
            Some(Err(status)) => Some(status),
            None => None,
        };
        self.ended = true;
        let status =
            status.unwrap_or_else(|| Status::unknown("the response ended without a status"));
        Poll::Ready(Some(trailers(&(self.map)(status))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}
