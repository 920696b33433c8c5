//! Sends signals to a container: to its program, or to all its processes.

use knoc_proto::pod::REAL_TIME;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::proc;

/// Identifies a running program: a pid alone may be given to another process later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) pid: u32,
    pub(crate) start: u64,
}

impl Identity {
    /// The process that has `pid` now.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        proc::start_time(pid).map(|start| Self { pid, start })
    }

    /// Whether the process has not ended yet. One that has ended exists until its parent takes note of it.
    pub(crate) fn runs(self) -> bool {
        self.lives() && !proc::has_ended(self.pid)
    }

    /// Whether the process still exists.
    pub(crate) fn lives(self) -> bool {
        proc::start_time(self.pid) == Some(self.start)
    }
}

/// The signal with this number: one that has a name, or a real-time signal.
#[expect(
    unsafe_code,
    reason = "there is no safe form for a real-time signal that leaves the C library out"
)]
pub(crate) fn numbered(number: i32) -> Option<Signal> {
    if !REAL_TIME.contains(&number) {
        return Signal::from_named_raw(number);
    }
    // SAFETY: it is a signal of the kernel, and only other programs get it. What the C library of the shim keeps for itself
    // concerns signals that a process sends to its own threads.
    Some(unsafe { Signal::from_raw_unchecked(number) })
}

/// Sends `signal` to the program only, as container runtimes do.
pub(crate) fn to_program(program: Identity, signal: Signal) {
    if program.lives() {
        send(program.pid, signal);
    }
}

/// Kills the program and, if there is no PID namespace that ends with it, all processes that it started.
pub(crate) fn kill_all(program: Identity, isolated: bool) {
    let below = if isolated {
        Vec::new()
    } else {
        belongings(program.pid)
    };
    to_program(program, Signal::KILL);
    for pid in below {
        send(pid, Signal::KILL);
    }
}

/// Kills what a program without a PID namespace left behind. While its session exists, its pid is not given to another
/// process.
pub(crate) fn kill_left(pid: u32) {
    for pid in belongings(pid) {
        send(pid, Signal::KILL);
    }
}

/// Signals a whole process group.
pub(crate) fn to_group(leader: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(leader).ok().and_then(Pid::from_raw) {
        // It may have ended by itself.
        kill_process_group(pid, signal).ok();
    }
}

/// Signals one process.
pub(crate) fn send(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // It may have ended by itself.
        kill_process(pid, signal).ok();
    }
}

/// The processes below `pid` in the tree, and those of its session (orphans leave the tree, but not the session).
fn belongings(pid: u32) -> Vec<u32> {
    let all = proc::all();
    let mut found = proc::descendants(&all, pid);
    let session = all
        .iter()
        .filter(|process| process.session == pid && process.pid != pid);
    found.extend(session.map(|process| process.pid));
    found.sort_unstable();
    found.dedup();
    found
}
