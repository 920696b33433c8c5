//! Task: lets Services of the cluster lead to pods of the node. It writes an EndpointSlice for each pod and Service, with the kubelet's
//! address and one port for each port of the pod, and forwards what is opened there, as `kubectl port-forward` does.
//!
//! ```text
//! pods (Store), Services ─────────────┐
//! NetworkPolicies, own slices ─watch─►│ round: plan (pure) ─► ports (pure) ─► listeners ─► slices ─► API server
//!                                     │             └─► one Event for each pod and reason
//!  a client in the cluster ══► kube-proxy ══► listener ══PortForward══► agent ══► shim ══► the pod's own listener
//! ```
//!
//! What is to be is a level: each round computes all of it from what is known, and writes what differs. A port is opened before
//! the slice that names it is written, and closed after that slice was removed. Everything is written as the ServiceAccount.
//!
//! Pods that no job runs, or whose job has ended, are in no slice, and nothing listens for them, so their clients are refused
//! at once. A connection that does not reach its pod is reset.

mod carry;
mod listeners;
mod plan;
mod policies;
mod ports;
mod slice;
mod watch;
mod write;

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    time::Duration,
};

use jiff::Timestamp;
use knoc_proto::ids::PodUid;
use kube::Client;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use self::{
    listeners::{Listeners, Said},
    plan::{Plan, PodPort, Refusal},
    ports::Ports,
    slice::{Change, Place},
    watch::Cluster,
};
use crate::{
    agent::Agent,
    config::RelayConfig,
    egress::told::Told,
    pods::{
        Services, Store,
        events::{Events, Note, about_pod},
    },
};

/// How long changes are gathered before a round.
const GATHER: Duration = Duration::from_millis(300);
/// When a round is repeated in which something could not be written.
const AGAIN: Duration = Duration::from_secs(5);
/// When a round is repeated in which a pod had no port: ports that were given back are free after a minute.
const NO_PORT: Duration = Duration::from_mins(1);
/// How long the removal of slices may take at the end. All tasks together have ten seconds.
const WITHDRAW: Duration = Duration::from_secs(5);
/// How many texts for pods may wait.
const SAID: usize = 64;
/// How many ports may turn out to be in use by another program before a pod's port is left for a later round.
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
    /// What connections have to say to pods.
    said: mpsc::Receiver<Said>,
    told: Told,
    /// Whether ports of an earlier process were considered.
    began: bool,
}

impl Relay {
    fn new(setup: Setup, client: Client, cluster: Cluster) -> Self {
        let (say, said) = mpsc::channel(SAID);
        Self {
            ports: Ports::new(setup.config.ports.clone()),
            listeners: Listeners::new(setup.agent.clone(), say),
            setup,
            client,
            cluster,
            said,
            told: Told::default(),
            began: false,
        }
    }

