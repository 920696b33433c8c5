//! Tasks: one for each relayed port, and each port at a pod's own address, which accepts connections and owns those that it accepted.
//!
//! ```text
//!   open ──► accepts ──close──► accepts no more, and ends with its last connection
//! ```
//!
//! A port that is closed refuses connections at once, and those that wait to be accepted are reset. Connections that were accepted go
//! on until one of their ends closes or breaks them, as on any node; one that has been idle for long is reset if a new one needs its
//! place ([`super::idle`]).

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc, time::Duration};

use knoc_link::admission::Source;
use knoc_proto::{error::chain, ids::PodUid, reason::ErrorReason};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    carry,
    places::{Permits, Place, Places},
    plan::PodPort,
};
use crate::{
    agent::Agent,
    halves,
    metrics::traffic::{Direction, Reason},
};

/// The most connections to all pods. The link has 2048 streams: egress, logs and commands have the others.
const OF_ALL: usize = 256;
/// The most connections to one pod, so that its clients do not keep out those of all others.
const OF_ONE: usize = 224;
/// Once no more than this is free for all pods, a pod that has its share gets no more, so that the clients of two pods do not keep
/// out those of all others.
const RESERVED: usize = OF_ALL - OF_ONE;
const SHARE: usize = 8;
/// Once no more than this is free for all pods, a namespace whose pods have [`OF_NAMESPACE`] gets no more, so that one namespace with
/// many pods does not keep out all others.
const LAST: usize = 16;
const OF_NAMESPACE: usize = 8;
/// The pause after an error of the system, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// The pod to which a connection was refused, and why.
pub(super) type RefusedConnection = (PodUid, String);

/// What all connections share.
#[derive(Debug, Clone)]
struct Shared {
    agent: Agent,
    /// Counts the connections.
    traffic: Direction,
    of_all: Arc<Semaphore>,
    /// The connections that are open.
    places: Places,
    /// Refused connections, for Events. One that finds no room is left out: the next one has the same reason.
    refused: mpsc::Sender<RefusedConnection>,
}

/// The relayed ports. Dropping it ends all connections.
#[derive(Debug)]
pub(super) struct Listeners {
    shared: Shared,
    open: HashMap<PodPort, Open>,
    /// For each pod that has a port or connections: how many more it may have.
    of_one: HashMap<PodUid, Arc<Semaphore>>,
    /// The same for each namespace; it only counts.
    of_namespace: HashMap<Arc<str>, Arc<Semaphore>>,
    tasks: JoinSet<()>,
}

/// A port that accepts. Dropping it closes the port.
#[derive(Debug)]
struct Open {
    at: SocketAddr,
    _accepts: DropGuard,
}

impl Listeners {
    pub(super) fn new(
        agent: Agent,
        traffic: Direction,
        refused: mpsc::Sender<RefusedConnection>,
    ) -> Self {
        Self {
            shared: Shared {
                agent,
                traffic,
                of_all: Arc::new(Semaphore::new(OF_ALL)),
                places: Places::default(),
                refused,
            },
            open: HashMap::new(),
            of_one: HashMap::new(),
            of_namespace: HashMap::new(),
            tasks: JoinSet::new(),
        }
    }

    /// The ports of the kubelet that accept connections.
    pub(super) fn ports(&self) -> HashMap<PodPort, u16> {
        let ports = self.open.iter();
        let ports = ports.map(|(key, open)| (key.clone(), open.at.port()));
        ports.collect()
    }

    /// Where connections for each port of a pod are accepted.
    pub(super) fn addresses(&self) -> HashMap<PodPort, SocketAddr> {
        let open = self.open.iter();
        open.map(|(key, open)| (key.clone(), open.at)).collect()
    }

