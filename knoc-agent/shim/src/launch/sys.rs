//! The audited unsafe calls of the launcher: `fork(2)`, resetting signal dispositions, marking inherited descriptors
//! close-on-exec, the owner of a namespace, and a TUN interface.
#![expect(
    unsafe_code,
    reason = "these have no safe form; each states why it is sound"
)]

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    path::Path,
};

use nix::{
    sys::{
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
        statfs::{PROC_SUPER_MAGIC, statfs},
    },
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

/// Where the kernel lists the open descriptors of this process.
const OPEN: &str = "/proc/self/fd";

/// Up to which number descriptors are looked for without that list. What a runtime leaves open has small numbers.
const DESCRIPTORS: i32 = 1 << 16;

/// Marks all descriptors except stdio close-on-exec: container runtimes leave some of theirs open.
pub(super) fn close_on_exec() {
    // SAFETY: it sets a flag of descriptors of this process, and takes no pointer.
    let marked = unsafe {
        nix::libc::syscall(
            nix::libc::SYS_close_range,
            3_u32,
            u32::MAX,
            nix::libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    // Linux before 5.11 cannot do that.
    if marked == 0 {
        return;
    }
    for number in open_descriptors(Path::new(OPEN)) {
        // SAFETY: the number is only used within this call; if it is closed by now, the kernel answers EBADF.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).ok();
    }
}

/// The numbers of the descriptors after stdio that `list` names; all that there may be, if a volume of the pod lies over it.
fn open_descriptors(list: &Path) -> Vec<i32> {
    if !statfs(list).is_ok_and(|found| found.filesystem_type() == PROC_SUPER_MAGIC) {
        return (3..DESCRIPTORS).collect();
    }
    let open = std::fs::read_dir(list).into_iter().flatten().flatten();
    open.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|number| *number > 2)
        .collect()
}

#[cfg(test)]
mod tests {
    use rustix::io::FdFlags;

    use super::*;

    #[test]
    fn descriptors_end_with_the_launcher_also_if_a_volume_hides_the_list_of_them() {
        let file = tempfile::tempfile().unwrap();
        let number = file.as_raw_fd();
        let volume = tempfile::tempdir().unwrap();
        for list in [Path::new(OPEN), volume.path(), Path::new("/missing")] {
            let found = open_descriptors(list);
            assert!(found.contains(&number), "{}", list.display());
            assert!(found.iter().all(|number| *number > 2));
        }
        rustix::io::fcntl_setfd(&file, FdFlags::empty()).unwrap();
        close_on_exec();
        let flags = rustix::io::fcntl_getfd(&file).unwrap();
        assert_eq!(flags, FdFlags::CLOEXEC);
    }
}
