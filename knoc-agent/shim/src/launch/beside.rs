//! Joins the processes of another container: its PID namespace, which a container may share.

use std::{fs::File, io, os::fd::AsFd as _, os::unix::fs::MetadataExt as _};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use crate::signals::Identity;

/// A process whose PID namespace is joined, with its start time, since a pid alone may be given to another process later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Beside {
    pid: u32,
    start: u64,
}

impl From<Identity> for Beside {
    fn from(process: Identity) -> Self {
        Self {
            pid: process.pid,
            start: process.start,
        }
    }
}

impl Beside {
    /// The process with this pid and start time, as [`super::enter`] is given them.
    pub(crate) fn parse(pid: &str, start: &str) -> Option<Self> {
        Some(Self {
            pid: pid.parse().ok()?,
            start: start.parse().ok()?,
        })
    }

    /// Enters the user namespace of the process, which gives the rights for its PID namespace, and has the children of this
    /// process created in the latter.
    pub(super) fn join(self) -> io::Result<()> {
        let open = |name: &str| File::open(format!("/proc/{}/ns/{name}", self.pid));
        let (user, processes) = (open("user")?, open("pid")?);
        // Compared after both were opened, so a pid that was given to another process is noticed.
        if crate::proc::start_time(self.pid) != Some(self.start) {
            return Err(io::Error::other(
                "the container whose processes it shares has ended",
            ));
        }
        let own = std::fs::metadata("/proc/self/ns/user")?;
        let theirs = user.metadata()?;
        if (theirs.dev(), theirs.ino()) != (own.dev(), own.ino()) {
            move_into_link_name_space(user.as_fd(), Some(LinkNameSpaceType::User))?;
        }
        move_into_link_name_space(processes.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
        Ok(())
    }
}
