//! A fake agent on a unix socket. It stores the pods that it is sent, and records the calls.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};

use futures::{Stream, StreamExt as _};
use knoc_link::{Carrier, ExpectPeer};
use knoc_proto::{
    capability,
    pb::{
        self, PodPhase,
        agent_server::{Agent as Service, AgentServer},
        container_status::State,
        pod_event::Event,
    },
    reason::ErrorReason,
};
use tokio::{
    sync::{broadcast, watch},
    task::JoinSet,
};
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status, Streaming};

use crate::agent::Agent;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[derive(Default)]
struct Known {
    pods: BTreeMap<String, pb::PodObserved>,
    calls: Vec<String>,
    spec: Option<pb::PodSpec>,
    values: Option<pb::PodValues>,
    credentials: Option<pb::PullCredentials>,
    refuse: Option<ErrorReason>,
    /// The capability that it does not have.
    lacks: &'static str,
}

impl Known {
    fn called(&mut self, call: String) -> Result<(), Status> {
        self.calls.push(call);
        self.refuse
            .map_or(Ok(()), |reason| Err(reason.status("refused")))
    }
}

#[derive(Clone)]
struct Fake {
    state: Arc<Mutex<Known>>,
    changes: broadcast::Sender<Event>,
    node: watch::Sender<Option<pb::NodeInfo>>,
}

pub(super) struct FakeAgent {
    fake: Fake,
    folder: tempfile::TempDir,
    _tasks: JoinSet<()>,
}

impl FakeAgent {
    pub(super) fn start() -> Self {
        Self::start_without("")
    }

    /// Starts an agent that does not have this capability.
    pub(super) fn start_without(capability: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let incoming = knoc_link::listen::unix(&folder.path().join("private/agent.sock")).unwrap();
        let (changes, _) = broadcast::channel(64);
        let fake = Fake {
            state: Arc::new(Mutex::new(Known {
                lacks: capability,
                ..Known::default()
            })),
            changes,
            node: watch::Sender::default(),
        };
        let service = AgentServer::new(fake.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            knoc_link::server()
                .add_service(service)
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        });
        Self {
            fake,
            folder,
            _tasks: tasks,
        }
    }

    pub(super) fn handle(&self) -> Agent {
        let carrier = Carrier::Unix(self.folder.path().join("private/agent.sock"));
        let dial = || knoc_link::dial(carrier.clone(), None, ExpectPeer::AnyAgent).unwrap();
        Agent::new(dial(), dial(), "cluster")
    }

    pub(super) fn calls(&self) -> Vec<String> {
        self.fake.state.lock().unwrap().calls.clone()
    }

    /// The spec of the last EnsurePod.
    pub(super) fn spec(&self) -> pb::PodSpec {
        self.fake.state.lock().unwrap().spec.clone().unwrap()
    }

    /// Sends this to the watch of the node.
    pub(super) fn report(&self, node: pb::NodeInfo) {
        self.fake.node.send_replace(Some(node));
    }

    pub(super) fn values(&self) -> pb::PodValues {
        self.fake.state.lock().unwrap().values.clone().unwrap()
    }

    /// The credentials of the last request that carries values.
    pub(super) fn credentials(&self) -> Option<pb::PullCredentials> {
        self.fake.state.lock().unwrap().credentials.clone()
    }

    pub(super) fn refuse(&self, reason: ErrorReason) {
        self.fake.state.lock().unwrap().refuse = Some(reason);
    }

    /// Every call is answered again.
    pub(super) fn refuse_nothing(&self) {
        self.fake.state.lock().unwrap().refuse = None;
    }

    pub(super) fn put(&self, pod: pb::PodObserved) {
        let uid = pod.uid.clone();
        self.fake
            .state
            .lock()
            .unwrap()
            .pods
            .insert(uid.clone(), pod);
        self.change(&uid, |_| ());
    }

    pub(super) fn change(&self, uid: &str, change: impl FnOnce(&mut pb::PodObserved)) {
        self.fake.change(uid, change);
    }

    pub(super) fn remove(&self, uid: &str) {
        self.fake.state.lock().unwrap().pods.remove(uid);
        drop(self.fake.changes.send(Event::RemovedUid(uid.to_owned())));
    }
}

