//! The edge: a second network namespace, behind the pod's, in which the shim listens for what the pod sends to the cluster.
//!
//! A pair of virtual interfaces joins the two. In the pod, the address ranges of the cluster are routed to the other end.
//! In the edge these ranges are local addresses, so one listener on a port takes the connections to that port of every
//! address, and its sockets tell which address was dialled. The edge is a namespace of its own so that the containers
//! keep all ports of their own.
//!
//! ```text
//!   pod: cluster0 192.0.0.2 ────────────────────── edge: pod0 169.254.1.1
//!        10.96.0.0/12 via 169.254.1.1                    local 10.96.0.0/12 dev lo
//! ```
//!
//! The helper is in the pod's namespace, and enters the edge for single calls only.

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    net::Ipv4Addr,
    os::fd::{AsFd as _, OwnedFd},
};

use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, setns, unshare},
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};

use super::{
    netlink::{self, Route, Way},
    protocol::Kind,
    range::Range,
};

/// The interfaces at the ends of the pair. pasta's is called `eth0`.
const IN_POD: &str = "cluster0";
const IN_EDGE: &str = "pod0";

/// The edge's address on the link, where the pod's routes lead. It is valid on this link only (RFC 3927).
const ROUTER: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// Why there is no edge, or why it does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum EdgeError {
    /// The process is in the wrong namespace, and must end.
    #[error("return to the pod's network namespace")]
    Lost(#[source] io::Error),
    #[error("the kernel of the compute node has no virtual network interfaces (module veth)")]
    NoPairs(#[source] io::Error),
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

impl EdgeError {
    fn on(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// Both namespaces, and what leads from the pod to the edge.
#[derive(Debug)]
pub(super) struct Edge {
    /// The pod's network namespace.
    pod: File,
    /// The edge's own network namespace.
    namespace: File,
    /// The pod's address toward the cluster.
    address: Ipv4Addr,
    /// The index of the interface in the pod.
    device: u32,
    ranges: BTreeSet<Range>,
}

impl Edge {
    /// Creates the edge of the namespace that this process is in. `set_up` prepares the new namespace.
    pub(super) fn create(
        address: Ipv4Addr,
        set_up: impl FnOnce() -> io::Result<()>,
    ) -> Result<Self, EdgeError> {
        let own = || File::open("/proc/self/ns/net");
        let pod = own().map_err(EdgeError::on("open the pod's network namespace"))?;
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|errno| EdgeError::on("create a second network namespace")(errno.into()))?;
        let edge = own().and_then(|edge| {
            netlink::bring_up(netlink::LOOPBACK)?;
            set_up()?;
            Ok(edge)
        });
        setns(&pod, CloneFlags::CLONE_NEWNET).map_err(|errno| EdgeError::Lost(errno.into()))?;
        let edge = edge.map_err(EdgeError::on("prepare the second network namespace"))?;
        netlink::create_pair(IN_POD, IN_EDGE, edge.as_fd()).map_err(|source| {
            match source.raw_os_error() {
                Some(nix::libc::EOPNOTSUPP) => EdgeError::NoPairs(source),
                Some(_) | None => EdgeError::on(
                    "create the pair of interfaces (veth) that joins the namespaces",
                )(source),
            }
        })?;
        let configure = EdgeError::on("configure the interface in the pod");
        let device = Self::configure_pod(address).map_err(configure)?;
        let made = Self {
            pod,
            namespace: edge,
            address,
            device,
            ranges: BTreeSet::new(),
        };
        let configure = EdgeError::on("configure the interface in the second network namespace");
        made.inside(|| Self::configure_edge(address))?
            .map_err(configure)?;
        Ok(made)
    }

    fn configure_pod(address: Ipv4Addr) -> io::Result<u32> {
        let device = if_nametoindex(IN_POD)?;
        netlink::bring_up(device)?;
        // The loopback interface has it too, but some nodes answer ARP only for addresses of the same interface.
        netlink::add_address(device, address)?;
        netlink::add_route(neighbour(ROUTER, device))?;
        Ok(device)
    }

    fn configure_edge(address: Ipv4Addr) -> io::Result<()> {
        let device = if_nametoindex(IN_EDGE)?;
        netlink::bring_up(device)?;
        netlink::add_address(device, ROUTER)?;
        netlink::add_route(neighbour(address, device))
    }

    /// Has exactly these ranges lead to the edge.
    pub(super) fn lead(&mut self, ranges: &BTreeSet<Range>) -> Result<(), EdgeError> {
        let gone: Vec<Range> = self.ranges.difference(ranges).copied().collect();
        for range in gone {
            let failed = || EdgeError::on("remove the route to a range of the cluster");
            netlink::remove_route(self.toward(range)).map_err(failed())?;
            self.inside(|| netlink::remove_route(local(range)))?
                .map_err(failed())?;
            self.ranges.remove(&range);
        }
        let new: Vec<Range> = ranges.difference(&self.ranges).copied().collect();
        for range in new {
            let failed = || EdgeError::on("add a route to a range of the cluster");
            self.inside(|| netlink::add_route(local(range)))?
                .map_err(failed())?;
            netlink::add_route(self.toward(range)).map_err(failed())?;
            self.ranges.insert(range);
        }
        Ok(())
    }

    /// Has what the pod sends to the ranges come from this address, at which other pods reach it: programs ask a connection for their
    /// own address, and tell it to others.
    pub(super) fn prefer(&mut self, address: Ipv4Addr) -> Result<(), EdgeError> {
        let failed = || EdgeError::on("use the pod's own address toward the cluster");
        netlink::add_address(self.device, address).map_err(failed())?;
        let back = || netlink::add_route(neighbour(address, if_nametoindex(IN_EDGE)?));
        self.inside(back)?.map_err(failed())?;
        // The routes of connections that are open stay valid, for the former address is still there.
        self.address = address;
        for &range in &self.ranges {
            netlink::add_route(self.toward(range)).map_err(failed())?;
        }
        Ok(())
    }

    fn toward(&self, to: Range) -> Route {
        Route {
            to,
            device: self.device,
            way: Way::Via {
                router: ROUTER,
                source: self.address,
            },
        }
    }

    /// A socket in the edge.
    pub(super) fn socket(&self, kind: Kind) -> Result<OwnedFd, EdgeError> {
        let kind = SocketType::from(kind);
        let make = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::INET, kind, flags, None)?;
            if kind == SocketType::STREAM {
                // Connections that outlive their listener must not keep a later one from the port.
                sockopt::set_socket_reuseaddr(&socket, true)?;
            }
            Ok(socket)
        };
        self.inside(make)?.map_err(EdgeError::on("make a socket"))
    }

    /// Runs `act` in the edge. The outer error is that of the way back.
    fn inside<T>(&self, act: impl FnOnce() -> io::Result<T>) -> Result<io::Result<T>, EdgeError> {
        let enter = setns(&self.namespace, CloneFlags::CLONE_NEWNET);
        if let Err(errno) = enter {
            return Ok(Err(errno.into()));
        }
        let done = act();
        setns(&self.pod, CloneFlags::CLONE_NEWNET)
            .map_err(|errno| EdgeError::Lost(errno.into()))?;
        Ok(done)
    }
}

/// PURE: the route to the other end of the link.
fn neighbour(address: Ipv4Addr, device: u32) -> Route {
    Route {
        to: Range::new(address, 32),
        device,
        way: Way::Link,
    }
}

/// PURE: the addresses of a range as the edge's own.
fn local(to: Range) -> Route {
    Route {
        to,
        device: netlink::LOOPBACK,
        way: Way::Local,
    }
}
