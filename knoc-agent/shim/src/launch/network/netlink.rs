//! Configures interfaces, addresses and routes of this process's network namespace through `NETLINK_ROUTE`.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};

use super::range::Range;

// Names, numbers and layouts of `linux/netlink.h`, `linux/rtnetlink.h`, `linux/if_addr.h`, `linux/if_link.h`,
// `linux/veth.h` and `net/if.h`.
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST: u16 = 0x5;
/// With `NLM_F_CREATE | NLM_F_EXCL`.
const CREATE: u16 = REQUEST | 0x600;
/// With `NLM_F_CREATE | NLM_F_REPLACE`.
const REPLACE: u16 = REQUEST | 0x500;
const IFF_UP: u32 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RT_TABLE_MAIN: u8 = 254;
const RT_TABLE_LOCAL: u8 = 255;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RT_SCOPE_HOST: u8 = 254;
const RTN_UNICAST: u8 = 1;
const RTN_LOCAL: u8 = 2;
const RTN_UNREACHABLE: u8 = 7;
const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const HEADER: usize = 16;

/// The kernel gives this index to the loopback interface of every network namespace.
pub(super) const LOOPBACK: u32 = 1;

/// Answers are shorter.
const ANSWER: usize = 4096;

/// How the addresses of a route are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// They are this host's own.
    Local,
    /// They are at the other end of the link.
    Link,
    /// Through a router at the other end, with this address of the host's own as the source.
    Via { router: Ipv4Addr, source: Ipv4Addr },
    /// Not at all, over no interface: whoever sends there learns that the host is unreachable.
    Nowhere,
}

/// A route to `to` over the interface with the index `device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) to: Range,
    pub(super) device: u32,
    pub(super) way: Way,
}

/// Brings an interface up.
pub(super) fn bring_up(device: u32) -> io::Result<()> {
    ask(&message(RTM_NEWLINK, REQUEST, &link_up(device)))
}

/// Sets the size of the largest packet.
pub(super) fn set_mtu(device: u32, mtu: u32) -> io::Result<()> {
    ask(&message(RTM_NEWLINK, REQUEST, &link_mtu(device, mtu)))
}

/// Adds `address` to an interface, without a network.
pub(super) fn add_address(device: u32, address: Ipv4Addr) -> io::Result<()> {
    ask(&message(
        RTM_NEWADDR,
        REQUEST,
        &new_address(device, address),
    ))
}

/// Creates two interfaces that are the ends of one link: `name` here, and `peer` in the network namespace `there`.
pub(super) fn create_pair(name: &str, peer: &str, there: BorrowedFd<'_>) -> io::Result<()> {
    ask(&message(
        RTM_NEWLINK,
        CREATE,
        &new_pair(name, peer, there.as_raw_fd()),
    ))
}

/// Adds a route, or replaces the one to the same addresses.
pub(super) fn add_route(route: Route) -> io::Result<()> {
    ask(&message(RTM_NEWROUTE, REPLACE, &route_body(route)))
}

