//! One attempt of a container of several ranks, in the shim: starts srun, tells each helper what to start, passes on
//! signals, and concludes from the ends of the ranks how the container ended.
//!
//! ```text
//!            helpers connect         rank 0 runs            a rank fails, or the pod is stopped
//! srun ─────► start each ─────────► News::Running ─────────► TERM ─► KILL ─► TERM to srun ─► KILL to srun
//!      └─ some have not, CONNECT after the first ─► KILL …
//! ```
//!
//! Each step of the last row has its own time, so that a container ends whatever its ranks, their nodes or Slurm do. TERM
//! makes srun kill all ranks at once, so it comes only after they had their own chance. The output is what srun writes:
//! each line begins with the number of its rank, and srun's own messages have none.

use std::{
    ffi::OsString,
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
use knoc_contract::{
    host::node_name,
    launch::LaunchSpec,
    logs::{cri, read::last_text, writer::Losses},
};
use knoc_link::{
    Connection, Incoming, Peer,
    pinned::{self, KeyPair},
};
use knoc_proto::{error::chain, pb};
use rustix::process::Signal;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    super::{
        attach::hub::{self, Hub},
        children::{Child, Exit},
        environment, fdio,
        output::{self, Source},
        pod::Pod,
        ranks::{
            peer::{self, Usage, Whose},
            step::{self, Step},
            table::{Effect, End, Input, Table},
            wire,
        },
        role::{ContainerSpec, Role},
        signals::{self, Identity},
        usage::Counters,
    },
    Attempt, AttemptError, Done, FALLBACK_BYTES, FALLBACK_LINES, KILLED, Program, log, running,
    with_signal,
};

/// How long the other helpers may take to connect after the first one.
const CONNECT: Duration = Duration::from_mins(3);

/// How long the other ranks may take to end after one has failed.
const OTHERS: Duration = Duration::from_secs(10);

/// How long killed ranks may take to end, and then srun.
const AFTER_KILL: Duration = Duration::from_secs(10);

/// How long the last messages of the helpers may take after srun has ended.
const LATE: Duration = Duration::from_secs(5);

/// How many messages of all helpers may wait.
const EVENTS: usize = 256;

/// How many signals may wait to be passed on.
const SIGNALS: usize = 16;

/// How many connections there may be beyond one for each rank.
const SPARE: usize = 16;

/// The reasons with which the attempt of a rank fails before its program runs.
const NOT_RUN: [&str; 3] = ["CreateContainerError", "ContainerCannotRun", "StartError"];

/// PURE: whether srun starts this container.
pub(super) fn has_ranks(pod: &Pod, spec: &ContainerSpec) -> bool {
    let job = pod.spec().job.as_ref();
    spec.role == Role::Main && job.is_some_and(|job| job.mpi.is_some())
}

fn cannot_run(message: String) -> AttemptError {
    AttemptError::Ranks {
        reason: "ContainerCannotRun",
        message,
    }
}

/// Runs all ranks to their ends.
pub(super) async fn try_run(pod: &Arc<Pod>, attempt: &Attempt) -> Result<Done, AttemptError> {
    let container = &attempt.spec.container;
    let config = attempt.spec.image.config.clone().unwrap_or_default();
    let spec = environment::launch_spec(container, &config, &attempt.values, &pod.facts);
    if spec.argv.is_empty() {
        return Err(AttemptError::NoCommand);
    }
    let (cert, key) = pod.jobdir.link_pair();
    let pair = KeyPair::from_files(&cert, &key);
    let pair = pair.map_err(|error| cannot_run(chain(&error)))?;
    let any = SocketAddr::from(([0, 0, 0, 0], 0));
    let incoming = pinned::listen(any, pair.clone()).await;
    let mut incoming = incoming.map_err(|error| cannot_run(chain(&error)))?;
    let argv = argv(pod, attempt, &incoming)?;
    let keeper = hub::open(false, false, None, None);
    let hub = keeper.hub();
    let mut conductor = Conductor::new(pod, attempt, &pair, (spec, Arc::clone(&hub)))?;
    let started = spawn(pod, &argv);
    let (mut srun, sources) =
        started.map_err(|error| cannot_run(format!("start srun: {error}")))?;
    let live = pod.jobdir.log_path(&container.name, attempt.number);
    let over = CancellationToken::new();
    let pump = output::pump(sources, log(pod, attempt, &live), over.clone(), &hub);
    let conducting = async {
        let exit = conductor.conduct(&mut srun, &mut incoming).await;
        over.cancel();
        exit
    };
    let (losses, exit) = tokio::join!(pump, conducting);
    let outcome = conductor.outcome(exit, losses, live).await;
    let exit = outcome.as_ref().map_or(exit, |done| done.0);
    keeper.end(exit);
    outcome
}

