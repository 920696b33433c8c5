//! The kubelet's HTTPS API on :10250, as the API server, metrics-server and Prometheus call it.
//!
//! Owner: the task that runs [`Server::run`]; it owns the accept loop, one task a connection, and the reload of
//! certificates, and joins them all. It reads pods and asks for streams through [`Backend`], and who may do what
//! through [`Cluster`]; it holds no pod state, never writes to the API server and decides nothing about pods.
//!
//! HTTP/1.1 only (by ALPN), because upgrades need it. TLS 1.3. Nothing is answered without an identity: a client
//! certificate, else a bearer token, and then a `SubjectAccessReview`, as in [kubelet authentication and
//! authorization](https://kubernetes.io/docs/reference/access-authn-authz/kubelet-authn-authz/).

mod accept;
mod access;
mod authn;
mod authz;
mod cluster;
mod connections;
mod exec;
mod limits;
mod logs;
mod options;
mod peer_watch;
mod portforward;
mod remote;
mod routes;
mod separate_end;
mod stats;
mod stop;
mod target;
#[cfg(test)]
mod tests;
mod tls;
mod unsupported;
mod upgrade;
mod user;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
pub use cluster::{Cluster, ClusterError, KubeCluster};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use k8s_openapi::api::core::v1::Pod;
use knoc_link::carrier::{Listener as _, tcp};
use knoc_proto::pb;
use thiserror::Error;
pub use tls::TlsError;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
pub use user::User;

use crate::certs::Pairs;
use crate::metrics::{Gauges, Metrics};
use crate::stats::Snapshot;

/// What the operator says of the API.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where to listen; port 10250 unless told otherwise.
    pub bind: SocketAddr,
    /// The node's name: what reviews are about.
    pub node: String,
    /// The serving certificate.
    pub serving: Serving,
    /// Who signs client certificates.
    pub client_ca: ClientCa,
}

/// The serving certificate.
#[derive(Debug, Clone)]
pub enum Serving {
    /// PEM files, re-read when they change.
    Files {
        /// Certificate chain, the server's own first.
        certificate: PathBuf,
        /// Its private key.
        key: PathBuf,
    },
    /// The newest that the kubelet made or was issued.
    Own(Pairs),
}

/// The CA that client certificates must come from.
#[derive(Debug, Clone)]
pub enum ClientCa {
    /// A PEM file, re-read when it changes.
    File(PathBuf),
    /// The cluster's own, from ConfigMap `kube-system/extension-apiserver-authentication`.
    Cluster,
}

/// A pod as the kubelet knows it.
#[derive(Debug, Clone, Default)]
pub struct PodView {
    /// The object as the API server has it.
    pub pod: Arc<Pod>,
    /// What the agent says of it, where it has said anything.
    pub observed: Option<Arc<pb::PodObserved>>,
}

/// Bytes from a container, ending with an error where they broke off.
pub type ByteStream = BoxStream<'static, Result<Bytes, tonic::Status>>;

/// What a command in a container says.
pub type ExecStream = BoxStream<'static, Result<pb::ExecOutput, tonic::Status>>;

/// What a connection to a port of a pod says.
pub type PortForwardStream = BoxStream<'static, Result<pb::PortForwardOutput, tonic::Status>>;

/// What the API asks of the rest of the kubelet.
pub trait Backend: Send + Sync + 'static {
    /// All pods bound to the node.
    fn pods(&self) -> Vec<Arc<Pod>>;

    /// One pod by namespace and name.
    fn pod(&self, namespace: &str, name: &str) -> Option<PodView>;

    /// The log of a container, from the agent; returns when the agent has accepted the request.
    fn read_logs(
        &self,
        request: pb::ReadLogsRequest,
    ) -> BoxFuture<'_, Result<ByteStream, tonic::Status>>;

    /// Runs a command in a container: the first message is `Start`, the last answer `Exit`. Dropping the answers ends
    /// the command.
    fn exec(
        &self,
        input: mpsc::Receiver<pb::ExecInput>,
    ) -> BoxFuture<'_, Result<ExecStream, tonic::Status>>;

    /// Attaches to a container's own program: as [`Backend::exec`], with `AttachStart` first. Dropping the answers ends
    /// nothing but the attachment.
    fn attach(
        &self,
        input: mpsc::Receiver<pb::ExecInput>,
    ) -> BoxFuture<'_, Result<ExecStream, tonic::Status>>;

    /// Connects to a port of a pod: the first message is `Start`, the first answer `Connected`; both directions close
    /// on their own. Dropping the answers resets the connection.
    fn port_forward(
        &self,
        input: mpsc::Receiver<pb::PortForwardInput>,
    ) -> BoxFuture<'_, Result<PortForwardStream, tonic::Status>>;

    /// What node, pods and containers use: a measurement of at most a few seconds ago.
    fn stats(&self) -> BoxFuture<'_, Arc<Snapshot>>;

    /// All pods that the agent knows.
    fn observed(&self) -> Vec<Arc<pb::PodObserved>>;

    /// Our own counters.
    fn metrics(&self) -> &Metrics;

    /// Our own levels, as they are now; streams are the server's to say.
    fn gauges(&self) -> Gauges;

    /// The effective configuration, without secrets.
    fn config(&self) -> serde_json::Value;

    /// Does the kubelet's main loop go on? The text says since when it does not.
    fn sync_loop(&self) -> Result<(), String>;
}

