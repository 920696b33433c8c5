//! The namespaces that the runtime has made for a container, kept open by the shim from before the program runs.
//!
//! A program may enter namespaces of its own, and what it has entered leads nowhere but further in: a process has rights in its
//! user namespace and in those below it only. So a command of exec does not look for the container where the program is by then.
//! [`super::enter`] gets these descriptors with the first message.
//!
//! While they are open, the container's file systems stay mounted, and at its end the runtime waits for those who serve them. So
//! they are closed with the last descriptor of the program's output. A command that comes later finds the namespaces of the program.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Mutex, PoisonError},
};

use super::fds::{self, MAX_FDS};
use crate::signals::Identity;

/// In the order in which they are sent. That of processes is not among them: a process stays in its own.
const NAMES: [&str; MAX_FDS] = ["user", "mnt", "ipc", "uts", "cgroup", "net"];

/// The message if the program sees itself as another user.
const SHOWN: &[u8] = b"shown";

/// The shim's descriptors of a container's namespaces; none where they could not be opened, as in a container that root has
/// set up.
#[derive(Debug, Default)]
pub(crate) struct Kept(Mutex<Vec<OwnedFd>>);

impl Kept {
    /// The namespaces of the launcher, which waits for its specification.
    pub(crate) fn of(launcher: Identity) -> Self {
        let open = |name: &str| File::open(format!("/proc/{}/ns/{name}", launcher.pid));
        let opened = NAMES.into_iter().map(|name| open(name).map(OwnedFd::from));
        let opened: io::Result<Vec<OwnedFd>> = opened.collect();
        // Asked after they were opened, so a pid that was given to another process is noticed.
        let own = opened.ok().filter(|_| launcher.lives());
        Self(Mutex::new(own.unwrap_or_default()))
    }

    /// Closes them.
    pub(crate) fn release(&self) {
        drop(std::mem::take(
            &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner),
        ));
    }

    /// Sends them, and whether the program sees itself as another user (`shown`), as the first message to a helper.
    pub(crate) fn send(&self, socket: &UnixStream, shown: bool) -> io::Result<()> {
        let namespaces = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let borrowed: Vec<BorrowedFd<'_>> = namespaces.iter().map(|fd| fd.as_fd()).collect();
        fds::send_frame(socket, if shown { SHOWN } else { &[] }, &borrowed)
    }
}

/// What the helper has received.
#[derive(Debug, Default)]
pub(super) struct Received {
    namespaces: Vec<OwnedFd>,
    shown: bool,
}

impl Received {
    /// Receives the first message of the shim.
    pub(super) fn receive(shim: &UnixStream) -> io::Result<Self> {
        let received = fds::receive_frame(shim, SHOWN.len())?;
        let (body, namespaces) = received.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(Self {
            namespaces,
            shown: body == SHOWN,
        })
    }

    /// The namespace with this name; `None` if it is to be found by the program.
    pub(super) fn get(&self, name: &str) -> Option<&OwnedFd> {
        let at = NAMES.iter().position(|one| *one == name)?;
        self.namespaces.get(at)
    }

    /// Whether the program was given a user namespace below that of the container.
    pub(super) fn shown(&self) -> bool {
        self.shown
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    fn through(kept: &Kept) -> Received {
        let (ours, theirs) = UnixStream::pair().unwrap();
        kept.send(&ours, true).unwrap();
        Received::receive(&theirs).unwrap()
    }

    #[test]
    fn the_namespaces_arrive_under_their_names_until_they_are_released() {
        let kept = Kept::of(Identity::of(std::process::id()).unwrap());
        let received = through(&kept);
        assert!(received.shown());
        for name in NAMES {
            let own = std::fs::metadata(format!("/proc/self/ns/{name}")).unwrap();
            let fd = received.get(name).unwrap().try_clone().unwrap();
            assert_eq!(File::from(fd).metadata().unwrap().ino(), own.ino());
        }
        assert!(received.get("pid").is_none());
        kept.release();
        assert!(through(&kept).get("mnt").is_none());
    }

    #[test]
    fn nothing_is_kept_of_a_process_that_has_ended() {
        let own = Identity::of(std::process::id()).unwrap();
        let ended = Identity {
            start: own.start.wrapping_sub(1),
            ..own
        };
        assert!(through(&Kept::of(ended)).get("user").is_none());
    }
}
