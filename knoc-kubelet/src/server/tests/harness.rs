//! A CA, a server on a free port, and a client that speaks HTTP/1.1 over TLS.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::{
    authorization::v1::SubjectAccessReviewSpec,
    core::v1::{Container, Pod, PodSpec},
};
use knoc_proto::pb;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use tokio::{net::TcpStream, sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::records::{Lengths, Records};
use crate::{
    certs::Pairs,
    metrics::{Gauges, Metrics},
    server::{
        Backend, ByteStream, ClientCa, Cluster, ClusterError, ExecStream, PodView,
        PortForwardStream, Server, Serving, Settings, User, limits::Limit,
    },
    stats::Snapshot,
};

/// Long enough for a loaded machine, short enough to end a hang.
pub(in crate::server) const PATIENCE: Duration = Duration::from_secs(20);

pub(in crate::server) struct Pair {
    pub(in crate::server) certificate: String,
    pub(in crate::server) key: String,
}

pub(in crate::server) struct TestCa {
    pub(in crate::server) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl TestCa {
    pub(in crate::server) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Self { pem, issuer }
    }

    fn issue(&self, mut params: CertificateParams, name: &str, groups: &[&str]) -> Pair {
        params.distinguished_name.push(DnType::CommonName, name);
        for &group in groups {
            params
                .distinguished_name
                .push(DnType::OrganizationName, group);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Pair {
            certificate,
            key: key.serialize_pem(),
        }
    }

    pub(in crate::server) fn client(&self, name: &str, groups: &[&str]) -> Pair {
        let mut params = CertificateParams::default();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(params, name, groups)
    }

    /// A certificate for servers.
    pub(in crate::server) fn no_client(&self, name: &str, groups: &[&str]) -> Pair {
        let mut params = CertificateParams::default();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.issue(params, name, groups)
    }

    pub(in crate::server) fn expired(&self, name: &str, groups: &[&str]) -> Pair {
        let mut params = CertificateParams::default();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(2002, 1, 1);
        self.issue(params, name, groups)
    }

    pub(in crate::server) fn server(&self) -> Pair {
        let params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        self.issue(params, "system:node:virtual", &["system:nodes"])
    }
}

#[derive(Default)]
pub(in crate::server) struct FakeBackend {
    pub(in crate::server) pods: Vec<PodView>,
    pub(in crate::server) asked: Mutex<Vec<pb::ReadLogsRequest>>,
    pub(in crate::server) log: Mutex<Option<Result<ByteStream, tonic::Status>>>,
    pub(in crate::server) stuck: bool,
    /// Runs the command of an exec or an attach.
    pub(in crate::server) command: Mutex<Option<Command>>,
    /// Answers every connection to a port.
    pub(in crate::server) ports: Option<Port>,
    pub(in crate::server) snapshot: Snapshot,
    pub(in crate::server) metrics: Metrics,
}

/// Listens on the ports of a fake pod.
pub(in crate::server) type Port = Box<
    dyn Fn(mpsc::Receiver<pb::PortForwardInput>) -> Result<PortForwardStream, tonic::Status>
        + Send
        + Sync,
>;

/// The output of a fake command for its input.
pub(in crate::server) type Command =
    Box<dyn FnOnce(mpsc::Receiver<pb::ExecInput>) -> ExecStream + Send>;

impl Backend for FakeBackend {
    fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.iter().map(|view| Arc::clone(&view.pod)).collect()
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<PodView> {
        let found = self.pods.iter().find(|view| {
            let meta = &view.pod.metadata;
            meta.namespace.as_deref() == Some(namespace) && meta.name.as_deref() == Some(name)
        });
        found.cloned()
    }

    fn read_logs(
        &self,
        request: pb::ReadLogsRequest,
    ) -> BoxFuture<'_, Result<ByteStream, tonic::Status>> {
        self.asked.lock().unwrap().push(request);
        let log = self.log.lock().unwrap().take().unwrap();
        async move { log }.boxed()
    }

    fn exec(
        &self,
        input: mpsc::Receiver<pb::ExecInput>,
    ) -> BoxFuture<'_, Result<ExecStream, tonic::Status>> {
        let command = self.command.lock().unwrap().take().unwrap();
        async move { Ok(command(input)) }.boxed()
    }

    fn attach(
        &self,
        input: mpsc::Receiver<pb::ExecInput>,
    ) -> BoxFuture<'_, Result<ExecStream, tonic::Status>> {
        self.exec(input)
    }

    fn port_forward(
        &self,
        input: mpsc::Receiver<pb::PortForwardInput>,
    ) -> BoxFuture<'_, Result<PortForwardStream, tonic::Status>> {
        let port = self.ports.as_ref().unwrap();
        async move { port(input) }.boxed()
    }

    fn stats(&self) -> BoxFuture<'_, Arc<Snapshot>> {
        async { Arc::new(self.snapshot.clone()) }.boxed()
    }

    fn observed(&self) -> Vec<Arc<pb::PodObserved>> {
        let views = self.pods.iter();
        views.filter_map(|view| view.observed.clone()).collect()
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn gauges(&self) -> Gauges {
        Gauges::default()
    }

    fn config(&self) -> serde_json::Value {
        serde_json::json!({"node": {"name": "virtual"}})
    }

    fn sync_loop(&self) -> Result<(), String> {
        if self.stuck {
            Err("sync Loop took longer than expected".to_owned())
        } else {
            Ok(())
        }
    }
}

