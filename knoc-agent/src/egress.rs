//! What pods open to the cluster: the network as the kubelet of each node describes it, and the connections that wait for
//! it.
//!
//! ```text
//! kubelet ─WatchEgress─► network ──level──► JobFile.egress, and the WatchEgress of every shim of the node
//!         ◄─attempts─── queue  ◄──────────  the WatchEgress of every shim
//!         ═EgressStream═► relayed to the shim (api/streams.rs)
//! ```
//!
//! The network of a node stays known while no kubelet calls, so that listeners stay; connections wait in the queue meanwhile,
//! as long as their shims have patience. This module decides nothing about a Service: the kubelet does, and `[policy]
//! egress` of the site.

pub(crate) mod counts;
mod queue;
mod shim;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use knoc_link::{Peer, bulk::RawClient};
use knoc_proto::{
    ids::PodUid,
    log_limit::LogLimit,
    pb::{self, shim_client::ShimClient},
    reason::ErrorReason,
};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};

use self::{
    counts::{Counts, Reason},
    queue::{Full, Queue},
};

/// The most nodes whose networks are remembered. A kubelet leads one node, and a site has few.
const NODES: usize = 256;

/// The client of a shim.
type Client = ShimClient<RawClient<Channel>>;

/// A handle to the nodes' networks and queues; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Egress {
    nodes: Arc<Mutex<HashMap<String, Arc<Node>>>>,
    counts: Arc<Counts>,
}

/// What is known for the pods of one node.
#[derive(Debug, Default)]
pub(crate) struct Node {
    network: watch::Sender<Option<Arc<pb::EgressNetwork>>>,
    queue: Mutex<Queue>,
    /// Wakes the caller if a connection waits.
    waits: Notify,
    caller: Mutex<Option<Caller>>,
    counter: AtomicU64,
    /// Where refusals for each pod go, with the number of the call.
    shims: Mutex<HashMap<PodUid, (u64, mpsc::Sender<pb::EgressControl>)>>,
    log: Mutex<LogLimit<PodUid>>,
    counts: Arc<Counts>,
}

/// The kubelet that follows the connections.
#[derive(Debug)]
struct Caller {
    number: u64,
    peer: Option<Peer>,
    ended: CancellationToken,
}

impl Egress {
    /// The node with this name; `None` if there are too many.
    fn node(&self, name: &str) -> Option<Arc<Node>> {
        let mut nodes = lock(&self.nodes);
        if let Some(node) = nodes.get(name) {
            return Some(Arc::clone(node));
        }
        if nodes.len() >= NODES {
            return None;
        }
        let node = Arc::new(Node {
            counts: Arc::clone(&self.counts),
            ..Node::default()
        });
        nodes.insert(name.to_owned(), Arc::clone(&node));
        Some(node)
    }

    /// The network of the cluster for pods of this node, if a kubelet has described it.
    #[must_use]
    pub fn network(&self, node: &str) -> Option<pb::EgressNetwork> {
        let nodes = lock(&self.nodes);
        let network = nodes.get(node)?.network.borrow().clone();
        network.map(|network| (*network).clone())
    }

    /// The ranges of addresses that lead the pods of all nodes to clusters.
    pub(crate) fn ranges(&self) -> Vec<String> {
        let nodes = lock(&self.nodes);
        let networks = nodes.values().filter_map(|node| {
            let network = node.network.borrow();
            network.clone()
        });
        networks
            .flat_map(|network| network.ranges.clone())
            .collect()
    }

    /// Follows the connections of a node for `peer`. An earlier call for this node ends.
    pub(crate) fn call(&self, name: &str, peer: Option<Peer>) -> Result<Call, Status> {
        let node = self.node(name).ok_or_else(|| {
            let message = format!("the connections of {NODES} nodes are followed already");
            ErrorReason::Overloaded.status(message)
        })?;
        let ended = CancellationToken::new();
        let number = node.number();
        let caller = Caller {
            number,
            peer,
            ended: ended.clone(),
        };
        if let Some(older) = lock(&node.caller).replace(caller) {
            older.ended.cancel();
        }
        // What the older call was told of and did not settle.
        lock(&node.queue).again(Instant::now());
        node.waits.notify_one();
        Ok(Call {
            node,
            number,
            ended,
        })
    }

