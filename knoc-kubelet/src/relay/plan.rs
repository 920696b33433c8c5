//! PURE: which Services lead to which pods of the node, in the state that Kubernetes' own endpoint controller would publish; and
//! why a Service does not lead to a pod that it selects.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
    sync::Arc,
};

use k8s_openapi::{
    api::core::v1::{ContainerPort, Pod, PodSpec, Service, ServicePort, ServiceSpec},
    apimachinery::pkg::util::intstr::IntOrString,
};
use knoc_proto::{egress::AllowList, ids::PodUid, pb::PodPhase};

use super::policies::Policies;
use crate::{egress::table::Name, pods::PodView};

/// The most ports of one Service that are relayed.
pub(super) const PORTS: usize = 100;
/// The most ports of one pod that are listened on for it, so that a pod does not take those of all others.
pub(super) const OF_POD: usize = 32;
/// The most Services that lead to one pod: each of them is a slice, and whoever may create Services may create many.
const SERVICES: usize = 32;
/// The most endpoints of the node.
const OF_NODE: usize = 4096;

/// A port of a pod, which has one port of the kubelet.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct PodPort {
    pub(super) uid: PodUid,
    pub(super) number: u16,
}

/// A pod as the endpoint of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) service: Name,
    /// The pod's name; its namespace is the Service's.
    pub(super) pod: String,
    pub(super) uid: PodUid,
    pub(super) ports: Vec<NamedPort>,
    pub(super) conditions: Conditions,
}

/// A port of a Service, and where it leads in the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NamedPort {
    /// The name in the Service, which joins it to the port of a slice.
    pub(super) name: Option<String>,
    pub(super) app_protocol: Option<String>,
    /// Of the pod.
    pub(super) number: u16,
}

/// The conditions of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Conditions {
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: bool,
}

/// Where the Services lead.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Those of the first Service of each pod, then those of the second ones, and so on: no pod takes the endpoints or ports of others
    /// by many Services.
    pub(super) endpoints: Vec<Endpoint>,
    /// Only of pods that run: there are no Events for a pod that waits.
    pub(super) refused: Vec<(PodUid, Refusal)>,
}

impl Plan {
    /// The ports of pods to which Services lead.
    pub(super) fn ports(&self) -> HashSet<PodPort> {
        let endpoints = self.endpoints.iter();
        let ports = endpoints.flat_map(|endpoint| {
            endpoint.ports.iter().map(|port| PodPort {
                uid: endpoint.uid.clone(),
                number: port.number,
            })
        });
        ports.collect()
    }

    /// The pods that a NetworkPolicy closes.
    pub(super) fn isolated(&self) -> HashSet<&PodUid> {
        let refused = self.refused.iter();
        let isolated = refused.filter(|(_, why)| matches!(why, Refusal::Policy { .. }));
        isolated.map(|(uid, _)| uid).collect()
    }
}

/// Why a Service does not lead to a pod.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error(
        "Service {service} does not lead to the pod: NetworkPolicy {policy} selects the pod, and this node cannot enforce it; change the \
         policy's podSelector so that it leaves the pod out, or reach the pod by `kubectl port-forward`"
    )]
    Policy { service: Name, policy: String },
    #[error(
        "Service {service} does not lead to the pod: it is headless (clusterIP: None), so its clients would dial a port of the pod at an \
         address that all pods of this node share; use a Service with a clusterIP"
    )]
    Headless { service: Name },
    #[error(
        "Service {service} does not lead to the pod: it has no {family} address, and the pod is reached at an {family} address of the \
         kubelet, to which it cannot lead; add {family} to the Service's ipFamilies"
    )]
    Family { service: Name, family: &'static str },
    #[error(
        "port {port} of Service {service} does not lead to the pod: only TCP is relayed, and it is {protocol}"
    )]
    Protocol {
        service: Name,
        port: i32,
        protocol: String,
    },
    #[error(
        "Service {service} does not lead to the pod: the kubelet has no port for port {port} of the pod: {why}"
    )]
    NoPort {
        service: Name,
        port: u16,
        why: NoPort,
    },
    #[error(
        "Service {service}, and perhaps others, does not lead to the pod: more than {SERVICES} Services select it; delete some of them, or \
         change their selectors"
    )]
    TooManyServices { service: Name },
    #[error(
        "Service {service} does not lead to the pod: the node has {OF_NODE} relayed endpoints, which is the limit; list fewer Services in \
         `relay.allow`"
    )]
    NodeFull { service: Name },
}

/// Why a port of a pod gets no port of the kubelet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoPort {
    #[error("it has {OF_POD} relayed ports, which is the limit of a pod")]
    Pod,
    #[error(
        "the last ports of `relay.ports` are for namespaces that have fewer than {share} of them, and the pods of {namespace} have \
         as many, or gave them back within the last minute; `relay.ports` can be larger"
    )]
    Namespace { namespace: Arc<str>, share: usize },
    #[error("all of `relay.ports` are in use or rest for a minute; `relay.ports` can be larger")]
    All,
}

