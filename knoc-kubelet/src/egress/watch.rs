//! Task: keeps the table of Services and endpoints, the addresses of nodes and the ranges of Services up to date.
//!
//! Everything is read as the ServiceAccount: a node's own identity may not list endpoints and other nodes. Only what a
//! decision needs is kept.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt::Debug,
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
    time::Duration,
};

use futures::StreamExt as _;
use k8s_openapi::api::{core::v1::Node, discovery::v1::EndpointSlice, networking::v1::ServiceCIDR};
use knoc_proto::{egress::Range, error::chain};
use kube::{
    Api, Client, Resource,
    api::ListParams,
    runtime::{WatchStreamExt as _, watcher},
};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    decide::Surroundings,
    table::{self, Name, Slice, Table},
};
use crate::pods::Services;

/// How often the ranges of Services are read. They change once in the life of a cluster, if ever.
const RANGES: Duration = Duration::from_mins(5);
/// How soon they are read again if that failed.
const RANGES_AGAIN: Duration = Duration::from_secs(15);
/// More ranges of Services than any cluster has.
const MOST_RANGES: u32 = 100;

/// What administrators are told if nothing says which addresses Services have.
const NO_RANGE: &str = "pods do not reach the cluster's Services: its API does not say which addresses they have (it has no ServiceCIDR, \
    as before Kubernetes 1.33); set `egress.serviceRanges`, or set `egress.allow` to `off`";

/// What is known of the cluster.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) table: Table,
    pub(super) around: Surroundings,
    /// What was read completely at least once.
    read: BTreeSet<Part>,
    /// What the API server did not let the kubelet read when it was tried last.
    denied: BTreeSet<Part>,
}

impl State {
    /// What keeps pods from the cluster, each in a sentence that never changes, for administrators of the cluster.
    fn troubles(&self) -> Vec<String> {
        let denied = self.denied.iter().map(|part| {
            format!(
                "pods do not reach the cluster, or not as it is now: the kubelet's ServiceAccount may not {}; upgrade the chart \
                 together with the kubelet, or set `egress.allow` to `off`",
                part.permission()
            )
        });
        let unknown = self.knows_no_range().then(|| NO_RANGE.to_owned());
        denied.chain(unknown).chain(self.table.left_out()).collect()
    }

    /// Whether neither the cluster nor the configuration says which addresses Services have.
    fn knows_no_range(&self) -> bool {
        self.read.contains(&Part::Ranges) && self.around.service_ranges.is_empty()
    }
}

/// A part of what is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Services,
    Slices,
    Nodes,
    Ranges,
}

impl Part {
    /// What it takes to read it.
    fn permission(self) -> &'static str {
        match self {
            Self::Services => "list and watch services",
            Self::Slices => "list and watch endpointslices",
            Self::Nodes => "list and watch nodes",
            Self::Ranges => "list servicecidrs",
        }
    }
}

/// How many parts there are.
const PARTS: usize = 4;

/// A handle to what is known; clones share it.
#[derive(Debug, Clone)]
pub(super) struct Cluster(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: RwLock<State>,
    changed: watch::Sender<()>,
}

impl Cluster {
    pub(super) fn new() -> Self {
        Self(Arc::new(Shared {
            state: RwLock::default(),
            changed: watch::Sender::new(()),
        }))
    }

    /// Looks at what is known; `None` until all of it was read once. Hold the lock for look-ups only.
    pub(super) fn look<T>(&self, look: impl FnOnce(&State) -> T) -> Option<T> {
        let state = self.read();
        (state.read.len() == PARTS).then(|| look(&state))
    }

    /// What keeps pods from the cluster: few sentences.
    pub(super) fn troubles(&self) -> Vec<String> {
        self.read().troubles()
    }

