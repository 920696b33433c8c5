//! Named points at which a test can make a process die, to prove that no instant is a bad one to be killed.
//!
//! Only debug builds and builds with the feature `crash-points` have them; in a release build [`point`] does nothing and
//! leaves no code behind (ADR 0080). A point does nothing either unless the environment variable `KNOC_CRASH_AT` names
//! it; the variable is read once. A process that reaches the named point aborts: no destructor runs and nothing is
//! flushed, as with `SIGKILL`.

/// The environment variable that arms one point.
pub const VARIABLE: &str = "KNOC_CRASH_AT";

/// All points there are, so that a test can walk them.
pub const POINTS: &[&str] = &[
    "agent.record.before",
    "agent.record.after",
    "agent.sbatch.before",
    "agent.sbatch.after",
    "agent.report.before",
    "agent.report.after",
    "shim.claim.before",
    "shim.claim.after",
    "shim.report.before",
    "shim.report.after",
    "kubelet.patch.before",
    "kubelet.patch.after",
    "kubelet.delete.before",
    "kubelet.delete.after",
    "kubelet.ensure.before",
    "kubelet.ensure.after",
];

/// Aborts the process if `KNOC_CRASH_AT` equals `name`.
#[cfg(any(debug_assertions, feature = "crash-points"))]
pub fn point(name: &'static str) {
    use std::sync::OnceLock;

    static ARMED: OnceLock<Option<String>> = OnceLock::new();

    debug_assert!(POINTS.contains(&name), "unlisted crash point {name}");
    let armed = ARMED.get_or_init(|| std::env::var(VARIABLE).ok());
    if armed.as_deref() == Some(name) {
        eprintln!("{VARIABLE}={name}: aborting here");
        std::process::abort();
    }
}

/// Does nothing: this build has no crash points.
#[cfg(not(any(debug_assertions, feature = "crash-points")))]
#[inline]
pub fn point(_name: &'static str) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unarmed_points_do_nothing() {
        for name in POINTS {
            point(name);
        }
    }
}
