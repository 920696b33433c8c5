//! Processes of this host, read from /proc.

use std::{collections::HashSet, fs};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::record::{Identity, Stat};

/// The resources of the host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Host {
    pub(super) cpu: i64,
    pub(super) memory_bytes: i64,
}

pub(super) fn host() -> Host {
    let cpu = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<i64>().ok());
    Host {
        cpu: i64::try_from(cpu).unwrap_or(1),
        memory_bytes: kib.unwrap_or(0).saturating_mul(1024),
    }
}

pub(super) fn hostname() -> String {
    let name = nix::unistd::gethostname().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

pub(super) fn boot_id() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

fn stat(pid: i32) -> Option<Stat> {
    let bytes = fs::read(format!("/proc/{pid}/stat")).ok()?;
    Stat::parse(&String::from_utf8_lossy(&bytes)).filter(|stat| !matches!(stat.state, 'Z' | 'X'))
}

/// Whether this very process is alive.
pub(super) fn lives(identity: &Identity, boot: &str) -> bool {
    identity.boot == boot && stat(identity.pid).is_some_and(|stat| stat.start == identity.start)
}

/// Whether a process has this ID. Used for a child that was started a moment ago.
pub(super) fn is_there(pid: i32) -> bool {
    stat(pid).is_some()
}

/// The children of a process.
fn children(pid: i32, all: &[Stat]) -> impl Iterator<Item = i32> {
    all.iter()
        .filter(move |stat| stat.parent == pid)
        .map(|stat| stat.pid)
}

fn all() -> Vec<Stat> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(stat).collect()
}

/// Signals the batch script, which is the wrapper's child. False if it has not started yet or has
/// ended.
pub(super) fn signal_batch(wrapper: &Identity, signal: Signal) -> bool {
    let mut sent = false;
    for pid in children(wrapper.pid, &all()) {
        send(pid, signal);
        sent = true;
    }
    sent
}

/// Signals every process of the job except its wrapper, which must live to write the exit code: the
/// session, and all descendants.
pub(super) fn signal_all(wrapper: &Identity, signal: Signal) {
    let all = all();
    let mut members: HashSet<i32> = HashSet::from([wrapper.pid]);
    loop {
        let before = members.len();
        for stat in &all {
            if stat.session == wrapper.pid || members.contains(&stat.parent) {
                members.insert(stat.pid);
            }
        }
        if members.len() == before {
            break;
        }
    }
    members.remove(&wrapper.pid);
    for pid in members {
        send(pid, signal);
    }
}

fn send(pid: i32, signal: Signal) {
    // A process that has ended meanwhile needs no signal.
    kill(Pid::from_raw(pid), signal).ok();
}
