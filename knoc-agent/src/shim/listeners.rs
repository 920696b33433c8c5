//! Who listens on a port, and is it the pod? PURE reading of `/proc/net/tcp` and the choice of an address; beside it
//! the look at `/proc` (blocking, but memory only).
//!
//! Containers share the node's network, where other users' programs and other pods listen too: only what a process of
//! this job holds open counts.

use std::{
    collections::HashSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use super::proc;

/// `st` of a listening socket.
const LISTEN: &str = "0A";

/// A listening TCP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Listener {
    pub(crate) address: SocketAddr,
    pub(crate) inode: u64,
}

/// Where a connection may go.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Loopback addresses at which only the pod's own answer, in the order to try.
    Own(Vec<IpAddr>),
    /// Somebody answers at the loopback address, but it is not the pod.
    Foreign,
    /// The pod listens on this port, but at these addresses only.
    Elsewhere(Vec<IpAddr>),
    /// Nobody.
    Nobody,
}

/// PURE: the listeners on `port` in the text of `/proc/net/tcp` or `tcp6`.
pub(crate) fn parse(text: &str, port: u16) -> Vec<Listener> {
    let lines = text.lines().skip(1);
    lines
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace().skip(1);
            let local = fields.next()?;
            let state = fields.nth(1)?;
            let inode = fields.nth(5)?.parse().ok()?;
            let address = address(local)?;
            (state == LISTEN && address.port() == port).then_some(Listener { address, inode })
        })
        .collect()
}

