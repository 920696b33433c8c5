//! PURE: what is not tried again for a while because it failed: writes of slices, and listeners at the addresses of pods. A slice that
//! the API server rejects (a quota, a namespace that is being deleted) neither delays the others nor is written again in every round.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    time::Duration,
};

use tokio::time::Instant;

/// The pause after the first failure; it doubles with each further one.
const FIRST: Duration = Duration::from_secs(5);
/// The longest pause.
const MOST: Duration = Duration::from_mins(2);

/// Those whose last try failed.
#[derive(Debug)]
pub(super) struct Retries<K>(HashMap<K, Retry>);

#[derive(Debug, Clone, Copy)]
struct Retry {
    due: Instant,
    pause: Duration,
}

impl<K: Eq + Hash> Retries<K> {
    /// Nothing has failed.
    pub(super) fn new() -> Self {
        Self(HashMap::new())
    }

    /// Whether it may be tried now.
    pub(super) fn is_due(&self, key: &K, now: Instant) -> bool {
        self.0.get(key).is_none_or(|retry| retry.due <= now)
    }

    /// Forgets all but these, which are still to be done.
    pub(super) fn keep(&mut self, pending: &HashSet<K>) {
        self.0.retain(|key, _| pending.contains(key));
    }

    /// Remembers that it failed. `jitter` is a random factor around 1.
    pub(super) fn failed(&mut self, key: K, now: Instant, jitter: f64) {
        let pause = self.0.get(&key).map_or(FIRST, |retry| retry.pause * 2);
        let pause = pause.min(MOST);
        let due = now + pause.mul_f64(jitter);
        self.0.insert(key, Retry { due, pause });
    }

    /// Remembers that it succeeded.
    pub(super) fn succeeded(&mut self, key: &K) {
        self.0.remove(key);
    }

    /// When the next one is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.values().map(|retry| retry.due).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::egress::table::Name;

    #[test]
    fn a_slice_that_is_rejected_is_written_less_and_less_often_and_delays_no_other() {
        let now = Instant::now();
        let (bad, good) = (Name::new("team", "bad"), Name::new("team", "good"));
        let mut retries = Retries::new();
        assert_eq!(retries.next(), None);
        retries.failed(bad.clone(), now, 1.0);
        assert!(!retries.is_due(&bad, now) && retries.is_due(&good, now));
        assert_eq!(retries.next(), Some(now + FIRST));
        assert!(retries.is_due(&bad, now + FIRST));
        for _ in 0..20 {
            retries.failed(bad.clone(), now, 1.0);
        }
        assert_eq!(retries.next(), Some(now + MOST));
        retries.succeeded(&bad);
        assert!(retries.is_due(&bad, now));
        retries.failed(bad.clone(), now, 1.0);
        assert_eq!(retries.next(), Some(now + FIRST), "it starts over");
        retries.keep(&HashSet::from([good]));
        assert_eq!(retries.next(), None, "nobody wants to write it any more");
    }
}
