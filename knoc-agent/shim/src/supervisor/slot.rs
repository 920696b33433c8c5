//! One container as the supervisor keeps it: its spec, the history of its attempts, and the state of its stop.

use std::sync::Arc;

use jiff::Timestamp;
use knoc_contract::logs::read::Follow;
use knoc_proto::pb::{self, container_status::State};
use rustix::process::Signal;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::super::{
    container::{Ended, Program},
    directory::{Entry, Log},
    health::{self, Change},
    plan::{AFTER_TERM, Backoff, Container, Health, Liveness, Phase, StopStage, Time},
    ranks::table::Loss,
    report::{self, History},
    role::{ContainerSpec, RestartRule, Role},
    signals::{self, Identity},
    usage::{Account, Counters},
};

/// One container of the pod.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) spec: Arc<ContainerSpec>,
    pub(super) phase: Phase,
    /// What its hook and its probes say. A container without any is healthy as soon as its program runs.
    pub(super) health: Health,
    pending: PendingHooks,
    /// See [`Container::spared_until`].
    spared_until: Time,
    /// The postStart hook and the probes of the running program.
    probing: Option<Probing>,
    /// A startup or liveness probe of the running program has failed.
    unhealthy: bool,
    /// Held while the preStop hook may go on.
    stopping: Option<DropGuard>,
    /// How far the stop of the running attempt has gone.
    stop: StopStage,
    /// The signal that asks its program to end.
    signal: Signal,
    pub(super) history: History,
    pub(super) program: Option<Arc<Program>>,
    pub(super) abort: CancellationToken,
    /// Counts what the running attempt uses.
    pub(super) account: Account,
    /// What the attempts before it used.
    pub(super) used_before: Counters,
    /// The attempt is stopped, at the latest at that time, because the container has another image now; the next one begins at
    /// once.
    replaced: Option<Time>,
    /// The program whose processes the attempt shares.
    pub(super) target: Option<Identity>,
    /// How many lost lines of the running attempt's log were reported.
    pub(super) lost_lines: u64,
    /// How a rank of the attempt that ended last was lost, if one was.
    pub(super) lost_rank: Option<Loss>,
    backoff: Backoff,
    /// Whether any attempt has begun, in this job or in an earlier run of it.
    tried: bool,
    /// Held while the attempt lasts; when it ends, the followers of its log stop.
    ending: Option<watch::Sender<bool>>,
    log: Option<Log>,
    previous_log: Option<Log>,
}

/// Which hooks of the running attempt have not ended yet.
#[derive(Debug)]
struct PendingHooks {
    post_start: bool,
    /// The postStart hook has not succeeded. If it has failed, that stays so.
    post_start_success: bool,
    pre_stop: bool,
}

impl PendingHooks {
    /// All hooks that the container has.
    fn of(container: &pb::Container) -> Self {
        Self {
            post_start: container.post_start.is_some(),
            post_start_success: container.post_start.is_some(),
            pre_stop: container.pre_stop.is_some(),
        }
    }
}

/// What the task of the postStart hook and the probes is told.
#[derive(Debug)]
struct Probing {
    /// The container is to stop.
    stop: CancellationToken,
    /// The program has ended.
    _end: DropGuard,
}

impl Slot {
    /// A container that was not started in this job; `before` is what an earlier run of the job reported about it.
    pub(super) fn new(
        spec: ContainerSpec,
        backoff: Backoff,
        before: Option<&pb::ContainerStatus>,
    ) -> Self {
        let mut history = History::default();
        let mut tried = false;
        if let Some(before) = before {
            history.attempt = u32::try_from(before.restart_count).unwrap_or_default();
            (tried, history.ended) = match &before.state {
                Some(State::Running(_)) => (true, before.last_termination.clone()),
                Some(State::Terminated(ended)) => (true, Some(ended.clone())),
                Some(State::Waiting(_)) | None => (
                    before.last_termination.is_some(),
                    before.last_termination.clone(),
                ),
            };
        }
        Self {
            pending: PendingHooks::of(&spec.container),
            spared_until: Time::ZERO,
            probing: None,
            unhealthy: false,
            stopping: None,
            spec: Arc::new(spec),
            phase: Phase::Idle,
            health: Health::down(),
            stop: StopStage::NotStopped,
            signal: Signal::TERM,
            history,
            program: None,
            abort: CancellationToken::new(),
            account: Account::default(),
            used_before: Counters::default(),
            replaced: None,
            target: None,
            lost_lines: 0,
            lost_rank: None,
            backoff,
            tried,
            ending: None,
            log: None,
            previous_log: None,
        }
    }

