//! Joins the processes of another container: its PID namespace, which a container may share.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use super::sys;
use crate::signals::Identity;

/// A process whose PID namespace is joined, with its start time, since a pid alone may be given to another process later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Beside {
    pid: u32,
    start: u64,
    whose: Whose,
}

/// What the process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Whose {
    /// The helper that holds the PID namespace of a pod. The containers' user namespaces are below its own.
    Holder,
    /// A program in a container. Whatever runs in its user namespace, or below it, is at its mercy: also the runtime that
    /// starts another container, which sees the files of the node. So only the namespace above that which owns the container's
    /// files is entered: the program itself may be further below ([`super::ids::show`]).
    Container,
}

/// Where this process is when it joins a container's processes: which user namespace is above those of containers.
#[derive(Debug, Clone, Copy)]
pub(super) enum Within {
    /// In the user namespace of the pod's network, in which runtimes of such pods start.
    Network,
    /// In that of the shim: each container's runtime has started in one directly below.
    Node,
}

impl Beside {
    /// The helper that holds the PID namespace of the pod.
    pub(crate) fn holder(process: Identity) -> Self {
        Self::of(process, Whose::Holder)
    }

    /// A program of a container.
    pub(crate) fn container(process: Identity) -> Self {
        Self::of(process, Whose::Container)
    }

    fn of(process: Identity, whose: Whose) -> Self {
        Self {
            pid: process.pid,
            start: process.start,
            whose,
        }
    }

    /// As arguments, which [`Self::parse`] reads.
    pub(crate) fn arguments(self) -> [String; 3] {
        let whose = match self.whose {
            Whose::Holder => "holder",
            Whose::Container => "container",
        };
        [
            self.pid.to_string(),
            self.start.to_string(),
            whose.to_owned(),
        ]
    }

    /// The process that these arguments name, as [`super::enter`] is given them.
    pub(crate) fn parse(pid: &str, start: &str, whose: &str) -> Option<Self> {
        let whose = match whose {
            "holder" => Whose::Holder,
            "container" => Whose::Container,
            _ => return None,
        };
        Some(Self {
            pid: pid.parse().ok()?,
            start: start.parse().ok()?,
            whose,
        })
    }

    /// Enters the user namespace that gives the rights for the process's PID namespace and in which the process itself has
    /// none, and has the children of this process created in the latter.
    pub(super) fn join(self, within: Within) -> io::Result<()> {
        let open = |name: &str| File::open(format!("/proc/{}/ns/{name}", self.pid));
        let (user, processes) = (open("user")?, open("pid")?);
        let files = OwnedFd::from(open("mnt")?);
        // Compared after both were opened, so a pid that was given to another process is noticed.
        if crate::proc::start_time(self.pid) != Some(self.start) {
            return Err(io::Error::other(
                "the container whose processes it shares has ended",
            ));
        }
        let user = match self.whose {
            Whose::Holder => user,
            Whose::Container => {
                let owner = File::from(sys::owner_of_namespace(&files)?);
                if is_own(&owner)? {
                    return Err(io::Error::other(
                        "the target has no user namespace of its own, so nothing can share its processes safely",
                    ));
                }
                let above = File::from(sys::parent_of_namespace(&owner.into())?);
                let expected = match within {
                    Within::Network => is_own(&above)?,
                    Within::Node => {
                        is_own(&sys::parent_of_namespace(&above.try_clone()?.into())?.into())?
                    }
                };
                // A program that has entered further namespaces would lead to one in which its own processes are.
                if !expected {
                    return Err(io::Error::other(
                        "the target has entered namespaces of its own, so nothing can share its processes safely",
                    ));
                }
                above
            }
        };
        if !is_own(&user)? {
            move_into_link_name_space(user.as_fd(), Some(LinkNameSpaceType::User))?;
        }
        move_into_link_name_space(processes.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
        Ok(())
    }
}

/// Whether this process is in the user namespace.
fn is_own(user: &File) -> io::Result<bool> {
    let (own, theirs) = (std::fs::metadata("/proc/self/ns/user")?, user.metadata()?);
    Ok((theirs.dev(), theirs.ino()) == (own.dev(), own.ino()))
}
