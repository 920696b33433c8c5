//! PURE: which tokens that are not known yet may be reviewed by the API server now.
//!
//! Anybody who reaches the port can send tokens, and each new one costs a `TokenReview`. Each source has a rate and a
//! number of reviews at a time, and all sources together have larger ones. A token that the cluster has known within
//! [`super::KNOWN_TTL`] does not count: there is a bounded number of those, each is reviewed once in two minutes, and a
//! flood of guesses does not delay them.

use std::collections::HashMap;

use knoc_link::admission::Source;
use tokio::time::Instant;

/// Reviews per second of one source in the long run. The API server itself sends few tokens, most callers have one.
const RATE_OF_ONE: f64 = 10.0;
/// Reviews that a source may start at once after a pause.
const BURST_OF_ONE: f64 = 20.0;
/// Running reviews of one source: if the API server does not answer, each source waits only for its own.
const RUNNING_OF_ONE: u32 = 8;
/// The same limits for all sources together.
const RATE_OF_ALL: f64 = 50.0;
const BURST_OF_ALL: f64 = 100.0;
const RUNNING_OF_ALL: u32 = 32;
/// How many sources are remembered. Those whose bucket is full again are forgotten first.
const SOURCES: usize = 1024;

/// A token bucket, and how many reviews that it granted are running.
#[derive(Debug)]
struct Bucket {
    left: f64,
    at: Instant,
    running: u32,
}

impl Bucket {
    fn new(now: Instant, burst: f64) -> Self {
        Self {
            left: burst,
            at: now,
            running: 0,
        }
    }

    fn refill(&mut self, now: Instant, rate: f64, burst: f64) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + passed * rate).min(burst);
        self.at = now;
    }

    fn take(&mut self) {
        self.left -= 1.0;
        self.running += 1;
    }
}

/// The running reviews of unknown tokens, and the rates at which new ones may start.
#[derive(Debug, Default)]
pub(super) struct Reviews {
    all: Option<Bucket>,
    sources: HashMap<Source, Bucket>,
}

impl Reviews {
    /// May a review for this source start? If so, [`Self::end`] must be called when it ends.
    pub(super) fn begin(&mut self, now: Instant, source: Source) -> bool {
        let all = self
            .all
            .get_or_insert_with(|| Bucket::new(now, BURST_OF_ALL));
        all.refill(now, RATE_OF_ALL, BURST_OF_ALL);
        if all.left < 1.0 || all.running >= RUNNING_OF_ALL {
            return false;
        }
        if self.sources.len() >= SOURCES && !self.sources.contains_key(&source) {
            self.sources.retain(|_, bucket| {
                bucket.refill(now, RATE_OF_ONE, BURST_OF_ONE);
                bucket.running > 0 || bucket.left < BURST_OF_ONE
            });
            if self.sources.len() >= SOURCES {
                return false;
            }
        }
        let bucket = self
            .sources
            .entry(source)
            .or_insert_with(|| Bucket::new(now, BURST_OF_ONE));
        bucket.refill(now, RATE_OF_ONE, BURST_OF_ONE);
        if bucket.left < 1.0 || bucket.running >= RUNNING_OF_ONE {
            return false;
        }
        bucket.take();
        all.take();
        true
    }

    /// A review that was started has ended, with or without an answer.
    pub(super) fn end(&mut self, source: Source) {
        let all = self.all.iter_mut();
        for bucket in all.chain(self.sources.get_mut(&source)) {
            bucket.running = bucket.running.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn source(number: u8) -> Source {
        Source::V4([10, 0, 0, number].into())
    }

    #[test]
    fn a_flood_of_one_source_leaves_the_others_their_reviews() {
        let (mut reviews, now) = (Reviews::default(), Instant::now());
        let begun = (0..1000).filter(|_| reviews.begin(now, source(1))).count();
        assert_eq!(begun, 8, "in flight");
        assert!(reviews.begin(now, source(2)));
        for _ in 0..8 {
            reviews.end(source(1));
        }
        let mut begun = 8;
        while reviews.begin(now, source(1)) {
            reviews.end(source(1));
            begun += 1;
        }
        assert_eq!(begun, 20, "the burst");
        assert!(reviews.begin(now, source(2)));
        let later = now + Duration::from_secs(1);
        let mut begun = 0;
        while reviews.begin(later, source(1)) {
            reviews.end(source(1));
            begun += 1;
        }
        assert_eq!(begun, 10, "the rate");
    }

    proptest! {
        #[test]
        fn the_bounds_hold_whatever_comes(
            events in prop::collection::vec((0_u8..20, 0_u64..200, any::<bool>()), 1..500),
        ) {
            let (mut reviews, began) = (Reviews::default(), Instant::now());
            let mut now = began;
            let mut running: Vec<Source> = Vec::new();
            let mut begun = 0_u32;
            for (number, millis, end) in events {
                now += Duration::from_millis(millis);
                if end && let Some(source) = running.pop() {
                    reviews.end(source);
                }
                if reviews.begin(now, source(number)) {
                    running.push(source(number));
                    begun += 1;
                }
                prop_assert!(running.len() <= 32);
                for number in 0..20 {
                    let own = running.iter().filter(|one| **one == source(number)).count();
                    prop_assert!(own <= 8);
                }
                let most = BURST_OF_ALL + RATE_OF_ALL * (now - began).as_secs_f64();
                prop_assert!(f64::from(begun) <= most + 1e-6);
            }
        }

        #[test]
        fn the_memory_is_bounded(addresses in prop::collection::vec(any::<u32>(), 1..3000)) {
            let (mut reviews, now) = (Reviews::default(), Instant::now());
            for (at, address) in (0_u64..).zip(addresses) {
                let source = Source::V4(address.into());
                if reviews.begin(now + Duration::from_millis(20 * at), source) {
                    reviews.end(source);
                }
                prop_assert!(reviews.sources.len() <= SOURCES);
            }
        }
    }
}
