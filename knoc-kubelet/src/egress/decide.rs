//! PURE: what becomes of a connection that a pod opens: the endpoint to dial, or why it is refused; and the network as pods
//! see it.

use std::{
    collections::{BTreeSet, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::{IpAddr, SocketAddr},
};

use knoc_proto::{
    egress::{AllowList, MAX_PORTS, MAX_RANGES, Range},
    pb::{self, EgressProtocol},
};

use super::table::{Name, Table, Target};

/// The port of DNS.
pub(super) const DNS: u16 = 53;

/// What the cluster says about itself, apart from Services.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Surroundings {
    /// The ranges of Services.
    pub(crate) service_ranges: Vec<Range>,
    /// The addresses of nodes.
    pub(crate) nodes: HashSet<IpAddr>,
}

impl Surroundings {
    /// Is this an address that a Service has or can get?
    fn is_of_service(&self, address: IpAddr) -> bool {
        let mut ranges = self.service_ranges.iter();
        ranges.any(|range| range.contains(address))
    }
}

/// A connection that may be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dial {
    pub(crate) service: Name,
    /// Of the Service.
    pub(crate) port: u16,
    pub(crate) endpoint: SocketAddr,
}

/// Why a connection is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("no Service of the cluster has {to} ({})", protocol.name())]
    Unknown {
        to: SocketAddr,
        protocol: EgressProtocol,
    },
    #[error(
        "the pod may not reach Service {service} (port {port}): it is not in `egress.allow` of the kubelet, a value of its chart; an \
         administrator of the cluster can add `{service}` there"
    )]
    NotAllowed { service: Name, port: u16 },
    #[error("Service {service} has no endpoint that is ready for port {port}")]
    NoEndpoint { service: Name, port: u16 },
    #[error(
        "the endpoints of Service {service} (port {port}) are addresses of nodes, which pods reach only through a Service that \
         `egress.allow` names without `*`"
    )]
    OfNode { service: Name, port: u16 },
    #[error("the endpoints of Service {service} (port {port}) are {what}, which pods never reach")]
    Never {
        service: Name,
        port: u16,
        what: &'static str,
    },
}

/// A protocol by the name that Services have for it.
trait Named {
    fn name(self) -> &'static str;
}

impl Named for EgressProtocol {
    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Unspecified => "an unknown protocol",
        }
    }
}

/// Decides about a connection of the pod `uid`. `random` chooses the endpoint, unless the Service has session affinity.
pub(crate) fn decide(
    table: &Table,
    allow: &AllowList,
    around: &Surroundings,
    (to, protocol): (SocketAddr, EgressProtocol),
    (uid, random): (&str, u64),
) -> Result<Dial, Refusal> {
    let targets = table.targets(to, protocol);
    let permitted =
        |target: &&Target| allow.permits(&target.service.namespace, &target.service.name);
    let Some(target) = targets.iter().find(permitted) else {
        return Err(match targets.into_iter().next() {
            Some(Target { service, port, .. }) => Refusal::NotAllowed { service, port },
            None => Refusal::Unknown { to, protocol },
        });
    };
    let (service, port) = (target.service.clone(), target.port);
    if target.endpoints.is_empty() {
        return Err(Refusal::NoEndpoint { service, port });
    }
    let reachable =
        |endpoint: &&SocketAddr| obstacle(allow, around, &service, endpoint.ip()).is_none();
    let endpoints: Vec<_> = target.endpoints.iter().filter(reachable).collect();
    if let Some(endpoint) = choose(target, &endpoints, (uid, random)) {
        return Ok(Dial {
            endpoint: *endpoint,
            service,
            port,
        });
    }
    let obstacle = target
        .endpoints
        .first()
        .and_then(|first| obstacle(allow, around, &service, first.ip()));
    Err(match obstacle {
        Some(Obstacle::Node) => Refusal::OfNode { service, port },
        Some(Obstacle::Never(what)) => Refusal::Never {
            service,
            port,
            what,
        },
        None => Refusal::NoEndpoint { service, port },
    })
}

/// The pod of this node that takes the connection of the pod `uid`, if the Service has one. The kubelet does not reach it, and whether
/// the two pods may reach each other is decided between their shims.
pub(crate) fn own_pod(
    table: &Table,
    (to, protocol): (SocketAddr, EgressProtocol),
    (uid, random): (&str, u64),
    is_own: impl Fn(IpAddr) -> bool,
) -> Option<SocketAddr> {
    let targets = table.targets(to, protocol);
    targets.iter().find_map(|target| {
        let own = target.endpoints.iter().filter(|one| is_own(one.ip()));
        let own: Vec<_> = own.collect();
        choose(target, &own, (uid, random)).copied()
    })
}

/// One of these endpoints of a Service: with session affinity always the same one for a pod, while it is there.
fn choose<'a>(
    target: &Target,
    endpoints: &[&'a SocketAddr],
    (uid, random): (&str, u64),
) -> Option<&'a SocketAddr> {
    if target.sticky {
        let of_pod = |endpoint: &&&SocketAddr| weight(uid, &target.service, endpoint);
        return endpoints.iter().max_by_key(of_pod).copied();
    }
    let count = u64::try_from(endpoints.len()).unwrap_or(1).max(1);
    let index = usize::try_from(random % count).unwrap_or_default();
    endpoints.get(index).copied()
}

