//! Between messages and the body of an HTTP/2 stream: gRPC's framing, a flag and a length before each message.
//!
//! See the [protocol](https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md), "Length-Prefixed-Message" and
//! "Trailers".
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

/// Flag and length.
const HEAD: usize = 5;

/// Who is the reader of a body?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Of requests: they end without a word.
    Server,
    /// Of answers: they end with a status.
    Client,
}

/// The messages of a body, as they come.
pub struct Messages<T> {
    body: Body,
    side: Side,
    came: Segments,
    ended: bool,
    message: PhantomData<fn() -> T>,
}

impl<T> fmt::Debug for Messages<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Messages")
            .field("side", &self.side)
            .field("waiting", &self.came.remaining())
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl<T: Message + Default> Messages<T> {
    pub(super) fn new(body: Body, side: Side) -> Self {
        Self {
            body,
            side,
            came: Segments::default(),
            ended: false,
            message: PhantomData,
        }
    }

    /// The answer that has no messages.
    pub(super) fn none() -> Self {
        Self {
            ended: true,
            ..Self::new(Body::empty(), Side::Client)
        }
    }

    /// The next message; `None` at the end in order. Cancel safe.
    pub async fn message(&mut self) -> Result<Option<T>, Status> {
        std::future::poll_fn(|cx| self.poll_message(cx, Self::take))
            .await
            .transpose()
    }

    /// What [`Self::message`] will give, without taking it. Cancel safe.
    pub async fn peek(&mut self) -> Result<Option<T>, Status> {
        let look = |came: &mut Segments| Self::take(&mut came.clone());
        std::future::poll_fn(|cx| self.poll_message(cx, look))
            .await
            .transpose()
    }

    /// What was not taken of it, as a body.
    #[must_use]
    pub fn into_body(mut self) -> Body {
        let mut came = std::mem::take(&mut self.came);
        Body::new(Joined {
            first: std::iter::from_fn(|| came.pop()).collect(),
            rest: self.body,
        })
    }

    /// The first message of what came, where it is whole.
    fn take(came: &mut Segments) -> Result<Option<T>, Status> {
        let Some([flag, length @ ..]) = came.first::<HEAD>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if flag != 0 {
            return Err(Status::internal(
                "a compressed message, which was not agreed on",
            ));
        }
        if length > MAX_MESSAGE {
            let text = format!("a message of {length} bytes; the limit is {MAX_MESSAGE}");
            return Err(Status::out_of_range(text));
        }
        if came.remaining() - HEAD < length {
            return Ok(None);
        }
        came.advance(HEAD);
        let message = T::decode(came.take(length));
        let undecodable = |error: prost::DecodeError| Status::internal(error.to_string());
        message.map(Some).map_err(undecodable)
    }

    fn poll_message(
        &mut self,
        cx: &mut Context<'_>,
        mut take: impl FnMut(&mut Segments) -> Result<Option<T>, Status>,
    ) -> Poll<Option<Result<T, Status>>> {
        loop {
            match take(&mut self.came) {
                Ok(Some(message)) => return Poll::Ready(Some(Ok(message))),
                Ok(None) if self.ended => return Poll::Ready(None),
                Ok(None) => {}
                Err(status) => {
                    self.ended = true;
                    self.came = Segments::default();
                    return Poll::Ready(Some(Err(status)));
                }
            }
            let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
            if let Err(status) = self.frame(frame) {
                self.ended = true;
                self.came = Segments::default();
                return Poll::Ready(Some(Err(status)));
            }
        }
    }

    fn frame(&mut self, frame: Option<Result<Frame<Bytes>, Status>>) -> Result<(), Status> {
        match frame {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => self.came.push(data),
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    return self.end(Some(&trailers));
                }
            },
            None => return self.end(None),
            // A client that has gone: the end of what it says.
            Some(Err(status)) if self.side == Side::Server && status.code() == Code::Cancelled => {
                self.ended = true;
                self.came = Segments::default();
            }
            Some(Err(status)) => return Err(status),
        }
        Ok(())
    }

    /// The body has ended.
    fn end(&mut self, trailers: Option<&HeaderMap>) -> Result<(), Status> {
        self.ended = true;
        if self.side == Side::Client {
            let status = trailers.and_then(Status::from_header_map);
            let status = status.unwrap_or_else(|| Status::unknown("the answer ended unfinished"));
            if status.code() != Code::Ok {
                return Err(status);
            }
        }
        if self.came.has_remaining() {
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

/// Slices, then the rest.
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

/// The body of a request that says these messages.
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

/// The body of an answer: the messages, and the status with which they end.
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
    /// Who writes it.
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

/// The body of an answer, passed on. A status that is not a success, or a missing one, is replaced by `map` of it.
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
        let status = status.unwrap_or_else(|| Status::unknown("the answer ended unfinished"));
        Poll::Ready(Some(trailers(&(self.map)(status))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}
