//! The gRPC service that kubelets and knocctl call. It parses a request, asks the registry and
//! encodes the answer; it decides nothing about a pod.
//!
//! Every request comes from a peer that the link has authenticated (by certificate or by socket)
//! and is checked by the [`gate`]. The gate is an interceptor, so that no method can forget it; it
//! also covers health and reflection, which are served next to the agent's service. Requests that
//! change something carry the cluster ID and a leadership epoch. Both are checked first, and
//! recorded only after the rest of the request was found valid.

mod admission;
mod egress;
pub mod gate;
mod lead;
mod logs;
pub(crate) mod renew;
mod shim_link;
mod stats;
mod streams;
mod watch;

use std::{collections::BTreeMap, sync::Arc};

use futures::{StreamExt as _, stream::BoxStream};
use knoc_link::{Peer, bulk};
use knoc_proto::{
    capability,
    error::chain,
    ids::PodUid,
    pb::{self, agent_server::AgentServer},
    pod::{self, InvalidPod, PodSpec, PodValues},
    reason::ErrorReason,
};
use tokio::sync::watch::Receiver;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming, service::interceptor::InterceptedService};

use crate::{
    config::UserIds,
    doctor,
    image::Credentials,
    linger::Links,
    pod::input::RequestError,
    policy::nodes::may_lead,
    registry::{
        Registry,
        cluster::{Asked, Leader, Pin},
    },
    scheduler::SubmitRequest,
    site::Site,
    stats::Stats,
};

/// What this agent can do beyond the first release. Kubelets look for these names.
const CAPABILITIES: &[&str] = &[
    "exec",
    "attach",
    "port-forward",
    "values",
    "diagnose",
    "script",
    "stats",
    "renew",
    "log-positions",
    "egress",
];

/// The capabilities that hold on this site.
fn capabilities(exec: bool, ids: UserIds) -> Vec<String> {
    let possible = |name: &&str| exec || *name != "exec";
    let ids = (ids == UserIds::Requested).then_some(capability::USER_IDS);
    let names = CAPABILITIES.iter().copied().filter(possible);
    let names = names.chain(capability::OF_PODS);
    let names = names.chain([capability::LATE_EPHEMERAL]).chain(ids);
    names.map(str::to_owned).collect()
}

type Answers<T> = BoxStream<'static, Result<T, Status>>;

/// The gRPC service. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Service(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    site: Arc<Site>,
    registry: Arc<Registry>,
    node: Receiver<pb::NodeInfo>,
    pin: Arc<Pin>,
    gate: gate::Gate,
    renewer: renew::Renewer,
    started_at: i64,
    /// Ends watches, which have no end of their own.
    stop: CancellationToken,
    /// The tasks that read log files.
    tasks: TaskTracker,
    stats: Arc<Stats>,
}

impl Service {
    /// Creates the service from what `app` has built.
    #[must_use]
    pub fn new(
        site: Arc<Site>,
        registry: Arc<Registry>,
        node: Receiver<pb::NodeInfo>,
        pin: Arc<Pin>,
        gate: gate::Gate,
        stop: CancellationToken,
    ) -> Self {
        let renewer = renew::Renewer::new(gate.clone());
        let started_at = crate::pod::state::nanos(jiff::Timestamp::now());
        let tasks = TaskTracker::new();
        Self(Arc::new(Shared {
            site,
            registry,
            node,
            pin,
            gate,
            renewer,
            started_at,
            stop,
            tasks,
            stats: Arc::default(),
        }))
    }

    /// Checks the cluster and the leadership that a request claims, and records nothing yet.
    async fn check(&self, peer: Option<&Peer>, asks: Asks<'_>) -> Result<Checked, Status> {
        let policy = self.0.site.policy.now();
        let now = jiff::Timestamp::now();
        let claim = lead::Claim {
            node: asks.node,
            epoch: asks.epoch,
        };
        let leads = lead::judge(peer, claim, &policy.nodes, now).map_err(status)?;
        let checked = Checked {
            cluster_id: asks.cluster_id.to_owned(),
            configured: policy.cluster_id.clone(),
            leads,
            epoch: asks.epoch,
            pins: lead::kubelet(peer).is_some(),
            now: now.as_second(),
        };
        let verified = self.0.pin.verify(&checked.asked()).await;
        verified.map_err(status)?;
        Ok(checked)
    }

