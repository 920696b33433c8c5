//! PURE: how the cluster's network looks from inside the pod, as far as the pod reaches it.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddrV4},
};

use knoc_proto::{egress::check_network, pb, text::shorten};

use crate::launch::network::protocol::{Kind, Range};

/// Addresses that never lead to a cluster: this host, the loopback interface, the links of the pod, and all that is not the
/// address of one host.
const RESERVED: [Range; 5] = [
    Range::new(Ipv4Addr::UNSPECIFIED, 8),
    Range::new(Ipv4Addr::new(127, 0, 0, 0), 8),
    Range::new(Ipv4Addr::new(169, 254, 0, 0), 16),
    Range::new(Ipv4Addr::new(192, 0, 0, 0), 29),
    Range::new(Ipv4Addr::new(224, 0, 0, 0), 3),
];

/// Why parts of the cluster's network are left out.
const IPV4_ONLY: &str = "because pods reach the cluster over IPv4 only";

/// The longest line about what is left out.
const LINE: usize = 1024;

/// The cluster's network is not as the protocol says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the cluster's network (EgressNetwork): {0}")]
pub(crate) struct TableError(String);

/// The cluster's network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Table {
    /// The addresses that lead to the cluster.
    pub(crate) ranges: BTreeSet<Range>,
    /// The ports that are listened on.
    pub(crate) ports: BTreeSet<(Kind, u16)>,
    /// The cluster's DNS.
    pub(crate) dns: Option<Ipv4Addr>,
    /// The domain of the cluster; empty if it is not known.
    pub(crate) domain: String,
    /// The API server's Service.
    pub(crate) api: Option<SocketAddrV4>,
    /// What of the network pods do not reach, and why.
    left_out: Vec<String>,
}

impl Table {
    /// Checks what the kubelet has sent.
    pub(crate) fn parse(network: &pb::EgressNetwork) -> Result<Self, TableError> {
        check_network(network).map_err(TableError)?;
        let mut table = Self {
            domain: network.domain.clone(),
            ..Self::default()
        };
        for text in &network.ranges {
            match usable(text) {
                Ok(range) => drop(table.ranges.insert(range)),
                Err(why) => table.left_out.push(format!("the range {text}, {why}")),
            }
        }
        for (kind, ports) in [
            (Kind::Tcp, &network.tcp_ports),
            (Kind::Udp, &network.udp_ports),
        ] {
            let ports = ports.iter().filter_map(|number| port(*number));
            table.ports.extend(ports.map(|port| (kind, port)));
        }
        table.dns = table.address("DNS", &network.dns);
        let api = table.address("API server", &network.api_address);
        table.api = api
            .zip(port(network.api_port))
            .map(|(address, port)| SocketAddrV4::new(address, port));
        Ok(table)
    }

    /// The address of a Service. `None` if there is none, or if pods do not reach it.
    fn address(&mut self, what: &str, text: &str) -> Option<Ipv4Addr> {
        if text.is_empty() {
            return None;
        }
        let why = match text.parse() {
            Ok(IpAddr::V4(address)) if self.contains(address) => return Some(address),
            Ok(IpAddr::V6(_)) => IPV4_ONLY,
            Ok(IpAddr::V4(_)) | Err(_) => "because it is in none of the ranges",
        };
        self.left_out.push(format!("the {what} at {text}, {why}"));
        None
    }

    /// Whether an address leads to the cluster.
    pub(crate) fn contains(&self, address: Ipv4Addr) -> bool {
        self.ranges.iter().any(|range| range.contains(address))
    }

    /// One line about what pods do not reach; `None` if they reach everything.
    pub(crate) fn left_out(&self) -> Option<String> {
        (!self.left_out.is_empty()).then(|| shorten(&self.left_out.join("; "), LINE).into_owned())
    }
}

fn usable(text: &str) -> Result<Range, String> {
    // The range was checked, so it is an IPv6 range if it is none of IPv4.
    let range = Range::parse(text).ok_or(IPV4_ONLY)?;
    match RESERVED.into_iter().find(|one| one.overlaps(range)) {
        None => Ok(range),
        Some(reserved) => Err(format!(
            "because it has addresses that never belong to a cluster ({reserved})"
        )),
    }
}

fn port(number: u32) -> Option<u16> {
    u16::try_from(number).ok().filter(|port| *port > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network() -> pb::EgressNetwork {
        pb::EgressNetwork {
            ranges: ["10.96.0.0/12", "fd00:10::/108"].map(str::to_owned).into(),
            tcp_ports: vec![53, 443],
            udp_ports: vec![53],
            dns: "10.96.0.10".to_owned(),
            domain: "cluster.local".to_owned(),
            api_address: "10.96.0.1".to_owned(),
            api_port: 443,
            ..pb::EgressNetwork::default()
        }
    }

    #[test]
    fn the_network_is_taken_as_far_as_pods_reach_it() {
        let table = Table::parse(&network()).unwrap();
        assert_eq!(table.ranges, [Range::parse("10.96.0.0/12").unwrap()].into());
        let ports = [(Kind::Tcp, 53), (Kind::Tcp, 443), (Kind::Udp, 53)];
        assert_eq!(table.ports, ports.into());
        assert_eq!(table.dns, Some(Ipv4Addr::new(10, 96, 0, 10)));
        assert_eq!(table.api, Some("10.96.0.1:443".parse().unwrap()));
        let left_out = table.left_out().unwrap();
        assert!(left_out.contains("fd00:10::/108"), "{left_out}");
        assert!(table.contains(Ipv4Addr::new(10, 100, 0, 1)));
        assert!(!table.contains(Ipv4Addr::new(169, 254, 1, 1)));
        let unset = Table::parse(&pb::EgressNetwork::default());
        assert_eq!(unset, Ok(Table::default()));
    }

    #[test]
    fn what_pods_do_not_reach_is_named_and_the_rest_works() {
        let mut odd = network();
        odd.ranges
            .extend(["192.0.0.0/24", "224.0.0.0/4"].map(str::to_owned));
        "fd00:10::1".clone_into(&mut odd.api_address);
        "192.0.0.10".clone_into(&mut odd.dns);
        let table = Table::parse(&odd).unwrap();
        assert_eq!((table.ranges.len(), table.dns, table.api), (1, None, None));
        let left_out = table.left_out().unwrap();
        for named in ["192.0.0.0/29", "224.0.0.0/4", "fd00:10::1", "192.0.0.10"] {
            assert!(left_out.contains(named), "{left_out}");
        }
        let broken = pb::EgressNetwork {
            ranges: vec!["10.96.0.0".to_owned()],
            ..network()
        };
        let error = Table::parse(&broken).unwrap_err().to_string();
        assert!(
            error.contains("EgressNetwork") && error.contains("10.96.0.0"),
            "{error}"
        );
    }
}
