//! The shim inside a job: claims the job directory, runs the containers of one pod, and reports how they ended.
//!
//! It is one process with one thread (and a few more for file work). Its tasks, all owned by [`run`]:
//!
//! - [`supervisor`]: owns the containers' states, one [`container`] task for each attempt, and one [`probes`] task for each
//!   running program that has probes or a postStart hook, or runs its preStop hook. It takes commands over a bounded channel, and publishes the report and the [`directory`] over watch channels.
//! - [`report::keep`]: keeps a durable copy of the newest report.
//! - [`link`]: dials the agent and serves [`serve`] over the connection, with one task for each stream.
//! - [`egress`]: listens for the containers' connections to the cluster, with one task for each.
//! - [`mesh`]: exchanges packets with other pods, with one task for each of them and one for each tunnel.
//! - [`values_poll`]: looks for newer values in the job directory while the link is down.
//! - [`job_signals`]: turns signals to the job into a stop of its containers.
//! - the reaper ([`children`]), and [`scratch::keep_clean`], which removes what ended attempts wrote.
//!
//! The shim does its work whether the agent is alive or not. Its exit code is part of the protocol
//! with the agent: see [`ShimExit`].

mod attach;
mod budget;
mod cgroup;
mod children;
mod container;
mod directory;
mod egress;
mod env_files;
mod environment;
mod exec;
mod fdio;
mod forward;
#[cfg(any(test, feature = "fuzzed"))]
pub mod fuzzed;
mod gpus;
mod handshake;
mod health;
mod host_ports;
mod inputs;
mod inside;
mod job_signals;
pub mod launch;
mod link;
mod listeners;
mod measure;
mod mesh;
mod mount_points;
mod mounts;
mod network;
mod nofollow;
mod oom;
mod output;
mod passwd;
mod plan;
mod pod;
mod probes;
mod proc;
mod processes;
pub mod rank;
mod ranks;
mod report;
mod resolver;
mod role;
mod runtime;
mod scratch;
mod serve;
mod sif;
mod signals;
mod sizes;
mod supervisor;
mod turn;
mod usage;
mod values_poll;
mod volumes;

use std::{path::Path, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context as _;
use jiff::Timestamp;
use knoc_contract::{
    capability,
    exit_codes::ShimExit,
    host::node_name,
    jobdir::{
        self, JobDir,
        claim::{Claim, ClaimError},
        schema::Endpoint,
    },
    requeue::may_run_again,
};
use knoc_proto::{
    crash,
    error::chain,
    log::{self as lines, Form},
    pb::{self, OutcomeKind},
    text::escape,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{
    Layer as _, filter::Targets, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use self::{
    children::Children,
    directory::Directory,
    host_ports::HostPorts,
    link::{Link, Serving, State, carried},
    pod::Pod,
    report::Publisher,
    scratch::{Cleaner, LAST_REMOVAL},
    serve::{Service, Slots},
    supervisor::{Command, Supervisor},
};

const COMMANDS: usize = 16;

/// Two threads for logs and reports, and three for work that may take long or hang: removing what a container wrote,
/// measuring it, and access to the volumes that it mounts.
const BLOCKING_THREADS: usize = 5;

/// How long the shim waits until a connected agent has read the final report.
const FAREWELL: Duration = Duration::from_secs(2);

/// How often the shim looks for processes that its containers left behind, and the pause in between.
const LAST_LOOKS: u32 = 100;
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);

/// How long streams that are still being read (the end of a long log) may hold up the end of the job.
const FLUSH: Duration = Duration::from_secs(15);

/// Entry point of `knoc-agent shim JOBDIR`.
///
/// Its exit codes are [`ShimExit`].
#[must_use]
pub fn main(jobdir: &Path) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            say(&error.to_string());
            return ShimExit::CannotStart.into();
        }
    };
    let code = runtime.block_on(start(jobdir)).unwrap_or_else(|error| {
        say(&format!("{error:#}"));
        ShimExit::CannotStart.into()
    });
    // A file system that hangs must not keep the job running.
    runtime.shutdown_background();
    code
}

/// Writes a line to standard error, before there is a log.
fn say(message: &str) {
    eprintln!("knoc-agent shim: {}", escape(message));
}

