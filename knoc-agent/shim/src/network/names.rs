//! How names are resolved in a network of the pod's own, if it does not reach the resolver that the compute node asks.

use std::{fs, net::IpAddr};

/// The compute node's settings, and those of systemd-resolved with the servers that it asks itself.
const NODE: &str = "/etc/resolv.conf";
const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

/// What the pod lacks if there are none.
pub(super) const LOST: &str = "it resolves no names of other hosts: the compute node asks a resolver that the pod does not \
                               reach, on the node's loopback interface or, without `network_ipv6`, over IPv6 \
                               (/etc/resolv.conf), and /run/systemd/resolve/resolv.conf names no other one";

/// The resolver settings for the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Names {
    /// The node's own.
    OfNode,
    /// This text instead of the node's.
    Instead(String),
    /// There are none that work in the pod.
    Lost,
}

impl Names {
    pub(super) fn find(ipv6: bool) -> Self {
        let read = |path: &str| fs::read_to_string(path).ok();
        Self::choose(&read(NODE).unwrap_or_default(), read(RESOLVED), ipv6)
    }

    /// PURE: as a kubelet does on a node with systemd-resolved.
    fn choose(node: &str, resolved: Option<String>, ipv6: bool) -> Self {
        let works = |text: &str| servers(text).any(|server| reaches(server, ipv6));
        // Without any server, the resolver library asks one on the loopback interface; then the node has no names either.
        if works(node) || servers(node).next().is_none() {
            return Self::OfNode;
        }
        match resolved.filter(|text| works(text)) {
            Some(text) => Self::Instead(text),
            None => Self::Lost,
        }
    }
}

fn servers(text: &str) -> impl Iterator<Item = IpAddr> {
    text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let server = words.next() == Some("nameserver");
        words.next().filter(|_| server)?.parse().ok()
    })
}

/// Whether a pod reaches the server. If it does not, the resolver library goes on to the next one.
fn reaches(server: IpAddr, ipv6: bool) -> bool {
    !server.is_loopback() && (ipv6 || server.is_ipv4())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolver_that_the_pod_does_not_reach_is_replaced_or_lost() {
        let local = "search x\nnameserver 127.0.0.53\noptions edns0\n";
        let real = "nameserver 10.0.0.1\n";
        let choose = |node: &str, resolved: Option<&str>| {
            Names::choose(node, resolved.map(str::to_owned), false)
        };
        assert_eq!(choose(real, Some("")), Names::OfNode);
        assert_eq!(choose("", None), Names::OfNode);
        assert_eq!(
            choose("nameserver ::1\nnameserver 10.0.0.1\n", None),
            Names::OfNode
        );
        assert_eq!(choose(local, Some(real)), Names::Instead(real.to_owned()));
        let ipv6 = "nameserver 2001:db8::1\n";
        for resolved in [None, Some(""), Some(local), Some(ipv6)] {
            assert_eq!(choose(local, resolved), Names::Lost);
            assert_eq!(choose(ipv6, resolved), Names::Lost);
        }
        assert_eq!(Names::choose(ipv6, None, true), Names::OfNode);
    }
}
