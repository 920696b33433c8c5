//! The shim's side of the launch protocol: sends the specification, and waits until the program runs or has failed.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use knoc_contract::launch::{LaunchSpec, Reply, WireError};
use tokio::{io::Interest, net::UnixStream};

use crate::launch::{contain::spec::ContainSpec, fds};

/// Why the program does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// The launcher could not start the program; `what` is its message.
    #[error("{what}")]
    Failed {
        /// 0 if there is none.
        errno: i32,
        what: String,
    },
    /// The helper could not create its namespaces; `what` is its message.
    #[error("{what}")]
    NoNamespaces {
        /// 0 if there is none.
        errno: i32,
        what: String,
    },
    #[error("talk to the launcher")]
    Socket(#[from] io::Error),
    /// The reply does not follow the protocol.
    #[error("read the launcher's reply")]
    Wire(#[from] WireError),
}

/// What the launcher or helper sent back once the program runs.
#[derive(Debug, Default)]
pub(crate) struct Launched {
    /// The pid of the program, if the launcher forked.
    pub(crate) pid: Option<u32>,
    /// The master of the terminal, or the descriptor of a mount, if one was asked for.
    pub(crate) master: Option<OwnedFd>,
    /// The program was to see itself as another user, and does not.
    pub(crate) own_ids: bool,
    /// The user, the group and the further groups that the program began with.
    pub(crate) ids: Vec<u32>,
}

/// Sends `spec` and `stdio`; returns once the program runs.
pub(crate) async fn launch(
    socket: UnixStream,
    spec: &LaunchSpec,
    stdio: Vec<OwnedFd>,
) -> Result<Launched, HandshakeError> {
    converse(socket, &spec.encode()?, stdio).await
}

/// Sends `spec` to the helper, with the namespaces that it is to join; returns once the mounts are made and the runtime is
/// executed.
pub(crate) async fn contain(
    socket: UnixStream,
    spec: &ContainSpec,
    namespaces: Vec<OwnedFd>,
) -> Result<Launched, HandshakeError> {
    let body = serde_json::to_vec(spec).map_err(io::Error::other)?;
    let length = u32::try_from(body.len()).map_err(|_| WireError::TooLong(body.len()))?;
    let message = [&length.to_be_bytes()[..], &body].concat();
    converse(socket, &message, namespaces).await
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
            // The launcher has closed its end, and has sent the reason before.
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
        // Each reply carries at most one descriptor. The peer must not be able to fill the shim's descriptor table.
        let surplus = descriptors.len().saturating_sub(1);
        descriptors.drain(..surplus);
        while let Some(reply) = Reply::take(&mut pending)? {
            match reply {
                Reply::Pid(pid) => launched.pid = Some(pid),
                Reply::Master => launched.master = descriptors.pop(),
                Reply::OwnIds => launched.own_ids = true,
                Reply::Ids(ids) => launched.ids = ids,
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
