//! `knoc-agent hold`: holds the PID namespace that the containers of a pod share, as a pause container does.
//!
//! It enters a user namespace of its own with the ids that containers have, and starts the namespace's PID 1, which reaps
//! orphans and does nothing else. Standard input is one end of a socket pair, over which the shim sends the names that
//! `/etc/subuid` may have for this user, and learns the pid. The namespace ends with PID 1, and that with the shim.

use std::{io, os::unix::net::UnixStream, process::ExitCode};

use knoc_contract::launch::Reply;
use knoc_proto::private::while_dumpable;
use nix::{
    errno::Errno,
    sched::{CloneFlags, unshare},
    sys::{
        signal::{SigSet, Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::ForkResult,
};

use super::{
    contain::{self, ContainError, FAILED, NAMESPACES},
    enter, fds, ids, sys,
};

/// Entry point of the hidden subcommand.
pub(super) fn main() -> ExitCode {
    super::die_with_parent();
    let shim = match super::shim_at_stdin("hold") {
        Ok(shim) => shim,
        Err(code) => return code,
    };
    let failed = |what: String, errno: i32| {
        // If the shim has ended, nobody receives the reply.
        fds::send(&shim, &Reply::NoNamespaces { errno, what }.encode(), &[]).ok();
        ExitCode::from(FAILED)
    };
    match enter_namespaces(&shim) {
        Ok(Some(code)) => return code,
        Ok(None) => {}
        Err(error) => return failed(knoc_proto::error::chain(&error), error.errno()),
    }
    match sys::fork_single_threaded() {
        // Others of this user must be able to open its namespaces; it holds no secret.
        Ok(ForkResult::Child) => {
            drop(shim);
            let over = while_dumpable(be_first);
            over.map_or_else(|_| ExitCode::from(FAILED), |()| ExitCode::SUCCESS)
        }
        Ok(ForkResult::Parent { child }) => {
            let pid = u32::try_from(child.as_raw()).unwrap_or_default();
            if fds::send(&shim, &Reply::Pid(pid).encode(), &[]).is_err() {
                // The shim waits no longer, so nobody would use the namespace.
                kill(child, Signal::SIGKILL).ok();
            }
            drop(shim);
            super::release_stdin();
            enter::end_as(child)
        }
        Err(errno) => failed(format!("fork: {errno}"), errno as i32),
    }
}

/// Enters the namespaces: those of the pod's network if it has one of its own, else a user namespace of its own. The child that
/// maps ids returns its exit code.
fn enter_namespaces(shim: &UnixStream) -> Result<Option<ExitCode>, ContainError> {
    let (spec, namespaces) = contain::receive(shim)?;
    if spec.network.is_some() {
        contain::join(&namespaces)?;
    } else if let ids::Isolated::Mapper(code) =
        while_dumpable(|| ids::isolate(&spec.users, NAMESPACES))
            .flatten()
            .map_err(ContainError::Namespaces)?
    {
        return Ok(Some(code));
    }
    // The change of credentials may have reset it.
    super::die_with_parent();
    unshare(CloneFlags::CLONE_NEWPID)
        .map_err(io::Error::from)
        .map_err(ContainError::on("create a PID namespace"))?;
    Ok(None)
}

/// PID 1: reaps. Inside the namespace no signal reaches it.
fn be_first() {
    super::die_with_parent();
    super::release_stdin();
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    if SigSet::all().thread_block().is_err() {
        return;
    }
    loop {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
        match children.wait() {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}
