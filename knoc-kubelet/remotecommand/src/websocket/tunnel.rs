//! A stream of bytes within the binary messages of a WebSocket: SPDY tunnelled in it. Borders of messages mean nothing.
//!
//! Reads answer pings and take the peer's close frame for the end of the bytes; shutting down sends one. The reader
//! writes pongs where the socket takes them, and is never held up by a writer that waits. Both halves must be polled by
//! one task, as a session does: they wake the same one.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::frame::{self, Decoder, Event, Kind};

/// What is read from the socket at once.
const CHUNK: usize = 64 << 10;
/// With less room than this the buffer is made anew.
const LEAST_ROOM: usize = CHUNK / 4;
/// The code of an end in order.
const NORMAL: u16 = 1000;

/// Reads and writes the payload of a WebSocket's binary messages.
#[derive(Debug)]
pub struct Tunnel<Io> {
    io: Io,
    decoder: Decoder,
    received: BytesMut,
    /// Of the message that is being read.
    piece: Bytes,
    /// Encoded and not yet written: at most one message and what answers the peer.
    wire: BytesMut,
    ended: bool,
    closing: bool,
}

impl<Io: AsyncRead + AsyncWrite + Unpin> Tunnel<Io> {
    /// A tunnel on a connection that has been upgraded.
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

    /// Decodes until there are bytes or an end; false where the socket must be read first.
    fn decode(&mut self) -> io::Result<bool> {
        while self.piece.is_empty() && !self.ended {
            let decoded = self.decoder.decode(&mut self.received);
            match decoded.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))? {
                None => return Ok(false),
                Some(Event::Data { data, .. }) => self.piece = data,
                Some(Event::Close(_)) => self.ended = true,
                // One that comes while others wait to be answered goes without: bounded, whatever the peer does.
                Some(Event::Ping(payload)) if self.wire.len() < frame::MAX_MESSAGE => {
                    frame::put_head(&mut self.wire, Kind::Pong, payload.len());
                    self.wire.put_slice(&payload);
                }
                Some(Event::Ping(_) | Event::Pong) => {}
            }
        }
        Ok(true)
    }

    /// Writes what waits, as far as the socket takes it.
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
        // Accepted; what the socket does not take now goes with the next write or flush.
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
