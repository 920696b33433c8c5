//! Composition root: [`App::build`] creates everything, [`App::run`] owns all tasks, and stops and joins them.
//!
//! Order at start: configuration, API server, leadership, our own certificates, port, node, then the watches. Order at
//! the end: the controller stops taking keys and finishes its rounds, Events are written, the Lease is released. The
//! Node object and all jobs stay.

mod backend;
mod build;
mod certificates;

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use knoc_link::{LinkError, dial_in::PreparedReception};
use kube::Client;
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    agent::{
        Agent, Link,
        renew::{self, Dialer, LinkCertificate, Renewer},
        report,
        watch::AgentWatch,
    },
    certs::StartError,
    config::{Config, IdentityConfig, settings::PodIpPolicy},
    egress,
    leader::{Leader, LeaderError},
    node::{
        self, NodeError,
        unit::{Capacity, Unit},
    },
    pods::{
        ApiServer, Context, Controller, KnownPods, PodLookup, Process, References, Services, Site,
        Store,
        events::{Events, Recorder},
        queue::Queue,
        watch::PodWatch,
        watch_orphans,
    },
    relay::{self, pod_listeners},
    server::{Server, ServerError},
    stats::Stats,
};

pub use build::BuildError;

/// How long tasks may take to stop before they are aborted.
const STOP: Duration = Duration::from_secs(10);

/// Why the kubelet ended without being asked to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It could not lead the node, or leads it no longer.
    #[error("lead the node {node}")]
    Leader {
        /// The node's name.
        node: String,
        /// The error of the Lease.
        #[source]
        source: LeaderError,
    },
    /// The agent reported that another kubelet leads the node.
    #[error("another kubelet of node {node} has a newer leadership epoch")]
    Deposed {
        /// The node's name.
        node: String,
    },
    /// One of our own certificates could not be set up.
    #[error("start the {purpose} certificate")]
    Certificate {
        /// What the certificate is for.
        purpose: &'static str,
        /// The error of the certificate's task.
        #[source]
        source: StartError,
    },
    /// The kubelet API could not be served.
    #[error("serve the kubelet API")]
    Server {
        /// The error of the server.
        #[source]
        source: ServerError,
    },
    /// The kubelet cannot listen for its agent.
    #[error("listen for the agent")]
    Listen {
        /// The error of the link.
        #[source]
        source: LinkError,
    },
    /// The Node object could not be written.
    #[error("register the node")]
    Node {
        /// The error of the write.
        #[from]
        source: NodeError,
    },
}

/// One kubelet, ready to run.
#[expect(missing_debug_implementations, reason = "kube::Client has none")]
pub struct App {
    config: Config,
    kube_config: kube::Config,
    /// The client of the ServiceAccount.
    account: Client,
    /// Requests the first client certificate of the node's identity; None if the kubelet's identity is the
    /// ServiceAccount.
    bootstrap: Option<Client>,
    agent: Agent,
    dialer: Dialer,
    /// What listens for the agent, if the agent dials; taken when the kubelet leads.
    reception: Option<PreparedReception>,
    namespace: String,
    identity: String,
    internal_ip: String,
    store: Store,
}

