//! How long one image may hold a slot for checks and conversions while others have to wait.
//!
//! What is in a layer costs whoever made it nothing: zeros of many GB are packed into some MB, and a hundred thousand files
//! into some more. So an image has time in proportion to what was downloaded of it, and at least [`LEAST`]. Afterwards it
//! stays as long as nobody needs its place; then it fails, to be tried again later (ADR 0137).

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{cache::Cache, slots::FairSlots};

/// The time of the smallest image.
const LEAST: Duration = Duration::from_mins(10);
/// How many downloaded bytes have one second more. Slow login nodes convert several MB in a second.
const PACE: u64 = 1 << 20;
/// How often it is looked whether others wait; those that came just now do not count.
const LOOK: Duration = Duration::from_mins(1);
/// For how long a pull that found no room in the cache counts as one that waits: it is tried again within this time.
const REFUSED: Duration = Duration::from_mins(5);

/// One image at a slot.
#[derive(Debug)]
pub(super) struct Turn {
    begin: Instant,
    size: u64,
    /// Whose slots it holds.
    host: String,
    /// What others may wait for.
    slots: [Arc<FairSlots>; 2],
    cache: Arc<Cache>,
}

impl Turn {
    /// Begins now, for an image of this size by its manifest, from this host.
    pub(super) fn begin(
        (size, host): (u64, &str),
        slots: [&Arc<FairSlots>; 2],
        cache: &Arc<Cache>,
    ) -> Self {
        Self {
            begin: Instant::now(),
            size,
            host: host.to_owned(),
            slots: slots.map(Arc::clone),
            cache: Arc::clone(cache),
        }
    }

    /// Does a part of the work; fails if the image is to make place before it is done. Cancel safe if the work is.
    pub(super) async fn limit<T>(
        &self,
        work: impl Future<Output = Result<T, String>>,
    ) -> Result<T, String> {
        tokio::select! {
            biased;
            done = work => done,
            why = self.overstayed() => Err(why),
        }
    }

    /// Waits until it is to make place, and returns why.
    async fn overstayed(&self) -> String {
        let lasts = lasts(self.size);
        tokio::time::sleep_until(self.begin + lasts).await;
        while !self.is_wanted() {
            tokio::time::sleep(LOOK).await;
        }
        let (size, minutes) = (self.size, lasts.as_secs() / 60);
        format!(
            "its check and its conversion take too long while other images wait: an image of {size} bytes then has {minutes} minutes"
        )
    }

    fn is_wanted(&self) -> bool {
        let mut slots = self.slots.iter();
        slots.any(|slots| slots.waited(&self.host) >= LOOK) || self.cache.refused_within(REFUSED)
    }
}

/// PURE: how long an image of this size may take although others wait.
fn lasts(size: u64) -> Duration {
    LEAST + Duration::from_secs(size / PACE)
}

#[cfg(test)]
mod tests {
    use knoc_contract::jobdir::StateDir;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_time_of_an_image_grows_with_what_was_downloaded() {
        for (size, minutes) in [(0, 10), (MIB, 10), (600 * MIB, 20), (60 << 30, 1034)] {
            assert_eq!(lasts(size).as_secs() / 60, minutes, "{size}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_image_makes_place_once_it_has_had_its_time_and_another_waits() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Arc::new(Cache::new(StateDir::new(dir.path())));
        let (pulls, conversions) = (FairSlots::new(1, 1), FairSlots::new(1, 1));
        let held = conversions.acquire("a").await;
        let turn = Turn::begin((60 * MIB, "a"), [&pulls, &conversions], &cache);
        let mut works = Box::pin(turn.limit(std::future::pending::<Result<(), String>>()));
        assert!(futures::poll!(&mut works).is_pending());
        // A little more than a minute, because timers are rounded up.
        let minute = LOOK + Duration::from_millis(2);
        for _ in 0..60 {
            tokio::time::advance(minute).await;
            assert!(futures::poll!(&mut works).is_pending(), "nobody waits");
        }
        let mut waits = Box::pin(conversions.acquire("a"));
        assert!(futures::poll!(&mut waits).is_pending());
        tokio::time::advance(minute).await;
        assert!(futures::poll!(&mut waits).is_pending());
        let ended = futures::poll!(&mut works);
        let std::task::Poll::Ready(Err(why)) = ended else {
            panic!("{ended:?}")
        };
        assert!(why.contains("62914560 bytes then has 11 minutes"), "{why}");
        drop(held);
        assert!(futures::poll!(&mut waits).is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn an_image_within_its_time_stays_whoever_waits() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Arc::new(Cache::new(StateDir::new(dir.path())));
        let slots = FairSlots::new(1, 1);
        let _held = slots.acquire("a").await;
        let mut waits = Box::pin(slots.acquire("b"));
        assert!(futures::poll!(&mut waits).is_pending());
        let turn = Turn::begin((0, "a"), [&slots, &slots], &cache);
        let done = async {
            tokio::time::sleep(Duration::from_mins(9)).await;
            Ok(7)
        };
        assert_eq!(turn.limit(done).await, Ok(7));
    }
}
