//! The side that is dialled: a stream of connections whose peers are checked, for
//! `Server::serve_with_incoming_shutdown`.
//!
//! Refused handshakes are logged with the peer's address and what its certificate says, a few lines for each source, and
//! do not disturb others ([`super::accept`]). The number of connections whose peer is known is bounded too
//! ([`super::finished`]).
use std::{
    fmt, io,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures::{Stream, StreamExt as _};
use knoc_proto::{error::chain, log_limit::LogLimit};
use rustls_pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
    time::Instant,
};
use tokio_rustls::{TlsAcceptor, TlsStream};
use tonic::transport::server::Connected;

use super::{
    Carrier, Credentials, ExpectPeer, Identity, LinkError, Shown,
    accept::{self, Accept, Listener, Raw},
    admission::Bounds,
    finished::{Finished, Place},
    socket::{self, SocketFile},
    tls::{Seen, in_words},
};

/// What an HTTP/2 client says first (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Who is at the other end of a connection; in the extensions of every request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// Proved by its certificate.
    Tls {
        /// Who.
        identity: Identity,
        /// From where.
        addr: SocketAddr,
        /// What it proved it with.
        certificate: Shown,
    },
    /// The same user on the same machine, proved by the kernel.
    Unix {
        /// Its user, always ours.
        uid: u32,
        /// Its process, where the kernel says it.
        pid: Option<i32>,
    },
    /// The agent, proved by its pinned key (the shim's link).
    Pinned,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tls { identity, addr, .. } => write!(f, "{identity} at {addr}"),
            Self::Unix {
                uid,
                pid: Some(pid),
            } => write!(f, "uid {uid}, pid {pid}"),
            Self::Unix { uid, pid: None } => write!(f, "uid {uid}"),
            Self::Pinned => f.write_str("the pinned peer"),
        }
    }
}

/// Connections on `addr` from kubelets and knocctls, TLS with client certificates.
#[expect(
    clippy::unused_async,
    reason = "a listener needs a runtime, which only an async function surely has"
)]
pub async fn tcp(addr: SocketAddr, credentials: Credentials) -> Result<Incoming, LinkError> {
    let carrier = Carrier::Tcp(addr.to_string());
    let listener = accept::bind(addr).map_err(|source| LinkError::Listen { carrier, source })?;
    let bounds = Bounds::own();
    let accept = Accept::tcp(listener, bounds, move |stream, addr| {
        let credentials = credentials.clone();
        Box::pin(async move {
            let accepted = accept_tls(stream, addr, &credentials).await;
            accepted.map_err(|error| chain(&error))
        })
    });
    Ok(Incoming {
        accept,
        finished: Finished::new(bounds.finished),
        log: LogLimit::default(),
        _socket: None,
    })
}

/// Connections of our own user on a socket at `path`, whose folder is created with mode 0700, or checked to have it. A
/// socket that nobody serves any more is replaced. Has to be called inside a runtime.
pub fn unix(path: &Path) -> Result<Incoming, LinkError> {
    let (listener, socket) = socket::bind(path)?;
    let name = Carrier::Unix(path.to_owned()).to_string();
    let bounds = Bounds::own();
    let accept = Accept::new(Listener::Unix(listener), bounds, move |raw| {
        let name = name.clone();
        Box::pin(async move {
            let Raw::Unix(stream) = raw else {
                return Err("a TCP connection on a unix socket".to_owned());
            };
            let peer = socket::peer(&stream, &name).map_err(|error| chain(&error))?;
            Ok(Conn::unix(stream, peer))
        })
    });
    Ok(Incoming {
        accept,
        finished: Finished::new(bounds.finished),
        log: LogLimit::default(),
        _socket: Some(socket),
    })
}

