//! Links to the shims of running pods: the listener that shims connect to, and the routes to the
//! pods.
//!
//! Owner task: [`serve`], which runs one task per link. A shim connects and proves that it has the
//! key of its job directory; from then on it acts as the server: the reports of `WatchReport`
//! become events of the pod's actor within milliseconds. Streams (logs, exec) are opened by the API
//! through [`ShimLinks::client`]. This module decides nothing: a broken link says nothing about the
//! pod.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _};
use knoc_contract::capability::{EGRESS, MESH};
use knoc_link::{Connection, Incoming, Peer, admission::Source, bulk::RawClient};
use knoc_proto::{
    error::chain,
    ids::PodUid,
    log_limit::LogLimit,
    pb::{self, shim_client::ShimClient},
    reason::ErrorReason,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming, transport::Channel};

use crate::{
    egress::Egress,
    mesh::{Mesh, Shim},
    pod::{input::Input, state::Event},
    shim_route::ShimRoute,
};

/// The deadline of a short request to a shim.
pub const DEADLINE: Duration = Duration::from_secs(5);
/// The most links of one agent. More are rejected, because each needs a socket and some buffers.
const LINKS: usize = 20_000;
/// The most links of one pod. Its shim has one, and reconnects before the loss of the old one may
/// have been noticed.
const LINKS_OF_ONE: usize = 8;
/// How long a shim may take from its handshake to its first report.
const FIRST_REPORT: Duration = Duration::from_secs(20);

/// The client of one shim.
pub type Client = ShimClient<RawClient<Channel>>;

/// The links of all running shims.
#[derive(Debug, Clone)]
pub struct ShimLinks(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Which pod a key belongs to, by the SHA-256 of the public key.
    pins: Mutex<HashMap<String, Route>>,
    links: Mutex<HashMap<PodUid, Link>>,
    counter: AtomicU64,
    egress: Egress,
    mesh: Mesh,
}

#[derive(Debug, Clone)]
struct Route {
    uid: PodUid,
    /// The pod's node.
    node: String,
    namespace: String,
    /// Whether the pod is to have an address of its own.
    addressed: bool,
    /// The pin of the shim's key.
    spki: String,
    input: mpsc::Sender<Input>,
    /// Limits the links of this pod.
    permits: Arc<Semaphore>,
}

#[derive(Debug, Clone)]
struct Link {
    /// Distinguishes a link from the one that replaced it.
    number: u64,
    client: Client,
    /// From the shim's first report.
    about: Arc<About>,
}

/// What a shim reported about itself.
#[derive(Debug, Default)]
pub struct About {
    version: String,
    capabilities: Vec<String>,
}

/// A connection that a step carries, on demand.
#[derive(Debug)]
pub struct Carried {
    /// The connection, whose peer has proved a key.
    pub connection: Connection,
    /// The pod to which it must belong.
    pub uid: PodUid,
    /// Answered once the link is open.
    pub opened: oneshot::Sender<()>,
}

impl About {
    fn of(report: &pb::Report) -> Self {
        Self {
            version: report.version.clone(),
            capabilities: report.capabilities.clone(),
        }
    }

    fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|name| name == capability)
    }
}

impl ShimLinks {
    /// No links yet. If their shims have the capabilities, what pods open to the cluster goes to `egress`, and `mesh` tells them
    /// about each other.
    #[must_use]
    pub fn new(egress: Egress, mesh: Mesh) -> Self {
        Self(Arc::new(Shared {
            pins: Mutex::default(),
            links: Mutex::default(),
            counter: AtomicU64::default(),
            egress,
            mesh,
        }))
    }

    /// Registers the shim of `uid`, a pod with this shape, which will present the key `spki`; its reports go to `input`.
    pub(crate) fn expect(
        &self,
        uid: &PodUid,
        shape: &pb::PodSpec,
        spki: String,
        input: mpsc::Sender<Input>,
    ) {
        lock(&self.0.pins).insert(
            spki.clone(),
            Route {
                spki,
                uid: uid.clone(),
                node: shape.node_name.clone(),
                namespace: shape.namespace.clone(),
                addressed: !shape.pod_range.is_empty(),
                input,
                permits: Arc::new(Semaphore::new(LINKS_OF_ONE)),
            },
        );
    }

    /// Removes a forgotten pod: its key is no longer accepted.
    pub(crate) fn forget(&self, uid: &PodUid) {
        lock(&self.0.pins).retain(|_, route| route.uid != *uid);
        lock(&self.0.links).remove(uid);
    }

    /// The client of a pod's shim, if its link is up.
    #[must_use]
    pub fn client(&self, uid: &PodUid) -> Option<Client> {
        lock(&self.0.links).get(uid).map(|link| link.client.clone())
    }