/// Claims the directory, then runs the pod.
async fn start(path: &Path) -> anyhow::Result<ExitCode> {
    let jobdir = JobDir::open(path)?;
    let claim = Claim {
        host: node_name(),
        ..identity()?
    };
    // Whether the pod may run again matters only if Slurm has requeued the job.
    let spec = (claim.restart > 0).then(|| jobdir.spec()).transpose()?;
    let spec = spec.and_then(|job| job.spec);
    let again = spec.is_some_and(|spec| may_run_again(&spec));
    crash::point("shim.claim.before");
    match jobdir.claim(&claim, again) {
        Ok(_) => {}
        Err(error @ ClaimError::Surplus { .. }) => {
            say(&format!(
                "this job is surplus, because another one runs the pod: {}",
                chain(&error)
            ));
            return Ok(ShimExit::Surplus.into());
        }
        Err(error) => return Err(error.into()),
    }
    crash::point("shim.claim.after");
    let state_dir = path
        .parent()
        .and_then(Path::parent)
        .context("the job directory has no folder two levels above it")?;
    let endpoint_path = jobdir::StateDir::new(state_dir).endpoint();
    let endpoint = jobdir::read_json::<Endpoint>(&endpoint_path).ok().flatten();
    let previous = jobdir.report().ok().flatten();
    let values = jobdir.values()?;
    let mut pod = Pod::open(jobdir, claim, endpoint.as_ref())?;
    log(level(&pod));
    if let Some(values) = &values {
        pod.jobdir.remove_values_up_to(values.revision)?;
    }
    // Orphans of a program without a PID namespace become children of the shim.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).ok();
    let mut background = JoinSet::new();
    background.spawn(pod.children.clone().reap(Children::signal()?));
    // From here on, a signal stops the pod instead of killing the shim.
    let signals = job_signals::Signals::listen()?;
    let isolated = endpoint.is_some_and(|endpoint| endpoint.isolated);
    let up = pod.bring_up_network(isolated).await?;
    let api = egress::host::ApiPort::bind(&pod).await;
    let api = api.context("listen for the containers' connections to the API server")?;
    pod.facts.api = api.as_ref().map(|port| port.server);
    let host_ports = HostPorts::bind(&pod).await?;
    background.spawn(host_ports.serve(pod.network.clone()));
    let begun = Begun {
        previous,
        values,
        endpoint: endpoint_path,
        up,
        api,
        signals,
        background,
    };
    run(Arc::new(pod), begun).await
}

/// What the shim starts to run the pod with.
struct Begun {
    /// The report of the attempt before, if Slurm has requeued the job.
    previous: Option<pb::Report>,
    values: Option<pb::PodValues>,
    endpoint: std::path::PathBuf,
    up: network::Up,
    api: Option<egress::host::ApiPort>,
    signals: job_signals::Signals,
    background: JoinSet<()>,
}

/// Which job this is, according to the variables that the scheduler sets.
fn identity() -> anyhow::Result<Claim> {
    let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let job_id = var("SLURM_JOB_ID")
        .or_else(|| var("KNOC_JOB_ID"))
        .context("neither SLURM_JOB_ID nor KNOC_JOB_ID is set: not inside a job")?;
    let restart = var("SLURM_RESTART_COUNT").or_else(|| var("KNOC_RESTART_COUNT"));
    let restart = restart
        .map(|count| count.parse())
        .transpose()
        .context("the restart count in SLURM_RESTART_COUNT or KNOC_RESTART_COUNT")?;
    Ok(Claim {
        job_id,
        restart: restart.unwrap_or(0),
        host: String::new(),
    })
}

/// Which lines the shim logs.
fn level(pod: &Pod) -> LevelFilter {
    if pod.settings().log_debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::WARN
    }
}

/// Starts logging to standard error, which is the job's `batch.out`.
fn log(level: LevelFilter) {
    // Debug logs of KNoC's own crates only: those of the libraries would fill a file system.
    let targets = Targets::new()
        .with_default(LevelFilter::WARN)
        .with_targets([(env!("CARGO_CRATE_NAME"), level), ("knoc_contract", level)]);
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_writer(|| lines::stderr(Form::Text));
    // In tests a subscriber may be installed already.
    tracing_subscriber::registry()
        .with(lines.with_filter(targets))
        .try_init()
        .ok();
}

