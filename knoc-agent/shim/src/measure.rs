//! Measures processes: reads `/proc` into samples for [`super::usage`]. The calls block, but touch no disk.

use std::{fs, os::unix::fs::MetadataExt as _};

use super::{
    proc::{self, Process},
    usage::{Counters, Sample, Used},
};

const NANOS: u64 = 1_000_000_000;

/// All processes of the pod: those below the shim, which also inherits orphans.
pub(crate) fn pod() -> Vec<Sample> {
    let below = proc::descendants(&proc::all(), std::process::id());
    below.into_iter().filter_map(sample).collect()
}

/// What a process used so far. Also works for one that has ended but was not waited for.
pub(crate) fn used(pid: u32) -> Option<Used> {
    let ticks = rustix::param::clock_ticks_per_second();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(parse(&stat, ticks)?.2)
}

fn sample(pid: u32) -> Option<Sample> {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
    let (process, start, mut used) =
        parse(&read("stat")?, rustix::param::clock_ticks_per_second())?;
    // Ticks are coarse: a program that mostly sleeps would show no time. `schedstat` is precise, but has only the first
    // thread.
    let precise = read("schedstat").and_then(|text| first(&text));
    used.own.cpu = used.own.cpu.max(precise.unwrap_or_default());
    let (resident, shared) = read("statm")
        .and_then(|text| memory(&text, u64::try_from(rustix::param::page_size()).ok()?))
        .unwrap_or_default();
    let swapped = read("status").and_then(|text| swapped(&text));
    let namespace = fs::metadata(format!("/proc/{pid}/ns/pid")).ok();
    Some(Sample {
        process: Process { pid, ..process },
        start,
        used,
        resident,
        shared,
        swapped: swapped.unwrap_or_default(),
        namespace: namespace.map(|file| file.ino()),
    })
}

/// PURE: the process (with pid 0), its start time and what it used, from `/proc/PID/stat`.
fn parse(stat: &str, ticks: u64) -> Option<(Process, u64, Used)> {
    let (_, rest) = stat.rsplit_once(") ")?;
    // Index 0 is the process's state.
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    let small = |index: usize| fields.get(index)?.parse::<u32>().ok();
    let time = |user: usize, system: usize| {
        let sum = number(user)?.saturating_add(number(system)?);
        Some(sum.saturating_mul(NANOS / ticks.max(1)))
    };
    let process = Process {
        pid: 0,
        parent: small(1)?,
        session: small(3)?,
    };
    let used = Used {
        own: Counters {
            cpu: time(11, 12)?,
            faults: number(7)?,
            major: number(9)?,
        },
        kids: Counters {
            cpu: time(13, 14)?,
            faults: number(8)?,
            major: number(10)?,
        },
    };
    Some((process, number(19)?, used))
}

/// PURE: the first number of a text.
fn first(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().next()?.parse().ok()
}

/// PURE: resident bytes, and those of them that belong to files or are shared, from `/proc/PID/statm`.
fn memory(statm: &str, page: u64) -> Option<(u64, u64)> {
    let mut pages = statm
        .split_ascii_whitespace()
        .skip(1)
        .map(|field| field.parse::<u64>().ok());
    let (resident, shared) = (pages.next()??, pages.next()??);
    Some((resident * page, shared * page))
}

/// PURE: bytes swapped out, from `/proc/PID/status`.
fn swapped(status: &str) -> Option<u64> {
    let rest = status
        .lines()
        .find_map(|line| line.strip_prefix("VmSwap:"))?;
    Some(first(rest)? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let stat = "7 (a) b) S 3 4 5 6 7 8 70 80 1 2 150 50 300 100 20 0 3 0 777 1 2";
        let (process, began, used) = parse(stat, 100).unwrap();
        assert_eq!((process.parent, process.session, began), (3, 5, 777));
        let own = Counters {
            cpu: 2_000_000_000,
            faults: 70,
            major: 1,
        };
        let kids = Counters {
            cpu: 4_000_000_000,
            faults: 80,
            major: 2,
        };
        assert_eq!(used, Used { own, kids });
        assert_eq!(parse("7 (x) S 1", 100), None);
        assert_eq!(memory("900 20 5 1 0 3 0\n", 4096), Some((81_920, 20_480)));
        assert_eq!(memory("900", 4096), None);
        assert_eq!(
            swapped("VmRSS:\t  100 kB\nVmSwap:\t   12 kB\n"),
            Some(12_288)
        );
        assert_eq!(swapped("Name:\tkthreadd\n"), None);
        assert_eq!(first("123456 7 8\n"), Some(123_456));
    }

    #[test]
    fn the_own_process_can_be_measured() {
        let own = sample(std::process::id()).unwrap();
        assert!(own.resident > 1 << 20, "{own:?}");
        assert!(own.resident >= own.shared);
        assert!(own.namespace.is_some());
        assert!(used(std::process::id()).is_some());
        assert_eq!(used(0), None);
    }
}
