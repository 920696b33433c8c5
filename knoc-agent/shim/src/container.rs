//! Task: one attempt of one container, from the creation of its folders to its end. The supervisor decides what to do;
//! this task does it.
//!
//! It sends [`News::Running`] once the program runs and [`News::Lost`] if log lines are lost, and returns [`Ended`].
//! Cancelling `abort` ends the runtime if the program does not run yet, or if the runtime outlives a killed program.
//! The task never decides about restarts. If the pod has ranks, [`parallel`] lets srun start them, and [`rank`] is the same
//! task in the helper of each.

mod complete;
mod folders;
mod ids;
mod parallel;
pub(crate) mod rank;
mod stdio;
mod up;

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use knoc_contract::{
    launch::LaunchSpec,
    logs::{read::last_text, writer::Losses},
};
use knoc_proto::{error::chain, pb, pod::PodValues};
use rustix::process::Signal;
use tokio::{
    net::UnixStream,
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;

use self::{
    complete::{complete, complete_inside},
    folders::{Folders, PrepareError},
    up::{Runtime, bring_up},
};
use super::{
    attach::hub::{self, Hub},
    children::Exit,
    env_files::{self, EnvFileError, Places},
    environment::{self},
    fdio::Stream,
    handshake::{self, HandshakeError, Launched},
    health::Change,
    measure,
    output::{self, Log, Source},
    passwd::UnknownName,
    pod::Pod,
    processes::ProcessesError,
    ranks::{command::Ranks, table::Loss},
    role::{ContainerSpec, SlotId},
    signals::{self, Identity},
    turn::{self, Turn},
    usage::{Counters, Used},
};
use crate::launch::{beside::Beside, kept::Kept};

/// Kubernetes' limits of a termination message, and of the end of the log that may replace it.
const MESSAGE_BYTES: usize = 4096;
const FALLBACK_LINES: u64 = 80;
const FALLBACK_BYTES: usize = 2048;

/// How long reading the message of an ended program may take: its file may lie on a file system that hangs.
const MESSAGE_WAIT: Duration = Duration::from_secs(10);

/// The exit code of a program that was killed by SIGKILL.
const KILLED: i32 = 137;

/// The exit code of a container whose program never ran.
const NOT_STARTED: i32 = 128;

/// Kubernetes' reason of a container that cannot be configured.
pub(crate) const UNCONFIGURED: &str = "CreateContainerConfigError";

/// A running program: what exec needs to start a process beside it, and attach to reach it.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) identity: Identity,
    /// The process whose PID namespace it shares.
    pub(crate) beside: Option<Beside>,
    /// The namespaces of its container.
    pub(crate) kept: Kept,
    /// The user, the group and the further groups that it began with, by the numbers that it sees; empty if they are not known.
    pub(crate) ids: Vec<u32>,
    /// Whether it sees itself as another user, in a user namespace that it was given below that of the container.
    pub(crate) shown: bool,
    /// Whether its PID namespace ends with it, and has no other programs.
    pub(crate) isolated: bool,
    pub(crate) spec: LaunchSpec,
    pub(crate) hub: Arc<Hub>,
    /// The way to all ranks, if this is the first one of them.
    pub(crate) ranks: Option<Ranks>,
}

impl Program {
    /// Sends `signal` to the program, or to that of each rank.
    pub(crate) fn signal(&self, signal: Signal) {
        match &self.ranks {
            None => signals::to_program(self.identity, signal),
            Some(ranks) => {
                // If the channel is full, the ranks get several signals already, and then SIGKILL by `abort`.
                ranks.signals.try_send(signal).ok();
            }
        }
    }

    /// Kills the program and its processes. Those of ranks are killed by the `abort` of their attempt.
    pub(crate) fn kill(&self) {
        if self.ranks.is_none() {
            signals::kill_all(self.identity, self.isolated);
        }
    }
}