async fn accept_tls(
    stream: TcpStream,
    addr: SocketAddr,
    credentials: &Credentials,
) -> Result<Conn, LinkError> {
    let seen = Seen::default();
    let failed = |source| LinkError::Handshake {
        peer: addr.to_string(),
        claimed: seen.text(),
        source: in_words(source),
    };
    stream.set_nodelay(true).map_err(failed)?;
    let config = credentials
        .material()
        .server(ExpectPeer::NearSide, seen.clone())
        .map_err(|error| failed(io::Error::other(error)))?;
    let mut stream = TlsAcceptor::from(Arc::new(config))
        .accept(stream)
        .await
        .map_err(failed)?;
    let Some(identity) = seen.identity() else {
        return Err(failed(io::Error::other("the peer showed no identity")));
    };
    let certificate = shown(stream.get_ref().1.peer_certificates()).map_err(failed)?;
    // A client speaks first. One that has a certificate and says nothing is not finished yet: it counts as, and is
    // closed like, one that never ended its handshake.
    let mut preface = [0; PREFACE.len()];
    stream.read_exact(&mut preface).await.map_err(failed)?;
    if preface != *PREFACE {
        return Err(LinkError::NotHttp2 {
            peer: addr.to_string(),
            claimed: identity.to_string(),
        });
    }
    let peer = Peer::Tls {
        identity,
        addr,
        certificate,
    };
    let mut conn = Conn::tls(stream.into(), peer);
    conn.preface = PREFACE;
    Ok(conn)
}

/// The chain that a peer showed.
pub(super) fn shown(chain: Option<&[CertificateDer<'static>]>) -> io::Result<Shown> {
    Shown::of(chain).map_err(io::Error::other)
}

/// Connections whose peers are checked. Never ends by itself.
pub struct Incoming {
    accept: Accept<Conn>,
    finished: Finished,
    /// Lines about identities that have too many connections.
    log: LogLimit<String>,
    /// Held for its `Drop`.
    _socket: Option<SocketFile>,
}

impl Incoming {
    /// The address listened on (the port where 0 was asked for); none for a unix socket.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.accept.local_addr()
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("local_addr", &self.local_addr())
            .finish_non_exhaustive()
    }
}

impl Stream for Incoming {
    type Item = io::Result<Conn>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let accepted = ready!(self.accept.poll_next_unpin(cx));
            let Some(Ok(mut conn)) = accepted else {
                return Poll::Ready(accepted);
            };
            match self.finished.take(&conn.peer) {
                Ok(place) => {
                    conn.place = Some(place);
                    return Poll::Ready(Some(Ok(conn)));
                }
                Err(full) => {
                    let who = match &conn.peer {
                        Peer::Tls { identity, .. } => identity.to_string(),
                        Peer::Unix { .. } | Peer::Pinned => String::new(),
                    };
                    let verdict = self.log.event(Instant::now(), who);
                    accept::left_out(verdict.left_out);
                    if verdict.write {
                        tracing::warn!(peer = %conn.peer, "connection refused: {full}");
                    }
                }
            }
        }
    }
}

/// One connection to a checked peer.
#[derive(Debug)]
pub struct Conn {
    io: Io,
    peer: Peer,
    /// What of the client's first bytes was read before HTTP/2 took over, and is still to be given to it.
    preface: &'static [u8],
    /// Counts the connection until it is dropped.
    place: Option<Place>,
}

#[derive(Debug)]
enum Io {
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

impl Conn {
    pub(super) fn tls(stream: TlsStream<TcpStream>, peer: Peer) -> Self {
        Self {
            io: Io::Tls(Box::new(stream)),
            peer,
            preface: &[],
            place: None,
        }
    }

    pub(super) fn unix(stream: UnixStream, peer: Peer) -> Self {
        Self {
            io: Io::Unix(stream),
            peer,
            preface: &[],
            place: None,
        }
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }
}

impl Connected for Conn {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Conn {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.preface.is_empty() {
            let (now, later) = this
                .preface
                .split_at(this.preface.len().min(buf.remaining()));
            buf.put_slice(now);
            this.preface = later;
            return Poll::Ready(Ok(()));
        }
        match &mut this.io {
            Io::Tls(io) => Pin::new(io).poll_read(cx, buf),
            Io::Unix(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Conn {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Tls(io) => Pin::new(io).poll_write(cx, buf),
            Io::Unix(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Tls(io) => Pin::new(io).poll_flush(cx),
            Io::Unix(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Io::Tls(io) => Pin::new(io).poll_shutdown(cx),
            Io::Unix(io) => Pin::new(io).poll_shutdown(cx),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Tls(io) => io.is_write_vectored(),
            Io::Unix(io) => io.is_write_vectored(),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Io::Tls(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Io::Unix(io) => Pin::new(io).poll_write_vectored(cx, bufs),
        }
    }
}