    /// The client of a pod's shim if it has `capability`; if the shim started under an older agent,
    /// the error names its version. `None` if its link is down.
    #[must_use]
    pub fn able(&self, uid: &PodUid, capability: &str) -> Option<Result<Client, Status>> {
        let link = lock(&self.0.links).get(uid).cloned()?;
        let version = &link.about.version;
        Some(if link.about.has(capability) {
            Ok(link.client)
        } else {
            let message = format!(
                "the job of pod {uid} runs version {version}, which has no {capability:?}: recreate the pod to use it"
            );
            Err(ErrorReason::Unsupported.status(message))
        })
    }

    /// The number of links that are up.
    #[must_use]
    pub fn connected(&self) -> usize {
        lock(&self.0.links).len()
    }

    /// The pod to which the key `spki` belongs, and a place for its link. If a step has carried the
    /// connection, the pod must be the `wanted` one. `open`: how many links there are.
    fn admit(
        &self,
        spki: &str,
        wanted: Option<&PodUid>,
        open: usize,
    ) -> Result<(Route, OwnedSemaphorePermit), &'static str> {
        let route = lock(&self.0.pins).get(spki).cloned();
        let route = route.ok_or("its key is not known")?;
        if wanted.is_some_and(|uid| *uid != route.uid) {
            return Err("its key is that of another pod");
        }
        match Arc::clone(&route.permits).try_acquire_owned() {
            Ok(permit) if open < LINKS => Ok((route, permit)),
            Ok(_) => Err("too many links are open"),
            Err(_) => Err("its pod has too many links"),
        }
    }

    fn open(&self, uid: &PodUid, client: Client, about: About) -> u64 {
        let number = self.0.counter.fetch_add(1, Ordering::Relaxed);
        let link = Link {
            number,
            client,
            about: Arc::new(about),
        };
        lock(&self.0.links).insert(uid.clone(), link);
        number
    }

    /// Removes a link, unless it was replaced. Whether it was the pod's newest link.
    fn close(&self, uid: &PodUid, number: u64) -> bool {
        let mut links = lock(&self.0.links);
        let newest = links.get(uid).is_some_and(|link| link.number == number);
        if newest {
            links.remove(uid);
        }
        newest
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Accepts links until `stop` is cancelled: those that shims dial, and those that steps carry.
pub async fn serve(
    links: ShimLinks,
    mut incoming: Incoming,
    mut carried: mpsc::Receiver<Carried>,
    dialled: ShimRoute,
    stop: CancellationToken,
) {
    let mut tasks = JoinSet::new();
    let mut log = LogLimit::default();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = tasks.join_next() => continue,
            accepted = incoming.next() => accepted.map(|made| made.map(|connection| (connection, None))),
            Some(made) = carried.recv() => Some(Ok((made.connection, Some((made.uid, made.opened))))),
        };
        let (connection, carried) = match accepted {
            Some(Ok(accepted)) => accepted,
            Some(Err(error)) => {
                tracing::warn!(
                    error = chain(&error),
                    "cannot accept a connection from a shim"
                );
                continue;
            }
            None => break,
        };
        let Peer::Pinned { spki, origin } = connection.peer().clone() else {
            tracing::warn!(peer = %connection.peer(), "a connection on the port for shims is not from a shim");
            continue;
        };
        let wanted = carried.as_ref().map(|(uid, _)| uid);
        let (route, permit) = match links.admit(&spki, wanted, tasks.len()) {
            Ok(admitted) => admitted,
            Err(why) => {
                let verdict = log.event(tokio::time::Instant::now(), Source::from(origin));
                if let Some(count) = verdict.left_out {
                    tracing::warn!(count, "further rejected shims were not logged");
                }
                if verdict.write {
                    tracing::warn!(from = %origin, %spki, "a shim was rejected: {why}");
                }
                continue;
            }
        };
        let client = ShimClient::new(RawClient::new(knoc_link::near_side(connection)))
            .max_decoding_message_size(knoc_link::MAX_MESSAGE)
            .max_encoding_message_size(knoc_link::MAX_MESSAGE);
        let opened = carried.map(|(_, opened)| opened);
        if opened.is_none() {
            dialled.linked();
        }
        let following = follow(links.clone(), route, client, opened, stop.clone());
        tasks.spawn(following.map(|()| drop(permit)));
    }
    tasks.shutdown().await;
}