/// The Services that may lead to pods, found by the first label that they select.
pub(super) struct Services<'a>(HashMap<(&'a str, &'a str, &'a str), Vec<Selecting<'a>>>);

struct Selecting<'a> {
    name: Name,
    spec: &'a ServiceSpec,
    selector: &'a BTreeMap<String, String>,
}

impl<'a> Services<'a> {
    /// Those of which `permits` allows the namespace and the name.
    pub(super) fn of(
        services: impl Iterator<Item = &'a Service>,
        permits: impl Fn(&str, &str) -> bool,
    ) -> Self {
        let mut found: HashMap<_, Vec<_>> = HashMap::new();
        for service in services {
            if let Some((first, selecting)) = selecting(service, &permits) {
                found.entry(first).or_default().push(selecting);
            }
        }
        Self(found)
    }

    fn of_pod<'b>(
        &'b self,
        namespace: &'b str,
        labels: &'b BTreeMap<String, String>,
    ) -> impl Iterator<Item = &'b Selecting<'a>> {
        let by_label = labels.iter().flat_map(move |(name, value)| {
            let key = (namespace, name.as_str(), value.as_str());
            self.0.get(&key).into_iter().flatten()
        });
        by_label.filter(move |service| {
            let mut wanted = service.selector.iter();
            wanted.all(|(name, value)| labels.get(name) == Some(value))
        })
    }
}

/// A Service that may lead to pods, with its namespace and the first label that it selects.
fn selecting(
    service: &Service,
    permits: impl Fn(&str, &str) -> bool,
) -> Option<((&str, &str, &str), Selecting<'_>)> {
    let meta = &service.metadata;
    let (namespace, name) = (meta.namespace.as_deref()?, meta.name.as_deref()?);
    let spec = service.spec.as_ref()?;
    let selector = spec.selector.as_ref()?;
    let (label, value) = selector.first_key_value()?;
    let is_name = spec.type_.as_deref() == Some("ExternalName");
    if is_name || !permits(namespace, name) {
        return None;
    }
    let selecting = Selecting {
        name: Name::new(namespace, name),
        spec,
        selector,
    };
    Some(((namespace, label, value), selecting))
}

/// Where these Services lead. `family`: that of the kubelet's address, as Services have it.
pub(super) fn plan<'a>(
    pods: &[PodView],
    services: impl Iterator<Item = &'a Service>,
    (allow, family): (&AllowList, &'static str),
    policies: &Policies,
) -> Plan {
    let services = Services::of(services, |namespace, name| allow.permits(namespace, name));
    let reached = pods.iter().filter(|view| is_reached(view));
    let mut selected: Vec<_> = reached
        .filter_map(|view| Selected::of(view, &services, policies))
        .collect();
    let mut plan = Plan::default();
    for count in 0..=SERVICES {
        selected.retain(|pod| {
            let Some(service) = pod.services.get(count) else {
                return false;
            };
            let name = service.name.clone();
            let refusal = match plan.endpoints.len() {
                _ if count >= SERVICES => Refusal::TooManyServices { service: name },
                OF_NODE.. => Refusal::NodeFull { service: name },
                _ => {
                    add(&mut plan, pod.view, service, (pod.policy, family));
                    return true;
                }
            };
            plan.refused.push((pod.view.uid.clone(), refusal));
            false
        });
    }
    plan
}

/// A pod that Services select.
struct Selected<'a> {
    view: &'a PodView,
    /// The first NetworkPolicy that closes it.
    policy: Option<&'a str>,
    /// Sorted by name.
    services: Vec<&'a Selecting<'a>>,
}

impl<'a> Selected<'a> {
    fn of(view: &'a PodView, services: &'a Services<'a>, policies: &'a Policies) -> Option<Self> {
        let meta = &view.pod.metadata;
        let (namespace, labels) = meta.namespace.as_deref().zip(meta.labels.as_ref())?;
        let mut selecting: Vec<_> = services.of_pod(namespace, labels).collect();
        selecting.sort_by(|one, other| one.name.cmp(&other.name));
        Some(Self {
            view,
            policy: policies.isolating(namespace, labels),
            services: selecting,
        })
    }
}

/// Is the pod an endpoint of the relay? Kubernetes' own controllers publish one that has an address; an address from an earlier
/// `node.podIP` goes with the next status.
fn is_reached(view: &PodView) -> bool {
    let status = view.pod.status.as_ref();
    let has_address = status
        .and_then(|status| status.pod_ip.as_deref())
        .is_some_and(|address| !address.is_empty());
    has_job(view) && !has_address
}