    /// Fails unless this peer follows the connections of the node now; from now on nobody else is told of the connection `id`.
    pub(crate) fn settle(
        &self,
        name: &str,
        peer: Option<&Peer>,
        (uid, id): (&PodUid, u64),
    ) -> Result<(), Status> {
        self.check_caller(name, peer)?;
        if let Some(node) = lock(&self.nodes).get(name) {
            lock(&node.queue).settle(uid.as_str(), id);
        }
        Ok(())
    }

    fn check_caller(&self, name: &str, peer: Option<&Peer>) -> Result<(), Status> {
        let node = lock(&self.nodes).get(name).cloned();
        let follows = node.is_some_and(|node| {
            let caller = lock(&node.caller);
            caller
                .as_ref()
                .is_some_and(|caller| is_same(caller.peer.as_ref(), peer))
        });
        if follows {
            return Ok(());
        }
        let message = format!(
            "only the kubelet whose WatchEgress follows the connections of node {name:?} may take one of them"
        );
        Err(ErrorReason::LeadershipDenied.status(message))
    }

    /// Counts a connection that the agent refuses itself.
    pub(crate) fn refused(&self, reason: Reason) {
        self.counts.refused(reason);
    }

    /// What was counted since the agent started.
    #[must_use]
    pub fn counted(&self) -> pb::EgressCounts {
        let nodes = lock(&self.nodes);
        let now = Instant::now();
        let waiting = nodes.values().map(|node| lock(&node.queue).waiting(now));
        self.counts.with_waiting(waiting.sum())
    }

    /// Serves the shim of a pod of this node until this is dropped.
    pub(crate) async fn follow(&self, node: &str, uid: &PodUid, client: Client) {
        match self.node(node) {
            Some(node) => shim::follow(node, uid.clone(), client).await,
            None => std::future::pending().await,
        }
    }
}

impl Node {
    fn number(&self) -> u64 {
        self.counter.fetch_add(1, Ordering::Relaxed)
    }

    fn announce(&self, attempt: pb::EgressAttempt) -> Result<(), Full> {
        lock(&self.queue).push(Instant::now(), attempt)?;
        self.waits.notify_one();
        Ok(())
    }

    /// Refusals for this pod go to `controls` from now on, until the answer is dropped.
    fn register(&self, uid: &PodUid, controls: mpsc::Sender<pb::EgressControl>) -> Registered<'_> {
        let number = self.number();
        lock(&self.shims).insert(uid.clone(), (number, controls));
        Registered {
            node: self,
            uid: uid.clone(),
            number,
        }
    }

    fn log_refusal(&self, uid: &PodUid, why: &str) {
        let verdict = lock(&self.log).event(Instant::now(), uid.clone());
        if let Some(count) = verdict.left_out {
            tracing::warn!(count, "further refused connections of pods were not logged");
        }
        if verdict.write {
            tracing::warn!(%uid, "a connection of the pod to the cluster was refused: {why}");
        }
    }
}

/// One shim's place for refusals.
struct Registered<'a> {
    node: &'a Node,
    uid: PodUid,
    number: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        let mut shims = lock(&self.node.shims);
        if shims
            .get(&self.uid)
            .is_some_and(|(number, _)| *number == self.number)
        {
            shims.remove(&self.uid);
        }
    }
}

/// A call of `WatchEgress`, until it is dropped.
#[derive(Debug)]
pub(crate) struct Call {
    node: Arc<Node>,
    number: u64,
    ended: CancellationToken,
}

impl Call {
    /// Replaces the network.
    pub(crate) fn set_network(&self, network: pb::EgressNetwork) {
        let network = Some(Arc::new(network));
        self.node.network.send_if_modified(|known| {
            let changes = *known != network;
            *known = network;
            changes
        });
    }

