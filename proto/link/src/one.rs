//! HTTP/2 over one connection that is there already: the shim's link, where the far side has dialled.
use std::{
    fmt,
    future::{Ready, ready},
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use futures::Stream;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
};
use tonic::transport::{Channel, Uri, server::Connected};

use super::{LinkError, Peer, endpoint};

/// The near side's channel over `io`. When the connection is gone every request fails with [`LinkError::Ended`] in its
/// source chain: this side does not dial.
pub fn near_side<I>(io: I) -> Channel
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let io = Arc::new(Mutex::new(Some(io)));
    let connector = tower::service_fn(move |_: Uri| {
        let io = io.lock().unwrap_or_else(PoisonError::into_inner).take();
        let connected: Ready<Result<TokioIo<I>, LinkError>> =
            ready(io.map(TokioIo::new).ok_or(LinkError::Ended));
        connected
    });
    endpoint().connect_with_connector_lazy(connector)
}

/// The far side's stream of exactly this connection, to serve tonic on. It ends when the connection is gone, and with
/// it `serve_with_incoming`.
pub fn far_side<I>(io: I) -> FarSide<I>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (held, gone) = oneshot::channel();
    FarSide {
        io: Some(FarIo { io, _held: held }),
        gone,
    }
}

/// See [`far_side`].
pub struct FarSide<I> {
    io: Option<FarIo<I>>,
    /// Resolves when the connection was dropped.
    gone: oneshot::Receiver<()>,
}

impl<I> fmt::Debug for FarSide<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FarSide")
            .field("taken", &self.io.is_none())
            .finish_non_exhaustive()
    }
}

impl<I: Unpin> Stream for FarSide<I> {
    type Item = io::Result<FarIo<I>>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.io.take() {
            Some(io) => Poll::Ready(Some(Ok(io))),
            None => Pin::new(&mut self.gone).poll(cx).map(|_| None),
        }
    }
}

/// The connection of [`far_side`].
pub struct FarIo<I> {
    io: I,
    /// Dropped with the connection, which ends the stream.
    _held: oneshot::Sender<()>,
}

impl<I> fmt::Debug for FarIo<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FarIo").finish_non_exhaustive()
    }
}

impl<I> Connected for FarIo<I> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        Peer::Pinned
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for FarIo<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for FarIo<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    // A frame's head and its data in one TLS write: without this each head is a packet of its own.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
