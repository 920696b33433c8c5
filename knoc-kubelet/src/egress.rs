//! Task: what pods open to the cluster. It describes the cluster's network to the agent, decides about each connection from
//! what it watches itself, dials an endpoint of the Service, and carries the bytes.
//!
//! ```text
//! Services, EndpointSlices, Nodes, ServiceCIDRs ─watch─► Cluster ─network────► WatchEgress ──► agent ──► shims
//!                                                           │  ◄──attempts────
//!                                        decide (pure) ◄────┘
//!                                           ├─► refusal, and one Event for each pod and reason; the same if no endpoint answers
//!                                           ├─► redirection to a pod of the node, which the shim reaches by itself
//!                                           └─► carry: dial the endpoint ═EgressStream═► the pod
//! ```
//!
//! A second task ([`names`]) looks whether the API server's certificate names what pods are told to use.
//!
//! A connection does not depend on the call that announced it: it goes on while `WatchEgress` is opened again.

mod carry;
mod decide;
mod names;
mod own_pod;
mod refused;
pub(crate) mod table;
pub(crate) mod told;
pub(crate) mod watch;

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use knoc_proto::{
    error::chain,
    ids::PodUid,
    pb::{self, egress_control::Control},
};
use kube::Client;
use tokio::{
    sync::{
        mpsc::{self, error::TrySendError},
        watch as channel,
    },
    task::{Id, JoinError, JoinSet},
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use self::{
    carry::{Connection, Failed},
    names::Names,
    refused::Refused,
    told::{Told, Troubles},
    watch::Cluster,
};
use crate::{
    agent::{Agent, Link},
    config::EgressConfig,
    metrics::traffic::Direction,
    node::unit::Unit,
    pods::{
        Services, Store,
        events::{Events, Note, about_node, about_pod},
    },
};

/// The capability of agents that serve it.
const CAPABILITY: &str = "egress";
/// The most open connections of one pod.
const OF_ONE: usize = 768;
/// The most open connections of all pods: the link has 2048 streams, and relayed connections, logs and commands need some.
const OF_ALL: usize = 1280;
/// From this number on, a pod that has its share gets no more, so that two pods cannot keep out all others.
const CROWDED: usize = OF_ALL / 4 * 3;
const SHARE: usize = 32;
/// The last ones are for namespaces whose pods have fewer than [`OF_NAMESPACE`], so that one namespace with many pods cannot keep out all
/// others.
const LAST: usize = OF_ALL / 10;
const OF_NAMESPACE: usize = SHARE;
/// How many messages to the agent may wait. A refusal beyond them is dropped: the connection then ends at the shim's deadline.
const CONTROLS: usize = 1024;
/// How long changes of the network are gathered.
const GATHER: Duration = Duration::from_millis(300);
/// The pause before the first attempt to call the agent again; each further one is twice as long.
const AGAIN: Duration = Duration::from_millis(200);
const AGAIN_MOST: Duration = Duration::from_secs(5);
/// How long the agent may take to begin its answer.
const ANSWER: Duration = Duration::from_secs(20);

/// How long a new pod waits until the agent has the cluster's network. Without it the pod reaches nothing of the cluster.
const DESCRIBED: Duration = Duration::from_secs(5);

/// Whether the agent has the cluster's network; clones are handles on the same fact. By default nobody describes it.
#[derive(Debug, Clone)]
pub struct Described(channel::Sender<Option<bool>>);

impl Default for Described {
    fn default() -> Self {
        Self(channel::Sender::new(None))
    }
}

impl Described {
    /// Waits until the agent has it, for a bounded time.
    pub(crate) async fn wait(&self, link: &channel::Receiver<Link>) {
        if !link.borrow().serves(CAPABILITY) {
            return;
        }
        let mut described = self.0.subscribe();
        if timeout(DESCRIBED, described.wait_for(|it| *it != Some(false)))
            .await
            .is_err()
        {
            tracing::warn!(
                "the cluster's Services could not be described to the agent in time: a pod starts without a way to them"
            );
        }
    }
}

/// What the task needs of the other parts.
#[derive(Debug)]
pub struct Setup {
    /// What pods may reach.
    pub config: EgressConfig,
    /// The DNS domain of the cluster.
    pub domain: String,
    /// The node, whose pods may have addresses of their own.
    pub unit: Arc<Unit>,
    /// The agent.
    pub agent: Agent,
    /// The state of the link to it.
    pub link: channel::Receiver<Link>,
    /// The pods of the node.
    pub store: Store,
    /// Where refusals are told, and what keeps pods from the cluster.
    pub events: Events,
    /// The name of the node.
    pub node: String,
    /// Is told when the agent has the cluster's network.
    pub described: Described,
    /// Counts the connections.
    pub traffic: Direction,
}

/// Starts the tasks. `client` is that of the ServiceAccount.
pub fn start(
    setup: Setup,
    client: Client,
    services: Services,
    tasks: &mut JoinSet<()>,
    shutdown: &CancellationToken,
) {
    setup.described.0.send_replace(Some(false));
    let cluster = Cluster::new();
    let ranges = setup.config.service_ranges.clone();
    tasks.spawn(
        cluster
            .clone()
            .run(client, services, ranges, shutdown.clone()),
    );
    tasks.spawn(Names::new(&setup, cluster.clone()).run(shutdown.clone()));
    tasks.spawn(Connections::new(setup, cluster).run(shutdown.clone()));
}

/// Task: says that pods reach nothing of the cluster, until `shutdown`. The agent may remember a network from before.
pub async fn withdraw(agent: Agent, link: channel::Receiver<Link>, shutdown: CancellationToken) {
    tokio::select! {
        biased;
        () = shutdown.cancelled() => {}
        () = describe_nothing(&agent, link) => {}
    }
}

async fn describe_nothing(agent: &Agent, mut link: channel::Receiver<Link>) {
    loop {
        able(&mut link).await;
        let ended = async {
            let (_controls, mut attempts) = call(agent, pb::EgressNetwork::default()).await?;
            // Nobody dials: what still waits is reset by its shim.
            while attempts.message().await?.is_some() {}
            Ok::<_, Status>(())
        };
        if let Err(status) = ended.await {
            tracing::info!(
                error = chain(&status),
                "the agent was not told that pods reach nothing of the cluster, trying again"
            );
        }
        tokio::time::sleep(AGAIN_MOST.mul_f64(rand::random_range(0.5..1.5))).await;
    }
}

/// Calls `WatchEgress` with this network. The call ends if either part of the result is dropped.
async fn call(
    agent: &Agent,
    network: pb::EgressNetwork,
) -> Result<
    (
        mpsc::Sender<pb::EgressControl>,
        Streaming<pb::EgressAttempt>,
    ),
    Status,
> {
    let (controls, sent) = mpsc::channel(CONTROLS);
    let first = pb::EgressControl {
        caller: Some(agent.egress_caller()),
        ..control(Control::Network(network))
    };
    // The channel is empty.
    controls.send(first).await.ok();
    let mut client = agent.control();
    let answer = timeout(ANSWER, client.watch_egress(ReceiverStream::new(sent))).await;
    let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")));
    Ok((controls, answer?.into_inner()))
}

/// The open connections of all pods.
#[derive(Debug)]
struct Connections {
    setup: Setup,
    cluster: Cluster,
    carried: JoinSet<Ended>,
    /// Whose connection each task carries: the pod, and its namespace.
    pods: HashMap<Id, (PodUid, Arc<str>)>,
    /// How many connections each pod has.
    open: HashMap<PodUid, usize>,
    /// How many the pods of each namespace have.
    of_namespace: HashMap<Arc<str>, usize>,
    told: Told,
    troubles: Troubles,
}

/// How a connection ended.
#[derive(Debug)]
struct Ended {
    id: u64,
    failed: Option<Failed>,
}

impl Connections {
    fn new(setup: Setup, cluster: Cluster) -> Self {
        Self {
            setup,
            cluster,
            carried: JoinSet::new(),
            pods: HashMap::new(),
            open: HashMap::new(),
            of_namespace: HashMap::new(),
            told: Told::default(),
            troubles: Troubles::default(),
        }
    }

    /// Follows the agent's calls until `shutdown`.
    async fn run(mut self, shutdown: CancellationToken) {
        let mut pause = AGAIN;
        loop {
            let began = Instant::now();
            let ended = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                ended = self.session() => ended,
            };
            // Another agent may answer next, which does not have the network yet.
            self.setup.described.0.send_replace(Some(false));
            if let Err(status) = &ended {
                tracing::info!(
                    error = chain(status),
                    "the agent announces no connections of pods, trying again"
                );
            }
            if began.elapsed() > AGAIN_MOST {
                pause = AGAIN;
            }
            let wait = pause.mul_f64(rand::random_range(0.5..1.5));
            pause = (pause * 2).min(AGAIN_MOST);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// One call of `WatchEgress`, from the moment at which the agent can serve it.
    async fn session(&mut self) -> Result<(), Status> {
        able(&mut self.setup.link).await;
        let mut changed = self.cluster.subscribe();
        let mut network = self.first_network(&mut changed).await;
        self.setup.described.0.send_replace(Some(false));
        let (controls, mut attempts) = call(&self.setup.agent, network.clone()).await?;
        self.setup.described.0.send_replace(Some(true));
        self.tell(&network);
        let mut due = None;
        loop {
            tokio::select! {
                attempt = attempts.message() => match attempt? {
                    Some(attempt) => self.take(&attempt, &controls),
                    None => return Ok(()),
                },
                Some(ended) = self.carried.join_next_with_id() => self.ended(ended, &controls),
                Ok(()) = changed.changed(), if due.is_none() => due = Some(Instant::now() + GATHER),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    due = None;
                    self.tell_node();
                    if let Some(newest) = self.network().filter(|newest| *newest != network) {
                        match controls.try_send(control(Control::Network(newest.clone()))) {
                            Ok(()) => network = newest,
                            // The agent may itself wait until its attempts are read, so this does not wait for it.
                            Err(TrySendError::Full(_)) => due = Some(Instant::now() + GATHER),
                            Err(TrySendError::Closed(_)) => return Ok(()),
                        }
                    }
                }
            }
        }
    }

    fn tell(&self, network: &pb::EgressNetwork) {
        tracing::info!(ranges = ?network.ranges, dns = network.dns, "pods can reach the cluster");
        let configured = self.setup.config.dns;
        if let Some(unused) = configured.filter(|dns| dns.to_string() != network.dns) {
            tracing::warn!(
                "pods do not ask {unused} (`egress.dns`): it is in none of the ranges, or `egress.allow` does not have its Service"
            );
        }
    }

    /// The network, once it is known.
    async fn first_network(&mut self, changed: &mut channel::Receiver<()>) -> pb::EgressNetwork {
        loop {
            changed.mark_unchanged();
            // Asked first, because the rest may be read meanwhile.
            let is_vain = self.cluster.is_denied() || self.cluster.look(|_| ()).is_some();
            if let Some(network) = self.network() {
                self.tell_node();
                return network;
            }
            if is_vain {
                // No range is known or a permission is missing, so pods would wait for nothing.
                self.setup.described.0.send_replace(None);
            }
            self.tell_node();
            // It ends only with the process.
            changed.changed().await.ok();
        }
    }

    /// Tells the node what keeps pods from the cluster, as far as that is news.
    fn tell_node(&mut self) {
        let mut troubles = self.cluster.troubles();
        troubles.extend(self.hidden_services());
        for message in self.troubles.news(troubles) {
            tracing::warn!("{message}");
            let object = about_node(&self.setup.node);
            let note = Note::warning(object, "EgressUnavailable", message);
            self.setup.events.record(note);
        }
    }

    fn network(&self) -> Option<pb::EgressNetwork> {
        let EgressConfig {
            allow,
            pod_ranges,
            dns,
            ..
        } = &self.setup.config;
        let domain = self.setup.domain.as_str();
        let network = self.cluster.look(|state| {
            decide::network(
                &state.table,
                &state.around,
                allow,
                pod_ranges,
                (*dns, domain),
            )
        });
        network.flatten()
    }

    /// Opens the connection, or refuses it.
    fn take(&mut self, attempt: &pb::EgressAttempt, controls: &mpsc::Sender<pb::EgressControl>) {
        // The agent checks UIDs.
        let Ok(uid) = PodUid::try_from(attempt.uid.as_str()) else {
            return;
        };
        if self.send_back(&uid, attempt, controls) {
            return;
        }
        match self.decide(&uid, attempt) {
            Ok(connection) => self.carry(connection),
            Err(refused) => {
                self.setup.traffic.refused(refused.reason());
                self.refuse(&uid, attempt.id, &refused.to_string(), controls);
            }
        }
    }

    fn decide(&self, uid: &PodUid, attempt: &pb::EgressAttempt) -> Result<Connection, Refused> {
        let of_pod = self.open.get(uid).copied().unwrap_or_default();
        let namespace = self.namespace_of(uid);
        let of_namespace = self.of_namespace.get(&namespace).copied();
        let of_namespace = of_namespace.unwrap_or_default();
        has_room(self.carried.len(), of_pod, of_namespace)?;
        let malformed = || Refused::Malformed(attempt.address.clone());
        let to = (target(attempt).ok_or_else(malformed)?, attempt.protocol());
        let allow = &self.setup.config.allow;
        let random = rand::random::<u64>();
        let decided = self.cluster.look(|state| {
            decide::decide(
                &state.table,
                allow,
                &state.around,
                to,
                (uid.as_str(), random),
            )
        });
        let dial = decided.ok_or(Refused::NotRead)??;
        // Nobody but a shim reaches it: for the kubelet, another host may have the address.
        if self.setup.unit.is_own_pod(dial.endpoint.ip()) {
            return Err(Refused::OwnPod(dial.service));
        }
        Ok(Connection {
            uid: uid.clone(),
            namespace,
            id: attempt.id,
            protocol: attempt.protocol(),
            dial,
        })
    }

    /// The namespace of the pod; empty if the pod is not known, or not known any more.
    fn namespace_of(&self, uid: &PodUid) -> Arc<str> {
        let view = self.setup.store.by_uid(uid);
        let namespace = view.as_ref().and_then(|view| {
            let namespace = view.pod.metadata.namespace.as_deref()?;
            Some(Arc::from(namespace))
        });
        namespace.unwrap_or_else(|| Arc::from(""))
    }

    fn carry(&mut self, connection: Connection) {
        let (agent, uid) = (self.setup.agent.clone(), connection.uid.clone());
        let namespace = Arc::clone(&connection.namespace);
        tracing::debug!(%uid, service = %connection.dial.service, endpoint = %connection.dial.endpoint, "a pod connects");
        let traffic = self.setup.traffic.clone();
        let carry = async move {
            let failed = carry::run(&agent, &connection, &traffic).await.err();
            Ended {
                id: connection.id,
                failed,
            }
        };
        let task = self.carried.spawn(Box::pin(carry)).id();
        *self.open.entry(uid.clone()).or_default() += 1;
        let of_namespace = self.of_namespace.entry(Arc::clone(&namespace));
        *of_namespace.or_default() += 1;
        self.pods.insert(task, (uid, namespace));
    }

    fn ended(
        &mut self,
        ended: Result<(Id, Ended), JoinError>,
        controls: &mpsc::Sender<pb::EgressControl>,
    ) {
        let (task, ended) = match ended {
            Ok((task, ended)) => (task, Some(ended)),
            Err(error) => {
                tracing::error!(%error, "the task of a pod's connection panicked");
                (error.id(), None)
            }
        };
        let Some((uid, namespace)) = self.pods.remove(&task) else {
            return;
        };
        one_less(&mut self.open, &uid);
        one_less(&mut self.of_namespace, &namespace);
        let Some(Ended {
            id,
            failed: Some(failed),
        }) = ended
        else {
            return;
        };
        self.setup.traffic.refused(failed.reason());
        match &failed {
            Failed::Policy { .. } => self.refuse(&uid, id, &failed.to_string(), controls),
            Failed::Dial { service, port, .. } => {
                pass_refusal(&uid, id, controls);
                // The endpoints of a Service that does not answer are one thing to tell.
                let target = format!("dial {service} {port}");
                let message = format!(
                    "A connection to the cluster failed: {}. Does the endpoint listen, and may the kubelet's pod reach it \
                     (NetworkPolicy)?",
                    chain(&failed)
                );
                self.tell_pod(&uid, &target, "EgressFailed", message);
            }
            Failed::Pod { .. } => {
                tracing::debug!(%uid, error = chain(&failed), "a connection of a pod was not made");
                pass_refusal(&uid, id, controls);
            }
        }
    }

    /// Refuses a connection, and tells the pod why if it is news.
    fn refuse(
        &mut self,
        uid: &PodUid,
        id: u64,
        why: &str,
        controls: &mpsc::Sender<pb::EgressControl>,
    ) {
        pass_refusal(uid, id, controls);
        let message = format!("A connection to the cluster was refused: {why}");
        self.tell_pod(uid, why, "EgressRefused", message);
    }

    /// Tells the pod about one of its connections, once for each `what`.
    fn tell_pod(&mut self, uid: &PodUid, what: &str, reason: &str, message: String) {
        let Some(view) = self.setup.store.by_uid(uid) else {
            return;
        };
        if self.told.is_news(uid, what) {
            tracing::info!(%uid, "{message}");
            let note = Note::warning(about_pod(&view.pod, ""), reason, message);
            self.setup.events.record(note);
        }
    }
}

/// PURE: what the pod has dialled; `None` if that cannot exist.
fn target(attempt: &pb::EgressAttempt) -> Option<SocketAddr> {
    let address: IpAddr = attempt.address.parse().ok()?;
    let port = u16::try_from(attempt.port).ok()?;
    Some(SocketAddr::new(address.to_canonical(), port))
}

/// PURE: one connection less; whoever has none is forgotten.
fn one_less<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            counts.remove(key);
        }
    }
}

