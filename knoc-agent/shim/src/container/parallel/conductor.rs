//! Talks to the helpers of all ranks and to srun, until all have ended.
//!
//! ```text
//!            helpers connect         rank 0 runs            a rank fails, or the pod is stopped
//! srun ─────► start each ─────────► News::Running ─────────► TERM ─► KILL ─► TERM to srun ─► KILL to srun
//!      ├─ none connects for CONNECT although some have not ─► KILL …
//!      └─ a rank that was started does not run within BEGIN ─► KILL …
//! ```
//!
//! Each step of the last row has its own time, so that a container ends whatever its ranks, their nodes or Slurm do. TERM
//! makes srun kill all ranks at once, so it comes only after they had their own chance.

use std::{collections::HashMap, io, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt as _;
use knoc_contract::{host::node_name, launch::LaunchSpec};
use knoc_link::{Connection, Incoming, Peer, pinned::KeyPair};
use knoc_proto::pb::{self, to_rank};
use rustix::process::Signal;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::{
    super::{
        super::{
            attach::hub::Hub,
            children::{Child, Exit},
            pod::Pod,
            ranks::{
                command::{Open, Opened, Ranks},
                peer::{self, Usage, Whose},
                table::{Effect, Input, Table},
                wire,
            },
            signals::{self, Identity},
            usage::Counters,
        },
        Attempt, AttemptError, Program,
        ids::running,
    },
    begins::Begins,
    cannot_run,
    outcome::Conducted,
};
use crate::launch::kept::Kept;

/// How long the next helper may take to connect.
const CONNECT: Duration = Duration::from_mins(3);

/// How long the program of a rank may take to run once its helper was told to start it. The runtime may have to unpack the image.
const BEGIN: Duration = Duration::from_mins(15);

/// How long the other ranks may take to end after one has failed.
const OTHERS: Duration = Duration::from_secs(10);

/// How long killed ranks may take to end, and then srun.
const AFTER_KILL: Duration = Duration::from_secs(10);

/// How long helpers may take to remove what their ranks wrote, unless the pod is killed; each ends its connection when it is
/// done. A helper bounds its removals by `LAST_REMOVAL` and twice that.
const REMOVAL: Duration = Duration::from_secs(40);

/// How long the last messages of the helpers may take after srun has ended.
const LATE: Duration = Duration::from_secs(5);

/// How many messages of all helpers may wait.
const EVENTS: usize = 256;

/// How many signals may wait to be passed on.
const SIGNALS: usize = 16;

/// How many requests for streams may wait.
const OPENS: usize = 16;

/// How many connections there may be beyond one for each rank and each stream that is awaited.
const SPARE: usize = 16;

/// How many ranks a message names.
const NAMED: usize = 16;

type Told = peer::Told<Connection>;

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

pub(super) struct Conductor<'a> {
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
    events: (mpsc::Sender<Told>, mpsc::Receiver<Told>),
    signals: (mpsc::Sender<Signal>, mpsc::Receiver<Signal>),
    opens: (mpsc::Sender<Open>, mpsc::Receiver<Open>),
    /// The streams that helpers have been asked to open, by their numbers.
    awaited: HashMap<u64, Open>,
    peers: JoinSet<()>,
    connections: u64,
    /// The number of the newest stream.
    streams: u64,
    next: Option<(Instant, Next)>,
    begins: Begins,
    used: Counters,
    /// Why the attempt fails whatever its ranks exit with.
    failure: Option<String>,
}

