//! Datagrams of containers: received with the address that was dialled, and answered with that address as the source.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::AsRawFd as _,
};

use nix::{
    cmsg_space,
    libc::{in_addr, in_pktinfo},
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg},
};
use tokio::{io::Interest, net::UdpSocket};

/// The container's address, and the target's.
pub(super) type Key = (SocketAddrV4, SocketAddrV4);

/// Receives a datagram: from which address, to which address, and how many bytes.
pub(super) async fn receive(
    socket: &UdpSocket,
    buffer: &mut [u8],
) -> io::Result<(SocketAddrV4, Ipv4Addr, usize)> {
    let received = socket.async_io(Interest::READABLE, || {
        let mut space = cmsg_space!(in_pktinfo);
        let mut parts = [IoSliceMut::new(&mut *buffer)];
        let fd = socket.as_raw_fd();
        let message = recvmsg::<SockaddrIn>(fd, &mut parts, Some(&mut space), MsgFlags::empty())?;
        let to = message.cmsgs()?.find_map(|control| {
            let ControlMessageOwned::Ipv4PacketInfo(info) = control else {
                return None;
            };
            Some(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes()))
        });
        let from = message.address.map(SocketAddrV4::from);
        let (from, to) = from.zip(to).ok_or(io::ErrorKind::InvalidData)?;
        Ok((from, to, message.bytes))
    });
    received.await
}

/// Sends a datagram to the container, from the address that it has sent to.
pub(super) async fn reply(socket: &UdpSocket, (to, from): Key, data: &[u8]) -> io::Result<()> {
    let info = in_pktinfo {
        ipi_ifindex: 0,
        ipi_spec_dst: in_addr {
            s_addr: u32::from_ne_bytes(from.ip().octets()),
        },
        ipi_addr: in_addr { s_addr: 0 },
    };
    let to = SockaddrIn::from(to);
    socket
        .async_io(Interest::WRITABLE, || {
            let control = [ControlMessage::Ipv4PacketInfo(&info)];
            let parts = [IoSlice::new(data)];
            sendmsg(
                socket.as_raw_fd(),
                &parts,
                &control,
                MsgFlags::empty(),
                Some(&to),
            )?;
            Ok(())
        })
        .await
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{setsockopt, sockopt::Ipv4PacketInfo};

    use super::*;

    #[tokio::test]
    async fn an_answer_comes_from_the_address_that_was_asked() {
        let socket = UdpSocket::bind("0.0.0.0:0").await.unwrap();
        setsockopt(&socket, Ipv4PacketInfo, &true).unwrap();
        let port = socket.local_addr().unwrap().port();
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let target = SocketAddrV4::new(Ipv4Addr::new(127, 9, 9, 9), port);
        client.send_to(b"question", target).await.unwrap();
        let mut buffer = vec![0; 100];
        let (from, to, count) = receive(&socket, &mut buffer).await.unwrap();
        assert_eq!(
            (to, buffer.get(..count)),
            (*target.ip(), Some(&b"question"[..]))
        );
        reply(&socket, (from, target), b"answer").await.unwrap();
        let (count, source) = client.recv_from(&mut buffer).await.unwrap();
        assert_eq!(source, target.into());
        assert_eq!(buffer.get(..count), Some(&b"answer"[..]));
    }
}