/// Knows tokens, and allows users what `allowed` lists as `user verb subresource`.
#[derive(Default)]
pub(in crate::server) struct FakeCluster {
    pub(in crate::server) tokens: HashMap<String, User>,
    pub(in crate::server) allowed: Vec<&'static str>,
    pub(in crate::server) broken: bool,
    /// The ConfigMap's CA; None makes the ConfigMap unreadable.
    pub(in crate::server) ca: Mutex<Option<String>>,
    pub(in crate::server) reviews: Mutex<Vec<String>>,
}

const BROKEN: ClusterError = ClusterError::Deadline { call: "review" };

impl Cluster for FakeCluster {
    fn review_access(
        &self,
        spec: SubjectAccessReviewSpec,
    ) -> BoxFuture<'_, Result<bool, ClusterError>> {
        let attributes = spec.resource_attributes.unwrap();
        assert_eq!(attributes.resource.as_deref(), Some("nodes"));
        assert_eq!(attributes.name.as_deref(), Some("virtual"));
        let asked = format!(
            "{} {} {}",
            spec.user.unwrap(),
            attributes.verb.unwrap(),
            attributes.subresource.unwrap()
        );
        let allowed = self.allowed.contains(&asked.as_str());
        self.reviews.lock().unwrap().push(asked);
        let answer = if self.broken {
            Err(BROKEN)
        } else {
            Ok(allowed)
        };
        async move { answer }.boxed()
    }

    fn review_token(&self, token: String) -> BoxFuture<'_, Result<Option<User>, ClusterError>> {
        self.reviews.lock().unwrap().push("token".to_owned());
        let user = self.tokens.get(&token).cloned();
        async move { Ok(user) }.boxed()
    }

    fn client_ca(&self) -> BoxFuture<'_, Result<String, ClusterError>> {
        let ca = self.ca.lock().unwrap().clone().ok_or(BROKEN);
        async move { ca }.boxed()
    }
}

pub(in crate::server) fn pod(namespace: &str, name: &str, containers: &[&str]) -> Pod {
    let container = |name: &&str| Container {
        name: (*name).to_owned(),
        ..Container::default()
    };
    let mut pod = Pod::default();
    pod.metadata.namespace = Some(namespace.to_owned());
    pod.metadata.name = Some(name.to_owned());
    pod.metadata.uid = Some(format!("{namespace}-{name}"));
    pod.spec = Some(PodSpec {
        containers: containers.iter().map(container).collect(),
        ..PodSpec::default()
    });
    pod
}

/// A pod whose containers all run.
pub(in crate::server) fn running(namespace: &str, name: &str, containers: &[&str]) -> PodView {
    let status = |name: &&str| pb::ContainerStatus {
        name: (*name).to_owned(),
        state: Some(pb::container_status::State::Running(pb::Running::default())),
        ..pb::ContainerStatus::default()
    };
    PodView {
        pod: Arc::new(pod(namespace, name, containers)),
        observed: Some(Arc::new(pb::PodObserved {
            uid: format!("{namespace}-{name}"),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            containers: containers.iter().map(status).collect(),
            ..pb::PodObserved::default()
        })),
        rejected: Vec::new(),
    }
}

/// A server with its CA, files and tasks.
pub(in crate::server) struct Fixture {
    pub(in crate::server) ca: TestCa,
    pub(in crate::server) folder: tempfile::TempDir,
    pub(in crate::server) backend: Arc<FakeBackend>,
    pub(in crate::server) cluster: Arc<FakeCluster>,
    pub(in crate::server) address: SocketAddr,
    pub(in crate::server) sessions_limit: Limit,
    pub(in crate::server) calls_limit: Limit,
    pub(in crate::server) shutdown: CancellationToken,
    pub(in crate::server) tasks: JoinSet<()>,
}

pub(in crate::server) fn put(path: &Path, text: &str) {
    use std::io::Write as _;
    std::fs::File::create(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .unwrap();
}

fn settings(serving: Serving, client_ca: ClientCa) -> Settings {
    Settings {
        bind: "127.0.0.1:0".parse().unwrap(),
        node: "virtual".to_owned(),
        serving,
        client_ca,
    }
}

/// The TLS configuration of a client that trusts `ca`, with or without a client certificate.
pub(in crate::server) fn client_config(ca: &str, identity: Option<&Pair>) -> rustls::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    match identity {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let chain = CertificateDer::from_pem_slice(pair.certificate.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
            builder.with_client_auth_cert(vec![chain], key).unwrap()
        }
    }
}

impl Fixture {
    pub(in crate::server) async fn new(backend: FakeBackend, cluster: FakeCluster) -> Self {
        let ca = TestCa::new("cluster");
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let pair = ca.server();
        put(&path("tls.crt"), &pair.certificate);
        put(&path("tls.key"), &pair.key);
        let serving = Serving::Files {
            certificate: path("tls.crt"),
            key: path("tls.key"),
        };
        put(&path("ca.crt"), &ca.pem);
        let settings = settings(serving, ClientCa::File(path("ca.crt")));
        Self::start(ca, folder, settings, backend, cluster).await
    }

