//! The audited unsafe calls of the launcher: `fork(2)`, resetting signal dispositions, marking inherited descriptors
//! close-on-exec, and the owner of a namespace.
#![expect(
    unsafe_code,
    reason = "these have no safe form; each states why it is sound"
)]

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use nix::{
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    unistd::{ForkResult, fork},
};

/// Of `linux/nsfs.h`.
const NS_GET_USERNS: nix::libc::Ioctl = 0xb701;
const NS_GET_PARENT: nix::libc::Ioctl = 0xb702;

/// The user namespace that owns this namespace.
pub(super) fn owner_of_namespace(namespace: &OwnedFd) -> io::Result<OwnedFd> {
    related_namespace(namespace, NS_GET_USERNS)
}

/// The user namespace above this one.
pub(super) fn parent_of_namespace(namespace: &OwnedFd) -> io::Result<OwnedFd> {
    related_namespace(namespace, NS_GET_PARENT)
}

fn related_namespace(namespace: &OwnedFd, which: nix::libc::Ioctl) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open; the calls take no argument and return a new descriptor or fail.
    let found = unsafe { nix::libc::ioctl(namespace.as_raw_fd(), which) };
    let found = nix::errno::Errno::result(found)?;
    // SAFETY: the kernel has just opened it for this process, and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(found) })
}

/// Forks the calling process.
pub(super) fn fork_single_threaded() -> nix::Result<ForkResult> {
    // SAFETY: `launch` and `enter` start no thread, so the child's copy of the memory is consistent.
    unsafe { fork() }
}

/// Gives every signal its default action and unblocks all: the program must not inherit what Rust's runtime
/// (which ignores SIGPIPE) or a container runtime set.
pub(super) fn reset_signals() {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for signal in Signal::iterator() {
        // SAFETY: SIG_DFL runs no code of ours. For KILL and STOP it fails, and they need none.
        unsafe { sigaction(signal, &default) }.ok();
    }
    SigSet::empty().thread_set_mask().ok();
}

/// Marks all descriptors except stdio close-on-exec: container runtimes leave some of theirs open.
pub(super) fn close_on_exec() {
    let open = std::fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .flatten();
    let numbers: Vec<i32> = open
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        // SAFETY: the number is only used within this call; if it is closed by now, the kernel answers EBADF.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).ok();
    }
}
