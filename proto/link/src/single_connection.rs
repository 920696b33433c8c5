//! HTTP/2 over one existing connection, whichever side has dialled it. The shim's link uses it: there the far side
//! dials.
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
use tokio::sync::oneshot;
use tonic::transport::{Channel, Uri};

use super::{Connection, LinkError, endpoint};

/// The near side's channel over `connection`. Once the connection has ended, every request fails with
/// [`LinkError::Ended`] in its source chain, because this side does not dial.
#[must_use]
pub fn near_side(connection: Connection) -> Channel {
    let connection = Arc::new(Mutex::new(Some(connection)));
    let connector = tower::service_fn(move |_: Uri| {
        let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
        let connected: Ready<Result<TokioIo<Connection>, LinkError>> =
            ready(connection.take().map(TokioIo::new).ok_or(LinkError::Ended));
        connected
    });
    endpoint().connect_with_connector_lazy(connector)
}

/// The far side's stream of exactly this connection, for [`serve()`](super::serve()), which ends with the connection.
#[must_use]
pub fn far_side(connection: Connection) -> FarSide {
    let (held, gone) = oneshot::channel::<()>();
    FarSide {
        connection: Some(connection.holding(held)),
        gone,
    }
}

/// A stream of one connection, returned by [`far_side`]. It ends when that connection was dropped.
pub struct FarSide {
    connection: Option<Connection>,
    /// Resolves when the connection is dropped.
    gone: oneshot::Receiver<()>,
}

impl fmt::Debug for FarSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FarSide")
            .field("taken", &self.connection.is_none())
            .finish_non_exhaustive()
    }
}

impl Stream for FarSide {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.connection.take() {
            Some(connection) => Poll::Ready(Some(Ok(connection))),
            None => Pin::new(&mut self.gone).poll(cx).map(|_| None),
        }
    }
}