/// The argv of srun.
fn argv(pod: &Pod, attempt: &Attempt, incoming: &Incoming) -> Result<Vec<OsString>, AttemptError> {
    if pod.job.srun.is_empty() {
        return Err(cannot_run(
            "the agent names no srun, which starts the ranks (knoc.io/mpi); the pod needs a site with Slurm".to_owned(),
        ));
    }
    let port = incoming.local_addr().map_or(0, |address| address.port());
    let own = pod.facts.fields.host_ip.parse::<IpAddr>();
    let mut addresses = Vec::new();
    if let Ok(ip) = own {
        addresses.push(SocketAddr::new(ip, port).to_string());
    }
    addresses.push(format!("{}:{port}", node_name()));
    let job = pod.spec().job.clone().unwrap_or_default();
    let cpus = std::env::var("SLURM_CPUS_PER_TASK").ok();
    let step = Step {
        srun: Path::new(&pod.job.srun),
        agent: &pod.agent,
        jobdir: pod.jobdir.path(),
        attempt: attempt.number,
        addresses: &addresses,
        job: &job,
        cpus_per_task: cpus.and_then(|cpus| cpus.parse().ok()),
    };
    Ok(step.argv())
}

/// Starts srun, with what Slurm tells the batch step, and nothing of the pod.
#[expect(
    clippy::disallowed_methods,
    reason = "srun is the parent of the containers of all ranks"
)]
fn spawn(pod: &Pod, argv: &[OsString]) -> io::Result<(Child, Vec<Source>)> {
    let [program, arguments @ ..] = argv else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let (ours_out, stdout) = fdio::output_pipe()?;
    let (ours_err, stderr) = fdio::output_pipe()?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(&pod.job.runtime_env)
        .envs(step::of_slurm(std::env::vars_os()))
        // Its messages are read by people, and by the tests.
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr);
    let child = pod.children.spawn(&mut command, true)?;
    // The command still holds the writing ends, and the shim would never see the end of the output.
    drop(command);
    let sources = vec![
        Source::new(ours_out, cri::Stream::Stdout),
        Source::new(ours_err, cri::Stream::Stderr),
    ];
    Ok((child, sources))
}

/// What is done if nothing happens until then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Some helpers have not connected: the attempt fails.
    Missing,
    KillRanks,
    EndSrun,
    KillSrun,
    /// Nothing more is expected of the helpers.
    Conclude,
}

/// The helper of a rank that was admitted.
struct Line {
    id: u64,
    to: mpsc::Sender<Bytes>,
}

struct Conductor<'a> {
    attempt: &'a Attempt,
    pin: String,
    table: Table,
    /// By rank.
    lines: Vec<Option<Line>>,
    /// What each helper is told to start.
    start: Bytes,
    /// What exec starts beside rank 0, until that runs.
    program: Option<(LaunchSpec, Arc<Hub>)>,
    isolated: bool,
    events: (mpsc::Sender<peer::Event>, mpsc::Receiver<peer::Event>),
    signals: (mpsc::Sender<Signal>, mpsc::Receiver<Signal>),
    peers: JoinSet<()>,
    connections: u64,
    next: Option<(Instant, Next)>,
    used: Counters,
    /// Why the attempt fails whatever its ranks exit with.
    failure: Option<String>,
}

