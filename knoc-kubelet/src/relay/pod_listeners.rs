//! Task: listens at the own addresses of pods, on the TCP ports that they declare and those to which Services lead, or on port 80 if
//! nobody names any, and forwards connections as the relay does. The host of the kubelet takes the whole range of these addresses for
//! its own, and the cluster routes the range there (ADR 0139).
//!
//! ```text
//! pods (Store), Services, the range ───┐
//! NetworkPolicies ──────────────watch─►│ round: wanted (pure) ─► listeners
//!                                      │            └─► one Event for each pod and reason
//!  a client in the cluster ══ POD:PORT ══► listener ══PortForward══► agent ══► shim ══► the pod's own listener
//! ```
//!
//! Each round computes all listeners from what is known. One that is not wanted any more is closed, and one that is missing is opened;
//! if that fails, it is tried again after a pause. So the listeners follow the pods whatever was missed meanwhile. Nothing listens
//! before the NetworkPolicies were read.
//!
//! A pod that waits for its job, or whose job has ended, has no listener. Its host answers at the address, so clients are refused at once.

mod wanted;

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::ObjectReference;
use knoc_proto::ids::PodUid;
use kube::Client;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use self::wanted::{Listener, Wanted};
use super::{
    earlier,
    listeners::{Listeners, RefusedConnection},
    plan::PodPort,
    retries::Retries,
    watch::Cluster,
};
use crate::{
    agent::Agent,
    egress::told::{Told, Troubles},
    metrics::traffic::Direction,
    node::unit::Unit,
    pods::{
        Services, Store,
        events::{Events, Note, about_node, about_pod},
    },
};

/// How long changes are gathered before a round. It is short because Kubernetes publishes a pod as soon as it is ready; its containers
/// take longer to start once its address is known.
const GATHER: Duration = Duration::from_millis(100);
/// How many refusals of connections may wait until they are recorded as Events.
const REFUSALS: usize = 64;

/// The reason of Events about a pod for which the kubelet does not listen, and about connections that it refused.
const REFUSED: &str = "PodListenerRefused";
/// The reason of Events about a listener that could not be made.
const FAILED: &str = "PodListenerFailed";

/// What the task needs of the other parts.
#[derive(Debug)]
pub struct Setup {
    /// The node, which has the range of the addresses.
    pub unit: Arc<Unit>,
    /// The agent.
    pub agent: Agent,
    /// The pods of the node.
    pub store: Store,
    /// The Services of the cluster.
    pub services: Services,
    /// Where refusals are told.
    pub events: Events,
    /// Counts the connections.
    pub traffic: Direction,
}

/// Starts the tasks. `client` is that of the ServiceAccount.
pub fn start(setup: Setup, client: Client, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let cluster = Cluster::default();
    tasks.spawn(cluster.clone().run_policies(client, shutdown.clone()));
    tasks.spawn(PodListeners::new(setup, cluster).run(shutdown.clone()));
}

/// The listeners at the addresses of pods.
struct PodListeners {
    setup: Setup,
    cluster: Cluster,
    listeners: Listeners,
    /// Connections that were refused, and why.
    refused: mpsc::Receiver<RefusedConnection>,
    told: Told,
    troubles: Troubles,
    retries: Retries<PodPort>,
}

impl PodListeners {
    fn new(setup: Setup, cluster: Cluster) -> Self {
        let (refuse, refused) = mpsc::channel(REFUSALS);
        Self {
            listeners: Listeners::new(setup.agent.clone(), setup.traffic.clone(), refuse),
            setup,
            cluster,
            refused,
            told: Told::default(),
            troubles: Troubles::default(),
            retries: Retries::new(),
        }
    }

