//! The `Shim` service over the link. It finds the container and passes the request to the supervisor or to a task of its
//! own; it decides nothing.

use std::sync::Arc;

use knoc_contract::logs::{
    filter::Options,
    read::{self, CHUNKS, Series},
};
use knoc_link::bulk::{self, Messages, NoMessages};
use knoc_proto::{
    pb::{self, EndedBy, shim_server::Shim},
    reason::ErrorReason,
};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use super::{
    attach,
    container::Program,
    directory::{Directory, Entry},
    egress,
    exec::{self, Session},
    forward, measure, mesh,
    network::Network,
    pod::Pod,
    proc,
    ranks::command::{self, Opened},
    supervisor::Command,
};

/// How many exec processes the pod may have at once: each uses several descriptors.
const MAX_EXECS: usize = 256;

/// How many connections may be forwarded into the pod at once: browsers open six for each page.
const MAX_FORWARDS: usize = 256;

/// How many messages of output may wait for a slow reader of exec, attach, port-forward or a connection to the cluster.
const OUTPUTS: usize = 4;

/// How many announcements of connections, or questions about addresses, may be on their way. The others wait in order.
const ATTEMPTS: usize = 16;

/// The limits of streams into the pod.
#[derive(Debug, Clone)]
pub(crate) struct Slots {
    execs: Arc<Semaphore>,
    forwards: Arc<Semaphore>,
}

impl Default for Slots {
    fn default() -> Self {
        Self {
            execs: Arc::new(Semaphore::new(MAX_EXECS)),
            forwards: Arc::new(Semaphore::new(MAX_FORWARDS)),
        }
    }
}

/// What the service needs to answer requests.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) pod: Arc<Pod>,
    pub(crate) reports: watch::Receiver<pb::Report>,
    pub(crate) directory: watch::Receiver<Arc<Directory>>,
    pub(crate) commands: mpsc::Sender<Command>,
    /// The tasks of all streams.
    pub(crate) streams: TaskTracker,
    /// Becomes true once a reader has taken the final report.
    pub(crate) delivered: watch::Sender<bool>,
    pub(crate) slots: Slots,
}

impl Service {
    async fn command(&self, command: Command) -> Result<(), Status> {
        let sent = self.commands.send(command).await;
        sent.map_err(|_| ErrorReason::NotRunning.status("the pod has ended"))
    }

    fn entry(&self, name: &str) -> Result<(String, Entry), Status> {
        let first = self
            .pod
            .spec()
            .containers
            .first()
            .map_or("", |first| &first.name);
        let name = if name.is_empty() { first } else { name };
        let found = self.directory.borrow().get(name).cloned();
        let missing = || {
            let message = format!(
                "container {name} is not valid for pod {}",
                self.pod.spec().name
            );
            ErrorReason::ContainerNotFound.status(message)
        };
        found
            .map(|entry| (name.to_owned(), entry))
            .ok_or_else(missing)
    }

    fn program(&self, name: &str) -> Result<(String, Arc<Program>), Status> {
        let (name, entry) = self.entry(name)?;
        let program = entry.program.ok_or_else(|| {
            ErrorReason::NotRunning.status(format!("container {name} is not running"))
        })?;
        Ok((name, program))
    }

    /// Fails if the pod's programs are neither in the pod's own network nor in that of the shim.
    fn check_network(&self) -> Result<(), Status> {
        let directory = Arc::clone(&self.directory.borrow());
        let program = directory.running().next().ok_or_else(|| {
            let message = format!("no container of pod {} is running", self.pod.spec().name);
            ErrorReason::NotRunning.status(message)
        })?;
        let own = matches!(self.pod.network, Network::Private(_));
        if own || proc::same_network(program.identity.pid) {
            return Ok(());
        }
        let message = "the runtime gave the container a network that KNoC does not know: port-forward cannot reach it";
        Err(ErrorReason::Unsupported.status(message))
    }

    fn series(&self, name: &str, entry: &Entry, previous: bool) -> Result<Series, Status> {
        let attempt = if previous {
            entry.previous
        } else {
            entry.log.as_ref().map(|l| l.attempt)
        };
        let pod = &self.pod.spec().name;
        let attempt = attempt.ok_or_else(|| {
            if previous {
                let message =
                    format!("previous terminated container {name} in pod {pod} not found");
                ErrorReason::ContainerNotFound.status(message)
            } else {
                let message = format!("container {name} in pod {pod} is waiting to start");
                ErrorReason::NotRunning.status(message)
            }
        })?;
        Ok(Series {
            live: self.pod.jobdir.log_path(name, attempt),
            attempt,
        })
    }

