//! PURE: at which addresses of pods the kubelet listens, why it does not, and what helps if its host does not let it.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use k8s_openapi::api::core::v1::{Pod, Service};
use knoc_proto::{ids::PodUid, mesh::PodRange, pb};

use super::super::{
    plan::{OF_POD, PodPort, Services, has_job, target_ports, tcp_ports},
    policies::Policies,
};
use crate::pods::PodView;

/// The most listeners of the node. Each of them is a file descriptor.
const OF_NODE: usize = 4096;

/// The port that the API server connects to for `pods/NAME/proxy` if the first container of the pod declares none.
const UNNAMED: u16 = 80;

/// Where to listen for a port of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listener {
    pub(super) at: SocketAddr,
    /// That of the pod.
    pub(super) namespace: Arc<str>,
    /// Whether pod or Service name the port. If not, nobody is told that it cannot be had.
    pub(super) named: bool,
}

/// Where to listen, and for which pods not.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) listeners: BTreeMap<PodPort, Listener>,
    /// Only of pods that run: there are no Events for a pod that waits.
    pub(super) refused: Vec<(PodUid, Refusal)>,
}

/// Why the kubelet does not listen for a pod.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error(
        "the kubelet does not listen at the pod's own address: NetworkPolicy {policy} selects the pod, and this node cannot enforce it; \
         change the policy's podSelector so that it leaves the pod out, or reach the pod by `kubectl port-forward`"
    )]
    Policy { policy: String },
    #[error(
        "the kubelet does not listen at the pod's own address on port {port}, and perhaps others: the pod and its Services name more than \
         {OF_POD} ports; name only those that clients in the cluster use"
    )]
    TooManyPorts { port: u16 },
    #[error(
        "the kubelet does not listen at the pod's own address on port {port}, and perhaps others: all pods of the node together have \
         {OF_NODE} such ports, which is the limit; let pods and Services name only those that clients in the cluster use"
    )]
    NodeFull { port: u16 },
}

/// A pod that has an address of its own, and the ports that it declares or to which Services lead, or the one that clients take if
/// nobody names any.
struct Reached<'a> {
    view: &'a PodView,
    namespace: &'a str,
    address: Ipv4Addr,
    ports: Vec<u16>,
    named: bool,
}

impl<'a> Reached<'a> {
    fn of(
        view: &'a PodView,
        services: &Services<'_>,
        is_own: impl Fn(Ipv4Addr) -> bool,
    ) -> Option<Self> {
        // The range is compared because the address comes from the agent, which must not choose other addresses of this host.
        let address = own_address(view).filter(|address| is_own(*address))?;
        let namespace = view.pod.metadata.namespace.as_deref()?;
        let mut ports = ports(&view.pod, services);
        let named = !ports.is_empty();
        if !named {
            ports.push(UNNAMED);
        }
        has_job(view).then_some(Self {
            view,
            namespace,
            address,
            ports,
            named,
        })
    }

    /// The first NetworkPolicy that restricts who may connect to the pod.
    fn policy<'b>(&self, policies: &'b Policies) -> Option<&'b str> {
        let none = BTreeMap::new();
        let labels = self.view.pod.metadata.labels.as_ref();
        policies.isolating(self.namespace, labels.unwrap_or(&none))
    }
}

/// The TCP ports that the pod declares, and then those to which Services lead: a port needs no declaration for that.
fn ports(pod: &Pod, services: &Services<'_>) -> Vec<u16> {
    let declared = pod.spec.iter().flat_map(tcp_ports);
    let declared = declared.filter_map(|port| u16::try_from(port.container_port).ok());
    let declared: BTreeSet<u16> = declared.filter(|port| *port > 0).collect();
    let others = target_ports(services, pod);
    let others = others.difference(&declared).copied();
    declared.iter().copied().chain(others).collect()
}

