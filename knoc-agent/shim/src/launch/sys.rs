//! The audited unsafe calls of the launcher: `fork(2)`, resetting signal dispositions, marking inherited descriptors
//! close-on-exec, the owner of a namespace, and a TUN interface.
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

/// The device through which TUN interfaces are created.
const TUN: &str = "/dev/net/tun";

/// The longest name of an interface, with the NUL at its end (`IFNAMSIZ`).
const INTERFACE_NAME: usize = 16;

/// `struct ifreq` of `net/if.h` with `ifr_flags`, in its full size.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; INTERFACE_NAME],
    flags: nix::libc::c_short,
    rest: [u8; 22],
}

/// Creates an interface whose packets are read from and written to the result, which does not block, in the network namespace
/// of this process.
pub(super) fn tun(name: &str) -> io::Result<OwnedFd> {
    let flags = nix::libc::IFF_TUN | nix::libc::IFF_NO_PI;
    let mut request = InterfaceRequest {
        name: [0; INTERFACE_NAME],
        flags: flags.try_into().map_err(io::Error::other)?,
        rest: [0; 22],
    };
    // The last byte stays 0.
    let (place, _nul) = request.name.split_at_mut(INTERFACE_NAME - 1);
    let place = place
        .get_mut(..name.len())
        .ok_or(io::ErrorKind::InvalidInput)?;
    place.copy_from_slice(name.as_bytes());
    let options =
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK;
    let device = rustix::fs::open(TUN, options, rustix::fs::Mode::empty())?;
    // SAFETY: the descriptor is open, and the kernel reads and writes one `struct ifreq`, which `request` is as large as and
    // which lives until the call has returned.
    let made = unsafe {
        nix::libc::ioctl(
            device.as_raw_fd(),
            nix::libc::TUNSETIFF,
            std::ptr::from_mut(&mut request),
        )
    };
    nix::errno::Errno::result(made)?;
    Ok(device)
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