    /// Whether something cannot be read until an administrator grants a permission.
    pub(super) fn is_denied(&self) -> bool {
        !self.read().denied.is_empty()
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.0.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes from now on.
    pub(super) fn subscribe(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.0.state.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        drop(state);
        self.0.changed.send_replace(());
    }

    /// Notes whether a part may be read; only the task that reads it calls this.
    fn set_denied(&self, part: Part, denied: bool) {
        let known = self.read().denied.contains(&part);
        if known != denied {
            self.change(|state| {
                if denied {
                    state.denied.insert(part);
                } else {
                    state.denied.remove(&part);
                }
            });
        }
    }

    /// Watches until `shutdown`. `ranges`: those of Services, if the cluster's API does not have them.
    pub(super) async fn run(
        self,
        client: Client,
        services: Services,
        ranges: Vec<Range>,
        shutdown: CancellationToken,
    ) {
        let all = async {
            tokio::join!(
                self.services(services),
                self.slices(Api::all(client.clone())),
                self.nodes(Api::all(client.clone())),
                self.ranges(Api::all(client), &ranges),
            )
        };
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            _ = all => {}
        }
    }

    async fn services(&self, services: Services) {
        let mut synced = services.subscribe();
        synced.mark_changed();
        while synced.changed().await.is_ok() {
            if !*synced.borrow_and_update() {
                continue;
            }
            let known = services.known();
            self.change(|state| {
                state.table.set_services(known.values());
                state.read.insert(Part::Services);
            });
        }
    }

    async fn slices(&self, api: Api<EndpointSlice>) {
        let mut listed: Vec<(Name, Slice)> = Vec::new();
        self.follow(api, Part::Slices, |event| match event {
            watcher::Event::Init => listed.clear(),
            watcher::Event::InitApply(slice) => listed.extend(table::slice(&slice)),
            watcher::Event::InitDone => {
                let listed = std::mem::take(&mut listed);
                self.change(|state| {
                    state.table.set_slices(listed);
                    state.read.insert(Part::Slices);
                });
            }
            watcher::Event::Apply(slice) => {
                let Some(name) = table::slice_name(&slice) else {
                    return;
                };
                let slice = table::slice(&slice);
                self.change(|state| match slice {
                    Some((name, slice)) => state.table.set_slice(name, slice),
                    None => state.table.remove_slice(&name),
                });
            }
            watcher::Event::Delete(slice) => {
                if let Some(name) = table::slice_name(&slice) {
                    self.change(|state| state.table.remove_slice(&name));
                }
            }
        })
        .await;
    }

    async fn nodes(&self, api: Api<Node>) {
        let (mut known, mut listed) = (HashMap::new(), HashMap::new());
        self.follow(api, Part::Nodes, |event| {
            let complete = !matches!(event, watcher::Event::Init | watcher::Event::InitApply(_));
            match event {
                watcher::Event::Init => listed.clear(),
                watcher::Event::InitApply(node) => listed.extend(addresses(&node)),
                watcher::Event::InitDone => known = std::mem::take(&mut listed),
                watcher::Event::Apply(node) => {
                    // The status of a node is written every few minutes, and its addresses are the same.
                    let Some((name, addresses)) = addresses(&node) else {
                        return;
                    };
                    if known.get(&name) == Some(&addresses) {
                        return;
                    }
                    known.insert(name, addresses);
                }
                watcher::Event::Delete(node) => {
                    known.remove(node.metadata.name.as_deref().unwrap_or_default());
                }
            }
            if complete {
                let nodes: HashSet<IpAddr> = known.values().flatten().copied().collect();
                self.change(|state| {
                    state.around.nodes = nodes;
                    state.read.insert(Part::Nodes);
                });
            }
        })
        .await;
    }

