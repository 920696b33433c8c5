//! The carrier `tcp:HOST:PORT`, which always carries TLS.
use std::{
    io,
    net::SocketAddr,
    task::{Context, Poll, ready},
    time::Duration,
};

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::{Carrier, Dial, InvalidCarrier, Unverified};
use crate::{LinkError, origin::Origin};

/// How many connections the kernel may queue between two polls (listen(2)). A client whose connection does not fit
/// retries only after a second, so this is the system's default maximum.
const BACKLOG: u32 = 4096;

/// A host that was switched off is noticed after 40 s, as by the keepalive of HTTP/2 on links: the first probe after this
/// time without data, then [`PROBES`] of them, this far apart.
const SILENT: Duration = Duration::from_secs(15);
const BETWEEN_PROBES: Duration = Duration::from_secs(5);
const PROBES: u32 = 5;

/// Lets the kernel find out whether the other host is still there, which works although the processes at both ends may be
/// suspended.
pub fn keep_alive(io: &TcpStream) {
    // A kernel that lacks an option probes later.
    sockopt::set_tcp_keepidle(io, SILENT).ok();
    sockopt::set_tcp_keepintvl(io, BETWEEN_PROBES).ok();
    sockopt::set_tcp_keepcnt(io, PROBES).ok();
    sockopt::set_socket_keepalive(io, true).ok();
}

/// Parses `HOST:PORT`.
pub(super) fn parse(address: &str) -> Result<Carrier, InvalidCarrier> {
    let wrong = || InvalidCarrier::Address {
        address: address.to_owned(),
    };
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    let bare_ipv6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
    let spaced = host.contains(|c: char| c.is_whitespace() || c == '/');
    if host.is_empty() || bare_ipv6 || spaced || port.parse::<u16>().is_err() {
        return Err(wrong());
    }
    Ok(Carrier::Tcp(address.to_owned()))
}

/// Dials `HOST:PORT`.
#[derive(Debug)]
pub struct Dialler<'a> {
    /// A host name or IP address and a port, as `HOST:PORT`.
    pub address: &'a str,
}

impl Dial for Dialler<'_> {
    type Io = TcpStream;

    async fn dial(&self) -> Result<Unverified<TcpStream>, LinkError> {
        let failed = |source| LinkError::Connect {
            carrier: Carrier::Tcp(self.address.to_owned()),
            source,
        };
        let io = TcpStream::connect(self.address).await.map_err(failed)?;
        io.set_nodelay(true).map_err(failed)?;
        keep_alive(&io);
        let origin = Origin::Address(io.peer_addr().map_err(failed)?);
        Ok(Unverified { io, origin })
    }
}

/// A TCP listener on an address of this host.
#[derive(Debug)]
pub struct Listener(TcpListener);

impl Listener {
    /// Listens on `addr`. Must be called within a tokio runtime.
    pub fn bind(addr: SocketAddr) -> io::Result<Self> {
        let socket = if addr.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        socket.listen(BACKLOG).map(Self)
    }
}

impl super::Listener for Listener {
    type Io = TcpStream;

    const STRANGERS: bool = true;

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Unverified<TcpStream>>> {
        let (io, from) = ready!(self.0.poll_accept(cx))?;
        let origin = Origin::Address(from);
        Poll::Ready(Ok(Unverified { io, origin }))
    }

    fn local_addr(&self) -> Option<SocketAddr> {
        self.0.local_addr().ok()
    }

    /// Resets a connection that is dropped before its first byte has arrived, so that a flood does not leave thousands
    /// of half-closed connections in the kernel.
    async fn first_byte(io: &TcpStream) -> bool {
        // If this fails, the connection has ended, which the next call reports.
        drop(io.set_zero_linger());
        let arrived = matches!(io.peek(&mut [0]).await, Ok(1..));
        if arrived {
            // From now on the last bytes, such as a TLS alert, must reach the peer, and small messages are sent at
            // once.
            sockopt::set_socket_linger(io, None).ok();
            io.set_nodelay(true).ok();
            keep_alive(io);
        }
        arrived
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncWriteExt as _;

    use super::{super::Listener as _, *};

    #[tokio::test]
    async fn both_ends_find_out_whether_the_other_host_is_there() {
        let listener = Listener::bind(([127, 0, 0, 1], 0).into()).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let dialler = Dialler { address: &address };
        let mut ours = dialler.dial().await.unwrap().io;
        let theirs = poll_fn(|cx| listener.poll_accept(cx)).await.unwrap().io;
        ours.write_all(b"x").await.unwrap();
        assert!(Listener::first_byte(&theirs).await);
        for io in [&ours, &theirs] {
            assert!(sockopt::socket_keepalive(io).unwrap());
            assert_eq!(sockopt::tcp_keepidle(io).unwrap(), SILENT);
        }
    }
}
