//! One node of this kubelet: everything that exists once for each node. If several partitions become nodes, each has a
//! unit.
//!
//! [`super::start`] starts the tasks of a unit, which write the Node and its Lease. The workers of its pods ask the
//! unit what the node allows, and what its pods have allocated.

use std::{
    net::IpAddr,
    sync::{Arc, MutexGuard},
};

use k8s_openapi::api::core::v1::{Node, PodSpec};
use knoc_proto::{mesh::PodRange, pb};
use tokio::sync::watch;

use super::{
    allocations::{Allocatable, Allocations, Amounts, SharedAllocations},
    api_names::ApiNames,
    foreign,
    identity::{Identity, PodIp},
    predicates::{Mismatch, NodeAttributes},
    status,
};
use crate::agent::tells_capacity;

/// What Slurm has for the node, as the agent last reported it.
pub type Capacity = watch::Receiver<Option<Arc<pb::NodeInfo>>>;

/// One node of this kubelet.
#[derive(Debug)]
pub struct Unit {
    identity: Identity,
    capacity: Capacity,
    attributes: watch::Sender<NodeAttributes>,
    /// The range of the Node in the cluster's plan of addresses (`spec.podCIDR`), if it has one of which pods can get addresses.
    range: watch::Sender<Option<PodRange>>,
    /// The foreign resources of the Node ([`foreign`]).
    foreign: watch::Sender<Amounts>,
    /// Whether the API server's certificate names what pods are told to use.
    api_names: watch::Sender<ApiNames>,
    allocations: SharedAllocations,
}

impl Unit {
    /// A node without allocations, whose labels and taints are not known yet.
    #[must_use]
    pub fn new(identity: Identity, capacity: Capacity) -> Self {
        Self {
            identity,
            capacity,
            attributes: watch::Sender::new(NodeAttributes::default()),
            range: watch::Sender::default(),
            foreign: watch::Sender::default(),
            api_names: watch::Sender::default(),
            allocations: SharedAllocations::default(),
        }
    }