    /// Runs rounds until `shutdown`, and then withdraws the slices.
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
            tracing::warn!("the EndpointSlices of relayed pods could not be removed in time");
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
                Ok(()) = pods.changed() => due = earlier(due, gathered),
                Ok(()) = services.changed() => due = earlier(due, gathered),
                Ok(()) = cluster.changed() => due = earlier(due, gathered),
                Some((uid, text)) = self.said.recv() => self.tell(&uid, &text),
                () = self.listeners.joined() => {}
                () = sleep_until(due.unwrap_or(gathered)), if due.is_some() => {
                    due = self.round().await.map(|pause| Instant::now() + pause);
                }
            }
        }
    }

    /// Brings about what is to be now. Returns after which time it has to be tried again, if it has.
    async fn round(&mut self) -> Option<Duration> {
        if !*self.setup.services.subscribe().borrow() {
            return None;
        }
        self.rest_earlier_ports()?;
        let plan = self.plan()?;
        let refused = plan.refused.iter();
        let mut refused: Vec<_> = refused
            .map(|(uid, why)| (uid.clone(), why.to_string()))
            .collect();
        let lacking = self.open(&plan).await;
        let lacks = !lacking.is_empty();
        refused.extend(lacking);
        for (uid, why) in refused {
            self.tell(&uid, &why);
        }
        let failed = write::all(&self.client, self.changes(&plan)).await;
        self.close(&plan);
        match (failed, lacks) {
            (0, false) => None,
            (0, true) => Some(NO_PORT),
            (_, _) => Some(AGAIN),
        }
    }

    /// Before the first port is given out: those that slices of an earlier process name at our address rest. `None` until all was read.
    fn rest_earlier_ports(&mut self) -> Option<()> {
        let address = self.setup.address;
        let earlier = self.cluster.look(|_, slices| {
            let slices = slices.values().filter(|_| !self.began);
            let ports = slices.flat_map(|one| slice::ports_at(one, address));
            ports.collect::<Vec<_>>()
        })?;
        self.began = true;
        for port in earlier {
            self.ports.rest(port, Instant::now());
        }
        Some(())
    }

    fn plan(&self) -> Option<Plan> {
        let pods = self.setup.store.pods();
        let services = self.setup.services.known();
        let allow = &self.setup.config.allow;
        self.cluster
            .look(|policies, _| plan::plan(&pods, services.values(), allow, policies))
    }

    /// Opens the ports that are wanted; returns what pods whose port has none are told.
    async fn open(&mut self, plan: &Plan) -> Vec<(PodUid, String)> {
        let open = self.listeners.ports();
        let (mut lacking, mut tried) = (Vec::new(), HashSet::new());
        for endpoint in &plan.endpoints {
            for port in &endpoint.ports {
                let key = PodPort {
                    uid: endpoint.uid.clone(),
                    number: port.number,
                };
                if open.contains_key(&key) || !tried.insert(key.clone()) {
                    continue;
                }
                if !self.open_one(&key).await {
                    let (service, port) = (endpoint.service.clone(), port.number);
                    let why = Refusal::NoPort { service, port };
                    lacking.push((endpoint.uid.clone(), why.to_string()));
                }
            }
        }
        lacking
    }

    async fn open_one(&mut self, key: &PodPort) -> bool {
        for _ in 0..TRIES {
            let Some(port) = self.ports.assign(key, Instant::now()) else {
                return false;
            };
            let at = self.setup.config.listen;
            match self.listeners.open(key.clone(), at, port).await {
                Ok(()) => return true,
                Err(error) => {
                    tracing::warn!(%error, port, "a port of `relay.ports` cannot be used, trying another one");
                    self.ports.release(key, Instant::now());
                }
            }
        }
        false
    }

    fn changes(&self, plan: &Plan) -> Vec<Change> {
        let ports = self.listeners.ports();
        let place = Place {
            node: &self.setup.node,
            address: self.setup.address,
        };
        let slices = plan.endpoints.iter();
        let wanted: BTreeMap<_, _> = slices
            .filter_map(|endpoint| slice::slice(endpoint, &place, &ports))
            .collect();
        let changes = self
            .cluster
            .look(|_, stored| slice::changes(&wanted, stored));
        changes.unwrap_or_default()
    }

    /// Closes the ports that nothing leads to any more.
    fn close(&mut self, plan: &Plan) {
        let endpoints = plan.endpoints.iter();
        let wanted: HashSet<PodPort> = endpoints
            .flat_map(|endpoint| {
                endpoint.ports.iter().map(|port| PodPort {
                    uid: endpoint.uid.clone(),
                    number: port.number,
                })
            })
            .collect();
        for key in self.listeners.retain(|key| wanted.contains(key)) {
            self.ports.release(&key, Instant::now());
        }
    }

    /// Tells the pod, if it is news.
    fn tell(&mut self, uid: &PodUid, text: &str) {
        let Some(view) = self.setup.store.by_uid(uid) else {
            return;
        };
        if self.told.is_news(uid, text) {
            tracing::info!(%uid, "{text}");
            self.setup.events.record(Note {
                object: about_pod(&view.pod, ""),
                warning: true,
                reason: "RelayRefused".to_owned(),
                message: text.to_owned(),
                at: Timestamp::now(),
                salt: 0,
                times: 1,
            });
        }
    }
}

/// PURE: the earlier one of when a round is due and `other`.
fn earlier(due: Option<Instant>, other: Instant) -> Option<Instant> {
    Some(due.map_or(other, |due| due.min(other)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_never_put_off_a_round() {
        let now = Instant::now();
        assert_eq!(earlier(None, now), Some(now));
        assert_eq!(earlier(Some(now + AGAIN), now), Some(now));
        assert_eq!(earlier(Some(now), now + GATHER), Some(now));
    }
}
