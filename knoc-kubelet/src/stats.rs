//! Resource usage of the node, its pods and containers: one measurement for all clients.
//!
//! The endpoints call [`Stats::snapshot`]. Concurrent callers share one call to the agent, a task of [`Stats`] that
//! goes on if its caller leaves; its answer is used for [`FRESH`], so several scrapers cost no more than one. If the
//! agent does not answer, the last measurement is returned with its own times; while the link is down, nobody waits.
//! [`assemble`] and the renderers [`cadvisor`], [`resource`] and [`summary`] are pure.

pub mod cadvisor;
pub mod resource;
pub mod summary;
pub mod totals;

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use jiff::Timestamp;
use knoc_proto::{ids::PodUid, pb};
use tokio::{sync::watch, task::JoinSet, time::Instant};

use self::totals::Totals;
use crate::{
    agent::{Agent, Link},
    pods::Store,
};

/// How long a measurement is used: less than metrics-server's shortest interval, so that it always sees a new one.
pub const FRESH: Duration = Duration::from_secs(10);
/// The pause after an agent that did not answer.
const AGAIN: Duration = Duration::from_secs(2);
/// Less than the 10 s of metrics-server and Prometheus, which then get the last measurement. The agent's own deadline
/// is shorter: it returns what it has.
const DEADLINE: Duration = Duration::from_secs(9);
/// The shortest time between two measurements from which a rate is computed, nanoseconds.
const SHORTEST_RATE: i64 = 500_000_000;

/// The usage of a container, a pod or the node. Times are Unix nanoseconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Measured {
    /// When its counters started.
    pub started_at: i64,
    /// The counters and gauges.
    pub usage: pb::Usage,
    /// CPU time per second since the previous measurement; `None` if there was none.
    pub nano_cores: Option<u64>,
}

/// One pod of the node.
#[derive(Debug, Clone, PartialEq)]
pub struct PodMeasured {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: PodUid,
    /// The usage of the pod as a whole.
    pub whole: Measured,
    /// Its running containers, by name.
    pub containers: Vec<(String, Measured)>,
}

/// One measurement of the node.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// The node: its running pods, with the counters of finished pods added.
    pub node: Measured,
    /// The memory of the site in bytes; 0 if the agent has not reported it.
    pub memory_capacity: u64,
    /// The running pods, sorted by namespace and name.
    pub pods: Vec<PodMeasured>,
    /// Why the agent did not answer, if it did not.
    pub failed: Option<String>,
}

/// The usage of the running pods as the agent reported it, or why it did not.
type Reported = Result<Vec<pb::PodStats>, String>;

/// Calls the agent.
type FetchStats =
    Box<dyn Fn() -> BoxFuture<'static, Result<Vec<pb::PodStats>, tonic::Status>> + Send + Sync>;

/// How a call ended, and when.
struct Answer {
    at: Instant,
    time: Timestamp,
    reported: Reported,
}

impl Answer {
    fn now(reported: Reported) -> Self {
        Self {
            at: Instant::now(),
            time: Timestamp::now(),
            reported,
        }
    }
}

/// The state that one caller at a time holds.
#[derive(Default)]
struct State {
    /// The last snapshot, and when it was made.
    last: Option<(Instant, Arc<Snapshot>)>,
    /// The running call, at most one. It is owned here so that it outlives its caller.
    call: JoinSet<Answer>,
}

impl State {
    /// The last snapshot if it is still fresh.
    fn fresh(&self) -> Option<Arc<Snapshot>> {
        let (at, snapshot) = self.last.as_ref()?;
        let serves = if snapshot.failed.is_some() {
            AGAIN
        } else {
            FRESH
        };
        (at.elapsed() < serves).then(|| Arc::clone(snapshot))
    }

    /// Waits for the running call, or for a new one. Cancel safe: the next caller waits for the same call.
    async fn answer(&mut self, ask: &FetchStats) -> Answer {
        if self.call.is_empty() {
            let asked = tokio::time::timeout(DEADLINE, ask());
            self.call.spawn(async {
                Answer::now(match asked.await {
                    Ok(answered) => answered.map_err(|status| status.message().to_owned()),
                    Err(_) => Err(format!("no answer in {} s", DEADLINE.as_secs())),
                })
            });
        }
        let answered = self.call.join_next().await.and_then(Result::ok);
        answered.unwrap_or_else(|| Answer::now(Err("the call to the agent was aborted".to_owned())))
    }
}