    /// Like [`Self::check`], for a change of an existing pod. A pod that does not exist has no
    /// node.
    async fn check_pod(
        &self,
        peer: Option<&Peer>,
        uid: &PodUid,
        cluster_id: &str,
        epoch: i64,
    ) -> Result<(), Status> {
        let pod = self.0.site.board.get(uid.as_str());
        let asks = Asks {
            node: pod.as_ref().map_or("", |pod| &pod.node_name),
            cluster_id,
            epoch,
        };
        let checked = self.check(peer, asks).await?;
        if pod.is_some() {
            self.claim(&checked).await?;
        }
        Ok(())
    }

    /// Records what a valid request claims.
    async fn claim(&self, checked: &Checked) -> Result<(), Status> {
        let claimed = self.0.pin.claim(&checked.asked()).await;
        claimed.map_err(status)
    }
}

/// The cluster and the leadership that a request claims.
#[derive(Debug, Clone, Copy)]
struct Asks<'a> {
    node: &'a str,
    cluster_id: &'a str,
    epoch: i64,
}

/// A claim that the peer was found entitled to make.
#[derive(Debug)]
struct Checked {
    cluster_id: String,
    configured: Option<String>,
    /// The node that the peer leads.
    leads: Option<String>,
    epoch: i64,
    pins: bool,
    now: i64,
}

impl Checked {
    fn asked(&self) -> Asked<'_> {
        let epoch = self.epoch;
        Asked {
            cluster_id: &self.cluster_id,
            configured: self.configured.as_deref(),
            leader: self.leads.as_deref().map(|node| Leader { node, epoch }),
            pins: self.pins,
            now: self.now,
        }
    }
}

/// Task: serves one listener until `stop` is cancelled.
pub async fn serve(
    service: Service,
    incoming: knoc_link::Incoming,
    links: Links,
    stop: CancellationToken,
) {
    let gate = service.0.gate.clone();
    let agent = AgentServer::new(service)
        .max_decoding_message_size(knoc_link::MAX_MESSAGE)
        .max_encoding_message_size(knoc_link::MAX_MESSAGE);
    let agent = InterceptedService::new(bulk::RawServer::new(agent), gate.clone());
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<AgentServer<Service>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(pb::DESCRIPTORS)
        .build_v1();
    let reflection = match reflection {
        Ok(reflection) => Some(InterceptedService::new(reflection, gate.clone())),
        Err(error) => {
            tracing::error!(error = chain(&error), "gRPC reflection is not available");
            None
        }
    };
    let health = InterceptedService::new(health, gate.clone());
    let guarded =
        incoming.map(move |conn| conn.map(|conn| gate.guard(conn.holding(links.count()))));
    let router = knoc_link::server()
        .add_service(agent)
        .add_service(health)
        .add_optional_service(reflection);
    if let Err(error) = knoc_link::serve(router, guarded.boxed(), stop).await {
        tracing::error!(error = chain(&error), "a listener failed");
    }
}

fn status(error: RequestError) -> Status {
    error.reason.status(error.message)
}

fn uid(text: &str) -> Result<PodUid, Status> {
    PodUid::try_from(text).map_err(|error| ErrorReason::InvalidRequest.status(error.to_string()))
}

fn credentials(wire: Option<pb::PullCredentials>) -> Result<Option<Credentials>, Status> {
    let checked = wire.map(Credentials::check).transpose();
    checked.map_err(|error| ErrorReason::InvalidRequest.status(error.to_string()))
}