    /// The name of the Node, of its Lease, and in `spec.nodeName` of its pods.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.identity.name
    }

    /// The properties of the node that do not change.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The shape as it is sent to the agent: with the cluster domain and the range of the pod's address, and without foreign
    /// resources.
    pub(crate) fn of_this_cluster(&self, mut shape: pb::PodSpec) -> pb::PodSpec {
        if !shape.subdomain.is_empty() {
            shape
                .cluster_domain
                .clone_from(&self.identity.cluster_domain);
        }
        if self.gives_address(&shape)
            && let Some(range) = self.pod_range()
        {
            shape.pod_range = range.to_string();
        }
        let site = self.capacity.borrow().clone();
        if let Some(site) = site.filter(|site| tells_capacity(site)) {
            foreign::leave_out(&mut shape, &site);
        }
        shape
    }

    /// Is it known which of the pod's extended resources are the site's? Until then such a pod is neither judged nor sent:
    /// without those that the site has, its job would run without them.
    pub(crate) fn knows_resources(&self, shape: &pb::PodSpec) -> bool {
        let site = self.capacity.borrow();
        site.as_deref().is_some_and(tells_capacity) || !foreign::asks_for_extended(shape)
    }

    /// Is the pod to have an address of its own? Not in the node's network.
    fn gives_address(&self, shape: &pb::PodSpec) -> bool {
        self.identity.pod_ip == PodIp::Own && shape.network() != pb::NetworkMode::Host
    }

    /// From which range pods get addresses of their own: that of the Node, else that of the configuration.
    fn pod_range(&self) -> Option<PodRange> {
        self.range.borrow().or(self.identity.pod_range)
    }

    /// The range of the pods' own addresses, if they are to have any.
    pub(crate) fn own_range(&self) -> Option<PodRange> {
        self.pod_range()
            .filter(|_| self.identity.pod_ip == PodIp::Own)
    }

    /// The range of the Node in the cluster's plan of addresses, and its changes.
    pub(crate) fn subscribe_range(&self) -> watch::Receiver<Option<PodRange>> {
        self.range.subscribe()
    }

    /// Is this the address of a pod's own? Pods of the node reach it, and others only if the kubelet listens there.
    pub(crate) fn is_own_pod(&self, address: IpAddr) -> bool {
        match (self.own_range(), address) {
            (Some(range), IpAddr::V4(address)) => range.contains(address),
            (Some(_), IpAddr::V6(_)) | (None, _) => false,
        }
    }

    /// Why the pod cannot be sent yet: it is to have an address, and it is not known of which range.
    pub(crate) fn lacks_range(&self, shape: &pb::PodSpec) -> Option<String> {
        let lacks = self.gives_address(shape) && self.pod_range().is_none();
        lacks.then(|| {
            format!(
                "pods are to have addresses of their own (node.podIP: own), and the node {} has neither a spec.podCIDR of IPv4 nor \
                 node.podRange in the kubelet's configuration",
                self.identity.name
            )
        })
    }

    /// Stores the range of the Node as just read.
    pub(crate) fn see_range(&self, node: &Node) {
        let range = range_of(node);
        let changed = self.range.send_if_modified(|known| {
            let changes = *known != range;
            *known = range;
            changes
        });
        if let (true, Some(range), Some(configured)) = (changed, range, self.identity.pod_range)
            && range != configured
        {
            tracing::warn!(
                %range,
                %configured,
                "the Node has a spec.podCIDR, from which pods get their addresses: node.podRange is not used"
            );
        }
    }

    pub(super) fn capacity(&self) -> Capacity {
        self.capacity.clone()
    }

    /// Stores the attributes of the Node as just read.
    pub(crate) fn set_attributes(&self, attributes: NodeAttributes) {
        self.attributes.send_replace(attributes);
    }

    /// Stores the foreign resources of the Node as just read.
    pub(crate) fn set_foreign(&self, foreign: Amounts) {
        self.foreign.send_replace(foreign);
    }

    /// Stores what the API server's certificate was found to name.
    pub(crate) fn set_api_names(&self, found: ApiNames) {
        self.api_names.send_replace(found);
    }

    /// What the API server's certificate was found to name.
    pub(crate) fn api_names(&self) -> ApiNames {
        self.api_names.borrow().clone()
    }

    /// Stores the foreign resources of this Node object.
    pub(crate) fn see_foreign(&self, node: &Node) {
        let site = self.capacity.borrow().clone();
        self.set_foreign(foreign::resources(node.status.as_ref(), site.as_deref()));
    }

    /// Does a new pod match this node, by the labels and taints as last seen?
    pub(crate) fn fits(&self, spec: &PodSpec) -> Result<(), Mismatch> {
        self.attributes.borrow().fits(spec)
    }

    /// How much the pods of the node may request together.
    pub(crate) fn allocatable(&self) -> Allocatable {
        let total = self.capacity.borrow().clone();
        let Identity {
            pods, queue_factor, ..
        } = self.identity;
        let foreign = self.foreign.borrow().clone();
        Allocatable::of(total.as_deref(), pods, queue_factor).with(foreign)
    }

    /// Whether the site runs containers that ask for privileges without them; `None` until the agent has reported it.
    pub(crate) fn maps_privileged(&self) -> Option<bool> {
        let capacity = self.capacity.borrow();
        capacity.as_ref().map(|site| site.maps_privileged)
    }

    /// The allocations of the node's pods. Hold the lock for map operations only.
    pub(crate) fn allocations(&self) -> MutexGuard<'_, Allocations> {
        self.allocations.lock()
    }

    /// What Slurm has for the node, without the queue factor.
    pub(crate) fn total(&self) -> pb::Resources {
        let capacity = self.capacity.borrow().clone();
        let Some(capacity) = capacity else {
            return pb::Resources::default();
        };
        pb::Resources {
            cpu_millis: capacity.cpu.saturating_mul(1000),
            memory_bytes: capacity.memory_bytes,
            ephemeral_storage_bytes: status::ephemeral_storage(&capacity),
            extended: capacity.extended.clone(),
        }
    }
}

