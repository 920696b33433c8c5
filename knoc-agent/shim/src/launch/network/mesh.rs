//! The interface of the mesh, which leads from the pod to other pods at their own addresses.
//!
//! It is a TUN device: what the kernel sends over it is read from its descriptor, packet by packet, and what is written there has
//! arrived. The device goes with its last descriptor, which the shim has.

use std::{collections::BTreeSet, io, net::Ipv4Addr, os::fd::OwnedFd};

use nix::net::if_::if_nametoindex;

use super::{
    super::sys,
    netlink::{self, Route, Way},
    range::Range,
};

/// Its name in the pod. pasta's is called `eth0`, and the one that leads to the cluster `cluster0`.
const NAME: &str = "pods0";

/// The size of the largest packet. The larger it is, the fewer packets are to be carried; with its length it fits into four TLS
/// records.
const MTU: u32 = 65_000;

/// Has what the pod sends to this range go nowhere, until there is the interface. Over the networks of the node it would reach
/// whoever has the address there.
pub(super) fn bar(range: Range) -> io::Result<()> {
    netlink::add_route(Route {
        to: range,
        device: netlink::LOOPBACK,
        way: Way::Nowhere,
    })
}

/// Creates the interface in the network namespace of this process. The pod has `address` on it, and `range` is reached over it.
pub(super) fn create(address: Ipv4Addr, range: Range) -> io::Result<OwnedFd> {
    let packets = sys::tun(NAME)?;
    let device = if_nametoindex(NAME)?;
    netlink::set_mtu(device, MTU)?;
    netlink::bring_up(device)?;
    netlink::add_address(device, address)?;
    netlink::add_route(Route {
        to: range,
        device,
        way: Way::Link,
    })?;
    Ok(packets)
}

/// Reaches these ranges over the interface, too.
pub(super) fn lead(ranges: &BTreeSet<Range>) -> io::Result<()> {
    let device = if_nametoindex(NAME)?;
    for to in ranges {
        netlink::add_route(Route {
            to: *to,
            device,
            way: Way::Link,
        })?;
    }
    Ok(())
}