    /// Listens at an address for a port of a pod of the namespace.
    pub(super) async fn open(
        &mut self,
        key: PodPort,
        namespace: &Arc<str>,
        at: SocketAddr,
    ) -> io::Result<()> {
        let listener = TcpListener::bind(at).await?;
        let of_one = self.of_one.entry(key.uid.clone());
        let of_one = of_one.or_insert_with(|| Arc::new(Semaphore::new(OF_ONE)));
        let of_namespace = self.of_namespace.entry(Arc::clone(namespace));
        let of_namespace = of_namespace.or_insert_with(|| Arc::new(Semaphore::new(OF_ALL)));
        let accepts = CancellationToken::new();
        let relayed = Relayed {
            shared: self.shared.clone(),
            of_one: Arc::clone(of_one),
            of_namespace: Arc::clone(of_namespace),
            to: key.clone(),
        };
        tracing::debug!(%key, %at, "relaying");
        self.tasks.spawn(relayed.serve(listener, accepts.clone()));
        let open = Open {
            at,
            _accepts: accepts.drop_guard(),
        };
        self.open.insert(key, open);
        Ok(())
    }

    /// Closes the ports that are not wanted any more; returns which.
    pub(super) fn retain(&mut self, wanted: impl Fn(&PodPort) -> bool) -> Vec<PodPort> {
        let over: Vec<_> = self
            .open
            .keys()
            .filter(|key| !wanted(key))
            .cloned()
            .collect();
        for key in &over {
            tracing::debug!(%key, "no longer relaying");
            self.open.remove(key);
        }
        // Connections of closed ports count as well, until they end: otherwise a port that is closed and opened again, because a policy
        // comes and goes, would give a pod more of them.
        self.of_one.retain(|_, count| Arc::strong_count(count) > 1);
        self.of_namespace
            .retain(|_, count| Arc::strong_count(count) > 1);
        over
    }

    /// Joins the tasks that have ended. Cancel safe; pending while there is none.
    pub(super) async fn joined(&mut self) {
        match self.tasks.join_next().await {
            Some(Ok(())) => {}
            Some(Err(error)) => tracing::error!(%error, "the task of a relayed port panicked"),
            None => std::future::pending().await,
        }
    }
}

/// A relayed port.
#[derive(Debug)]
struct Relayed {
    shared: Shared,
    of_one: Arc<Semaphore>,
    of_namespace: Arc<Semaphore>,
    to: PodPort,
}

/// The limit that leaves no room for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Full {
    #[error(
        "the last {} relayed connections of this node are for namespaces whose pods have fewer than {}",
        LAST,
        OF_NAMESPACE
    )]
    Namespace,
    #[error(
        "the pods of this node have {} relayed connections or more, and then each pod gets at most {}",
        OF_ALL - RESERVED,
        SHARE
    )]
    Share,
    #[error("the pod has {} relayed connections, which is the limit", OF_ONE)]
    Pod,
    #[error(
        "the pods of this node have {} relayed connections, which is the limit",
        OF_ALL
    )]
    Node,
}