/// How an attempt ended.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    pub(crate) exit: Exit,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
    pub(crate) finished_at: Timestamp,
    pub(crate) losses: Losses,
    /// What all its processes used; zero if the program never ran.
    pub(crate) used: Counters,
    /// A rank was lost, and with it the true exit code.
    pub(crate) lost: Option<Loss>,
    /// Whether the container could not be configured. As in a kubelet, nothing of it was begun then: it is tried again,
    /// whatever its restart policy.
    pub(crate) unconfigured: bool,
}

/// What an attempt, or a task that works for it, tells the supervisor while it lasts.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) id: SlotId,
    /// The number of the attempt: news of an earlier one come too late.
    pub(crate) attempt: u32,
    pub(crate) news: News,
}

/// The content of an [`Event`].
#[derive(Debug)]
pub(crate) enum News {
    /// The program runs.
    Running {
        program: Arc<Program>,
        started_at: Timestamp,
    },
    /// Log lines were lost. Counts all that this attempt has lost so far.
    Lost(Losses),
    /// The runtime could not mount the image, whose files are not compressed with gzip.
    Unmounted(Unmounted),
    /// The postStart hook has ended.
    PostStarted { succeeded: bool },
    /// The preStop hook has ended.
    PreStopped { succeeded: bool },
    /// A probe has changed what is known about the program.
    Probed(Change),
    /// A probe did not go as it should.
    Told(Told),
}

/// An image that the runtime could not mount.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unmounted {
    pub(crate) compression: &'static str,
    /// Whether the runtime says that the compression is the reason. Another one, such as a missing `/dev/fuse`, would keep it
    /// from mounting any image.
    pub(crate) at_fault: bool,
    /// Whether the agent has converted the image. Nobody knows who made another one, and whether it is whole.
    pub(crate) by_agent: bool,
    /// Whether the runtime has unpacked it instead.
    pub(crate) unpacked: bool,
}

/// What becomes an Event with a count.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) warning: bool,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
    pub(crate) count: i32,
}

/// One attempt to run a container.
#[derive(Debug)]
pub(crate) struct Attempt {
    pub(crate) spec: Arc<ContainerSpec>,
    /// The restart count of the container.
    pub(crate) number: u32,
    pub(crate) values: Arc<PodValues>,
    /// Counts written batches, which wakes the readers of the log.
    pub(crate) written: watch::Sender<u64>,
    pub(crate) abort: CancellationToken,
    pub(crate) events: mpsc::Sender<Event>,
    /// The program of the container whose processes it shares.
    pub(crate) target: Option<Identity>,
}

