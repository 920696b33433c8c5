//! Task: lets Services of the cluster lead to pods of the node. It writes an EndpointSlice for each pod and Service, which has the
//! kubelet's address and a port of the kubelet for each port of the pod, and forwards the connections to these ports as
//! `kubectl port-forward` does.
//!
//! ```text
//! pods (Store), Services ─────────────┐
//! NetworkPolicies, own slices ─watch─►│ round: plan (pure) ─► ports (pure) ─► listeners ─► slices ─► API server
//!                                     │             └─► one Event for each pod and reason
//!  a client in the cluster ══► kube-proxy ══► listener ══PortForward══► agent ══► shim ══► the pod's own listener
//! ```
//!
//! Each round computes all slices from what is known, and writes those that differ from the stored ones. A port is opened before
//! the slice that names it is written, and closed after the slice was deleted, or before if a NetworkPolicy selects the pod. The slices are
//! written as the ServiceAccount.
//!
//! A pod that waits for its job, or whose job has ended, is in no slice and has no port, so its clients are refused at once. A
//! connection that does not reach its pod is reset.

mod carry;
mod idle;
mod listeners;
mod places;
mod plan;
pub mod pod_listeners;
mod policies;
mod ports;
mod retries;
mod slice;
mod watch;
mod write;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
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
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use self::{
    listeners::{Listeners, RefusedConnection},
    plan::{NoPort, Plan, PodPort, Refusal},
    ports::Ports,
    retries::Retries,
    slice::{Change, Publisher},
    watch::Cluster,
};
use crate::{
    agent::Agent,
    config::RelayConfig,
    egress::{
        table::Name,
        told::{Told, Troubles},
    },
    metrics::traffic::Direction,
    pods::{
        Services, Store,
        events::{Events, Note, about_node, about_pod},
    },
};

/// How long changes are gathered before a round.
const GATHER: Duration = Duration::from_millis(300);
/// When a round is repeated in which there was no port left for a pod: ports that were given back are free after a minute.
const NO_PORT: Duration = Duration::from_mins(1);
/// How long deleting the slices may take when the kubelet stops. All tasks together have ten seconds.
const WITHDRAW: Duration = Duration::from_secs(5);
/// How many refusals of connections may wait until they are recorded as Events.
const REFUSALS: usize = 64;
/// How many ports may turn out to be in use by another program before a pod has to wait for a later round.
const TRIES: usize = 4;

/// What the task needs of the other parts.
#[derive(Debug)]
pub struct Setup {
    /// Which Services are relayed, and where.
    pub config: RelayConfig,
    /// The address at which the cluster reaches this kubelet.
    pub address: IpAddr,
    /// The name of the node.
    pub node: String,
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
    let (watched, node) = (cluster.clone(), setup.node.clone());
    tasks.spawn(watched.run(client.clone(), node, shutdown.clone()));
    tasks.spawn(Relay::new(setup, client, cluster).run(shutdown.clone()));
}

/// The relayed ports and their slices.
struct Relay {
    setup: Setup,
    client: Client,
    cluster: Cluster,
    ports: Ports,
    listeners: Listeners,
    /// Connections that were refused, and why.
    refused: mpsc::Receiver<RefusedConnection>,
    told: Told,
    troubles: Troubles,
    retries: Retries<Name>,
}

impl Relay {
    fn new(setup: Setup, client: Client, cluster: Cluster) -> Self {
        let (refuse, refused) = mpsc::channel(REFUSALS);
        Self {
            ports: Ports::new(setup.config.ports.clone()),
            listeners: Listeners::new(setup.agent.clone(), setup.traffic.clone(), refuse),
            setup,
            client,
            cluster,
            refused,
            told: Told::default(),
            troubles: Troubles::default(),
            retries: Retries::new(),
        }
    }

