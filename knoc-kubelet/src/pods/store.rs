//! The pods by UID, as Kubernetes wants them and as the agent observed them: the one place that has both.
//!
//! `pods::watch` writes what is wanted, `agent::watch` what was observed; the controller, the server and the relay read. Locks are
//! held for map operations only, never across an await.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use k8s_openapi::api::core::v1::Pod;
use knoc_proto::{ids::PodUid, pb};
use knoc_translate::verdict::Findings;
use tokio::sync::watch;

use crate::stats::totals::{NodeTotals, Totals};

/// One pod as Kubernetes and the agent know it.
#[derive(Clone, Debug)]
pub struct PodView {
    /// The pod's UID, which is its key.
    pub uid: PodUid,
    /// The pod as the API server has it, without managedFields.
    pub pod: Arc<Pod>,
    /// The pod as the agent last reported it; kept while the link is down.
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
    /// Pods that this process saw bound to our node; removed when nothing is left of them.
    seen: HashSet<PodUid>,
    /// CPU time and page faults of the pods that were seen, including those that are gone.
    totals: NodeTotals,
}

/// The shared store; clones are handles on the same one.
#[derive(Clone, Default, Debug)]
pub struct Store {
    inner: Arc<RwLock<Inner>>,
    /// Sent after every change of a pod.
    changed: watch::Sender<()>,
}

impl Store {
    /// The pod with this name that is bound to our node.
    #[must_use]
    pub fn find(&self, namespace: &str, name: &str) -> Option<PodView> {
        let inner = self.read();
        let uid = inner.names.get(&(namespace.to_owned(), name.to_owned()))?;
        inner.view(uid)
    }

    /// The pod with this UID that is bound to our node.
    #[must_use]
    pub fn by_uid(&self, uid: &PodUid) -> Option<PodView> {
        self.read().view(uid)
    }

    /// All pods bound to our node, sorted by namespace and name.
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

    /// How many pods are bound to our node.
    #[must_use]
    pub fn count(&self) -> usize {
        self.read().desired.len()
    }

    /// Changes from now on. There may be more of them than pods that differ.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes pods, and tells who follows them.
    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let answer = change(&mut self.write());
        self.changed.send_replace(());
        answer
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

/// Methods of the writers: `pods::watch` for what is wanted, `agent::watch` for what was observed.
impl Store {
    /// Stores a pod from a watch; an older resourceVersion of the same UID is ignored.
    pub fn set_desired(&self, uid: &PodUid, pod: Arc<Pod>, findings: Arc<Findings>) {
        self.change(|inner| {
            let known = inner.desired.get(uid);
            if known.is_none_or(|known| !older(&pod, &known.pod)) {
                inner.take(uid, pod, findings);
            }
        });
    }

    /// Stores a pod from a complete list, whatever its resourceVersion: an API server restored from a backup has lower
    /// ones.
    pub fn replace_desired(&self, uid: &PodUid, pod: Arc<Pod>, findings: Arc<Findings>) {
        self.change(|inner| inner.take(uid, pod, findings));
    }

    /// Stores the answer to one of our patches, which the watch will bring soon. A newer generation is left to the watch,
    /// because the findings that are known are not about it.
    pub fn refresh_desired(&self, uid: &PodUid, pod: Pod) {
        self.change(|inner| {
            if let Some(known) = inner.desired.get_mut(uid)
                && !older(&pod, &known.pod)
                && pod.metadata.generation == known.pod.metadata.generation
            {
                known.pod = Arc::new(pod);
            }
        });
    }

    /// Did this process see the pod bound to our node?
    #[must_use]
    pub fn has_seen(&self, uid: &PodUid) -> bool {
        self.read().seen.contains(uid)
    }

    /// Forgets the pod, of which nothing is left on either side.
    pub fn forget(&self, uid: &PodUid) {
        self.write().seen.remove(uid);
    }

    /// The findings of the verdict table about the pod.
    #[must_use]
    pub fn findings(&self, uid: &PodUid) -> Option<Arc<Findings>> {
        self.read()
            .desired
            .get(uid)
            .map(|desired| desired.findings.clone())
    }

