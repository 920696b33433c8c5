//! Resource usage of running pods: queries their shims and keeps each one's last answer.
//!
//! This module has no task: the API calls it, and at most [`AT_ONCE`] shims are queried at the same
//! time. Callers that ask for the same pod at the same time share one query, and an answer is
//! reused for [`FRESH`], so that many scrapers cost a shim no more than one. If a shim does not
//! answer, its last answer is returned, with the time of that answer.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{Stream, StreamExt as _};
use knoc_proto::{ids::PodUid, pb};
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use crate::shim_links::Client;

/// How many shims are queried at the same time: each measures for milliseconds, and the login node
/// is shared with others.
const AT_ONCE: usize = 64;
/// The deadline of one shim.
const DEADLINE: Duration = Duration::from_secs(3);
/// The deadline of one request, however many shims hang.
const ALL_DEADLINE: Duration = Duration::from_secs(8);
/// How long an answer is reused.
const FRESH: Duration = Duration::from_secs(1);

/// The last answer of one shim; it is locked while the shim is queried.
type Cell = Arc<tokio::sync::Mutex<Last>>;

#[derive(Debug, Default)]
struct Last {
    asked: Option<Instant>,
    stats: Option<pb::PodStats>,
}

/// The last answers of all shims.
#[derive(Debug, Default)]
pub struct Stats {
    pods: Mutex<HashMap<PodUid, Cell>>,
}

impl Stats {
    /// The usage of each of `pods`, in no particular order; pods whose usage is unknown are left
    /// out. Cancel safe.
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

    /// Forgets all pods but these.
    pub fn retain(&self, uids: &HashSet<PodUid>) {
        self.lock().retain(|uid, _| uids.contains(uid));
    }

    /// The usage of one pod: fresh if its shim answers in time.
    async fn one(
        &self,
        uid: PodUid,
        question: Option<impl Future<Output = Result<pb::PodStats, Status>>>,
        until: Instant,
    ) -> Option<pb::PodStats> {
        let cell = Arc::clone(self.lock().entry(uid.clone()).or_default());
        let until = until.min(Instant::now() + DEADLINE);
        // Another caller is querying the shim, which hangs; the first caller will see the answer.
        let mut last = timeout_at(until, cell.lock()).await.ok()?;
        if last.asked.is_some_and(|asked| asked.elapsed() < FRESH) {
            return last.stats.clone();
        }
        if let Some(question) = question {
            match timeout_at(until, question).await {
                Ok(Ok(answer)) => last.stats = Some(answer),
                // A shim of an older version returns `Unimplemented`; one that is stopping returns
                // `NotRunning`.
                Ok(Err(status)) => {
                    tracing::debug!(%uid, error = status.message(), "a shim returned no stats");
                }
                Err(_) => tracing::debug!(%uid, "a shim did not return its stats in time"),
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
        let rejected = ready(Err(Status::unimplemented("older")));
        assert_eq!(at(stats.one(uid(), Some(rejected), soon()).await), Some(1));
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
    async fn many_callers_share_one_query() {
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