#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The runtime could not create the container. Holds its standard error.
    #[error("{0}")]
    Runtime(String),
    /// The helper could not create its namespaces.
    #[error("{what}")]
    NoNamespaces { errno: i32, what: String },
    #[error("unable to start container process")]
    Start(#[source] HandshakeError),
    #[error(
        "no command specified: give the container a command, or use an image that has an entrypoint or a command"
    )]
    NoCommand,
    /// A variable cannot be read from its file.
    #[error(transparent)]
    EnvFile(#[from] EnvFileError),
    /// The image has no account for its own user.
    #[error(transparent)]
    Account(#[from] UnknownName),
    #[error("share the processes of the pod")]
    Processes(#[from] ProcessesError),
    /// The ranks could not be started, or one of them could not.
    #[error("{message}")]
    Ranks {
        reason: &'static str,
        message: String,
    },
    #[error("stopped before it was started")]
    Aborted,
}

impl AttemptError {
    fn reason(&self) -> &'static str {
        match self {
            Self::EnvFile(_) | Self::Prepare(PrepareError::SubPath(_)) => UNCONFIGURED,
            Self::Prepare(_) | Self::NoCommand | Self::Account(_) | Self::Processes(_) => {
                "CreateContainerError"
            }
            Self::Runtime(_) | Self::NoNamespaces { .. } => "ContainerCannotRun",
            Self::Start(_) => "StartError",
            Self::Ranks { reason, .. } => reason,
            Self::Aborted => "Error",
        }
    }

    /// Whether the container cannot be configured, by what other containers have written so far.
    fn is_unconfigured(&self) -> bool {
        matches!(
            self,
            Self::EnvFile(_) | Self::Prepare(PrepareError::SubPath(_))
        )
    }
}

/// Runs the attempt to its end.
pub(crate) async fn run(pod: Arc<Pod>, attempt: Attempt) -> Ended {
    if parallel::has_ranks(&pod, &attempt.spec) {
        return match Box::pin(parallel::try_run(&pod, &attempt)).await {
            Ok((done, lost)) => Ended {
                lost,
                ..ended(&attempt, Ok(done))
            },
            Err(error) => ended(&attempt, Err(error)),
        };
    }
    let outcome = Box::pin(try_run(&pod, &attempt)).await;
    ended(&attempt, outcome)
}

fn ended(attempt: &Attempt, outcome: Result<Done, AttemptError>) -> Ended {
    let finished_at = Timestamp::now();
    match outcome {
        Ok((exit, message, losses, killed_by_kernel, used)) => Ended {
            exit,
            reason: reason_of(exit, killed_by_kernel),
            message,
            finished_at,
            losses,
            used,
            lost: None,
            unconfigured: false,
        },
        Err(error) => {
            let unconfigured = error.is_unconfigured();
            // That is tried again and again, and the supervisor logs it once.
            if !unconfigured {
                tracing::warn!(container = attempt.spec.name(), "{}", chain(&error));
            }
            let code = if matches!(error, AttemptError::Aborted) {
                KILLED
            } else {
                NOT_STARTED
            };
            Ended {
                exit: Exit { code, signal: 0 },
                reason: error.reason(),
                message: chain(&error),
                finished_at,
                losses: Losses::default(),
                used: Counters::default(),
                lost: None,
                unconfigured,
            }
        }
    }
}

/// PURE: the reason that Kubernetes shows for this exit.
fn reason_of(exit: Exit, killed_by_kernel: bool) -> &'static str {
    match exit.code {
        0 => "Completed",
        KILLED if killed_by_kernel => "OOMKilled",
        _ => "Error",
    }
}

/// PURE: whether the kernel's OOM killer ended the program. The OOM killer sends SIGKILL, as the shim does, so a program
/// that the shim has killed does not count; and each OOM kill is claimed by one container only.
fn by_kernel(exit: Exit, by_us: bool, claim: impl FnOnce() -> bool) -> bool {
    exit.code == KILLED && !by_us && claim()
}

/// What the container used since its runtime's process had used `before`, once that has ended.
fn used_since(pod: &Pod, before: Used, runtime: &up::Runtime) -> Counters {
    let at_end = runtime.child.used.unwrap_or_default();
    spent(pod.runtime.isolates(), before, at_end)
}

/// PURE: what the container used, from what its runtime's process had used before the program ran and at the end.
fn spent(isolated: bool, before: Used, end: Used) -> Counters {
    if isolated {
        // The program is a child of the runtime. What the runtime itself and its helpers used is not the container's.
        end.kids - before.kids
    } else {
        end.own + end.kids
    }
}

type Done = (Exit, String, Losses, bool, Counters);

