//! Places that registries share fairly.
//!
//! At most so many in all, and at most so many of one registry. A free place goes to the registry that holds the
//! fewest, and there to whoever waits longest, so that a registry with many who wait, or with answers that trickle,
//! delays nobody but itself.
//!
//! Cancel safety: whoever stops waiting loses nothing but its turn; a dropped [`Place`] goes to the next.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// The places.
#[derive(Debug)]
pub(super) struct Slots {
    overall: usize,
    /// Of one registry.
    each: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    held: HashMap<String, usize>,
    /// In the order of their coming; bounded by the containers of this agent's pods.
    waiting: Vec<(String, oneshot::Sender<Place>)>,
}

impl State {
    fn held_by(&self, key: &str) -> usize {
        self.held.get(key).copied().unwrap_or(0)
    }

    fn total(&self) -> usize {
        self.held.values().sum()
    }
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    slots: Arc<Slots>,
    key: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.slots.release(&self.key);
    }
}

impl Slots {
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

    /// Waits for a place of `key`.
    pub(super) async fn acquire(self: &Arc<Self>, key: &str) -> Place {
        let receiver = {
            let mut state = self.state();
            if state.total() < self.overall && state.held_by(key) < self.each {
                // Nobody who waits could have it: what is free is given away as soon as it is free.
                *state.held.entry(key.to_owned()).or_default() += 1;
                None
            } else {
                let (sender, receiver) = oneshot::channel();
                state.waiting.retain(|(_, waiting)| !waiting.is_closed());
                state.waiting.push((key.to_owned(), sender));
                Some(receiver)
            }
        };
        let place = match receiver {
            Some(receiver) => receiver.await.ok(),
            None => None,
        };
        place.unwrap_or_else(|| Place {
            slots: Arc::clone(self),
            key: key.to_owned(),
        })
    }

    /// Does anybody wait?
    pub(super) fn wanted(&self) -> bool {
        let state = self.state();
        state.waiting.iter().any(|(_, sender)| !sender.is_closed())
    }

    fn release(self: &Arc<Self>, key: &str) {
        // Places of those that stopped waiting at this instant; their drop takes the lock again.
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
            unused.extend(sender.send(Place { slots, key }).err());
        }
        drop(state);
        drop(unused);
    }

    /// Who gets a place that is free; `None` if nobody can.
    fn next(&self, state: &mut State) -> Option<(String, oneshot::Sender<Place>)> {
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
        let slots = Slots::new(3, 2);
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
    async fn who_stops_waiting_takes_no_place() {
        let slots = Slots::new(1, 1);
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
    async fn a_place_that_was_given_and_never_taken_is_free_again() {
        let slots = Slots::new(1, 1);
        let held = slots.acquire("a").await;
        let mut given = Box::pin(slots.acquire("a"));
        assert!(given.as_mut().now_or_never().is_none());
        drop(held);
        drop(given);
        assert!(slots.acquire("b").now_or_never().is_some());
    }
}
