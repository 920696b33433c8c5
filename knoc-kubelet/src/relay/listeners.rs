//! Tasks: one for each relayed port, which accepts connections and owns those that it accepted.
//!
//! ```text
//!   open ──► accepts ──close──► accepts no more, and ends with its last connection
//! ```
//!
//! A port that is closed refuses connections at once, and those that wait to be accepted are reset. Connections that were accepted go
//! on until one of their ends closes or breaks them, as on any node.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

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
    /// For each pod that has a port: how many more connections it may have.
    of_one: HashMap<PodUid, Arc<Semaphore>>,
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
            tasks: JoinSet::new(),
        }
    }

    /// The ports of the kubelet that accept connections.
    pub(super) fn ports(&self) -> HashMap<PodPort, u16> {
        let ports = self.open.iter();
        ports.map(|(key, open)| (key.clone(), open.port)).collect()
    }

    /// Opens a port for a port of a pod.
    pub(super) async fn open(&mut self, key: PodPort, at: IpAddr, port: u16) -> io::Result<()> {
        let listener = TcpListener::bind(SocketAddr::new(at, port)).await?;
        let of_one = self.of_one.entry(key.uid.clone());
        let of_one = of_one.or_insert_with(|| Arc::new(Semaphore::new(OF_ONE)));
        let accepts = CancellationToken::new();
        let relayed = Relayed {
            shared: self.shared.clone(),
            of_one: Arc::clone(of_one),
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
        let pods: HashSet<_> = self.open.keys().map(|key| &key.uid).collect();
        self.of_one.retain(|uid, _| pods.contains(uid));
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
    to: PodPort,
}

/// Permission for one connection, until it is dropped.
type Permits = (OwnedSemaphorePermit, OwnedSemaphorePermit);

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
        let of_pod = OF_ONE.saturating_sub(self.of_one.available_permits());
        if of_pod >= SHARE && self.shared.of_all.available_permits() <= RESERVED {
            let most = OF_ALL - RESERVED;
            return Err(format!(
                "the pods of this node have {most} relayed connections or more, and then each pod gets at most {SHARE}"
            ));
        }
        let of_one = Arc::clone(&self.of_one).try_acquire_owned();
        let of_one = of_one
            .map_err(|_| format!("the pod has {OF_ONE} relayed connections, which is the limit"))?;
        let of_all = Arc::clone(&self.shared.of_all).try_acquire_owned();
        let of_all = of_all.map_err(|_| {
            format!("the pods of this node have {OF_ALL} relayed connections, which is the limit")
        })?;
        Ok((of_one, of_all))
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

    async fn free_port() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().port()
    }

    #[tokio::test]
    async fn a_pod_that_is_not_reached_resets_and_a_closed_port_refuses() {
        let (mut listeners, _refused) = listeners();
        let (at, port) = (IpAddr::from([127, 0, 0, 1]), free_port().await);
        listeners.open(key(80), at, port).await.unwrap();
        assert_eq!(listeners.ports(), HashMap::from([(key(80), port)]));
        let mut client = TcpStream::connect((at, port)).await.unwrap();
        let error = client.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(listeners.retain(|_| true).is_empty());
        assert_eq!(listeners.retain(|_| false), [key(80)]);
        listeners.joined().await;
        let error = TcpStream::connect((at, port)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(listeners.of_one.is_empty(), "nothing of the pod is left");
    }

    #[tokio::test]
    async fn connections_beyond_the_limit_are_refused_and_the_pod_is_told() {
        let (mut listeners, mut refused) = listeners();
        let (at, port) = (IpAddr::from([127, 0, 0, 1]), free_port().await);
        listeners.open(key(80), at, port).await.unwrap();
        let all = Arc::clone(&listeners.shared.of_all);
        let _taken = all
            .try_acquire_many_owned(OF_ALL.try_into().unwrap())
            .unwrap();
        let mut client = TcpStream::connect((at, port)).await.unwrap();
        client.read(&mut [0]).await.unwrap_err();
        let (uid, text) = refused.recv().await.unwrap();
        assert_eq!(uid.as_str(), "u-1");
        assert!(text.contains("256 relayed connections"), "{text}");
    }

    #[tokio::test]
    async fn the_clients_of_two_pods_leave_room_for_those_of_others() {
        let (listeners, _refused) = listeners();
        let pod = |number| Relayed {
            shared: listeners.shared.clone(),
            of_one: Arc::new(Semaphore::new(OF_ONE)),
            to: key(number),
        };
        let (one, other, third) = (pod(1), pod(2), pod(3));
        let all_of = |pod: &Relayed| {
            let permits = std::iter::from_fn(|| pod.permits().ok());
            permits.collect::<Vec<_>>()
        };
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
