//! The launch protocol: how a container's program gets exactly the argv, environment, directory and stdio it asked for.
//!
//! `knoc-agent launch SOCKET` is what the runtime starts inside the container. It connects to the shim's unix socket
//! (the shim learns its pid by the peer credentials), takes one [`LaunchSpec`](knoc_contract::launch::LaunchSpec) and the
//! stdio descriptors, and becomes the program by `execve`. The socket is close-on-exec: end of file at the shim's side means that the program
//! runs. So neither argv nor environment meets the runtime, a shell, or a file. Exec into a running container
//! ([`enter`]) ends in the same code.
//!
//! Single-threaded and without an async runtime: it must be small, and `setns(2)` demands it.

pub(crate) mod account;
pub mod contain;
pub mod enter;
pub(crate) mod fds;
mod limits;
mod program;
mod pty;
mod sys;

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::ExitCode,
};

use knoc_contract::launch::Window;

/// What the launcher exits with where it could not even speak to the shim.
const NO_SHIM: u8 = 125;

/// Entry point of `knoc-agent launch SOCKET`. Returns only where the program could not be started.
#[must_use]
pub fn main(socket: &Path) -> ExitCode {
    die_with_parent();
    match UnixStream::connect(socket) {
        Ok(stream) => program::run(&stream),
        Err(error) => {
            eprintln!(
                "knoc-agent launch: connect to {}: {error}",
                socket.display()
            );
            ExitCode::from(NO_SHIM)
        }
    }
}

/// Who started it is killed: so is the program. It survives `execve`.
fn die_with_parent() {
    let kill = rustix::process::Signal::KILL;
    rustix::process::set_parent_process_death_signal(Some(kill)).ok();
}

/// Gives up standard input, which is the shim's socket: the shim would see no end of file while it is held.
fn release_stdin() {
    // Without `/dev/null` in the container any other descriptor does.
    match std::fs::File::open("/dev/null") {
        Ok(null) => rustix::stdio::dup2_stdin(&null),
        Err(_) => rustix::stdio::dup2_stdin(rustix::stdio::stderr()),
    }
    .ok();
}

/// Tells the terminal behind `master` its window's size; programs in it get `SIGWINCH`.
pub(crate) fn set_terminal_size(master: &OwnedFd, window: Window) {
    // The program may have gone.
    pty::set_size(master, window).ok();
}
