//! What the pods of the node have allocated: the requests of all pods that were accepted and have not ended, and their
//! sum.
//!
//! [`Allocations`] is pure. [`SharedAllocations`] puts a lock around it, because several workers admit pods at the same
//! time: checking and allocating is one step, so two pods never both get the last of a resource. An accepted pod keeps
//! its allocation, whatever it requests: a node that shrank accepts no new pod, and ends none.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
};

use knoc_proto::{ids::PodUid, pb};

use crate::agent::tells_capacity;

/// Amounts by resource name: `cpu` in thousandths, `memory` and `ephemeral-storage` in bytes, others as counts.
pub(crate) type Amounts = BTreeMap<String, i64>;

/// What a pod requests, by Kubernetes' rule ([`knoc_translate::requested`]).
pub(crate) fn requests(shape: &pb::PodSpec) -> Amounts {
    let of = |amount: fn(&pb::Resources) -> i64| knoc_translate::requested(shape, amount);
    let mut amounts = Amounts::from([
        ("cpu".to_owned(), of(|requests| requests.cpu_millis)),
        ("memory".to_owned(), of(|requests| requests.memory_bytes)),
        (
            "ephemeral-storage".to_owned(),
            of(|requests| requests.ephemeral_storage_bytes),
        ),
    ]);
    let containers = shape.init_containers.iter().chain(&shape.containers);
    let lists = containers.filter_map(|container| container.requests.as_ref());
    for name in lists.flat_map(|list| list.extended.keys()) {
        let amount = |list: &pb::Resources| list.extended.get(name).copied().unwrap_or(0);
        amounts.insert(name.clone(), knoc_translate::requested(shape, amount));
    }
    amounts.retain(|_, amount| *amount > 0);
    amounts
}

/// The node has not enough of one resource. The text is that of Kubernetes, which tools look for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, capacity: {capacity}"
)]
pub(crate) struct Insufficient {
    pub(crate) resource: String,
    pub(crate) requested: i64,
    pub(crate) used: i64,
    pub(crate) capacity: i64,
}

/// How much the pods of the node may request together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Allocatable {
    /// The most pods.
    pub(crate) pods: i64,
    /// Amounts by resource name; None if Slurm's capacity is not known yet, so that only pods are counted.
    pub(crate) amounts: Option<Amounts>,
}

impl Allocatable {
    /// The amounts that the Node publishes ([`crate::node::status`]), with CPU in thousandths.
    pub(crate) fn of(total: Option<&pb::NodeInfo>, pods: u32, queue_factor: u32) -> Self {
        let limit = total.map_or(pods, |total| super::status::pod_limit(pods, total));
        let Some(total) = total.filter(|total| tells_capacity(total)) else {
            return Self {
                pods: limit.into(),
                amounts: None,
            };
        };
        let factor = i64::from(queue_factor);
        let mut amounts: Amounts = total.extended.clone().into_iter().collect();
        amounts.insert("cpu".to_owned(), total.cpu.saturating_mul(1000));
        amounts.insert("memory".to_owned(), total.memory_bytes);
        let bytes = super::status::ephemeral_storage(total);
        amounts.insert("ephemeral-storage".to_owned(), bytes);
        for amount in amounts.values_mut() {
            *amount = amount.saturating_mul(factor);
        }
        Self {
            pods: limit.into(),
            amounts: Some(amounts),
        }
    }
}

impl Allocatable {
    /// Adds the foreign resources of the Node.
    pub(crate) fn with(mut self, foreign: Amounts) -> Self {
        if let Some(amounts) = &mut self.amounts {
            amounts.extend(foreign);
        }
        self
    }
}

/// PURE: the pods with an allocation, and the sum of their allocations.
#[derive(Debug, Default)]
pub(crate) struct Allocations {
    holders: HashMap<PodUid, Amounts>,
    /// Wider than its parts, so that the sum never saturates and each part can be subtracted again.
    used: BTreeMap<String, i128>,
    /// Whether the pods that an earlier process accepted were added.
    complete: bool,
}

impl Allocations {
    /// Allocates for an accepted pod, whether or not it fits. The same pod counts once.
    pub(crate) fn hold(&mut self, uid: &PodUid, amounts: Amounts) {
        self.release(uid);
        for (name, amount) in &amounts {
            *self.used.entry(name.clone()).or_default() += i128::from(*amount);
        }
        self.holders.insert(uid.clone(), amounts);
    }

    /// Allocates for a new pod if it fits, else returns the first resource of which there is not enough, in the order
    /// of Kubernetes: pods, cpu, memory, ephemeral-storage, then the others by name.
    pub(crate) fn allocate(
        &mut self,
        uid: &PodUid,
        amounts: Amounts,
        allocatable: &Allocatable,
    ) -> Result<(), Insufficient> {
        self.release(uid);
        self.check(&amounts, allocatable)?;
        self.hold(uid, amounts);
        Ok(())
    }

    fn check(&self, amounts: &Amounts, allocatable: &Allocatable) -> Result<(), Insufficient> {
        let short = |resource: &str, requested, used: i64, capacity: i64| {
            (requested > capacity.saturating_sub(used)).then(|| Insufficient {
                resource: resource.to_owned(),
                requested,
                used,
                capacity,
            })
        };
        let pods = i64::try_from(self.holders.len()).unwrap_or(i64::MAX);
        let no_pod = short("pods", 1, pods, allocatable.pods);
        let first = ["cpu", "memory", "ephemeral-storage"];
        let rest = amounts
            .keys()
            .map(String::as_str)
            .filter(|name| !first.contains(name));
        let mut names = first.into_iter().chain(rest);
        let lacking = no_pod.or_else(|| {
            let offered = allocatable.amounts.as_ref()?;
            names.find_map(|name| {
                let capacity = match (name, offered.get(name)) {
                    (_, Some(capacity)) => *capacity,
                    // A resource that Slurm does not report (TmpDisk) is not checked here.
                    ("ephemeral-storage", None) => return None,
                    (_, None) => 0,
                };
                let requested = amounts.get(name).copied().filter(|amount| *amount > 0)?;
                let used = self.used.get(name).copied().unwrap_or(0);
                let used = i64::try_from(used).unwrap_or(i64::MAX);
                short(name, requested, used, capacity)
            })
        });
        lacking.map_or(Ok(()), Err)
    }

    /// Releases the allocation of a pod that has ended, or of which nothing is left.
    pub(crate) fn release(&mut self, uid: &PodUid) {
        for (name, amount) in self.holders.remove(uid).unwrap_or_default() {
            if let Some(sum) = self.used.get_mut(&name) {
                *sum -= i128::from(amount);
            }
        }
    }

    /// True at the first call: the caller then adds the pods of an earlier process before it allocates for a new pod.
    pub(crate) fn first_time(&mut self) -> bool {
        !std::mem::replace(&mut self.complete, true)
    }
}

/// The allocations of one node, shared by all workers. The lock is held for map operations only.
#[derive(Debug, Default)]
pub(super) struct SharedAllocations(Mutex<Allocations>);

impl SharedAllocations {
    pub(super) fn lock(&self) -> MutexGuard<'_, Allocations> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
