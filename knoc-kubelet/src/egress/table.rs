//! PURE: the cluster's Services with their endpoints, reduced to what a connection needs: which Service an address and a port
//! belong to, and where it can lead.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use k8s_openapi::api::{
    core::v1::{Service as KubeService, ServicePort},
    discovery::v1::EndpointSlice,
};
use knoc_proto::pb::EgressProtocol;

/// The most endpoints that are remembered. A cluster of 5,000 nodes has at most 150,000 pods.
const MOST_ENDPOINTS: usize = 200_000;
/// The label of a slice that names its Service.
const OF_SERVICE: &str = "kubernetes.io/service-name";

/// The name of an object in its namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Name {
    pub(crate) namespace: Arc<str>,
    pub(crate) name: Arc<str>,
}

impl Name {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A port, with the name that joins the ports of a Service to those of its slices.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Port {
    name: String,
    number: u16,
    protocol: EgressProtocol,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Service {
    /// None: headless.
    addresses: Vec<IpAddr>,
    ports: Vec<Port>,
    /// Whether one client always reaches the same endpoint (`sessionAffinity: ClientIP`).
    sticky: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Endpoint {
    address: IpAddr,
    ready: bool,
    /// It is terminating and still serves.
    leaving: bool,
}

/// The part of an `EndpointSlice` that is remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slice {
    service: Name,
    ports: Vec<Port>,
    endpoints: Vec<Endpoint>,
}

/// Where a connection can lead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) service: Name,
    /// The port of the Service; for an endpoint's own address, the port that was dialled.
    pub(crate) port: u16,
    /// The endpoints that take connections, each once, sorted.
    pub(crate) endpoints: Vec<SocketAddr>,
    pub(crate) sticky: bool,
}

/// The ports that pods can dial.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ports {
    pub(crate) tcp: BTreeSet<u16>,
    pub(crate) udp: BTreeSet<u16>,
}

/// All Services and endpoints.
#[derive(Debug, Default)]
pub(crate) struct Table {
    services: HashMap<Name, Service>,
    addresses: HashMap<IpAddr, Name>,
    slices: HashMap<Name, Slice>,
    of_service: HashMap<Name, BTreeSet<Name>>,
    of_address: HashMap<IpAddr, BTreeSet<Name>>,
    endpoints: usize,
    /// Whether a slice was left out since all of them were read.
    full: bool,
}

