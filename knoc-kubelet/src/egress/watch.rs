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
        denied.chain(self.table.left_out()).collect()
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
                if ranges.is_empty() {
                    tracing::warn!(
                        "pods reach nothing of the cluster: its API does not say which addresses its Services have, set `egress.serviceRanges`"
                    );
                }
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
    async fn follow<K>(&self, api: Api<K>, part: Part, mut take: impl FnMut(watcher::Event<K>))
    where
        K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
    {
        let events = watcher(api, watcher::Config::default()).default_backoff();
        let mut events = std::pin::pin!(events);
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    // `Init` comes before anything was read.
                    if !matches!(event, watcher::Event::Init) {
                        self.set_denied(part, false);
                    }
                    take(event);
                }
                Err(error) => {
                    if is_denied(&error) {
                        self.set_denied(part, true);
                    }
                    tracing::warn!(
                        error = chain(&error),
                        "a watch failed, it is restarted ({})",
                        part.permission()
                    );
                }
            }
        }
    }
}

/// Watches those objects of a kind that `config` selects. It has no end.
pub(crate) async fn follow_some<K>(
    api: Api<K>,
    config: watcher::Config,
    what: &str,
    mut take: impl FnMut(watcher::Event<K>),
) where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let events = watcher(api, config).default_backoff();
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => take(event),
            Err(error) => {
                tracing::warn!(
                    error = chain(&error),
                    "the watch of {what} failed, it is restarted"
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
            };
        });
        cluster
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use bytes::Bytes;
    use http::{Request, Response};
    use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
    use hyper::body::Frame;
    use knoc_proto::pb::EgressProtocol;
    use kube::client::Body;
    use serde_json::{Value, json};
    use tokio::{sync::mpsc, task::JoinSet};
    use tokio_stream::wrappers::ReceiverStream;
    use tower_test::mock;

    use super::*;

    const SOON: Duration = Duration::from_secs(30);

    type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;
    type Requests = mock::Handle<Request<Body>, Answer>;

    fn answer(code: u16, json: &Value) -> Answer {
        let body = Full::from(json.to_string()).boxed_unsync();
        Response::builder().status(code).body(body).unwrap()
    }

    fn listed(items: &[Value]) -> Answer {
        answer(
            200,
            &json!({"metadata": {"resourceVersion": "1"}, "items": items}),
        )
    }

    fn node(name: &str, address: &str) -> Value {
        json!({"metadata": {"name": name, "resourceVersion": "2"},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]}})
    }

    fn slice() -> Value {
        json!({"metadata": {"namespace": "a", "name": "one", "resourceVersion": "2",
                "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4",
            "ports": [{"port": 8080}], "endpoints": [{"addresses": ["10.1.0.1"]}]})
    }

    fn range(text: &str) -> Value {
        json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": [text]}})
    }

    /// Lists one object of each kind; each watch sends what comes from its channel.
    async fn serve(mut requests: Requests, mut watches: HashMap<&str, mpsc::Receiver<Bytes>>) {
        while let Some((request, send)) = requests.next_request().await {
            let path = request.uri().path();
            let kind = path.rsplit('/').next().unwrap_or_default();
            let watch = request
                .uri()
                .query()
                .is_some_and(|all| all.contains("watch=true"));
            send.send_response(match (kind, watch) {
                ("nodes", false) => listed(&[node("one", "10.2.0.1")]),
                ("endpointslices", false) => listed(&[slice()]),
                ("servicecidrs", false) => listed(&[range("10.96.0.0/16")]),
                (kind, true) => {
                    let lines = watches.remove(kind).unwrap();
                    let lines = ReceiverStream::new(lines).map(|line| Ok(Frame::data(line)));
                    Response::new(StreamBody::new(lines).boxed_unsync())
                }
                _ => answer(404, &json!({})),
            });
        }
    }

    async fn until(cluster: &Cluster, what: &str, is_so: impl Fn(&State) -> bool) {
        let mut changed = cluster.subscribe();
        let waits = async {
            while cluster.look(&is_so) != Some(true) {
                changed.changed().await.unwrap();
            }
        };
        let waited = tokio::time::timeout(SOON, waits).await;
        waited.unwrap_or_else(|_| panic!("not so: {what}"));
    }

    #[tokio::test]
    async fn nodes_and_endpoints_are_followed_as_they_come_and_go() {
        let (service, requests) = mock::pair::<Request<Body>, Answer>();
        let client = Client::new(service, "default");
        let (to_nodes, of_nodes) = mpsc::channel(4);
        let (to_slices, of_slices) = mpsc::channel(4);
        let watches = HashMap::from([("nodes", of_nodes), ("endpointslices", of_slices)]);
        let (cluster, services) = (Cluster::new(), Services::default());
        services.no_services();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(requests, watches));
        let stop = CancellationToken::new();
        tasks.spawn(cluster.clone().run(client, services, Vec::new(), stop));
        let has = |address: &str| {
            let address: IpAddr = address.parse().unwrap();
            move |state: &State| state.around.nodes.contains(&address)
        };
        let leads = |state: &State| {
            let to = "10.1.0.1:8080".parse().unwrap();
            !state.table.targets(to, EgressProtocol::Tcp).is_empty()
        };
        let range = ["10.96.0.0/16".parse().unwrap()];
        until(&cluster, "the first lists", |state| {
            has("10.2.0.1")(state) && leads(state) && state.around.service_ranges == range
        })
        .await;
        let event = |kind: &str, object: &Value| {
            Bytes::from(format!("{}\n", json!({"type": kind, "object": object})))
        };
        let news = [
            event("ADDED", &node("two", "10.2.0.2")),
            event("MODIFIED", &node("two", "10.2.0.3")),
            event("DELETED", &node("one", "10.2.0.1")),
        ];
        for line in news {
            to_nodes.send(line).await.unwrap();
        }
        until(&cluster, "the nodes", |state| {
            has("10.2.0.3")(state) && state.around.nodes.len() == 1
        })
        .await;
        to_slices.send(event("DELETED", &slice())).await.unwrap();
        until(&cluster, "no endpoint", |state| !leads(state)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_ranges_that_were_read_stay_while_the_api_server_does_not_answer() {
        let (service, mut requests) = mock::pair::<Request<Body>, Answer>();
        let client = Client::new(service, "default");
        let cluster = Cluster::new();
        let configured = ["10.99.0.0/16".parse().unwrap()];
        let read = async {
            for answer in [
                answer(500, &json!({})),
                listed(&[range("10.96.0.0/16")]),
                answer(500, &json!({})),
            ] {
                let (_, send) = requests.next_request().await.unwrap();
                send.send_response(answer);
            }
            requests.next_request().await.unwrap();
        };
        tokio::select! {
            () = cluster.ranges(Api::all(client), &configured) => {}
            () = read => {}
        }
        let state = cluster.0.state.read().unwrap();
        assert_eq!(
            state.around.service_ranges,
            ["10.96.0.0/16".parse().unwrap()]
        );
    }

    #[test]
    fn addresses_of_nodes_and_ranges_are_read_and_names_left_out() {
        let node = json!({"metadata": {"name": "n"}, "status": {"addresses": [{"type": "InternalIP", "address": "10.2.0.1"},
            {"type": "Hostname", "address": "n"}, {"type": "InternalIP", "address": "::ffff:10.2.0.2"}]}});
        let (name, found) = addresses(&serde_json::from_value(node).unwrap()).unwrap();
        assert_eq!(name, "n");
        assert_eq!(
            found,
            ["10.2.0.1", "10.2.0.2"].map(|text| text.parse::<IpAddr>().unwrap())
        );
        let range = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12", "fd00::/108", "?"]}});
        let range = serde_json::from_value(range).unwrap();
        assert_eq!(
            cidrs(vec![range, ServiceCIDR::default()]),
            ["10.96.0.0/12", "fd00::/108"].map(|text| text.parse::<Range>().unwrap())
        );
    }

    #[test]
    fn what_the_kubelet_may_not_read_is_known_until_it_may() {
        let api = |code: u16| {
            let status = kube::core::Status {
                code,
                ..kube::core::Status::default()
            };
            kube::Error::Api(Box::new(status))
        };
        assert!(is_denied(&watcher::Error::InitialListFailed(api(403))));
        assert!(is_denied(&watcher::Error::WatchStartFailed(api(403))));
        assert!(!is_denied(&watcher::Error::InitialListFailed(api(500))));
        assert!(!is_denied(&watcher::Error::NoResourceVersion));
        let cluster = Cluster::new();
        let changes = cluster.subscribe();
        assert!(!cluster.is_denied() && cluster.troubles().is_empty());
        for _ in 0..2 {
            cluster.set_denied(Part::Slices, true);
            cluster.set_denied(Part::Nodes, true);
        }
        assert!(cluster.is_denied() && changes.has_changed().unwrap());
        let troubles = cluster.troubles();
        assert_eq!(troubles.len(), 2, "{troubles:?}");
        assert!(troubles[0].contains("list and watch endpointslices"));
        cluster.set_denied(Part::Slices, false);
        cluster.set_denied(Part::Nodes, false);
        assert!(!cluster.is_denied() && cluster.troubles().is_empty());
    }

    #[test]
    fn nothing_is_decided_before_everything_was_read() {
        let cluster = Cluster::new();
        for part in [Part::Services, Part::Slices, Part::Nodes] {
            cluster.change(|state| {
                state.read.insert(part);
            });
            assert!(cluster.look(|_| ()).is_none());
        }
        cluster.change(|state| {
            state.read.insert(Part::Ranges);
        });
        assert!(cluster.look(|_| ()).is_some());
    }
}