    /// Reads the ranges again and again; where the API has none (before 1.33), those of the configuration count.
    async fn ranges(&self, api: Api<ServiceCIDR>, configured: &[Range]) {
        let mut known = false;
        loop {
            let listed = api.list(&ListParams::default().limit(MOST_RANGES)).await;
            let denied = matches!(&listed, Err(kube::Error::Api(status)) if status.code == 403);
            // Without them those of the configuration count.
            self.set_denied(Part::Ranges, denied && configured.is_empty());
            let listed = match listed {
                Ok(listed) => Some(cidrs(listed.items)),
                Err(kube::Error::Api(status)) if status.code == 404 => Some(Vec::new()),
                Err(error) => {
                    tracing::warn!(
                        error = chain(&error),
                        "the ranges of Services could not be read, trying again"
                    );
                    None
                }
            };
            let pause = if listed.is_some() {
                RANGES
            } else {
                RANGES_AGAIN
            };
            let ranges = match listed {
                Some(listed) if !listed.is_empty() => Some(listed),
                Some(_) => Some(configured.to_vec()),
                // What was read before stays while the API server does not answer.
                None => Some(configured.to_vec()).filter(|ranges| !known && !ranges.is_empty()),
            };
            if let Some(ranges) = ranges {
                known = true;
                self.change(|state| {
                    state.around.service_ranges = ranges;
                    state.read.insert(Part::Ranges);
                });
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Watches all objects of a kind. It has no end.
    async fn follow<K>(&self, api: Api<K>, part: Part, take: impl FnMut(watcher::Event<K>))
    where
        K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
    {
        let all = watcher::Config::default();
        let denied = |denied| self.set_denied(part, denied);
        follow_some(api, all, part.permission(), take, denied).await;
    }
}

/// Watches those objects of a kind that `config` selects, and says whether the API server denies it. It has no end.
pub(crate) async fn follow_some<K>(
    api: Api<K>,
    config: watcher::Config,
    what: &str,
    mut take: impl FnMut(watcher::Event<K>),
    mut set_denied: impl FnMut(bool),
) where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let events = watcher(api, config).default_backoff();
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                // `Init` comes before anything was read.
                if !matches!(event, watcher::Event::Init) {
                    set_denied(false);
                }
                take(event);
            }
            Err(error) => {
                if is_denied(&error) {
                    set_denied(true);
                }
                tracing::warn!(
                    error = chain(&error),
                    "a watch failed, it is restarted ({what})"
                );
            }
        }
    }
}

/// PURE: has the API server said that the kubelet may not read this?
fn is_denied(error: &watcher::Error) -> bool {
    let (watcher::Error::InitialListFailed(kube::Error::Api(status))
    | watcher::Error::WatchStartFailed(kube::Error::Api(status))
    | watcher::Error::WatchFailed(kube::Error::Api(status))
    | watcher::Error::WatchError(status)) = error
    else {
        return false;
    };
    status.code == 403
}

/// PURE: the name and the addresses of a node.
fn addresses(node: &Node) -> Option<(String, Vec<IpAddr>)> {
    let name = node.metadata.name.clone()?;
    let addresses = node
        .status
        .iter()
        .flat_map(|status| status.addresses.iter().flatten());
    let parsed = addresses.filter_map(|one| one.address.parse::<IpAddr>().ok());
    Some((name, parsed.map(|address| address.to_canonical()).collect()))
}

/// PURE: the ranges of these objects.
fn cidrs(listed: Vec<ServiceCIDR>) -> Vec<Range> {
    let specs = listed.into_iter().filter_map(|one| one.spec);
    let texts = specs.flat_map(|spec| spec.cidrs.unwrap_or_default());
    texts.filter_map(|text| text.parse().ok()).collect()
}

#[cfg(test)]
impl Cluster {
    /// A cluster of which everything was read.
    pub(super) fn of(table: Table, around: Surroundings) -> Self {
        let cluster = Self::new();
        let read = [Part::Services, Part::Slices, Part::Nodes, Part::Ranges].into();
        cluster.change(|state| {
            *state = State {
                table,
                around,
                read,
                denied: BTreeSet::new(),
            };
        });
        cluster
    }
}

#[cfg(test)]
mod tests;
