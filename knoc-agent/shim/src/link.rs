//! Task: the shim's link. Dials the agent at the addresses in `endpoint.json`, and serves the `Shim` service over the
//! connection. If compute nodes cannot reach the agent, the agent carries a connection to the shim ([`carried`]).
//!
//! It reads the file again at every try and waits longer after each failure, with jitter, so that many jobs do not
//! reconnect at once. It publishes its [`State`], and reports which address worked or why none did. Containers run on
//! whether the link is up or not.

pub(crate) mod carried;
pub(crate) mod dial;

use std::{
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use knoc_contract::jobdir::{self, schema::Endpoint};
use knoc_link::{bulk::RawServer, pinned::KeyPair};
use knoc_proto::{
    error::chain,
    pb::{self, shim_server::ShimServer},
};
use rand::RngExt as _;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{serve::Service, supervisor::Command};

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// The pause if compute nodes are known not to reach the agent. Each shim tries once at its start all the same: if one
/// gets through, the agent takes back what it knew.
const SELDOM: Duration = Duration::from_mins(30);

/// Whether a link is up: at the end of the pod it tells whether an agent might read the final report.
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
    pub(crate) serving: Serving,
    /// Where the agent's relay connects.
    pub(crate) listener: Option<carried::Listener>,
    /// Tells the supervisor what to report.
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) route: pb::ShimRoute,
}

/// Serves connections to the agent and counts them.
#[derive(Debug)]
pub(crate) struct Serving {
    service: Service,
    state: watch::Sender<State>,
    /// Changed only while `state` is locked.
    links: AtomicUsize,
}

impl Serving {
    pub(crate) fn new(service: Service, state: watch::Sender<State>) -> Self {
        Self {
            service,
            state,
            links: AtomicUsize::new(0),
        }
    }

    /// Serves a connection to its end.
    async fn serve(&self, connection: knoc_link::Connection, shutdown: &CancellationToken) {
        self.state.send_modify(|state| {
            self.links.fetch_add(1, Ordering::Relaxed);
            *state = State::Connected;
        });
        let service = ShimServer::new(self.service.clone());
        let router = knoc_link::server().add_service(RawServer::new(service));
        let incoming = Box::pin(knoc_link::far_side(connection));
        if let Err(error) = knoc_link::serve(router, incoming, shutdown.clone()).await {
            tracing::debug!("the link ended: {}", chain(&error));
        }
        self.state.send_modify(|state| {
            if self.links.fetch_sub(1, Ordering::Relaxed) == 1 {
                *state = State::Down;
            }
        });
    }

    /// A try has failed.
    fn failed(&self) {
        self.state.send_if_modified(|state| {
            let first = *state == State::Dialling;
            if first {
                *state = State::Down;
            }
            first
        });
    }
}

impl Link {
    /// Task: runs until `shutdown`.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let pair = match KeyPair::from_files(&self.pair.0, &self.pair.1) {
            Ok(pair) => pair,
            Err(error) => {
                tracing::warn!("no link: {}", chain(&error));
                self.serving.failed();
                return;
            }
        };
        let listener = self.listener.take();
        let (serving, endpoint) = (&self.serving, self.endpoint.clone());
        let carried = async {
            if let Some(listener) = listener {
                listener.run(serving, &endpoint, &pair, &shutdown).await;
            }
        };
        let dialling = dial_again(
            Dialling {
                serving,
                endpoint: &endpoint,
                commands: &self.commands,
                route: self.route,
                isolated: false,
            },
            &pair,
            &shutdown,
        );
        tokio::join!(carried, dialling);
    }
}

/// What the part of the task that dials needs.
struct Dialling<'a> {
    serving: &'a Serving,
    endpoint: &'a PathBuf,
    commands: &'a mpsc::Sender<Command>,
    /// What was reported last.
    route: pb::ShimRoute,
    /// Compute nodes are known not to reach the agent.
    isolated: bool,
}

async fn dial_again(mut dialling: Dialling<'_>, pair: &KeyPair, shutdown: &CancellationToken) {
    let mut pause = FIRST_PAUSE;
    while !shutdown.is_cancelled() {
        if dialling.connect(pair, shutdown).await {
            pause = FIRST_PAUSE;
        }
        dialling.serving.failed();
        let next = if dialling.isolated { SELDOM } else { pause };
        let jittered = next.mul_f64(rand::rng().random_range(0.5..1.5));
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = tokio::time::sleep(jittered) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

impl Dialling<'_> {
    /// Tries all addresses once. If one connects, serves it to its end and returns `true`.
    async fn connect(&mut self, pair: &KeyPair, shutdown: &CancellationToken) -> bool {
        let endpoint = match endpoint(self.endpoint).await {
            Ok(endpoint) => endpoint,
            Err(error) => {
                if let Some(error) = error {
                    tracing::warn!("no link: {error}");
                }
                return false;
            }
        };
        self.isolated = endpoint.isolated;
        let egress = &self.serving.service.pod.egress;
        egress.set_isolated(endpoint.isolated);
        let dialled = tokio::select! {
            biased;
            () = shutdown.cancelled() => return false,
            dialled = dial::any(&endpoint.addresses, pair, &endpoint.spki) => dialled,
        };
        self.report(dial::found(&self.route, &endpoint, &dialled))
            .await;
        match dialled {
            Ok((address, connection)) => {
                tracing::debug!(%address, "linked to the agent");
                self.serving.serve(connection, shutdown).await;
                true
            }
            Err(why) => {
                tracing::debug!("no link: {why}");
                false
            }
        }
    }

    /// Reports a route that has changed. If the supervisor has ended, its report is the final one.
    async fn report(&mut self, route: pb::ShimRoute) {
        if route != self.route {
            self.route = route.clone();
            self.commands.send(Command::Route(route)).await.ok();
        }
    }
}

/// Reads `endpoint.json`; the error is `None` if the file does not exist.
async fn endpoint(path: &std::path::Path) -> Result<Endpoint, Option<String>> {
    let path = path.to_owned();
    let read = tokio::task::spawn_blocking(move || jobdir::read_json::<Endpoint>(&path)).await;
    match read {
        Ok(Ok(Some(endpoint))) => Ok(endpoint),
        Ok(Ok(None)) | Err(_) => Err(None),
        Ok(Err(error)) => Err(Some(chain(&error))),
    }
}
