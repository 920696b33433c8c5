//! Finds out which process listens on a port, and whether it belongs to the pod.
//!
//! Containers share the node's network, in which other users' programs and other pods listen, too. Only sockets that a
//! process of this job holds open count. This is checked before a connection is made ([`choose`]) and after ([`is_own`]).
//! Parsing and choosing are pure; the functions that read `/proc` block, but touch no disk. The kernel is asked for the listeners
//! of one port ([`listening`]), which costs little. `/proc/net/tcp` takes milliseconds on a node with much memory, so it is
//! read only if the listeners changed meanwhile, or if the kernel does not answer.

mod diag;

use std::{
    collections::{HashMap, HashSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    path::Path,
};

use rustix::{
    fs::fstat,
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use super::proc;

/// Values of the column `st`: a listening socket, and a connection that is open at both ends.
const LISTEN: &str = "0A";
const ESTABLISHED: &str = "01";
/// Connections of a process, also those of which one direction has ended.
const CONNECTED: [&str; 5] = [ESTABLISHED, "04", "05", "08", "09"];

/// How often the listeners of a port are read again because they changed meanwhile.
const LOOKS: u32 = 20;
/// How often the tables are read to find the user of a connection.
const USER_LOOKS: usize = 3;

/// A listening TCP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Listener {
    pub(crate) address: SocketAddr,
    pub(crate) inode: u64,
}

/// The far end of a connection to a listener of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FarEnd {
    /// 0 if no process has accepted the connection yet, or if the one that did has closed it.
    pub(crate) inode: u64,
    pub(crate) established: bool,
}

/// The sockets of one port, as they were at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Table {
    /// In their own order, so that two of these lists can be compared.
    pub(crate) listeners: Vec<Listener>,
    /// The far end of the connection that was asked for.
    pub(crate) far_end: Option<FarEnd>,
}

/// Where a connection may go.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Loopback addresses at which only the pod listens, in the order in which to try them.
    Own(Vec<IpAddr>),
    /// Another process listens on the loopback address.
    Foreign,
    /// The pod listens on this port, but on these addresses only.
    Elsewhere(Vec<IpAddr>),
    /// No process listens.
    Nobody,
}

/// PURE: the listeners on `port` in the text of `/proc/net/tcp` or `tcp6`, and the far end of the connection from `client`
/// to `port`.
pub(crate) fn parse(text: &str, port: u16, client: Option<SocketAddr>) -> Table {
    let mut table = Table::default();
    for line in text.lines().skip(1) {
        let Some(socket) = Socket::parse(line) else {
            continue;
        };
        if socket.local.port() != port {
            continue;
        }
        if socket.state == LISTEN {
            table.listeners.push(Listener {
                address: socket.local,
                inode: socket.inode,
            });
        } else if client.is_some_and(|client| same(client, socket.remote)) {
            table.far_end = Some(FarEnd {
                inode: socket.inode,
                established: socket.state == ESTABLISHED,
            });
        }
    }
    table
}

/// One line of the table.
struct Socket<'a> {
    local: SocketAddr,
    remote: SocketAddr,
    state: &'a str,
    /// Who has it, as seen from the user namespace of the reader.
    uid: u32,
    inode: u64,
}

impl<'a> Socket<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace().skip(1);
        Some(Self {
            local: address(fields.next()?)?,
            remote: address(fields.next()?)?,
            state: fields.next()?,
            uid: fields.nth(3)?.parse().ok()?,
            inode: fields.nth(1)?.parse().ok()?,
        })
    }
}

/// Whether the addresses are the same. An IPv6 socket shows an IPv4 address in its mapped form.
fn same(one: SocketAddr, other: SocketAddr) -> bool {
    one.port() == other.port() && one.ip().to_canonical() == other.ip().to_canonical()
}

