//! What is wanted and what was observed, by pod UID: the one place where both sides meet.
//!
//! Written by `pods::watch` (desired) and `agent::watch` (observed), read by the controller and the
//! server. Locks are held for map operations only, never across an await.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use k8s_openapi::api::core::v1::Pod;
use knoc_proto::{ids::PodUid, pb};
use knoc_translate::verdict::Findings;

use crate::stats::ledger::{Ledger, Totals};

/// One pod as both sides know it.
#[derive(Clone, Debug)]
pub struct PodView {
    /// The key.
    pub uid: PodUid,
    /// As the API server has it (without managedFields).
    pub pod: Arc<Pod>,
    /// As the agent last reported it; kept while the link is down.
    pub observed: Option<Arc<pb::PodObserved>>,
}

#[derive(Clone, Debug)]
struct Desired {
    pod: Arc<Pod>,
    findings: Arc<Findings>,
}

#[derive(Default, Debug)]
struct Inner {
    desired: HashMap<PodUid, Desired>,
    observed: HashMap<PodUid, Arc<pb::PodObserved>>,
    names: HashMap<(String, String), PodUid>,
    /// Pods that this process saw bound to our node, until nothing is left of them.
    seen: HashSet<PodUid>,
    /// What the pods that were seen used, of CPU time and the like.
    ledger: Ledger,
}

/// The shared map; clones are handles on the same one.
#[derive(Clone, Default, Debug)]
pub struct Store(Arc<RwLock<Inner>>);

impl Store {
    /// The pod of this name that is bound to our node.
    #[must_use]
    pub fn find(&self, namespace: &str, name: &str) -> Option<PodView> {
        let inner = self.read();
        let uid = inner.names.get(&(namespace.to_owned(), name.to_owned()))?;
        inner.view(uid)
    }

    /// The pod of this UID that is bound to our node.
    #[must_use]
    pub fn by_uid(&self, uid: &PodUid) -> Option<PodView> {
        self.read().view(uid)
    }

    /// All pods bound to our node, by namespace and name.
    #[must_use]
    pub fn pods(&self) -> Vec<PodView> {
        let inner = self.read();
        let mut names: Vec<_> = inner.names.iter().collect();
        names.sort();
        names
            .into_iter()
            .filter_map(|(_, uid)| inner.view(uid))
            .collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn take(&mut self, uid: &PodUid, pod: Arc<Pod>, findings: Arc<Findings>) {
        self.names.insert(key(&pod), uid.clone());
        self.seen.insert(uid.clone());
        self.desired.insert(uid.clone(), Desired { pod, findings });
    }

    fn view(&self, uid: &PodUid) -> Option<PodView> {
        let (uid, desired) = self.desired.get_key_value(uid)?;
        Some(PodView {
            uid: uid.clone(),
            pod: desired.pod.clone(),
            observed: self.observed.get(uid).cloned(),
        })
    }
}

/// Writers: `pods::watch` for what is wanted, `agent::watch` for what was observed.
impl Store {
    /// Takes a pod as a watch brings it; an older resourceVersion of the same UID is ignored.
    pub fn set_desired(&self, uid: &PodUid, pod: Arc<Pod>, findings: Arc<Findings>) {
        let mut inner = self.write();
        if let Some(known) = inner.desired.get(uid)
            && older(&pod, &known.pod)
        {
            return;
        }
        inner.take(uid, pod, findings);
    }

    /// Takes a pod as a whole list has it, whatever was known: an API server restored from a backup counts from below again.
    pub fn replace_desired(&self, uid: &PodUid, pod: Arc<Pod>, findings: Arc<Findings>) {
        self.write().take(uid, pod, findings);
    }

    /// Takes the answer to a patch of ours: what the watch will bring soon.
    pub fn refresh_desired(&self, uid: &PodUid, pod: Pod) {
        let mut inner = self.write();
        if let Some(known) = inner.desired.get_mut(uid)
            && !older(&pod, &known.pod)
        {
            known.pod = Arc::new(pod);
        }
    }

    /// Did this process see the pod bound to our node?
    #[must_use]
    pub fn was_seen(&self, uid: &PodUid) -> bool {
        self.read().seen.contains(uid)
    }

    /// Nothing is left of the pod on either side.
    pub fn forget(&self, uid: &PodUid) {
        self.write().seen.remove(uid);
    }

    /// What the verdict table says of a pod.
    #[must_use]
    pub fn findings(&self, uid: &PodUid) -> Option<Arc<Findings>> {
        self.read()
            .desired
            .get(uid)
            .map(|desired| desired.findings.clone())
    }

    /// The pod is gone from the API server.
    pub fn remove_desired(&self, uid: &PodUid) {
        let mut inner = self.write();
        let Some(desired) = inner.desired.remove(uid) else {
            return;
        };
        let key = key(&desired.pod);
        if inner.names.get(&key).is_some_and(|other| other == uid) {
            inner.names.remove(&key);
        }
    }

    /// Takes what the agent says of a pod.
    pub fn set_observed(&self, uid: &PodUid, observed: Arc<pb::PodObserved>) {
        self.write().observed.insert(uid.clone(), observed);
    }

