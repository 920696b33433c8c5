//! PURE: when an address that failed may be tried again.
//!
//! A site counts refused logins and blocks the address that they come from; fail2ban does so after five within ten minutes.
//! So after a refused login the pause is a minute, and soon ten. Whatever only costs a process or a connection is tried
//! again within seconds.
use std::time::Duration;

use tokio::time::Instant;

use super::{Carrier, LinkError};

/// How a failure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nobody answered.
    Network,
    /// A command gave no link.
    Command,
    /// Nothing changes until a person changes something.
    Setting,
    /// The login was refused.
    Authentication,
}

impl Kind {
    /// How this error of an attempt over `carrier` counts.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "every other error counts by its carrier"
    )]
    pub(super) fn of(error: &LinkError, carrier: &Carrier) -> Self {
        match error {
            LinkError::Command { source, .. } if source.cause.is_authentication() => {
                Self::Authentication
            }
            LinkError::Command { source, .. } if source.cause.needs_a_person() => Self::Setting,
            LinkError::Secret { .. } => Self::Setting,
            _ if carrier.starts_a_process() => Self::Command,
            _ => Self::Network,
        }
    }

    /// The first pause, and the longest.
    fn pauses(self) -> (Duration, Duration) {
        match self {
            Self::Network => (Duration::from_millis(100), Duration::from_secs(5)),
            Self::Command => (Duration::from_millis(500), Duration::from_secs(15)),
            Self::Setting => (Duration::from_secs(5), Duration::from_mins(1)),
            Self::Authentication => (Duration::from_mins(1), Duration::from_mins(10)),
        }
    }
}

/// The failures of one address since it worked last.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    kind: Option<Kind>,
    failures: u32,
    until: Option<Instant>,
}

impl Backoff {
    /// Whether it may be tried now.
    pub(super) fn allows(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| until <= now)
    }

    /// It failed. `jitter` is between 0 and 1: of many kubelets that lost one site not all come back at once.
    pub(super) fn failed(&mut self, kind: Kind, now: Instant, jitter: f64) {
        self.failures = match self.kind {
            Some(before) if before == kind => self.failures.saturating_add(1),
            Some(_) | None => 0,
        };
        self.kind = Some(kind);
        let (first, most) = kind.pauses();
        let pause = first
            .saturating_mul(1 << self.failures.min(16))
            .min(most)
            .mul_f64(1.0 + 0.25 * jitter.clamp(0.0, 1.0));
        self.until = Some(now + pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pauses after each of `count` failures.
    fn pauses(kind: Kind, count: usize, jitter: f64) -> Vec<Duration> {
        let mut backoff = Backoff::default();
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..count {
            backoff.failed(kind, now, jitter);
            let until = backoff.until.unwrap();
            assert!(!backoff.allows(now) && backoff.allows(until));
            pauses.push(until - now);
            now = until;
        }
        pauses
    }

    #[test]
    fn refused_logins_stay_below_what_a_site_blocks() {
        for jitter in [0.0, 1.0] {
            let pauses = pauses(Kind::Authentication, 20, jitter);
            // However the ten minutes lie, they contain fewer than five attempts.
            for window in pauses.windows(4) {
                let four: Duration = window.iter().sum();
                assert!(four > Duration::from_mins(10), "{window:?}");
            }
            assert!(pauses[19] <= Duration::from_secs(750));
        }
    }

    #[test]
    fn a_host_that_is_away_is_tried_again_within_seconds() {
        assert!(pauses(Kind::Command, 20, 1.0)[19] < Duration::from_secs(20));
        assert!(pauses(Kind::Network, 1, 1.0)[0] < Duration::from_millis(200));
        // Another kind of failure counts from its own beginning.
        let mut backoff = Backoff::default();
        let now = Instant::now();
        for _ in 0..5 {
            backoff.failed(Kind::Authentication, now, 0.0);
        }
        backoff.failed(Kind::Command, now, 0.0);
        assert!(backoff.allows(now + Duration::from_secs(1)));
    }
}
