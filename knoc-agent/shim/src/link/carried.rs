//! Connections that the agent carries to the shim: `knoc-agent connect JOBDIR`, which the agent starts as a step of the
//! job, connects to a unix socket of the shim and relays its standard input and output.
//!
//! Only processes of our own user get through: the socket's folder is private to the user and local to the node, and
//! the kernel names the user at the other end. Even those prove nothing by that. The handshake inside is the same as
//! over TCP: the shim is the TLS client, and only the agent whose key `endpoint.json` names can answer.

use std::{future::poll_fn, path::PathBuf};

use knoc_link::{
    carrier::{Listener as _, Unverified, unix},
    pinned::KeyPair,
};
use knoc_proto::error::chain;
use tokio::{net::UnixStream, sync::Semaphore};
use tokio_util::sync::CancellationToken;

use super::{Serving, endpoint};
use crate::pod::Pod;

/// The folder of the socket below the pod's folder on disk, and the socket's name.
const FOLDER: &str = "link";
const NAME: &str = "shim.sock";
/// The most connections at a time: the present one, and one that replaces it before its loss was noticed.
const CONNECTIONS: usize = 4;
/// The pause after a failure of accept(2).
const AFTER_FAILURE: std::time::Duration = std::time::Duration::from_secs(1);

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
        file: &std::path::Path,
        pair: &KeyPair,
        shutdown: &CancellationToken,
    ) {
        let places = Semaphore::new(CONNECTIONS);
        let mut open = futures::stream::FuturesUnordered::new();
        loop {
            let accepted = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(()) = futures::StreamExt::next(&mut open), if !open.is_empty() => continue,
                accepted = poll_fn(|cx| self.listener.poll_accept(cx)) => accepted,
            };
            match (accepted, places.try_acquire()) {
                (Ok(connection), Ok(place)) => {
                    let path = &self.path;
                    open.push(async move {
                        serve_one(serving, connection, Context { path, file, pair }, shutdown)
                            .await;
                        drop(place);
                    });
                }
                (Ok(_), Err(_)) => tracing::warn!("too many connections to the shim's socket"),
                (Err(error), _) => {
                    tracing::warn!("accept on the shim's socket: {}", chain(&error));
                    tokio::time::sleep(AFTER_FAILURE).await;
                }
            }
        }
        while futures::StreamExt::next(&mut open).await.is_some() {}
    }
}

/// What each connection needs.
struct Context<'a> {
    path: &'a std::path::Path,
    /// `endpoint.json`, which names the agent's key.
    file: &'a std::path::Path,
    pair: &'a KeyPair,
}

async fn serve_one(
    serving: &Serving,
    connection: Unverified<UnixStream>,
    context: Context<'_>,
    shutdown: &CancellationToken,
) {
    let verified = async {
        unix::identify(&connection.io, context.path).map_err(|error| chain(&error))?;
        let endpoint = endpoint(context.file)
            .await
            .map_err(|error| error.unwrap_or_else(|| "there is no endpoint.json".to_owned()))?;
        let peer = "the agent behind `connect`";
        let made = knoc_link::pinned::over(connection, peer, context.pair, &endpoint.spki).await;
        made.map_err(|error| chain(&error))
    };
    let verified = tokio::select! {
        biased;
        () = shutdown.cancelled() => return,
        verified = verified => verified,
    };
    match verified {
        Ok(connection) => {
            tracing::debug!("linked to the agent, which carries the connection");
            serving.serve(connection, shutdown).await;
        }
        Err(error) => tracing::warn!("no link by the shim's socket: {error}"),
    }
}
