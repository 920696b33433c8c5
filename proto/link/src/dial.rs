//! The side that dials: a lazy channel that connects at the first request and reconnects after each disconnection.
use std::{future::Future, io, pin::Pin};

use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tonic::transport::{Channel, Uri};

use super::{
    CONNECT_TIMEOUT, Carrier, Connection, Credentials, ExpectPeer, LinkError, Peer,
    PeerCertificate,
    carrier::{Dial, Unverified, http_connect, tcp, unix},
    endpoint,
    tls::{self, ClaimedIdentity, readable_error},
};

/// A channel to the peer at `carrier`. It connects at the first request, and again at the next one after a
/// disconnection. If the peer cannot be reached, requests fail with `Unavailable` and the cause in the source chain.
/// Credentials are required over TCP and rejected over a unix socket, where the peer is identified by its uid.
pub fn dial(
    carrier: Carrier,
    credentials: Option<Credentials>,
    expect: ExpectPeer,
) -> Result<Channel, LinkError> {
    match (&carrier, &credentials) {
        (Carrier::Tcp(_) | Carrier::HttpConnect { .. }, None) => {
            return Err(LinkError::NoCredentials { carrier });
        }
        (Carrier::Unix(_), Some(_)) => return Err(LinkError::NeedlessCredentials { carrier }),
        (Carrier::Tcp(_) | Carrier::HttpConnect { .. }, Some(_)) | (Carrier::Unix(_), None) => {}
    }
    Ok(channel(move || {
        let (carrier, credentials, expect) = (carrier.clone(), credentials.clone(), expect.clone());
        async move { connect(&carrier, credentials.as_ref(), &expect).await }
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

/// One connection with a verified peer: what [`dial`] does at each attempt, for callers that report every step. Takes
/// at most [`CONNECT_TIMEOUT`]. Cancel safe: dropping the future closes the connection.
pub async fn connect(
    carrier: &Carrier,
    credentials: Option<&Credentials>,
    expect: &ExpectPeer,
) -> Result<Connection, LinkError> {
    let connecting = async {
        match (carrier, credentials) {
            (Carrier::Tcp(address), Some(credentials)) => {
                over_tls(
                    &tcp::Dialler { address },
                    carrier,
                    credentials,
                    expect,
                    None,
                )
                .await
            }
            (Carrier::HttpConnect { address, proxy }, Some(credentials)) => {
                let dialler = http_connect::Dialler { address, proxy };
                over_tls(&dialler, carrier, credentials, expect, None).await
            }
            (Carrier::Tcp(_) | Carrier::HttpConnect { .. }, None) => {
                Err(LinkError::NoCredentials {
                    carrier: carrier.clone(),
                })
            }
            (Carrier::Unix(path), _) => {
                let (stream, peer) = unix::connect(path).await?;
                Ok(Connection::new(stream, peer))
            }
        }
    };
    tokio::time::timeout(CONNECT_TIMEOUT, connecting)
        .await
        .unwrap_or_else(|_| {
            Err(LinkError::Timeout {
                carrier: carrier.clone(),
            })
        })
}

/// Opens a connection by `dialler`, and runs TLS over it with our certificate. `name` is sent in the handshake (SNI), for
/// a proxy that chooses the server by it.
pub(super) async fn over_tls(
    dialler: &impl Dial,
    carrier: &Carrier,
    credentials: &Credentials,
    expect: &ExpectPeer,
    name: Option<ServerName<'static>>,
) -> Result<Connection, LinkError> {
    let Unverified { io, origin } = dialler.dial().await?;
    let claimed = ClaimedIdentity::default();
    let failed = |source| LinkError::Handshake {
        peer: carrier.to_string(),
        claimed: claimed.text(),
        source: readable_error(source),
    };
    let material = credentials.material();
    let (roots, key) = (&material.roots, &material.key);
    let config = tls::client(roots, key, expect.clone(), claimed.clone())
        .map_err(|error| failed(io::Error::other(error)))?;
    let stream = match name {
        Some(name) => tls::connect_by_name(io, config, name).await,
        None => tls::connect(io, config).await,
    };
    let stream = stream.map_err(failed)?;
    let Some(identity) = claimed.identity() else {
        return Err(failed(io::Error::other("the peer presented no identity")));
    };
    let certificate = PeerCertificate::of(tls::peer_chain(&stream));
    let certificate = certificate.map_err(|error| failed(io::Error::other(error)))?;
    let peer = Peer::Tls {
        identity,
        origin,
        certificate,
    };
    Ok(Connection::new(stream, peer))
}
