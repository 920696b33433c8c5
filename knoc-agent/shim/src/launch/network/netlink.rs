//! Configures the loopback interface of this process's network namespace through `NETLINK_ROUTE`.

use std::{io, net::Ipv4Addr, os::fd::AsRawFd as _};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};

// Names, numbers and layouts of `linux/netlink.h`, `linux/rtnetlink.h`, `linux/if_addr.h` and `net/if.h`.
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST: u16 = 0x5;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const HEADER: usize = 16;

/// The kernel gives this index to the loopback interface of every network namespace.
const LOOPBACK: u32 = 1;

/// Answers are shorter.
const ANSWER: usize = 4096;

/// Brings the loopback interface up, and adds `address` to it.
pub(super) fn loopback(address: Ipv4Addr) -> io::Result<()> {
    let up = message(RTM_NEWLINK, REQUEST, &link_up());
    let add = message(RTM_NEWADDR, REQUEST, &new_address(address));
    ask(&up)?;
    ask(&add)
}

/// PURE: a message with its header.
fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).unwrap_or_default();
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence and sender: one question is asked at a time.
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// PURE: an `ifinfomsg` that sets the flag `IFF_UP`, and changes no other.
fn link_up() -> Vec<u8> {
    let mut body = vec![AF_UNSPEC, 0, 0, 0];
    for word in [LOOPBACK, IFF_UP, IFF_UP] {
        body.extend(word.to_ne_bytes());
    }
    body
}

/// PURE: an `ifaddrmsg` for one address without a network.
fn new_address(address: Ipv4Addr) -> Vec<u8> {
    // Prefix length, no flags, and the scope of an address that is valid everywhere.
    let mut body = vec![AF_INET, 32, 0, 0];
    body.extend(LOOPBACK.to_ne_bytes());
    for kind in [IFA_LOCAL, IFA_ADDRESS] {
        body.extend(8_u16.to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(address.octets());
    }
    body
}

/// Sends a request, and returns the error in the kernel's answer.
fn ask(request: &[u8]) -> io::Result<()> {
    let (protocol, flags) = (SockProtocol::NetlinkRoute, SockFlag::SOCK_CLOEXEC);
    let kernel = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    send(kernel.as_raw_fd(), request, MsgFlags::empty())?;
    let mut answer = vec![0; ANSWER];
    let count = recv(kernel.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    match error_of(answer.get(..count).unwrap_or_default()) {
        Some(0) => Ok(()),
        Some(errno) => Err(Errno::from_raw(errno.saturating_neg()).into()),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// PURE: the error number of the kernel's answer, which is negative, or 0. `None` if it is no such answer.
fn error_of(answer: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    let error = answer.get(HEADER..HEADER + 4)?.try_into().ok()?;
    (kind == NLMSG_ERROR).then(|| i32::from_ne_bytes(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_kernels_layout() {
        let up = message(RTM_NEWLINK, REQUEST, &link_up());
        assert_eq!(up.len(), 32);
        assert_eq!(up.get(..4), Some(&32_u32.to_ne_bytes()[..]));
        let body = new_address(Ipv4Addr::new(192, 0, 0, 2));
        assert_eq!(body.len(), 24);
        assert!(body.ends_with(&[192, 0, 0, 2]));
    }

    #[test]
    fn the_kernels_answer_is_an_error_number_or_nothing() {
        let answer = |error: i32| message(NLMSG_ERROR, 0, &error.to_ne_bytes());
        assert_eq!(error_of(&answer(0)), Some(0));
        assert_eq!(error_of(&answer(-1)), Some(-1));
        assert_eq!(error_of(&message(RTM_NEWLINK, 0, &[0; 4])), None);
        assert_eq!(error_of(&[0; 10]), None);
    }

    #[test]
    fn without_rights_the_kernel_refuses() {
        // The tests' own network is not changed: the address of another family's length is refused for anybody.
        let broken = message(RTM_NEWADDR, REQUEST, &[AF_INET, 200, 0, 0]);
        ask(&broken).unwrap_err();
    }
}