async fn run(pod: Arc<Pod>, begun: Begun) -> anyhow::Result<ExitCode> {
    let Begun {
        previous,
        values,
        endpoint,
        up: brought_up,
        api,
        signals,
        mut background,
    } = begun;
    let (commands, orders) = mpsc::channel(COMMANDS);
    background.spawn(signals.obey(pod.spec().grace(), pod.jobdir.clone(), commands.clone()));
    let listener = carried::Listener::bind(&pod);
    let route = route_to(listener.as_ref());
    let publisher = begin_report(&pod, previous.as_ref(), &route, &brought_up);
    background.spawn(tell_if_lost(brought_up, commands.clone()));
    lead_out(&pod, api, commands.clone(), &mut background).await;
    let mut reports = publisher.subscribe();
    background.spawn(scratch::keep_clean(Cleaner::of(&pod.scratch)));
    let mut keeper = JoinSet::new();
    keeper.spawn(report::keep(pod.jobdir.clone(), publisher.subscribe()));
    let directory = watch::Sender::new(Arc::new(Directory::default()));
    let service = Service {
        pod: Arc::clone(&pod),
        reports: publisher.subscribe(),
        directory: directory.subscribe(),
        commands: commands.clone(),
        streams: TaskTracker::new(),
        delivered: watch::Sender::new(false),
        slots: Slots::default(),
    };
    let up = Up {
        endpoint,
        listener,
        route,
    };
    let (farewell, mut linked) = link_up(service, up);
    let link_state = farewell.link.subscribe();
    background.spawn(sizes::watch(sizes::bounds(&pod), commands.clone()));
    background.spawn(values_poll::watch(pod.jobdir.clone(), link_state, commands));
    Supervisor::new(
        Arc::clone(&pod),
        previous.as_ref(),
        orders,
        publisher,
        directory,
    )?
    .run(values)
    .await;
    if !pod.runtime.isolates() {
        end_leftovers().await;
    }
    let written = keeper.join_next().await;
    farewell.wait().await;
    tokio::time::timeout(FLUSH, linked.join_next()).await.ok();
    // Streams that end only with the process may still hold the pod, so its folders are removed here and not by its drop.
    remove_folders(pod).await;
    let reported = matches!(written, Some(Ok(true)));
    Ok(exit_code(reported, reports.borrow_and_update().outcome()))
}

/// Starts to take what containers send to other pods, and their connections to the cluster: in the edge of the pod's network, or
/// for the API server.
async fn lead_out(
    pod: &Pod,
    api: Option<egress::host::ApiPort>,
    commands: mpsc::Sender<Command>,
    background: &mut JoinSet<()>,
) {
    if let Some(router) = mesh::router::Router::of(pod, commands.clone()) {
        background.spawn(router.run());
    }
    let gate = egress::gate::Gate::new(&pod.egress, commands);
    if let Some(ports) = egress::ports::Ports::open(pod, gate.clone()).await {
        background.spawn(ports.keep());
    }
    if let Some(api) = api {
        background.spawn(api.serve(gate));
    }
}

/// Removes the pod's folders, for a limited time: a file system that hangs must not keep the job running.
async fn remove_folders(pod: Arc<Pod>) {
    let removal = tokio::task::spawn_blocking(move || pod.scratch.remove());
    tokio::time::timeout(LAST_REMOVAL * 2, removal).await.ok();
}

/// The first report, with notes about what the node lacks.
fn begin_report(
    pod: &Pod,
    previous: Option<&pb::Report>,
    route: &pb::ShimRoute,
    up: &network::Up,
) -> Publisher {
    let mut first = first_report(pod, previous);
    first.route = Some(route.clone());
    first.network = Some(up.reported());
    let mut publisher = Publisher::new(first);
    if let Some(why) = pod.scratch.on_disk() {
        tracing::warn!("{why}");
        publisher.note("MemoryOnDisk", why, "");
    }
    tell(&mut publisher, up);
    for message in left_out(pod) {
        publisher.note("DNSConfigForming", message, "");
    }
    publisher
}

/// What the containers' `/etc/resolv.conf` lacks of what the pod asks for.
fn left_out(pod: &Pod) -> Vec<String> {
    let cluster = pod.cluster_dns();
    match pod.resolver(cluster.as_ref()) {
        Some(wanted) if pod.runtime.isolates() => {
            let node = pod.nodes_resolver().unwrap_or_default();
            resolver::left_out(&node, wanted, cluster.as_ref())
        }
        Some(_) | None => Vec::new(),
    }
}

