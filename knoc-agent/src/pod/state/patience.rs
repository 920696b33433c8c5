//! PURE: how long things are waited for: the site's settings, and what the machine makes of them.

use std::time::Duration;

use knoc_proto::ids::PodUid;

use super::Pod;

/// A job that was accepted may be missing from what the scheduler shows this long before anybody is told: a site's
/// squeue may answer from a cache, and the accounting is late. At most a quarter of the site's patience with lost jobs.
const LAG: Duration = Duration::from_mins(1);

/// The site's patience, from the site file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patience {
    /// How long the report of an ended job may take to show.
    pub report_grace: Duration,
    /// How long a job may wait for a reason that never ends.
    pub never_ends_after: Duration,
    /// How long a job that nobody knows may stay undecided.
    pub lost_after: Duration,
    /// Past the grace period, before the job is cancelled.
    pub stop_slack: Duration,
    /// First pause after a refusal or a failed pull.
    pub backoff_initial: Duration,
    /// Longest pause.
    pub backoff_max: Duration,
}

impl Pod {
    /// The pause before try `tries + 1`: it grows, and differs from pod to pod, so that what failed for many of them at
    /// the same time is not tried again by all of them at the same time.
    pub(super) fn pause(&self, tries: u32) -> Duration {
        let patience = &self.facts.patience;
        let factor = 2_u32.saturating_pow(tries.min(16));
        let pause = patience
            .backoff_initial
            .saturating_mul(factor)
            .min(patience.backoff_max);
        pause.mul_f64(jitter(&self.facts.uid, tries))
    }

    /// How long the scheduler may not show a job before anybody is told.
    pub(super) fn lag(&self) -> Duration {
        LAG.min(self.facts.patience.lost_after / 4)
    }
}

/// Between 0.8 and 1, from the pod and the try: the machine has no source of chance of its own.
fn jitter(uid: &PodUid, tries: u32) -> f64 {
    let bytes = uid.as_str().bytes().chain(tries.to_le_bytes());
    // FNV-1a.
    let hash = bytes.fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    1.0 - f64::from(hash % 1024) / 1024.0 / 5.0
}
