//! Task: polls the scheduler about all jobs in one batched round, and about the site's capacity
//! from time to time.
//!
//! Input: the jobs that actors want to know about, and a wake-up when an actor expects a change.
//! Output: `Round` events to the actors whose jobs changed, and [`pb::NodeInfo`] on a watch
//! channel. The interval is adaptive and jittered. It starts at the scheduler's shortest interval
//! after a wake-up or a change and then grows: up to [`POLL_SOON_FACTOR`] times the shortest interval while
//! a change is expected (a job may queue for days), up to the longest interval otherwise. Without
//! jobs no rounds are made. If the scheduler cannot be reached, this says nothing about any pod,
//! and no events are sent.

use std::{collections::HashMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use knoc_proto::{error::chain, ids::PodUid, pb};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{Handle, Registry};
use crate::{
    pod::{
        input::Input,
        state::{Event, nanos},
    },
    scheduler::{JobRef, JobView, Round},
    site::Site,
};

/// While a change is expected, the interval grows to at most this many times the shortest interval.
const POLL_SOON_FACTOR: u32 = 5;
/// The factor by which the interval grows after each round without changes.
const SLOWER: f32 = 1.5;
/// The interval between two queries of the site's capacity, which changes slowly.
const CAPACITY: Duration = Duration::from_mins(1);
/// The interval after a failed query of the capacity.
const CAPACITY_AGAIN: Duration = Duration::from_secs(10);

/// How much older than the last round the published time of the last round may be.
const SHOWN_AGAIN: Duration = Duration::from_secs(10);

/// The last event that was sent to an actor.
#[derive(Debug, PartialEq)]
struct Told {
    job: JobRef,
    jobs: Vec<JobView>,
    missing: bool,
}

/// The poller task.
#[derive(Debug)]
pub struct Poller {
    site: Arc<Site>,
    registry: Arc<Registry>,
    node: watch::Sender<pb::NodeInfo>,
    told: HashMap<PodUid, Told>,
    interval: Duration,
}

impl Poller {
    /// Creates a poller that publishes the site's capacity and the scheduler's health on `node`.
    #[must_use]
    pub fn new(
        site: Arc<Site>,
        registry: Arc<Registry>,
        node: watch::Sender<pb::NodeInfo>,
    ) -> Self {
        let interval = site.config.limits.poll_max;
        Self {
            site,
            registry,
            node,
            told: HashMap::new(),
            interval,
        }
    }

    /// Runs until `stop` is cancelled.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut last = Instant::now() - self.shortest();
        loop {
            let poll_soon = Arc::clone(&self.site.poll_soon);
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = poll_soon.notified() => {
                    self.interval = self.shortest();
                    // Many wake-ups may come at once: never poll faster than the shortest interval.
                    let soonest = last + jittered(self.interval);
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep_until(soonest) => {}
                    }
                }
                () = tokio::time::sleep_until(last + jittered(self.interval)) => {}
            }
            last = Instant::now();
            self.round().await;
        }
    }

    fn shortest(&self) -> Duration {
        self.site.scheduler.round_interval()
    }

    async fn round(&mut self) {
        let wanted: Vec<_> = self
            .registry
            .handles()
            .into_iter()
            .map(|(uid, handle)| (uid, handle.wanted(), handle))
            .filter_map(|(uid, wanted, handle)| Some((uid, wanted.job?, wanted.poll_soon, handle)))
            .collect();
        let longest = self.site.config.limits.poll_max;
        if wanted.is_empty() {
            self.told.clear();
            self.interval = longest;
            self.asked(Asked::Nothing);
            return;
        }
        let poll_soon = wanted.iter().any(|(_, _, poll_soon, _)| *poll_soon);
        let known: Vec<_> = wanted.iter().map(|(_, job, _, _)| job.clone()).collect();
        match self.site.scheduler.round(&known).await {
            Ok(round) => {
                report_health(&self.node, None);
                self.asked(Asked::Answered);
                let news = self.distribute(round, wanted);
                self.interval =
                    next_interval(self.interval, self.shortest(), longest, poll_soon, news);
            }
            Err(error) => {
                report_health(&self.node, Some(chain(&error)));
                self.asked(Asked::InVain);
                self.interval =
                    next_interval(self.interval, self.shortest(), longest, poll_soon, false);
            }
        }
    }

    /// Sends each actor what has changed about its job. True if anything has.
    fn distribute(&mut self, round: Round, wanted: Vec<(PodUid, JobRef, bool, Handle)>) -> bool {
        let mut any = false;
        let mut by_pod: HashMap<PodUid, Vec<JobView>> = HashMap::new();
        for view in round.jobs {
            by_pod.entry(view.uid.clone()).or_default().push(view);
        }
        let mut told = HashMap::new();
        for (uid, job, poll_soon, handle) in wanted {
            let missing = round.missing.contains(&job);
            let jobs = by_pod.remove(&uid).unwrap_or_default();
            let news = Told { job, jobs, missing };
            let known = self.told.remove(&uid);
            let queued = !missing && news.jobs.iter().all(|view| view.started_at.is_none());
            let same = known.as_ref() == Some(&news);
            any |= !same;
            if same && (!poll_soon || queued) {
                told.insert(uid, news);
            } else {
                let event = Event::Round {
                    jobs: news.jobs.clone(),
                    missing,
                };
                // If the queue is full, the next round sends it again.
                if handle.offer(Input::Event(event)) {
                    told.insert(uid, news);
                }
            }
        }
        self.told = told;
        any
    }

    /// Publishes the age of what is known about the jobs.
    fn asked(&self, asked: Asked) {
        let now = nanos(Timestamp::now());
        self.node.send_if_modified(|info| {
            let health = info.scheduler.get_or_insert_default();
            let next = last_round(health.last_round, asked, now);
            let news = next != health.last_round;
            health.last_round = next;
            news
        });
    }
}