impl Fake {
    fn state(&self) -> MutexGuard<'_, Known> {
        self.state.lock().unwrap()
    }

    fn change(&self, uid: &str, change: impl FnOnce(&mut pb::PodObserved)) -> pb::PodObserved {
        let mut state = self.state.lock().unwrap();
        let pod = state.pods.get_mut(uid).unwrap();
        change(pod);
        pod.generation += 1;
        let pod = pod.clone();
        drop(self.changes.send(Event::Item(pod.clone())));
        pod
    }
}

fn event(event: Event) -> pb::PodEvent {
    pb::PodEvent { event: Some(event) }
}

#[tonic::async_trait]
impl Service for Fake {
    async fn get_info(
        &self,
        _: Request<pb::GetInfoRequest>,
    ) -> Result<Response<pb::AgentInfo>, Status> {
        let all = [
            capability::PULL_CREDENTIALS,
            capability::EPHEMERAL,
            capability::LATE_EPHEMERAL,
        ];
        let lacks = self.state().lacks;
        let has = all.into_iter().filter(|capability| *capability != lacks);
        Ok(Response::new(pb::AgentInfo {
            capabilities: has.map(str::to_owned).collect(),
            ..pb::AgentInfo::default()
        }))
    }

    type WatchNodeStream = Answers<pb::NodeInfo>;

    async fn watch_node(
        &self,
        _: Request<pb::WatchNodeRequest>,
    ) -> Result<Response<Self::WatchNodeStream>, Status> {
        let reports = WatchStream::new(self.node.subscribe());
        let reports = reports.filter_map(async |report| report.map(Ok));
        Ok(Response::new(Box::pin(reports)))
    }

    async fn ensure_pod(
        &self,
        request: Request<pb::EnsurePodRequest>,
    ) -> Result<Response<pb::EnsurePodResponse>, Status> {
        let request = request.into_inner();
        let spec = request.spec.unwrap();
        self.state().called(format!("EnsurePod {}", spec.name))?;
        {
            let mut state = self.state.lock().unwrap();
            state.spec = Some(spec.clone());
            state.values = request.values;
            state.credentials = request.pull_credentials;
            state
                .pods
                .entry(spec.uid.clone())
                .or_insert_with(|| pb::PodObserved {
                    uid: spec.uid.clone(),
                    phase: PodPhase::Accepted.into(),
                    ..pb::PodObserved::default()
                });
        }
        let pod = self.change(&spec.uid, |pod| {
            pod.spec_generation = spec.generation;
            let waits = |container: &pb::Container| pb::ContainerStatus {
                name: container.name.clone(),
                state: Some(State::Waiting(pb::Waiting::default())),
                ..pb::ContainerStatus::default()
            };
            pod.ephemeral_containers = spec.ephemeral_containers.iter().map(waits).collect();
        });
        Ok(Response::new(pb::EnsurePodResponse {
            pod: Some(pod),
            created: true,
        }))
    }

    async fn delete_pod(
        &self,
        request: Request<pb::DeletePodRequest>,
    ) -> Result<Response<pb::DeletePodResponse>, Status> {
        let request = request.into_inner();
        self.state()
            .called(format!("DeletePod grace {}", request.grace_seconds))?;
        let pod = self.change(&request.uid, |pod| pod.deleting = true);
        Ok(Response::new(pb::DeletePodResponse { pod: Some(pod) }))
    }