impl<'a> Conductor<'a> {
    fn new(
        pod: &Pod,
        attempt: &'a Attempt,
        pair: &KeyPair,
        program: (LaunchSpec, Arc<Hub>),
    ) -> Result<Self, AttemptError> {
        let start = pb::RankStart {
            container: Some(attempt.spec.container.clone()),
            image: Some(attempt.spec.image.clone()),
            values: Some(pb::PodValues::clone(&attempt.values)),
        };
        let start = pb::ToRank {
            message: Some(pb::to_rank::Message::Start(start)),
        };
        let start = wire::frame(&start)
            .map_err(|error| cannot_run(format!("encode what the ranks start: {error}")))?;
        let job = pod.spec().job.as_ref();
        let ranks = job.map_or(1, |job| usize::try_from(job.ntasks).unwrap_or(1));
        Ok(Self {
            attempt,
            pin: pair.spki().to_owned(),
            table: Table::new(ranks),
            lines: std::iter::repeat_with(|| None).take(ranks).collect(),
            start,
            program: Some(program),
            isolated: pod.runtime.isolates(),
            events: mpsc::channel(EVENTS),
            signals: mpsc::channel(SIGNALS),
            peers: JoinSet::new(),
            connections: 0,
            next: None,
            used: Counters::default(),
            failure: None,
        })
    }

    /// Runs until srun has ended and nothing more is expected of the helpers. Returns srun's exit.
    async fn conduct(&mut self, srun: &mut Child, incoming: &mut Incoming) -> Exit {
        let (pid, mut exit, mut aborted) = (srun.pid, None, false);
        loop {
            // Once srun has ended without a helper, none comes.
            let none_came = self.lines.iter().all(Option::is_none);
            if let Some(exit) = exit
                && (none_came || self.table.is_over())
            {
                return exit;
            }
            // The supervisor's KILL comes first, then what the helpers say, because that may make a deadline pointless.
            tokio::select! {
                biased;
                () = self.attempt.abort.cancelled(), if !aborted => {
                    aborted = true;
                    self.table.stop();
                    self.kill_ranks();
                }
                Some(event) = self.events.1.recv() => self.take(event).await,
                Some(signal) = self.signals.1.recv() => {
                    self.table.stop();
                    self.tell(signal);
                }
                ended = srun.wait(), if exit.is_none() => {
                    exit = Some(ended);
                    self.next_in(LATE, Next::Conclude);
                }
                Some(accepted) = incoming.next() => self.accept(accepted),
                Some(_) = self.peers.join_next() => {}
                next = due(self.next) => {
                    self.next = None;
                    self.escalate(next, pid);
                    if let (Some(exit), Next::Conclude) = (exit, next) {
                        return exit;
                    }
                }
            }
        }
    }

    /// Once srun has ended, only the conclusion comes.
    fn next_in(&mut self, after: Duration, next: Next) {
        if !matches!(self.next, Some((_, Next::Conclude))) {
            self.next = Some((Instant::now() + after, next));
        }
    }

    /// Takes up a connection whose peer holds the pod's key.
    fn accept(&mut self, accepted: io::Result<Connection>) {
        let connection = match accepted {
            Ok(connection) => connection,
            Err(error) => {
                tracing::warn!(%error, "the port for the helpers of ranks");
                return;
            }
        };
        let ours = match connection.peer() {
            Peer::Pinned { spki, .. } => **spki == *self.pin,
            Peer::Tls { .. } | Peer::Unix { .. } | Peer::Command => false,
        };
        if !ours || self.peers.len() >= self.lines.len() + SPARE {
            return;
        }
        self.connections += 1;
        let whose = Whose {
            id: self.connections,
            attempt: self.attempt.number,
        };
        let events = self.events.0.clone();
        self.peers.spawn(peer::serve(connection, whose, events));
    }

