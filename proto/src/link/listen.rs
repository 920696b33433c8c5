//! The side that is dialled: a stream of connections whose peers are checked, for
//! `Server::serve_with_incoming_shutdown`.
//!
//! Refused handshakes are logged with the peer's address and what its certificate says, and do not disturb others.
use std::{
    fmt, fs, io,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::{Stream, StreamExt as _};
use rustls_pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
};
use tokio_rustls::{TlsAcceptor, TlsStream};
use tonic::transport::server::Connected;

use super::{
    CONNECT_TIMEOUT, Carrier, Credentials, ExpectPeer, Identity, LinkError, Shown,
    accept::{Accept, Listener, Raw},
    own_uid,
    tls::{Seen, in_words},
};
use crate::error::chain;

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
pub async fn tcp(addr: SocketAddr, credentials: Credentials) -> Result<Incoming, LinkError> {
    let carrier = Carrier::Tcp(addr.to_string());
    let listener = TcpListener::bind(addr)
        .await
        .map_err(|source| LinkError::Listen { carrier, source })?;
    let accept = Accept::new(Listener::Tcp(listener), move |raw| {
        let credentials = credentials.clone();
        Box::pin(async move {
            let Raw::Tcp(stream, addr) = raw else {
                return None;
            };
            logged(accept_tls(stream, addr, &credentials), &addr.to_string()).await
        })
    });
    Ok(Incoming {
        accept,
        _socket: None,
    })
}

/// Connections of our own user on a socket at `path`, whose folder is made with mode 0700, or checked to have it. A
/// socket that nobody serves any more is replaced. Has to be called inside a runtime.
pub fn unix(path: &Path) -> Result<Incoming, LinkError> {
    let carrier = Carrier::Unix(path.to_owned());
    let failed = |source| LinkError::Listen {
        carrier: carrier.clone(),
        source,
    };
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(failed)?;
    let meta = fs::symlink_metadata(folder).map_err(failed)?;
    let mode = meta.mode() & 0o7777;
    if !meta.is_dir() || meta.uid() != own_uid() || mode & 0o077 != 0 {
        let (path, uid, found_uid) = (folder.display().to_string(), own_uid(), meta.uid());
        return Err(LinkError::OpenFolder {
            path,
            uid,
            found_uid,
            mode,
        });
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(LinkError::InUse { carrier }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)?;
        }
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let socket = SocketFile {
        path: path.to_owned(),
        inode: inode(path),
    };
    let name = carrier.to_string();
    let accept = Accept::new(Listener::Unix(listener), move |raw| {
        let name = name.clone();
        Box::pin(async move {
            let Raw::Unix(stream) = raw else { return None };
            let checked = async {
                let peer = unix_peer(&stream, &name)?;
                Ok(Conn::unix(stream, peer))
            };
            logged(checked, &name).await
        })
    });
    Ok(Incoming {
        accept,
        _socket: Some(socket),
    })
}

/// Gives a handshake its deadline, and a failure its line in the log.
pub(super) async fn logged<T>(
    handshake: impl Future<Output = Result<T, LinkError>>,
    peer: &str,
) -> Option<T> {
    match tokio::time::timeout(CONNECT_TIMEOUT, handshake).await {
        Ok(Ok(done)) => Some(done),
        Ok(Err(error)) => {
            tracing::warn!(peer, error = %chain(&error), "connection refused");
            None
        }
        Err(_) => {
            tracing::warn!(peer, "connection refused: no handshake in time");
            None
        }
    }
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
    let stream = TlsAcceptor::from(Arc::new(config))
        .accept(stream)
        .await
        .map_err(failed)?;
    let Some(identity) = seen.identity() else {
        return Err(failed(io::Error::other("the peer showed no identity")));
    };
    let certificate = shown(stream.get_ref().1.peer_certificates()).map_err(failed)?;
    let peer = Peer::Tls {
        identity,
        addr,
        certificate,
    };
    Ok(Conn::tls(stream.into(), peer))
}

/// The chain that a peer showed.
pub(super) fn shown(chain: Option<&[CertificateDer<'static>]>) -> io::Result<Shown> {
    Shown::of(chain).map_err(io::Error::other)
}

/// The user and process behind a unix socket; an error where the user is not ours.
pub(super) fn unix_peer(stream: &UnixStream, name: &str) -> Result<Peer, LinkError> {
    let failed = |source| LinkError::Handshake {
        peer: name.to_owned(),
        claimed: None,
        source,
    };
    let credentials = stream.peer_cred().map_err(failed)?;
    check_user(credentials.uid(), own_uid(), name)?;
    Ok(Peer::Unix {
        uid: credentials.uid(),
        pid: credentials.pid(),
    })
}

fn check_user(found: u32, expected: u32, name: &str) -> Result<(), LinkError> {
    if found == expected {
        return Ok(());
    }
    Err(LinkError::WrongUser {
        peer: name.to_owned(),
        found,
        expected,
    })
}

fn inode(path: &Path) -> Option<u64> {
    fs::symlink_metadata(path).ok().map(|meta| meta.ino())
}

/// Removes the socket when nobody listens any more, unless another process has put its own there.
struct SocketFile {
    path: PathBuf,
    inode: Option<u64>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.inode.is_some()
            && inode(&self.path) == self.inode
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "remove the socket");
        }
    }
}

/// Connections whose peers are checked. Never ends by itself.
pub struct Incoming {
    accept: Accept<Conn>,
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
        self.accept.poll_next_unpin(cx)
    }
}

/// One connection to a checked peer.
#[derive(Debug)]
pub struct Conn {
    io: Io,
    peer: Peer,
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
        }
    }

    pub(super) fn unix(stream: UnixStream, peer: Peer) -> Self {
        Self {
            io: Io::Unix(stream),
            peer,
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
        match &mut self.get_mut().io {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_user() {
        check_user(1000, 1000, "s").unwrap();
        let error = check_user(0, 1000, "unix:/s").unwrap_err();
        let words = "the process behind unix:/s belongs to uid 0, not to uid 1000";
        assert_eq!(error.to_string(), words);
    }
}
