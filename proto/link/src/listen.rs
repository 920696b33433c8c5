//! The side that is dialled: a stream of connections whose peers are verified, for [`super::serve()`].
//!
//! A handshake that fails is logged with the peer's address and the identity that it claims, limited to a few lines for
//! each source, and does not disturb other connections ([`super::accept`]). The number of connections with verified
//! peers is bounded too ([`super::finished`]).
use std::{
    fmt, io,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    task::{Context, Poll},
};

use futures::{Stream, StreamExt as _};
use knoc_proto::error::chain;
use tokio::io::AsyncReadExt as _;
use tokio_rustls::TlsStream;

use super::{
    Carrier, Connection, Credentials, ExpectPeer, LinkError, Peer, PeerCertificate,
    accept::{Accept, Handshake},
    admission::Bounds,
    carrier::{Io, Listener, Unverified, tcp, unix},
    finished::Bounded,
    tls::{self, ClaimedIdentity, readable_error},
};

/// The client connection preface of HTTP/2 (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Listens on `addr` for kubelets and knocctls, which must present client certificates over TLS.
#[expect(
    clippy::unused_async,
    reason = "a listener needs a runtime, which only an async function is sure to have"
)]
pub async fn tcp(addr: SocketAddr, credentials: Credentials) -> Result<Incoming, LinkError> {
    let carrier = Carrier::Tcp(addr.to_string());
    let failed = |source| LinkError::Listen { carrier, source };
    let listener = tcp::Listener::bind(addr).map_err(failed)?;
    Ok(over_tls(listener, credentials))
}

/// Accepts the connections of `listener`, whose peers must present client certificates over TLS.
pub fn over_tls(listener: impl Listener, credentials: Credentials) -> Incoming {
    incoming(listener, move |connection| {
        let credentials = credentials.clone();
        Box::pin(async move {
            let accepted = accept_tls(connection, &credentials).await;
            accepted.map_err(|error| chain(&error))
        })
    })
}

/// Listens on the socket at `path` for processes of our own user. Its folder is created with mode 0700, or must have
/// that mode; a socket that no process serves is replaced. Must be called within a tokio runtime.
pub fn unix(path: &Path) -> Result<Incoming, LinkError> {
    let listener = unix::Listener::bind(path)?;
    let path = path.to_owned();
    Ok(incoming(listener, move |Unverified { io, .. }| {
        let peer = unix::identify(&io, &path);
        let accepted = peer.map(|peer| Connection::new(io, peer));
        Box::pin(std::future::ready(accepted.map_err(|error| chain(&error))))
    }))
}

fn incoming<L: Listener>(
    listener: L,
    begin: impl Fn(Unverified<L::Io>) -> Handshake<Connection> + Send + Sync + 'static,
) -> Incoming {
    let bounds = Bounds::own();
    let accept = Accept::new(listener, bounds, begin);
    Incoming::new(accept.local_addr(), Bounded::new(accept, bounds.finished))
}

/// The TLS handshake of the side that is dialled. The peer must be one that `expect` allows.
pub(super) async fn shake_hands<I: Io>(
    Unverified { io, origin }: Unverified<I>,
    credentials: &Credentials,
    expect: ExpectPeer,
) -> Result<(TlsStream<I>, Peer), LinkError> {
    let claimed = ClaimedIdentity::default();
    let failed = |source| LinkError::Handshake {
        peer: origin.to_string(),
        claimed: claimed.text(),
        source: readable_error(source),
    };
    let material = credentials.material();
    let (roots, key) = (&material.roots, &material.key);
    let config = tls::server(roots, key, expect, claimed.clone())
        .map_err(|error| failed(io::Error::other(error)))?;
    let stream = tls::accept(io, config).await.map_err(failed)?;
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
    Ok((stream, peer))
}

async fn accept_tls<I: Io>(
    unverified: Unverified<I>,
    credentials: &Credentials,
) -> Result<Connection, LinkError> {
    let expect = ExpectPeer::NearSide;
    let (mut stream, peer) = shake_hands(unverified, credentials, expect).await?;
    let (origin, claimed) = match &peer {
        Peer::Tls {
            identity, origin, ..
        } => (origin.to_string(), Some(identity.to_string())),
        Peer::Unix { .. } | Peer::Pinned { .. } | Peer::Command => (peer.to_string(), None),
    };
    // A client sends first. A peer that has presented a certificate but sends nothing has not finished its handshake:
    // it is counted and closed like one that has not.
    let mut preface = [0; PREFACE.len()];
    if let Err(source) = stream.read_exact(&mut preface).await {
        return Err(LinkError::Handshake {
            peer: origin,
            claimed,
            source: readable_error(source),
        });
    }
    if preface != *PREFACE {
        return Err(LinkError::NotHttp2 {
            peer: origin,
            claimed: claimed.unwrap_or_default(),
        });
    }
    Ok(Connection::new(stream, peer).replaying(PREFACE))
}

type Connections = Pin<Box<dyn Stream<Item = io::Result<Connection>> + Send>>;

/// Connections whose peers are verified. The stream never ends by itself.
pub struct Incoming {
    connections: Connections,
    local_addr: Option<SocketAddr>,
}

impl Incoming {
    pub(super) fn new(
        local_addr: Option<SocketAddr>,
        connections: impl Stream<Item = io::Result<Connection>> + Send + 'static,
    ) -> Self {
        Self {
            connections: Box::pin(connections),
            local_addr,
        }
    }

    /// Connections that no listener accepted: those that a far side has dialled itself.
    pub fn of(connections: impl Stream<Item = Connection> + Send + 'static) -> Self {
        Self::new(None, connections.map(Ok))
    }

    /// The network address that is listened on, with the actual port if port 0 was requested; `None` for a unix socket.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.local_addr
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("local_addr", &self.local_addr)
            .finish_non_exhaustive()
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.connections.as_mut().poll_next(cx)
    }
}