impl Relayed {
    async fn serve(self, listener: TcpListener, stop: CancellationToken) {
        let mut connections = JoinSet::new();
        loop {
            // Stopping comes first. Connections that have ended are joined before others are accepted.
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(ended) = connections.join_next() => note_panic(ended),
                accepted = listener.accept() => match accepted {
                    Ok((stream, from)) => self.take(stream, from.into(), &mut connections),
                    Err(error) => {
                        tracing::debug!(to = %self.to, %error, "a connection could not be accepted");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        }
        drop(listener);
        while let Some(ended) = connections.join_next().await {
            note_panic(ended);
        }
    }

    fn take(&self, stream: TcpStream, from: Source, connections: &mut JoinSet<()>) {
        let place = match self.place(from) {
            Ok(place) => place,
            Err(full) => {
                halves::reset(stream);
                self.shared.traffic.refused(Reason::Limit);
                return note_refused(&self.shared, &self.to, &full.to_string());
            }
        };
        let (shared, to) = (self.shared.clone(), self.to.clone());
        let carry = async move {
            let carrying = carry::run(
                &shared.agent,
                stream,
                &to,
                &shared.traffic,
                place.activity(),
            );
            // A connection that is no longer carried is reset.
            let carried = tokio::select! {
                biased;
                carried = carrying => carried,
                () = place.given_away() => return,
            };
            if let Err(status) = carried {
                tracing::debug!(%to, error = chain(&status), "a relayed connection was refused");
                if ErrorReason::of(&status) == Some(ErrorReason::PolicyDenied) {
                    shared.traffic.refused(Reason::Policy);
                    note_refused(&shared, &to, status.message());
                } else {
                    shared.traffic.refused(Reason::Pod);
                }
            }
        };
        connections.spawn(Box::pin(carry));
    }

    /// A place for a connection, if need be that of an idle one.
    fn place(&self, from: Source) -> Result<Place, Full> {
        let permits = match self.permits() {
            Ok(permits) => permits,
            Err(full) => self.of_an_idle_one(full).ok_or(full)?,
        };
        Ok(self.shared.places.take(&self.to, from, permits))
    }

    /// The permits of an idle connection that is closed. A pod that has its share displaces only its own connections.
    fn of_an_idle_one(&self, full: Full) -> Option<Permits> {
        let is_of = |permit: &OwnedSemaphorePermit, count: &Arc<Semaphore>| {
            Arc::ptr_eq(permit.semaphore(), count)
        };
        let has_its_share = self.of_pod() >= SHARE;
        let may = |[of_one, _, of_namespace]: &Permits| {
            if has_its_share {
                return is_of(of_one, &self.of_one);
            }
            full != Full::Namespace || is_of(of_namespace, &self.of_namespace)
        };
        let (to, [of_one, of_all, of_namespace]) = self.shared.places.give_way(may)?;
        tracing::debug!(%to, "an idle relayed connection was closed for a new one");
        let text = format!(
            "An idle connection to port {} was closed for a new one: {full}",
            to.number
        );
        self.shared.refused.try_send((to.uid, text)).ok();
        // Permits of the pod itself stay, so that no other new connection takes them. Those of others are exchanged: a pod below its
        // share has some left.
        let own = |permit: OwnedSemaphorePermit, count: &Arc<Semaphore>| {
            if is_of(&permit, count) {
                return Some(permit);
            }
            Arc::clone(count).try_acquire_owned().ok()
        };
        Some([
            own(of_one, &self.of_one)?,
            of_all,
            own(of_namespace, &self.of_namespace)?,
        ])
    }

    /// How many connections the pod has.
    fn of_pod(&self) -> usize {
        OF_ONE.saturating_sub(self.of_one.available_permits())
    }

    fn permits(&self) -> Result<Permits, Full> {
        let free = self.shared.of_all.available_permits();
        let of_namespace = OF_ALL.saturating_sub(self.of_namespace.available_permits());
        if of_namespace >= OF_NAMESPACE && free <= LAST {
            return Err(Full::Namespace);
        }
        if self.of_pod() >= SHARE && free <= RESERVED {
            return Err(Full::Share);
        }
        let of_one = Arc::clone(&self.of_one).try_acquire_owned();
        let of_one = of_one.map_err(|_| Full::Pod)?;
        let of_all = Arc::clone(&self.shared.of_all).try_acquire_owned();
        let of_all = of_all.map_err(|_| Full::Node)?;
        let of_namespace = Arc::clone(&self.of_namespace).try_acquire_owned();
        Ok([of_one, of_all, of_namespace.map_err(|_| Full::Node)?])
    }
}

fn note_refused(shared: &Shared, to: &PodPort, why: &str) {
    let text = format!("A connection to port {} was refused: {why}", to.number);
    shared.refused.try_send((to.uid.clone(), text)).ok();
}

fn note_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "the task of a relayed connection panicked");
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;
    use tonic::transport::Endpoint;

    use super::{super::idle, *};

    fn key(number: u16) -> PodPort {
        PodPort {
            uid: "u-1".parse().unwrap(),
            number,
        }
    }

