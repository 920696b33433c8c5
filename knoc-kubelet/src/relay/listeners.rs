//! Tasks: one for each relayed port, which accepts connections and owns those that it accepted.
//!
//! ```text
//!   open ──► accepts ──close──► accepts no more, and ends with its last connection
//! ```
//!
//! A port that is closed refuses connections at once, and those that wait to be accepted are reset. Connections that were accepted go
//! on until one of their ends closes or breaks them, as on any node.

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc, time::Duration};

use knoc_proto::{error::chain, ids::PodUid, reason::ErrorReason};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{carry, plan::PodPort};
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
    port: u16,
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
        ports.map(|(key, open)| (key.clone(), open.port)).collect()
    }

    /// Opens a port for a port of a pod of the namespace.
    pub(super) async fn open(
        &mut self,
        key: PodPort,
        namespace: &Arc<str>,
        at: SocketAddr,
    ) -> io::Result<()> {
        let listener = TcpListener::bind(at).await?;
        let port = at.port();
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
        tracing::debug!(%key, port, "relaying");
        self.tasks.spawn(relayed.serve(listener, accepts.clone()));
        let open = Open {
            port,
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

/// Permission for one connection, until it is dropped.
type Permits = [OwnedSemaphorePermit; 3];

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
                    Ok((stream, _)) => self.take(stream, &mut connections),
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

    fn take(&self, stream: TcpStream, connections: &mut JoinSet<()>) {
        let permits = match self.permits() {
            Ok(permits) => permits,
            Err(why) => {
                halves::reset(stream);
                self.shared.traffic.refused(Reason::Limit);
                return note_refused(&self.shared, &self.to, &why);
            }
        };
        let (shared, to) = (self.shared.clone(), self.to.clone());
        let carry = async move {
            let _permits = permits;
            let carried = carry::run(&shared.agent, stream, &to, &shared.traffic).await;
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

    fn permits(&self) -> Result<Permits, String> {
        let free = self.shared.of_all.available_permits();
        let of_namespace = OF_ALL.saturating_sub(self.of_namespace.available_permits());
        if of_namespace >= OF_NAMESPACE && free <= LAST {
            return Err(format!(
                "the last {LAST} relayed connections of this node are for namespaces whose pods have fewer than {OF_NAMESPACE}"
            ));
        }
        let of_pod = OF_ONE.saturating_sub(self.of_one.available_permits());
        if of_pod >= SHARE && free <= RESERVED {
            let most = OF_ALL - RESERVED;
            return Err(format!(
                "the pods of this node have {most} relayed connections or more, and then each pod gets at most {SHARE}"
            ));
        }
        let of_one = Arc::clone(&self.of_one).try_acquire_owned();
        let of_one = of_one
            .map_err(|_| format!("the pod has {OF_ONE} relayed connections, which is the limit"))?;
        let of_all = Arc::clone(&self.shared.of_all).try_acquire_owned();
        let full = |_| {
            format!("the pods of this node have {OF_ALL} relayed connections, which is the limit")
        };
        let of_all = of_all.map_err(full)?;
        let of_namespace = Arc::clone(&self.of_namespace).try_acquire_owned();
        Ok([of_one, of_all, of_namespace.map_err(full)?])
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

    use super::*;

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
        let full = pods[39 - 1].permits().unwrap_err();
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
        let full = other.permits().unwrap_err();
        assert!(full.contains("each pod gets at most 8"), "{full}");
        assert_eq!(all_of(&third).len(), SHARE);
        drop(of_one);
        let _permits = other.permits().unwrap();
    }
}
