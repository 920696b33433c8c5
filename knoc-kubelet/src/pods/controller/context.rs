//! What all workers of one node share, by concept.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use knoc_proto::pb;
use kube::Client;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::loop_health::LoopHealth;
use crate::{
    agent::{Agent, Link},
    metrics::Metrics,
    node::unit::Unit,
    pods::{events::Events, presence::Ask, queue::Queue, services::Services, store::Store},
};

/// Readiness is taken only after the link was down this long: a restarted agent is back sooner.
pub(crate) const UNREACHABLE_AFTER: Duration = Duration::from_secs(10);

/// What all workers of one node share.
#[expect(missing_debug_implementations, reason = "kube::Client has none")]
pub struct Context {
    /// The cluster's side.
    pub api: ApiServer,
    /// The agent's side.
    pub site: Site,
    /// The node that the pods run on.
    pub node: Arc<Unit>,
    /// What is known about the pods of both sides.
    pub pods: KnownPods,
    /// This process.
    pub process: Process,
}

/// The ways to the API server.
#[expect(missing_debug_implementations, reason = "kube::Client has none")]
pub struct ApiServer {
    /// The API server.
    pub client: Client,
    /// How the API server may be asked whether a pod exists.
    pub ask: Ask,
    /// Where Events go.
    pub events: Events,
    /// The Services that environment variables are made of.
    pub services: Services,
}

/// The agent and the link to it.
#[derive(Debug)]
pub struct Site {
    /// The agent.
    pub agent: Agent,
    /// Whether the link is up.
    pub link: watch::Receiver<Link>,
}

/// The pods of both sides, and which of them to look at next.
#[derive(Debug)]
pub struct KnownPods {
    /// Both sides.
    pub store: Store,
    /// The pods to look at.
    pub queue: Queue,
    /// Whether the first list of pods is complete.
    pub listed: watch::Receiver<bool>,
}

/// This process: its start, its end, and what it reports about itself.
#[derive(Debug)]
pub struct Process {
    /// When this process began: an earlier one sent the Events of older notes.
    pub started: Timestamp,
    /// Cancelled when another kubelet leads.
    pub deposed: CancellationToken,
    /// Whether the controller's loop turns.
    pub health: LoopHealth,
    /// Counts what is written.
    pub metrics: Metrics,
}

impl Context {
    /// Have both first lists been read, and does the agent answer?
    pub(super) fn knows(&self) -> bool {
        *self.pods.listed.borrow() && self.site.link.borrow().is_up()
    }

    /// What a container without a limit may use: all that the node has.
    pub(super) fn allocatable(&self) -> pb::Resources {
        self.node.total()
    }
}
