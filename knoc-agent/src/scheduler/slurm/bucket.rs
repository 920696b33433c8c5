//! PURE: the agent's own rate limit on sbatch; time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// A token bucket that assigns times in advance: later callers wait longer, in order.
#[derive(Debug)]
pub(super) struct Bucket {
    burst: f64,
    per_second: f64,
    tokens: f64,
    at: Option<Instant>,
}

impl Bucket {
    pub(super) fn new(burst: u32, per_second: f64) -> Self {
        let burst = f64::from(burst.max(1));
        let per_second = if per_second > 0.0 {
            per_second
        } else {
            f64::INFINITY
        };
        Self {
            burst,
            per_second,
            tokens: burst,
            at: None,
        }
    }

    /// Takes one token and returns how long to wait before using it.
    pub(super) fn take(&mut self, now: Instant) -> Duration {
        if self.per_second.is_infinite() {
            return Duration::ZERO;
        }
        let passed = self
            .at
            .map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.at = Some(now);
        self.tokens = (self.tokens + passed.as_secs_f64() * self.per_second).min(self.burst) - 1.0;
        Duration::try_from_secs_f64(-self.tokens / self.per_second).unwrap_or(Duration::ZERO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let mut bucket = Bucket::new(2, 10.0);
        let now = Instant::now();
        let waits: Vec<u128> = (0..4).map(|_| bucket.take(now).as_millis()).collect();
        assert_eq!(waits, [0, 0, 100, 200]);
        assert_eq!(bucket.take(now + Duration::from_secs(10)), Duration::ZERO);
    }

    #[test]
    fn no_rate_is_no_limit() {
        let mut bucket = Bucket::new(1, 0.0);
        let now = Instant::now();
        assert!((0..1000).all(|_| bucket.take(now) == Duration::ZERO));
    }
}
