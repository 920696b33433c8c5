//! The carrier `tcp:HOST:PORT`, which always carries TLS.
use std::{
    io,
    net::SocketAddr,
    task::{Context, Poll, ready},
};

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::{Carrier, Dial, InvalidCarrier, Unverified};
use crate::{LinkError, origin::Origin};

/// How many connections the kernel may queue between two polls (listen(2)). A client whose connection does not fit
/// retries only after a second, so this is the system's default maximum.
const BACKLOG: u32 = 4096;

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
        }
        arrived
    }
}
