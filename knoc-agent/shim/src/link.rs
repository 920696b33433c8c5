//! Task: the shim's link. Dials the agent at the addresses in `endpoint.json`, and serves the `Shim` service over the
//! connection.
//!
//! It reads the file again at every try and waits longer after each failure, with jitter, so that many jobs do not
//! reconnect at once. It publishes its [`State`]. Containers run on whether the link is up or not.

use std::{path::PathBuf, time::Duration};

use knoc_contract::jobdir::{self, schema::Endpoint};
use knoc_link::{bulk::RawServer, pinned::KeyPair};
use knoc_proto::{error::chain, pb::shim_server::ShimServer};
use rand::RngExt as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::serve::Service;

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Whether the link is up: at the end of the pod it tells whether an agent might read the final report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// The first try is under way.
    Dialling,
    Connected,
    Down,
}

/// What the link's task needs.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) endpoint: PathBuf,
    /// The paths of certificate and key.
    pub(crate) pair: (PathBuf, PathBuf),
    pub(crate) service: Service,
    pub(crate) state: watch::Sender<State>,
}

impl Link {
    /// Task: runs until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let pair = match KeyPair::from_files(&self.pair.0, &self.pair.1) {
            Ok(pair) => pair,
            Err(error) => {
                tracing::warn!("no link: {}", chain(&error));
                self.state.send_replace(State::Down);
                return;
            }
        };
        let mut pause = FIRST_PAUSE;
        while !shutdown.is_cancelled() {
            if self.connect(&pair, &shutdown).await {
                pause = FIRST_PAUSE;
            }
            self.state.send_replace(State::Down);
            let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.5));
            tokio::select! {
                biased;
                () = shutdown.cancelled() => {}
                () = tokio::time::sleep(jittered) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Tries all addresses once. If one connects, serves it to its end and returns `true`.
    async fn connect(&self, pair: &KeyPair, shutdown: &CancellationToken) -> bool {
        let path = self.endpoint.clone();
        let read = tokio::task::spawn_blocking(move || jobdir::read_json::<Endpoint>(&path)).await;
        let endpoint = match read {
            Ok(Ok(Some(endpoint))) => endpoint,
            Ok(Ok(None)) | Err(_) => return false,
            Ok(Err(error)) => {
                tracing::warn!("no link: {}", chain(&error));
                return false;
            }
        };
        for address in &endpoint.addresses {
            let dialled = tokio::select! {
                biased;
                () = shutdown.cancelled() => return false,
                dialled = knoc_link::pinned::dial(address, pair, &endpoint.spki) => dialled,
            };
            match dialled {
                Ok(connection) => {
                    tracing::debug!(%address, "linked to the agent");
                    self.state.send_replace(State::Connected);
                    self.serve(connection, shutdown).await;
                    return true;
                }
                Err(error) => tracing::debug!("no link: {}", chain(&error)),
            }
        }
        false
    }

    async fn serve(&self, connection: knoc_link::Connection, shutdown: &CancellationToken) {
        let service = ShimServer::new(self.service.clone());
        let router = knoc_link::server().add_service(RawServer::new(service));
        let incoming = Box::pin(knoc_link::far_side(connection));
        if let Err(error) = knoc_link::serve(router, incoming, shutdown.clone()).await {
            tracing::debug!("the link ended: {}", chain(&error));
        }
    }
}
