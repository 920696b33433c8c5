//! One node of this kubelet: everything that exists once for each node. Several partitions that become several nodes are
//! several units.
//!
//! [`super::start`] starts the tasks of a unit, which write the Node and its Lease. The workers of its pods ask the unit
//! what the node allows, and what its pods hold.

use std::sync::{Arc, MutexGuard};

use k8s_openapi::api::core::v1::PodSpec;
use knoc_proto::pb;
use tokio::sync::watch;

use super::{
    allocations::{Allocatable, Allocations, SharedAllocations},
    identity::Identity,
    place::{Misfit, Place},
    status,
};

/// What Slurm has for the node, as last heard.
pub type Capacity = watch::Receiver<Option<Arc<pb::NodeInfo>>>;

/// One node of this kubelet.
#[derive(Debug)]
pub struct Unit {
    identity: Identity,
    capacity: Capacity,
    place: watch::Sender<Place>,
    allocations: SharedAllocations,
}

impl Unit {
    /// A node whose pods hold nothing yet, and whose labels and taints are not known yet.
    #[must_use]
    pub fn new(identity: Identity, capacity: Capacity) -> Self {
        Self {
            identity,
            capacity,
            place: watch::Sender::new(Place::default()),
            allocations: SharedAllocations::default(),
        }
    }

    /// The name of the Node, of its Lease, and in `spec.nodeName` of its pods.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.identity.name
    }

    /// What does not change.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(super) fn capacity(&self) -> Capacity {
        self.capacity.clone()
    }

    /// The labels and taints of the Node, as they were just seen.
    pub(crate) fn set_place(&self, place: Place) {
        self.place.send_replace(place);
    }

    /// Does a new pod belong on this node, by the labels and taints as last seen?
    pub(crate) fn fits(&self, spec: &PodSpec) -> Result<(), Misfit> {
        self.place.borrow().fits(spec)
    }

    /// What the node lets its pods request together.
    pub(crate) fn allocatable(&self) -> Allocatable {
        let total = self.capacity.borrow().clone();
        let Identity {
            pods, queue_factor, ..
        } = self.identity;
        Allocatable::of(total.as_deref(), pods, queue_factor)
    }

    /// What the pods of the node hold. The lock is for map operations only.
    pub(crate) fn allocations(&self) -> MutexGuard<'_, Allocations> {
        self.allocations.lock()
    }

    /// All that Slurm has for the node, without the queue factor.
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
