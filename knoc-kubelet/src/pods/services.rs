//! Task: watches the cluster's Services, from which the service variables of pods are made, which pods may reach, and whose
//! connections are relayed to pods.
//!
//! Only what these need is kept. Until the first list is complete pods wait, for a bounded time.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
    time::Duration,
};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use kube::{
    Api, Client,
    runtime::{WatchStreamExt as _, watcher},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a pod waits for the first list.
const FIRST_LIST: Duration = Duration::from_secs(10);

/// Namespace and name.
type Key = (String, String);

/// The known Services; clones are handles on the same ones.
#[derive(Clone, Debug)]
pub struct Services {
    known: Arc<RwLock<BTreeMap<Key, Service>>>,
    /// Whether the first list is complete; sent again at every change.
    synced: watch::Sender<bool>,
}

impl Default for Services {
    fn default() -> Self {
        Self {
            known: Arc::default(),
            synced: watch::Sender::new(false),
        }
    }
}

impl Services {
    /// The service variables for a pod in `namespace`. Waits for the first list, but not longer than [`FIRST_LIST`].
    pub async fn variables(&self, namespace: &str, links: bool) -> Vec<(String, String)> {
        let mut synced = self.synced.subscribe();
        let first_list = synced.wait_for(|synced| *synced);
        if tokio::time::timeout(FIRST_LIST, first_list).await.is_err() {
            tracing::warn!(
                "the Services could not be listed in time, a pod starts without their variables"
            );
        }
        let known = self.known();
        knoc_translate::service_variables(known.values(), namespace, links)
    }

    /// Whether the first list is complete, which is sent again at every change.
    pub(crate) fn subscribe(&self) -> watch::Receiver<bool> {
        self.synced.subscribe()
    }

    /// All Services. Hold the lock for look-ups only.
    pub(crate) fn known(&self) -> RwLockReadGuard<'_, BTreeMap<Key, Service>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Behaves as if an empty list had been read.
    #[cfg(test)]
    pub(crate) fn no_services(&self) {
        self.synced.send_replace(true);
    }

    /// Watches until `shutdown`.
    pub async fn run(self, client: Client, shutdown: CancellationToken) {
        let api: Api<Service> = Api::all(client);
        let events = watcher(api, watcher::Config::default()).default_backoff();
        let mut events = std::pin::pin!(events);
        let mut listed = BTreeMap::new();
        loop {
            let event = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                event = events.next() => event,
            };
            match event {
                None => return,
                Some(Ok(event)) => self.take(event, &mut listed),
                Some(Err(error)) => {
                    let error = knoc_proto::error::chain(&error);
                    tracing::warn!(%error, "the watch of Services failed, it is restarted");
                }
            }
        }
    }

    fn take(&self, event: watcher::Event<Service>, listed: &mut BTreeMap<Key, Service>) {
        let complete = !matches!(event, watcher::Event::Init | watcher::Event::InitApply(_));
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            watcher::Event::Init => listed.clear(),
            watcher::Event::InitApply(service) => {
                listed.extend(small(service));
            }
            watcher::Event::InitDone => {
                *known = std::mem::take(listed);
            }
            watcher::Event::Apply(service) => known.extend(small(service)),
            watcher::Event::Delete(service) => {
                if let Some((key, _)) = small(service) {
                    known.remove(&key);
                }
            }
        }
        drop(known);
        if complete {
            self.synced.send_replace(true);
        }
    }
}

/// The Service reduced to its name, addresses and ports, and to which pods it leads.
fn small(service: Service) -> Option<(Key, Service)> {
    let name = service.metadata.name?;
    let namespace = service.metadata.namespace?;
    let mut small = Service::default();
    small.metadata.name = Some(name.clone());
    small.metadata.namespace = Some(namespace.clone());
    small.metadata.uid = service.metadata.uid;
    small.spec = service.spec.map(|spec| ServiceSpec {
        cluster_ip: spec.cluster_ip,
        cluster_ips: spec.cluster_ips,
        session_affinity: spec.session_affinity,
        type_: spec.type_,
        ports: spec.ports,
        selector: spec.selector,
        publish_not_ready_addresses: spec.publish_not_ready_addresses,
        ..ServiceSpec::default()
    });
    Some(((namespace, name), small))
}
