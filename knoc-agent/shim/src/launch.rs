//! The launch protocol: how a container's program gets exactly the argv, environment, directory and stdio it asked for.
//!
//! The runtime starts `knoc-agent launch SOCKET` inside the container. It connects to the shim's unix socket (the shim
//! learns its pid from the peer credentials), receives one [`LaunchSpec`](knoc_contract::launch::LaunchSpec) and the stdio
//! descriptors, and becomes the program by `execve`. The socket is close-on-exec, so end of file at the shim's side means
//! that the program runs. Neither argv nor environment passes through the runtime, a shell or a file. Exec into a running
//! container ([`enter`]) uses the same code for its last step.
//!
//! Single-threaded and without an async runtime: the launcher must be small, and `setns(2)` requires a single thread.

pub(crate) mod account;
pub(crate) mod beside;
pub(crate) mod contain;
pub(crate) mod enter;
pub(crate) mod fds;
mod folder;
pub(crate) mod hold;
pub(crate) mod ids;
pub(crate) mod kept;
mod limits;
pub(crate) mod network;
mod program;
mod pty;
mod sys;
mod volume;

use std::{
    ffi::OsString,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::ExitCode,
};

use knoc_contract::launch::Window;

/// The launcher's exit code if it could not connect to the shim.
const NO_SHIM: u8 = 125;

/// Runs the hidden subcommand that the arguments of `knoc-agent` name: the helper that a shim starts for a container, its network, its
/// processes or an exec. `None` if they name none.
///
/// The parser of the command line does not know them, and so does not cost each exec a tenth of a millisecond.
#[must_use]
pub fn helper(arguments: &[OsString]) -> Option<ExitCode> {
    let (name, rest) = arguments.split_first()?;
    Some(match (name.to_str()?, rest) {
        ("launch", [socket]) => main(Path::new(socket)),
        ("contain", []) => contain::main(),
        ("network", []) => network::main(),
        ("hold", []) => hold::main(),
        ("enter", rest) => {
            let words = rest.iter().map(|word| word.to_string_lossy().into_owned());
            enter::main(&words.collect::<Vec<_>>())
        }
        _ => return None,
    })
}

/// Entry point of `knoc-agent launch SOCKET`. Returns only if the program could not be started.
fn main(socket: &Path) -> ExitCode {
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

/// Has the kernel kill this process when its parent dies. The setting survives `execve`, so it holds for the program.
fn die_with_parent() {
    let kill = rustix::process::Signal::KILL;
    rustix::process::set_parent_process_death_signal(Some(kill)).ok();
}

/// The socket of the shim, which is the standard input of the hidden subcommand `name`.
fn shim_at_stdin(name: &str) -> Result<UnixStream, ExitCode> {
    match rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) {
        Ok(socket) => Ok(socket.into()),
        Err(error) => {
            eprintln!("knoc-agent {name}: standard input: {error}");
            Err(ExitCode::from(contain::FAILED))
        }
    }
}

/// Closes standard input, which is the shim's socket: the shim sees no end of file while it is open.
fn release_stdin() {
    // If the container has no `/dev/null`, any other descriptor will do.
    match std::fs::File::open("/dev/null") {
        Ok(null) => rustix::stdio::dup2_stdin(&null),
        Err(_) => rustix::stdio::dup2_stdin(rustix::stdio::stderr()),
    }
    .ok();
}

/// Sets the window size of the terminal behind `master`; its foreground processes get `SIGWINCH`.
pub(crate) fn set_terminal_size(master: &OwnedFd, window: Window) {
    // The program may have gone.
    pty::set_size(master, window).ok();
}
