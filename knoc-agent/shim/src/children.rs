//! The shim's child processes: starts them, and reaps them and every orphan that the shim inherits.
//!
//! The shim is a subreaper, so it must also wait for processes that it never started. One task, [`Children::reap`], waits
//! for all of them and passes each exit to whoever waits for it. The map is locked only to insert or remove an entry.

use std::{
    collections::HashMap,
    io,
    os::unix::process::CommandExt as _,
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sys::wait::{Id, WaitPidFlag, waitid};
use rustix::process::{
    Pid, Signal, WaitOptions, WaitStatus, set_parent_process_death_signal, waitpid,
};
use tokio::{
    signal::unix::{Signal as SignalStream, SignalKind, signal},
    sync::oneshot,
};

use super::{measure, signals, usage::Used};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 128 + the signal if a signal ended it.
    pub(crate) code: i32,
    /// The signal that ended it, or 0.
    pub(crate) signal: i32,
}

impl From<WaitStatus> for Exit {
    fn from(status: WaitStatus) -> Self {
        match status.terminating_signal() {
            Some(signal) => Self {
                code: 128 + signal,
                signal,
            },
            None => Self {
                code: status.exit_status().unwrap_or(-1),
                signal: 0,
            },
        }
    }
}

/// Has the kernel kill `command` when the shim dies: without a job's cgroup nobody else would end it.
#[expect(unsafe_code, reason = "a hook between fork and exec has no safe form")]
fn die_with_shim(command: &mut Command) {
    // SAFETY: between fork and exec it makes one system call, which is async-signal-safe, and allocates nothing.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
}

/// A started process.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: u32,
    /// What it and the children it waited for had used; known once it has ended.
    pub(crate) used: Option<Used>,
    /// Its exit, once somebody has waited for it.
    pub(crate) ended: Option<Exit>,
    exit: oneshot::Receiver<Ended>,
    /// Its standard error, if that is piped.
    pub(crate) stderr: Option<std::process::ChildStderr>,
}

impl Child {
    /// One that ends when the test says so.
    #[cfg(test)]
    pub(crate) fn that_stays(pid: u32) -> (Self, oneshot::Sender<(Exit, Option<Used>)>) {
        let (ends, exit) = oneshot::channel();
        let child = Self {
            pid,
            used: None,
            ended: None,
            exit,
            stderr: None,
        };
        (child, ends)
    }

    /// Waits for its end. Cancel safe; may be called again.
    pub(crate) async fn wait(&mut self) -> Exit {
        if let Some(exit) = self.ended {
            return exit;
        }
        // The reaper holds the sender, and lives as long as the shim.
        let lost = Exit {
            code: -1,
            signal: 0,
        };
        let (exit, used) = (&mut self.exit).await.unwrap_or((lost, None));
        self.used = used;
        self.ended = Some(exit);
        exit
    }
}

type Ended = (Exit, Option<Used>);

/// The children that somebody waits for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Children {
    waiting: Arc<Mutex<HashMap<u32, oneshot::Sender<Ended>>>>,
}

impl Children {
    fn waiting(&self) -> MutexGuard<'_, HashMap<u32, oneshot::Sender<Ended>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts `command`, which dies with the shim, in a process group of its own if `group` is set.
    pub(crate) fn spawn(&self, command: &mut Command, group: bool) -> io::Result<Child> {
        die_with_shim(command);
        if group {
            command.process_group(0);
        }
        self.start(command)
    }

    /// Starts `command`, a helper that asks to die with the shim itself, and does nothing before the shim has told it what to do. So
    /// nothing needs to run between fork and exec, and the kernel copies no memory of the shim (`posix_spawn(3)`). The helper
    /// is in a process group of its own; the command must not choose its directory.
    pub(crate) fn spawn_helper(&self, command: &mut Command) -> io::Result<Child> {
        self.start(command.process_group(0))
    }

    fn start(&self, command: &mut Command) -> io::Result<Child> {
        // Locked during the start: the reaper must not see a child that is not in the map yet.
        let mut waiting = self.waiting();
        let mut child = command.spawn()?;
        let (sender, exit) = oneshot::channel();
        waiting.insert(child.id(), sender);
        Ok(Child {
            pid: child.id(),
            used: None,
            ended: None,
            exit,
            stderr: child.stderr.take(),
        })
    }

    /// Kills the process group that the child `leader` leads, unless the child has ended.
    pub(crate) fn kill_group(&self, leader: u32) {
        // Locked until the signal is sent: while the child is in the map it is not reaped, and its pid is not given to another
        // process.
        let waiting = self.waiting();
        if waiting.contains_key(&leader) {
            signals::to_group(leader, Signal::KILL);
        }
    }

    /// Task: reaps until it is dropped.
    pub(crate) async fn reap(self, mut news: SignalStream) {
        loop {
            while let Some((pid, used)) = next_ended() {
                let mut waiting = self.waiting();
                let Some(status) = reap(pid) else {
                    break;
                };
                let sender = u32::try_from(pid).ok().and_then(|pid| waiting.remove(&pid));
                drop(waiting);
                if let Some(sender) = sender {
                    // The receiver may be gone by now.
                    sender.send((status.into(), used)).ok();
                }
            }
            if news.recv().await.is_none() {
                return;
            }
        }
    }

    /// The signal that wakes [`Self::reap`]. It must be installed before the first child is started.
    pub(crate) fn signal() -> io::Result<SignalStream> {
        signal(SignalKind::child())
    }
}

/// One child that has ended, and what it used, which the kernel forgets once it is reaped.
fn next_ended() -> Option<(i32, Option<Used>)> {
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    let pid = waitid(Id::All, look).ok()?.pid()?.as_raw();
    let used = u32::try_from(pid).ok().and_then(measure::used);
    Some((pid, used))
}

fn reap(pid: i32) -> Option<WaitStatus> {
    let (_, status) = waitpid(Pid::from_raw(pid), WaitOptions::NOHANG).ok()??;
    Some(status)
}
