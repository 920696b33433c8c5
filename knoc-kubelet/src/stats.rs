//! What the node, its pods and containers use: one measurement for all who ask.
//!
//! No task: the endpoints ask [`Stats::snapshot`]. Callers share one question to the agent, and its answer serves for
//! [`FRESH`], so scrapers do not add up. Where the agent does not answer, the last word stands with its own times.
//! [`assemble`] and the renderers [`resource`] and [`summary`] are pure.

pub mod ledger;
pub mod resource;
pub mod summary;

use std::{collections::HashMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use knoc_proto::pb;
use tokio::time::Instant;

use self::ledger::Totals;
use crate::{agent::Agent, pods::Store};

/// For how long a measurement serves: below metrics-server's shortest interval, so that it always sees a new one.
pub const FRESH: Duration = Duration::from_secs(10);
/// After an agent that did not answer.
const AGAIN: Duration = Duration::from_secs(2);
/// The agent's own deadline is shorter: it says what it has.
const DEADLINE: Duration = Duration::from_secs(12);
/// A rate over less says nothing.
const SHORTEST_RATE: i64 = 500_000_000;

/// What a container, a pod or the node used. Times in Unix nanoseconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Measured {
    /// When its counters began.
    pub started_at: i64,
    /// The counters and levels.
    pub usage: pb::Usage,
    /// CPU time a second since the measurement before; `None` where there was none.
    pub nano_cores: Option<u64>,
}

/// One pod of the node.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PodMeasured {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// The pod as a whole.
    pub whole: Measured,
    /// Its running containers, by name.
    pub containers: Vec<(String, Measured)>,
}

/// One measurement of the node.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// The node: running pods, and all that finished.
    pub node: Measured,
    /// What the site has; 0 where the agent never said.
    pub memory_capacity: u64,
    /// By namespace and name.
    pub pods: Vec<PodMeasured>,
    /// Why the agent was not heard.
    pub failed: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub struct Stats {
    agent: Agent,
    store: Store,
    started: Timestamp,
    last: tokio::sync::Mutex<Option<(Instant, Arc<Snapshot>)>>,
}

impl Stats {
    /// Asks this agent about the pods of this store.
    #[must_use]
    pub fn new(agent: Agent, store: Store) -> Self {
        Self {
            agent,
            store,
            started: Timestamp::now(),
            last: tokio::sync::Mutex::default(),
        }
    }

    /// The measurement, at most [`FRESH`] old. Cancel safe: who waits meanwhile asks again.
    pub async fn snapshot(&self, memory_capacity: u64) -> Arc<Snapshot> {
        let mut last = self.last.lock().await;
        if let Some((at, snapshot)) = &*last {
            let serves = if snapshot.failed.is_some() {
                AGAIN
            } else {
                FRESH
            };
            if at.elapsed() < serves {
                return Arc::clone(snapshot);
            }
        }
        let before = last.as_ref().map(|(_, snapshot)| Arc::clone(snapshot));
        let began = Instant::now();
        let measured = match tokio::time::timeout(DEADLINE, self.agent.stats()).await {
            Ok(Ok(stats)) => Ok(stats),
            Ok(Err(status)) => Err(status.message().to_owned()),
            Err(_) => Err(format!("no answer in {} s", DEADLINE.as_secs())),
        };
        let named = measured.map(|stats| self.ours(stats));
        let node = |pods: &[PodMeasured]| {
            let used = pods
                .iter()
                .map(|pod| (pod.uid.as_str(), Totals::of(&pod.whole.usage)));
            self.store.used(used)
        };
        let now = nanos(Timestamp::now());
        let mut snapshot = assemble(before.as_deref(), named, node, now, nanos(self.started));
        snapshot.memory_capacity = memory_capacity;
        let snapshot = Arc::new(snapshot);
        *last = Some((began, Arc::clone(&snapshot)));
        snapshot
    }

