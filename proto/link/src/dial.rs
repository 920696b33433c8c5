//! The side that dials: a lazy channel that connects at the first request and again after each cut.
use std::{future::Future, io, pin::Pin};

use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Uri};

use super::{
    CONNECT_TIMEOUT, Carrier, Credentials, ExpectPeer, LinkError, Peer, endpoint,
    listen::{Conn, shown},
    socket,
    tls::{Seen, in_words},
};

/// A channel to the peer at `carrier`. Lazy: connects at the first request, and again at the next one after a cut;
/// while nobody answers, requests fail with `Unavailable` and the cause in the source chain. Credentials are needed
/// over TCP, and refused over a unix socket, where the peer's user is checked instead.
pub fn dial(
    carrier: Carrier,
    credentials: Option<Credentials>,
    expect: ExpectPeer,
) -> Result<Channel, LinkError> {
    match (&carrier, &credentials) {
        (Carrier::Tcp(_), None) => return Err(LinkError::NoCredentials { carrier }),
        (Carrier::Unix(_), Some(_)) => return Err(LinkError::NeedlessCredentials { carrier }),
        (Carrier::Tcp(_), Some(_)) | (Carrier::Unix(_), None) => {}
    }
    let connector = tower::service_fn(move |_: Uri| {
        let (carrier, credentials, expect) = (carrier.clone(), credentials.clone(), expect.clone());
        let connecting: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(async move {
            connect(&carrier, credentials.as_ref(), &expect)
                .await
                .map(TokioIo::new)
        });
        connecting
    });
    Ok(endpoint().connect_with_connector_lazy(connector))
}

/// One connection with its peer checked: what [`dial`] does at each attempt, for those who look at every step.
pub async fn connect(
    carrier: &Carrier,
    credentials: Option<&Credentials>,
    expect: &ExpectPeer,
) -> Result<Conn, LinkError> {
    let connecting = async {
        match (carrier, credentials) {
            (Carrier::Tcp(address), Some(credentials)) => {
                tcp(carrier, address, credentials, expect).await
            }
            (Carrier::Tcp(_), None) => Err(LinkError::NoCredentials {
                carrier: carrier.clone(),
            }),
            (Carrier::Unix(path), _) => {
                let (stream, peer) = socket::connect(path).await?;
                Ok(Conn::unix(stream, peer))
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

async fn tcp(
    carrier: &Carrier,
    address: &str,
    credentials: &Credentials,
    expect: &ExpectPeer,
) -> Result<Conn, LinkError> {
    let failed = |source| LinkError::Connect {
        carrier: carrier.clone(),
        source,
    };
    let stream = TcpStream::connect(address).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    let addr = stream.peer_addr().map_err(failed)?;
    let seen = Seen::default();
    let handshake = |source| LinkError::Handshake {
        peer: carrier.to_string(),
        claimed: seen.text(),
        source: in_words(source),
    };
    let config = credentials
        .material()
        .client(expect.clone(), seen.clone())
        .map_err(|error| handshake(io::Error::other(error)))?;
    // The name is neither sent nor checked: the identity is.
    let name = ServerName::IpAddress(addr.ip().into());
    let stream = TlsConnector::from(std::sync::Arc::new(config))
        .connect(name, stream)
        .await
        .map_err(handshake)?;
    let Some(identity) = seen.identity() else {
        return Err(handshake(io::Error::other("the peer showed no identity")));
    };
    let certificate = shown(stream.get_ref().1.peer_certificates()).map_err(handshake)?;
    let peer = Peer::Tls {
        identity,
        addr,
        certificate,
    };
    Ok(Conn::tls(stream.into(), peer))
}