    /// Removes a pod that is gone from the API server.
    pub fn remove_desired(&self, uid: &PodUid) {
        self.change(|inner| {
            let Some(desired) = inner.desired.remove(uid) else {
                return;
            };
            let key = key(&desired.pod);
            if inner.names.get(&key).is_some_and(|other| other == uid) {
                inner.names.remove(&key);
            }
        });
    }

    /// Stores what the agent reports of a pod.
    pub fn set_observed(&self, uid: &PodUid, observed: Arc<pb::PodObserved>) {
        self.change(|inner| inner.observed.insert(uid.clone(), observed));
    }

    /// Stores what the agent answered to a request, unless the watch has brought something newer.
    pub fn answer_observed(&self, uid: &PodUid, observed: pb::PodObserved) {
        self.change(|inner| {
            let known = inner.observed.get(uid).map_or(-1, |known| known.generation);
            if observed.generation > known {
                inner.observed.insert(uid.clone(), Arc::new(observed));
            }
        });
    }

    /// Removes a pod that the agent has forgotten; what it used stays in the node's totals.
    pub fn remove_observed(&self, uid: &PodUid) {
        self.change(|inner| {
            let last = inner.observed.remove(uid).and_then(|last| last.last_usage);
            if let Some(last) = last.filter(|_| inner.seen.contains(uid)) {
                inner.totals.observe(uid, Totals::of(&last));
            }
            inner.totals.close(uid);
        });
    }

    /// What all pods of the node have used so far: `running` as measured now, ended pods by their last usage, and those
    /// that are gone. It never falls.
    pub fn used<'a>(&self, running: impl Iterator<Item = (&'a PodUid, Totals)>) -> Totals {
        let mut inner = self.write();
        let Inner {
            observed,
            seen,
            totals,
            ..
        } = &mut *inner;
        for (uid, used) in running {
            // Nobody would ever close the entry of a pod that the agent has forgotten meanwhile.
            if observed.contains_key(uid) {
                totals.observe(uid, used);
            }
        }
        for (uid, pod) in observed.iter() {
            if let Some(last) = pod.last_usage.as_ref().filter(|_| seen.contains(uid)) {
                totals.observe(uid, Totals::of(last));
            }
        }
        totals.total()
    }

    /// What the agent reports of a pod, whether or not it is bound to our node.
    #[must_use]
    pub fn observed(&self, uid: &PodUid) -> Option<Arc<pb::PodObserved>> {
        self.read().observed.get(uid).cloned()
    }

    /// The UIDs of all pods that the agent knows.
    #[must_use]
    pub fn observed_uids(&self) -> Vec<PodUid> {
        self.read().observed.keys().cloned().collect()
    }

    /// The UIDs of all pods bound to our node, the oldest first: this is the order of admission.
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

/// Is `new` older than `known`? If a resourceVersion is not a number, the later one to arrive counts as newer.
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
    fn a_complete_list_replaces_pods_with_newer_versions_too() {
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
    fn the_usage_of_a_pod_outlives_it() {
        let store = Store::default();
        let uid: PodUid = "u1".parse().unwrap();
        store.set_desired(&uid, Arc::default(), Arc::default());
        store.set_observed(&uid, observed(None));
        let running = || [(&uid, cpu(5))].into_iter();
        assert_eq!(store.used(running()).cpu, 5);
        // The pod ended between two calls, and was deleted before the second one.
        store.set_observed(&uid, observed(Some(8)));
        store.remove_desired(&uid);
        store.remove_observed(&uid);
        store.forget(&uid);
        assert_eq!(store.used(std::iter::empty()).cpu, 8);
        // A late observation changes nothing.
        assert_eq!(store.used(running()).cpu, 8);
        // A pod of another node or cluster that the same agent runs.
        store.set_observed(&"u2".parse().unwrap(), observed(Some(100)));
        assert_eq!(store.used(std::iter::empty()).cpu, 8);
    }
}