/// Is there a job that runs the containers of the pod? A pod that waits, was requeued or has ended has none, and nobody reaches it.
pub(super) fn has_job(view: &PodView) -> bool {
    let phase = view.observed.as_ref().map(|observed| observed.phase());
    let runs = matches!(phase, Some(PodPhase::Running | PodPhase::Stopping));
    runs && !crate::pods::status::is_terminal(&view.pod)
}

fn add(
    plan: &mut Plan,
    view: &PodView,
    service: &Selecting<'_>,
    (policy, family): (Option<&str>, &'static str),
) {
    let name = &service.name;
    let mut refuse = |refusal| plan.refused.push((view.uid.clone(), refusal));
    if service.spec.cluster_ip.as_deref() == Some("None") {
        let service = name.clone();
        return refuse(Refusal::Headless { service });
    }
    if !has_family(service.spec, family) {
        let service = name.clone();
        return refuse(Refusal::Family { service, family });
    }
    if let Some(policy) = policy {
        let (service, policy) = (name.clone(), policy.to_owned());
        return refuse(Refusal::Policy { service, policy });
    }
    let mut ports = Vec::new();
    for port in service.spec.ports.iter().flatten().take(PORTS) {
        match named_port(port, &view.pod) {
            Ok(Some(port)) => ports.push(port),
            // As everywhere in Kubernetes, a port by name does not lead to pods that have no port of this name.
            Ok(None) => {}
            Err(protocol) => refuse(Refusal::Protocol {
                service: name.clone(),
                port: port.port,
                protocol,
            }),
        }
    }
    if !ports.is_empty() {
        plan.endpoints.push(Endpoint {
            service: name.clone(),
            pod: view.pod.metadata.name.clone().unwrap_or_default(),
            uid: view.uid.clone(),
            ports,
            conditions: conditions(&view.pod, service.spec),
        });
    }
}

/// Whether the Service leads to endpoints of this family. An API server that does not say has only one.
fn has_family(service: &ServiceSpec, family: &str) -> bool {
    let families = service.ip_families.as_deref().unwrap_or_default();
    families.is_empty() || families.iter().any(|one| one == family)
}

/// Where a port of a Service leads in the pod. Fails with the protocol, if it is not TCP.
fn named_port(port: &ServicePort, pod: &Pod) -> Result<Option<NamedPort>, String> {
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    if protocol != "TCP" {
        return Err(protocol.to_owned());
    }
    let number = match &port.target_port {
        None | Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => {
            let spec = pod.spec.as_ref();
            spec.and_then(|spec| port_of_name(spec, name))
        }
    };
    let number = number.and_then(|number| u16::try_from(number).ok());
    Ok(number.filter(|number| *number > 0).map(|number| NamedPort {
        name: port.name.clone().filter(|name| !name.is_empty()),
        app_protocol: port.app_protocol.clone(),
        number,
    }))
}

/// The port of this name of a container, or of a sidecar.
fn port_of_name(spec: &PodSpec, name: &str) -> Option<i32> {
    let mut ports = tcp_ports(spec);
    let found = ports.find(|port| port.name.as_deref() == Some(name));
    found.map(|port| port.container_port)
}

/// The TCP ports that the containers and the sidecars declare.
pub(super) fn tcp_ports(spec: &PodSpec) -> impl Iterator<Item = &ContainerPort> {
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|one| one.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars);
    let ports = ports.flat_map(|one| one.ports.iter().flatten());
    ports.filter(|port| port.protocol.as_deref().is_none_or(|it| it == "TCP"))
}

/// The TCP ports of the pod to which Services lead.
pub(super) fn target_ports(services: &Services<'_>, pod: &Pod) -> BTreeSet<u16> {
    let meta = &pod.metadata;
    let Some((namespace, labels)) = meta.namespace.as_deref().zip(meta.labels.as_ref()) else {
        return BTreeSet::new();
    };
    let services = services.of_pod(namespace, labels).take(SERVICES);
    let ports = services.flat_map(|service| service.spec.ports.iter().flatten().take(PORTS));
    let named = ports.filter_map(|port| named_port(port, pod).ok().flatten());
    named.map(|port| port.number).collect()
}

/// The conditions as the endpoint controller sets them.
fn conditions(pod: &Pod, service: &ServiceSpec) -> Conditions {
    let conditions = pod.status.as_ref().and_then(|it| it.conditions.as_ref());
    let mut conditions = conditions.into_iter().flatten();
    let serving = conditions.any(|one| one.type_ == "Ready" && one.status == "True");
    let terminating = pod.metadata.deletion_timestamp.is_some();
    let always = service.publish_not_ready_addresses == Some(true);
    Conditions {
        ready: always || (serving && !terminating),
        serving,
        terminating,
    }
}

impl fmt::Display for PodPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port {} of pod {}", self.number, self.uid)
    }
}

#[cfg(test)]
mod tests;
