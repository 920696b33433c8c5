//! Task: follows the NetworkPolicies of the cluster and the EndpointSlices of this kubelet.
//!
//! Both are read as the ServiceAccount: a node's own identity may not.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, PoisonError, RwLock},
};

use k8s_openapi::api::{discovery::v1::EndpointSlice, networking::v1::NetworkPolicy};
use kube::{Api, Client, runtime::watcher};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    policies::Policies,
    slice::{of_node, remembered},
};
use crate::egress::{
    table::{Name, slice_name},
    watch::follow_some,
};

/// The most slices that are remembered, four times as many as are published: others can create slices with our labels, which are
/// deleted.
const MOST_SLICES: usize = 16_384;

/// What is read, as RBAC calls it.
const POLICIES: &str = "networkpolicies";
const SLICES: &str = "endpointslices";

/// What is known of the cluster.
#[derive(Debug, Default)]
pub(super) struct State {
    /// None until they were read.
    policies: Option<Policies>,
    slices: Option<HashMap<Name, EndpointSlice>>,
    /// What the API server did not let the kubelet read when it was tried last.
    denied: BTreeSet<&'static str>,
}

/// A handle to what is known; clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Cluster {
    state: Arc<RwLock<State>>,
    changed: watch::Sender<()>,
}

impl Cluster {
    /// Looks at what is known; `None` until all of it was read once. Hold the lock for look-ups only.
    pub(super) fn look<T>(
        &self,
        look: impl FnOnce(&Policies, &HashMap<Name, EndpointSlice>) -> T,
    ) -> Option<T> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let (policies, slices) = (state.policies.as_ref()?, state.slices.as_ref()?);
        Some(look(policies, slices))
    }

    /// Looks at the policies alone; `None` until they were read once. Hold the lock for look-ups only.
    pub(super) fn look_at_policies<T>(&self, look: impl FnOnce(&Policies) -> T) -> Option<T> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.policies.as_ref().map(look)
    }

    /// Whether the API server did not let the kubelet read the policies when it was tried last.
    pub(super) fn policies_denied(&self) -> bool {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.denied.contains(POLICIES)
    }

    /// Changes from now on.
    pub(super) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        drop(state);
        self.changed.send_replace(());
    }

    /// Notes whether the objects may be read; only the task that reads them calls this.
    fn set_denied(&self, what: &'static str, denied: bool) {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let known = state.denied.contains(what);
        drop(state);
        if known != denied {
            self.change(|state| {
                if denied {
                    state.denied.insert(what);
                } else {
                    state.denied.remove(what);
                }
            });
        }
    }

    /// What keeps Services from pods, each in a sentence that never changes, for administrators of the cluster.
    pub(super) fn troubles(&self) -> Vec<String> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let denied = state.denied.iter().map(|what| {
            format!(
                "Services do not lead to pods, or not as they are now: the kubelet's ServiceAccount may not list and watch {what}; upgrade the \
                 chart together with the kubelet, or set `relay.allow` to `off`"
            )
        });
        denied.collect()
    }

    /// Watches until `shutdown`.
    pub(super) async fn run(self, client: Client, node: String, shutdown: CancellationToken) {
        let both = async {
            tokio::join!(
                self.policies(Api::all(client.clone())),
                self.slices(Api::all(client), &node),
            )
        };
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            _ = both => {}
        }
    }

    /// Watches the policies alone until `shutdown`.
    pub(super) async fn run_policies(self, client: Client, shutdown: CancellationToken) {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = self.policies(Api::all(client)) => {}
        }
    }

    async fn policies(&self, api: Api<NetworkPolicy>) {
        let mut listed = Policies::default();
        let all = watcher::Config::default();
        let take = |event: watcher::Event<NetworkPolicy>| match event {
            watcher::Event::Init => listed = Policies::default(),
            watcher::Event::InitApply(policy) => listed.set(&policy),
            watcher::Event::InitDone => {
                let listed = std::mem::take(&mut listed);
                self.change(|state| state.policies = Some(listed));
            }
            watcher::Event::Apply(policy) => self.change(|state| {
                state.policies.get_or_insert_default().set(&policy);
            }),
            watcher::Event::Delete(policy) => self.change(|state| {
                state.policies.get_or_insert_default().remove(&policy);
            }),
        };
        let denied = |denied| self.set_denied(POLICIES, denied);
        follow_some(api, all, POLICIES, take, denied).await;
    }

    async fn slices(&self, api: Api<EndpointSlice>, node: &str) {
        let mut listed = HashMap::new();
        let own = watcher::Config::default().labels(&of_node(node));
        let take = |event: watcher::Event<EndpointSlice>| match event {
            watcher::Event::Init => listed.clear(),
            watcher::Event::InitApply(slice) => store(&mut listed, slice, node),
            watcher::Event::InitDone => {
                let listed = std::mem::take(&mut listed);
                self.change(|state| state.slices = Some(listed));
            }
            watcher::Event::Apply(slice) => self.change(|state| {
                store(state.slices.get_or_insert_default(), slice, node);
            }),
            watcher::Event::Delete(slice) => self.change(|state| {
                if let Some(name) = slice_name(&slice) {
                    state.slices.get_or_insert_default().remove(&name);
                }
            }),
        };
        let denied = |denied| self.set_denied(SLICES, denied);
        follow_some(api, own, SLICES, take, denied).await;
    }
}

fn store(slices: &mut HashMap<Name, EndpointSlice>, slice: EndpointSlice, node: &str) {
    let Some((name, slice)) = slice_name(&slice).zip(remembered(slice, node)) else {
        return;
    };
    if slices.len() < MOST_SLICES || slices.contains_key(&name) {
        slices.insert(name, slice);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_decided_before_policies_and_slices_were_read() {
        let cluster = Cluster::default();
        assert!(cluster.look(|_, _| ()).is_none());
        cluster.change(|state| state.slices = Some(HashMap::new()));
        assert!(
            cluster.look(|_, _| ()).is_none(),
            "a policy may select any pod"
        );
        assert!(cluster.look_at_policies(|_| ()).is_none());
        cluster.change(|state| state.policies = Some(Policies::default()));
        assert!(cluster.look(|_, _| ()).is_some());
        assert!(cluster.look_at_policies(|_| ()).is_some());
    }

    #[test]
    fn what_the_kubelet_may_not_read_is_told_until_it_may() {
        let cluster = Cluster::default();
        let changes = cluster.subscribe();
        cluster.set_denied(SLICES, false);
        assert!(cluster.troubles().is_empty() && !changes.has_changed().unwrap());
        assert!(!cluster.policies_denied());
        cluster.set_denied(POLICIES, true);
        cluster.set_denied(POLICIES, true);
        assert!(cluster.policies_denied());
        let troubles = cluster.troubles();
        assert!(
            troubles.len() == 1 && troubles[0].contains("may not list and watch networkpolicies"),
            "{troubles:?}"
        );
        assert!(changes.has_changed().unwrap(), "a round follows");
        cluster.set_denied(POLICIES, false);
        assert!(cluster.troubles().is_empty());
    }
}
