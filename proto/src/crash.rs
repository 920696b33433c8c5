//! Named points at which a test can kill a process, to prove that the process can be killed at any moment.
//!
//! Only debug builds and builds with the feature `crash-points` have them; in a release build [`point`] does nothing
//! and compiles to nothing (ADR 0080). A point has no effect unless the environment variable `KNOC_CRASH_AT` names it;
//! the variable is read once. A process that reaches the named point aborts: no destructor runs and nothing is flushed,
//! as with `SIGKILL`.

/// The environment variable that names the point at which the process aborts.
pub const VARIABLE: &str = "KNOC_CRASH_AT";

/// The names of all points, so that a test can try each of them.
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

/// Aborts the process if `KNOC_CRASH_AT` equals `name`, which must be one of [`POINTS`].
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
