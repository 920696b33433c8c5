//! Whether the controller's loop progresses: the loop sets a time that `/healthz/syncloop` reads.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::{sync::watch, time::Instant};

/// How often the loop beats if it has nothing to do.
pub(super) const BEAT: Duration = Duration::from_secs(10);
/// Longer than any round of one pod may take with all its deadlines. A loop without a beat for so long is stuck.
const STALE: Duration = Duration::from_mins(2);

/// When the controller's loop last progressed; clones are handles on the same time.
#[derive(Clone, Debug)]
pub struct LoopHealth(watch::Sender<Instant>);

impl Default for LoopHealth {
    fn default() -> Self {
        Self(watch::Sender::new(Instant::now()))
    }
}

impl LoopHealth {
    /// Records that the loop progressed just now.
    pub(super) fn beat(&self) {
        self.0.send_replace(Instant::now());
    }

    /// Did the loop progress recently?
    ///
    /// # Errors
    /// Returns a message with the time of the last progress if the loop is stuck.
    pub fn check(&self) -> Result<(), String> {
        judge(self.0.borrow().elapsed(), Timestamp::now())
    }
}

/// PURE: is a loop stuck whose last beat is this old?
fn judge(age: Duration, now: Timestamp) -> Result<(), String> {
    if age <= STALE {
        return Ok(());
    }
    let since = SignedDuration::try_from(age)
        .ok()
        .and_then(|age| now.checked_sub(age).ok())
        .unwrap_or(now);
    Err(format!(
        "sync Loop took longer than expected: no pod was synced since {}",
        since.strftime("%Y-%m-%dT%H:%M:%SZ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beat_older_than_two_minutes_is_told_with_its_time() {
        let now: Timestamp = "2026-11-22T12:00:00Z".parse().unwrap();
        assert_eq!(judge(Duration::ZERO, now), Ok(()));
        assert_eq!(judge(Duration::from_mins(2), now), Ok(()));
        let told = judge(Duration::from_secs(121), now).unwrap_err();
        assert_eq!(
            told,
            "sync Loop took longer than expected: no pod was synced since 2026-11-22T11:57:59Z"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_level_is_of_the_last_beat() {
        let health = LoopHealth::default();
        let reader = health.clone();
        tokio::time::advance(Duration::from_secs(119)).await;
        assert_eq!(reader.check(), Ok(()));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(reader.check().is_err());
        health.beat();
        assert_eq!(reader.check(), Ok(()));
    }
}
