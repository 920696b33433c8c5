//! The carrier `tcp:HOST:PORT`.
use std::{
    io,
    net::SocketAddr,
    task::{Context, Poll, ready},
};

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::{Carrier, Dial, InvalidCarrier, Unverified};
use crate::{LinkError, origin::Origin};

/// What the kernel may keep for us between two polls. Connections that do not fit are tried again by their clients only
/// after a second, so this is what the system allows by default.
const BACKLOG: u32 = 4096;

/// The carrier that `HOST:PORT` names.
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
    /// `HOST:PORT`
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

/// Listens on an address of this host.
#[derive(Debug)]
pub struct Listener(TcpListener);

impl Listener {
    /// Listens on `addr`. Has to be called inside a runtime.
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

    /// A connection that is dropped before its first byte came is reset: a flood must not leave thousands of half-closed
    /// connections to the kernel either.
    async fn first_byte(io: &TcpStream) -> bool {
        // If this fails the connection is gone, which the next call reports.
        drop(io.set_zero_linger());
        let came = matches!(io.peek(&mut [0]).await, Ok(1..));
        if came {
            // From now on the last bytes, such as a TLS alert, are to arrive, and small messages go out at once.
            sockopt::set_socket_linger(io, None).ok();
            io.set_nodelay(true).ok();
        }
        came
    }
}