    /// Runs rounds until `shutdown`. All connections end with it.
    async fn run(mut self, shutdown: CancellationToken) {
        tracing::info!("the kubelet listens at the own addresses of pods");
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = self.rounds() => {}
        }
    }

    async fn rounds(&mut self) {
        let mut pods = self.setup.store.subscribe();
        let mut services = self.setup.services.subscribe();
        let mut range = self.setup.unit.subscribe_range();
        let mut cluster = self.cluster.subscribe();
        let mut due = Some(Instant::now());
        loop {
            let gathered = Instant::now() + GATHER;
            // The senders live as long as this task, so a change never fails.
            tokio::select! {
                Ok(()) = pods.changed() => due = Some(earlier(due, gathered)),
                Ok(()) = services.changed() => due = Some(earlier(due, gathered)),
                Ok(()) = range.changed() => due = Some(earlier(due, gathered)),
                Ok(()) = cluster.changed() => due = Some(earlier(due, gathered)),
                Some((uid, why)) = self.refused.recv() => self.tell(&uid, REFUSED, &why, &why),
                () = self.listeners.joined() => {}
                () = sleep_until(due.unwrap_or(gathered)), if due.is_some() => {
                    self.tell_node();
                    due = None;
                    if let Some(wanted) = self.wanted() {
                        let next = self.follow(&wanted).await;
                        // Many that fail do not make a round each.
                        due = next.map(|next| next.max(Instant::now() + GATHER));
                    }
                }
            }
        }
    }

    /// Where to listen now; `None` until the policies were read.
    fn wanted(&self) -> Option<Wanted> {
        let pods = self.setup.store.pods();
        let services = self.setup.services.known();
        let is_own = |address| self.setup.unit.is_own_pod(IpAddr::V4(address));
        self.cluster
            .look_at_policies(|policies| wanted::wanted(&pods, services.values(), is_own, policies))
    }

    /// Closes and opens listeners until they are those that are wanted. Returns when to try those again that could not be opened, or not
    /// yet.
    async fn follow(&mut self, wanted: &Wanted) -> Option<Instant> {
        for (uid, why) in &wanted.refused {
            let why = why.to_string();
            self.tell(uid, REFUSED, &why, &why);
        }
        let open = self.listeners.addresses();
        // A pod that was requeued may have another address.
        let closed = self.listeners.retain(|key| {
            let wanted = wanted.listeners.get(key);
            wanted.is_some_and(|listener| open.get(key) == Some(&listener.at))
        });
        // The tasks of these drop their sockets only after this round. Another pod that has the address now waits for the next one.
        let closing: HashSet<SocketAddr> = closed
            .iter()
            .filter_map(|key| open.get(key).copied())
            .collect();
        let open = self.listeners.addresses();
        let missing = wanted.listeners.iter();
        let missing: Vec<_> = missing
            .filter(|(key, _)| !open.contains_key(*key))
            .collect();
        let pending: HashSet<_> = missing.iter().map(|(key, _)| (*key).clone()).collect();
        self.retries.keep(&pending);
        let now = Instant::now();
        let mut again = None;
        for (key, listener) in missing {
            let (namespace, at) = (&listener.namespace, listener.at);
            if closing.contains(&at) {
                again = Some(now);
                continue;
            }
            if !self.retries.is_due(key, now) {
                continue;
            }
            match self.listeners.open(key.clone(), namespace, at).await {
                Ok(()) => self.retries.succeeded(key),
                Err(error) => self.failed(key, listener, &error),
            }
        }
        again.or_else(|| self.retries.next())
    }

    /// Tells the pod, once for each kind of error, if it names the port, and lets the listener wait.
    fn failed(&mut self, key: &PodPort, listener: &Listener, error: &io::Error) {
        let jitter = rand::random_range(0.5..1.5);
        self.retries.failed(key.clone(), Instant::now(), jitter);
        if !listener.named {
            return;
        }
        let text = wanted::failure(listener.at, self.setup.unit.own_range(), error);
        let cause = format!("cannot listen: {:?}", error.kind());
        self.tell(&key.uid, FAILED, &cause, &text);
    }

    /// Records an Event of the pod, unless there was one with this cause before.
    fn tell(&mut self, uid: &PodUid, reason: &str, cause: &str, text: &str) {
        let Some(view) = self.setup.store.by_uid(uid) else {
            return;
        };
        if self.told.is_news(uid, cause) {
            tracing::info!(%uid, "{text}");
            self.warn(about_pod(&view.pod, ""), reason, text.to_owned());
        }
    }

    /// Tells the node what keeps clients from its pods, as far as that is news.
    fn tell_node(&mut self) {
        let text = "the kubelet does not listen at the addresses of pods, or not as the NetworkPolicies are now: its ServiceAccount may not \
                    list and watch networkpolicies; upgrade the chart together with the kubelet, or set `node.podListeners` to false";
        let denied = self.cluster.policies_denied();
        let now = denied.then(|| text.to_owned()).into_iter().collect();
        for text in self.troubles.news(now) {
            tracing::warn!("{text}");
            let node = about_node(self.setup.unit.name());
            self.warn(node, "PodListenersUnavailable", text);
        }
    }

    fn warn(&self, object: ObjectReference, reason: &str, message: String) {
        let note = Note::warning(object, reason, message);
        self.setup.events.record(note);
    }
}

#[cfg(test)]
mod tests;
