//! PURE: how the cluster's network looks from inside the pod, checked.

use std::{collections::BTreeSet, net::Ipv4Addr, net::SocketAddrV4};

use knoc_proto::{
    names, pb,
    text::{quote, shorten},
};

use crate::launch::network::protocol::{Kind, Range};

/// The limits that the protocol states.
const MAX_RANGES: usize = 16;
const MAX_PORTS: usize = 4096;

/// How much of a broken value is shown.
const SHOWN: usize = 64;

/// Addresses that never lead to a cluster: this host, the loopback interface, the links of the pod, and all that is not the
/// address of one host.
const RESERVED: [Range; 5] = [
    Range::new(Ipv4Addr::UNSPECIFIED, 8),
    Range::new(Ipv4Addr::new(127, 0, 0, 0), 8),
    Range::new(Ipv4Addr::new(169, 254, 0, 0), 16),
    Range::new(Ipv4Addr::new(192, 0, 0, 0), 29),
    Range::new(Ipv4Addr::new(224, 0, 0, 0), 3),
];

/// Why the cluster's network cannot be used as it was sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TableError {
    #[error("EgressNetwork.ranges has {0} ranges; the limit is {MAX_RANGES}")]
    Ranges(usize),
    #[error("EgressNetwork.ranges: {0} is not a range such as 10.96.0.0/12")]
    Range(String),
    #[error("EgressNetwork.ranges: {0} contains addresses that never belong to a cluster ({1})")]
    Reserved(Range, Range),
    #[error("EgressNetwork.{0} has {1} ports; the limit is {MAX_PORTS}")]
    Ports(&'static str, usize),
    #[error("EgressNetwork.{0}: {1} is not a port")]
    Port(&'static str, u32),
    #[error("EgressNetwork.{0}: {1} is not an address")]
    Address(&'static str, String),
    #[error("EgressNetwork.api_port: {0} is not a port")]
    ApiPort(u32),
    #[error("EgressNetwork.domain: {0} is not a domain")]
    Domain(String),
}

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
    pub(crate) left_out: Vec<String>,
}

impl Table {
    /// Checks what the kubelet has sent.
    pub(crate) fn parse(network: &pb::EgressNetwork) -> Result<Self, TableError> {
        let mut table = Self::default();
        if network.ranges.len() > MAX_RANGES {
            return Err(TableError::Ranges(network.ranges.len()));
        }
        for text in &network.ranges {
            table.add_range(text)?;
        }
        for (field, kind, ports) in [
            ("tcp_ports", Kind::Tcp, &network.tcp_ports),
            ("udp_ports", Kind::Udp, &network.udp_ports),
        ] {
            if ports.len() > MAX_PORTS {
                return Err(TableError::Ports(field, ports.len()));
            }
            for number in ports {
                let port = port(*number).ok_or(TableError::Port(field, *number))?;
                table.ports.insert((kind, port));
            }
        }
        let domain = network.domain.as_str();
        if !domain.is_empty() && names::dns_subdomain(domain).is_err() {
            return Err(TableError::Domain(quote(domain, SHOWN)));
        }
        domain.clone_into(&mut table.domain);
        table.dns = table.address("dns", &network.dns)?;
        if let Some(address) = table.address("api_address", &network.api_address)? {
            let number = network.api_port;
            let port = port(number).ok_or(TableError::ApiPort(number))?;
            table.api = Some(SocketAddrV4::new(address, port));
        }
        Ok(table)
    }

    fn add_range(&mut self, text: &str) -> Result<(), TableError> {
        if is_ipv6_range(text) {
            self.left_out
                .push(format!("the range {text}, because pods reach the cluster over IPv4 only"));
            return Ok(());
        }
        let range = Range::parse(text).ok_or_else(|| TableError::Range(quote(text, SHOWN)))?;
        match RESERVED.into_iter().find(|one| one.overlaps(range)) {
            Some(reserved) => Err(TableError::Reserved(range, reserved)),
            None => {
                self.ranges.insert(range);
                Ok(())
            }
        }
    }

    /// An address of a Service. `None` if there is none, or if pods do not reach it.
    fn address(
        &mut self,
        field: &'static str,
        text: &str,
    ) -> Result<Option<Ipv4Addr>, TableError> {
        if text.is_empty() {
            return Ok(None);
        }
        let address: std::net::IpAddr = text
            .parse()
            .map_err(|_| TableError::Address(field, quote(text, SHOWN)))?;
        let why = match address {
            std::net::IpAddr::V4(address) if self.contains(address) => return Ok(Some(address)),
            std::net::IpAddr::V4(_) => "it is in none of the ranges",
            std::net::IpAddr::V6(_) => "pods reach the cluster over IPv4 only",
        };
        self.left_out.push(format!("the {field} {address}, because {why}"));
        Ok(None)
    }

    /// Whether an address leads to the cluster.
    pub(crate) fn contains(&self, address: Ipv4Addr) -> bool {
        self.ranges.iter().any(|range| range.contains(address))
    }

    /// One line about what pods do not reach; `None` if they reach everything.
    pub(crate) fn left_out(&self) -> Option<String> {
        const LINE: usize = 1024;
        (!self.left_out.is_empty()).then(|| shorten(&self.left_out.join("; "), LINE))
    }
}

fn port(number: u32) -> Option<u16> {
    u16::try_from(number).ok().filter(|port| *port > 0)
}

fn is_ipv6_range(text: &str) -> bool {
    let Some((first, prefix)) = text.split_once('/') else {
        return false;
    };
    let prefix = prefix.parse::<u8>().is_ok_and(|bits| bits <= 128);
    prefix && first.parse::<std::net::Ipv6Addr>().is_ok()
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
        let outside = pb::EgressNetwork {
            dns: "10.1.0.10".to_owned(),
            api_address: "fd00:10::1".to_owned(),
            ..network()
        };
        let table = Table::parse(&outside).unwrap();
        assert_eq!((table.dns, table.api), (None, None));
        let left_out = table.left_out().unwrap();
        assert!(left_out.contains("10.1.0.10"), "{left_out}");
        assert_eq!(Table::parse(&pb::EgressNetwork::default()), Ok(Table::default()));
    }

    #[test]
    fn what_is_broken_is_refused_by_name() {
        let of = |change: fn(&mut pb::EgressNetwork)| {
            let mut network = network();
            change(&mut network);
            Table::parse(&network).unwrap_err().to_string()
        };
        for (error, named) in [
            (of(|one| one.ranges = vec!["10.96.0.1/12".to_owned()]), "10.96.0.1/12"),
            (of(|one| one.ranges = vec!["0.0.0.0/0".to_owned()]), "0.0.0.0/8"),
            (of(|one| one.ranges = vec!["192.0.0.0/24".to_owned()]), "192.0.0.0/29"),
            (of(|one| one.ranges = vec![String::new(); 17]), "17 ranges"),
            (of(|one| one.tcp_ports = vec![0]), "tcp_ports: 0"),
            (of(|one| one.udp_ports = vec![65_536]), "udp_ports: 65536"),
            (of(|one| one.udp_ports = vec![1; 4097]), "4097 ports"),
            (of(|one| one.dns = "dns".to_owned()), "dns"),
            (of(|one| one.domain = "a b\nnameserver 1.1.1.1".to_owned()), "domain"),
            (of(|one| one.api_port = 0), "api_port: 0"),
        ] {
            assert!(error.contains(named), "{error} should name {named}");
        }
    }
}