/// PURE: whether the connection that was made to `address` leads to the pod. `before` are the listeners when it was dialled,
/// all of which at that address were the pod's. `after` is what was found once the connection was made, and `own` are the
/// pod's sockets in it. If the answer is not certain, it is no.
///
/// - If the same sockets listen as before, one of them has the connection.
/// - If a process has accepted the connection, it must be the pod's, whatever became of the listener.
/// - If no process has accepted it, it waits at a listener that still exists, and all of these must be the pod's.
pub(crate) fn is_own(
    before: &[Listener],
    after: &Table,
    own: &HashSet<u64>,
    address: IpAddr,
) -> bool {
    if before == after.listeners {
        return true;
    }
    match after.far_end {
        Some(FarEnd { inode: 1.., .. }) => after
            .far_end
            .is_some_and(|far_end| own.contains(&far_end.inode)),
        Some(FarEnd {
            inode: 0,
            established: true,
        }) => match choose(&after.listeners, own) {
            Choice::Own(addresses) => addresses.contains(&address),
            Choice::Foreign | Choice::Elsewhere(_) | Choice::Nobody => false,
        },
        Some(FarEnd {
            inode: 0,
            established: false,
        })
        | None => false,
    }
}

/// PURE: parses `0100007F:1F90`. Each group of eight digits is a number in the machine's byte order.
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

/// PURE: where to connect, given all listeners and those that are the pod's.
///
/// The kernel gives a connection to the socket with the most specific address, so only those sockets decide. If several
/// have the same address they share it (`SO_REUSEPORT`), and all must be the pod's.
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

/// PURE: the user who has the socket that is connected from `client` to `server`.
fn user_in(text: &str, client: SocketAddr, server: SocketAddr) -> Option<u32> {
    let mut sockets = text.lines().skip(1).filter_map(Socket::parse);
    let found = sockets.find(|one| {
        let connected = CONNECTED.contains(&one.state);
        connected && same(one.local, client) && same(one.remote, server)
    });
    found.map(|socket| socket.uid)
}

/// The user who has the other end of the connection from `client` to `server` on this host.
pub(crate) fn user(client: SocketAddr, server: SocketAddr) -> Option<u32> {
    if let (SocketAddr::V4(client), SocketAddr::V4(server)) = (client, server)
        && let Some(user) = diag::user(client, server)
    {
        return Some(user);
    }
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    // A table that is read while sockets come and go may lack some.
    let mut looks = tables.into_iter().cycle().take(tables.len() * USER_LOOKS);
    looks.find_map(|path| user_in(&fs::read_to_string(path).ok()?, client, server))
}

/// The listeners on `port` now, and the far end of the connection to it from `client`.
pub(crate) fn on(port: u16, client: Option<SocketAddr>) -> Table {
    let read =
        |name: &str| fs::read_to_string(Path::new("/proc/net").join(name)).unwrap_or_default();
    let mut all = parse(&read("tcp"), port, client);
    let six = parse(&read("tcp6"), port, client);
    all.listeners.extend(six.listeners);
    all.listeners.sort_unstable();
    all.far_end = all.far_end.or(six.far_end);
    all
}

/// Who listens on `port` now, as [`on`] tells it, but at little cost if the kernel can be asked.
pub(crate) fn listening(port: u16) -> Vec<Listener> {
    let Some(mut told) = diag::listening(port) else {
        return on(port, None).listeners;
    };
    told.sort_unstable();
    told
}

/// Those sockets of `table` that a process below `root` holds open.
pub(crate) fn owned(table: &Table, root: u32) -> HashSet<u64> {
    let far_end = table.far_end.map(|far_end| far_end.inode);
    let wanted = inodes(&table.listeners).chain(far_end.filter(|inode| *inode != 0));
    holders(&wanted.collect(), root).into_keys().collect()
}

fn inodes(listeners: &[Listener]) -> impl Iterator<Item = u64> {
    listeners.iter().map(|one| one.inode)
}

