//! Connections that the agent carries to the shim: `knoc-agent connect JOBDIR`, which the agent starts as a step of the
//! job, connects to a unix socket of the shim and relays its standard input and output.
//!
//! Only processes of our own user get through: the socket's folder is private to the user and local to the node, and
//! the kernel names the user at the other end. Even those prove nothing by that. The handshake inside is the same as
//! over TCP: the shim is the TLS client, and only the agent whose key `endpoint.json` names can answer.

use std::path::{Path, PathBuf};

use futures::{StreamExt as _, stream::FuturesUnordered};
use knoc_link::{
    Connection,
    accept::Accept,
    admission::Bounds,
    carrier::{Unverified, unix},
    pinned::{self, KeyPair},
};
use knoc_proto::error::chain;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::{Serving, endpoint};
use crate::pod::Pod;

/// The folder of the socket below the pod's folder on disk, and the socket's name.
const FOLDER: &str = "link";
const NAME: &str = "shim.sock";
/// The most connections at a time: the present one, and one that replaces it before its loss was noticed.
const CONNECTIONS: usize = 4;

/// Listens on the shim's socket.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: unix::Listener,
    pub(crate) path: PathBuf,
}

impl Listener {
    /// Makes the socket in the pod's own folder. Without it, the pod runs all the same.
    pub(crate) fn bind(pod: &Pod) -> Option<Self> {
        let bound = pod
            .scratch
            .disk(FOLDER)
            .map_err(|error| chain(&error))
            .and_then(|folder| {
                let path = folder.join(NAME);
                let listener = unix::Listener::bind(&path).map_err(|error| chain(&error))?;
                Ok(Self { listener, path })
            });
        bound
            .inspect_err(|error| {
                tracing::warn!("no socket for connections that the agent carries: {error}");
            })
            .ok()
    }

    /// Serves connections until `shutdown`.
    pub(super) async fn run(
        self,
        serving: &Serving,
        file: &Path,
        pair: &KeyPair,
        shutdown: &CancellationToken,
    ) {
        let Self { listener, path } = self;
        let (file, pair) = (file.to_owned(), pair.clone());
        let mut accepted = Accept::new(listener, Bounds::of(0), move |connection| {
            let (path, file, pair) = (path.clone(), file.clone(), pair.clone());
            Box::pin(async move { verify(connection, &path, &file, &pair).await })
        });
        let mut open = FuturesUnordered::new();
        loop {
            let connection = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(()) = open.next(), if !open.is_empty() => continue,
                Some(Ok(connection)) = accepted.next() => connection,
            };
            if open.len() >= CONNECTIONS {
                tracing::warn!("too many connections to the shim's socket");
                continue;
            }
            tracing::debug!("linked to the agent, which carries the connection");
            open.push(serving.serve(connection, shutdown));
        }
        while open.next().await.is_some() {}
    }
}

/// The handshake: the process at the other end must be of our own user, and behind it must be the agent whose key `file`
/// names (`endpoint.json`).
async fn verify(
    connection: Unverified<UnixStream>,
    path: &Path,
    file: &Path,
    pair: &KeyPair,
) -> Result<Connection, String> {
    unix::identify(&connection.io, path).map_err(|error| chain(&error))?;
    let endpoint = endpoint(file).await;
    let endpoint = endpoint
        .map_err(|error| error.unwrap_or_else(|| "there is no endpoint.json".to_owned()))?;
    let peer = "the agent behind `connect`";
    let made = pinned::over(connection, peer, pair, &endpoint.spki).await;
    made.map_err(|error| chain(&error))
}