    /// The ports of an agent that nobody reaches.
    fn listeners() -> (Listeners, mpsc::Receiver<RefusedConnection>) {
        // Nothing listens on this port.
        let channel = Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let agent = Agent::new(channel.clone(), channel, "c");
        let (refuse, refused) = mpsc::channel(4);
        (Listeners::new(agent, Direction::default(), refuse), refused)
    }

    async fn free_port() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    }

    /// A port of a pod whose namespace has this count.
    fn relayed(listeners: &Listeners, number: u16, of_namespace: &Arc<Semaphore>) -> Relayed {
        Relayed {
            shared: listeners.shared.clone(),
            of_one: Arc::new(Semaphore::new(OF_ONE)),
            of_namespace: Arc::clone(of_namespace),
            to: key(number),
        }
    }

    fn namespace() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(OF_ALL))
    }

    /// As many connections as the pod gets.
    fn all_of(pod: &Relayed) -> Vec<Permits> {
        let permits = std::iter::from_fn(|| pod.permits().ok());
        permits.collect()
    }

    #[tokio::test]
    async fn the_clients_of_one_namespace_leave_room_for_those_of_others() {
        let (listeners, _refused) = listeners();
        let greedy = namespace();
        let pods: Vec<_> = (1..40)
            .map(|number| relayed(&listeners, number, &greedy))
            .collect();
        let taken: Vec<_> = pods.iter().flat_map(all_of).collect();
        assert_eq!(taken.len(), OF_ALL - LAST);
        let full = pods[39 - 1].permits().unwrap_err().to_string();
        assert!(
            full.contains("for namespaces whose pods have fewer than 8"),
            "{full}"
        );
        let mut others = Vec::new();
        for number in [100, 101] {
            let other = relayed(&listeners, number, &namespace());
            let of_other = all_of(&other);
            assert_eq!(of_other.len(), OF_NAMESPACE);
            others.push(of_other);
        }
        drop(taken);
        assert!(pods[0].permits().is_ok());
    }

    #[tokio::test]
    async fn a_pod_that_is_not_reached_resets_and_a_closed_port_refuses() {
        let (mut listeners, _refused) = listeners();
        let at = free_port().await;
        let port = at.port();
        listeners.open(key(80), &"team".into(), at).await.unwrap();
        assert_eq!(listeners.ports(), HashMap::from([(key(80), port)]));
        let mut client = TcpStream::connect(at).await.unwrap();
        let error = client.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(listeners.retain(|_| true).is_empty());
        assert_eq!(listeners.retain(|_| false), [key(80)]);
        listeners.joined().await;
        let error = TcpStream::connect(at).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        listeners.retain(|_| true);
        assert!(listeners.of_one.is_empty(), "nothing of the pod is left");
        assert!(listeners.of_namespace.is_empty(), "nor of its namespace");
    }

    #[tokio::test]
    async fn a_port_that_is_closed_and_opened_again_gives_a_pod_no_more_connections() {
        let (mut listeners, _refused) = listeners();
        let at = free_port().await;
        listeners.open(key(80), &"team".into(), at).await.unwrap();
        let left = |listeners: &Listeners| {
            let pod = listeners.of_one.get("u-1")?;
            Some(pod.available_permits())
        };
        let pod = listeners.of_one.get("u-1").unwrap();
        let connection = Arc::clone(pod).try_acquire_owned().unwrap();
        listeners.retain(|_| false);
        listeners.joined().await;
        let again = free_port().await;
        listeners
            .open(key(80), &"team".into(), again)
            .await
            .unwrap();
        assert_eq!(left(&listeners), Some(OF_ONE - 1));
        drop(connection);
        assert_eq!(left(&listeners), Some(OF_ONE));
    }

    #[tokio::test]
    async fn connections_beyond_the_limit_are_refused_and_the_pod_is_told() {
        let (mut listeners, mut refused) = listeners();
        let at = free_port().await;
        listeners.open(key(80), &"team".into(), at).await.unwrap();
        let all = Arc::clone(&listeners.shared.of_all);
        let _taken = all
            .try_acquire_many_owned(OF_ALL.try_into().unwrap())
            .unwrap();
        let mut client = TcpStream::connect(at).await.unwrap();
        client.read(&mut [0]).await.unwrap_err();
        let (uid, text) = refused.recv().await.unwrap();
        assert_eq!(uid.as_str(), "u-1");
        assert!(text.contains("256 relayed connections"), "{text}");
    }

    #[tokio::test]
    async fn the_clients_of_two_pods_leave_room_for_those_of_others() {
        let (listeners, _refused) = listeners();
        let pod = |number| relayed(&listeners, number, &namespace());
        let (one, other, third) = (pod(1), pod(2), pod(3));
        let of_one = all_of(&one);
        assert_eq!(of_one.len(), OF_ONE);
        let of_other = all_of(&other);
        assert_eq!(of_other.len(), SHARE);
        let full = other.permits().unwrap_err().to_string();
        assert!(full.contains("each pod gets at most 8"), "{full}");
        assert_eq!(all_of(&third).len(), SHARE);
        drop(of_one);
        let _permits = other.permits().unwrap();
    }

    fn client(number: u8) -> Source {
        Source::V4([10, 0, 0, number].into())
    }

    /// As many connections from this client as the pod gets.
    fn filled(pod: &Relayed, from: Source) -> Vec<Place> {
        let places = std::iter::from_fn(|| pod.place(from).ok());
        places.collect()
    }

    fn given_away(places: &[Place]) -> usize {
        places.iter().filter(|place| place.is_given_away()).count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_was_silent_for_long_gives_way_to_a_new_one() {
        let (listeners, mut refused) = listeners();
        let pod = relayed(&listeners, 80, &namespace());
        let used = pod.place(client(1)).unwrap();
        used.activity().note();
        let silent = filled(&pod, client(2));
        assert_eq!(silent.len(), OF_ONE - 1);
        assert_eq!(pod.place(client(3)).unwrap_err(), Full::Share);
        tokio::time::advance(idle::SILENT).await;
        let new = pod.place(client(3)).unwrap();
        assert!(silent[0].is_given_away(), "the oldest");
        assert_eq!(given_away(&silent), 1);
        let (_, text) = refused.recv().await.unwrap();
        assert!(
            text.starts_with("An idle connection to port 80 was closed for a new one: "),
            "{text}"
        );
        assert_eq!(pod.of_pod(), OF_ONE);
        let newest = filled(&pod, client(3));
        assert_eq!(newest.len(), OF_ONE - 2, "each of the silent ones");
        assert!(!used.is_given_away() && !new.is_given_away());
        // Those that gave way free nothing when they end.
        drop(silent);
        assert_eq!(pod.of_pod(), OF_ONE);
        tokio::time::advance(idle::IDLE).await;
        let _last = pod.place(client(3)).unwrap();
        assert!(!used.is_given_away(), "its client has only this one");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_with_its_share_displaces_only_its_own_connections() {
        let (listeners, _refused) = listeners();
        let pod = |number| relayed(&listeners, number, &namespace());
        let (one, other, third) = (pod(1), pod(2), pod(3));
        let of_one = filled(&one, client(1));
        tokio::time::advance(idle::SILENT).await;
        let of_other = filled(&other, client(1));
        assert_eq!(of_other.len(), SHARE, "none of its own is idle");
        assert_eq!(given_away(&of_one), 0);
        let rest = filled(&third, client(2));
        assert_eq!(rest.len(), SHARE);
        let others: Vec<_> = (4..6).map(pod).collect();
        let of_others: Vec<_> = others.iter().map(|pod| filled(pod, client(2))).collect();
        assert!(of_others.iter().all(|places| places.len() == SHARE));
        // The node is full, and a pod without a connection needs one.
        let _first = pod(6).place(client(3)).unwrap();
        assert_eq!(given_away(&of_one), 1);
    }
}