/// PURE: may a pod that has `of_pod` of `all` open connections, and whose namespace has `of_namespace`, have one more?
fn has_room(all: usize, of_pod: usize, of_namespace: usize) -> Result<(), Refused> {
    if all >= OF_ALL {
        Err(Refused::ManyOfNode)
    } else if of_pod >= OF_ONE {
        Err(Refused::ManyOfPod)
    } else if all >= CROWDED && of_pod >= SHARE {
        Err(Refused::Crowded)
    } else if all >= OF_ALL - LAST && of_namespace >= OF_NAMESPACE {
        Err(Refused::ManyOfNamespace)
    } else {
        Ok(())
    }
}

/// Waits until there is a link to an agent that can serve it.
async fn able(link: &mut channel::Receiver<Link>) {
    if link.wait_for(|it| it.serves(CAPABILITY)).await.is_err() {
        // The process ends.
        std::future::pending::<()>().await;
    }
}

fn pass_refusal(uid: &PodUid, id: u64, controls: &mpsc::Sender<pb::EgressControl>) {
    let uid = uid.to_string();
    controls
        .try_send(control(Control::Refusal(pb::EgressRefusal { uid, id })))
        .ok();
}

fn control(control: Control) -> pb::EgressControl {
    pb::EgressControl {
        control: Some(control),
        caller: None,
    }
}

#[cfg(test)]
mod tests;
