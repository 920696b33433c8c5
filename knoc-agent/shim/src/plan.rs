//! PURE: what the supervisor does next, decided from the roles and states of the containers alone.
//!
//! # The startup sequence
//!
//! Init containers and sidecars start one after the other, in the order of the pod. An init container opens its gate
//! when it has succeeded, a sidecar when it has *started* (its startup probe has passed, or it has none). Once a gate is
//! open the next container starts. Behind the last gate the main containers start in the order of the pod, each once the program of
//! the one before it runs, or could not be started. A sidecar that fails later closes no gate behind which something was started
//! already. Ephemeral containers start as soon as they are added.
//!
//! # One container
//!
//! ```text
//!            Start              the program runs
//!     Idle ─────────► Starting ──────────────────► Running { started, ready, live }
//!                      ▲    │                         │
//!                      │    │ cannot be started       │ the program has ended
//!                      │    └─────────► Exited ◄──────┘
//!                      └──────────────────┘
//!             Start: its restart rule says so and the back-off is over
//! ```
//!
//! If a container has ended with an exit code whose rule is [`RestartRule::All`], all others but the ephemeral ones get KILL at
//! once, and when they have ended, all go to `Again` and begin anew with the startup sequence, whatever their own rules. The container
//! that caused it waits for its own back-off when its turn comes.
//!
//! A container that cannot be configured, because a file with its variables is missing for example, goes from `Starting` to
//! `Unconfigured`. No attempt has begun then, so it is started again after a pause, whatever its restart rule, and holds up no
//! other.
//!
//! Its stop goes one way, until the attempt has ended; the next attempt begins at `NotStopped` again:
//!
//! ```text
//!     NotStopped ───► PreStop ───► Term ───► Kill       at the end of the grace period: Kill, but not before Term
//!          └─── without a hook ─────▲
//! ```
//!
//! A main container that is being started holds up those behind it in the list, as with a kubelet, and one with a postStart hook
//! until the hook has ended: programs may rely on that order (the executor of Argo Workflows does). A preStop hook may
//! take the whole grace period, and so may the containers that a sidecar waits for; the program still gets a moment between TERM
//! and KILL.
//!
//! A container is stopped because the pod is, or alone if a probe found that it is not live any more or if it has another
//! image. In the second case it is restarted whatever its exit code, unless its restart rule is `Never`: a program that ends
//! well on TERM was not well before. In the third case it is always restarted.
//!
//! # The pod
//!
//! ```text
//!     Running ──► Completed ──► (sidecars and ephemeral containers are stopped) ──► Finished
//!        └──────────────── a stop is ordered ────────────────────────────────────────▲
//! ```
//!
//! A pod has completed if an init container has failed for good or all main containers have ended for good. The
//! supervisor then orders a stop, as anybody else might have. In a stop nothing starts any more; sidecars are stopped
//! after all main containers, and one after the other in reverse order.
//!
//! The back-off between two attempts grows as a kubelet's does: the first restart at once, then `initial`, doubled each
//! time up to `max`, and reset by a run longer than twice `max`. Times count from the shim's start.

use std::time::Duration;

use super::role::{RestartRule, Role, SlotId};

/// How long a program has between TERM and KILL at least, as in Kubernetes.
pub(crate) const AFTER_TERM: Duration = Duration::from_secs(2);

/// A point in time, as the time since the shim's start by the monotonic clock.
pub(crate) type Time = Duration;

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It was never started in this job.
    Idle,
    /// The runtime is creating it.
    Starting,
    /// Its program runs.
    Running,
    /// It could not be configured, so its attempt has not begun.
    Unconfigured {
        /// It is not tried again before this time.
        retry_at: Time,
    },
    /// All containers of the pod begin anew, and its turn has not come yet.
    Again {
        /// It is not started before this time.
        restart_at: Time,
    },
    /// Its last attempt has ended.
    Exited {
        code: i32,
        /// It was stopped because a startup or liveness probe failed.
        unhealthy: bool,
        /// It is not restarted before this time, if it is restarted at all.
        restart_at: Time,
    },
}

impl Phase {
    /// The exit code, if the last attempt has ended.
    pub(crate) fn code(self) -> Option<i32> {
        match self {
            Self::Exited { code, .. } => Some(code),
            Self::Idle
            | Self::Starting
            | Self::Running
            | Self::Unconfigured { .. }
            | Self::Again { .. } => None,
        }
    }