/// The listeners on `port`, and those of them that a process below `root` holds open. A socket that is closed during the
/// search for its owner would seem to be foreign, so the search is repeated, within limits, until nothing changes.
pub(crate) fn look(port: u16, root: u32) -> (Vec<Listener>, HashSet<u64>) {
    let search = |all: &[Listener]| holders(&inodes(all).collect(), root).into_keys().collect();
    let mut all = listening(port);
    for _ in 0..LOOKS {
        let own = search(&all);
        let again = listening(port);
        if again == all {
            return (all, own);
        }
        all = again;
    }
    let own = search(&all);
    (all, own)
}

/// Whether the connection from `client` to `address` leads to a process below `root`. `before` are the listeners when it was
/// dialled, all of which at that address were the pod's. [`is_own`] decides it if they changed.
pub(crate) fn still_own(
    before: &[Listener],
    client: Option<SocketAddr>,
    address: SocketAddr,
    root: u32,
) -> bool {
    let port = address.port();
    if before == listening(port) {
        return true;
    }
    let after = on(port, client);
    let own = owned(&after, root);
    is_own(before, &after, &own, address.ip())
}

/// Copies of the descriptors of the listeners on `port` that processes below `root` hold open. While the shim holds them the
/// sockets keep listening, even if their process closes them. Some are missing if the kernel (before Linux 5.6) or its
/// configuration does not allow it.
pub(crate) fn hold(port: u16, root: u32) -> HashMap<u64, OwnedFd> {
    let held = holders(&inodes(&listening(port)).collect(), root).into_iter();
    held.filter_map(|(inode, (pid, number))| {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
        let process = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let socket = pidfd_getfd(process, number, PidfdGetfdFlags::empty()).ok()?;
        // The descriptor's number may belong to another file by now.
        (fstat(&socket).ok()?.st_ino == inode).then_some((inode, socket))
    })
    .collect()
}

/// The process that holds each of these sockets, and its descriptor's number, by the socket's inode.
fn holders(wanted: &HashSet<u64>, root: u32) -> HashMap<u64, (u32, i32)> {
    let mut found = HashMap::new();
    if wanted.is_empty() {
        return found;
    }
    for pid in proc::below(root) {
        // The descriptors of other users' processes cannot be read; those of the pod can.
        let entries = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten();
        for entry in entries.flatten() {
            let inode = fs::read_link(entry.path())
                .ok()
                .and_then(|link| inode(link.to_str()?));
            let number = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            if let (Some(inode), Some(number)) = (inode, number)
                && wanted.contains(&inode)
            {
                found.insert(inode, (pid, number));
            }
        }
        if found.len() == wanted.len() {
            break;
        }
    }
    found
}

