//! The side that dials: a lazy channel that connects at the first request and reconnects after each disconnection.
use std::{future::Future, pin::Pin};

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Uri};

use super::{Carrier, Credentials, ExpectPeer, LinkError, Route, endpoint};

/// A channel to the peer at one of the addresses of `route`. Lazy: connects at the first request, and again at the next one
/// after a cut; while nobody answers, requests fail with `Unavailable` and the cause in the source chain. Credentials are
/// needed over TCP, and refused over a unix socket, where the peer's user is checked instead. Over a command they decide
/// whether TLS is spoken.
pub fn dial(
    route: impl Into<Route>,
    credentials: Option<Credentials>,
    expect: ExpectPeer,
) -> Result<Channel, LinkError> {
    let route = route.into();
    for carrier in route.carriers() {
        let carrier = || carrier.clone();
        match (carrier(), &credentials) {
            (Carrier::Tcp(_), None) => {
                return Err(LinkError::NoCredentials { carrier: carrier() });
            }
            (Carrier::Unix(_), Some(_)) => {
                return Err(LinkError::NeedlessCredentials { carrier: carrier() });
            }
            (Carrier::Tcp(_), Some(_))
            | (Carrier::Unix(_), None)
            | (Carrier::Exec(_) | Carrier::Ssh(_), _) => {}
        }
    }
    let connector = tower::service_fn(move |_: Uri| {
        let (route, credentials, expect) = (route.clone(), credentials.clone(), expect.clone());
        let connecting: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(async move {
            route
                .connect(credentials.as_ref(), &expect)
                .await
                .map(TokioIo::new)
        });
        connecting
    });
    Ok(endpoint().connect_with_connector_lazy(connector))
}
