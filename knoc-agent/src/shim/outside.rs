//! How long a signal from outside leaves us: Slurm kills a job `KillWait` seconds after it was sent TERM.
//!
//! The value is read from `slurm.conf` on the node: asking the controller would be one request for each of many jobs
//! that are cancelled together.

use std::{path::PathBuf, time::Duration};

/// Slurm's own default.
const KILL_WAIT: Duration = Duration::from_secs(30);

/// Where there is no `slurm.conf` to be read: enough for most programs, and less than most sites' setting.
const UNKNOWN: Duration = Duration::from_secs(10);

/// How much of it is kept for killing, and for the final report.
const MARGIN: Duration = Duration::from_secs(1);

/// The longest grace that ends before Slurm kills us; `None` outside of Slurm.
pub(crate) fn longest_grace() -> Option<Duration> {
    std::env::var_os("SLURM_JOB_ID")?;
    let named = std::env::var_os("SLURM_CONF").map(PathBuf::from);
    let usual = [
        "/etc/slurm/slurm.conf",
        "/run/slurm/conf/slurm.conf",
        "/etc/slurm-llnl/slurm.conf",
    ];
    let candidates = named.into_iter().chain(usual.map(PathBuf::from));
    let found = candidates
        .into_iter()
        .find_map(|path| std::fs::read_to_string(path).ok());
    let wait = found.map_or(UNKNOWN, |text| kill_wait(&text).unwrap_or(KILL_WAIT));
    Some(wait.saturating_sub(MARGIN))
}

/// PURE
fn kill_wait(config: &str) -> Option<Duration> {
    let words = config
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default())
        .flat_map(str::split_ascii_whitespace);
    let mut values = words.filter_map(|word| {
        let (name, value) = word.split_once('=')?;
        name.eq_ignore_ascii_case("KillWait").then_some(value)
    });
    values.next_back()?.parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_setting_counts() {
        let wait = |text| kill_wait(text).map(|wait| wait.as_secs());
        assert_eq!(
            wait("SlurmdTimeout=5 killwait=3 ReturnToService=2\n"),
            Some(3)
        );
        assert_eq!(wait("#KillWait=9\nKillWait=60 # long\n"), Some(60));
        assert_eq!(wait("ClusterName=x\n"), None);
    }
}