    /// Passes a refusal on to the pod's shim. If it has no link, nobody waits for it.
    pub(crate) fn refuse(&self, refusal: &pb::EgressRefusal) {
        lock(&self.node.queue).settle(&refusal.uid, refusal.id);
        let shims = lock(&self.node.shims);
        if let Some((_, controls)) = shims.get(refusal.uid.as_str()) {
            controls.try_send(refused(refusal.id)).ok();
        }
    }

    /// Passes on to the pod's shim to which pod of the node the connection leads.
    pub(crate) fn redirect(&self, redirect: pb::EgressRedirect) {
        lock(&self.node.queue).settle(&redirect.uid, redirect.id);
        let shims = lock(&self.node.shims);
        if let Some((_, controls)) = shims.get(redirect.uid.as_str()) {
            controls.try_send(redirected(redirect)).ok();
        }
    }

    /// The next connection; `None` once a newer call has replaced this one.
    pub(crate) async fn next(&self) -> Option<pb::EgressAttempt> {
        loop {
            let waits = self.node.waits.notified();
            if self.ended.is_cancelled() {
                return None;
            }
            if let Some(attempt) = lock(&self.node.queue).pop(Instant::now()) {
                return Some(attempt);
            }
            tokio::select! {
                biased;
                () = self.ended.cancelled() => return None,
                () = waits => {}
            }
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut caller = lock(&self.node.caller);
        if caller
            .as_ref()
            .is_some_and(|caller| caller.number == self.number)
        {
            *caller = None;
        }
    }
}

/// The refusal of this connection as a shim gets it: without the pod, because a shim has one.
fn refused(id: u64) -> pb::EgressControl {
    let refusal = pb::EgressRefusal {
        uid: String::new(),
        id,
    };
    pb::EgressControl {
        control: Some(pb::egress_control::Control::Refusal(refusal)),
        caller: None,
    }
}

/// The redirection as a shim gets it.
fn redirected(redirect: pb::EgressRedirect) -> pb::EgressControl {
    let redirect = pb::EgressRedirect {
        uid: String::new(),
        ..redirect
    };
    pb::EgressControl {
        control: Some(pb::egress_control::Control::Redirect(redirect)),
        caller: None,
    }
}

/// PURE: are these connections of the same peer?
fn is_same(one: Option<&Peer>, other: Option<&Peer>) -> bool {
    match (one, other) {
        (
            Some(Peer::Tls { identity: one, .. }),
            Some(Peer::Tls {
                identity: other, ..
            }),
        ) => one == other,
        (Some(Peer::Unix { uid: one, .. }), Some(Peer::Unix { uid: other, .. })) => one == other,
        (one, other) => one == other,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(id: u64) -> pb::EgressAttempt {
        pb::EgressAttempt {
            uid: "u".to_owned(),
            id,
            ..pb::EgressAttempt::default()
        }
    }

    fn unix(uid: u32) -> Peer {
        Peer::Unix { uid, pid: Some(1) }
    }

    #[tokio::test]
    async fn a_newer_call_ends_the_older_one_and_gets_what_waits() {
        let egress = Egress::default();
        let older = egress.call("n", Some(unix(1))).unwrap();
        let other = egress.call("another node", Some(unix(1))).unwrap();
        older.set_network(pb::EgressNetwork::default());
        let node = egress.node("n").unwrap();
        node.announce(attempt(1)).unwrap();
        assert_eq!(older.next().await, Some(attempt(1)));
        let replace = async { egress.call("n", Some(unix(2))).unwrap() };
        let (ended, newer) = tokio::join!(older.next(), replace);
        assert_eq!(ended, None);
        assert_eq!(newer.next().await, Some(attempt(1)), "nobody has taken it");
        newer.refuse(&pb::EgressRefusal {
            uid: "u".to_owned(),
            id: 1,
        });
        node.announce(attempt(2)).unwrap();
        assert_eq!(newer.next().await, Some(attempt(2)));
        assert!(egress.check_caller("n", Some(&unix(1))).is_err());
        egress.check_caller("n", Some(&unix(2))).unwrap();
        drop(older);
        egress.check_caller("n", Some(&unix(2))).unwrap();
        drop(newer);
        assert!(egress.check_caller("n", Some(&unix(2))).is_err());
        egress.check_caller("another node", Some(&unix(1))).unwrap();
        drop(other);
        assert!(egress.network("n").is_some(), "it stays while nobody calls");
        assert_eq!(egress.network("another node"), None);
    }

    #[tokio::test]
    async fn a_connection_waits_for_the_next_call() {
        let egress = Egress::default();
        drop(egress.call("n", Some(unix(1))).unwrap());
        egress.node("n").unwrap().announce(attempt(1)).unwrap();
        let call = egress.call("n", Some(unix(1))).unwrap();
        assert_eq!(call.next().await, Some(attempt(1)));
    }

    #[tokio::test]
    async fn only_the_caller_takes_a_connection_and_nobody_is_told_of_it_again() {
        let egress = Egress::default();
        let call = || egress.call("n", Some(unix(1))).unwrap();
        let announce = |id| egress.node("n").unwrap().announce(attempt(id)).unwrap();
        let uid = PodUid::try_from("u").unwrap();
        let first = call();
        announce(1);
        assert_eq!(first.next().await, Some(attempt(1)));
        let others = [("n", Some(unix(2))), ("n", None), ("m", Some(unix(1)))];
        for (node, peer) in others {
            let denied = egress.settle(node, peer.as_ref(), (&uid, 1));
            let reason = ErrorReason::of(&denied.unwrap_err());
            assert_eq!(reason, Some(ErrorReason::LeadershipDenied));
        }
        let second = call();
        assert_eq!(second.next().await, Some(attempt(1)), "it still waits");
        egress.settle("n", Some(&unix(1)), (&uid, 1)).unwrap();
        announce(2);
        let third = call();
        assert_eq!(third.next().await, Some(attempt(2)));
        third.refuse(&pb::EgressRefusal {
            uid: "u".to_owned(),
            id: 2,
        });
        announce(3);
        assert_eq!(call().next().await, Some(attempt(3)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_waits_is_told_of_a_connection() {
        let egress = Egress::default();
        let call = egress.call("n", Some(unix(1))).unwrap();
        let late = async {
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            egress.node("n").unwrap().announce(attempt(1)).unwrap();
        };
        let next = tokio::time::timeout(std::time::Duration::from_secs(2), call.next());
        let (next, ()) = tokio::join!(next, late);
        assert_eq!(next.unwrap(), Some(attempt(1)));
    }

    #[test]
    fn a_refusal_reaches_the_newest_call_of_its_shim() {
        let egress = Egress::default();
        let call = egress.call("n", None).unwrap();
        let node = egress.node("n").unwrap();
        let uid = PodUid::try_from("u").unwrap();
        let (to_older, mut older) = mpsc::channel(2);
        let (to_newer, mut newer) = mpsc::channel(2);
        let registered = node.register(&uid, to_older);
        let _newer = node.register(&uid, to_newer);
        drop(registered);
        call.refuse(&pb::EgressRefusal {
            uid: "u".to_owned(),
            id: 5,
        });
        call.refuse(&pb::EgressRefusal {
            uid: "nobody".to_owned(),
            id: 6,
        });
        assert_eq!(newer.try_recv().unwrap(), refused(5));
        let redirect = |uid: &str| pb::EgressRedirect {
            uid: uid.to_owned(),
            id: 7,
            address: "10.200.0.7".to_owned(),
            port: 80,
        };
        call.redirect(redirect("u"));
        assert_eq!(newer.try_recv().unwrap(), redirected(redirect("")));
        newer.try_recv().unwrap_err();
        older.try_recv().unwrap_err();
    }

    #[test]
    fn the_number_of_nodes_is_bounded() {
        let egress = Egress::default();
        for number in 0..NODES {
            egress.call(&number.to_string(), None).unwrap();
        }
        let refused = egress.call("one more", None).unwrap_err();
        assert_eq!(ErrorReason::of(&refused), Some(ErrorReason::Overloaded));
        egress.call("0", None).unwrap();
    }
}