    /// Takes what the agent answered to a request; the watch may have brought something newer meanwhile.
    pub fn answer_observed(&self, uid: &PodUid, observed: pb::PodObserved) {
        let mut inner = self.write();
        let known = inner.observed.get(uid).map_or(-1, |known| known.generation);
        if observed.generation > known {
            inner.observed.insert(uid.clone(), Arc::new(observed));
        }
    }

    /// The agent has forgotten the pod; what it used stays in the node's totals.
    pub fn remove_observed(&self, uid: &PodUid) {
        let mut inner = self.write();
        let last = inner.observed.remove(uid).and_then(|last| last.last_usage);
        if let Some(last) = last.filter(|_| inner.seen.contains(uid)) {
            inner.ledger.observe(uid, Totals::of(&last));
        }
        inner.ledger.close(uid);
    }

    /// What all pods of the node ever used: `running` as they are now, those that ended by their last word, and those
    /// that are gone. Never falls.
    pub fn used<'a>(&self, running: impl Iterator<Item = (&'a PodUid, Totals)>) -> Totals {
        let mut inner = self.write();
        let Inner {
            observed,
            seen,
            ledger,
            ..
        } = &mut *inner;
        for (uid, used) in running {
            // Of one the agent has let go meanwhile nobody would ever close the entry.
            if observed.contains_key(uid) {
                ledger.observe(uid, used);
            }
        }
        for (uid, pod) in observed.iter() {
            if let Some(last) = pod.last_usage.as_ref().filter(|_| seen.contains(uid)) {
                ledger.observe(uid, Totals::of(last));
            }
        }
        ledger.total()
    }

    /// What the agent says of a pod, bound to our node or not.
    #[must_use]
    pub fn observed(&self, uid: &PodUid) -> Option<Arc<pb::PodObserved>> {
        self.read().observed.get(uid).cloned()
    }

    /// The UIDs of all pods the agent knows.
    #[must_use]
    pub fn observed_uids(&self) -> Vec<PodUid> {
        self.read().observed.keys().cloned().collect()
    }

    /// The UIDs of all pods bound to our node, the oldest pod first: so they are admitted.
    #[must_use]
    pub fn desired_uids(&self) -> Vec<PodUid> {
        let inner = self.read();
        let mut pods: Vec<_> = inner.desired.iter().collect();
        pods.sort_by_cached_key(|(uid, desired)| {
            let created = desired.pod.metadata.creation_timestamp.as_ref();
            (created.map(|time| time.0), (*uid).clone())
        });
        pods.into_iter().map(|(uid, _)| uid.clone()).collect()
    }
}

fn key(pod: &Pod) -> (String, String) {
    (
        pod.metadata.namespace.clone().unwrap_or_default(),
        pod.metadata.name.clone().unwrap_or_default(),
    )
}

/// Is `new` older than `known`? Where a resourceVersion is no number, what came last counts.
fn older(new: &Pod, known: &Pod) -> bool {
    let version = |pod: &Pod| {
        pod.metadata
            .resource_version
            .as_deref()
            .and_then(|version| version.parse::<u64>().ok())
    };
    matches!((version(new), version(known)), (Some(new), Some(known)) if new < known)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(used: Option<u64>) -> Arc<pb::PodObserved> {
        Arc::new(pb::PodObserved {
            last_usage: used.map(|cpu_nanoseconds| pb::Usage {
                cpu_nanoseconds,
                ..pb::Usage::default()
            }),
            ..pb::PodObserved::default()
        })
    }

    fn cpu(cpu: u64) -> Totals {
        Totals {
            cpu,
            ..Totals::default()
        }
    }

    #[test]
    fn a_whole_list_is_believed_also_where_it_counts_from_below() {
        let store = Store::default();
        let uid: PodUid = "u1".parse().unwrap();
        let pod = |version: &str| {
            let mut pod = Pod::default();
            pod.metadata.resource_version = Some(version.to_owned());
            Arc::new(pod)
        };
        let version = || store.by_uid(&uid)?.pod.metadata.resource_version.clone();
        store.set_desired(&uid, pod("900"), Arc::default());
        store.set_desired(&uid, pod("20"), Arc::default());
        assert_eq!(version().as_deref(), Some("900"), "a watch that is behind");
        store.replace_desired(&uid, pod("20"), Arc::default());
        assert_eq!(version().as_deref(), Some("20"), "a restored API server");
        store.set_desired(&uid, pod("21"), Arc::default());
        assert_eq!(version().as_deref(), Some("21"));
    }

    #[test]
    fn what_a_pod_used_outlives_it() {
        let store = Store::default();
        let uid: PodUid = "u1".parse().unwrap();
        store.set_desired(&uid, Arc::default(), Arc::default());
        store.set_observed(&uid, observed(None));
        let running = || [(&uid, cpu(5))].into_iter();
        assert_eq!(store.used(running()).cpu, 5);
        // It ended between two questions, and was deleted before the second one.
        store.set_observed(&uid, observed(Some(8)));
        store.remove_desired(&uid);
        store.remove_observed(&uid);
        store.forget(&uid);
        assert_eq!(store.used(std::iter::empty()).cpu, 8);
        // A word that comes late changes nothing.
        assert_eq!(store.used(running()).cpu, 8);
        // A pod of somebody else's, which the same agent runs.
        store.set_observed(&"u2".parse().unwrap(), observed(Some(100)));
        assert_eq!(store.used(std::iter::empty()).cpu, 8);
    }
}