/// Follows one link: every report becomes an event, until the link is gone. The link is open from
/// its first report on, which names the shim's capabilities.
async fn follow(
    links: ShimLinks,
    route: Route,
    mut client: Client,
    opened: Option<oneshot::Sender<()>>,
    stop: CancellationToken,
) {
    let uid = &route.uid;
    let begun = async {
        let watched = client.watch_report(pb::WatchReportRequest {}).await?;
        let mut reports = watched.into_inner();
        Ok::<_, Status>((reports.message().await?, reports))
    };
    let begun = tokio::select! {
        biased;
        () = stop.cancelled() => return,
        begun = tokio::time::timeout(FIRST_REPORT, begun) => begun,
    };
    let begun = begun.unwrap_or_else(|_| Err(Status::deadline_exceeded("no report in time")));
    let (first, reports) = match begun {
        Ok((first, reports)) => (first, reports),
        Err(status) => {
            tracing::debug!(%uid, error = status.message(), "the shim's link broke before its first report");
            return;
        }
    };
    let about = first.as_ref().map(About::of).unwrap_or_default();
    let network = {
        // A step carries its link for a while only: names and addresses that work now would not soon.
        let dialled = opened.is_none();
        let cluster = dialled && about.has(EGRESS);
        let pods = dialled && about.has(MESH) && route.addressed && is_private(first.as_ref());
        serve_network(links.clone(), &route, client.clone(), (cluster, pods))
    };
    let number = links.open(uid, client, about);
    tracing::debug!(%uid, "the shim's link is up");
    if let Some(opened) = opened {
        // Whoever waited for the link may have given up.
        opened.send(()).ok();
    }
    tokio::select! {
        biased;
        () = pass_on(&route, first, reports, &stop) => {}
        () = network => {}
    }
    if links.close(uid, number) {
        // If the actor has ended, no one needs to know.
        drop(route.input.send(Input::Link).await);
    }
}

/// Whether the pod has a network of its own.
fn is_private(report: Option<&pb::Report>) -> bool {
    let network = report.and_then(|report| report.network.as_ref());
    network.is_some_and(|network| network.mode() == pb::NetworkMode::Private)
}

/// What goes on beside the reports, until it is dropped: the pod's connections to the cluster, and to other pods. `able`: whether
/// the shim serves either.
async fn serve_network(links: ShimLinks, route: &Route, client: Client, able: (bool, bool)) {
    let (cluster, pods) = able;
    let to_cluster = async {
        if cluster {
            let (egress, client) = (&links.0.egress, client.clone());
            egress.follow(&route.node, &route.uid, client).await;
        }
    };
    let to_pods = async {
        if pods {
            let shim = Shim {
                uid: route.uid.clone(),
                namespace: route.namespace.clone(),
                spki: route.spki.clone(),
                input: route.input.clone(),
                client: client.clone(),
            };
            // Most pods have no address, and need no room for it.
            Box::pin(links.0.mesh.follow(shim)).await;
        }
    };
    tokio::join!(to_cluster, to_pods);
    std::future::pending::<()>().await;
}

/// Makes each report an event of the pod's actor, until the final one or until the link is gone.
async fn pass_on(
    route: &Route,
    mut next: Option<pb::Report>,
    mut reports: Streaming<pb::Report>,
    stop: &CancellationToken,
) {
    let mut input_open = route.input.send(Input::Link).await.is_ok();
    // After the final report there are no more.
    while input_open && let Some(report) = next.take() {
        let event = Event::Report(Box::new(report));
        input_open = route.input.send(Input::Event(event)).await.is_ok();
        let message = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            message = reports.message() => message,
        };
        match message {
            Ok(report) => next = report,
            Err(status) => {
                tracing::debug!(uid = %route.uid, error = status.message(), "the shim's link broke");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::fake::Fake;

    #[tokio::test]
    async fn the_late_end_of_an_old_link_does_not_close_the_new_one() {
        let fake = Fake::new("").await;
        let uid = PodUid::try_from("a").unwrap();
        fake.ensure(&uid).await;
        let links = &fake.site.shim_links;
        let route = lock(&links.0.pins).values().next().unwrap().clone();
        let nowhere = || {
            let endpoint = tonic::transport::Endpoint::from_static("http://127.0.0.1:1");
            ShimClient::new(RawClient::new(endpoint.connect_lazy()))
        };
        let older = links.open(&uid, nowhere(), About::default());
        assert!(links.close(&uid, older));
        // The shim reconnects before the old link's loss is noticed.
        links.open(&uid, nowhere(), About::default());
        for _of in ["the new one", "the older one"] {
            route.input.send(Input::Link).await.unwrap();
        }
        // These requests come after the reports and are answered after them.
        fake.ensure(&uid).await;
        assert!(fake.site.board.get("a").unwrap().shim_connected);
    }
}
