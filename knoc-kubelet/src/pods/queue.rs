//! The keys of pods to reconcile. Each key is at most once in the queue and is handed to one worker at a time.
//!
//! A key that is pushed while its worker runs is handed out once more when the worker is done. Keys that are pushed as
//! urgent are handed out before all others: among hundreds of pods, those that have ended are reported first.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use knoc_proto::ids::PodUid;

#[derive(Clone, Copy, Default, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    #[default]
    Usual,
    Urgent,
}

#[derive(Default, Debug)]
struct State {
    urgent: VecDeque<PodUid>,
    ready: VecDeque<PodUid>,
    /// The keys of `urgent` and `ready`. A key that became urgent later leaves its entry in `ready`, which is skipped.
    queued: HashMap<PodUid, Urgency>,
    running: HashSet<PodUid>,
    again: HashMap<PodUid, Urgency>,
    later: BTreeSet<(Instant, PodUid)>,
    due: HashMap<PodUid, Instant>,
}

#[derive(Default, Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

/// The queue; clones are handles on the same one. Only one task takes keys from it.
#[derive(Clone, Default, Debug)]
pub struct Queue(Arc<Shared>);

impl Queue {
    /// Queues this key now.
    pub fn push(&self, uid: &PodUid) {
        self.state().push(uid, Urgency::Usual);
        self.0.changed.notify_one();
    }

    /// Queues this key before all that are not urgent.
    pub fn push_urgent(&self, uid: &PodUid) {
        self.state().push(uid, Urgency::Urgent);
        self.0.changed.notify_one();
    }

    /// Queues this key after a while, or earlier if an earlier time was requested before.
    pub fn push_after(&self, uid: &PodUid, after: Duration) {
        self.state().push_at(uid, Instant::now() + after);
        self.0.changed.notify_one();
    }

    /// The next key; it is not handed out again before [`Queue::done`]. Cancel safe.
    pub async fn next(&self) -> PodUid {
        loop {
            let changed = self.0.changed.notified();
            let wake = {
                let mut state = self.state();
                state.queue_due(Instant::now());
                if let Some(uid) = state.pop() {
                    return uid;
                }
                state.later.first().map(|(at, _)| *at)
            };
            match wake {
                None => changed.await,
                Some(at) => {
                    tokio::select! {
                        biased;
                        () = changed => {}
                        () = tokio::time::sleep_until(at) => {}
                    }
                }
            }
        }
    }

    /// The worker of this key is done.
    pub fn done(&self, uid: &PodUid) {
        let mut state = self.state();
        state.running.remove(uid);
        if let Some(urgency) = state.again.remove(uid) {
            state.push(uid, urgency);
        }
        drop(state);
        self.0.changed.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn push(&mut self, uid: &PodUid, urgency: Urgency) {
        if self.running.contains(uid) {
            let again = self.again.entry(uid.clone()).or_default();
            *again = urgency.max(*again);
            return;
        }
        let before = self.queued.get(uid);
        if before.is_some_and(|before| *before >= urgency) {
            return;
        }
        self.queued.insert(uid.clone(), urgency);
        match urgency {
            Urgency::Urgent => self.urgent.push_back(uid.clone()),
            Urgency::Usual => self.ready.push_back(uid.clone()),
        }
    }

    fn push_at(&mut self, uid: &PodUid, at: Instant) {
        if let Some(before) = self.due.get(uid).copied() {
            if before <= at {
                return;
            }
            self.later.remove(&(before, uid.clone()));
        }
        self.due.insert(uid.clone(), at);
        self.later.insert((at, uid.clone()));
    }

    fn queue_due(&mut self, now: Instant) {
        while let Some((at, _)) = self.later.first()
            && *at <= now
            && let Some((_, uid)) = self.later.pop_first()
        {
            self.due.remove(&uid);
            self.push(&uid, Urgency::Usual);
        }
    }

    fn pop(&mut self) -> Option<PodUid> {
        loop {
            let urgent = self.urgent.pop_front();
            let uid = urgent.or_else(|| self.ready.pop_front())?;
            if self.queued.remove(&uid).is_some() {
                self.running.insert(uid.clone());
                return Some(uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(name: &str) -> PodUid {
        name.parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_is_handed_out_once_and_comes_again_when_pushed_meanwhile() {
        let queue = Queue::default();
        queue.push(&uid("a"));
        queue.push(&uid("a"));
        queue.push(&uid("b"));
        assert_eq!(queue.next().await.as_str(), "a");
        queue.push(&uid("a"));
        queue.push(&uid("a"));
        assert_eq!(queue.next().await.as_str(), "b");
        let none = tokio::time::timeout(Duration::from_secs(1), queue.next()).await;
        assert!(none.is_err(), "the worker of a is still running");
        queue.done(&uid("a"));
        assert_eq!(queue.next().await.as_str(), "a");
        queue.done(&uid("a"));
        let none = tokio::time::timeout(Duration::from_secs(1), queue.next()).await;
        assert!(none.is_err(), "pushed twice, looked at once more");
    }

    #[tokio::test(start_paused = true)]
    async fn an_urgent_key_comes_first_and_once() {
        let queue = Queue::default();
        for name in ["a", "b", "c"] {
            queue.push(&uid(name));
        }
        queue.push_urgent(&uid("c"));
        queue.push(&uid("c"));
        queue.push_urgent(&uid("d"));
        for name in ["c", "d", "a"] {
            assert_eq!(queue.next().await.as_str(), name);
            queue.done(&uid(name));
        }
        // What became urgent while its worker ran is urgent afterwards.
        queue.push(&uid("e"));
        assert_eq!(queue.next().await.as_str(), "b");
        queue.push_urgent(&uid("b"));
        queue.push(&uid("b"));
        queue.done(&uid("b"));
        for name in ["b", "e"] {
            assert_eq!(queue.next().await.as_str(), name);
            queue.done(&uid(name));
        }
        let none = tokio::time::timeout(Duration::from_secs(1), queue.next()).await;
        assert!(none.is_err(), "each of them once");
    }

    #[tokio::test(start_paused = true)]
    async fn a_delayed_key_comes_at_its_earliest_time() {
        let queue = Queue::default();
        let start = Instant::now();
        queue.push_after(&uid("a"), Duration::from_mins(1));
        queue.push_after(&uid("a"), Duration::from_secs(5));
        queue.push_after(&uid("a"), Duration::from_secs(30));
        assert_eq!(queue.next().await.as_str(), "a");
        assert_eq!(start.elapsed(), Duration::from_secs(5));
        queue.done(&uid("a"));
        let none = tokio::time::timeout(Duration::from_mins(10), queue.next()).await;
        assert!(none.is_err());
    }
}
