//! What all workers of one node share, grouped by concept.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use knoc_proto::pb;
use kube::Client;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::loop_health::LoopHealth;
use crate::{
    agent::{Agent, Link},
    egress::Described,
    metrics::Metrics,
    node::unit::Unit,
    pods::{
        events::Events, presence::PodLookup, queue::Queue, references::References,
        services::Services, store::Store,
    },
};

/// Pods turn unready only after the link was down for this long: a restarted agent is back sooner.
pub(crate) const UNREACHABLE_AFTER: Duration = Duration::from_secs(10);

/// What all workers of one node share.
#[expect(missing_debug_implementations, reason = "kube::Client has none")]
pub struct Context {
    /// Clients of the API server.
    pub api: ApiServer,
    /// The agent and the link to it.
    pub site: Site,
    /// The node that the pods run on.
    pub node: Arc<Unit>,
    /// What is known about the pods from Kubernetes and from the agent.
    pub pods: KnownPods,
    /// The state of this process.
    pub process: Process,
}

/// How the workers reach the API server.
#[expect(missing_debug_implementations, reason = "kube::Client has none")]
pub struct ApiServer {
    /// The client with the kubelet's credentials.
    pub client: Client,
    /// How the API server is asked whether a pod still exists.
    pub pod_lookup: PodLookup,
    /// The channel to the task that writes Events.
    pub events: Events,
    /// The Services from which environment variables are made.
    pub services: Services,
    /// The `ConfigMaps` and Secrets to which pods refer.
    pub references: References,
}

/// The agent and the link to it.
#[derive(Debug)]
pub struct Site {
    /// The client of the agent.
    pub agent: Agent,
    /// Whether the link is up.
    pub link: watch::Receiver<Link>,
    /// Whether the agent has the cluster's network, with which it starts pods.
    pub network: Described,
}

/// The pods as Kubernetes and the agent know them, and which of them to reconcile next.
#[derive(Debug)]
pub struct KnownPods {
    /// The pods as Kubernetes wants them and as the agent observed them.
    pub store: Store,
    /// The pods to reconcile next.
    pub queue: Queue,
    /// Whether the first list of pods has been read completely.
    pub listed: watch::Receiver<bool>,
}

/// This process: its start, its end, and what it reports about itself.
#[derive(Debug)]
pub struct Process {
    /// When this process started: Events of older notes were written by an earlier process.
    pub started: Timestamp,
    /// Cancelled when another kubelet has become the leader.
    pub deposed: CancellationToken,
    /// Whether the controller's loop progresses.
    pub health: LoopHealth,
    /// The kubelet's own metrics.
    pub metrics: Metrics,
}

impl Process {
    /// A process that has just started.
    #[must_use]
    pub fn new(started: Timestamp, deposed: CancellationToken) -> Self {
        Self {
            started,
            deposed,
            health: LoopHealth::default(),
            metrics: Metrics::default(),
        }
    }
}

impl Context {
    /// Have both first lists been read, and does the agent answer?
    pub(super) fn knows(&self) -> bool {
        *self.pods.listed.borrow() && self.site.link.borrow().is_up()
    }

    /// If the agent is too old for the pod: a sentence that says what it does not know.
    pub(super) fn lacking(&self, shape: &pb::PodSpec) -> Option<String> {
        let link = self.site.link.borrow();
        let Link::Up { info, .. } = &*link else {
            return None;
        };
        let mut needed = knoc_proto::capability::needed(shape);
        needed.retain(|name| info.capabilities.iter().all(|known| known != name));
        if needed.is_empty() {
            return None;
        }
        Some(format!(
            "the agent on the login node ({}) does not know {}, which the pod needs: upgrade it",
            info.version,
            needed.join(", ")
        ))
    }

    /// Does the agent announce this capability?
    pub(super) fn agent_knows(&self, capability: &str) -> bool {
        self.site.link.borrow().serves(capability)
    }

    /// What a container without a limit may use: the total of the node.
    pub(super) fn allocatable(&self) -> pb::Resources {
        self.node.total()
    }
}