    /// Runs rounds until `shutdown`, and then deletes the slices.
    async fn run(mut self, shutdown: CancellationToken) {
        tracing::info!(address = %self.setup.address, "Services can lead to pods of this node");
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = self.rounds() => {}
        }
        let (client, node) = (&self.client, &self.setup.node);
        let withdrawn = write::withdraw(client, node, self.setup.address);
        if timeout(WITHDRAW, withdrawn).await.is_err() {
            tracing::warn!("the EndpointSlices of relayed pods could not be deleted in time");
        }
    }

    async fn rounds(&mut self) {
        let mut pods = self.setup.store.subscribe();
        let mut services = self.setup.services.subscribe();
        let mut cluster = self.cluster.subscribe();
        let mut due = Some(Instant::now());
        loop {
            let gathered = Instant::now() + GATHER;
            // The senders live as long as this task, so a change never fails.
            tokio::select! {
                Ok(()) = pods.changed() => due = Some(earlier(due, gathered)),
                Ok(()) = services.changed() => due = Some(earlier(due, gathered)),
                Ok(()) = cluster.changed() => due = Some(earlier(due, gathered)),
                Some((uid, why)) = self.refused.recv() => self.tell(&uid, &why),
                () = self.listeners.joined() => {}
                () = sleep_until(due.unwrap_or(gathered)), if due.is_some() => {
                    due = self.round().await;
                }
            }
        }
    }

    /// Opens and closes ports and writes slices, as the pods, Services and policies now demand. Returns when to run again without
    /// a change.
    async fn round(&mut self) -> Option<Instant> {
        self.tell_node();
        if !*self.setup.services.subscribe().borrow() {
            return None;
        }
        self.rest_named_ports()?;
        let plan = self.plan()?;
        let refused = plan.refused.iter();
        let mut refused: Vec<_> = refused
            .map(|(uid, why)| (uid.clone(), why.to_string()))
            .collect();
        let without_port = self.open(&plan).await;
        let again = (!without_port.is_empty()).then(|| Instant::now() + NO_PORT);
        refused.extend(without_port);
        for (uid, why) in refused {
            self.tell(&uid, &why);
        }
        // A policy applies even if the API server does not delete the slices soon.
        let isolated = plan.isolated();
        self.close(|key| !isolated.contains(&key.uid));
        let soon = (!self.write(&plan).await).then(Instant::now);
        let wanted = plan.ports();
        self.close(|key| wanted.contains(key));
        [again, soon, self.retries.next()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Writes the slices that differ, apart from those whose last write has just failed. Whether there was time for all of them.
    async fn write(&mut self, plan: &Plan) -> bool {
        let mut changes = self.changes(plan);
        let now = Instant::now();
        let pending = changes.iter().map(|change| change.name().clone());
        self.retries.keep(&pending.collect());
        changes.retain(|change| self.retries.is_due(change.name(), now));
        let count = changes.len();
        let written = write::all(&self.client, changes).await;
        let all_tried = written.done.len() + written.failed.len() == count;
        for name in &written.done {
            self.retries.succeeded(name);
        }
        for name in written.failed {
            let jitter = rand::random_range(0.5..1.5);
            self.retries.failed(name, Instant::now(), jitter);
        }
        for rejected in written.rejected {
            self.tell_once(&rejected.pod, &rejected.cause(), rejected.to_string());
        }
        all_tried
    }

    /// Lets the ports rest that slices name at our address and no pod has any more, so that nobody's clients reach another pod. `None`
    /// until the policies and slices were read.
    fn rest_named_ports(&mut self) -> Option<()> {
        let address = self.setup.address;
        let named = self.cluster.look(|_, slices| {
            let ports = slices.iter().flat_map(|(name, one)| {
                let ports = slice::ports_at(one, address).into_iter();
                ports.map(move |port| (port, Arc::clone(&name.namespace)))
            });
            ports.collect::<HashMap<_, _>>()
        })?;
        self.ports.rest(&named, Instant::now());
        Some(())
    }

    fn plan(&self) -> Option<Plan> {
        let pods = self.setup.store.pods();
        let services = self.setup.services.known();
        let family = slice::family(self.setup.address);
        let which = (&self.setup.config.allow, family);
        self.cluster
            .look(|policies, _| plan::plan(&pods, services.values(), which, policies))
    }

    /// Opens the ports that are wanted. Returns the pods for which there was none, and why.
    async fn open(&mut self, plan: &Plan) -> Vec<(PodUid, String)> {
        let open = self.listeners.ports();
        let (mut without, mut tried) = (Vec::new(), HashSet::new());
        for endpoint in &plan.endpoints {
            for port in &endpoint.ports {
                let key = PodPort {
                    uid: endpoint.uid.clone(),
                    number: port.number,
                };
                if open.contains_key(&key) || !tried.insert(key.clone()) {
                    continue;
                }
                let namespace = &endpoint.service.namespace;
                if let Err(why) = self.open_one(&key, namespace).await {
                    let (service, port) = (endpoint.service.clone(), port.number);
                    let why = Refusal::NoPort { service, port, why };
                    without.push((endpoint.uid.clone(), why.to_string()));
                }
            }
        }
        without
    }

    async fn open_one(&mut self, key: &PodPort, namespace: &Arc<str>) -> Result<(), NoPort> {
        for _ in 0..TRIES {
            let port = self.ports.assign(key, namespace, Instant::now())?;
            let at = SocketAddr::new(self.setup.config.listen, port);
            match self.listeners.open(key.clone(), namespace, at).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::warn!(%error, port, "a port of `relay.ports` cannot be used, trying another one");
                    self.ports.set_aside(key, Instant::now());
                }
            }
        }
        Err(NoPort::All)
    }

    fn changes(&self, plan: &Plan) -> Vec<Change> {
        let ports = self.listeners.ports();
        let publisher = Publisher {
            node: &self.setup.node,
            address: self.setup.address,
        };
        let slices = plan.endpoints.iter();
        let wanted: BTreeMap<_, _> = slices
            .filter_map(|endpoint| slice::slice(endpoint, &publisher, &ports))
            .collect();
        let changes = self
            .cluster
            .look(|_, stored| slice::changes(&wanted, stored));
        changes.unwrap_or_default()
    }

    /// Closes all ports but those that are wanted.
    fn close(&mut self, wanted: impl Fn(&PodPort) -> bool) {
        for key in self.listeners.retain(wanted) {
            self.ports.release(&key, Instant::now());
        }
    }

    /// Records an Event of the pod, unless there was the same before.
    fn tell(&mut self, uid: &PodUid, text: &str) {
        self.tell_once(uid, text, text.to_owned());
    }

    /// Records an Event of the pod, unless there was one with this cause before.
    fn tell_once(&mut self, uid: &PodUid, cause: &str, text: String) {
        let Some(view) = self.setup.store.by_uid(uid) else {
            return;
        };
        if self.told.is_news(uid, cause) {
            tracing::info!(%uid, "{text}");
            self.warn(about_pod(&view.pod, ""), "RelayRefused", text);
        }
    }

    /// Tells the node what keeps Services from its pods, as far as that is news.
    fn tell_node(&mut self) {
        for text in self.troubles.news(self.cluster.troubles()) {
            tracing::warn!("{text}");
            self.warn(about_node(&self.setup.node), "RelayUnavailable", text);
        }
    }

    fn warn(&self, object: ObjectReference, reason: &str, message: String) {
        let note = Note::warning(object, reason, message);
        self.setup.events.record(note);
    }
}

/// PURE: the earlier of the time at which a round is due and `other`.
fn earlier(due: Option<Instant>, other: Instant) -> Instant {
    due.map_or(other, |due| due.min(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_never_put_off_a_round() {
        let now = Instant::now();
        assert_eq!(earlier(None, now), now);
        assert_eq!(earlier(Some(now + NO_PORT), now), now);
        assert_eq!(earlier(Some(now), now + GATHER), now);
    }
}