    pub(super) fn view(&self) -> Container {
        Container {
            id: self.spec.id,
            role: self.spec.role,
            restart: self.restart(),
            phase: self.phase,
            health: match self.replaced {
                Some(kill_at) => Health {
                    live: Liveness::Failed { kill_at },
                    ..self.health
                },
                None => self.health,
            },
            stop: self.stop,
            pre_stop_pending: self.pending.pre_stop,
            post_start_pending: self.pending.post_start,
            spared_until: self.spared_until,
        }
    }

    /// Whether the container is restarted after the attempt that has ended, or runs.
    pub(super) fn restart(&self) -> RestartRule {
        match self.replaced {
            Some(_) => RestartRule::Always,
            None => self.spec.restart_after(self.phase.code()),
        }
    }

    /// The container has another image from now on. Returns whether an attempt has to be stopped for that, at the latest at
    /// `kill_at`: as in a kubelet, an init container that runs goes on.
    pub(super) fn renew(&mut self, image: pb::ResolvedImage, kill_at: Time) -> bool {
        let mut spec = (*self.spec).clone();
        spec.container.image.clone_from(&image.image);
        spec.image = image;
        self.spec = Arc::new(spec);
        match &mut self.phase {
            Phase::Idle => false,
            Phase::Starting | Phase::Running if self.spec.role == Role::Init => false,
            Phase::Starting | Phase::Running => {
                let news = self.replaced.is_none();
                self.replaced.get_or_insert(kill_at);
                news
            }
            Phase::Unconfigured { retry_at } => {
                *retry_at = Time::ZERO;
                false
            }
            Phase::Again { restart_at } | Phase::Exited { restart_at, .. } => {
                *restart_at = Time::ZERO;
                self.history.pause = Time::ZERO;
                self.backoff.reset();
                false
            }
        }
    }

    /// All containers of the pod begin anew, so that this one starts again in its turn, whatever its rule. Only the one that
    /// caused it waits for its back-off, and those that caused it before and have not had their turn since: if two that crash did
    /// end each other's back-off, the pod would begin anew without a pause.
    pub(super) fn start_over(&mut self) {
        let mut at = Time::ZERO;
        match self.phase {
            Phase::Idle => return,
            Phase::Again { restart_at } => at = restart_at,
            Phase::Exited {
                restart_at,
                unhealthy,
                ..
            } if self.restart() == RestartRule::All
                && (unhealthy || self.stop < StopStage::Kill) =>
            {
                at = restart_at;
            }
            Phase::Exited { .. } if self.spec.may_restart_all() => self.backoff.take_back(),
            Phase::Starting
            | Phase::Running
            | Phase::Unconfigured { .. }
            | Phase::Exited { .. } => self.backoff.reset(),
        }
        self.phase = Phase::Again { restart_at: at };
    }

    /// A new attempt begins. Returns the channel on which it says how much of its log is written.
    pub(super) fn begin(&mut self) -> watch::Sender<u64> {
        if self.tried {
            self.history.attempt += 1;
        }
        self.tried = true;
        self.phase = Phase::Starting;
        self.health = Health::down();
        self.unhealthy = false;
        self.stop = StopStage::NotStopped;
        self.signal = stop_signal(&self.spec);
        self.replaced = None;
        self.history.image = Some(report::RanImage::of(&self.spec));
        self.pending = PendingHooks::of(&self.spec.container);
        self.spared_until = Time::ZERO;
        self.abort = CancellationToken::new();
        self.history.started_at = None;
        self.lost_lines = 0;
        let (written, news) = watch::channel(0);
        let (ending, ended) = watch::channel(false);
        self.ending = Some(ending);
        self.previous_log = self.log.take();
        let follow = Follow {
            written: Some(news),
            ended,
        };
        self.log = Some(Log {
            attempt: self.history.attempt,
            follow,
        });
        written
    }

