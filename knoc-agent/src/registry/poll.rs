//! Task: asks the scheduler about all jobs in one batched round, and the site's capacity now and then.
//!
//! In: the jobs that actors want to know of, and a nudge when one expects something. Out: `Round` events to actors
//! whose jobs changed, and [`pb::NodeInfo`] on a watch. Adaptive and jittered: the scheduler's shortest interval after
//! a nudge or news, then slower and slower, up to [`PATIENT`] times that while something is expected (a job may queue
//! for days), up to the longest one otherwise, and no round at all without jobs. A controller that is away is a fact
//! about the scheduler, never about a pod: nothing is sent then.

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

/// While something is expected, rounds without news become rarer down to one in so many of the shortest intervals.
const PATIENT: u32 = 5;
/// By how much the interval grows with each round that has no news.
const SLOWER: f32 = 1.5;
/// The site's capacity changes slowly.
const CAPACITY: Duration = Duration::from_mins(1);
/// After a failed question for the capacity.
const CAPACITY_AGAIN: Duration = Duration::from_secs(10);

/// How much older than the last round what is shown of it may be.
const SHOWN_AGAIN: Duration = Duration::from_secs(10);

/// What was last told to an actor.
#[derive(Debug, PartialEq)]
struct Told {
    job: JobRef,
    jobs: Vec<JobView>,
    missing: bool,
}

/// The poller.
#[derive(Debug)]
pub struct Poller {
    site: Arc<Site>,
    registry: Arc<Registry>,
    node: watch::Sender<pb::NodeInfo>,
    told: HashMap<PodUid, Told>,
    interval: Duration,
}

impl Poller {
    /// A poller that shows the site's capacity and health on `node`.
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

    /// Runs until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut last = Instant::now() - self.shortest();
        loop {
            let hurry = Arc::clone(&self.site.hurry);
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = hurry.notified() => {
                    self.interval = self.shortest();
                    // One nudge among many: never faster than the shortest interval.
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
            .filter_map(|(uid, wanted, handle)| Some((uid, wanted.job?, wanted.hurried, handle)))
            .collect();
        let longest = self.site.config.limits.poll_max;
        if wanted.is_empty() {
            self.told.clear();
            self.interval = longest;
            self.asked(Asked::Nothing);
            return;
        }
        let hurried = wanted.iter().any(|(_, _, hurried, _)| *hurried);
        let known: Vec<_> = wanted.iter().map(|(_, job, _, _)| job.clone()).collect();
        match self.site.scheduler.round(&known).await {
            Ok(round) => {
                report_health(&self.node, None);
                self.asked(Asked::Answered);
                let news = self.distribute(round, wanted);
                self.interval =
                    next_interval(self.interval, self.shortest(), longest, hurried, news);
            }
            Err(error) => {
                report_health(&self.node, Some(chain(&error)));
                self.asked(Asked::InVain);
                self.interval =
                    next_interval(self.interval, self.shortest(), longest, hurried, false);
            }
        }
    }

    /// Tells each actor what is new of its job. True where something was.
    fn distribute(&mut self, round: Round, wanted: Vec<(PodUid, JobRef, bool, Handle)>) -> bool {
        let mut any = false;
        let mut by_pod: HashMap<PodUid, Vec<JobView>> = HashMap::new();
        for view in round.jobs {
            by_pod.entry(view.uid.clone()).or_default().push(view);
        }
        let mut told = HashMap::new();
        for (uid, job, hurried, handle) in wanted {
            let missing = round.missing.contains(&job);
            let jobs = by_pod.remove(&uid).unwrap_or_default();
            let news = Told { job, jobs, missing };
            let known = self.told.remove(&uid);
            let queued = !missing && news.jobs.iter().all(|view| view.started_at.is_none());
            let same = known.as_ref() == Some(&news);
            any |= !same;
            if same && (!hurried || queued) {
                told.insert(uid, news);
            } else {
                let event = Event::Round {
                    jobs: news.jobs.clone(),
                    missing,
                };
                // A full queue: the next round says it again.
                if handle.offer(Input::Event(event)) {
                    told.insert(uid, news);
                }
            }
        }
        self.told = told;
        any
    }

    /// Shows how old what is known of the jobs is.
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

/// What the poller did last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// There was nothing to ask.
    Nothing,
    /// It asked, and was answered.
    Answered,
    /// It asked in vain.
    InVain,
}

/// PURE: what is shown as the last round, Unix nanoseconds: 0 while nothing is asked. Each change wakes all that watch the
/// node, so one that is hardly older than `now` stays. Where no round has succeeded yet it is when the first one was tried.
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

/// PURE: how long after this round the next one is.
fn next_interval(
    now: Duration,
    shortest: Duration,
    longest: Duration,
    hurried: bool,
    news: bool,
) -> Duration {
    let most = if hurried {
        longest.min(shortest * PATIENT)
    } else {
        longest
    };
    if hurried && news {
        shortest
    } else {
        now.max(shortest).mul_f32(SLOWER).min(most)
    }
}

/// Between 85 and 115 % of `interval`: agents of one cluster do not ask in step.
fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(rand::random_range(0.85..1.15))
}

/// Task: keeps the site's capacity on `node` until `stop`.
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

    /// A gauge is made of it that operators alert on.
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
            "never answered since it is asked"
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
        let after = |rounds: usize, hurried| {
            (0..rounds).fold(shortest, |now, _| {
                next_interval(now, shortest, longest, hurried, false)
            })
        };
        assert_eq!(after(1, true), Duration::from_millis(1500));
        assert_eq!(after(20, true), Duration::from_secs(5), "a job that queues");
        assert_eq!(after(20, false), longest, "jobs that only run");
        let late = after(20, true);
        assert_eq!(next_interval(late, shortest, longest, true, true), shortest);
        // What ran for long is expected to end: not at the pace of before.
        let hurried = next_interval(longest, shortest, longest, true, false);
        assert_eq!(hurried, Duration::from_secs(5));
    }
}