    /// The attempt whose log a reader continues.
    fn series_at(&self, name: &str, from: &pb::LogPosition) -> Result<Series, Status> {
        let attempt = u32::try_from(from.attempt).map_err(|_| {
            let message = format!("from.attempt is {}, which is below 0", from.attempt);
            ErrorReason::InvalidRequest.status(message)
        })?;
        Ok(Series {
            live: self.pod.jobdir.log_path(name, attempt),
            attempt,
        })
    }
}

type Stream<T> = ReceiverStream<Result<T, Status>>;

/// A connection to the helper of a rank, which runs a command with the environment of the rank and in its cgroup.
async fn in_rank(name: &str, program: &Program, rank: u32) -> Result<Opened, Status> {
    let Some(ranks) = &program.ranks else {
        let message =
            format!("container {name} has no ranks (knoc.io/mpi), so it has no rank {rank}");
        return Err(ErrorReason::InvalidRequest.status(message));
    };
    ranks.open(rank).await
}

#[tonic::async_trait]
impl Shim for Service {
    type WatchReportStream = Stream<pb::Report>;
    type ReadLogsStream = NoMessages<pb::LogChunk>;
    type ExecStream = NoMessages<pb::ExecOutput>;

    async fn watch_report(
        &self,
        _request: Request<pb::WatchReportRequest>,
    ) -> Result<Response<Self::WatchReportStream>, Status> {
        let (output, stream) = mpsc::channel(1);
        self.streams
            .spawn(watch(self.reports.clone(), output, self.delivered.clone()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn stop(
        &self,
        request: Request<pb::StopRequest>,
    ) -> Result<Response<pb::StopResponse>, Status> {
        let request = request.into_inner();
        let asked = knoc_proto::pod::duration(request.grace_seconds);
        let stop = Command::Stop {
            // A negative number asks for the pod's own grace.
            grace: asked.unwrap_or_else(|| self.pod.spec().grace()),
            left: None,
            by: EndedBy::Stop,
            reason: request.reason,
        };
        self.command(stop).await?;
        Ok(Response::new(pb::StopResponse {}))
    }

    async fn update_values(
        &self,
        request: Request<pb::PodValues>,
    ) -> Result<Response<pb::ShimUpdateValuesResponse>, Status> {
        let (answer, written) = oneshot::channel();
        self.command(Command::Values(request.into_inner(), answer))
            .await?;
        match written.await {
            Ok(Ok(())) => Ok(Response::new(pb::ShimUpdateValuesResponse {})),
            Ok(Err(why)) => Err(ErrorReason::Internal.status(why)),
            Err(_) => Err(ErrorReason::NotRunning.status("the pod has ended")),
        }
    }

    async fn add_ephemeral_container(
        &self,
        request: Request<pb::AddEphemeralContainerRequest>,
    ) -> Result<Response<pb::AddEphemeralContainerResponse>, Status> {
        let pb::AddEphemeralContainerRequest { container, image } = request.into_inner();
        let container = container.unwrap_or_default();
        let checked = self.pod.spec().check_ephemeral(&container);
        checked.map_err(|invalid| ErrorReason::InvalidSpec.status(invalid.to_string()))?;
        let (answer, added) = oneshot::channel();
        let image = image.unwrap_or_default();
        self.command(Command::AddEphemeral {
            container: Box::new(container),
            image: Box::new(image),
            answer,
        })
        .await?;
        match added.await {
            Ok(Ok(())) => Ok(Response::new(pb::AddEphemeralContainerResponse {})),
            Ok(Err(why)) => Err(ErrorReason::InvalidRequest.status(why)),
            Err(_) => Err(ErrorReason::NotRunning.status("the pod has ended")),
        }
    }

    async fn update_image(
        &self,
        request: Request<pb::UpdateImageRequest>,
    ) -> Result<Response<pb::UpdateImageResponse>, Status> {
        let image = request.into_inner().image.unwrap_or_default();
        let (answer, updated) = oneshot::channel();
        self.command(Command::UpdateImage {
            image: Box::new(image),
            answer,
        })
        .await?;
        match updated.await {
            Ok(Ok(())) => Ok(Response::new(pb::UpdateImageResponse {})),
            Ok(Err(why)) => Err(ErrorReason::InvalidRequest.status(why)),
            Err(_) => Err(ErrorReason::NotRunning.status("the pod has ended")),
        }
    }

    async fn get_stats(
        &self,
        _request: Request<pb::ShimGetStatsRequest>,
    ) -> Result<Response<pb::PodStats>, Status> {
        // On a busy node there are many processes to read.
        let samples = tokio::task::spawn_blocking(measure::pod).await;
        let samples = samples.map_err(|error| ErrorReason::Internal.status(error.to_string()))?;
        let (answer, stats) = oneshot::channel();
        self.command(Command::Stats(samples, answer)).await?;
        let stats = stats.await;
        let stats = stats.map_err(|_| ErrorReason::NotRunning.status("the pod has ended"))?;
        Ok(Response::new(stats))
    }

    async fn read_logs(
        &self,
        request: Request<pb::ReadLogsRequest>,
    ) -> Result<Response<Self::ReadLogsStream>, Status> {
        let request = request.into_inner();
        let (name, entry) = self.entry(&request.container)?;
        let series = match &request.from {
            Some(from) => self.series_at(&name, from)?,
            None => self.series(&name, &entry, request.previous)?,
        };
        // An attempt that is not the newest has ended.
        let newest = entry.log.filter(|log| log.attempt == series.attempt);
        let follow = newest.filter(|_| request.follow).map(|log| log.follow);
        let (output, stream) = mpsc::channel(CHUNKS);
        self.streams
            .spawn(read::read(series, Options::from(&request), follow, output));
        Ok(answer(stream))
    }

    async fn exec(
        &self,
        request: Request<Streaming<pb::ExecInput>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let mut input: Messages<pb::ExecInput> = bulk::input(request)?;
        let Some(pb::ExecInput {
            input: Some(pb::exec_input::Input::Start(start)),
        }) = input.message().await?
        else {
            let message = "the first message of an exec stream is `start`";
            return Err(ErrorReason::InvalidRequest.status(message));
        };
        let (name, program) = self.program(&start.container)?;
        let slot = Arc::clone(&self.slots.execs)
            .try_acquire_owned()
            .map_err(|_| {
                let message = format!(
                    "{MAX_EXECS} exec processes run in this pod already: wait until one has ended"
                );
                ErrorReason::Overloaded.status(message)
            })?;
        let (output, stream) = mpsc::channel(OUTPUTS);
        if start.rank > 0 || program.ranks.is_some() {
            let opened = in_rank(&name, &program, start.rank).await?;
            self.streams.spawn(async move {
                command::carry(opened, start, input, output).await;
                drop(slot);
            });
            return Ok(answer(stream));
        }
        let session = Session {
            pod: Arc::clone(&self.pod),
            program,
            start,
            output,
        };
        self.streams.spawn(async move {
            exec::run(session, input).await;
            drop(slot);
        });
        Ok(answer(stream))
    }

    type AttachStream = NoMessages<pb::ExecOutput>;

    async fn attach(
        &self,
        request: Request<Streaming<pb::ExecInput>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut input: Messages<pb::ExecInput> = bulk::input(request)?;
        let Some(pb::ExecInput {
            input: Some(pb::exec_input::Input::Attach(start)),
        }) = input.message().await?
        else {
            let message = "the first message of an attach stream is `attach`";
            return Err(ErrorReason::InvalidRequest.status(message));
        };
        let (name, program) = self.program(&start.container)?;
        let (output, stream) = mpsc::channel(OUTPUTS);
        let hub = Arc::clone(&program.hub);
        let session = attach::Session::new(&name, hub, &start, output)?;
        self.streams.spawn(attach::run(session, input));
        Ok(answer(stream))
    }

    type PortForwardStream = NoMessages<pb::PortForwardOutput>;

    async fn port_forward(
        &self,
        request: Request<Streaming<pb::PortForwardInput>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        let mut input: Messages<pb::PortForwardInput> = bulk::input(request)?;
        let Some(pb::PortForwardInput {
            input: Some(pb::port_forward_input::Input::Start(start)),
        }) = input.message().await?
        else {
            let message = "the first message of a port-forward stream is `start`";
            return Err(ErrorReason::InvalidRequest.status(message));
        };
        let port = u16::try_from(start.port).ok().filter(|port| *port > 0);
        let port = port.ok_or_else(|| {
            let message = format!("port {} is not between 1 and 65535", start.port);
            ErrorReason::InvalidRequest.status(message)
        })?;
        self.check_network()?;
        let slot = Arc::clone(&self.slots.forwards);
        let slot = slot.try_acquire_owned().map_err(|_| {
            let message = format!("{MAX_FORWARDS} connections are forwarded into this pod already: wait until one has ended");
            ErrorReason::Overloaded.status(message)
        })?;
        let connection = forward::connect(&self.pod.network, port, std::process::id()).await?;
        let (output, stream) = mpsc::channel(OUTPUTS);
        self.streams.spawn(async move {
            forward::run(connection, input, output).await;
            drop(slot);
        });
        Ok(answer(stream))
    }

    type WatchEgressStream = Stream<pb::EgressAttempt>;

    async fn watch_egress(
        &self,
        request: Request<Streaming<pb::EgressControl>>,
    ) -> Result<Response<Self::WatchEgressStream>, Status> {
        let mut calls = request.into_inner();
        let egress = Arc::clone(&self.pod.egress);
        let watch = egress.begin(&mut calls).await?;
        let (attempts, stream) = mpsc::channel(ATTEMPTS);
        self.streams
            .spawn(async move { egress.follow(watch, calls, attempts).await });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type JoinMeshStream = Stream<pb::MeshQuestion>;

    async fn join_mesh(
        &self,
        request: Request<Streaming<pb::MeshControl>>,
    ) -> Result<Response<Self::JoinMeshStream>, Status> {
        if !self.pod.wants_address() {
            let message = "the pod is not in a network of its own, or was accepted without the range of its address";
            return Err(ErrorReason::InvalidRequest.status(message));
        }
        let mut calls = request.into_inner();
        let members = Arc::clone(&self.pod.mesh);
        let call = members.begin(&mut calls).await?;
        let (questions, stream) = mpsc::channel(ATTEMPTS);
        self.streams
            .spawn(async move { members.follow(call, calls, questions).await });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type MeshStreamStream = Stream<pb::MeshBytes>;

    async fn mesh_stream(
        &self,
        request: Request<Streaming<pb::MeshBytes>>,
    ) -> Result<Response<Self::MeshStreamStream>, Status> {
        let mut calls = request.into_inner();
        let tunnel = self.pod.mesh.take_carried(&mut calls).await?;
        let (output, stream) = mpsc::channel(OUTPUTS);
        self.streams
            .spawn(mesh::carried::copy(tunnel, calls, output));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type EgressStreamStream = NoMessages<pb::EgressOutput>;

    async fn egress_stream(
        &self,
        request: Request<Streaming<pb::EgressInput>>,
    ) -> Result<Response<Self::EgressStreamStream>, Status> {
        let mut input: Messages<pb::EgressInput> = bulk::input(request)?;
        let Some(pb::EgressInput {
            input: Some(pb::egress_input::Input::Start(start)),
        }) = input.message().await?
        else {
            let message = "the first message of an egress stream is `start`";
            return Err(ErrorReason::InvalidRequest.status(message));
        };
        let (output, stream) = mpsc::channel(OUTPUTS);
        // The connection's own task carries it.
        let taken = egress::Taken { input, output };
        self.pod.egress.take(start.id, taken)?;
        Ok(answer(stream))
    }
}

/// The response that streams what a task sends.
fn answer<T: prost::Message + 'static>(
    stream: mpsc::Receiver<Result<T, Status>>,
) -> Response<NoMessages<T>> {
    bulk::answer(bulk::encode(ReceiverStream::new(stream)))
}

/// Sends the current report, then each newer one, until the final one.
async fn watch(
    mut reports: watch::Receiver<pb::Report>,
    output: mpsc::Sender<Result<pb::Report, Status>>,
    delivered: watch::Sender<bool>,
) {
    reports.mark_changed();
    loop {
        tokio::select! {
            biased;
            () = output.closed() => return,
            changed = reports.changed() => if changed.is_err() {
                return;
            },
        }
        let report = reports.borrow_and_update().clone();
        let last = report.r#final;
        if output.send(Ok(report)).await.is_err() {
            return;
        }
        if last {
            // The channel has one slot. If it is free again, the stream has taken the final report.
            if output.reserve().await.is_ok() {
                delivered.send_replace(true);
            }
            return;
        }
    }
}
