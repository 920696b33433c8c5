//! PURE: the site's timeouts, and the pauses that the machine derives from them.

use std::time::Duration;

use knoc_proto::ids::PodUid;

/// How long an accepted job may be missing from the scheduler's answers before users are told: a site's squeue may
/// answer from a cache, and the accounting is late. It is at most a quarter of `lost_after`.
const LAG: Duration = Duration::from_mins(1);

/// The site's timeouts, from the site file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeouts {
    /// How long after the end of a job its report may appear.
    pub report_grace: Duration,
    /// How long a job may wait for a reason that never ends.
    pub never_ends_after: Duration,
    /// How long a job that the scheduler does not know may stay undecided.
    pub lost_after: Duration,
    /// How long after the grace period the job is cancelled.
    pub stop_slack: Duration,
    /// The first pause after the scheduler refused a job, or after a failed pull.
    pub backoff_initial: Duration,
    /// The longest such pause.
    pub backoff_max: Duration,
}

#[cfg(test)]
impl Timeouts {
    /// The same for each, in tests that wait for none of them.
    pub(crate) fn each(time: Duration) -> Self {
        Self {
            report_grace: time,
            never_ends_after: time,
            lost_after: time,
            stop_slack: time,
            backoff_initial: time,
            backoff_max: time,
        }
    }
}

impl Timeouts {
    /// The pause before try `tries + 1`. It grows, and it differs from pod to pod, so that pods
    /// which failed at the same time do not all try again at the same time.
    pub(super) fn pause(&self, uid: &PodUid, tries: u32) -> Duration {
        let factor = 2_u32.saturating_pow(tries.min(16));
        let pause = self.backoff_initial.saturating_mul(factor);
        pause.min(self.backoff_max).mul_f64(jitter(uid, tries))
    }

    /// How long the scheduler may leave a job out of its answers before users are told.
    pub(super) fn lag(&self) -> Duration {
        LAG.min(self.lost_after / 4)
    }
}

/// Between 0.8 and 1, derived from the pod and the try, because the machine has no random numbers.
fn jitter(uid: &PodUid, tries: u32) -> f64 {
    let bytes = uid.as_str().bytes().chain(tries.to_le_bytes());
    // FNV-1a.
    let hash = bytes.fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    1.0 - f64::from(hash % 1024) / 1024.0 / 5.0
}
