//! A connection that this side can end, whoever holds it.
use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::carrier::Io;

/// Bytes that end when a token is cancelled: whoever reads or writes then gets an error.
#[derive(Debug)]
pub(super) struct Cuttable<I> {
    io: I,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    why: &'static str,
}

impl<I: Io> Cuttable<I> {
    pub(super) fn new(io: I, cut: CancellationToken, why: &'static str) -> Self {
        Self {
            io,
            cut: Box::pin(cut.cancelled_owned()),
            why,
        }
    }

    /// Fails after the cut, which also wakes the caller's task.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<&mut I> {
        match self.cut.as_mut().poll(cx) {
            Poll::Pending => Ok(&mut self.io),
            Poll::Ready(()) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, self.why)),
        }
    }
}

impl<I: Io> AsyncRead for Cuttable<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(self.check(cx)?).poll_read(cx, buf)
    }
}

impl<I: Io> AsyncWrite for Cuttable<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self.check(cx)?).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.check(cx)?).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.check(cx)?).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self.check(cx)?).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