/// PURE: the range of IPv4 addresses that the cluster has given the Node, if pods can get addresses of it.
fn range_of(node: &Node) -> Option<PodRange> {
    let spec = node.spec.as_ref()?;
    let mut all = spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr);
    all.find_map(|text| text.parse().ok())
}

#[cfg(test)]
impl Unit {
    /// A node with this policy for the addresses of its pods.
    pub(crate) fn fixture(pod_ip: PodIp, pod_range: Option<&str>) -> Self {
        let identity = Identity {
            name: "knoc".to_owned(),
            internal_ip: "10.0.0.1".to_owned(),
            port: 10250,
            labels: std::collections::BTreeMap::new(),
            pods: 100,
            queue_factor: 10,
            taint: true,
            cluster_domain: "cluster.local".to_owned(),
            pod_ip,
            pod_range: pod_range.map(|text| text.parse().unwrap()),
            websockets: false,
        };
        Self::new(identity, watch::Sender::new(None).subscribe())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(spec: &serde_json::Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "knoc"}, "spec": spec})).unwrap()
    }

    fn range(unit: &Unit) -> String {
        unit.of_this_cluster(pb::PodSpec::default()).pod_range
    }

    #[test]
    fn the_range_is_that_of_the_node_else_that_of_the_configuration() {
        let own = Unit::fixture(PodIp::Own, Some("10.200.0.0/16"));
        assert_eq!(range(&own), "10.200.0.0/16");
        own.see_range(&node(
            &json!({"podCIDR": "10.244.7.0/24", "podCIDRs": ["10.244.7.0/24"]}),
        ));
        assert_eq!(range(&own), "10.244.7.0/24");
        let both = json!({"podCIDR": "fd00::/64", "podCIDRs": ["fd00::/64", "10.244.8.0/24"]});
        own.see_range(&node(&both));
        assert_eq!(range(&own), "10.244.8.0/24");
        own.see_range(&node(&json!({"podCIDR": "fd00::/64"})));
        assert_eq!(range(&own), "10.200.0.0/16");
        let is_own = |unit: &Unit, text: &str| unit.is_own_pod(text.parse().unwrap());
        assert!(is_own(&own, "10.200.0.7") && !is_own(&own, "10.201.0.7"));
        assert!(!is_own(&own, "::ffff:10.200.0.7"));
        let of_node = Unit::fixture(PodIp::Node, Some("10.200.0.0/16"));
        assert!(!is_own(&of_node, "10.200.0.7"));
    }

    #[test]
    fn a_pod_waits_for_a_range_only_if_it_is_to_have_an_address_of_its_own() {
        let mut pod = pb::PodSpec::default();
        let own = Unit::fixture(PodIp::Own, None);
        let why = own.lacks_range(&pod).unwrap();
        assert!(
            why.contains("spec.podCIDR") && why.contains("node.podRange"),
            "{why}"
        );
        own.see_range(&node(&json!({"podCIDR": "10.244.7.0/24"})));
        assert_eq!(own.lacks_range(&pod), None);
        for other in [PodIp::None, PodIp::Node] {
            let other = Unit::fixture(other, Some("10.200.0.0/16"));
            assert_eq!(
                (other.lacks_range(&pod), range(&other)),
                (None, String::new())
            );
        }
        pod.set_network(pb::NetworkMode::Host);
        assert_eq!(Unit::fixture(PodIp::Own, None).lacks_range(&pod), None);
        let own = Unit::fixture(PodIp::Own, Some("10.200.0.0/16"));
        assert_eq!(own.of_this_cluster(pod).pod_range, "");
    }
}
