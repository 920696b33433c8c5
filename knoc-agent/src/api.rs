//! The gRPC service that kubelets and knocctl call: parses, asks the registry, encodes. Decides nothing about a pod.
//!
//! Every request comes from a checked peer (certificate or socket); the policy on identities is an interceptor, so no
//! method can forget it. Changes carry the cluster id and a leadership epoch, which are checked first. Health and
//! reflection are served beside it.

mod admit;
mod logs;
mod stats;
mod streams;
mod watch;

use std::{sync::Arc, time::Duration};

use futures::{StreamExt as _, stream::BoxStream};
use knoc_proto::{
    bulk,
    error::chain,
    ids::PodUid,
    link,
    pb::{self, agent_server::AgentServer},
    pod::{InvalidPod, PodSpec, PodValues},
    reason::ErrorReason,
};
use tokio::sync::watch::Receiver;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming, service::interceptor::InterceptedService};

use crate::{
    doctor,
    pod::actor::Refused,
    registry::{
        Registry,
        cluster::{Leader, Pin},
    },
    scheduler::SubmitRequest,
    site::Site,
    stats::Stats,
};

/// What this agent can do beyond the first release: names that the near side asks for.
const CAPABILITIES: &[&str] = &[
    "exec",
    "attach",
    "port-forward",
    "values",
    "diagnose",
    "script",
    "stats",
];

/// What of them holds on this site.
fn capabilities(exec: bool) -> Vec<String> {
    let possible = |name: &&str| exec || *name != "exec";
    let names = CAPABILITIES.iter().copied().filter(possible);
    names.map(str::to_owned).collect()
}

/// A stream of answers.
type Answers<T> = BoxStream<'static, Result<T, Status>>;

/// The service. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Service(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    site: Arc<Site>,
    registry: Arc<Registry>,
    node: Receiver<pb::NodeInfo>,
    pin: Pin,
    started_at: i64,
    /// Ends watches, which would never end by themselves.
    stop: CancellationToken,
    /// Readers of log files.
    tasks: TaskTracker,
    stats: Arc<Stats>,
}

impl Service {
    /// The service over what `app` made.
    #[must_use]
    pub fn new(
        site: Arc<Site>,
        registry: Arc<Registry>,
        node: Receiver<pb::NodeInfo>,
        pin: Pin,
        stop: CancellationToken,
    ) -> Self {
        let started_at = crate::pod::state::nanos(jiff::Timestamp::now());
        let tasks = TaskTracker::new();
        Self(Arc::new(Shared {
            site,
            registry,
            node,
            pin,
            started_at,
            stop,
            tasks,
            stats: Arc::default(),
        }))
    }

    /// May the kubelet that leads `node` with this epoch make a change?
    async fn check(&self, node: &str, cluster_id: &str, epoch: i64) -> Result<(), Status> {
        let leader = Leader { node, epoch };
        let checked = self.0.pin.check(cluster_id, leader).await;
        checked.map_err(refused)
    }

    /// The same for a change of a pod that is there; one that is not has no node, and nothing to be changed.
    async fn check_pod(&self, uid: &str, cluster_id: &str, epoch: i64) -> Result<(), Status> {
        match self.0.site.board.get(uid) {
            Some(pod) => self.check(&pod.node_name, cluster_id, epoch).await,
            None => self.check("", cluster_id, 0).await,
        }
    }
}

/// Task: serves one listener until `stop`.
pub async fn serve(service: Service, incoming: link::Incoming, stop: CancellationToken) {
    let policy = service.0.site.config.policy.clients.clone();
    let agent = AgentServer::new(service)
        .max_decoding_message_size(link::MAX_MESSAGE)
        .max_encoding_message_size(link::MAX_MESSAGE);
    let agent = InterceptedService::new(bulk::Served::new(agent), admit::Identities::new(policy));
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<AgentServer<Service>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(pb::DESCRIPTORS)
        .build_v1();
    let reflection = match reflection {
        Ok(reflection) => Some(reflection),
        Err(error) => {
            tracing::error!(error = chain(&error), "no reflection");
            None
        }
    };
    let served = link::server()
        .add_service(agent)
        .add_service(health)
        .add_optional_service(reflection)
        .serve_with_incoming_shutdown(incoming, stop.cancelled())
        .await;
    if let Err(error) = served {
        tracing::error!(error = chain(&error), "a listener failed");
    }
}

fn refused(refused: Refused) -> Status {
    refused.reason.status(refused.message)
}

