//! One connection to a peer that has proved its identity, independent of the carrier and of which side dialled.
use std::{
    fmt, io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use super::{Peer, carrier::Io, cut::Cuttable};

/// A stream of bytes and the verified peer `P` at its other end. The stream is boxed once, after the handshake, so that
/// users of connections do not depend on carriers.
pub struct Connection<P = Peer> {
    io: Box<dyn Io>,
    peer: P,
    /// Bytes that the handshake has read ahead and that the reader gets first.
    replay: &'static [u8],
    /// Guards that are dropped with the connection.
    held: Vec<Box<dyn Send + Sync>>,
}

impl<P: fmt::Debug> fmt::Debug for Connection<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

impl<P> Connection<P> {
    /// A connection over `io` to `peer`, which the caller has verified.
    pub fn new(io: impl Io, peer: P) -> Self {
        Self {
            io: Box::new(io),
            peer,
            replay: &[],
            held: Vec::new(),
        }
    }

    /// Yields `replay` to the reader before anything else: bytes of the peer that were read already.
    #[must_use]
    pub(super) fn replaying(self, replay: &'static [u8]) -> Self {
        Self { replay, ..self }
    }

    /// Drops `guard` when the connection is dropped, as well as the guards that it holds already.
    #[must_use]
    pub fn holding(mut self, guard: impl Send + Sync + 'static) -> Self {
        self.held.push(Box::new(guard));
        self
    }

    /// Ends the connection once `cut` is cancelled: whoever reads or writes then gets an error that says `why`.
    #[must_use]
    pub fn cut_by(self, cut: CancellationToken, why: &'static str) -> Self {
        let io = Box::new(Cuttable::new(self.io, cut, why));
        Self { io, ..self }
    }

    /// The verified peer at the other end.
    #[must_use]
    pub fn peer(&self) -> &P {
        &self.peer
    }
}

impl<P: Clone + Send + Sync + 'static> Connected for Connection<P> {
    type ConnectInfo = P;

    fn connect_info(&self) -> P {
        self.peer.clone()
    }
}

impl<P: Unpin> AsyncRead for Connection<P> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.replay.is_empty() {
            let (now, later) = this.replay.split_at(this.replay.len().min(buf.remaining()));
            buf.put_slice(now);
            this.replay = later;
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut this.io).poll_read(cx, buf)
    }
}

impl<P: Unpin> AsyncWrite for Connection<P> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }

    // Writes the head and the data of a frame in one TLS record; otherwise each head would be a packet of its own.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn every_guard_lives_as_long_as_the_connection() {
        let (first, second) = (Arc::new(()), Arc::new(()));
        let connection = Connection::new(tokio::io::empty(), ())
            .holding(Arc::clone(&first))
            .holding(Arc::clone(&second))
            .replaying(b"x");
        assert_eq!(
            [Arc::strong_count(&first), Arc::strong_count(&second)],
            [2, 2]
        );
        drop(connection);
        assert_eq!(
            [Arc::strong_count(&first), Arc::strong_count(&second)],
            [1, 1]
        );
    }
}