    /// Whether a container with this rule has ended and will never be restarted.
    pub(crate) fn is_final(self, rule: RestartRule) -> bool {
        match self {
            Self::Exited {
                code, unhealthy, ..
            } => !rule.restarts(code, unhealthy),
            Self::Idle
            | Self::Starting
            | Self::Running
            | Self::Unconfigured { .. }
            | Self::Again { .. } => false,
        }
    }

    /// Its turn in the startup sequence has not come yet, for the first time or anew.
    fn is_before_its_turn(self) -> bool {
        matches!(self, Self::Idle | Self::Again { .. })
    }
}

/// What is known about the health of the running program. A container without probes has [`Health::unprobed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Health {
    /// Its startup probe has passed.
    pub(crate) started: bool,
    /// Its readiness probe passes.
    pub(crate) ready: bool,
    pub(crate) live: Liveness,
}

/// What startup and liveness probes say of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Liveness {
    Live,
    /// A probe failed too often: the container is stopped, at the latest at the end of the probe's grace period.
    Failed {
        kill_at: Time,
    },
}

impl Health {
    /// Of a container whose program does not run.
    pub(crate) const fn down() -> Self {
        Self {
            started: false,
            ready: false,
            live: Liveness::Live,
        }
    }

    /// Of a container whose program runs and that has no probes.
    pub(crate) const fn unprobed() -> Self {
        Self {
            started: true,
            ready: true,
            live: Liveness::Live,
        }
    }
}

/// How far the stop of the running attempt has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum StopStage {
    NotStopped,
    /// Its preStop hook was started.
    PreStop,
    /// TERM was sent.
    Term,
    /// KILL was sent.
    Kill,
}

/// One container, as far as decisions depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Container {
    pub(crate) id: SlotId,
    pub(crate) role: Role,
    /// If it has ended, the rule for its exit code.
    pub(crate) restart: RestartRule,
    pub(crate) phase: Phase,
    pub(crate) health: Health,
    pub(crate) stop: StopStage,
    /// It has a preStop hook that has not ended in this attempt. TERM waits for it.
    pub(crate) pre_stop_pending: bool,
    /// It has a postStart hook that has not ended in this attempt.
    pub(crate) post_start_pending: bool,
    /// KILL waits until then, whatever the grace period: TERM came late, because of a preStop hook or after others.
    pub(crate) spared_until: Time,
}

impl Container {
    pub(crate) fn lives(&self) -> bool {
        match self.phase {
            Phase::Starting | Phase::Running => true,
            Phase::Idle
            | Phase::Unconfigured { .. }
            | Phase::Again { .. }
            | Phase::Exited { .. } => false,
        }
    }

    pub(crate) fn succeeded(&self) -> bool {
        matches!(self.phase, Phase::Exited { code: 0, .. })
    }

    /// Those behind it in the list wait until its program runs, and for its postStart hook.
    fn holds_up_others(&self) -> bool {
        match self.phase {
            Phase::Starting => true,
            Phase::Idle | Phase::Running => self.post_start_pending,
            Phase::Unconfigured { .. } | Phase::Again { .. } | Phase::Exited { .. } => false,
        }
    }

    /// It has ended, and its exit code has all containers of the pod begin anew.
    fn restarts_all(&self) -> bool {
        let ended = self.role != Role::Ephemeral && self.phase.code().is_some();
        ended && self.restart == RestartRule::All
    }

    /// Its program may not know yet that it is to end: even without a grace period, TERM comes before KILL.
    fn is_to_be_told(&self) -> bool {
        match self.stop {
            StopStage::NotStopped => self.phase == Phase::Running,
            StopStage::PreStop => true,
            StopStage::Term | StopStage::Kill => false,
        }
    }

    /// It has ended and will never be restarted.
    fn ended_for_good(&self) -> bool {
        self.phase.is_final(self.restart)
    }
}

/// Everything that a decision depends on.
#[derive(Debug, Clone)]
pub(crate) struct View {
    /// By id: init containers and sidecars in the order in which they start. Others may stand anywhere between.
    pub(crate) containers: Vec<Container>,
    /// There are values; before the pod's first start, they are fresh enough too.
    pub(crate) values: bool,
    /// The end of the grace period, once a stop was ordered.
    pub(crate) kill_at: Option<Time>,
    /// The job itself is killed soon after this time: no program is spared beyond it.
    pub(crate) last: Option<Time>,
    pub(crate) now: Time,
}