/// The checked shape of a pod. A known pod may go on with what was accepted by an earlier version, which checked less.
async fn shape(site: &Site, spec: pb::PodSpec, known: bool) -> Result<PodSpec, Status> {
    let sent = known.then(|| spec.clone());
    let error = match PodSpec::try_from(spec) {
        Ok(spec) => return Ok(spec),
        Err(error) => error,
    };
    if let Some(sent) = sent {
        let uid = uid(&sent.uid)?;
        let dir = site.state.pod(&uid);
        let stored = tokio::task::spawn_blocking(move || dir.spec()).await;
        if let Ok(Ok(pb::JobFile {
            spec: Some(stored), ..
        })) = stored
            && error.is_known_of(stored)
        {
            return Ok(PodSpec::accepted_before(uid, sent));
        }
    }
    Err(invalid(&error))
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
        let peer = request.extensions().get::<Peer>().cloned();
        let request = request.into_inner();
        let asks = Asks {
            node: "",
            cluster_id: &request.cluster_id,
            epoch: 0,
        };
        let checked = self.check(peer.as_ref(), asks).await?;
        self.claim(&checked).await?;
        let site = &self.0.site;
        let policy = site.policy.now();
        warn_of_leadership(peer.as_ref(), &request.node_name, &policy.nodes);
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
            capabilities: capabilities(site.runtime.exec, site.config.job.user_ids),
            scheduler: site.scheduler.name().to_owned(),
            scheduler_version: version,
            runtime: site.runtime.name.clone(),
            runtime_version: site.runtime.version.clone(),
            hostname: process.host,
            user: user.map_or_else(|| nix::unistd::geteuid().to_string(), |user| user.name),
            epoch: site.lease.epoch(),
            cluster_id: self.0.pin.cluster_id(policy.cluster_id.as_deref()).await,
            started_at: self.0.started_at,
            state_dir: site.state.root().to_string_lossy().into_owned(),
            pid_isolation: node.pid_isolation,
            pod_limit: node.pod_limit,
            policy_problem: site.policy.problem().unwrap_or_default(),
            shim_route: site.shim_route.describe().0,
            kernel: crate::host::host().kernel.clone(),
            os: crate::host::host().os.clone(),
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
        let peer = request.extensions().get::<Peer>().cloned();
        let request = request.into_inner();
        let wanted = request.spec.as_ref();
        let known = wanted.and_then(|spec| self.0.site.board.get(&spec.uid));
        let nodes = [
            known.as_ref().map(|pod| &pod.node_name),
            wanted.map(|spec| &spec.node_name),
        ];
        // The node of a pod never changes, whatever a request says about it.
        let node = nodes.into_iter().flatten().find(|node| !node.is_empty());
        let asks = Asks {
            node: node.map_or("", String::as_str),
            cluster_id: &request.cluster_id,
            epoch: request.leadership_epoch,
        };
        let checked = self.check(peer.as_ref(), asks).await?;
        let spec = request
            .spec
            .ok_or_else(|| ErrorReason::InvalidRequest.status("no spec"))?;
        let spec = shape(&self.0.site, spec, known.is_some()).await?;
        let values = request.values.unwrap_or_default();
        let values = PodValues::check(values, &spec).map_err(|error| invalid(&error))?;
        let credentials = credentials(request.pull_credentials)?;
        let site = &self.0.site;
        if site.board.get(spec.uid().as_str()).is_none() {
            admission::admit(site, &spec, &request.cluster_id)?;
        }
        self.claim(&checked).await?;
        let registry = &self.0.registry;
        let ensured = registry
            .ensure(spec, values, credentials, request.cluster_id)
            .await;
        let (pod, created) = ensured.map_err(status)?;
        Ok(Response::new(pb::EnsurePodResponse {
            pod: Some(pod),
            created,
        }))
    }

    async fn delete_pod(
        &self,
        request: Request<pb::DeletePodRequest>,
    ) -> Result<Response<pb::DeletePodResponse>, Status> {
        let peer = request.extensions().get::<Peer>().cloned();
        let request = request.into_inner();
        let uid = uid(&request.uid)?;
        let (cluster_id, epoch) = (&request.cluster_id, request.leadership_epoch);
        self.check_pod(peer.as_ref(), &uid, cluster_id, epoch)
            .await?;
        let grace = pod::duration(request.grace_seconds);
        let deleted = self.0.registry.delete(&uid, grace, request.reason).await;
        Ok(Response::new(pb::DeletePodResponse {
            pod: Some(deleted.map_err(status)?),
        }))
    }

    async fn forget_pod(
        &self,
        request: Request<pb::ForgetPodRequest>,
    ) -> Result<Response<pb::ForgetPodResponse>, Status> {
        let peer = request.extensions().get::<Peer>().cloned();
        let request = request.into_inner();
        let uid = uid(&request.uid)?;
        let (cluster_id, epoch) = (&request.cluster_id, request.leadership_epoch);
        self.check_pod(peer.as_ref(), &uid, cluster_id, epoch)
            .await?;
        self.0.registry.forget(&uid).await.map_err(status)?;
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
        let peer = request.extensions().get::<Peer>().cloned();
        let request = request.into_inner();
        let uid = uid(&request.uid)?;
        let credentials = credentials(request.pull_credentials)?;
        let (cluster_id, epoch) = (&request.cluster_id, request.leadership_epoch);
        self.check_pod(peer.as_ref(), &uid, cluster_id, epoch)
            .await?;
        let values = request.values.unwrap_or_default();
        let updated = self.0.registry.update(&uid, values, credentials).await;
        updated.map_err(status)?;
        Ok(Response::new(pb::UpdateValuesResponse {}))
    }

    type ReadLogsStream = bulk::NoMessages<pb::LogChunk>;

    async fn read_logs(
        &self,
        request: Request<pb::ReadLogsRequest>,
    ) -> Result<Response<Self::ReadLogsStream>, Status> {
        let request = request.into_inner();
        let chunks = logs::read(&self.0.site, &self.0.tasks, request).await?;
        Ok(bulk::answer(bulk::encode(chunks)))
    }

    type ExecStream = bulk::NoMessages<pb::ExecOutput>;

    async fn exec(
        &self,
        request: Request<Streaming<pb::ExecInput>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        streams::exec(&self.0.site, bulk::input(request)?).await
    }

    type AttachStream = bulk::NoMessages<pb::ExecOutput>;

    async fn attach(
        &self,
        request: Request<Streaming<pb::ExecInput>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        streams::attach(&self.0.site, bulk::input(request)?).await
    }

    type PortForwardStream = bulk::NoMessages<pb::PortForwardOutput>;

    async fn port_forward(
        &self,
        request: Request<Streaming<pb::PortForwardInput>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        streams::port_forward(&self.0.site, bulk::input(request)?).await
    }

    type WatchEgressStream = Answers<pb::EgressAttempt>;

    async fn watch_egress(
        &self,
        request: Request<Streaming<pb::EgressControl>>,
    ) -> Result<Response<Self::WatchEgressStream>, Status> {
        egress::watch(self, request).await
    }

    type EgressStreamStream = bulk::NoMessages<pb::EgressOutput>;

    async fn egress_stream(
        &self,
        request: Request<Streaming<pb::EgressInput>>,
    ) -> Result<Response<Self::EgressStreamStream>, Status> {
        let peer = request.extensions().get::<Peer>().cloned();
        streams::egress(&self.0.site, peer.as_ref(), bulk::input(request)?).await
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
        let rendered = rendered.map_err(|error| ErrorReason::InvalidSpec.status(error.message))?;
        Ok(Response::new(pb::RenderScriptResponse {
            script: rendered.script,
            argv: rendered.argv,
        }))
    }

    async fn renew_certificate(
        &self,
        request: Request<pb::RenewCertificateRequest>,
    ) -> Result<Response<pb::RenewCertificateResponse>, Status> {
        let peer = request.extensions().get::<Peer>().cloned();
        let request = request.into_inner().request;
        let tls = self.0.site.config.tls.clone();
        let certificate = self.0.renewer.renew(peer, tls, request.to_vec()).await?;
        Ok(Response::new(pb::RenewCertificateResponse { certificate }))
    }

    type DiagnoseStream = Answers<pb::Finding>;

    async fn diagnose(
        &self,
        request: Request<pb::DiagnoseRequest>,
    ) -> Result<Response<Self::DiagnoseStream>, Status> {
        let site = Arc::clone(&self.0.site);
        let registry = Arc::clone(&self.0.registry);
        let node = self.0.node.borrow().clone();
        let leaders = doctor::Leaders {
            nodes: self.0.pin.nodes().await,
            kubelets: self.0.gate.kubelets(),
        };
        let probe = request.into_inner().probe;
        let findings = doctor::examine(site, registry, node, leaders, probe);
        Ok(Response::new(findings.map(Ok).boxed()))
    }
}

/// Logs a warning about a kubelet whose changes will be denied, before it sends the first one.
fn warn_of_leadership(peer: Option<&Peer>, node: &str, nodes: &BTreeMap<String, String>) {
    let Some(name) = lead::kubelet(peer) else {
        return;
    };
    if !node.is_empty() && !may_lead(name, node, nodes) {
        tracing::warn!(
            kubelet = name,
            node,
            "this kubelet may not lead its node: its changes will be denied until [policy.nodes] of the site file \
             assigns the node to it, or it has a certificate of kubelet/NODE"
        );
    }
}

fn submit_request(site: &Site, spec: &PodSpec, cluster_id: &str) -> SubmitRequest {
    SubmitRequest {
        uid: spec.uid().clone(),
        spec: Arc::new(spec.clone()),
        cluster_id: cluster_id.to_owned(),
        attempt: 1,
        jobdir: site.state.pod(spec.uid()).path().to_owned(),
        shim: site.shim.clone(),
    }
}

#[cfg(test)]
mod tests;