/// PURE: `0100007F:1F90`; the words of the address are in the machine's byte order.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let word = ip.get(at..at + 8)?;
        u32::from_str_radix(word, 16).ok().map(u32::to_ne_bytes)
    };
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            Ipv6Addr::from(bytes).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// PURE: where to connect, given who listens and which sockets are the pod's.
///
/// The kernel gives a connection to the socket with the narrowest address, so of all that would answer only those
/// decide; several of the same address share it (`SO_REUSEPORT`), then all must be the pod's.
pub(crate) fn choose(listeners: &[Listener], own: &HashSet<u64>) -> Choice {
    let at = |ip: IpAddr| {
        let same = listeners.iter().filter(move |one| one.address.ip() == ip);
        same.collect::<Vec<_>>()
    };
    let mapped = |ip: Ipv4Addr| IpAddr::from(ip.to_ipv6_mapped());
    let both = at(Ipv6Addr::UNSPECIFIED.into());
    let four = [
        at(Ipv4Addr::LOCALHOST.into()),
        at(mapped(Ipv4Addr::LOCALHOST)),
        at(Ipv4Addr::UNSPECIFIED.into()),
        at(mapped(Ipv4Addr::UNSPECIFIED)),
    ];
    let four = four.into_iter().find(|sockets| !sockets.is_empty());
    let six = [at(Ipv6Addr::LOCALHOST.into()), both.clone()];
    let six = six.into_iter().find(|sockets| !sockets.is_empty());
    // Bound to all of IPv6, a socket answers IPv4 as well unless it was told not to.
    let through_both = Some(both).filter(|sockets| four.is_none() && !sockets.is_empty());
    let (localhost4, localhost6) = (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
    let ways = [
        (localhost4, four),
        (localhost6, six),
        (localhost4, through_both),
    ];
    let mut foreign = false;
    let mut addresses = Vec::new();
    for (address, sockets) in ways {
        let Some(sockets) = sockets else { continue };
        if sockets.iter().all(|socket| own.contains(&socket.inode)) {
            addresses.push(address);
        } else {
            foreign = true;
        }
    }
    if !addresses.is_empty() {
        return Choice::Own(addresses);
    }
    if foreign {
        return Choice::Foreign;
    }
    let owned = listeners.iter().filter(|one| own.contains(&one.inode));
    let elsewhere: Vec<_> = owned.map(|one| one.address.ip()).collect();
    if elsewhere.is_empty() {
        Choice::Nobody
    } else {
        Choice::Elsewhere(elsewhere)
    }
}

/// Who listens on `port` now.
pub(crate) fn on(port: u16) -> Vec<Listener> {
    let read =
        |name: &str| fs::read_to_string(Path::new("/proc/net").join(name)).unwrap_or_default();
    let mut all = parse(&read("tcp"), port);
    all.extend(parse(&read("tcp6"), port));
    all
}

/// Which of these listeners a process below `root` holds open.
pub(crate) fn owned(listeners: &[Listener], root: u32) -> HashSet<u64> {
    let wanted: HashSet<u64> = listeners.iter().map(|one| one.inode).collect();
    let mut found = HashSet::new();
    if wanted.is_empty() {
        return found;
    }
    for pid in proc::below(root) {
        // Another user's processes do not show theirs; the pod's do.
        let entries = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten();
        let links = entries
            .flatten()
            .filter_map(|fd| fs::read_link(fd.path()).ok());
        found.extend(
            links
                .filter_map(|link| inode(link.to_str()?))
                .filter(|inode| wanted.contains(inode)),
        );
        if found.len() == wanted.len() {
            break;
        }
    }
    found
}

/// PURE: `socket:[4711]`.
fn inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 41 1 0000000000000000 100 0 0 10 0
   1: 0100007F:1F90 0100007F:D431 01 00000000:00000000 00:00000000 00000000  1000        0 42 1 0000000000000000 20 4 30 10 -1
   2: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 43 1 0000000000000000 100 0 0 10 0
";
    const TCP6: &str = "  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 51 1 0000000000000000 100 0 0 10 0
   1: 0000000000000000FFFF00000100007F:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 52 1 0000000000000000 100 0 0 10 0
";

    fn listener(ip: &str, inode: u64) -> Listener {
        Listener {
            address: SocketAddr::new(ip.parse().unwrap(), 8080),
            inode,
        }
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn the_kernels_table_is_read() {
        assert_eq!(parse(TCP, 8080), [listener("127.0.0.1", 41)]);
        assert_eq!(
            parse(TCP6, 8080),
            [listener("::1", 51), listener("::ffff:127.0.0.1", 52)]
        );
        assert_eq!(parse(TCP, 22).len(), 1);
        assert_eq!(parse("", 22), []);
        assert_eq!(parse("head\nrubbish\n 0: zz:1F90 x 0A\n", 8080), []);
    }

    #[test]
    fn only_the_pods_own_listeners_are_chosen() {
        let (four, six) = ("127.0.0.1".parse().unwrap(), "::1".parse().unwrap());
        let cases: [(&[(&str, u64)], Choice); 12] = [
            (&[], Choice::Nobody),
            (&[("127.0.0.1", 1)], Choice::Own(vec![four])),
            (&[("0.0.0.0", 1)], Choice::Own(vec![four])),
            (&[("::1", 1)], Choice::Own(vec![six])),
            // It may or may not answer IPv4.
            (&[("::", 1)], Choice::Own(vec![six, four])),
            (&[("0.0.0.0", 1), ("::1", 1)], Choice::Own(vec![four, six])),
            (&[("0.0.0.0", 9)], Choice::Foreign),
            // The narrower address gets the connection.
            (&[("0.0.0.0", 1), ("127.0.0.1", 9)], Choice::Foreign),
            (&[("0.0.0.0", 9), ("127.0.0.1", 1)], Choice::Own(vec![four])),
            // Another's IPv4 beside our IPv6: only the latter.
            (&[("0.0.0.0", 9), ("::", 1)], Choice::Own(vec![six])),
            // Shared with somebody else.
            (&[("127.0.0.1", 1), ("127.0.0.1", 9)], Choice::Foreign),
            (
                &[("10.0.0.5", 1), ("10.0.0.6", 9)],
                Choice::Elsewhere(vec!["10.0.0.5".parse().unwrap()]),
            ),
        ];
        let own = HashSet::from([1]);
        for (listeners, expected) in cases {
            let all: Vec<_> = listeners
                .iter()
                .map(|(ip, inode)| listener(ip, *inode))
                .collect();
            assert_eq!(choose(&all, &own), expected, "{listeners:?}");
        }
    }

    #[test]
    fn a_real_listener_has_its_owner() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let all = on(socket.local_addr().unwrap().port());
        assert_eq!(all.len(), 1, "{all:?}");
        // Not below us, but below our parent.
        assert_eq!(owned(&all, std::process::id()), HashSet::new());
        let parent = std::os::unix::process::parent_id();
        assert_eq!(owned(&all, parent), HashSet::from([all[0].inode]));
        assert_eq!(inode("socket:[12]"), Some(12));
        assert_eq!(inode("pipe:[12]"), None);
    }
}