impl View {
    /// Init containers and sidecars, in the order in which they start.
    fn startup_sequence(&self) -> impl Iterator<Item = &Container> {
        self.containers
            .iter()
            .filter(|one| matches!(one.role, Role::Init | Role::Sidecar))
    }

    fn of_role(&self, role: Role) -> impl Iterator<Item = &Container> {
        self.containers.iter().filter(move |one| one.role == role)
    }

    fn living(&self) -> impl Iterator<Item = &Container> {
        self.containers.iter().filter(|one| one.lives())
    }

    /// Whether what comes after `container` in the startup sequence may start.
    fn opens_gate(&self, container: &Container) -> bool {
        match container.role {
            Role::Init => container.succeeded(),
            Role::Sidecar => container.health.started || self.started_after(container),
            Role::Main | Role::Ephemeral => true,
        }
    }

    /// Whether anything that starts after `sidecar` was started in this job.
    fn started_after(&self, sidecar: &Container) -> bool {
        let mut after = self
            .startup_sequence()
            .filter(|one| one.id > sidecar.id)
            .chain(self.of_role(Role::Main));
        after.any(|one| !one.phase.is_before_its_turn())
    }

    /// Whether the startup sequence is over: main containers may start.
    pub(crate) fn initialized(&self) -> bool {
        self.startup_sequence().all(|one| self.opens_gate(one))
    }

    /// Whether all containers are ended because they begin anew.
    pub(crate) fn starts_over(&self) -> bool {
        let one = self.containers.iter().any(Container::restarts_all);
        // A container that was killed for it has not ended by itself, even if its own rule would not restart it.
        let mut deciding = self.of_role(Role::Init).chain(self.of_role(Role::Main));
        let killed = deciding.any(|one| one.stop == StopStage::Kill);
        one && self.kill_at.is_none() && (killed || !self.completed())
    }

    /// Whether all containers that decide the pod's phase have succeeded.
    pub(crate) fn succeeded(&self) -> bool {
        let mut deciding = self.of_role(Role::Init).chain(self.of_role(Role::Main));
        deciding.all(Container::succeeded)
    }

    /// Whether the containers that decide the pod's phase have ended for good.
    fn completed(&self) -> bool {
        let failed = |init: &Container| !init.succeeded() && init.ended_for_good();
        self.of_role(Role::Init).any(failed)
            || self.initialized() && self.of_role(Role::Main).all(Container::ended_for_good)
    }

    /// Whether a stop has to wait for others before it comes to `container`: a sidecar is stopped after all main
    /// containers and all sidecars that started after it.
    fn is_needed_by_others(&self, container: &Container) -> bool {
        let needs = |other: &Container| match other.role {
            Role::Main => true,
            Role::Sidecar => other.id > container.id,
            Role::Init | Role::Ephemeral => false,
        };
        container.role == Role::Sidecar && self.living().any(needs)
    }
}

/// One thing to do to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Start(SlotId),
    PreStop(SlotId),
    Term(SlotId),
    Kill(SlotId),
}

/// How far the pod is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Progress {
    #[default]
    Running,
    /// All containers begin anew, and have ended for that: their phases are to become `Again`.
    StartsOver,
    /// The containers that decide its phase have ended for good. Others still live: a stop is due.
    Completed,
    /// Nothing lives and nothing will be started.
    Finished,
}

/// What to do now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) actions: Vec<Action>,
    /// Decide again at this time, if nothing happens before.
    pub(crate) wake: Option<Time>,
    pub(crate) progress: Progress,
}

impl Plan {
    fn wake_at(&mut self, at: Time) {
        self.wake = Some(self.wake.map_or(at, |earlier| earlier.min(at)));
    }

    /// Starts or restarts `container` if it is time.
    fn start(&mut self, view: &View, container: &Container) {
        let start_at = match container.phase {
            Phase::Starting | Phase::Running => return,
            Phase::Exited { .. } if container.ended_for_good() => return,
            Phase::Exited { restart_at, .. } | Phase::Again { restart_at } => restart_at,
            Phase::Unconfigured { retry_at } => retry_at,
            Phase::Idle => Time::ZERO,
        };
        if view.now < start_at {
            self.wake_at(start_at);
        } else if view.values {
            self.actions.push(Action::Start(container.id));
        }
    }

    fn starts(&self, container: &Container) -> bool {
        self.actions.contains(&Action::Start(container.id))
    }