async fn try_run(pod: &Arc<Pod>, attempt: &Attempt) -> Result<Done, AttemptError> {
    let container = &attempt.spec.container;
    let config = attempt.spec.image.config.clone().unwrap_or_default();
    let values = environment_of(pod, attempt).await?;
    let mut spec = environment::launch_spec(container, &config, &values, &pod.facts_now());
    if spec.argv.is_empty() {
        return Err(AttemptError::NoCommand);
    }
    let mut folders = prepare(pod, attempt, values).await?;
    complete(&mut spec, &folders);
    ids::tell_left_out(attempt, &folders.left_out).await;
    let kills_before = pod.oom.unclaimed();
    let turn = turn_of(attempt).await?;
    let mut up = bring_up(pod, attempt, &folders, container).await?;
    // What is copied into volumes may take minutes, and other containers need the turn.
    let turn = turn.filter(|_| folders.image_volumes.is_empty());
    let group = complete_inside(pod, attempt, (&mut folders, &mut up), &mut spec).await?;
    let (stdio, sources) = stdio::pipes(container).map_err(PrepareError::Pipes)?;
    [spec.uid, spec.gid] = ids::wanted(pod, container, &config, (spec.passwd.as_deref(), group));
    let kept = Kept::of(up.identity);
    let launching = launch(up.socket, &spec, stdio.theirs, &attempt.abort);
    let (terminal, told) = launched(&mut up.runtime, launching, &kept).await?;
    drop(turn);
    let sources = stdio::from_terminal(terminal.as_ref()).unwrap_or(sources);
    let used_before = measure::used(up.runtime.child.pid).unwrap_or_default();
    let mut keeper = hub::open(container.stdin, container.stdin_once, stdio.ours, terminal);
    let program = Program {
        identity: up.identity,
        beside: up.beside,
        kept,
        ids: told.ids,
        shown: !told.own_ids && (spec.uid.is_some() || spec.gid.is_some()),
        isolated: pod.runtime.isolates() && up.beside.is_none(),
        spec,
        hub: keeper.hub(),
        ranks: None,
    };
    let program = ids::tell_running(pod, attempt, program).await;
    let live = pod.jobdir.log_path(&container.name, attempt.number);
    let over = CancellationToken::new();
    let pump = read_all(sources, log(pod, attempt, &live), over.clone(), &program);
    let ending = async {
        let exit = end(&mut up.runtime, attempt, up.identity, program.isolated).await;
        over.cancel();
        exit
    };
    let (losses, exit) = tokio::select! {
        biased;
        both = async { tokio::join!(pump, ending) } => both,
        never = keeper.feed() => match never {},
    };
    keeper.end(exit);
    let by_us = attempt.abort.is_cancelled();
    let killed = by_kernel(exit, by_us, || pod.oom.claim(kills_before));
    let logs = container.termination_message_fallback_to_logs && exit.code != 0;
    let message = (up.runtime).message(message(folders, logs.then_some(live)).await);
    let used = used_since(pod, used_before, &up.runtime);
    Ok((exit, message, losses, killed, used))
}

/// Waits for the end of the container, and kills what is left of it. A PID namespace of its own leaves nothing.
async fn end(runtime: &mut Runtime, attempt: &Attempt, program: Identity, isolated: bool) -> Exit {
    let exit = runtime.ended(&attempt.abort, program).await;
    if !isolated {
        signals::kill_left(program.pid);
    }
    with_signal(exit)
}

/// Reads the output to its end. Nobody is there to write any more then, so the namespaces are let go, also if the log takes
/// longer.
async fn read_all<'a>(
    sources: Vec<Source>,
    log: Log<'a>,
    over: CancellationToken,
    program: &'a Program,
) -> Losses {
    let log = Log {
        closed: Box::new(|| program.kept.release()),
        ..log
    };
    let losses = output::pump(sources, log, over, &program.hub).await;
    // If the log's writer has failed, the end of the output was not seen.
    program.kept.release();
    losses
}

/// Where the output goes, and how the supervisor learns of lines that could not be written.
fn log<'a>(pod: &Pod, attempt: &'a Attempt, live: &Path) -> Log<'a> {
    Log {
        live: live.to_owned(),
        limits: pod.log_limits(attempt.spec.role),
        written: attempt.written.clone(),
        lost: Box::new(|losses| {
            let event = Event {
                id: attempt.spec.id,
                attempt: attempt.number,
                news: News::Lost(losses.clone()),
            };
            // If the supervisor's channel is full, a later event reports the same lines.
            attempt.events.try_send(event).is_ok()
        }),
        closed: Box::new(|| {}),
    }
}

/// Runtimes exit with 128 + n if signal n ended the program.
fn with_signal(exit: Exit) -> Exit {
    let signal = if (129..=192).contains(&exit.code) {
        exit.code - 128
    } else {
        exit.signal
    };
    Exit { signal, ..exit }
}