    async fn take(&mut self, event: peer::Event) {
        let rank = event.rank;
        match event.line {
            Some(to) if self.table.admits(rank) => {
                if let Some(line) = self.lines.get_mut(rank) {
                    *line = Some(Line { id: event.id, to });
                }
            }
            // A second helper of one rank: its connection ends as `to` is dropped.
            Some(_) => return,
            None => {}
        }
        let line = self.lines.get(rank).and_then(Option::as_ref);
        if line.is_none_or(|line| line.id != event.id) {
            return;
        }
        self.account(event.used);
        match self.table.step(rank, event.input) {
            Effect::Nothing => {}
            Effect::Start => self.start(rank),
            Effect::SendAway => {
                if let Some(line) = self.lines.get_mut(rank) {
                    *line = None;
                }
            }
            Effect::FirstRuns => self.first_runs(event.pid.unwrap_or_default()).await,
            Effect::EndOthers => {
                self.tell(Signal::TERM);
                self.next_in(OTHERS, Next::KillRanks);
            }
        }
        if self.table.is_over() {
            // It ends by itself, unless something holds it.
            self.next_in(AFTER_KILL, Next::EndSrun);
        }
    }

    fn start(&mut self, rank: usize) {
        if let Some(Some(line)) = self.lines.get(rank) {
            // The first message always has room.
            line.to.try_send(self.start.clone()).ok();
        }
        let waiting = !self.table.awaited().is_empty();
        match self.next {
            None if waiting => self.next_in(CONNECT, Next::Missing),
            Some((_, Next::Missing)) if !waiting => self.next = None,
            None | Some(_) => {}
        }
    }

    /// Rank 0 runs on this node, so exec and attach reach it like any other container.
    async fn first_runs(&mut self, pid: u32) {
        if self.table.first_host() != node_name() {
            // Its pid means another process here.
            self.failure = Some(format!(
                "rank 0 runs on {}, and not on the first node of the job, {}",
                self.table.first_host(),
                node_name()
            ));
            self.table.stop();
            self.kill_ranks();
            return;
        }
        // If it is not there any more, its end comes next.
        let (Some(identity), Some((spec, hub))) = (Identity::of(pid), self.program.take()) else {
            return;
        };
        let program = Program {
            identity,
            beside: None,
            isolated: self.isolated,
            spec,
            hub,
            ranks: Some(self.signals.0.clone()),
        };
        // The supervisor outlives its attempts.
        let event = running(self.attempt, program);
        self.attempt.events.send(event).await.ok();
    }

    /// Sends the signal to all helpers.
    fn tell(&self, signal: Signal) {
        let message = pb::ToRank {
            message: Some(pb::to_rank::Message::Signal(signal.as_raw())),
        };
        let Ok(frame) = wire::frame(&message) else {
            return;
        };
        for line in self.lines.iter().flatten() {
            // A helper that reads nothing is ended with srun.
            line.to.try_send(frame.clone()).ok();
        }
    }

    fn kill_ranks(&mut self) {
        self.tell(Signal::KILL);
        self.next_in(AFTER_KILL, Next::EndSrun);
    }

    fn escalate(&mut self, next: Next, srun: u32) {
        match next {
            Next::Missing => {
                let missing: Vec<String> =
                    self.table.awaited().iter().map(usize::to_string).collect();
                self.failure = Some(format!(
                    "these ranks have not connected to the shim on {} within {} minutes: {}; compute nodes must reach each \
                     other by TCP",
                    node_name(),
                    CONNECT.as_secs() / 60,
                    missing.join(", ")
                ));
                self.table.stop();
                self.kill_ranks();
            }
            Next::KillRanks => self.kill_ranks(),
            Next::EndSrun => {
                signals::to_group(srun, Signal::TERM);
                self.next_in(AFTER_KILL, Next::KillSrun);
            }
            Next::KillSrun => signals::to_group(srun, Signal::KILL),
            Next::Conclude => {}
        }
    }

    fn account(&mut self, used: Usage) {
        let used = Counters {
            cpu: used.cpu_nanos,
            faults: used.page_faults,
            major: used.major_page_faults,
        };
        self.used = self.used + used;
    }