/// Removes a route. It is no error if there is none.
pub(super) fn remove_route(route: Route) -> io::Result<()> {
    let removed = ask(&message(RTM_DELROUTE, REQUEST, &route_body(route)));
    let none = Some(Errno::ESRCH as i32);
    if removed
        .as_ref()
        .is_err_and(|error| error.raw_os_error() == none)
    {
        return Ok(());
    }
    removed
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

/// PURE: adds an attribute, padded to a multiple of 4 bytes.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or_default();
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// PURE: an `ifinfomsg` for the interface with this index, or with 0 for one that does not exist yet. It sets the `flags`
/// and changes no others.
fn interface(device: u32, flags: u32) -> Vec<u8> {
    let mut body = vec![AF_UNSPEC, 0, 0, 0];
    for word in [device, flags, flags] {
        body.extend(word.to_ne_bytes());
    }
    body
}

/// PURE: sets the flag `IFF_UP`.
fn link_up(device: u32) -> Vec<u8> {
    interface(device, IFF_UP)
}

/// PURE: sets the size of the largest packet.
fn link_mtu(device: u32, mtu: u32) -> Vec<u8> {
    let mut body = interface(device, 0);
    attribute(&mut body, IFLA_MTU, &mtu.to_ne_bytes());
    body
}

/// PURE: the pair of interfaces. `there` is the descriptor of the peer's network namespace.
fn new_pair(name: &str, peer: &str, there: i32) -> Vec<u8> {
    let text = |name: &str| [name.as_bytes(), &[0]].concat();
    let mut other = interface(0, 0);
    attribute(&mut other, IFLA_IFNAME, &text(peer));
    attribute(&mut other, IFLA_NET_NS_FD, &there.to_ne_bytes());
    let (mut data, mut info, mut body) = (Vec::new(), Vec::new(), interface(0, 0));
    attribute(&mut data, VETH_INFO_PEER, &other);
    attribute(&mut info, IFLA_INFO_KIND, b"veth");
    attribute(&mut info, IFLA_INFO_DATA, &data);
    attribute(&mut body, IFLA_IFNAME, &text(name));
    attribute(&mut body, IFLA_LINKINFO, &info);
    body
}

/// PURE: an `ifaddrmsg` for one address without a network.
fn new_address(device: u32, address: Ipv4Addr) -> Vec<u8> {
    // Prefix length, no flags, and the scope of an address that is valid everywhere.
    let mut body = vec![AF_INET, 32, 0, RT_SCOPE_UNIVERSE];
    body.extend(device.to_ne_bytes());
    for kind in [IFA_LOCAL, IFA_ADDRESS] {
        attribute(&mut body, kind, &address.octets());
    }
    body
}

/// PURE: an `rtmsg` with its attributes.
fn route_body(route: Route) -> Vec<u8> {
    let (table, scope, kind) = match route.way {
        Way::Local => (RT_TABLE_LOCAL, RT_SCOPE_HOST, RTN_LOCAL),
        Way::Link => (RT_TABLE_MAIN, RT_SCOPE_LINK, RTN_UNICAST),
        Way::Via { .. } => (RT_TABLE_MAIN, RT_SCOPE_UNIVERSE, RTN_UNICAST),
        Way::Nowhere => (RT_TABLE_MAIN, RT_SCOPE_UNIVERSE, RTN_UNREACHABLE),
    };
    // No source range, no type of service; no flags at the end.
    let mut body = vec![
        AF_INET,
        route.to.prefix,
        0,
        0,
        table,
        RTPROT_STATIC,
        scope,
        kind,
    ];
    body.extend([0; 4]);
    attribute(&mut body, RTA_DST, &route.to.first.octets());
    if route.way != Way::Nowhere {
        attribute(&mut body, RTA_OIF, &route.device.to_ne_bytes());
    }
    if let Way::Via { router, source } = route.way {
        attribute(&mut body, RTA_GATEWAY, &router.octets());
        attribute(&mut body, RTA_PREFSRC, &source.octets());
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
        let up = message(RTM_NEWLINK, REQUEST, &link_up(LOOPBACK));
        assert_eq!(up.len(), 32);
        assert_eq!(up.get(..4), Some(&32_u32.to_ne_bytes()[..]));
        let mtu = link_mtu(7, 65_000);
        assert_eq!(mtu.len(), 16 + 8);
        assert!(mtu.ends_with(&65_000_u32.to_ne_bytes()));
        let body = new_address(LOOPBACK, Ipv4Addr::new(192, 0, 0, 2));
        assert_eq!(body.len(), 24);
        assert!(body.ends_with(&[192, 0, 0, 2]));
    }

    #[test]
    fn routes_have_the_kernels_layout() {
        let to = Range::parse("10.96.0.0/12").unwrap();
        let of = |way| route_body(Route { to, device: 7, way });
        let local = of(Way::Local);
        assert_eq!(local.get(..8), Some(&[2, 12, 0, 0, 255, 4, 254, 2][..]));
        // The header, the destination and the interface.
        assert_eq!(local.len(), 12 + 8 + 8);
        assert_eq!(of(Way::Link).get(4..8), Some(&[254, 4, 253, 1][..]));
        let nowhere = of(Way::Nowhere);
        assert_eq!(nowhere.get(4..8), Some(&[254, 4, 0, 7][..]));
        assert_eq!(nowhere.len(), 12 + 8, "without an interface");
        let way = Way::Via {
            router: Ipv4Addr::new(169, 254, 1, 1),
            source: Ipv4Addr::new(192, 0, 0, 2),
        };
        let via = of(way);
        assert_eq!(via.len(), local.len() + 16);
        let gateway = [8, 0, 5, 0, 169, 254, 1, 1];
        assert_eq!(via.get(28..36), Some(&gateway[..]));
    }

    #[test]
    fn a_pair_names_both_ends_and_the_other_namespace() {
        let body = new_pair("here", "there", 9);
        // Each attribute begins at a multiple of 4, and the outer ones contain the inner ones.
        assert_eq!(body.len() % 4, 0);
        let has = |part: &[u8]| body.windows(part.len()).any(|window| window == part);
        assert!(has(b"\x09\0\x03\0here\0\0\0\0"), "{body:?}");
        assert!(has(b"\x0a\0\x03\0there\0\0\0"), "{body:?}");
        assert!(has(b"\x08\0\x1c\0\x09\0\0\0"), "{body:?}");
        assert!(has(b"\x08\0\x01\0veth"), "{body:?}");
        let info = body.get(16 + 12..16 + 14).unwrap();
        let info = usize::from(u16::from_ne_bytes(info.try_into().unwrap()));
        assert_eq!(16 + 12 + info, body.len());
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