impl Table {
    /// Replaces all Services.
    pub(crate) fn set_services<'a>(&mut self, services: impl Iterator<Item = &'a KubeService>) {
        self.services = services.filter_map(service).collect();
        self.addresses.clear();
        for (name, service) in &self.services {
            for address in &service.addresses {
                self.addresses.insert(*address, name.clone());
            }
        }
    }

    /// Replaces all slices.
    pub(crate) fn set_slices(&mut self, slices: Vec<(Name, Slice)>) {
        self.slices.clear();
        self.of_service.clear();
        self.of_address.clear();
        self.endpoints = 0;
        self.full = false;
        for (name, slice) in slices {
            self.set_slice(name, slice);
        }
    }

    /// Stores a slice if there is room for it.
    pub(crate) fn set_slice(&mut self, name: Name, slice: Slice) {
        self.remove_slice(&name);
        let count = slice.endpoints.len();
        if self.endpoints + count > MOST_ENDPOINTS {
            self.full = true;
            return;
        }
        self.endpoints += count;
        let of_service = self.of_service.entry(slice.service.clone()).or_default();
        of_service.insert(name.clone());
        for endpoint in &slice.endpoints {
            let of_address = self.of_address.entry(endpoint.address).or_default();
            of_address.insert(name.clone());
        }
        self.slices.insert(name, slice);
    }

    /// Why pods do not reach some endpoints, if slices were left out.
    pub(crate) fn left_out(&self) -> Option<String> {
        self.full.then(|| {
            format!(
                "pods do not reach some endpoints of Services: the cluster has more than {MOST_ENDPOINTS}, which is the limit"
            )
        })
    }

    pub(crate) fn remove_slice(&mut self, name: &Name) {
        let Some(slice) = self.slices.remove(name) else {
            return;
        };
        self.endpoints -= slice.endpoints.len();
        forget(&mut self.of_service, &slice.service, name);
        for endpoint in &slice.endpoints {
            forget(&mut self.of_address, &endpoint.address, name);
        }
    }

    /// What this address and port lead to: one Service, or, at the address of an endpoint, every Service that has it. Empty
    /// if nothing does.
    pub(crate) fn targets(&self, to: SocketAddr, protocol: EgressProtocol) -> Vec<Target> {
        if let Some(name) = self.addresses.get(&to.ip()) {
            return self.by_service(name, to, protocol).into_iter().collect();
        }
        let names = self.of_address.get(&to.ip()).into_iter().flatten();
        let slices = names.filter_map(|name| self.slices.get(name));
        let has_port = |slice: &&Slice| {
            let mut ports = slice.ports.iter();
            ports.any(|port| port.number == to.port() && port.protocol == protocol)
        };
        let targets = slices.filter(has_port).map(|slice| Target {
            service: slice.service.clone(),
            port: to.port(),
            endpoints: vec![to],
            sticky: false,
        });
        targets.collect()
    }

    fn by_service(&self, name: &Name, to: SocketAddr, protocol: EgressProtocol) -> Option<Target> {
        let service = self.services.get(name)?;
        let mut ports = service.ports.iter();
        let port = ports.find(|one| one.number == to.port() && one.protocol == protocol)?;
        Some(Target {
            service: name.clone(),
            port: port.number,
            endpoints: self.endpoints(name, port, to.is_ipv4()),
            sticky: service.sticky,
        })
    }

    /// The endpoints that are ready; if there are none, those that are leaving and still serve, as kube-proxy does. Like there, those
    /// of a Service with addresses of both families have the family of the address that was dialled: each of its pods is in the
    /// slices of both.
    fn endpoints(&self, name: &Name, port: &Port, ipv4: bool) -> Vec<SocketAddr> {
        let (mut ready, mut leaving) = (BTreeSet::new(), BTreeSet::new());
        let names = self.of_service.get(name).into_iter().flatten();
        for slice in names.filter_map(|name| self.slices.get(name)) {
            let mut ports = slice.ports.iter();
            let joined = ports.find(|one| one.name == port.name && one.protocol == port.protocol);
            let Some(joined) = joined else { continue };
            let endpoints = slice.endpoints.iter();
            for endpoint in endpoints.filter(|one| one.address.is_ipv4() == ipv4) {
                let address = SocketAddr::new(endpoint.address, joined.number);
                if endpoint.ready {
                    ready.insert(address);
                } else if endpoint.leaving {
                    leaving.insert(address);
                }
            }
        }
        let found = if ready.is_empty() { leaving } else { ready };
        found.into_iter().collect()
    }

    /// The ports of the Services that `wanted` selects; of headless ones the ports of their endpoints, if pods can reach
    /// endpoints.
    pub(crate) fn ports(&self, headless: bool, wanted: impl Fn(&Name) -> bool) -> Ports {
        let mut ports = Ports::default();
        let with_address = self
            .services
            .iter()
            .filter(|(_, service)| !service.addresses.is_empty());
        for (_, service) in with_address.filter(|(name, _)| wanted(name)) {
            ports.extend(&service.ports);
        }
        if headless {
            let has_address = |name: &Name| {
                let service = self.services.get(name);
                service.is_some_and(|service| !service.addresses.is_empty())
            };
            for slice in self.slices.values() {
                if wanted(&slice.service) && !has_address(&slice.service) {
                    ports.extend(&slice.ports);
                }
            }
        }
        ports
    }

    /// The first address of a Service that `suits`, an IPv4 address before all others because pods reach the cluster over IPv4,
    /// and its port of this name, or else its first port.
    pub(crate) fn address(
        &self,
        name: &Name,
        port: &str,
        suits: impl Fn(IpAddr) -> bool,
    ) -> Option<(IpAddr, u16)> {
        let service = self.services.get(name)?;
        let suitable = service.addresses.iter().filter(|address| suits(**address));
        // Of equal ones the first.
        let address = suitable.min_by_key(|address| address.is_ipv6())?;
        let mut ports = service.ports.iter();
        let port = ports
            .clone()
            .find(|one| one.name == port)
            .or_else(|| ports.next())?;
        Some((*address, port.number))
    }
}

