//! A stream of bytes in the binary messages of a WebSocket, through which SPDY is tunnelled (KEP-4006). The boundaries
//! of messages have no meaning.
//!
//! Reading answers pings and treats the peer's close frame as the end of the bytes; shutting down sends a close frame.
//! The reader writes pongs if the socket accepts them, and a waiting writer never blocks it. One task must poll both
//! halves, as a session does, because they wake the same task.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::frame::{self, Decoder, Event, Kind};

/// How many bytes are read from the socket at once.
const CHUNK: usize = 64 << 10;
/// If the buffer has less free space than this, it is reallocated.
const LEAST_ROOM: usize = CHUNK / 4;
/// The close code of a normal end (RFC 6455, section 7.4.1).
const NORMAL: u16 = 1000;

/// Reads and writes the payload of a WebSocket's binary messages.
#[derive(Debug)]
pub struct Tunnel<Io> {
    io: Io,
    decoder: Decoder,
    received: BytesMut,
    /// The unread payload of the current message.
    piece: Bytes,
    /// Bytes that are encoded and not written yet: at most one message and the answers to the peer.
    wire: BytesMut,
    ended: bool,
    closing: bool,
}

impl<Io: AsyncRead + AsyncWrite + Unpin> Tunnel<Io> {
    /// Creates a tunnel on a connection that has been upgraded.
    pub fn new(io: Io) -> Self {
        Self {
            io,
            decoder: Decoder::default(),
            received: BytesMut::new(),
            piece: Bytes::new(),
            wire: BytesMut::new(),
            ended: false,
            closing: false,
        }
    }

    /// Decodes until there are bytes or an end. Returns false if more must be read from the socket first.
    fn decode(&mut self) -> io::Result<bool> {
        while self.piece.is_empty() && !self.ended {
            let decoded = self.decoder.decode(&mut self.received);
            match decoded.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))? {
                None => return Ok(false),
                Some(Event::Data { data, .. }) => self.piece = data,
                Some(Event::Close(_)) => self.ended = true,
                // A ping that arrives while other answers wait is not answered, so that they are bounded whatever the
                // peer does.
                Some(Event::Ping(payload)) if self.wire.len() < frame::MAX_MESSAGE => {
                    frame::put_head(&mut self.wire, Kind::Pong, payload.len());
                    self.wire.put_slice(&payload);
                }
                Some(Event::Ping(_) | Event::Pong) => {}
            }
        }
        Ok(true)
    }

    /// Writes waiting bytes as far as the socket accepts them.
    fn answer(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.wire.is_empty() {
            return Ok(());
        }
        match Pin::new(self).poll_flush(cx) {
            Poll::Ready(flushed) => flushed,
            Poll::Pending => Ok(()),
        }
    }

    fn poll_wire(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.wire.is_empty() {
            let wrote = ready!(Pin::new(&mut self.io).poll_write(cx, &self.wire))?;
            if wrote == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.wire.advance(wrote);
        }
        Poll::Ready(Ok(()))
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tunnel<Io> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while !this.decode()? {
            this.answer(cx)?;
            if this.received.capacity() - this.received.len() < LEAST_ROOM {
                this.received.reserve(CHUNK);
            }
            let io = Pin::new(&mut this.io);
            let read = ready!(tokio_util::io::poll_read_buf(io, cx, &mut this.received))?;
            this.ended |= read == 0;
        }
        this.answer(cx)?;
        let take = this.piece.len().min(buffer.remaining());
        buffer.put_slice(&this.piece.split_to(take));
        Poll::Ready(Ok(()))
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tunnel<Io> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_wire(cx))?;
        let take = data.len().min(frame::MAX_MESSAGE);
        let piece = data.get(..take).unwrap_or(data);
        frame::put_head(&mut this.wire, Kind::Binary, take);
        this.wire.put_slice(piece);
        // The bytes are accepted; those that the socket does not take now are written by the next write or flush.
        match this.poll_wire(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(take)),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_wire(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.closing {
            this.closing = true;
            frame::put_head(&mut this.wire, Kind::Close, 2);
            this.wire.put_u16(NORMAL);
        }
        ready!(this.poll_wire(cx))?;
        ready!(Pin::new(&mut this.io).poll_flush(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}