    /// Whether the attempt failed because the container whose processes it was to share has ended meanwhile.
    pub(super) fn has_lost_target(&self) -> bool {
        let gone = self.target.is_some_and(|target| !target.runs());
        gone && self.history.started_at.is_none() && !self.abort.is_cancelled()
    }

    /// The attempt does not count: the next one begins once its target runs again.
    pub(super) fn take_back(&mut self) {
        self.phase = Phase::Idle;
        self.uncount();
    }

    /// The attempt does not count, because the container could not be configured; the next one begins after a pause. Returns
    /// whether `why` is news.
    pub(super) fn hold(&mut self, why: &str, now: Time) -> bool {
        self.phase = Phase::Unconfigured {
            retry_at: now + self.backoff.initial(),
        };
        self.uncount();
        let news = self.history.unconfigured != why;
        why.clone_into(&mut self.history.unconfigured);
        news
    }

    /// The next attempt has the number of this one, which has written no log.
    fn uncount(&mut self) {
        self.tried = false;
        self.target = None;
        self.log = self.previous_log.take();
        if let Some(ending) = self.ending.take() {
            ending.send_replace(true);
        }
    }

    /// The program runs.
    pub(super) fn running(&mut self, program: Arc<Program>, started_at: Timestamp) {
        self.phase = Phase::Running;
        self.history.unconfigured.clear();
        if !self.pending.post_start {
            self.health = health::at_start(&self.spec.container);
        }
        self.history.started_at = Some(started_at);
        self.history.user.clone_from(&program.ids);
        // A stop may have come before there was a program to send TERM to. The next plan sends it again.
        if self.stop == StopStage::Term {
            self.stop = StopStage::NotStopped;
        }
        self.program = Some(program);
    }

    /// The postStart hook and the probes of the running program begin. Returns what is cancelled when the container is to
    /// stop, and what is cancelled when the program has ended, and the task with it.
    pub(super) fn begin_probing(&mut self) -> (CancellationToken, CancellationToken) {
        let (stop, end) = (CancellationToken::new(), CancellationToken::new());
        self.probing = Some(Probing {
            stop: stop.clone(),
            _end: end.clone().drop_guard(),
        });
        (stop, end)
    }

    /// The preStop hook begins. It goes on until the token is cancelled.
    pub(super) fn begin_pre_stop(&mut self) -> CancellationToken {
        let token = CancellationToken::new();
        self.stopping = Some(token.clone().drop_guard());
        token
    }

    /// The container is to stop: of its probes only that of readiness goes on, as in Kubernetes.
    pub(super) fn stop_probing(&mut self) {
        if let Some(probing) = &self.probing {
            probing.stop.cancel();
        }
    }

    /// Whether a result of a hook or probe counts: the program runs and, if the result is a failure, is not told to stop yet.
    fn counts(&self, fails: bool) -> bool {
        let probing = self.probing.as_ref();
        probing.is_some_and(|probing| !(fails && probing.stop.is_cancelled()))
    }

    /// A probe has changed what is known. Returns whether that counts. `failed`: what follows if the change is a failure.
    pub(super) fn probed(&mut self, change: Change, failed: Liveness) -> bool {
        let fails = matches!(change, Change::Failed(_));
        if !self.counts(fails) {
            return false;
        }
        self.health = health::after(self.health, change, &self.spec.container);
        if fails {
            self.health.live = failed;
            self.unhealthy = true;
        }
        true
    }