/// The shared measurement of resource usage; see the module.
pub struct Stats {
    ask: FetchStats,
    link: watch::Receiver<Link>,
    store: Store,
    started: Timestamp,
    state: tokio::sync::Mutex<State>,
}

impl std::fmt::Debug for Stats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stats").finish_non_exhaustive()
    }
}

impl Stats {
    /// Measures the pods of this store by this agent, while this link is up.
    #[must_use]
    pub fn new(agent: Agent, link: watch::Receiver<Link>, store: Store) -> Self {
        let ask = move || {
            let agent = agent.clone();
            Box::pin(async move { agent.stats().await }) as BoxFuture<'static, _>
        };
        Self::with_source(Box::new(ask), link, store)
    }

    fn with_source(ask: FetchStats, link: watch::Receiver<Link>, store: Store) -> Self {
        Self {
            ask,
            link,
            store,
            started: Timestamp::now(),
            state: tokio::sync::Mutex::default(),
        }
    }

    /// The measurement, at most [`FRESH`] old. Cancel safe: the call goes on, for the next caller.
    pub async fn snapshot(&self, memory_capacity: u64) -> Arc<Snapshot> {
        let mut state = self.state.lock().await;
        loop {
            if let Some(snapshot) = state.fresh() {
                return snapshot;
            }
            let answer = tokio::select! {
                // Checked first, so that nothing is called while the link is down.
                biased;
                message = self.down() => {
                    let answer = Answer::now(Err(message));
                    return self.next(&state, answer, memory_capacity);
                }
                answer = state.answer(&self.ask) => answer,
            };
            // The answer may be old by now if its caller had left when it came.
            let at = answer.at;
            let snapshot = self.next(&state, answer, memory_capacity);
            state.last = Some((at, snapshot));
        }
    }

    /// Returns the reason when the link to the agent is down.
    async fn down(&self) -> String {
        let mut link = self.link.clone();
        let down = link.wait_for(|link| !link.is_up()).await;
        let message = down.map(|link| format!("no link to the agent: {}", link.message()));
        match message {
            Ok(message) => message,
            Err(_) => std::future::pending().await,
        }
    }

    fn next(&self, state: &State, answer: Answer, memory_capacity: u64) -> Arc<Snapshot> {
        let before = state.last.as_ref().map(|(_, snapshot)| &**snapshot);
        let named = answer.reported.map(|stats| self.ours(stats));
        let node = |pods: &[PodMeasured]| {
            let used = pods
                .iter()
                .map(|pod| (&pod.uid, Totals::of(&pod.whole.usage)));
            self.store.used(used)
        };
        let now = nanos(answer.time);
        let mut snapshot = assemble(before, named, node, now, nanos(self.started));
        snapshot.memory_capacity = memory_capacity;
        Arc::new(snapshot)
    }

    /// The stats of the node's own pods, with the names that Kubernetes has for them.
    fn ours(&self, stats: Vec<pb::PodStats>) -> Vec<pb::PodStats> {
        let named = stats.into_iter().filter_map(|mut stats| {
            let meta = self
                .store
                .by_uid(&PodUid::try_from(stats.uid.as_str()).ok()?)?
                .pod
                .metadata
                .clone();
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

/// PURE: the next snapshot, from what the agent reported, or the last one if it reported nothing. `node` returns the
/// totals of the node for its running pods.
pub fn assemble(
    before: Option<&Snapshot>,
    reported: Result<Vec<pb::PodStats>, String>,
    node: impl FnOnce(&[PodMeasured]) -> Totals,
    now: i64,
    started_at: i64,
) -> Snapshot {
    let reported = match reported {
        Ok(reported) => reported,
        Err(message) => {
            let mut last = before.cloned().unwrap_or_default();
            last.failed = Some(message);
            return last;
        }
    };
    let known: HashMap<&PodUid, &PodMeasured> = before
        .iter()
        .flat_map(|before| &before.pods)
        .map(|pod| (&pod.uid, pod))
        .collect();
    let mut pods: Vec<PodMeasured> = reported
        .into_iter()
        .filter_map(|mut stats| {
            let uid = PodUid::try_from(std::mem::take(&mut stats.uid)).ok()?;
            Some(pod(known.get(&uid).copied(), uid, stats))
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

fn pod(known: Option<&PodMeasured>, uid: PodUid, stats: pb::PodStats) -> PodMeasured {
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
        uid,
        whole: measured(known.map(|pod| &pod.whole), stats.started_at, usage),
        containers,
    }
}

/// The usage with its rate since the previous measurement, if that was of the same counters. While a shim is
/// disconnected its last measurement is repeated, and its rate stays.
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