    /// Those of the node's own pods, by the names Kubernetes has for them.
    fn ours(&self, stats: Vec<pb::PodStats>) -> Vec<pb::PodStats> {
        let named = stats.into_iter().filter_map(|mut stats| {
            let meta = self.store.by_uid(&stats.uid)?.pod.metadata.clone();
            stats.namespace = meta.namespace.unwrap_or_default();
            stats.name = meta.name.unwrap_or_default();
            Some(stats)
        });
        named.collect()
    }
}

fn nanos(at: Timestamp) -> i64 {
    i64::try_from(at.as_nanosecond()).unwrap_or(i64::MAX)
}

/// PURE: the next snapshot, of what the agent said, or of the last one where it said nothing. `node` answers the
/// totals of the node for its running pods.
pub fn assemble(
    before: Option<&Snapshot>,
    said: Result<Vec<pb::PodStats>, String>,
    node: impl FnOnce(&[PodMeasured]) -> Totals,
    now: i64,
    started_at: i64,
) -> Snapshot {
    let said = match said {
        Ok(said) => said,
        Err(words) => {
            let mut last = before.cloned().unwrap_or_default();
            last.failed = Some(words);
            return last;
        }
    };
    let known: HashMap<&str, &PodMeasured> = before
        .iter()
        .flat_map(|before| &before.pods)
        .map(|pod| (pod.uid.as_str(), pod))
        .collect();
    let mut pods: Vec<PodMeasured> = said
        .into_iter()
        .map(|stats| {
            let known = known.get(stats.uid.as_str()).copied();
            pod(known, stats)
        })
        .collect();
    pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    let totals = node(&pods);
    let mut usage = pb::Usage {
        time: now,
        cpu_nanoseconds: totals.cpu,
        page_faults: totals.faults,
        major_page_faults: totals.major,
        ..pb::Usage::default()
    };
    for one in pods.iter().map(|pod| &pod.whole.usage) {
        usage.working_set_bytes += one.working_set_bytes;
        usage.usage_bytes += one.usage_bytes;
        usage.rss_bytes += one.rss_bytes;
        usage.swap_bytes += one.swap_bytes;
        usage.process_count += one.process_count;
    }
    Snapshot {
        node: measured(before.map(|before| &before.node), started_at, usage),
        memory_capacity: 0,
        pods,
        failed: None,
    }
}

fn pod(known: Option<&PodMeasured>, stats: pb::PodStats) -> PodMeasured {
    let of = |name: &str| {
        let mut known = known?.containers.iter();
        known.find(|(other, _)| other == name).map(|(_, one)| one)
    };
    let mut containers: Vec<_> = stats
        .containers
        .into_iter()
        .map(|one| {
            let usage = one.usage.unwrap_or_default();
            let measured = measured(of(&one.name), one.started_at, usage);
            (one.name, measured)
        })
        .collect();
    containers.sort_by(|a, b| a.0.cmp(&b.0));
    let usage = stats.usage.unwrap_or_default();
    PodMeasured {
        namespace: stats.namespace,
        name: stats.name,
        uid: stats.uid,
        whole: measured(known.map(|pod| &pod.whole), stats.started_at, usage),
        containers,
    }
}

/// With the rate since the measurement before, where it is of the same counters. A shim that is away says the same
/// again, and its rate stands with it.
fn measured(before: Option<&Measured>, started_at: i64, usage: pb::Usage) -> Measured {
    let nano_cores = before
        .filter(|before| before.started_at == started_at)
        .and_then(|before| {
            let span = usage.time - before.usage.time;
            if span < SHORTEST_RATE {
                return before.nano_cores;
            }
            let used = usage
                .cpu_nanoseconds
                .saturating_sub(before.usage.cpu_nanoseconds);
            let cores = u128::from(used) * 1_000_000_000 / u128::try_from(span).ok()?;
            u64::try_from(cores).ok()
        });
    Measured {
        started_at,
        usage,
        nano_cores,
    }
}

#[cfg(test)]
pub(crate) mod tests;
