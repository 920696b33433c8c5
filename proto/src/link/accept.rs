//! Connections of a listener, each after its handshake, as a stream. No task: handshakes make progress while the
//! stream is polled, at most [`MAX_HANDSHAKES`] at a time.
use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{Stream, StreamExt as _, stream::FuturesUnordered};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    time::Sleep,
};

/// Handshakes in progress; further connections wait in the kernel's queue.
const MAX_HANDSHAKES: usize = 256;
/// The pause after `accept` itself failed, as with too many open files.
const PAUSE: Duration = Duration::from_millis(200);

pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A connection before its handshake.
pub(super) enum Raw {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

/// A handshake: `None` where it failed, which it has logged.
pub(super) type Handshake<T> = Pin<Box<dyn Future<Output = Option<T>> + Send>>;

pub(super) struct Accept<T> {
    listener: Listener,
    begin: Box<dyn Fn(Raw) -> Handshake<T> + Send + Sync>,
    handshakes: FuturesUnordered<Handshake<T>>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl<T> Accept<T> {
    pub(super) fn new(
        listener: Listener,
        begin: impl Fn(Raw) -> Handshake<T> + Send + Sync + 'static,
    ) -> Self {
        Self {
            listener,
            begin: Box::new(begin),
            handshakes: FuturesUnordered::new(),
            pause: None,
        }
    }

    pub(super) fn local_addr(&self) -> Option<SocketAddr> {
        match &self.listener {
            Listener::Tcp(listener) => listener.local_addr().ok(),
            Listener::Unix(_) => None,
        }
    }

    fn poll_raw(&mut self, cx: &mut Context<'_>) -> Poll<Raw> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            let accepted = match &self.listener {
                Listener::Tcp(listener) => {
                    ready!(listener.poll_accept(cx)).map(|(stream, from)| Raw::Tcp(stream, from))
                }
                Listener::Unix(listener) => {
                    ready!(listener.poll_accept(cx)).map(|(stream, _)| Raw::Unix(stream))
                }
            };
            match accepted {
                Ok(raw) => return Poll::Ready(raw),
                Err(error) => {
                    tracing::warn!(%error, "accept a connection");
                    self.pause = Some(Box::pin(tokio::time::sleep(PAUSE)));
                }
            }
        }
    }
}

impl<T> Stream for Accept<T> {
    type Item = io::Result<T>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            while this.handshakes.len() < MAX_HANDSHAKES {
                let Poll::Ready(raw) = this.poll_raw(cx) else {
                    break;
                };
                this.handshakes.push((this.begin)(raw));
            }
            match this.handshakes.poll_next_unpin(cx) {
                Poll::Ready(Some(Some(done))) => return Poll::Ready(Some(Ok(done))),
                // One slot is free again, or all are: look at the listener once more.
                Poll::Ready(Some(None)) => {}
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }
}