/// PURE: the inode in a link such as `socket:[4711]`.
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
        let listeners = |text, port| parse(text, port, None).listeners;
        assert_eq!(listeners(TCP, 8080), [listener("127.0.0.1", 41)]);
        assert_eq!(
            listeners(TCP6, 8080),
            [listener("::1", 51), listener("::ffff:127.0.0.1", 52)]
        );
        assert_eq!(listeners(TCP, 22).len(), 1);
        assert_eq!(listeners("", 22), []);
        assert_eq!(listeners("head\nrubbish\n 0: zz:1F90 x 0A\n", 8080), []);
        let client = |port| Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port));
        let far_end = |inode, established| Some(FarEnd { inode, established });
        assert_eq!(parse(TCP, 8080, client(0xD431)).far_end, far_end(42, true));
        assert_eq!(parse(TCP, 8080, client(0xD432)).far_end, None);
        let mapped = TCP6.replace(
            "0000000000000000FFFF00000100007F:1F90 00000000000000000000000000000000:0000 0A",
            "0000000000000000FFFF00000100007F:1F90 0000000000000000FFFF00000100007F:D431 05",
        );
        assert_eq!(
            parse(&mapped, 8080, client(0xD431)).far_end,
            far_end(52, false)
        );
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn the_user_at_the_other_end_of_a_connection_is_found() {
        let at = |port| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        assert_eq!(user_in(TCP, at(8080), at(0xD431)), Some(1000));
        assert_eq!(user_in(TCP, at(8080), at(0xD432)), None);
        assert_eq!(user_in(TCP, at(0xD431), at(8080)), None);
        // One that was closed belongs to nobody, whatever the table says.
        let closed = TCP.replace("0100007F:D431 01", "0100007F:D431 06");
        assert_eq!(user_in(&closed, at(8080), at(0xD431)), None);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let client = std::net::TcpStream::connect(server).unwrap();
        let own = rustix::process::getuid().as_raw();
        assert_eq!(user(client.local_addr().unwrap(), server), Some(own));
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

    /// Own sockets are 1 to 9.
    #[test]
    fn a_connection_whose_far_end_is_the_pods_is_right_whatever_became_of_the_listener() {
        let own: HashSet<u64> = (1..10).collect();
        let (ours, other) = (listener("127.0.0.1", 1), listener("127.0.0.1", 2));
        let (foreign, wide) = (listener("127.0.0.1", 91), listener("0.0.0.0", 92));
        let accepted = |inode| {
            Some(FarEnd {
                inode,
                established: true,
            })
        };
        let closed = Some(FarEnd {
            inode: 0,
            established: false,
        });
        let waiting = accepted(0);
        let cases: [(&[Listener], Option<FarEnd>, bool); 16] = [
            (&[ours], accepted(5), true),
            (&[ours], waiting, true),
            // A listener that stays has all connections made meanwhile, including those that have ended.
            (&[ours], closed, true),
            (&[ours], None, true),
            // It listened once.
            (&[], accepted(5), true),
            (&[other], accepted(5), true),
            (&[foreign], accepted(5), true),
            // A process outside the pod has it, whichever listener it came from.
            (&[], accepted(95), false),
            (&[other], accepted(95), false),
            // Not accepted yet: it is at one of those that listen now.
            (&[other], waiting, true),
            (&[ours, wide], waiting, true),
            (&[foreign], waiting, false),
            (&[ours, foreign], waiting, false),
            (&[], waiting, false),
            // It has ended, and whose it was is not known.
            (&[other], closed, false),
            (&[], None, false),
        ];
        for (now, far_end, expected) in cases {
            let after = Table {
                listeners: now.to_vec(),
                far_end,
            };
            let found = is_own(&[ours], &after, &own, Ipv4Addr::LOCALHOST.into());
            assert_eq!(found, expected, "{after:?}");
        }
    }

    #[test]
    fn a_connection_made_while_the_listeners_changed_is_judged_by_who_has_it() {
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        let client = std::net::TcpStream::connect(address).unwrap();
        let from = client.local_addr().ok();
        let _accepted = server.accept().unwrap();
        let now = listening(address.port());
        let before = [Listener {
            address,
            inode: now[0].inode.wrapping_add(1),
        }];
        let (own, parent) = (std::process::id(), std::os::unix::process::parent_id());
        // This process is below its parent, and not below itself.
        assert!(still_own(&before, from, address, parent));
        assert!(!still_own(&before, from, address, own));
        assert!(still_own(&now, from, address, own), "nothing has changed");
    }

    #[test]
    fn a_listener_that_is_held_listens_on() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let all = on(address.port(), None);
        let held = hold(address.port(), std::os::unix::process::parent_id());
        if held.is_empty() {
            eprintln!("this kernel gives no descriptors of other processes");
            return;
        }
        drop(socket);
        assert_eq!(on(address.port(), None), all);
        std::net::TcpStream::connect(address).unwrap();
    }

    #[test]
    fn a_real_listener_has_its_owner() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let all = on(socket.local_addr().unwrap().port(), None);
        assert_eq!(all.listeners.len(), 1, "{all:?}");
        // Not below us, but below our parent.
        assert_eq!(owned(&all, std::process::id()), HashSet::new());
        let parent = std::os::unix::process::parent_id();
        assert_eq!(owned(&all, parent), HashSet::from([all.listeners[0].inode]));
        assert_eq!(inode("socket:[12]"), Some(12));
        assert_eq!(inode("pipe:[12]"), None);
    }
}
