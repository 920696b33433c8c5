//! Task: takes keys from the queue and runs at most one worker a pod, bounded in all.
//!
//! A worker loads both sides, lets [`super::decide`] decide, publishes the status and carries the decision
//! out. It is given what it must remember of a pod ([`Memory`]) and
//! gives it back; after a restart an empty memory does.

mod admission;
mod context;
mod ensure;
mod loop_health;
mod memory;
mod notes;
mod worker;

use std::{collections::HashMap, sync::Arc, time::Duration};

use knoc_proto::ids::PodUid;
use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;

use memory::Memory;
use worker::Round;

/// Workers at a time: their time is spent waiting for the API server and the agent, which both take 50 at once.
const WORKERS: usize = 64;
/// What is under way at shutdown gets this long.
const DRAIN: Duration = Duration::from_secs(5);

pub(crate) use context::UNREACHABLE_AFTER;
pub use context::{ApiServer, Context, KnownPods, Process, Site};
pub use loop_health::LoopHealth;

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
        let queue = self.context.pods.queue.clone();
        let mut beat = tokio::time::interval(loop_health::BEAT);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                _ = beat.tick() => {
                    // With all workers stuck the loop turns, but nothing goes on.
                    if self.workers.len() < WORKERS {
                        self.context.process.health.beat();
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
        self.context.process.health.beat();
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
                self.context.pods.queue.push_after(&uid, again);
            }
        } else {
            self.context
                .pods
                .queue
                .push_after(&uid, Duration::from_secs(10));
        }
        self.context.pods.queue.done(&uid);
    }
}

#[cfg(test)]
mod tests;