    /// How the container ended.
    async fn outcome(
        &mut self,
        srun: Exit,
        losses: Losses,
        live: PathBuf,
    ) -> Result<Done, AttemptError> {
        if let Some(message) = self.failure.take() {
            return Err(cannot_run(message));
        }
        let ran = self.program.is_none();
        if !ran && self.attempt.abort.is_cancelled() {
            return Err(AttemptError::Aborted);
        }
        for rank in self.lost() {
            self.table.step(rank, Input::Lost);
        }
        let Some(worst) = self.table.worst() else {
            let said = end_of_log(live).await;
            return Err(cannot_run(format!(
                "srun ended with code {} before any rank was started: {said}",
                srun.code
            )));
        };
        let (rank, host, end) = (worst.rank, worst.host, worst.end);
        if let Some(reason) = NOT_RUN.into_iter().find(|reason| *reason == end.reason) {
            return Err(AttemptError::Ranks {
                reason,
                message: format!("rank {rank} on {host}: {}", end.message),
            });
        }
        let exit = with_signal(Exit {
            code: end.code,
            signal: 0,
        });
        let killed = end.code == KILLED && end.reason == "OOMKilled";
        let container = &self.attempt.spec.container;
        let fallback = container.termination_message_fallback_to_logs && exit.code != 0;
        let mut message = message_of(rank, host, end, self.table.first());
        if fallback && end.message.is_empty() {
            message = end_of_log(live).await;
        }
        Ok((exit, message, losses, killed, self.used))
    }

    /// The ranks whose helpers had connected: those that are not over although srun is were lost.
    fn lost(&self) -> Vec<usize> {
        let connected = self.lines.iter().enumerate();
        let connected = connected.filter(|(_, line)| line.is_some());
        connected.map(|(rank, _)| rank).collect()
    }
}

/// PURE: the termination message of the container: that of rank 0 if all is well, else that of the worst rank, and if that
/// left none, which one it was.
fn message_of(rank: usize, host: &str, worst: &End, first: Option<&End>) -> String {
    let own = if worst.code == 0 { first } else { Some(worst) };
    let text = own.map_or("", |end| end.message.as_str());
    if text.is_empty() && worst.code != 0 {
        format!("rank {rank} on {host} ended with exit code {}", worst.code)
    } else {
        text.to_owned()
    }
}

async fn due(next: Option<(Instant, Next)>) -> Next {
    match next {
        Some((at, next)) => {
            sleep_until(at).await;
            next
        }
        None => std::future::pending().await,
    }
}

/// The end of the container's log, which has srun's own messages.
async fn end_of_log(live: PathBuf) -> String {
    let reading =
        tokio::task::spawn_blocking(move || last_text(&live, FALLBACK_LINES, FALLBACK_BYTES));
    let text = tokio::time::timeout(super::MESSAGE_WAIT, reading).await;
    let text = text.ok().and_then(Result::ok).and_then(Result::ok);
    String::from_utf8_lossy(&text.unwrap_or_default())
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_is_that_of_the_rank_that_decides() {
        let end = |code, message: &str| End {
            code,
            reason: String::new(),
            message: message.to_owned(),
        };
        let (good, quiet) = (end(0, "all done"), end(7, ""));
        assert_eq!(message_of(2, "c2", &end(0, "x"), Some(&good)), "all done");
        assert_eq!(message_of(2, "c2", &end(0, ""), None), "");
        assert_eq!(message_of(2, "c2", &end(7, "why"), Some(&good)), "why");
        assert_eq!(
            message_of(2, "c2", &quiet, Some(&good)),
            "rank 2 on c2 ended with exit code 7"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_due_comes_at_its_time_and_nothing_without_one() {
        let begun = Instant::now();
        let at = begun + AFTER_KILL;
        assert_eq!(due(Some((at, Next::EndSrun))).await, Next::EndSrun);
        assert_eq!(begun.elapsed(), AFTER_KILL);
        let never = tokio::time::timeout(CONNECT, due(None)).await;
        assert!(never.is_err());
    }
}