impl Ports {
    fn extend(&mut self, ports: &[Port]) {
        for port in ports {
            match port.protocol {
                EgressProtocol::Tcp => self.tcp.insert(port.number),
                EgressProtocol::Udp => self.udp.insert(port.number),
                EgressProtocol::Unspecified => false,
            };
        }
    }
}

fn forget<K: std::hash::Hash + Eq>(map: &mut HashMap<K, BTreeSet<Name>>, key: &K, name: &Name) {
    if let Some(names) = map.get_mut(key) {
        names.remove(name);
        if names.is_empty() {
            map.remove(key);
        }
    }
}

/// The Service as it is remembered; `None` for an `ExternalName`, which is only a name.
fn service(service: &KubeService) -> Option<(Name, Service)> {
    let meta = &service.metadata;
    let name = Name::new(meta.namespace.as_deref()?, meta.name.as_deref()?);
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    let first = spec.cluster_ip.iter();
    let all = spec.cluster_ips.iter().flatten();
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in first
        .chain(all)
        .filter_map(|text| text.parse::<IpAddr>().ok())
    {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    let ports = spec.ports.iter().flatten().filter_map(service_port);
    let service = Service {
        addresses,
        ports: ports.collect(),
        sticky: spec.session_affinity.as_deref() == Some("ClientIP"),
    };
    Some((name, service))
}

fn service_port(port: &ServicePort) -> Option<Port> {
    self::port(port.name.as_deref(), port.port, port.protocol.as_deref())
}

fn port(name: Option<&str>, number: i32, protocol: Option<&str>) -> Option<Port> {
    let protocol = match protocol.unwrap_or("TCP") {
        "TCP" => EgressProtocol::Tcp,
        "UDP" => EgressProtocol::Udp,
        _ => return None,
    };
    Some(Port {
        name: name.unwrap_or_default().to_owned(),
        number: u16::try_from(number).ok().filter(|number| *number > 0)?,
        protocol,
    })
}

/// The name of a slice.
pub(crate) fn slice_name(slice: &EndpointSlice) -> Option<Name> {
    let meta = &slice.metadata;
    Some(Name::new(meta.namespace.as_deref()?, meta.name.as_deref()?))
}

/// The slice as it is remembered; `None` if it belongs to no Service, or has no addresses but names.
pub(crate) fn slice(slice: &EndpointSlice) -> Option<(Name, Slice)> {
    let name = slice_name(slice)?;
    let service = slice.metadata.labels.as_ref()?.get(OF_SERVICE)?;
    let service = Name {
        namespace: Arc::clone(&name.namespace),
        name: service.as_str().into(),
    };
    let ports = slice
        .ports
        .iter()
        .flatten()
        .filter_map(|one| port(one.name.as_deref(), one.port?, one.protocol.as_deref()));
    let endpoints = slice.endpoints.iter().flatten().filter_map(|one| {
        // The API server refuses several addresses; all of them are of one endpoint, and clients take the first.
        let address = one.addresses.first()?.parse::<IpAddr>().ok()?;
        let conditions = one.conditions.clone().unwrap_or_default();
        let ready = conditions.ready.unwrap_or(true);
        // As in the API, what is not known counts as true.
        let serving = conditions.serving.unwrap_or(true);
        Some(Endpoint {
            address: address.to_canonical(),
            ready,
            leaving: serving && conditions.terminating.unwrap_or(false),
        })
    });
    let slice = Slice {
        service,
        ports: ports.collect(),
        endpoints: endpoints.collect(),
    };
    Some((name, slice))
}

#[cfg(test)]
pub(super) mod tests;
