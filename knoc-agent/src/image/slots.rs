//! Slots for concurrent work, shared fairly between registries.
//!
//! The number of slots is limited in total and per registry. A free slot goes to the registry that
//! holds the fewest; of several, to the one that has waited longest since it came or was last given
//! a slot; and there to the task that has waited longest. So a registry with many waiting tasks, or
//! with slow answers, delays only itself. Registries are told apart by their hosts.
//!
//! Cancel safety: a task that stops waiting loses only its turn; a dropped [`Slot`] goes to the
//! next task.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

/// The slots.
#[derive(Debug)]
pub(super) struct FairSlots {
    overall: usize,
    /// The limit for one registry.
    each: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    held: HashMap<String, usize>,
    /// In order of arrival; bounded by the number of containers of this agent's pods.
    waiting: Vec<Waiting>,
    /// When a waiting task was last given a slot.
    given: Option<Instant>,
    /// The same for each key; not longer than `waiting`.
    served: HashMap<String, Instant>,
}

#[derive(Debug)]
struct Waiting {
    key: String,
    since: Instant,
    sender: oneshot::Sender<Slot>,
}

impl State {
    fn held_by(&self, key: &str) -> usize {
        self.held.get(key).copied().unwrap_or(0)
    }

    /// What the next task has the least of: slots that its key holds, and then the time of its turn,
    /// which begins anew when a slot is given to its key.
    fn rank(&self, task: &Waiting) -> (usize, Instant) {
        let served = self.served.get(&task.key).copied();
        let turn = served.map_or(task.since, |served| served.max(task.since));
        (self.held_by(&task.key), turn)
    }

    fn total(&self) -> usize {
        self.held.values().sum()
    }
}

/// One slot, which is held until it is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Arc<FairSlots>,
    key: String,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.release(&self.key);
    }
}

