//! Task: takes keys from the queue and runs at most one worker a pod, bounded in all.
//!
//! A worker loads both sides, lets [`super::decide`] decide, publishes the status and carries the decision
//! out. What it must remember of a pod it gets as [`Memory`] and gives back; after a restart an empty one does.

mod admission;
mod ensure;
mod notes;
mod pulse;
mod room;
mod worker;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use knoc_proto::{ids::PodUid, pb};
use knoc_translate::Grace;
use kube::Client;
use tokio::{
    sync::watch,
    task::{Id, JoinSet},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    events::Events,
    presence::Ask,
    queue::Queue,
    resolve::Tokens,
    services::Services,
    status::{Hold, Rejection},
    store::Store,
};
use crate::{
    agent::{Agent, Link},
    metrics::Metrics,
    node::place::Place,
};

/// Workers at a time: their time is spent waiting for the API server and the agent, which both take 50 at once.
const WORKERS: usize = 64;
/// What is under way at shutdown gets this long.
const DRAIN: Duration = Duration::from_secs(5);
/// Readiness is taken only after the link was down this long: a restarted agent is back sooner.
pub(crate) const UNREACHABLE_AFTER: Duration = Duration::from_secs(10);

pub use pulse::Pulse;
pub use room::Ledger;

/// What all workers share.
#[expect(missing_debug_implementations, reason = "kube::Client has none")]
pub struct Context {
    /// The API server.
    pub client: Client,
    /// The node's name.
    pub node: String,
    /// How the API server may be asked whether a pod is there.
    pub ask: Ask,
    /// The agent.
    pub agent: Agent,
    /// Both sides.
    pub store: Store,
    /// Keys to look at.
    pub queue: Queue,
    /// Where Events go.
    pub events: Events,
    /// For service variables.
    pub services: Services,
    /// Is the link up?
    pub link: watch::Receiver<Link>,
    /// Is the first list of pods whole?
    pub listed: watch::Receiver<bool>,
    /// The Node's labels and taints, as last seen.
    pub place: watch::Receiver<Place>,
    /// Slurm's capacity, as last heard.
    pub capacity: watch::Receiver<Option<Arc<pb::NodeInfo>>>,
    /// The most pods of the node.
    pub pods: u32,
    /// What the accepted pods hold of the node.
    pub ledger: Ledger,
    /// Beaten while the controller's loop goes on.
    pub pulse: Pulse,
    /// allocatable = total × this.
    pub queue_factor: u32,
    /// When this process began: older notes were told by an earlier one.
    pub started: Timestamp,
    /// Cancelled when another kubelet leads.
    pub deposed: CancellationToken,
    /// Counts what is written.
    pub metrics: Metrics,
}

/// What a worker remembers of a pod between rounds.
#[derive(Debug, Default)]
struct Memory {
    /// The newest generation the agent answered for.
    ensured: i64,
    /// The shortest grace it was told.
    stop: Option<Grace>,
    rejection: Option<Rejection>,
    hold: Option<Hold>,
    /// It ran or is being deleted, and the agent does not know it (any more).
    lost: bool,
    /// When the last DELETE was answered.
    released: Option<Instant>,
    /// Failed attempts in a row.
    attempts: u32,
    tokens: Tokens,
    revision: i64,
    values: Option<u64>,
    refresh_at: Option<Timestamp>,
    /// When values that the agent wanted were last sent.
    answered: Option<Timestamp>,
    /// Labels and annotations when the values were made.
    metadata: Option<u64>,
    /// The last status patch, and the resourceVersion it led to.
    sent: Option<(serde_json::Value, Option<String>)>,
    /// Of the newest note told.
    note: Option<i64>,
    /// Attempts and failures of containers that were told.
    told: HashSet<u64>,
    /// The generation whose new refusals were told.
    judged: i64,
}

/// What a worker gives back.
struct Round {
    /// None: nothing is left of the pod.
    memory: Option<Memory>,
    /// Look again after this.
    again: Option<Duration>,
}

/// The controller's own state.
#[expect(missing_debug_implementations, reason = "kube::Client has none")]
pub struct Controller {
    context: Arc<Context>,
    memories: HashMap<PodUid, Memory>,
    workers: JoinSet<Round>,
    running: HashMap<Id, PodUid>,
}

impl Controller {
    /// A controller over what `context` holds.
    #[must_use]
    pub fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            memories: HashMap::new(),
            workers: JoinSet::new(),
            running: HashMap::new(),
        }
    }

    /// Works until `shutdown`; what is under way then is finished, or given up after a few seconds.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let queue = self.context.queue.clone();
        let mut beat = tokio::time::interval(pulse::BEAT);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                _ = beat.tick() => {
                    // With all workers stuck the loop turns, but nothing goes on.
                    if self.workers.len() < WORKERS {
                        self.context.pulse.beat();
                    }
                }
                Some(round) = self.workers.join_next_with_id() => self.finish(round),
                uid = queue.next(), if self.workers.len() < WORKERS => self.start(uid),
            }
        }
        let drained = tokio::time::timeout(DRAIN, async {
            while self.workers.join_next().await.is_some() {}
        });
        if drained.await.is_err() {
            tracing::warn!(left = self.workers.len(), "workers did not finish in time");
        }
    }

    fn start(&mut self, uid: PodUid) {
        let memory = self.memories.remove(&uid).unwrap_or_default();
        let work = worker::reconcile(self.context.clone(), uid.clone(), memory);
        // One allocation a round instead of a large future in the JoinSet.
        let id = self.workers.spawn(Box::pin(work)).id();
        self.running.insert(id, uid);
    }

    fn finish(&mut self, round: Result<(Id, Round), tokio::task::JoinError>) {
        self.context.pulse.beat();
        let (id, round) = match round {
            Ok((id, round)) => (id, Some(round)),
            Err(error) => {
                tracing::error!(%error, "a worker ended badly");
                (error.id(), None)
            }
        };
        let Some(uid) = self.running.remove(&id) else {
            return;
        };
        if let Some(round) = round {
            if let Some(memory) = round.memory {
                self.memories.insert(uid.clone(), memory);
            }
            if let Some(again) = round.again {
                self.context.queue.push_after(&uid, again);
            }
        } else {
            self.context.queue.push_after(&uid, Duration::from_secs(10));
        }
        self.context.queue.done(&uid);
    }
}

impl Context {
    /// Have both first lists been read, and is the agent there?
    fn knows(&self) -> bool {
        *self.listed.borrow() && self.link.borrow().is_up()
    }

    /// What a container without a limit may use: all that the node has.
    fn allocatable(&self) -> pb::Resources {
        let capacity = self.capacity.borrow().clone();
        let Some(capacity) = capacity else {
            return pb::Resources::default();
        };
        pb::Resources {
            cpu_millis: capacity.cpu.saturating_mul(1000),
            memory_bytes: capacity.memory_bytes,
            ephemeral_storage_bytes: crate::node::status::ephemeral_storage(&capacity),
            extended: capacity.extended.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
