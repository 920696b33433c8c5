//! The shim's side of the launch protocol: sends what to become, hears whether it runs.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use knoc_contract::launch::{LaunchSpec, Reply, WireError};
use tokio::{io::Interest, net::UnixStream};

use crate::launch::{contain::spec::ContainSpec, fds};

/// Why nothing runs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// The launcher could not start the program; in its words.
    #[error("{what}")]
    Failed {
        /// 0: none.
        errno: i32,
        what: String,
    },
    /// The helper could not make its namespaces; its message.
    #[error("{what}")]
    NoNamespaces {
        /// 0: none.
        errno: i32,
        what: String,
    },
    /// The socket failed.
    #[error("talk to the launcher")]
    Socket(#[from] io::Error),
    /// Not our protocol.
    #[error("talk to the launcher")]
    Wire(#[from] WireError),
}

/// What came back with a running program.
#[derive(Debug, Default)]
pub(crate) struct Launched {
    /// Where the launcher forked.
    pub(crate) pid: Option<u32>,
    /// Where a terminal was asked for, or a mount's descriptor.
    pub(crate) master: Option<OwnedFd>,
}

/// Sends `spec` and `stdio`; returns once the program runs.
pub(crate) async fn launch(
    socket: UnixStream,
    spec: &LaunchSpec,
    stdio: Vec<OwnedFd>,
) -> Result<Launched, HandshakeError> {
    converse(socket, &spec.encode()?, stdio).await
}

/// Has the mounts made; returns once the runtime is executed.
pub(crate) async fn contain(
    socket: UnixStream,
    spec: &ContainSpec,
) -> Result<Launched, HandshakeError> {
    let body = serde_json::to_vec(spec).map_err(io::Error::other)?;
    let length = u32::try_from(body.len()).map_err(|_| WireError::TooLong(body.len()))?;
    let message = [&length.to_be_bytes()[..], &body].concat();
    converse(socket, &message, Vec::new()).await
}

async fn converse(
    socket: UnixStream,
    message: &[u8],
    stdio: Vec<OwnedFd>,
) -> Result<Launched, HandshakeError> {
    let mut sent = 0;
    while sent < message.len() {
        let borrowed: Vec<BorrowedFd<'_>> = stdio.iter().map(|fd| fd.as_fd()).collect();
        let attached = if sent == 0 { borrowed.as_slice() } else { &[] };
        let rest = message.get(sent..).unwrap_or_default();
        socket.writable().await?;
        let wrote = socket.try_io(Interest::WRITABLE, || {
            Ok(fds::send(&socket, rest, attached)?)
        });
        match wrote {
            Ok(count) => sent += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // It ends only after it has said why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            Err(error) => return Err(error.into()),
        }
    }
    drop(stdio);
    replies(&socket).await
}

async fn replies(socket: &UnixStream) -> Result<Launched, HandshakeError> {
    let mut launched = Launched::default();
    let (mut pending, mut descriptors) = (Vec::new(), Vec::new());
    let mut buffer = [0; 4096];
    loop {
        socket.readable().await?;
        let read = socket.try_io(Interest::READABLE, || {
            Ok(fds::receive(socket, &mut buffer, &mut descriptors)?)
        });
        let count = match read {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            other => other?,
        };
        if count == 0 {
            return Ok(launched);
        }
        pending.extend_from_slice(buffer.get(..count).unwrap_or_default());
        // One comes with one reply. Whoever is at the other end must not fill our table of descriptors.
        let surplus = descriptors.len().saturating_sub(1);
        descriptors.drain(..surplus);
        while let Some(reply) = Reply::take(&mut pending)? {
            match reply {
                Reply::Pid(pid) => launched.pid = Some(pid),
                Reply::Master => launched.master = descriptors.pop(),
                Reply::Failed { errno, what } => {
                    return Err(HandshakeError::Failed { errno, what });
                }
                Reply::NoNamespaces { errno, what } => {
                    return Err(HandshakeError::NoNamespaces { errno, what });
                }
            }
        }
    }
}