/// Waits until few other containers are set up on the node.
async fn turn_of(attempt: &Attempt) -> Result<Option<Turn>, AttemptError> {
    tokio::select! {
        biased;
        turn = turn::take() => Ok(turn),
        () = attempt.abort.cancelled() => Err(AttemptError::Aborted),
    }
}

/// Waits until the program runs, and ends the runtime if it does not, which would wait for whoever keeps its namespaces. Returns the
/// terminal of the program, if it has one, and what the launcher has told besides.
async fn launched(
    runtime: &mut Runtime,
    launching: impl Future<Output = Result<Launched, AttemptError>>,
    kept: &Kept,
) -> Result<(Option<Arc<Stream>>, Launched), AttemptError> {
    let mut launched = match launching.await {
        Ok(launched) => launched,
        Err(error) => {
            kept.release();
            runtime.end().await;
            return Err(error);
        }
    };
    let terminal = launched.master.take().map(Stream::new).transpose();
    let terminal = terminal.map_err(PrepareError::Pipes)?.map(Arc::new);
    Ok((terminal, launched))
}

/// Starts the program. It may lie on a file system that hangs, so `abort` ends the wait.
async fn launch(
    socket: UnixStream,
    spec: &LaunchSpec,
    stdio: Vec<OwnedFd>,
    abort: &CancellationToken,
) -> Result<Launched, AttemptError> {
    tokio::select! {
        biased;
        launched = handshake::launch(socket, spec, stdio) => launched.map_err(AttemptError::Start),
        () = abort.cancelled() => Err(AttemptError::Aborted),
    }
}

/// Reads the variables of the container that come from files, on a blocking thread. Returns its whole environment.
async fn environment_of(
    pod: &Arc<Pod>,
    attempt: &Attempt,
) -> Result<Arc<pb::PodValues>, AttemptError> {
    let (pod, spec) = (Arc::clone(pod), Arc::clone(&attempt.spec));
    let values = Arc::clone(&attempt.values);
    let reading = tokio::task::spawn_blocking(move || {
        let places = Places {
            volumes: &pod.volumes,
            network: &pod.network,
        };
        env_files::resolve(&spec.container, &values, places)
    });
    tokio::select! {
        biased;
        read = reading => match read {
            Ok(read) => Ok(Arc::new(read?)),
            Err(error) => Err(PrepareError::Pipes(io::Error::other(error)).into()),
        },
        () = attempt.abort.cancelled() => Err(AttemptError::Aborted),
    }
}

/// Creates the folders on a blocking thread: a file system that the pod mounts may hang.
async fn prepare(
    pod: &Arc<Pod>,
    attempt: &Attempt,
    values: Arc<pb::PodValues>,
) -> Result<Folders, AttemptError> {
    let (pod, spec, number) = (Arc::clone(pod), Arc::clone(&attempt.spec), attempt.number);
    let making =
        tokio::task::spawn_blocking(move || Folders::prepare(&pod, &spec, number, &values));
    tokio::select! {
        biased;
        made = making => match made {
            Ok(made) => Ok(made?),
            Err(error) => Err(PrepareError::Pipes(io::Error::other(error)).into()),
        },
        // If the folders are created nevertheless, they are removed when the task's result is dropped.
        () = attempt.abort.cancelled() => Err(AttemptError::Aborted),
    }
}

/// The program's termination message, or the end of its log `fallback` if it left none. Removes the folders.
async fn message(folders: Folders, fallback: Option<PathBuf>) -> String {
    let reading = tokio::task::spawn_blocking(move || {
        let mut text = folders.termination_message(MESSAGE_BYTES);
        if let Some(live) = fallback.filter(|_| text.is_empty()) {
            text = last_text(&live, FALLBACK_LINES, FALLBACK_BYTES).unwrap_or_default();
        }
        (text, folders)
    });
    let Ok(Ok((text, folders))) = tokio::time::timeout(MESSAGE_WAIT, reading).await else {
        return String::new();
    };
    drop(folders);
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests;