    /// Takes the next step of the stop of `container`, which lives.
    fn stop(&mut self, (now, last): (Time, Option<Time>), container: &Container, kill_at: Time) {
        let last = last.unwrap_or(Time::MAX);
        if now >= kill_at && now < last && container.is_to_be_told() {
            self.actions.push(Action::Term(container.id));
            self.wake_at(last.min(now + AFTER_TERM));
            return;
        }
        let kill_at = kill_at.max(container.spared_until.min(last));
        if now >= kill_at {
            if container.stop < StopStage::Kill {
                self.actions.push(Action::Kill(container.id));
            }
            return;
        }
        self.wake_at(kill_at);
        // A hook runs in the container, so there is none before the program runs.
        let hook = container.pre_stop_pending && container.phase == Phase::Running;
        match container.stop {
            StopStage::NotStopped if hook => self.actions.push(Action::PreStop(container.id)),
            StopStage::PreStop if hook => {}
            StopStage::NotStopped | StopStage::PreStop => {
                self.actions.push(Action::Term(container.id));
            }
            StopStage::Term | StopStage::Kill => {}
        }
    }
}

/// What to do now.
pub(crate) fn decide(view: &View) -> Plan {
    match view.kill_at {
        Some(kill_at) => wind_down(view, kill_at),
        None if view.starts_over() => start_over(view),
        None if view.completed() => complete(view),
        None => go_on(view),
    }
}

fn complete(view: &View) -> Plan {
    let progress = if view.living().next().is_some() {
        Progress::Completed
    } else {
        Progress::Finished
    };
    Plan {
        progress,
        ..Plan::default()
    }
}

fn wind_down(view: &View, kill_at: Time) -> Plan {
    let mut plan = Plan::default();
    for container in view.living() {
        match container.health.live {
            Liveness::Failed { kill_at: own } => {
                plan.stop((view.now, view.last), container, own.min(kill_at));
            }
            Liveness::Live if view.now < kill_at && view.is_needed_by_others(container) => {
                plan.wake_at(kill_at);
            }
            Liveness::Live => plan.stop((view.now, view.last), container, kill_at),
        }
    }
    if view.living().next().is_none() {
        plan.progress = Progress::Finished;
    }
    plan
}

/// Ends all containers without a grace period, as a kubelet does; ephemeral ones go on.
fn start_over(view: &View) -> Plan {
    let mut plan = Plan {
        progress: Progress::StartsOver,
        ..Plan::default()
    };
    for container in &view.containers {
        if container.role == Role::Ephemeral {
            plan.start(view, container);
        } else if container.lives() {
            plan.progress = Progress::Running;
            if container.stop < StopStage::Kill {
                plan.actions.push(Action::Kill(container.id));
            }
        }
    }
    plan
}

fn go_on(view: &View) -> Plan {
    let mut plan = Plan::default();
    for container in view.of_role(Role::Ephemeral) {
        plan.start(view, container);
    }
    for container in view.startup_sequence() {
        plan.start(view, container);
        if !view.opens_gate(container) {
            break;
        }
    }
    if view.initialized() {
        for container in view.of_role(Role::Main) {
            plan.start(view, container);
            if plan.starts(container) || container.holds_up_others() {
                break;
            }
        }
    }
    for container in view.living() {
        if let Liveness::Failed { kill_at } = container.health.live {
            plan.stop((view.now, view.last), container, kill_at);
        }
    }
    plan
}

/// The restart back-off of one container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Backoff {
    initial: Duration,
    max: Duration,
    next: Duration,
    /// What it was before the last attempt ended.
    before: Duration,
}

impl Backoff {
    pub(crate) fn new(initial: Duration, max: Duration) -> Self {
        Self {
            initial,
            max,
            next: Duration::ZERO,
            before: Duration::ZERO,
        }
    }

    /// The last attempt does not count: its end was not its own.
    pub(crate) fn take_back(&mut self) {
        self.next = self.before;
    }

    /// Begins anew, as for a container that has not ended yet.
    pub(crate) fn reset(&mut self) {
        self.next = Duration::ZERO;
    }

    /// The first pause that is not zero: how long to wait for a container that could not be configured.
    pub(crate) fn initial(&self) -> Duration {
        self.initial
    }

    /// How long to wait after an attempt that ran for `ran`.
    pub(crate) fn after(&mut self, ran: Duration) -> Duration {
        if ran > self.max * 2 {
            self.next = Duration::ZERO;
        }
        let wait = self.next;
        self.before = wait;
        self.next = (wait * 2).clamp(self.initial, self.max.max(self.initial));
        wait
    }
}

#[cfg(test)]
mod tests;
