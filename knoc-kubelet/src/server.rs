//! The kubelet's HTTPS API on :10250, as the API server, metrics-server and Prometheus call it.
//!
//! Owner: the task that runs [`Server::run`]. It owns the accept loop, one task for each connection, and the reload of
//! certificates, and joins them all. It reads pods and opens streams through [`Backend`], and authenticates and
//! authorizes through [`Cluster`]. It holds no state of pods, never writes to the API server and decides nothing about
//! pods.
//!
//! HTTP/1.1 only (by ALPN), because upgrades need it, over TLS 1.3. Every request needs an identity, by a client
//! certificate or else a bearer token, and is then authorized by a `SubjectAccessReview`, as in [kubelet authentication
//! and authorization](https://kubernetes.io/docs/reference/access-authn-authz/kubelet-authn-authz/).

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

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{future::BoxFuture, stream::BoxStream};
use k8s_openapi::api::core::v1::Pod;
use knoc_link::carrier::{Listener as _, tcp};
use knoc_proto::pb;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    certs::Pairs,
    metrics::{Gauges, Metrics},
    stats::Snapshot,
};

pub(crate) use accept::prepare;
pub use cluster::{Cluster, ClusterError, KubeCluster};
pub use tls::TlsError;
pub use user::User;

/// The configuration of the API.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The address and port to listen on; the port is 10250 by default.
    pub bind: SocketAddr,
    /// The node's name, which reviews are about.
    pub node: String,
    /// Where the serving certificate comes from.
    pub serving: Serving,
    /// Where the CA of client certificates comes from.
    pub client_ca: ClientCa,
}

/// Where the serving certificate comes from.
#[derive(Debug, Clone)]
pub enum Serving {
    /// From PEM files, which are read again when they change.
    Files {
        /// The certificate chain, with the server's own certificate first.
        certificate: PathBuf,
        /// The private key of the first certificate.
        key: PathBuf,
    },
    /// The newest certificate that the kubelet signed itself or was issued.
    Own(Pairs),
}

/// The CA that must have signed client certificates.
#[derive(Debug, Clone)]
pub enum ClientCa {
    /// From a PEM file, which is read again when it changes.
    File(PathBuf),
    /// From the cluster's ConfigMap `kube-system/extension-apiserver-authentication`.
    Cluster,
}

/// A pod as the kubelet knows it.
#[derive(Debug, Clone, Default)]
pub struct PodView {
    /// The pod as the API server has it.
    pub pod: Arc<Pod>,
    /// The pod as the agent last reported it, if it has.
    pub observed: Option<Arc<pb::PodObserved>>,
    /// Why ephemeral containers are rejected. It is known before the watch shows the status that says so.
    pub rejected: Vec<String>,
}

/// Bytes from a container; the last item is an error if the stream ended early.
pub type ByteStream = BoxStream<'static, Result<Bytes, tonic::Status>>;

/// The output of a command in a container.
pub type ExecStream = BoxStream<'static, Result<pb::ExecOutput, tonic::Status>>;

/// The output of a connection to a port of a pod.
pub type PortForwardStream = BoxStream<'static, Result<pb::PortForwardOutput, tonic::Status>>;

/// What the API needs from the other parts of the kubelet.
pub trait Backend: Send + Sync + 'static {
    /// All pods bound to the node.
    fn pods(&self) -> Vec<Arc<Pod>>;

    /// The pod with this namespace and name.
    fn pod(&self, namespace: &str, name: &str) -> Option<PodView>;

    /// The log of a container, from the agent; returns when the agent has accepted the request. The stream survives the
    /// loss of the link to the agent.
    fn read_logs(
        &self,
        request: pb::ReadLogsRequest,
    ) -> BoxFuture<'_, Result<ByteStream, tonic::Status>>;

    /// Runs a command in a container. The first message is `Start`, the last answer `Exit`. Dropping the answers ends
    /// the command.
    fn exec(
        &self,
        input: mpsc::Receiver<pb::ExecInput>,
    ) -> BoxFuture<'_, Result<ExecStream, tonic::Status>>;

    /// Attaches to the running program of a container: like [`Backend::exec`], but with `AttachStart` first. Dropping
    /// the answers ends only the attachment.
    fn attach(
        &self,
        input: mpsc::Receiver<pb::ExecInput>,
    ) -> BoxFuture<'_, Result<ExecStream, tonic::Status>>;

    /// Connects to a port of a pod. The first message is `Start`, the first answer `Connected`; each direction closes
    /// separately. Dropping the answers resets the connection.
    fn port_forward(
        &self,
        input: mpsc::Receiver<pb::PortForwardInput>,
    ) -> BoxFuture<'_, Result<PortForwardStream, tonic::Status>>;

    /// The resource usage of the node, its pods and containers, measured at most a few seconds ago.
    fn stats(&self) -> BoxFuture<'_, Arc<Snapshot>>;

    /// All pods that the agent knows.
    fn observed(&self) -> Vec<Arc<pb::PodObserved>>;

    /// The kubelet's own counters.
    fn metrics(&self) -> &Metrics;

    /// The kubelet's own gauges, except for the number of streams, which the server knows.
    fn gauges(&self) -> Gauges;

    /// The effective configuration, without secrets.
    fn config(&self) -> serde_json::Value;

    /// Returns an error with the time of the last progress if the controller's loop is stuck.
    fn sync_loop(&self) -> Result<(), String>;
}

/// Why the API could not start.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The certificates could not be loaded.
    #[error("load the certificates of the kubelet API")]
    Tls {
        /// What is wrong with them.
        #[source]
        source: TlsError,
    },
    /// The port could not be bound.
    #[error("listen on {address}")]
    Bind {
        /// The configured address.
        address: SocketAddr,
        /// The error of the system.
        #[source]
        source: std::io::Error,
    },
}

/// What the handlers of all requests share.
struct Context {
    node: String,
    backend: Arc<dyn Backend>,
    cluster: Arc<dyn Cluster>,
    tls: tls::Tls,
    access: access::Access,
    /// Bounds the upgraded connections.
    sessions: limits::Limit,
    /// Bounds the streaming calls to the agent.
    calls: limits::Limit,
    /// The tasks of upgraded connections, which are joined at the end.
    streams: TaskTracker,
    /// Ends the sessions that remain after the drain; they report it to their clients.
    cut: CancellationToken,
}

/// The API with its port bound, not serving yet.
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
    /// Loads the certificates and binds the port, so that mistakes in either are errors at start.
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

    /// The address that was bound; its port is published in `node.status.daemonEndpoints`.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown`, then lets running requests and sessions finish for a few seconds.
    pub async fn run(self, shutdown: CancellationToken) {
        let router = routes::router(Arc::clone(&self.context));
        let tls = self.context.tls.clone();
        let incoming = accept::listen(self.listener, &tls);
        let Context { streams, cut, .. } = &*self.context;
        // At the same time as the drain of requests, which a followed log uses up: both must fit into the kubelet's own
        // shutdown.
        let sessions = async {
            shutdown.cancelled().await;
            tokio::time::sleep(self.drain).await;
            tracing::info!(sessions = streams.len(), "ending the remaining sessions");
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
