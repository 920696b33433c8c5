//! Who listens on a port, and who has the other end of a connection, from the kernel's tables (`NETLINK_SOCK_DIAG`). The kernel
//! is asked for that port or connection only, so the answer costs little also on a node with much memory or many
//! connections, where `/proc/net/tcp` takes milliseconds and may lack sockets while others come and go.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4},
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

use super::Listener;

// Names, numbers and offsets of `linux/netlink.h`, `linux/sock_diag.h` and `linux/inet_diag.h`.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP: u16 = 0x301;
/// `NLM_F_REQUEST`.
const REQUEST_ONE: u16 = 0x1;
const IPPROTO_TCP: u8 = 6;
/// `1 << TCP_LISTEN`.
const LISTENING: u32 = 1 << 10;
/// Connections of a process: neither waiting to be forgotten (6, 7), nor listeners (10), nor half open (12).
const CONNECTED: u32 = 0b11_0011_1110;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const HEADER: usize = 16;
const REQUEST: usize = HEADER + 56;
const MESSAGE: usize = HEADER + 72;

/// An answer comes in pieces of at most this size, and of at most this number: a port has few listeners.
const PIECE: usize = 32 << 10;
const PIECES: u32 = 64;

/// The listeners on `port`, in the kernel's order. `None` if this kernel does not tell.
pub(crate) fn listening(port: u16) -> Option<Vec<Listener>> {
    let protocol = SockProtocol::NetlinkSockDiag;
    let flags = SockFlag::SOCK_CLOEXEC;
    let kernel = socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol).ok()?;
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        ask(&kernel, family, port, &mut found)?;
    }
    Some(found)
}

fn ask(kernel: &OwnedFd, family: u8, port: u16, found: &mut Vec<Listener>) -> Option<()> {
    send(
        kernel.as_raw_fd(),
        &request(family, port),
        MsgFlags::empty(),
    )
    .ok()?;
    let mut piece = vec![0; PIECE];
    for _ in 0..PIECES {
        let count = recv(kernel.as_raw_fd(), &mut piece, MsgFlags::MSG_DONTWAIT).ok()?;
        if take(piece.get(..count)?, port, found)? {
            return Some(());
        }
    }
    None
}

/// The user who has the socket that is connected from `client` to `server`. `None` if there is none, or if this kernel does
/// not tell.
pub(crate) fn user(client: SocketAddrV4, server: SocketAddrV4) -> Option<u32> {
    let protocol = SockProtocol::NetlinkSockDiag;
    let flags = SockFlag::SOCK_CLOEXEC;
    let kernel = socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol).ok()?;
    let request = request_one(client, server);
    send(kernel.as_raw_fd(), &request, MsgFlags::empty()).ok()?;
    let mut piece = vec![0; PIECE];
    let count = recv(kernel.as_raw_fd(), &mut piece, MsgFlags::MSG_DONTWAIT).ok()?;
    user_in(piece.get(..count)?, client, server)
}

/// PURE: the user in the answer, if it is about this connection.
fn user_in(message: &[u8], client: SocketAddrV4, server: SocketAddrV4) -> Option<u32> {
    let kind = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
    let body = message.get(HEADER..MESSAGE)?;
    let connected = 1_u32.checked_shl((*body.get(1)?).into())? & CONNECTED != 0;
    let same = body.get(4..8)? == ports(client, server)
        && body.get(8..12)? == client.ip().octets()
        && body.get(24..28)? == server.ip().octets();
    (kind == SOCK_DIAG_BY_FAMILY && connected && same).then_some(u32_at(body, 64)?)
}

fn ports(client: SocketAddrV4, server: SocketAddrV4) -> [u8; 4] {
    let ([a, b], [c, d]) = (client.port().to_be_bytes(), server.port().to_be_bytes());
    [a, b, c, d]
}

/// PURE: the request for all listeners of this family on `port`.
fn request(family: u8, port: u16) -> Vec<u8> {
    let mut request = begin(DUMP, family, LISTENING);
    request.extend(port.to_be_bytes());
    // The other end, the interface and the cookie: any.
    request.resize(REQUEST, 0);
    request
}