    /// The postStart hook has ended. Returns whether that counts.
    pub(super) fn post_started(&mut self, succeeded: bool, failed: Liveness) -> bool {
        if !self.counts(!succeeded) {
            return false;
        }
        self.pending.post_start = false;
        if succeeded {
            self.pending.post_start_success = false;
            self.health = health::at_start(&self.spec.container);
        } else {
            self.health.live = failed;
        }
        true
    }

    /// Whether its program runs, and its postStart hook has not succeeded. Kubernetes does not show it as running yet.
    pub(super) fn in_post_start(&self) -> bool {
        self.phase == Phase::Running && self.pending.post_start_success
    }

    /// The preStop hook has ended, so the plan sends TERM.
    pub(super) fn pre_stopped(&mut self) {
        self.pending.pre_stop = false;
    }

    /// Takes a step of the stop.
    pub(super) fn stop(&mut self, stage: StopStage, now: Time) {
        if stage == StopStage::Term {
            self.spared_until = now + AFTER_TERM;
        }
        if stage > StopStage::PreStop {
            self.stopping = None;
        }
        self.stop = stage;
        self.stop_probing();
        match stage {
            // The supervisor starts the hook, whose end lets the plan send TERM.
            StopStage::NotStopped | StopStage::PreStop => {}
            StopStage::Term => match &self.program {
                Some(program) => program.signal(self.signal),
                // The program does not run yet: there is nothing that could take the signal.
                None => self.abort.cancel(),
            },
            StopStage::Kill => {
                if let Some(program) = &self.program {
                    program.kill();
                }
                self.abort.cancel();
            }
        }
    }

    /// The attempt ended.
    pub(super) fn end(&mut self, ended: &Ended, id: String, now: Time) {
        let started_at = self.history.started_at;
        self.program = None;
        self.probing = None;
        self.stopping = None;
        self.health = Health::down();
        let mut account = std::mem::take(&mut self.account);
        self.used_before = self.used_before + account.end(ended.used);
        if let Some(ending) = self.ending.take() {
            ending.send_replace(true);
        }
        self.lost_rank = ended.lost;
        self.history.unconfigured.clear();
        self.history.ended_before = self.history.ended.take();
        self.history.ended = Some(report::terminated(ended, started_at, id));
        let ran = started_at.map_or(Time::ZERO, |at| {
            Time::try_from(ended.finished_at.duration_since(at)).unwrap_or_default()
        });
        if self.replaced.is_some() {
            self.backoff.reset();
        }
        self.history.pause = self.backoff.after(ran);
        self.phase = Phase::Exited {
            code: ended.exit.code,
            unhealthy: self.unhealthy,
            restart_at: now + self.history.pause,
        };
    }

    /// What exec, attach and logs need to know about it.
    pub(super) fn entry(&self) -> Entry {
        Entry {
            program: self.program.clone(),
            log: self.log.clone(),
            previous: self.previous_attempt(),
        }
    }

    /// The attempt whose end is the last termination: as in Kubernetes, between two attempts the one that ended last.
    fn previous_attempt(&self) -> Option<u32> {
        let log = self.log.as_ref();
        let waits = match self.phase {
            Phase::Exited { .. } => !self.phase.is_final(self.restart()),
            Phase::Unconfigured { .. } | Phase::Again { .. } => true,
            Phase::Idle | Phase::Starting | Phase::Running => false,
        };
        if waits {
            return log.map(|log| log.attempt);
        }
        let before = self.previous_log.as_ref().map(|log| log.attempt);
        // The attempt before this job's first one belongs to an earlier run.
        before.or_else(|| log.and_then(|log| log.attempt.checked_sub(1)))
    }
}

/// PURE: the signal that asks the program to end: the pod's, else the image's.
fn stop_signal(spec: &ContainerSpec) -> Signal {
    let config = spec.image.config.as_ref();
    let of_image = || config.and_then(pb::ImageConfig::stop_signal_number);
    let own = spec.container.stop_signal_number().or_else(of_image);
    own.and_then(signals::numbered).unwrap_or(Signal::TERM)
}

#[cfg(test)]
mod tests;
