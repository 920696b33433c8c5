//! Slots for concurrent work, shared fairly between registries.
//!
//! The number of slots is limited in total and per registry. A free slot goes to the registry that
//! holds the fewest, and there to the task that has waited longest. So a registry with many waiting
//! tasks, or with slow answers, delays only itself. Registries are told apart by their hosts.
//!
//! Cancel safety: a task that stops waiting loses only its turn; a dropped [`Slot`] goes to the
//! next task.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

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
    waiting: Vec<(String, oneshot::Sender<Slot>)>,
}

impl State {
    fn held_by(&self, key: &str) -> usize {
        self.held.get(key).copied().unwrap_or(0)
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
                state.waiting.retain(|(_, waiting)| !waiting.is_closed());
                state.waiting.push((key.to_owned(), sender));
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
        state.waiting.iter().any(|(_, sender)| !sender.is_closed())
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
        while let Some((key, sender)) = self.next(&mut state) {
            *state.held.entry(key.clone()).or_default() += 1;
            let slots = Arc::clone(self);
            unused.extend(sender.send(Slot { slots, key }).err());
        }
        drop(state);
        drop(unused);
    }

    /// The task that gets the free slot; `None` if no task may have it.
    fn next(&self, state: &mut State) -> Option<(String, oneshot::Sender<Slot>)> {
        state.waiting.retain(|(_, sender)| !sender.is_closed());
        if state.total() >= self.overall {
            return None;
        }
        let waiting = state.waiting.iter().enumerate();
        let able = waiting.filter(|(_, (key, _))| state.held_by(key) < self.each);
        let (index, _) = able.min_by_key(|(_, (key, _))| state.held_by(key))?;
        Some(state.waiting.remove(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

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