/// PURE: the request for the socket that is connected from `client` to `server`.
fn request_one(client: SocketAddrV4, server: SocketAddrV4) -> Vec<u8> {
    let mut request = begin(REQUEST_ONE, AF_INET, u32::MAX);
    request.extend(ports(client, server));
    for address in [client.ip(), server.ip()] {
        request.extend(address.octets());
        request.extend([0; 12]);
    }
    // Any interface, and any cookie.
    request.extend([0; 4]);
    request.resize(REQUEST, u8::MAX);
    request
}

/// PURE: the header of a request, and what comes before the addresses.
fn begin(flags: u16, family: u8, states: u32) -> Vec<u8> {
    let mut request = Vec::with_capacity(REQUEST);
    let length = u32::try_from(REQUEST).unwrap_or_default();
    request.extend(length.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(flags.to_ne_bytes());
    // Sequence and sender.
    request.extend([0; 8]);
    request.extend([family, IPPROTO_TCP, 0, 0]);
    request.extend(states.to_ne_bytes());
    request
}

/// PURE: takes the listeners of one piece of the answer. Returns whether it was the last one.
fn take(mut piece: &[u8], port: u16, found: &mut Vec<Listener>) -> Option<bool> {
    while !piece.is_empty() {
        let length = usize::try_from(u32_at(piece, 0)?).ok()?;
        let kind = u16::from_ne_bytes(piece.get(4..6)?.try_into().ok()?);
        let message = piece.get(..length).filter(|_| length >= HEADER)?;
        match kind {
            NLMSG_DONE => return Some(true),
            NLMSG_ERROR => return None,
            SOCK_DIAG_BY_FAMILY => found.extend(listener(message)?.filter(|one| {
                // A kernel that does not know the filter sends all.
                one.address.port() == port
            })),
            _ => {}
        }
        // Messages begin at multiples of 4.
        piece = piece.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(false)
}

/// PURE: the listener of one message; the inner value is `None` for an unknown family.
#[expect(clippy::option_option, reason = "broken, or of no interest")]
fn listener(message: &[u8]) -> Option<Option<Listener>> {
    let body = message.get(HEADER..MESSAGE)?;
    let port = u16::from_be_bytes(body.get(4..6)?.try_into().ok()?);
    let ip: IpAddr = match *body.first()? {
        AF_INET => Ipv4Addr::from(<[u8; 4]>::try_from(body.get(8..12)?).ok()?).into(),
        AF_INET6 => Ipv6Addr::from(<[u8; 16]>::try_from(body.get(8..24)?).ok()?).into(),
        _ => return Some(None),
    };
    Some(Some(Listener {
        address: SocketAddr::new(ip, port),
        inode: u32_at(body, 68)?.into(),
    }))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use proptest::prelude::*;

    use super::{super::on, *};

    #[test]
    fn the_kernel_tells_the_same_as_its_table() {
        let four = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = four.local_addr().unwrap().port();
        // The other family may be switched off.
        let _six = TcpListener::bind(("::1", port)).ok();
        let Some(mut told) = listening(port) else {
            eprintln!("this kernel does not tell");
            return;
        };
        let mut table = on(port, None).listeners;
        told.sort_by_key(|one| one.inode);
        table.sort_by_key(|one| one.inode);
        assert!(!told.is_empty());
        assert_eq!(told, table);
    }

    #[test]
    fn the_kernel_tells_who_has_the_other_end_of_a_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let SocketAddr::V4(server) = listener.local_addr().unwrap() else {
            panic!("not IPv4");
        };
        let stream = std::net::TcpStream::connect(server).unwrap();
        let SocketAddr::V4(client) = stream.local_addr().unwrap() else {
            panic!("not IPv4");
        };
        let Some(told) = user(client, server) else {
            eprintln!("this kernel does not tell");
            return;
        };
        assert_eq!(told, rustix::process::getuid().as_raw());
        // One direction has ended.
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(user(client, server), Some(told));
        // A listener is no other end.
        let (other, nobody) = (SocketAddrV4::new(*client.ip(), 1), server);
        assert_eq!(user(nobody, other), None);
        assert_eq!(user_in(&[], client, server), None);
    }

    proptest! {
        #[test]
        fn no_answer_breaks_the_reader(piece in proptest::collection::vec(any::<u8>(), 0..200), port: u16) {
            let mut found = Vec::new();
            take(&piece, port, &mut found);
            prop_assert!(found.iter().all(|one| one.address.port() == port));
        }
    }
}
