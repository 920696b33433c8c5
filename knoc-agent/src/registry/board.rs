//! The observed state of all pods: the newest state of each, ordered by one generation counter.
//!
//! Pod actors publish; `GetPod` and `WatchPods` read. The board holds states, not a queue of
//! changes: a reader that falls behind receives only the newest state of each pod. Guards are never
//! held across an await.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use knoc_proto::pb::{self, pod_event::Event};
use tokio::sync::watch;

/// How many removals are remembered for readers that are behind. A reader further behind must start
/// over.
const REMOVALS: usize = 16_384;

/// The newest state of each pod.
#[derive(Debug)]
pub struct Board {
    epoch: i64,
    inner: Mutex<Inner>,
    /// The newest generation; a change wakes the readers.
    changed: watch::Sender<i64>,
}

#[derive(Debug, Default)]
struct Inner {
    generation: i64,
    pods: HashMap<String, Arc<pb::PodObserved>>,
    /// Which pod changed at which generation; one entry per pod.
    order: BTreeMap<i64, String>,
    /// Pods that were removed, by generation.
    removed: BTreeMap<i64, String>,
    /// Removals up to this generation have been forgotten.
    horizon: i64,
}

/// The reader is so far behind that removals it has not seen were forgotten; it must start with a
/// new snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the reader is too far behind and must start over")]
pub struct Behind;

impl Board {
    /// Creates an empty board of the agent's `epoch`.
    #[must_use]
    pub fn new(epoch: i64) -> Self {
        Self {
            epoch,
            inner: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }

    /// Publishes `observed` if it differs from the current state.
    pub fn publish(&self, mut observed: pb::PodObserved) {
        let mut inner = self.lock();
        if let Some(known) = inner.pods.get(&observed.uid) {
            observed.generation = known.generation;
            if **known == observed {
                return;
            }
            inner.order.remove(&observed.generation);
        }
        inner.generation += 1;
        let generation = inner.generation;
        observed.generation = generation;
        inner.order.insert(generation, observed.uid.clone());
        inner.pods.insert(observed.uid.clone(), Arc::new(observed));
        drop(inner);
        self.changed.send_replace(generation);
    }

    /// Removes a pod.
    pub fn remove(&self, uid: &str) {
        let mut inner = self.lock();
        let Some(known) = inner.pods.remove(uid) else {
            return;
        };
        inner.order.remove(&known.generation);
        inner.generation += 1;
        let generation = inner.generation;
        inner.removed.insert(generation, uid.to_owned());
        while inner.removed.len() > REMOVALS {
            if let Some((forgotten, _)) = inner.removed.pop_first() {
                inner.horizon = forgotten;
            }
        }
        drop(inner);
        self.changed.send_replace(generation);
    }

    /// The current state of one pod.
    #[must_use]
    pub fn get(&self, uid: &str) -> Option<Arc<pb::PodObserved>> {
        self.lock().pods.get(uid).cloned()
    }

    /// All pods, and the `Synced` marker that follows them.
    #[must_use]
    pub fn snapshot(&self) -> (Vec<Arc<pb::PodObserved>>, pb::Synced) {
        let inner = self.lock();
        let pods = inner
            .order
            .values()
            .filter_map(|uid| inner.pods.get(uid).cloned())
            .collect();
        (
            pods,
            pb::Synced {
                epoch: self.epoch,
                generation: inner.generation,
            },
        )
    }

    /// All changes after generation `seen`, and the generation that the reader has seen with them.
    pub fn since(&self, seen: i64) -> Result<(Vec<Event>, i64), Behind> {
        let inner = self.lock();
        if seen < inner.horizon {
            return Err(Behind);
        }
        let after = (std::ops::Bound::Excluded(seen), std::ops::Bound::Unbounded);
        let items = inner
            .order
            .range(after)
            .filter_map(|(_, uid)| inner.pods.get(uid));
        let removed = inner
            .removed
            .range(after)
            .map(|(_, uid)| Event::RemovedUid(uid.clone()));
        let events = removed
            .chain(items.map(|pod| Event::Item((**pod).clone())))
            .collect();
        Ok((events, inner.generation))
    }

    /// A receiver that wakes at each change.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<i64> {
        self.changed.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, message: &str) -> pb::PodObserved {
        pb::PodObserved {
            uid: uid.to_owned(),
            message: message.to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn a_late_reader_gets_the_newest_state_once() {
        let board = Board::new(7);
        board.publish(pod("a", "1"));
        let (items, synced) = board.snapshot();
        assert_eq!((items.len(), synced.epoch, synced.generation), (1, 7, 1));
        for n in 2..10 {
            board.publish(pod("a", &n.to_string()));
        }
        board.publish(pod("b", "x"));
        board.publish(pod("b", "x"));
        let (events, seen) = board.since(synced.generation).unwrap();
        assert_eq!(events.len(), 2);
        assert_eq!(seen, 10);
        assert!(matches!(&events[0], Event::Item(pod) if pod.message == "9"));
        assert_eq!(board.since(seen).unwrap().0, []);
    }

    #[test]
    fn a_pod_that_comes_again_is_removed_first() {
        let board = Board::new(1);
        board.publish(pod("a", "1"));
        board.remove("a");
        board.remove("a");
        board.publish(pod("a", "2"));
        let (events, _) = board.since(1).unwrap();
        assert!(matches!(
            &events[..],
            [Event::RemovedUid(_), Event::Item(_)]
        ));
    }

    #[test]
    fn one_too_far_behind_is_told() {
        let board = Board::new(1);
        for n in 0..=REMOVALS {
            board.publish(pod(&n.to_string(), ""));
            board.remove(&n.to_string());
        }
        assert_eq!(board.since(1), Err(Behind));
    }
}