impl FairSlots {
    pub(super) fn new(overall: usize, each: usize) -> Arc<Self> {
        Arc::new(Self {
            overall: overall.max(1),
            each: each.max(1),
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a slot for `key`.
    pub(super) async fn acquire(self: &Arc<Self>, key: &str) -> Slot {
        let receiver = {
            let mut state = self.state();
            if state.total() < self.overall && state.held_by(key) < self.each {
                // No waiting task can use it, because a free slot is handed over as soon as it is
                // free.
                *state.held.entry(key.to_owned()).or_default() += 1;
                None
            } else {
                let (sender, receiver) = oneshot::channel();
                state.waiting.retain(|task| !task.sender.is_closed());
                state.waiting.push(Waiting {
                    key: key.to_owned(),
                    since: Instant::now(),
                    sender,
                });
                Some(receiver)
            }
        };
        let slot = match receiver {
            Some(receiver) => receiver.await.ok(),
            None => None,
        };
        slot.unwrap_or_else(|| Slot {
            slots: Arc::clone(self),
            key: key.to_owned(),
        })
    }

    /// Whether any task waits.
    pub(super) fn wanted(&self) -> bool {
        let state = self.state();
        state.waiting.iter().any(|task| !task.sender.is_closed())
    }

    /// For how long a task has waited, of those that still do and could have a slot that `key` holds; zero if none waits. Those of
    /// another registry that has its share could not.
    pub(super) fn waited(&self, key: &str) -> Duration {
        let state = self.state();
        let able = state.waiting.iter().filter(|task| {
            let fits = task.key == key || state.held_by(&task.key) < self.each;
            fits && !task.sender.is_closed()
        });
        let since = able.map(|task| task.since).min();
        since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// For how long no slot was given while a registry without any waits; zero if none waits.
    pub(super) fn starved(&self) -> Duration {
        let state = self.state();
        let starving = state
            .waiting
            .iter()
            .filter(|task| !task.sender.is_closed() && state.held_by(&task.key) == 0);
        let since = starving.map(|task| task.since).min();
        let since = since.map(|since| state.given.map_or(since, |given| given.max(since)));
        since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn release(self: &Arc<Self>, key: &str) {
        // Slots of tasks that stopped waiting just now; dropping them takes the lock again.
        let mut unused = Vec::new();
        let mut state = self.state();
        if let Some(held) = state.held.get_mut(key) {
            *held = held.saturating_sub(1);
            if *held == 0 {
                state.held.remove(key);
            }
        }
        while let Some(Waiting { key, sender, .. }) = self.next(&mut state) {
            let now = Instant::now();
            state.given = Some(now);
            state.served.insert(key.clone(), now);
            *state.held.entry(key.clone()).or_default() += 1;
            let slots = Arc::clone(self);
            unused.extend(sender.send(Slot { slots, key }).err());
        }
        let State {
            waiting, served, ..
        } = &mut *state;
        if served.len() > waiting.len() {
            served.retain(|key, _| waiting.iter().any(|task| task.key == *key));
        }
        drop(state);
        drop(unused);
    }

    /// The task that gets the free slot; `None` if no task may have it.
    fn next(&self, state: &mut State) -> Option<Waiting> {
        state.waiting.retain(|task| !task.sender.is_closed());
        if state.total() >= self.overall {
            return None;
        }
        let waiting = state.waiting.iter().enumerate();
        let able = waiting.filter(|(_, task)| state.held_by(&task.key) < self.each);
        let (index, _) = able.min_by_key(|(_, task)| state.rank(task))?;
        Some(state.waiting.remove(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_the_share_of_its_own_registry_wants_nothing_of_others() {
        let slots = FairSlots::new(3, 1);
        let _one = slots.acquire("slow").await;
        let mut waits = Box::pin(slots.acquire("slow"));
        assert!(waits.as_mut().now_or_never().is_none());
        let minute = Duration::from_mins(1);
        tokio::time::advance(minute).await;
        assert_eq!(slots.waited("other"), Duration::ZERO);
        assert_eq!(slots.waited("slow"), minute);
        // Once all slots are held, whoever has none could have any.
        let _others = (slots.acquire("a").await, slots.acquire("b").await);
        let mut waits_too = Box::pin(slots.acquire("c"));
        assert!(waits_too.as_mut().now_or_never().is_none());
        tokio::time::advance(minute).await;
        assert_eq!(slots.waited("a"), minute);
    }

    #[tokio::test]
    async fn a_registry_has_its_share_and_the_others_theirs() {
        let slots = FairSlots::new(3, 2);
        let (a, _b) = (slots.acquire("a").await, slots.acquire("a").await);
        let mut third = Box::pin(slots.acquire("a"));
        assert!(third.as_mut().now_or_never().is_none(), "its share is two");
        let _other = slots.acquire("b").await;
        let mut waits_of_a = Box::pin(slots.acquire("a"));
        assert!(waits_of_a.as_mut().now_or_never().is_none());
        let mut c = Box::pin(slots.acquire("c"));
        assert!(c.as_mut().now_or_never().is_none(), "all three are held");
        assert!(slots.wanted());
        drop(a);
        assert!(third.as_mut().now_or_never().is_none());
        let c = c.as_mut().now_or_never();
        assert!(c.is_some(), "the registry with the fewest goes first");
        drop(c);
        assert!(third.as_mut().now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_task_that_stops_waiting_takes_no_slot() {
        let slots = FairSlots::new(1, 1);
        let held = slots.acquire("a").await;
        let mut gone = Box::pin(slots.acquire("a"));
        assert!(gone.as_mut().now_or_never().is_none());
        let mut stays = Box::pin(slots.acquire("b"));
        assert!(stays.as_mut().now_or_never().is_none());
        drop(gone);
        drop(held);
        assert!(stays.as_mut().now_or_never().is_some());
        drop(stays);
        assert!(slots.acquire("a").now_or_never().is_some());
        assert!(!slots.wanted());
    }

    #[tokio::test(start_paused = true)]
    async fn a_registry_without_a_slot_starves_until_one_is_given() {
        let minute = Duration::from_mins(1);
        let slots = FairSlots::new(2, 2);
        let (a, _b) = (slots.acquire("a").await, slots.acquire("b").await);
        let mut more = Box::pin(slots.acquire("a"));
        assert!(more.as_mut().now_or_never().is_none());
        tokio::time::advance(minute).await;
        assert_eq!(slots.starved(), Duration::ZERO, "a has a slot");
        let (mut c, mut d) = (Box::pin(slots.acquire("c")), Box::pin(slots.acquire("d")));
        assert!(c.as_mut().now_or_never().is_none());
        tokio::time::advance(minute).await;
        assert!(d.as_mut().now_or_never().is_none());
        tokio::time::advance(minute).await;
        assert_eq!(slots.starved(), 2 * minute);
        drop(a);
        assert_eq!(slots.starved(), Duration::ZERO, "one was given just now");
        tokio::time::advance(minute).await;
        assert_eq!(slots.starved(), minute);
        drop((c, d));
        assert_eq!(slots.starved(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_queue_of_one_registry_does_not_go_before_a_registry_that_came_later() {
        let slots = FairSlots::new(1, 1);
        let tick = || tokio::time::advance(Duration::from_secs(1));
        let held = slots.acquire("a").await;
        let mut queue = Vec::new();
        for key in ["a", "a", "a", "b"] {
            tick().await;
            let mut task = Box::pin(slots.acquire(key));
            assert!(task.as_mut().now_or_never().is_none());
            queue.push(task);
        }
        tick().await;
        drop(held);
        let first = queue[0].as_mut().now_or_never();
        assert!(first.is_some(), "it has waited for longest");
        tick().await;
        drop(first);
        let of_b = queue[3].as_mut().now_or_never();
        assert!(of_b.is_some(), "a was served after b had come");
        drop(of_b);
        assert!(queue[1].as_mut().now_or_never().is_some());
        assert!(slots.state().served.len() <= 1, "only who waits is kept");
    }

    #[tokio::test]
    async fn a_slot_that_was_given_and_never_taken_is_free_again() {
        let slots = FairSlots::new(1, 1);
        let held = slots.acquire("a").await;
        let mut given = Box::pin(slots.acquire("a"));
        assert!(given.as_mut().now_or_never().is_none());
        drop(held);
        drop(given);
        assert!(slots.acquire("b").now_or_never().is_some());
    }
}