impl App {
    /// What the kubelet knows of its pods; for tests.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Runs until `shutdown`, or until leadership is lost.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), RunError> {
        let name = self.config.node.name.clone();
        let lead = Leader::acquire(
            self.account.clone(),
            &self.namespace,
            &name,
            &self.identity,
            &shutdown,
        );
        let mut leader = match lead.await {
            Ok(leader) => leader,
            Err(LeaderError::Shutdown) => return Ok(()),
            Err(source) => return Err(RunError::Leader { node: name, source }),
        };
        tracing::info!(
            node = name,
            epoch = leader.epoch(),
            identity = self.identity,
            "leading"
        );
        self.agent.lead(leader.epoch());
        let inner = shutdown.child_token();
        let deposed = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let listening = self.listen_for_agent(&mut tasks, &inner);
        // The start may wait for days until a certificate is approved; the kubelet leads the node meanwhile.
        let start = Box::pin(async {
            if let Err(source) = listening {
                return RunError::Listen { source };
            }
            self.restore_link().await;
            match self.start(&mut tasks, &inner, &deposed).await {
                Ok(()) => std::future::pending().await,
                Err(error) => error,
            }
        });
        let ended = tokio::select! {
            biased;
            kept = leader.keep(&shutdown) => {
                kept.map_err(|source| RunError::Leader { node: name, source })
            }
            () = deposed.cancelled() => Err(RunError::Deposed { node: name }),
            error = start => Err(error),
        };
        inner.cancel();
        drain(tasks).await;
        if !matches!(
            ended,
            Err(RunError::Leader { .. } | RunError::Deposed { .. })
        ) && let Err(error) = leader.release().await
        {
            let error = knoc_proto::error::chain(&error);
            tracing::warn!(%error, "could not release the leadership Lease, the next kubelet waits until it expires");
        }
        ended
    }

    /// Uses the stored certificate of the link. While this kubelet waited for leadership, which may have been for months, another
    /// one led and renewed it.
    async fn restore_link(&self) {
        if let Some(credentials) = &self.dialer.credentials {
            renew::restore(credentials, &self.keep()).await;
        }
    }

    /// Listens for the agent, if the agent dials. A kubelet that does not lead listens for nobody.
    fn listen_for_agent(
        &mut self,
        tasks: &mut JoinSet<()>,
        shutdown: &CancellationToken,
    ) -> Result<(), LinkError> {
        let Some(prepared) = self.reception.take() else {
            return Ok(());
        };
        let reception = prepared.open()?;
        if let Some(address) = reception.local_addr() {
            tracing::info!(%address, "listening for the agent");
        }
        tasks.spawn(reception.run(shutdown.clone()));
        Ok(())
    }

    async fn start(
        &self,
        tasks: &mut JoinSet<()>,
        shutdown: &CancellationToken,
        deposed: &CancellationToken,
    ) -> Result<(), RunError> {
        let (link_to, link) = watch::channel(Link::never());
        let (capacity_to, capacity) = watch::channel(None);
        let (orphans_to, orphans) = watch::channel(0);
        let (listed_to, listed) = watch::channel(false);
        let events = self.record(tasks, shutdown);
        let own = self.certificates(tasks, shutdown, &events).await?;
        let (client, own_account) = (own.clients.node.clone(), own.clients.account.clone());
        let (queue, services) = (Queue::default(), Services::default());
        let process = Process::new(Timestamp::now(), deposed.clone());
        let certificate = self.renew(tasks, shutdown, link.clone());
        let backend = self.backend(&process, &link, &capacity, certificate.clone());
        let port = self.serve(tasks, shutdown, &own, backend).await?;
        let unit = Arc::new(Unit::new(self.node_identity(port), capacity));
        tasks.spawn(self.report(&link, &events, shutdown));
        let of_node = events.clone();
        let context = Arc::new(Context {
            api: self.api_server(client.clone(), events, services.clone()),
            site: Site {
                agent: self.agent.clone(),
                link: link.clone(),
                network: egress::Described::default(),
            },
            node: unit.clone(),
            pods: KnownPods {
                store: self.store.clone(),
                queue: queue.clone(),
                listed,
            },
            process,
        });
        let watched = node::Watched {
            certificates: own.health,
            link_certificate: certificate,
            link,
            orphans,
            events: of_node,
        };
        node::start(&unit, own.clients, watched, tasks, shutdown).await?;
        let (agent, store) = (self.agent.clone(), self.store.clone());
        let agent_watch = AgentWatch::new(agent, store, queue.clone(), link_to, capacity_to);
        let (missing_to, missing) = watch::channel(0);
        let pod_watch = PodWatch::new(context.clone(), listed_to, missing_to);
        self.relay(&context, own_account.clone(), tasks, shutdown);
        self.listen_for_pods(&context, own_account.clone(), tasks, shutdown);
        self.follow_egress(&context, own_account, tasks, shutdown);
        let token = || shutdown.clone();
        tasks.spawn(services.run(client.clone(), token()));
        tasks.spawn(context.api.references.clone().run(client, queue, token()));
        tasks.spawn(agent_watch.run(token()));
        tasks.spawn(watch_orphans(context.clone(), missing, orphans_to, token()));
        tasks.spawn(Controller::new(context).run(token()));
        tasks.spawn(pod_watch.run(token()));
        Ok(())
    }

    /// Starts the tasks for what pods open to the cluster; if the configuration turns it off, the agent is told.
    fn follow_egress(
        &self,
        context: &Context,
        client: Client,
        tasks: &mut JoinSet<()>,
        shutdown: &CancellationToken,
    ) {
        let Some(config) = self.config.egress.clone() else {
            let (agent, link) = (self.agent.clone(), context.site.link.clone());
            tasks.spawn(egress::withdraw(agent, link, shutdown.clone()));
            return;
        };
        let setup = egress::Setup {
            config,
            domain: self.config.node.cluster_domain.clone(),
            unit: Arc::clone(&context.node),
            agent: self.agent.clone(),
            link: context.site.link.clone(),
            store: self.store.clone(),
            events: context.api.events.clone(),
            node: self.config.node.name.clone(),
            described: context.site.network.clone(),
            traffic: context.process.metrics.egress.clone(),
        };
        egress::start(setup, client, context.api.services.clone(), tasks, shutdown);
    }

    /// Starts the tasks that let Services lead to pods, if the configuration has any.
    fn relay(
        &self,
        context: &Context,
        client: Client,
        tasks: &mut JoinSet<()>,
        shutdown: &CancellationToken,
    ) {
        let Some(config) = self.config.relay.clone() else {
            return;
        };
        // The node's address is one, or it was found as one.
        let Some(address) = config.address.or_else(|| self.internal_ip.parse().ok()) else {
            return;
        };
        let setup = relay::Setup {
            config,
            address,
            node: self.config.node.name.clone(),
            agent: self.agent.clone(),
            store: self.store.clone(),
            services: context.api.services.clone(),
            events: context.api.events.clone(),
            traffic: context.process.metrics.relay.clone(),
        };
        relay::start(setup, client, tasks, shutdown);
    }

    /// Starts the tasks that listen at the own addresses of pods, if the configuration says so.
    fn listen_for_pods(
        &self,
        context: &Context,
        client: Client,
        tasks: &mut JoinSet<()>,
        shutdown: &CancellationToken,
    ) {
        if !self.config.node.pod_listeners {
            return;
        }
        let setup = pod_listeners::Setup {
            unit: Arc::clone(&context.node),
            agent: self.agent.clone(),
            store: self.store.clone(),
            services: context.api.services.clone(),
            events: context.api.events.clone(),
            traffic: context.process.metrics.relay.clone(),
        };
        pod_listeners::start(setup, client, tasks, shutdown);
    }

    fn api_server(&self, client: Client, events: Events, services: Services) -> ApiServer {
        ApiServer {
            client,
            pod_lookup: self.pod_lookup(),
            events,
            services,
            references: References::default(),
        }
    }

    /// How this kubelet's identity may ask the API server whether a pod exists.
    fn pod_lookup(&self) -> PodLookup {
        match self.config.identity {
            IdentityConfig::ServiceAccount => PodLookup::Get,
            IdentityConfig::Node { .. } => PodLookup::OwnNode,
        }
    }

    fn node_identity(&self, port: u16) -> node::Identity {
        let config = &self.config.node;
        node::Identity {
            name: config.name.clone(),
            internal_ip: self.internal_ip.clone(),
            port,
            labels: config.labels.clone(),
            pods: config.pods,
            queue_factor: config.queue_factor,
            cluster_domain: config.cluster_domain.clone(),
            pod_ip: match config.pod_ip {
                PodIpPolicy::None => node::PodIp::None,
                PodIpPolicy::Node => node::PodIp::Node,
                PodIpPolicy::Own => node::PodIp::Own,
            },
            pod_range: config.pod_range,
            taint: config.taint,
            websockets: self.config.server.websockets,
        }
    }

    /// The task that tells as Events of the node why there is no link.
    fn report(
        &self,
        link: &watch::Receiver<Link>,
        events: &Events,
        shutdown: &CancellationToken,
    ) -> impl Future<Output = ()> + Send + use<> {
        let node = self.config.node.name.clone();
        report::run(link.clone(), events.clone(), node, shutdown.clone())
    }

    /// Starts the task that writes Events, as the ServiceAccount: the first Event may come before the node has a
    /// certificate.
    fn record(&self, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) -> Events {
        let (events, notes) = Events::channel();
        let recorder = Recorder::new(self.account.clone(), &self.config.node.name);
        tasks.spawn(recorder.run(notes, shutdown.clone()));
        events
    }

    /// Starts the task that renews the certificate of the link, if it has one.
    fn renew(
        &self,
        tasks: &mut JoinSet<()>,
        shutdown: &CancellationToken,
        link: watch::Receiver<Link>,
    ) -> watch::Receiver<LinkCertificate> {
        let (health_to, health) = watch::channel(LinkCertificate::default());
        let renewer = Renewer::new(
            self.agent.clone(),
            self.dialer.clone(),
            self.keep(),
            link,
            health_to,
        );
        if let Some(renewer) = renewer {
            tasks.spawn(renewer.run(shutdown.clone()));
        }
        health
    }

    /// What the kubelet API sees of the other parts.
    fn backend(
        &self,
        process: &Process,
        link: &watch::Receiver<Link>,
        capacity: &Capacity,
        certificate: watch::Receiver<LinkCertificate>,
    ) -> backend::KubeletBackend {
        backend::KubeletBackend {
            store: self.store.clone(),
            agent: self.agent.clone(),
            link: link.clone(),
            capacity: capacity.clone(),
            certificate,
            health: process.health.clone(),
            metrics: process.metrics.clone(),
            stats: Stats::new(self.agent.clone(), link.clone(), self.store.clone()),
            config: self.config.effective.clone(),
        }
    }

    /// Binds and serves the kubelet API; returns its port.
    async fn serve(
        &self,
        tasks: &mut JoinSet<()>,
        shutdown: &CancellationToken,
        own: &certificates::Own,
        backend: backend::KubeletBackend,
    ) -> Result<u16, RunError> {
        let cluster = Arc::new(crate::server::KubeCluster::new(own.clients.clone()));
        let settings = build::server_settings(&self.config, own.serving.clone());
        let server = Server::bind(settings, Arc::new(backend), cluster)
            .await
            .map_err(|source| RunError::Server { source })?;
        let address = server.local_addr();
        tracing::info!(%address, "serving the kubelet API");
        tasks.spawn(server.run(shutdown.clone()));
        Ok(address.port())
    }
}

/// Waits until all tasks have ended, and aborts them after [`STOP`].
async fn drain(mut tasks: JoinSet<()>) {
    let joined = tokio::time::timeout(STOP, async {
        while let Some(ended) = tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a task panicked");
            }
        }
    });
    if joined.await.is_err() {
        tracing::warn!(
            left = tasks.len(),
            "tasks did not stop in time and are aborted"
        );
        tasks.shutdown().await;
    }
}