/// Why an endpoint is not dialled.
enum Obstacle {
    /// It is the address of a node, which needs the exact name of the Service in the list.
    Node,
    /// It is never dialled.
    Never(&'static str),
}

fn obstacle(
    allow: &AllowList,
    around: &Surroundings,
    service: &Name,
    address: IpAddr,
) -> Option<Obstacle> {
    // The API server publishes where it is reached, usually at a node.
    if is_api_server(service) {
        return None;
    }
    let address = address.to_canonical();
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    if address.is_loopback() || address.is_unspecified() {
        Some(Obstacle::Never("loopback addresses"))
    } else if link_local || address.is_multicast() {
        Some(Obstacle::Never("link-local addresses"))
    } else if around.is_of_service(address) {
        // Whoever writes the slices of one Service would otherwise choose which other Services pods reach. kube-proxy does
        // not lead to such endpoints either.
        Some(Obstacle::Never("addresses of Services"))
    } else if around.nodes.contains(&address) && !allow.names(&service.namespace, &service.name) {
        Some(Obstacle::Node)
    } else {
        None
    }
}

fn is_api_server(service: &Name) -> bool {
    &*service.namespace == "default" && &*service.name == "kubernetes"
}

/// Where pods reach the API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiServer {
    /// The address of its Service.
    pub(crate) address: IpAddr,
    /// What the address leads to, sorted.
    pub(crate) endpoints: Vec<SocketAddr>,
}

/// Where pods reach the API server; `None` if they may not, or if its Service is not known.
pub(crate) fn api_server(
    table: &Table,
    around: &Surroundings,
    allow: &AllowList,
) -> Option<ApiServer> {
    let name = Name::new("default", "kubernetes");
    if !allow.permits(&name.namespace, &name.name) {
        return None;
    }
    let (address, port) = table.address(&name, "https", |address| around.is_of_service(address))?;
    let targets = table.targets(SocketAddr::new(address, port), EgressProtocol::Tcp);
    let target = targets.into_iter().next()?;
    Some(ApiServer {
        address,
        endpoints: target.endpoints,
    })
}

/// The endpoint with the largest weight is the pod's: while that one stays, others may come and go.
fn weight(uid: &str, service: &Name, endpoint: &SocketAddr) -> u64 {
    let mut hasher = DefaultHasher::new();
    (uid, service, endpoint).hash(&mut hasher);
    hasher.finish()
}

/// The network as pods see it; `None` if no range is known. `dns`: the address that the configuration has.
pub(crate) fn network(
    table: &Table,
    around: &Surroundings,
    allow: &AllowList,
    pod_ranges: &[Range],
    (dns, domain): (Option<IpAddr>, &str),
) -> Option<pb::EgressNetwork> {
    let mut ranges: Vec<Range> = Vec::new();
    for range in around.service_ranges.iter().chain(pod_ranges) {
        if ranges.len() < MAX_RANGES && !ranges.contains(range) {
            ranges.push(*range);
        }
    }
    if ranges.is_empty() {
        return None;
    }
    let within = |address: IpAddr| ranges.iter().any(|range| range.contains(address));
    let permits = |name: &Name| allow.permits(&name.namespace, &name.name);
    let headless = !pod_ranges.is_empty();
    let (first, all) = (
        table.ports(headless, permits),
        table.ports(headless, |_| true),
    );
    let (dns, dns_service) = server(table, permits, dns.filter(|dns| within(*dns)))
        .or_else(|| found_server(table, permits, within))
        .unzip();
    let api = table.address(&Name::new("default", "kubernetes"), "https", within);
    Some(pb::EgressNetwork {
        tcp_ports: most(&first.tcp, &all.tcp),
        udp_ports: most(&first.udp, &all.udp),
        dns: dns.map(|address| address.to_string()).unwrap_or_default(),
        dns_service: dns_service
            .flatten()
            .map(|name| name.to_string())
            .unwrap_or_default(),
        domain: domain.to_owned(),
        api_address: api
            .map(|(address, _)| address.to_string())
            .unwrap_or_default(),
        api_port: api.map(|(_, port)| port.into()).unwrap_or_default(),
        ranges: ranges.iter().map(ToString::to_string).collect(),
    })
}

/// The configured DNS server with its Service, if that is known. `None` if pods may not reach it: a server that refuses every
/// question would leave them without any names.
fn server(
    table: &Table,
    permits: impl Fn(&Name) -> bool,
    configured: Option<IpAddr>,
) -> Option<(IpAddr, Option<Name>)> {
    let address = configured?;
    let targets = table.targets(SocketAddr::new(address, DNS), EgressProtocol::Udp);
    let is_unknown = targets.is_empty();
    let mut names = targets.into_iter().map(|target| target.service);
    let service = names.find(permits);
    (is_unknown || service.is_some()).then_some((address, service))
}

/// The DNS server that most clusters have, and its Service.
fn found_server(
    table: &Table,
    permits: impl Fn(&Name) -> bool,
    within: impl Fn(IpAddr) -> bool,
) -> Option<(IpAddr, Option<Name>)> {
    let name = Name::new("kube-system", "kube-dns");
    let (address, _) = table.address(&name, "dns", within)?;
    permits(&name).then_some((address, Some(name)))
}

/// As many ports as a network may have, those that come first before all others, sorted.
fn most(first: &BTreeSet<u16>, all: &BTreeSet<u16>) -> Vec<u32> {
    let others = all.difference(first);
    let chosen: BTreeSet<u16> = first
        .iter()
        .chain(others)
        .copied()
        .take(MAX_PORTS)
        .collect();
    chosen.into_iter().map(u32::from).collect()
}

#[cfg(test)]
mod tests;
