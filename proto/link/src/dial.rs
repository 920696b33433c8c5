//! The side that dials: a lazy channel that connects at the first request and reconnects after each disconnection.
use std::{future::Future, pin::Pin};

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Uri};

use super::{Carrier, Connection, Credentials, ExpectPeer, LinkError, Route, endpoint};

/// A channel to the peer at one of the addresses of `route`. It connects at the first request, and again at the next one
/// after a disconnection. If the peer cannot be reached, requests fail with `Unavailable` and the cause in the source chain.
/// Credentials are required over TCP and rejected over a unix socket, where the peer is identified by its uid. Over a
/// command they decide whether TLS is spoken.
pub fn dial(
    route: impl Into<Route>,
    credentials: Option<Credentials>,
    expect: ExpectPeer,
) -> Result<Channel, LinkError> {
    let route = route.into();
    for carrier in route.carriers() {
        let carrier = || carrier.clone();
        match (carrier(), &credentials) {
            (Carrier::Tcp(_) | Carrier::HttpConnect { .. }, None) => {
                return Err(LinkError::NoCredentials { carrier: carrier() });
            }
            (Carrier::Unix(_), Some(_)) => {
                return Err(LinkError::NeedlessCredentials { carrier: carrier() });
            }
            (Carrier::Tcp(_) | Carrier::HttpConnect { .. }, Some(_))
            | (Carrier::Unix(_), None)
            | (Carrier::Exec(_) | Carrier::Ssh(_), _) => {}
        }
    }
    Ok(channel(move || {
        let (route, credentials, expect) = (route.clone(), credentials.clone(), expect.clone());
        async move { route.connect(credentials.as_ref(), &expect).await }
    }))
}

/// A lazy channel whose connections `open` opens.
pub(super) fn channel<F>(open: impl Fn() -> F + Send + 'static) -> Channel
where
    F: Future<Output = Result<Connection, LinkError>> + Send + 'static,
{
    let connector = tower::service_fn(move |_: Uri| {
        let opening = open();
        let connecting: Pin<Box<dyn Future<Output = _> + Send>> =
            Box::pin(async move { opening.await.map(TokioIo::new) });
        connecting
    });
    endpoint().connect_with_connector_lazy(connector)
}
