//! The shim's child processes: starts them, and reaps them and every orphan that falls to it.
//!
//! The shim is a subreaper, so it must wait for processes it never started; one task, [`Children::reap`], waits for
//! all and gives each exit to who waits for it. The map is locked only for the moment of an insert or a removal.

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

use super::{measure, usage::Used};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 128 + signal where a signal ended it.
    pub(crate) code: i32,
    /// 0: none.
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

/// The shim is killed: so is `command`, which without a job's cgroup nobody else would end.
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
    /// What it had used, with all that was waited for below it; known once it has ended.
    pub(crate) used: Option<Used>,
    exit: oneshot::Receiver<Ended>,
    /// What was piped of its stdio.
    pub(crate) stderr: Option<std::process::ChildStderr>,
}

impl Child {
    /// Waits for its end. Cancel safe; to be asked until it has answered once.
    pub(crate) async fn wait(&mut self) -> Exit {
        // The sender lives as long as the reaper, and that as long as the shim.
        let Ok((exit, used)) = (&mut self.exit).await else {
            return Exit {
                code: -1,
                signal: 0,
            };
        };
        self.used = used;
        exit
    }
}

type Ended = (Exit, Option<Used>);

/// See the module.
#[derive(Debug, Clone, Default)]
pub(crate) struct Children {
    waiting: Arc<Mutex<HashMap<u32, oneshot::Sender<Ended>>>>,
}

impl Children {
    fn waiting(&self) -> MutexGuard<'_, HashMap<u32, oneshot::Sender<Ended>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts `command`, to die with the shim, in a process group of its own where `group` is set.
    pub(crate) fn spawn(&self, command: &mut Command, group: bool) -> io::Result<Child> {
        // Locked over the start: the reaper must not see a child that is not in the map yet.
        let mut waiting = self.waiting();
        die_with_shim(command);
        if group {
            command.process_group(0);
        }
        let mut child = command.spawn()?;
        let (sender, exit) = oneshot::channel();
        waiting.insert(child.id(), sender);
        Ok(Child {
            pid: child.id(),
            used: None,
            exit,
            stderr: child.stderr.take(),
        })
    }

    /// The task: reaps until dropped.
    pub(crate) async fn reap(self, mut news: SignalStream) {
        loop {
            while let Some((pid, used, status)) = reap_one() {
                if let Some(sender) = self.waiting().remove(&pid) {
                    // Who waited may be gone by now.
                    sender.send((status.into(), used)).ok();
                }
            }
            if news.recv().await.is_none() {
                return;
            }
        }
    }

    /// The signal that [`Self::reap`] wakes on: to be installed before the first child.
    pub(crate) fn signal() -> io::Result<SignalStream> {
        signal(SignalKind::child())
    }
}

/// One child that has ended. It is looked at before it is waited for: after that nobody knows what it used.
fn reap_one() -> Option<(u32, Option<Used>, WaitStatus)> {
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    let raw = waitid(Id::All, look).ok()?.pid()?.as_raw();
    let pid = u32::try_from(raw).ok()?;
    let used = measure::used(pid);
    let (_, status) = waitpid(Pid::from_raw(raw), WaitOptions::NOHANG).ok()??;
    Some((pid, used, status))
}
