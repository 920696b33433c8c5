//! What the node, its pods and containers use: one measurement for all who ask.
//!
//! The endpoints ask [`Stats::snapshot`]. Callers share one question to the agent, a task of [`Stats`] that goes on
//! when its asker leaves, and its answer serves for [`FRESH`], so scrapers do not add up. Where the agent does not
//! answer, the last word stands with its own times; where its link is down, nobody waits for that. [`assemble`] and the
//! renderers [`resource`] and [`summary`] are pure.

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

/// For how long a measurement serves: below metrics-server's shortest interval, so that it always sees a new one.
pub const FRESH: Duration = Duration::from_secs(10);
/// After an agent that did not answer.
const AGAIN: Duration = Duration::from_secs(2);
/// Below the 10 s of metrics-server and Prometheus, which then hear the last word. The agent's own deadline is shorter:
/// it says what it has.
const DEADLINE: Duration = Duration::from_secs(9);
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
#[derive(Debug, Clone, PartialEq)]
pub struct PodMeasured {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: PodUid,
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

/// What the running pods use, by the agent's word.
type Said = Result<Vec<pb::PodStats>, String>;

/// Puts the question to the agent.
type FetchStats =
    Box<dyn Fn() -> BoxFuture<'static, Result<Vec<pb::PodStats>, tonic::Status>> + Send + Sync>;

/// How a question ended.
struct Answer {
    at: Instant,
    time: Timestamp,
    said: Said,
}

impl Answer {
    fn now(said: Said) -> Self {
        Self {
            at: Instant::now(),
            time: Timestamp::now(),
            said,
        }
    }
}

/// Held by one asker at a time.
#[derive(Default)]
struct State {
    /// The last answer, and when it came.
    last: Option<(Instant, Arc<Snapshot>)>,
    /// At most one; owned here, so that it outlives its asker.
    question: JoinSet<Answer>,
}

impl State {
    /// The last answer where it still serves.
    fn fresh(&self) -> Option<Arc<Snapshot>> {
        let (at, snapshot) = self.last.as_ref()?;
        let serves = if snapshot.failed.is_some() {
            AGAIN
        } else {
            FRESH
        };
        (at.elapsed() < serves).then(|| Arc::clone(snapshot))
    }

    /// The answer to the question under way, or to a new one. Cancel safe: who asks next waits for the same.
    async fn answer(&mut self, ask: &FetchStats) -> Answer {
        if self.question.is_empty() {
            let asked = tokio::time::timeout(DEADLINE, ask());
            self.question.spawn(async {
                Answer::now(match asked.await {
                    Ok(answered) => answered.map_err(|status| status.message().to_owned()),
                    Err(_) => Err(format!("no answer in {} s", DEADLINE.as_secs())),
                })
            });
        }
        let answered = self.question.join_next().await.and_then(Result::ok);
        answered.unwrap_or_else(|| Answer::now(Err("the question broke off".to_owned())))
    }
}

/// See the module.
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
    /// Asks this agent about the pods of this store, while this link is up.
    #[must_use]
    pub fn new(agent: Agent, link: watch::Receiver<Link>, store: Store) -> Self {
        let ask = move || {
            let agent = agent.clone();
            Box::pin(async move { agent.stats().await }) as BoxFuture<'static, _>
        };
        Self::asking(Box::new(ask), link, store)
    }

    fn asking(ask: FetchStats, link: watch::Receiver<Link>, store: Store) -> Self {
        Self {
            ask,
            link,
            store,
            started: Timestamp::now(),
            state: tokio::sync::Mutex::default(),
        }
    }

    /// The measurement, at most [`FRESH`] old. Cancel safe: the question goes on, for who asks next.
    pub async fn snapshot(&self, memory_capacity: u64) -> Arc<Snapshot> {
        let mut state = self.state.lock().await;
        loop {
            if let Some(snapshot) = state.fresh() {
                return snapshot;
            }
            let answer = tokio::select! {
                // Asks nothing where nobody hears it.
                biased;
                words = self.down() => {
                    let answer = Answer::now(Err(words));
                    return self.next(&state, answer, memory_capacity);
                }
                answer = state.answer(&self.ask) => answer,
            };
            // One that came when its asker had left may be old by now.
            let at = answer.at;
            let snapshot = self.next(&state, answer, memory_capacity);
            state.last = Some((at, snapshot));
        }
    }

    /// Returns where the link to the agent is down, with why.
    async fn down(&self) -> String {
        let mut link = self.link.clone();
        let down = link.wait_for(|link| !link.is_up()).await;
        let words = down.map(|link| format!("no link to the agent: {}", link.message()));
        match words {
            Ok(words) => words,
            Err(_) => std::future::pending().await,
        }
    }

    fn next(&self, state: &State, answer: Answer, memory_capacity: u64) -> Arc<Snapshot> {
        let before = state.last.as_ref().map(|(_, snapshot)| &**snapshot);
        let named = answer.said.map(|stats| self.ours(stats));
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

    /// Those of the node's own pods, by the names Kubernetes has for them.
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
    let known: HashMap<&PodUid, &PodMeasured> = before
        .iter()
        .flat_map(|before| &before.pods)
        .map(|pod| (&pod.uid, pod))
        .collect();
    let mut pods: Vec<PodMeasured> = said
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
