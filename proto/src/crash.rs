//! Named points at which a test can make a process die, to prove that no instant is a bad one to be killed.
//!
//! Inert unless the environment variable `KNOC_CRASH_AT` names the point; it is read once. A process that reaches its
//! point aborts: no destructor runs, nothing is flushed, as with `SIGKILL`.
use std::sync::OnceLock;

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

static ARMED: OnceLock<Option<String>> = OnceLock::new();

/// Aborts the process where `KNOC_CRASH_AT` equals `name`.
pub fn point(name: &'static str) {
    debug_assert!(POINTS.contains(&name), "unlisted crash point {name}");
    let armed = ARMED.get_or_init(|| std::env::var(VARIABLE).ok());
    if armed.as_deref() == Some(name) {
        eprintln!("{VARIABLE}={name}: aborting here");
        std::process::abort();
    }
}

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