/// Says in Events what does not work in the pod's network.
fn tell(publisher: &mut Publisher, up: &network::Up) {
    for lack in &up.lacks {
        let message = format!(
            "the pod has a network of its own, and {lack}; set the annotation `knoc.io/network: host` if it needs that"
        );
        publisher.note("NetworkUnavailable", message, "");
    }
    if let Some(why) = &up.no_cluster {
        let message = format!("{}: {why}", network::NO_CLUSTER);
        publisher.note("EgressUnavailable", message, "");
    }
}

/// Task: says in an Event if the pod's way to other networks ends before the pod does.
async fn tell_if_lost(up: network::Up, commands: mpsc::Sender<Command>) {
    let why = up.lost().await;
    let note = Command::Note {
        reason: "NetworkUnavailable",
        message: format!("the pod's connections to other networks fail from now on: {why}"),
    };
    // The supervisor has ended if nobody receives it.
    commands.send(note).await.ok();
}

/// How the agent reaches the shim if the shim cannot reach the agent.
fn route_to(listener: Option<&carried::Listener>) -> pb::ShimRoute {
    pb::ShimRoute {
        socket: listener.map_or_else(String::new, |listener| {
            listener.path.to_string_lossy().into_owned()
        }),
        ..pb::ShimRoute::default()
    }
}

/// What the link starts from.
struct Up {
    endpoint: std::path::PathBuf,
    listener: Option<carried::Listener>,
    route: pb::ShimRoute,
}

/// Starts to serve over the link, until the farewell hangs up.
fn link_up(service: Service, up: Up) -> (Farewell, JoinSet<()>) {
    let farewell = Farewell {
        delivered: service.delivered.subscribe(),
        link: watch::Sender::new(State::Dialling),
        hang_up: CancellationToken::new(),
    };
    let link = Link {
        endpoint: up.endpoint,
        pair: service.pod.jobdir.link_pair(),
        commands: service.commands.clone(),
        serving: Serving::new(service, farewell.link.clone()),
        listener: up.listener,
        route: up.route,
    };
    let mut linked = JoinSet::new();
    linked.spawn(link.run(farewell.hang_up.clone()));
    (farewell, linked)
}

/// PURE: the exit code, by which the agent learns how far the shim came.
fn exit_code(reported: bool, outcome: OutcomeKind) -> ExitCode {
    match outcome {
        _ if !reported => ShimExit::NotReported.into(),
        OutcomeKind::Succeeded => ShimExit::Succeeded.into(),
        OutcomeKind::Failed | OutcomeKind::Unspecified => ShimExit::Failed.into(),
    }
}

fn first_report(pod: &Pod, previous: Option<&pb::Report>) -> pb::Report {
    pb::Report {
        uid: pod.spec().uid.clone(),
        job_id: pod.claim.job_id.clone(),
        restart: i32::try_from(pod.claim.restart).unwrap_or(i32::MAX),
        sequence: previous.map_or(0, |report| report.sequence) + 1,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        capabilities: capability::ALL.map(str::to_owned).to_vec(),
        hostname: node_name(),
        host_ip: pod.facts.fields.host_ip.clone(),
        started_at: report::nanos(Timestamp::now()),
        notes: previous
            .map(|report| report.notes.clone())
            .unwrap_or_default(),
        pid_isolation: pod.runtime.isolates(),
        ..Default::default()
    }
}

/// Kills processes that daemonised themselves, which without PID namespaces would outlive their container. Repeated, as
/// processes may fork in the meantime.
async fn end_leftovers() {
    for _ in 0..LAST_LOOKS {
        let left = proc::descendants(&proc::all(), std::process::id());
        if left.is_empty() {
            return;
        }
        for pid in left {
            signals::send(pid, rustix::process::Signal::KILL);
        }
        tokio::time::sleep(BETWEEN_LOOKS).await;
    }
}

/// Ends the link in an orderly way.
struct Farewell {
    delivered: watch::Receiver<bool>,
    link: watch::Sender<State>,
    hang_up: CancellationToken,
}

impl Farewell {
    /// Waits until a connected agent has read the final report, and hangs up.
    async fn wait(mut self) {
        let mut link = self.link.subscribe();
        let read = async {
            tokio::select! {
                biased;
                _ = self.delivered.wait_for(|delivered| *delivered) => {}
                _ = link.wait_for(|state| *state == State::Down) => {}
            }
        };
        // If it takes longer, the agent reads the report file.
        tokio::time::timeout(FAREWELL, read).await.ok();
        self.hang_up.cancel();
    }
}