impl<'a> Conductor<'a> {
    pub(super) fn new(
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
        let start = frame_of(to_rank::Message::Start(start));
        let start = start.ok_or_else(|| {
            cannot_run("the pod's values are too long for a message to a rank".to_owned())
        })?;
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
            opens: mpsc::channel(OPENS),
            awaited: HashMap::new(),
            peers: JoinSet::new(),
            connections: 0,
            streams: 0,
            next: None,
            begins: Begins::default(),
            used: Counters::default(),
            failure: None,
        })
    }

    /// Runs until srun has ended and nothing more is expected of the helpers.
    pub(super) async fn conduct(mut self, srun: &mut Child, incoming: &mut Incoming) -> Conducted {
        let srun = self.until_over(srun, incoming).await;
        let connected = self.lines.iter().enumerate();
        let connected = connected.filter(|(_, line)| line.is_some());
        Conducted {
            srun,
            connected: connected.map(|(rank, _)| rank).collect(),
            ran: self.program.is_none(),
            table: self.table,
            used: self.used,
            failure: self.failure,
        }
    }

    async fn until_over(&mut self, srun: &mut Child, incoming: &mut Incoming) -> Exit {
        let (pid, mut exit, mut aborted) = (srun.pid, None, false);
        self.next_in(CONNECT, Next::Missing);
        loop {
            // Once srun has ended and no helper is connected, none comes.
            let none_left = self.lines.iter().all(Option::is_none);
            if let Some(exit) = exit
                && (none_left || self.table.is_over())
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
                Some(told) = self.events.1.recv() => match told {
                    peer::Told::Event(event) => self.take(event).await,
                    peer::Told::Stream(joined) => self.join(joined),
                },
                Some(signal) = self.signals.1.recv() => {
                    self.table.stop();
                    self.tell(signal);
                }
                ended = srun.wait(), if exit.is_none() => {
                    exit = Some(ended);
                    self.next_in(LATE, Next::Conclude);
                }
                Some(open) = self.opens.1.recv() => self.open(open),
                Some(accepted) = incoming.next() => self.accept(accepted),
                Some(_) = self.peers.join_next() => {}
                rank = due(self.begins.first()) => self.never_began(rank),
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
                tracing::warn!(%error, "accept the connection of a rank's helper");
                return;
            }
        };
        let ours = match connection.peer() {
            Peer::Pinned { spki, .. } => **spki == *self.pin,
            Peer::Tls { .. } | Peer::Unix { .. } | Peer::Command => false,
        };
        if !ours || self.peers.len() >= self.lines.len() + self.awaited.len() + SPARE {
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

    /// Asks the helper of a rank for a connection.
    fn open(&mut self, open: Open) {
        // Whoever has given up waits for none.
        self.awaited.retain(|_, open| !open.answer.is_closed());
        let line = self.lines.get(open.rank).and_then(Option::as_ref);
        let refused = match line.filter(|_| self.table.runs(open.rank)) {
            None => {
                let last = self.lines.len().saturating_sub(1);
                format!(
                    "rank {} is not running; the ranks of this container are 0 to {last}",
                    open.rank
                )
            }
            Some(line) => {
                self.streams += 1;
                let asked = frame_of(to_rank::Message::OpenStream(self.streams));
                match asked.map(|frame| line.to.try_send(frame)) {
                    Some(Ok(())) => {
                        self.awaited.insert(self.streams, open);
                        return;
                    }
                    Some(Err(_)) | None => format!("rank {} does not answer", open.rank),
                }
            }
        };
        open.answer.send(Err(refused)).ok();
    }

    /// Passes on a connection that a helper has opened.
    fn join(&mut self, joined: peer::Joined<Connection>) {
        let Some(open) = self.awaited.remove(&joined.stream) else {
            return;
        };
        let line = self.lines.get(joined.rank).and_then(Option::as_ref);
        let Some(line) = line.filter(|_| open.rank == joined.rank) else {
            return;
        };
        let opened = Opened {
            rank: joined.rank,
            stream: joined.stream,
            connection: joined.connection,
            line: line.to.downgrade(),
        };
        open.answer.send(Ok(opened)).ok();
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
        let lost = matches!(event.input, Input::Lost(_));
        if !matches!(event.input, Input::Hello { .. }) {
            self.begins.remove(rank);
        }
        match self.table.step(rank, event.input) {
            Effect::Nothing => {}
            Effect::Start => self.start(rank),
            Effect::SendAway => {
                if let Some(line) = self.lines.get_mut(rank) {
                    *line = None;
                }
            }
            Effect::FirstRuns => {
                let rank = event.running.unwrap_or_default();
                self.first_runs(rank).await;
            }
            Effect::EndOthers => {
                self.tell(Signal::TERM);
                self.next_in(OTHERS, Next::KillRanks);
            }
        }
        if let Some(line) = self.lines.get_mut(rank).filter(|_| lost) {
            *line = None;
        }
        if self.table.is_over() {
            // It ends by itself, unless something holds it.
            let gone = self.lines.iter().all(Option::is_none);
            let hurry = gone || self.attempt.abort.is_cancelled();
            self.next_in(time_to_end(hurry), Next::EndSrun);
        }
    }

    fn start(&mut self, rank: usize) {
        if let Some(Some(line)) = self.lines.get(rank) {
            // The first message always has room.
            line.to.try_send(self.start.clone()).ok();
            self.begins.add(rank, Instant::now() + BEGIN);
        }
        if matches!(self.next, Some((_, Next::Missing))) {
            self.next = None;
            if !self.table.awaited().is_empty() {
                self.next_in(CONNECT, Next::Missing);
            }
        }
    }

    /// The helper of the rank hangs: the attempt fails, unless the ranks are being ended already.
    fn never_began(&mut self, rank: usize) {
        self.begins = Begins::default();
        if self.table.is_ending() {
            return;
        }
        self.failure = Some(format!(
            "rank {rank} on {} has not started its program within {} minutes: its helper hangs there, most likely in a file system that \
             has the image or a volume",
            self.table.host(rank),
            BEGIN.as_secs() / 60
        ));
        self.table.stop();
        self.kill_ranks();
    }

    /// Rank 0 runs on this node: its state is that of the container, whose processes are those of its PID namespace.
    async fn first_runs(&mut self, rank: pb::RankRunning) {
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
        let (Some(identity), Some((spec, hub))) = (Identity::of(rank.pid), self.program.take())
        else {
            return;
        };
        let program = Program {
            identity,
            beside: None,
            kept: Kept::default(),
            ids: Vec::new(),
            shown: false,
            isolated: self.isolated && !rank.shares_processes,
            spec,
            hub,
            ranks: Some(Ranks {
                signals: self.signals.0.clone(),
                streams: self.opens.0.clone(),
            }),
        };
        // The supervisor outlives its attempts.
        let event = running(self.attempt, Arc::new(program));
        self.attempt.events.send(event).await.ok();
    }

    /// Sends the signal to all helpers.
    fn tell(&self, signal: Signal) {
        let Some(frame) = frame_of(to_rank::Message::Signal(signal.as_raw())) else {
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
                self.failure = Some(format!(
                    "these ranks have not connected to the shim on {} within {} minutes: {}; compute nodes must reach each \
                     other by TCP, and the log of the container has what srun says",
                    node_name(),
                    CONNECT.as_secs() / 60,
                    named(&self.table.awaited())
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
}

/// PURE: how long srun may go on once all ranks have ended. `hurry`: no helper is connected any more, or the pod is killed.
fn time_to_end(hurry: bool) -> Duration {
    if hurry { AFTER_KILL } else { REMOVAL }
}

/// PURE: the message with its length in front; `None` if it is too long.
fn frame_of(message: to_rank::Message) -> Option<Bytes> {
    let message = pb::ToRank {
        message: Some(message),
    };
    let frame = wire::frame(&message).ok()?;
    (frame.len() <= wire::TO_RANK).then_some(frame)
}

/// PURE: the first of these ranks, and how many more there are.
fn named(ranks: &[usize]) -> String {
    let first: Vec<String> = ranks.iter().take(NAMED).map(usize::to_string).collect();
    let first = first.join(", ");
    match ranks.len().saturating_sub(NAMED) {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}

async fn due<T>(next: Option<(Instant, T)>) -> T {
    match next {
        Some((at, next)) => {
            sleep_until(at).await;
            next
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_some_of_many_ranks() {
        assert_eq!(named(&[1, 3]), "1, 3");
        let many: Vec<usize> = (0..1024).collect();
        assert!(named(&many).ends_with("14, 15 and 1008 more"));
    }

    #[test]
    fn helpers_have_the_time_that_they_take_at_most_to_remove_what_ranks_wrote() {
        use crate::scratch::LAST_REMOVAL;
        // Of the container's folders, and of what the ranks on the node share.
        assert!(time_to_end(false) > LAST_REMOVAL * 3);
        assert!(time_to_end(true) < time_to_end(false));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_due_comes_at_its_time_and_nothing_without_one() {
        let begun = Instant::now();
        let at = begun + AFTER_KILL;
        assert_eq!(due(Some((at, Next::EndSrun))).await, Next::EndSrun);
        assert_eq!(begun.elapsed(), AFTER_KILL);
        let never = tokio::time::timeout(CONNECT, due::<Next>(None)).await;
        assert!(never.is_err());
    }
}