/// The outcome of the last round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// There were no jobs to ask about.
    Nothing,
    /// The scheduler answered.
    Answered,
    /// The scheduler did not answer.
    InVain,
}

/// PURE: the time to publish as the last round, in Unix nanoseconds; 0 while there are no jobs to
/// ask about. Each change wakes every watcher of the node, so a value that is hardly older than
/// `now` stays. Until a round has succeeded, it is the time of the first attempt.
fn last_round(shown: i64, asked: Asked, now: i64) -> i64 {
    match asked {
        Asked::Nothing => 0,
        Asked::InVain if shown == 0 => now,
        Asked::InVain => shown,
        Asked::Answered => {
            let fresh = i64::try_from(SHOWN_AGAIN.as_nanos()).unwrap_or(i64::MAX);
            if shown != 0 && (0..fresh).contains(&now.saturating_sub(shown)) {
                shown
            } else {
                now
            }
        }
    }
}

fn report_health(node: &watch::Sender<pb::NodeInfo>, trouble: Option<String>) {
    let now = nanos(Timestamp::now());
    node.send_if_modified(|info| {
        let health = info.scheduler.get_or_insert_default();
        let (reachable, message) = (trouble.is_none(), trouble.unwrap_or_default());
        if health.since != 0 && health.reachable == reachable {
            return false;
        }
        if reachable {
            tracing::info!("the scheduler answers");
        } else {
            tracing::warn!(error = message, "the scheduler does not answer");
        }
        (health.reachable, health.message, health.since) = (reachable, message, now);
        true
    });
}

/// PURE: the interval between this round and the next one.
fn next_interval(
    now: Duration,
    shortest: Duration,
    longest: Duration,
    poll_soon: bool,
    news: bool,
) -> Duration {
    let most = if poll_soon {
        longest.min(shortest * POLL_SOON_FACTOR)
    } else {
        longest
    };
    if poll_soon && news {
        shortest
    } else {
        now.max(shortest).mul_f32(SLOWER).min(most)
    }
}

/// Between 85 and 115 % of `interval`, so that the agents of one cluster do not poll in step.
fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(rand::random_range(0.85..1.15))
}

/// Task: keeps the site's capacity on `node` up to date until `stop` is cancelled.
pub async fn capacity(site: Arc<Site>, node: watch::Sender<pb::NodeInfo>, stop: CancellationToken) {
    loop {
        let pause = match site.scheduler.node_info().await {
            Ok(info) => {
                node.send_if_modified(|known| {
                    let kept = known.clone();
                    *known = pb::NodeInfo {
                        scheduler: kept.scheduler.clone(),
                        pid_isolation: kept.pid_isolation,
                        pod_limit: kept.pod_limit,
                        certificate_until: kept.certificate_until,
                        policy_problem: kept.policy_problem.clone(),
                        maps_privileged: kept.maps_privileged,
                        egress: Some(site.egress.counted()),
                        ..info
                    };
                    *known != kept
                });
                report_health(&node, None);
                CAPACITY
            }
            Err(error) => {
                report_health(&node, Some(chain(&error)));
                CAPACITY_AGAIN
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = tokio::time::sleep(jittered(pause)) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Operators alert on a gauge that is made from this value.
    #[test]
    fn the_last_round_is_fresh_while_slurm_is_asked_and_absent_while_it_is_not() {
        let second = 1_000_000_000;
        let at = |seconds: i64| 1_800_000_000 * second + seconds * second;
        let mut shown = 0;
        for n in 0..100 {
            shown = last_round(shown, Asked::Answered, at(n));
            assert!((0..10).contains(&((at(n) - shown) / second)), "{n}");
        }
        let asked = |shown, asked, n| last_round(shown, asked, at(n));
        assert_eq!(asked(shown, Asked::InVain, 500), shown, "its age grows");
        assert_eq!(asked(shown, Asked::Nothing, 500), 0);
        assert_eq!(asked(0, Asked::Nothing, 501), 0);
        assert_eq!(
            asked(0, Asked::InVain, 502),
            at(502),
            "no answer since the first attempt"
        );
        assert_eq!(asked(at(502), Asked::InVain, 600), at(502));
        assert_eq!(
            asked(at(900), Asked::Answered, 3),
            at(3),
            "the clock was set back"
        );
    }

    #[test]
    fn rounds_become_rarer_until_there_is_news() {
        let [shortest, longest] = [1, 30].map(Duration::from_secs);
        let after = |rounds: usize, poll_soon| {
            (0..rounds).fold(shortest, |now, _| {
                next_interval(now, shortest, longest, poll_soon, false)
            })
        };
        assert_eq!(after(1, true), Duration::from_millis(1500));
        assert_eq!(after(20, true), Duration::from_secs(5), "a job that queues");
        assert_eq!(after(20, false), longest, "jobs that only run");
        let late = after(20, true);
        assert_eq!(next_interval(late, shortest, longest, true, true), shortest);
        // A job that has run for long is now expected to end: the interval starts over.
        let soon = next_interval(longest, shortest, longest, true, false);
        assert_eq!(soon, Duration::from_secs(5));
    }
}