/// The address of the pod's own. A pod in the network of its node has none.
fn own_address(view: &PodView) -> Option<Ipv4Addr> {
    let network = view.observed.as_ref()?.network.as_ref()?;
    if network.mode() == pb::NetworkMode::Host {
        return None;
    }
    network.address.parse().ok()
}

/// Where to listen for these pods, to which these Services lead. `is_own`: whether an address is in the range of the node's pods.
///
/// The first port of each pod comes first, then the second one of each, and so on, so that at the limit of the node no pod takes the
/// ports of others by many of its own. Among them older pods come before younger ones.
pub(super) fn wanted<'a>(
    pods: &[PodView],
    services: impl Iterator<Item = &'a Service>,
    is_own: impl Fn(Ipv4Addr) -> bool,
    policies: &Policies,
) -> Wanted {
    let services = Services::of(services, |_, _| true);
    let mut wanted = Wanted::default();
    let pods = pods.iter();
    let mut pods: Vec<_> = pods
        .filter_map(|view| Reached::of(view, &services, &is_own))
        .collect();
    // Those that name no port come last.
    pods.sort_by_cached_key(|pod| {
        let created = pod.view.pod.metadata.creation_timestamp.as_ref();
        let created = created.map(|time| time.0);
        (!pod.named, created, pod.view.uid.clone())
    });
    // No two pods have one address; if the agent says so, it is the older one's.
    let mut addresses = HashSet::new();
    pods.retain(|pod| addresses.insert(pod.address));
    pods.retain(|pod| {
        let Some(policy) = pod.policy(policies) else {
            return true;
        };
        if pod.named {
            let policy = policy.to_owned();
            let refused = (pod.view.uid.clone(), Refusal::Policy { policy });
            wanted.refused.push(refused);
        }
        false
    });
    for count in 0..=OF_POD {
        pods.retain(|pod| add(&mut wanted, pod, count));
    }
    wanted
}

/// Adds a listener for the port of this number in the pod's list. Whether the pod may have more of them.
fn add(wanted: &mut Wanted, pod: &Reached<'_>, count: usize) -> bool {
    let Some(port) = pod.ports.get(count).copied() else {
        return false;
    };
    let uid = pod.view.uid.clone();
    if count >= OF_POD {
        wanted.refused.push((uid, Refusal::TooManyPorts { port }));
        return false;
    }
    if wanted.listeners.len() >= OF_NODE {
        if !pod.named {
            return false;
        }
        wanted.refused.push((uid, Refusal::NodeFull { port }));
        return false;
    }
    let listener = Listener {
        at: SocketAddr::new(pod.address.into(), port),
        namespace: pod.namespace.into(),
        named: pod.named,
    };
    wanted
        .listeners
        .insert(PodPort { uid, number: port }, listener);
    true
}

/// What is told of a listener that could not be made, with what helps. `range`: that of the node's pods.
pub(super) fn failure(at: SocketAddr, range: Option<PodRange>, error: &io::Error) -> String {
    let kind = error.kind();
    let why = if kind == io::ErrorKind::AddrNotAvailable {
        let range = range.map_or_else(|| "RANGE".to_owned(), |range| range.to_string());
        format!(
            "the kubelet's host does not take this address for one of its own; run `ip route add local {range} dev lo` there as root"
        )
    } else if kind == io::ErrorKind::PermissionDenied {
        format!(
            "the kubelet may not use this port; set the sysctl net.ipv4.ip_unprivileged_port_start of its host to {} or less, or let the \
             pod's program use a port from 1024 on",
            at.port()
        )
    } else if kind == io::ErrorKind::AddrInUse {
        "another program of the kubelet's host listens on this port at all addresses; let that one listen at one address only, or let the \
         pod's program use another port"
            .to_owned()
    } else {
        error.to_string()
    };
    format!(
        "the kubelet cannot listen at {at}, the pod's own address: {why}; it tries again, every two minutes in the end"
    )
}

#[cfg(test)]
mod tests;