/// Why the API could not start.
#[derive(Debug, Error)]
pub enum ServerError {
    /// Certificates.
    #[error("load the certificates of the kubelet API")]
    Tls {
        /// What is wrong with them.
        #[source]
        source: TlsError,
    },
    /// The port.
    #[error("listen on {address}")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// What every request sees.
struct Context {
    node: String,
    backend: Arc<dyn Backend>,
    cluster: Arc<dyn Cluster>,
    tls: tls::Tls,
    access: access::Access,
    /// Upgraded connections at once.
    sessions: limits::Limit,
    /// Calls to the agent that last, at once.
    calls: limits::Limit,
    /// Tasks of upgraded connections, joined at the end.
    streams: TaskTracker,
    /// Ends what goes on after the drain: sessions say so to their clients.
    cut: CancellationToken,
}

/// The API, bound and not yet serving.
pub struct Server {
    listener: tcp::Listener,
    address: SocketAddr,
    context: Arc<Context>,
    reload: tls::Reload,
    reload_interval: Duration,
    drain: Duration,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Loads certificates and binds the port, so that both kinds of mistake are errors at start.
    pub async fn bind(
        settings: Settings,
        backend: Arc<dyn Backend>,
        cluster: Arc<dyn Cluster>,
    ) -> Result<Self, ServerError> {
        let (reload, tls) =
            tls::Reload::start(settings.serving, settings.client_ca, Arc::clone(&cluster))
                .await
                .map_err(|source| ServerError::Tls { source })?;
        let bound = tcp::Listener::bind(settings.bind).and_then(|listener| {
            let nowhere = || std::io::Error::other("the listener has no address");
            let address = listener.local_addr().ok_or_else(nowhere)?;
            Ok((listener, address))
        });
        let (listener, address) = bound.map_err(|source| ServerError::Bind {
            address: settings.bind,
            source,
        })?;
        let context = Arc::new(Context {
            node: settings.node,
            backend,
            cluster,
            tls,
            access: access::Access::default(),
            sessions: limits::Limit::sessions(),
            calls: limits::Limit::calls(),
            streams: TaskTracker::new(),
            cut: CancellationToken::new(),
        });
        Ok(Self {
            listener,
            address,
            context,
            reload,
            reload_interval: tls::RELOAD_INTERVAL,
            drain: accept::DRAIN,
        })
    }

    /// The address that was bound: the port for `node.status.daemonEndpoints`.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown`, then lets requests and sessions under way finish for a few seconds.
    pub async fn run(self, shutdown: CancellationToken) {
        let router = routes::router(Arc::clone(&self.context));
        let tls = self.context.tls.clone();
        let incoming = accept::listen(self.listener, &tls);
        let Context { streams, cut, .. } = &*self.context;
        // Beside the drain of requests, which a log that is followed takes whole: both must fit the kubelet's own end.
        let sessions = async {
            shutdown.cancelled().await;
            tokio::time::sleep(self.drain).await;
            tracing::info!(sessions = streams.len(), "ending the sessions that go on");
            cut.cancel();
        };
        let served = async {
            tokio::join!(
                self.reload.run(self.reload_interval, shutdown.clone()),
                accept::serve(incoming, tls, router, self.drain, shutdown.clone()),
            );
            streams.close();
            streams.wait().await;
        };
        let mut served = std::pin::pin!(served);
        tokio::select! {
            () = served.as_mut() => {}
            () = sessions => served.await,
        }
    }
}