    /// With a certificate of the kubelet's own, and the cluster's client CA.
    pub(super) async fn with_own(ca: TestCa, pairs: Pairs, cluster: FakeCluster) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(Serving::Own(pairs), ClientCa::Cluster);
        Self::start(ca, folder, settings, FakeBackend::default(), cluster).await
    }

    async fn start(
        ca: TestCa,
        folder: tempfile::TempDir,
        settings: Settings,
        backend: FakeBackend,
        cluster: FakeCluster,
    ) -> Self {
        let backend = Arc::new(backend);
        let cluster = Arc::new(cluster);
        let mut server = Server::bind(
            settings,
            Arc::clone(&backend) as Arc<dyn Backend>,
            Arc::clone(&cluster) as Arc<dyn Cluster>,
        )
        .await
        .unwrap();
        server.reload_interval = Duration::from_millis(20);
        server.drain = Duration::from_millis(200);
        let shutdown = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let address = server.local_addr();
        let sessions_limit = server.context.sessions.clone();
        let calls_limit = server.context.calls.clone();
        tasks.spawn(server.run(shutdown.clone()));
        Self {
            ca,
            folder,
            backend,
            cluster,
            address,
            sessions_limit,
            calls_limit,
            shutdown,
            tasks,
        }
    }

    /// The counted sessions, each as `{verb="…",protocol="…"} N`.
    pub(in crate::server) fn sessions(&self) -> Vec<String> {
        let text = self.backend.metrics.render(&Gauges::default());
        text.lines()
            .filter_map(|line| line.strip_prefix("knoc_streaming_sessions_total"))
            .map(str::to_owned)
            .collect()
    }

    pub(in crate::server) fn master(&self) -> Pair {
        self.ca.client("kube-apiserver", &["system:masters"])
    }

    /// A connection that records in `lengths` which TLS records it reads.
    pub(in crate::server) async fn connect_noting(
        &self,
        identity: &Pair,
        lengths: Lengths,
    ) -> tokio_rustls::client::TlsStream<Records> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let config = client_config(&self.ca.pem, Some(identity));
        let name = ServerName::try_from("127.0.0.1").unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(name, Records::new(stream, lengths))
            .await
            .unwrap()
    }

    /// Connects, trusting `ca`, with or without a client certificate.
    pub(in crate::server) async fn connect_trusting(
        &self,
        ca: &str,
        identity: Option<&Pair>,
    ) -> Client {
        let stream = TcpStream::connect(self.address).await.unwrap();
        Self::connect_over(stream, ca, identity).await
    }

    /// The same over an existing connection.
    pub(in crate::server) async fn connect_over(
        stream: TcpStream,
        ca: &str,
        identity: Option<&Pair>,
    ) -> Client {
        let config = client_config(ca, identity);
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
            .unwrap();
        let serial = stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(connection.with_upgrades().map(drop));
        Client {
            sender,
            served_by: serial,
            tasks,
        }
    }

    pub(in crate::server) async fn connect(&self, identity: Option<&Pair>) -> Client {
        self.connect_trusting(&self.ca.pem, identity).await
    }
}

/// One connection of a client.
pub(in crate::server) struct Client {
    sender: hyper::client::conn::http1::SendRequest<Empty<Bytes>>,
    pub(in crate::server) served_by: Vec<u8>,
    pub(in crate::server) tasks: JoinSet<()>,
}

impl Client {
    pub(in crate::server) async fn send(
        &mut self,
        method: &str,
        path: &str,
        token: Option<&str>,
    ) -> http::Response<Incoming> {
        let token = token.map(|token| format!("Bearer {token}"));
        let headers: Vec<_> = token
            .iter()
            .map(|it| ("authorization", it.as_str()))
            .collect();
        self.send_with(method, path, &headers).await
    }

    pub(in crate::server) async fn send_with(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
    ) -> http::Response<Incoming> {
        let mut request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("host", "127.0.0.1");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Empty::new()).unwrap();
        tokio::time::timeout(PATIENCE, self.sender.send_request(request))
            .await
            .expect("no answer in time")
            .unwrap()
    }

    /// Sends a request with any method; returns status and whole text.
    pub(in crate::server) async fn ask(&mut self, method: &str, path: &str) -> (u16, String) {
        let response = self.send(method, path, None).await;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    /// Reads an answer to its end, so that the next request can be sent.
    pub(in crate::server) async fn drain(&mut self, response: http::Response<Incoming>) {
        drop(response.into_body().collect().await.unwrap());
    }

    /// Sends a GET; returns status and whole text.
    pub(in crate::server) async fn get(&mut self, path: &str) -> (u16, String) {
        self.get_as(path, None).await
    }

    pub(in crate::server) async fn get_as(
        &mut self,
        path: &str,
        token: Option<&str>,
    ) -> (u16, String) {
        let response = self.send("GET", path, token).await;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }
}
