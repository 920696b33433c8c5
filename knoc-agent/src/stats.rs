//! What running pods use: asks their shims, and keeps each one's last word.
//!
//! No task: the api asks, at most [`AT_ONCE`] shims at the same time. Callers that ask for the same pod at the same
//! time share one question, and an answer serves for [`FRESH`]; so many scrapers cost a shim no more than one. A shim
//! that does not answer leaves its last word, with the time it was said.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{Stream, StreamExt as _};
use knoc_proto::{ids::PodUid, pb};
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use crate::shims::Client;

/// How many shims are asked at the same time: each measures for milliseconds, and the login node is not ours.
const AT_ONCE: usize = 64;
/// How long one shim may take.
const DEADLINE: Duration = Duration::from_secs(3);
/// How long one request may take in all, however many shims hang.
const ALL_DEADLINE: Duration = Duration::from_secs(8);
/// For how long an answer is new.
const FRESH: Duration = Duration::from_secs(1);

/// The last word of one shim; its lock is held while it is asked.
type Cell = Arc<tokio::sync::Mutex<Last>>;

#[derive(Debug, Default)]
struct Last {
    asked: Option<Instant>,
    stats: Option<pb::PodStats>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Stats {
    pods: Mutex<HashMap<PodUid, Cell>>,
}

impl Stats {
    /// What each of `pods` uses, in no order; one of which nothing is known is left out. Cancel safe.
    pub fn of(
        self: &Arc<Self>,
        pods: Vec<(PodUid, Option<Client>)>,
    ) -> impl Stream<Item = pb::PodStats> + use<> {
        let until = Instant::now() + ALL_DEADLINE;
        let stats = Arc::clone(self);
        futures::stream::iter(pods)
            .map(move |(uid, client)| {
                let stats = Arc::clone(&stats);
                let question = client.map(|mut client| async move {
                    let answer = client.get_stats(pb::ShimGetStatsRequest {}).await;
                    answer.map(tonic::Response::into_inner)
                });
                async move { stats.one(uid, question, until).await }
            })
            .buffer_unordered(AT_ONCE)
            .filter_map(std::future::ready)
    }

    /// Lets go of all pods but these.
    pub fn retain(&self, uids: &HashSet<PodUid>) {
        self.lock().retain(|uid, _| uids.contains(uid));
    }

    /// Of one pod: new where `question` is there and answered in time.
    async fn one(
        &self,
        uid: PodUid,
        question: Option<impl Future<Output = Result<pb::PodStats, Status>>>,
        until: Instant,
    ) -> Option<pb::PodStats> {
        let cell = Arc::clone(self.lock().entry(uid.clone()).or_default());
        let until = until.min(Instant::now() + DEADLINE);
        // Somebody else asks, and the shim hangs: who asked first tells next time.
        let mut last = timeout_at(until, cell.lock()).await.ok()?;
        if last.asked.is_some_and(|asked| asked.elapsed() < FRESH) {
            return last.stats.clone();
        }
        if let Some(question) = question {
            match timeout_at(until, question).await {
                Ok(Ok(answer)) => last.stats = Some(answer),
                // A shim of an older version says `Unimplemented`, one that is about to end `NotRunning`.
                Ok(Err(status)) => {
                    tracing::debug!(%uid, error = status.message(), "a shim gave no stats");
                }
                Err(_) => tracing::debug!(%uid, "a shim gave no stats in time"),
            }
            last.asked = Some(Instant::now());
        }
        last.stats.clone()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PodUid, Cell>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::{Ready, pending, ready},
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    type Answer = Result<pb::PodStats, Status>;

    fn uid() -> PodUid {
        PodUid::try_from("u1").unwrap()
    }

    fn said(at: i64) -> pb::PodStats {
        pb::PodStats {
            started_at: at,
            ..pb::PodStats::default()
        }
    }

    fn soon() -> Instant {
        Instant::now() + ALL_DEADLINE
    }

    fn at(stats: Option<pb::PodStats>) -> Option<i64> {
        stats.map(|stats| stats.started_at)
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_away_leaves_its_last_word() {
        let stats = Stats::default();
        let absent = None::<Ready<Answer>>;
        assert_eq!(at(stats.one(uid(), absent.clone(), soon()).await), None);
        let first = stats.one(uid(), Some(ready(Ok(said(1)))), soon()).await;
        assert_eq!(at(first), Some(1));
        tokio::time::advance(FRESH).await;
        assert_eq!(at(stats.one(uid(), absent, soon()).await), Some(1));
        let refused = ready(Err(Status::unimplemented("older")));
        assert_eq!(at(stats.one(uid(), Some(refused), soon()).await), Some(1));
        tokio::time::advance(FRESH).await;
        let began = Instant::now();
        let hangs = Some(pending::<Answer>());
        assert_eq!(at(stats.one(uid(), hangs, soon()).await), Some(1));
        assert_eq!(began.elapsed(), DEADLINE);
        stats.retain(&HashSet::new());
        let absent = None::<Ready<Answer>>;
        assert_eq!(at(stats.one(uid(), absent, soon()).await), None);
    }

    #[tokio::test(start_paused = true)]
    async fn many_who_ask_cost_one_question() {
        let stats = Arc::new(Stats::default());
        let asked = Arc::new(AtomicUsize::new(0));
        let question = || {
            let asked = Arc::clone(&asked);
            Some(async move {
                asked.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(100)).await;
                Ok(said(7))
            })
        };
        let all = (0..50).map(|_| stats.one(uid(), question(), soon()));
        let answers = futures::future::join_all(all).await;
        assert!(answers.into_iter().all(|answer| at(answer) == Some(7)));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        tokio::time::advance(FRESH).await;
        stats.one(uid(), question(), soon()).await;
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }
}
