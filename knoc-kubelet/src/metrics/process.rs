//! Metrics of this process, from `/proc`.

use std::{fs, time::Duration};

/// What the kernel reports about this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Process {
    /// CPU time in user and system mode.
    pub cpu: Duration,
    /// Resident memory in bytes.
    pub resident: u64,
    /// How many file descriptors are open.
    pub open_fds: usize,
    /// The limit of open file descriptors.
    pub max_fds: u64,
    /// The start time since the Unix epoch.
    pub started: Duration,
}

/// The metrics of this process; `None` if `/proc` is not as expected.
#[must_use]
pub fn own() -> Option<Process> {
    let ticks = rustix::param::clock_ticks_per_second();
    let page = u64::try_from(rustix::param::page_size()).ok()?;
    let read = |path: &str| fs::read_to_string(path).ok();
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let process = parse(&read("/proc/self/stat")?, &read("/proc/stat")?, ticks, page)?;
    Some(Process {
        open_fds: fs::read_dir("/proc/self/fd").ok()?.count(),
        max_fds: limit.current.unwrap_or(u64::MAX),
        ..process
    })
}

/// PURE: parses `/proc/self/stat` and `/proc/stat`.
fn parse(stat: &str, host: &str, ticks: u64, page: u64) -> Option<Process> {
    let (_, rest) = stat.rsplit_once(") ")?;
    // The fields from the state on, which has index 0.
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    let time = |count: u64| Duration::from_millis(count.saturating_mul(1000) / ticks.max(1));
    let booted = host
        .lines()
        .find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())?;
    Some(Process {
        cpu: time(number(11)?.saturating_add(number(12)?)),
        resident: number(21)?.saturating_mul(page),
        started: Duration::from_secs(booted) + time(number(19)?),
        ..Process::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let stat = "7 (a) b) S 3 4 5 6 7 8 70 80 1 2 150 50 300 100 20 0 3 0 777 900 25 2";
        let process = parse(stat, "cpu 1 2\nbtime 1700000000\n", 100, 4096).unwrap();
        assert_eq!(process.cpu, Duration::from_secs(2));
        assert_eq!(process.resident, 25 * 4096);
        assert_eq!(process.started, Duration::from_millis(1_700_000_007_770));
        assert_eq!(parse("7 (x) S 1", "btime 1\n", 100, 4096), None);
    }

    #[test]
    fn the_metrics_of_this_process_are_read() {
        let own = own().unwrap();
        assert!(own.resident > 1 << 20 && own.open_fds > 2, "{own:?}");
        assert!(own.max_fds >= 64, "{own:?}");
    }
}
