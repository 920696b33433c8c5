//! Task: signals to the job begin the stop of its containers.
//!
//! - TERM and INT come from others: `scancel`, preemption, a time limit. Slurm kills the job `KillWait` seconds later, so
//!   the grace period ends before that, and no program is spared until then, however late it was told. The value is read from
//!   `slurm.conf` on the node: asking the controller would be one request for each of many jobs that are cancelled together.
//! - USR2 is Slurm's warning ahead of the time limit (`--signal` of the batch script), early enough for the whole grace.
//! - USR1 is the agent's own stop if the link is down (capability `stop-signal`): nobody kills the job meanwhile. Its grace period
//!   is in the job directory.

use std::{io, path::PathBuf, time::Duration};

use knoc_contract::jobdir::JobDir;
use knoc_proto::pb::EndedBy;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use super::{plan::AFTER_TERM, supervisor::Command};

/// Slurm's default of `KillWait`.
const KILL_WAIT: Duration = Duration::from_secs(30);

/// Assumed if no `slurm.conf` can be read: enough for most programs, and less than what most sites set.
const UNKNOWN: Duration = Duration::from_secs(10);

/// A healthy file system never takes this long to read the grace period of the agent's stop.
const READ: Duration = Duration::from_secs(5);

/// How much of `KillWait` is kept for the final report.
const REPORT: Duration = Duration::from_secs(1);

/// The signals that end a pod.
#[derive(Debug)]
pub(crate) struct Signals {
    term: Signal,
    interrupt: Signal,
    stop: Signal,
    limit: Signal,
}

impl Signals {
    /// Installs the handlers: from now on none of the signals ends the process.
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            stop: signal(SignalKind::user_defined1())?,
            limit: signal(SignalKind::user_defined2())?,
        })
    }

    /// Task: turns each signal into a stop. Ends with the supervisor.
    pub(crate) async fn obey(
        mut self,
        own: Duration,
        jobdir: JobDir,
        commands: mpsc::Sender<Command>,
    ) {
        loop {
            // If several come at once, the one that says most about the reason is taken first.
            let (by, reason) = tokio::select! {
                biased;
                Some(()) = self.limit.recv() => {
                    (EndedBy::TimeLimit, "the job is about to reach its time limit")
                }
                Some(()) = self.stop.recv() => (EndedBy::Stop, "the agent ends the pod"),
                Some(()) = self.term.recv() => (EndedBy::Signal, "the job was sent SIGTERM"),
                Some(()) = self.interrupt.recv() => (EndedBy::Signal, "the job was sent SIGINT"),
                else => return,
            };
            let (mut grace, mut left) = (own, None);
            if by == EndedBy::Signal {
                left = until_killed();
            } else if by == EndedBy::Stop {
                let dir = jobdir.clone();
                let read = tokio::task::spawn_blocking(move || dir.stop_grace());
                let read = tokio::time::timeout(READ, read).await;
                let asked = read.ok().and_then(Result::ok).flatten();
                grace = asked.unwrap_or(own);
            }
            // Containers that are told only at the end of the grace period have a moment, too.
            let longest = left.map(|left| left.saturating_sub(AFTER_TERM));
            let stop = Command::Stop {
                grace: longest.map_or(grace, |longest| grace.min(longest)),
                left,
                by,
                reason: reason.to_owned(),
            };
            if commands.send(stop).await.is_err() {
                return;
            }
        }
    }
}

/// How long it is until Slurm kills the job, without the time for the final report; `None` outside of Slurm.
fn until_killed() -> Option<Duration> {
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
    Some(wait.saturating_sub(REPORT))
}

/// PURE: `KillWait` in the text of `slurm.conf`; the last setting counts.
fn kill_wait(config: &str) -> Option<Duration> {
    let settings = config
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default())
        .flat_map(str::split_ascii_whitespace);
    let mut values = settings.filter_map(|setting| {
        let (name, value) = setting.split_once('=')?;
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