fn uid(text: &str) -> Result<PodUid, Status> {
    PodUid::try_from(text).map_err(|error| ErrorReason::InvalidRequest.status(error.to_string()))
}

fn invalid(error: &InvalidPod) -> Status {
    ErrorReason::InvalidSpec.status(error.to_string())
}

#[tonic::async_trait]
impl pb::agent_server::Agent for Service {
    async fn get_info(
        &self,
        request: Request<pb::GetInfoRequest>,
    ) -> Result<Response<pb::AgentInfo>, Status> {
        let request = request.into_inner();
        self.0
            .pin
            .admit(&request.cluster_id)
            .await
            .map_err(refused)?;
        let site = &self.0.site;
        let node = self.0.node.borrow().clone();
        let version = match site.scheduler.version().await {
            Ok(version) => version,
            Err(error) => chain(&error),
        };
        let process = crate::lease::Process::own();
        let user = nix::unistd::User::from_uid(nix::unistd::geteuid())
            .ok()
            .flatten();
        Ok(Response::new(pb::AgentInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            site: site.config.site.clone(),
            capabilities: capabilities(site.runtime.exec),
            scheduler: site.scheduler.name().to_owned(),
            scheduler_version: version,
            runtime: site.runtime.name.clone(),
            runtime_version: site.runtime.version.clone(),
            hostname: process.host,
            user: user.map_or_else(|| nix::unistd::geteuid().to_string(), |user| user.name),
            epoch: site.lease.epoch(),
            cluster_id: self.0.pin.cluster_id().await,
            started_at: self.0.started_at,
            state_dir: site.state.root().to_string_lossy().into_owned(),
            pid_isolation: node.pid_isolation,
            pod_limit: node.pod_limit,
        }))
    }

    type WatchNodeStream = Answers<pb::NodeInfo>;

    async fn watch_node(
        &self,
        _: Request<pb::WatchNodeRequest>,
    ) -> Result<Response<Self::WatchNodeStream>, Status> {
        let stream = watch::node(self.0.node.clone(), self.0.stop.clone());
        Ok(Response::new(stream.boxed()))
    }

    async fn ensure_pod(
        &self,
        request: Request<pb::EnsurePodRequest>,
    ) -> Result<Response<pb::EnsurePodResponse>, Status> {
        let request = request.into_inner();
        let node = request.spec.as_ref().map_or("", |spec| &spec.node_name);
        self.check(node, &request.cluster_id, request.leadership_epoch)
            .await?;
        let spec = request
            .spec
            .ok_or_else(|| ErrorReason::InvalidRequest.status("no spec"))?;
        let spec = PodSpec::try_from(spec).map_err(|error| invalid(&error))?;
        let values = request.values.unwrap_or_default();
        let values = PodValues::check(values, &spec).map_err(|error| invalid(&error))?;
        let site = &self.0.site;
        if site.board.get(spec.uid().as_str()).is_none() {
            admit::pod(site, &spec, &request.cluster_id)?;
        }
        let uid = spec.uid().clone();
        let (spec, values) = (spec.into_inner(), values.into_inner());
        let ensured = self
            .0
            .registry
            .ensure(&uid, spec, values, request.cluster_id)
            .await;
        let (pod, created) = ensured.map_err(refused)?;
        Ok(Response::new(pb::EnsurePodResponse {
            pod: Some(pod),
            created,
        }))
    }

    async fn delete_pod(
        &self,
        request: Request<pb::DeletePodRequest>,
    ) -> Result<Response<pb::DeletePodResponse>, Status> {
        let request = request.into_inner();
        self.check_pod(&request.uid, &request.cluster_id, request.leadership_epoch)
            .await?;
        let grace = u64::try_from(request.grace_seconds)
            .ok()
            .map(Duration::from_secs);
        let deleted = self
            .0
            .registry
            .delete(&uid(&request.uid)?, grace, request.reason)
            .await;
        Ok(Response::new(pb::DeletePodResponse {
            pod: Some(deleted.map_err(refused)?),
        }))
    }

    async fn forget_pod(
        &self,
        request: Request<pb::ForgetPodRequest>,
    ) -> Result<Response<pb::ForgetPodResponse>, Status> {
        let request = request.into_inner();
        self.check_pod(&request.uid, &request.cluster_id, request.leadership_epoch)
            .await?;
        self.0
            .registry
            .forget(&uid(&request.uid)?)
            .await
            .map_err(refused)?;
        Ok(Response::new(pb::ForgetPodResponse {}))
    }

    async fn get_pod(
        &self,
        request: Request<pb::GetPodRequest>,
    ) -> Result<Response<pb::PodObserved>, Status> {
        let uid = uid(&request.into_inner().uid)?;
        let found = self.0.site.board.get(uid.as_str());
        let found = found.ok_or_else(|| ErrorReason::NotFound.status(format!("no pod {uid}")))?;
        Ok(Response::new((*found).clone()))
    }

    type WatchPodsStream = Answers<pb::PodEvent>;

    async fn watch_pods(
        &self,
        _: Request<pb::WatchPodsRequest>,
    ) -> Result<Response<Self::WatchPodsStream>, Status> {
        let stream = watch::pods(Arc::clone(&self.0.site), self.0.stop.clone());
        Ok(Response::new(stream.boxed()))
    }

    async fn update_values(
        &self,
        request: Request<pb::UpdateValuesRequest>,
    ) -> Result<Response<pb::UpdateValuesResponse>, Status> {
        let request = request.into_inner();
        self.check_pod(&request.uid, &request.cluster_id, request.leadership_epoch)
            .await?;
        let values = request.values.unwrap_or_default();
        self.0
            .registry
            .update(&uid(&request.uid)?, values)
            .await
            .map_err(refused)?;
        Ok(Response::new(pb::UpdateValuesResponse {}))
    }

    type ReadLogsStream = bulk::Nothing<pb::LogChunk>;

    async fn read_logs(
        &self,
        request: Request<pb::ReadLogsRequest>,
    ) -> Result<Response<Self::ReadLogsStream>, Status> {
        let request = request.into_inner();
        let chunks = logs::read(&self.0.site, &self.0.tasks, request).await?;
        Ok(bulk::answer(bulk::encode(chunks)))
    }

    type ExecStream = bulk::Nothing<pb::ExecOutput>;

    async fn exec(
        &self,
        request: Request<Streaming<pb::ExecInput>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        streams::exec(&self.0.site, bulk::input(request)?).await
    }

    type AttachStream = bulk::Nothing<pb::ExecOutput>;

    async fn attach(
        &self,
        request: Request<Streaming<pb::ExecInput>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        streams::attach(&self.0.site, bulk::input(request)?).await
    }

    type PortForwardStream = bulk::Nothing<pb::PortForwardOutput>;

    async fn port_forward(
        &self,
        request: Request<Streaming<pb::PortForwardInput>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        streams::port_forward(&self.0.site, bulk::input(request)?).await
    }

    type GetStatsStream = Answers<pb::PodStats>;

    async fn get_stats(
        &self,
        request: Request<pb::GetStatsRequest>,
    ) -> Result<Response<Self::GetStatsStream>, Status> {
        let uids = request.into_inner().uids;
        let stream = stats::stream(&self.0.site, &self.0.stats, &uids);
        Ok(Response::new(stream.map(Ok).boxed()))
    }

    async fn render_script(
        &self,
        request: Request<pb::RenderScriptRequest>,
    ) -> Result<Response<pb::RenderScriptResponse>, Status> {
        let spec = request.into_inner().spec.unwrap_or_default();
        let spec = PodSpec::try_from(spec).map_err(|error| invalid(&error))?;
        let site = &self.0.site;
        let request = submit_request(site, &spec, "");
        let rendered = site.scheduler.render(&request);
        let rendered =
            rendered.map_err(|refusal| ErrorReason::InvalidSpec.status(refusal.words))?;
        Ok(Response::new(pb::RenderScriptResponse {
            script: rendered.script,
            argv: rendered.argv,
        }))
    }

    type DiagnoseStream = Answers<pb::Finding>;

    async fn diagnose(
        &self,
        request: Request<pb::DiagnoseRequest>,
    ) -> Result<Response<Self::DiagnoseStream>, Status> {
        let site = Arc::clone(&self.0.site);
        let registry = Arc::clone(&self.0.registry);
        let node = self.0.node.borrow().clone();
        let findings = doctor::examine(site, registry, node, request.into_inner().probe);
        Ok(Response::new(findings.map(Ok).boxed()))
    }
}

fn submit_request(site: &Site, spec: &PodSpec, cluster_id: &str) -> SubmitRequest {
    SubmitRequest {
        uid: spec.uid().clone(),
        spec: Arc::new((**spec).clone()),
        cluster_id: cluster_id.to_owned(),
        attempt: 1,
        jobdir: site.state.pod(spec.uid()).path().to_owned(),
        shim: site.shim.clone(),
    }
}
