//! How names are resolved in a network of the pod's own, if the compute node asks a resolver on its loopback interface.

use std::{fs, net::IpAddr};

/// The compute node's settings, and those of systemd-resolved with the servers that it asks itself.
const NODE: &str = "/etc/resolv.conf";
const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

/// What the pod lacks if there are none.
pub(super) const LOST: &str = "it resolves no names of other hosts: the compute node asks a resolver on its own loopback \
                               interface (/etc/resolv.conf), and /run/systemd/resolve/resolv.conf names no other one";

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
    pub(super) fn find() -> Self {
        let read = |path: &str| fs::read_to_string(path).ok();
        Self::choose(&read(NODE).unwrap_or_default(), read(RESOLVED))
    }

    /// PURE: as a kubelet does on a node with systemd-resolved.
    fn choose(node: &str, resolved: Option<String>) -> Self {
        if !is_local(node) {
            return Self::OfNode;
        }
        match resolved.filter(|text| !is_local(text) && servers(text).next().is_some()) {
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

/// Whether all servers are on the loopback interface. If only some are, the resolver library goes on to the others.
fn is_local(text: &str) -> bool {
    let mut all = servers(text).peekable();
    all.peek().is_some() && all.all(|server| server.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolver_on_the_loopback_interface_is_replaced_or_lost() {
        let local = "search x\nnameserver 127.0.0.53\noptions edns0\n";
        let real = "nameserver 10.0.0.1\n";
        let choose =
            |node: &str, resolved: Option<&str>| Names::choose(node, resolved.map(str::to_owned));
        assert_eq!(choose(real, Some("")), Names::OfNode);
        assert_eq!(choose("", None), Names::OfNode);
        assert_eq!(
            choose("nameserver ::1\nnameserver 10.0.0.1\n", None),
            Names::OfNode
        );
        assert_eq!(choose(local, Some(real)), Names::Instead(real.to_owned()));
        for resolved in [None, Some(""), Some(local)] {
            assert_eq!(choose(local, resolved), Names::Lost);
        }
    }
}
