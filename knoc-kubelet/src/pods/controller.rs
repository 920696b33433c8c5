//! Task: takes keys from the queue and runs at most one worker for each pod and at most [`WORKERS`] in total.
//!
//! A worker reads what Kubernetes and the agent say of the pod, lets [`super::decide`] decide, publishes the status and
//! carries the decision out. It takes the pod's [`Memory`] with it and returns it at the end; after a restart of the
//! kubelet the memory starts empty, which is safe.

mod admission;
mod context;
mod ensure;
mod ephemeral;
mod hashes;
mod loop_health;
mod memory;
mod notes;
mod pull_secrets;
mod status_writer;
mod worker;

use std::{collections::HashMap, sync::Arc, time::Duration};

use knoc_proto::ids::PodUid;
use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;

use memory::Memory;
use worker::Round;

/// Workers at a time. They spend their time waiting for the API server and the agent, which both take 50 requests at
/// once.
const WORKERS: usize = 64;
/// How long workers may finish their round at shutdown.
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

    /// Runs until `shutdown`; workers that are running then get a few seconds to finish.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let queue = self.context.pods.queue.clone();
        let mut beat = tokio::time::interval(loop_health::BEAT);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                _ = beat.tick() => {
                    // If all workers are stuck the loop still turns, but nothing progresses: then there is no beat.
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
        // One allocation for each round, instead of a large future in the JoinSet.
        let id = self.workers.spawn(Box::pin(work)).id();
        self.running.insert(id, uid);
    }

    fn finish(&mut self, round: Result<(Id, Round), tokio::task::JoinError>) {
        self.context.process.health.beat();
        let (id, round) = match round {
            Ok((id, round)) => (id, Some(round)),
            Err(error) => {
                tracing::error!(%error, "the worker of a pod panicked, trying again in 10 s");
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