    async fn forget_pod(
        &self,
        request: Request<pb::ForgetPodRequest>,
    ) -> Result<Response<pb::ForgetPodResponse>, Status> {
        let uid = request.into_inner().uid;
        self.state().called(format!("ForgetPod {uid}"))?;
        self.state.lock().unwrap().pods.remove(&uid);
        Ok(Response::new(pb::ForgetPodResponse {}))
    }

    async fn get_pod(
        &self,
        _: Request<pb::GetPodRequest>,
    ) -> Result<Response<pb::PodObserved>, Status> {
        Err(Status::unimplemented(""))
    }

    type WatchPodsStream = Answers<pb::PodEvent>;

    async fn watch_pods(
        &self,
        _: Request<pb::WatchPodsRequest>,
    ) -> Result<Response<Self::WatchPodsStream>, Status> {
        let changes = self.changes.subscribe();
        let known: Vec<_> = self.state.lock().unwrap().pods.values().cloned().collect();
        let snapshot = known.into_iter().map(Event::Item);
        let snapshot = snapshot
            .chain([Event::Synced(pb::Synced::default())])
            .map(event)
            .map(Ok);
        let later = futures::stream::unfold(changes, |mut changes| async {
            Some((Ok(event(changes.recv().await.ok()?)), changes))
        });
        let all = futures::stream::iter(snapshot.collect::<Vec<_>>()).chain(later);
        Ok(Response::new(Box::pin(all)))
    }

    async fn update_values(
        &self,
        request: Request<pb::UpdateValuesRequest>,
    ) -> Result<Response<pb::UpdateValuesResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.state();
        state.called("UpdateValues".to_owned())?;
        state.values = request.values;
        state.credentials = request.pull_credentials;
        Ok(Response::new(pb::UpdateValuesResponse {}))
    }

    type ReadLogsStream = Answers<pb::LogChunk>;

    async fn read_logs(
        &self,
        _: Request<pb::ReadLogsRequest>,
    ) -> Result<Response<Self::ReadLogsStream>, Status> {
        Err(Status::unimplemented(""))
    }

    type ExecStream = Answers<pb::ExecOutput>;

    async fn exec(
        &self,
        _: Request<Streaming<pb::ExecInput>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        Err(Status::unimplemented(""))
    }

    type GetStatsStream = Answers<pb::PodStats>;

    async fn get_stats(
        &self,
        _: Request<pb::GetStatsRequest>,
    ) -> Result<Response<Self::GetStatsStream>, Status> {
        Err(Status::unimplemented(""))
    }

    type AttachStream = Answers<pb::ExecOutput>;

    async fn attach(
        &self,
        _: Request<Streaming<pb::ExecInput>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        Err(Status::unimplemented(""))
    }

    type PortForwardStream = Answers<pb::PortForwardOutput>;

    async fn port_forward(
        &self,
        _: Request<Streaming<pb::PortForwardInput>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        Err(Status::unimplemented(""))
    }

    type WatchEgressStream = Answers<pb::EgressAttempt>;

    async fn watch_egress(
        &self,
        _: Request<Streaming<pb::EgressControl>>,
    ) -> Result<Response<Self::WatchEgressStream>, Status> {
        Err(Status::unimplemented(""))
    }

    type EgressStreamStream = Answers<pb::EgressOutput>;

    async fn egress_stream(
        &self,
        _: Request<Streaming<pb::EgressInput>>,
    ) -> Result<Response<Self::EgressStreamStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn render_script(
        &self,
        _: Request<pb::RenderScriptRequest>,
    ) -> Result<Response<pb::RenderScriptResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn renew_certificate(
        &self,
        _: Request<pb::RenewCertificateRequest>,
    ) -> Result<Response<pb::RenewCertificateResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    type DiagnoseStream = Answers<pb::Finding>;

    async fn diagnose(
        &self,
        _: Request<pb::DiagnoseRequest>,
    ) -> Result<Response<Self::DiagnoseStream>, Status> {
        Err(Status::unimplemented(""))
    }
}
