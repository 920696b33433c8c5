//! One node of this kubelet: everything that exists once for each node. If several partitions become nodes, each has a
//! unit.
//!
//! [`super::start`] starts the tasks of a unit, which write the Node and its Lease. The workers of its pods ask the
//! unit what the node allows, and what its pods have allocated.

use std::sync::{Arc, MutexGuard};

use k8s_openapi::api::core::v1::{Node, PodSpec};
use knoc_proto::pb;
use tokio::sync::watch;

use super::{
    allocations::{Allocatable, Allocations, Amounts, SharedAllocations},
    foreign,
    identity::Identity,
    predicates::{Mismatch, NodeAttributes},
    status,
};

/// What Slurm has for the node, as the agent last reported it.
pub type Capacity = watch::Receiver<Option<Arc<pb::NodeInfo>>>;

/// One node of this kubelet.
#[derive(Debug)]
pub struct Unit {
    identity: Identity,
    capacity: Capacity,
    attributes: watch::Sender<NodeAttributes>,
    /// The foreign resources of the Node ([`foreign`]).
    foreign: watch::Sender<Amounts>,
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
            foreign: watch::Sender::default(),
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

    /// The shape as it is sent to the agent: with the cluster domain, and without foreign resources.
    pub(crate) fn of_this_cluster(&self, mut shape: pb::PodSpec) -> pb::PodSpec {
        if !shape.subdomain.is_empty() {
            shape
                .cluster_domain
                .clone_from(&self.identity.cluster_domain);
        }
        if let Some(site) = self.capacity.borrow().as_deref() {
            foreign::leave_out(&mut shape, site);
        }
        shape
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
