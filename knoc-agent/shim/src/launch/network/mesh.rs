//! The interface of the mesh, which leads from the pod to other pods at their own addresses.
//!
//! It is a TUN device: what the kernel sends over it is read from its descriptor, packet by packet, and what is written there has
//! arrived. The device goes with its last descriptor, which the shim has.

use std::{collections::BTreeSet, io, net::Ipv4Addr, os::fd::OwnedFd};

use nix::net::if_::if_nametoindex;

use super::{
    super::sys,
    netlink::{self, Route, Way},
    protocol::{GATEWAY, OUTWARD},
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
    // Without a way to other networks nobody looks for an address there.
    prefer(address).ok();
    Ok(packets)
}

/// Has what the pod sends to other networks begin with this address, so that a program that asks the kernel which one it has there
/// learns the one at which other pods reach it. The two halves of all addresses come before pasta's default route, and the kernel
/// removes their routes with the address.
fn prefer(source: Ipv4Addr) -> io::Result<()> {
    let device = if_nametoindex(OUTWARD)?;
    for half in [Ipv4Addr::UNSPECIFIED, Ipv4Addr::new(128, 0, 0, 0)] {
        netlink::add_route(Route {
            to: Range::new(half, 1),
            device,
            way: Way::Via {
                router: GATEWAY,
                source,
            },
        })?;
    }
    Ok(())
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
