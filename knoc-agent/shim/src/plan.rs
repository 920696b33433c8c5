//! PURE: what the supervisor does next, decided from the containers' states alone.
//!
//! Init containers run one after the other, each until it succeeds; then the main ones run in parallel. Restarts obey
//! the pod's policy and a back-off that grows as a kubelet's does: the first restart at once, then `initial`, doubled
//! each time up to `max`, forgotten after a run longer than twice `max`. Once a stop is ordered nothing starts any
//! more: TERM to all that live, KILL at the end of the grace period. Times count from the shim's start.

use std::time::Duration;

use knoc_proto::pb::RestartPolicy;

/// Since the shim's start, by the monotonic clock.
pub(crate) type Time = Duration;

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Never started in this job.
    Idle,
    /// The runtime brings it up.
    Starting,
    /// Its program runs.
    Running,
    /// Its last attempt ended.
    Exited {
        /// Exit code.
        code: i32,
        /// Where it is started again, not before this.
        restart_at: Time,
    },
}

/// The strongest signal sent to the attempt that lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Signalled {
    /// None.
    Nothing,
    /// TERM.
    Term,
    /// KILL.
    Kill,
}

/// One container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Container {
    pub(crate) phase: Phase,
    pub(crate) signalled: Signalled,
}

impl Container {
    pub(crate) fn lives(self) -> bool {
        match self.phase {
            Phase::Starting | Phase::Running => true,
            Phase::Idle | Phase::Exited { .. } => false,
        }
    }
}

/// All that a decision depends on.
#[derive(Debug, Clone)]
pub(crate) struct View {
    /// Init containers first, in order.
    pub(crate) containers: Vec<Container>,
    /// How many of them are init containers.
    pub(crate) init: usize,
    pub(crate) policy: RestartPolicy,
    /// Are there values, and fresh enough for the first start where that is to come?
    pub(crate) values: bool,
    /// When a stop was ordered: the end of its grace period.
    pub(crate) kill_at: Option<Time>,
    pub(crate) now: Time,
}

/// One thing to do to the container of that index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Start(usize),
    Term(usize),
    Kill(usize),
}

/// What to do now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) actions: Vec<Action>,
    /// Decide again then, if nothing happens before.
    pub(crate) wake: Option<Time>,
    /// Nothing lives and nothing will be started: the pod has ended.
    pub(crate) finished: bool,
}

impl Plan {
    fn wake_at(&mut self, at: Time) {
        self.wake = Some(self.wake.map_or(at, |earlier| earlier.min(at)));
    }
}

/// What to do now.
pub(crate) fn decide(view: &View) -> Plan {
    match view.kill_at {
        Some(kill_at) => wind_down(view, kill_at),
        None => go_on(view),
    }
}

/// Would a container be started again after this code?
pub(crate) fn restarts(policy: RestartPolicy, init: bool, code: i32) -> bool {
    match policy {
        RestartPolicy::Never => false,
        RestartPolicy::OnFailure => code != 0,
        // An init container that succeeded is done, whatever the policy.
        RestartPolicy::Always | RestartPolicy::Unspecified => !init || code != 0,
    }
}

fn wind_down(view: &View, kill_at: Time) -> Plan {
    let mut plan = Plan::default();
    let living = view
        .containers
        .iter()
        .enumerate()
        .filter(|(_, container)| container.lives());
    for (index, container) in living.clone() {
        if view.now >= kill_at {
            if container.signalled < Signalled::Kill {
                plan.actions.push(Action::Kill(index));
            }
        } else {
            plan.wake_at(kill_at);
            if container.signalled < Signalled::Term {
                plan.actions.push(Action::Term(index));
            }
        }
    }
    plan.finished = living.count() == 0;
    plan
}

fn go_on(view: &View) -> Plan {
    let mut plan = Plan::default();
    let (init, main) = view
        .containers
        .split_at(view.init.min(view.containers.len()));
    for (index, container) in init.iter().enumerate() {
        if matches!(container.phase, Phase::Exited { code: 0, .. }) {
            continue;
        }
        // The next ones wait for this one; where it failed for good, so has the pod.
        plan.finished = !advance(view, &mut plan, index, true, container.phase);
        return plan;
    }
    let mut open = false;
    for (offset, container) in main.iter().enumerate() {
        open |= advance(view, &mut plan, init.len() + offset, false, container.phase);
    }
    plan.finished = !open;
    plan
}

/// Starts one container where it is time; `false` where it is done for good.
fn advance(view: &View, plan: &mut Plan, index: usize, init: bool, phase: Phase) -> bool {
    let start_at = match phase {
        Phase::Starting | Phase::Running => return true,
        Phase::Exited { code, .. } if !restarts(view.policy, init, code) => return false,
        Phase::Exited { restart_at, .. } => restart_at,
        Phase::Idle => Time::ZERO,
    };
    if view.now < start_at {
        plan.wake_at(start_at);
    } else if view.values {
        plan.actions.push(Action::Start(index));
    }
    true
}

/// The restart back-off of one container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Backoff {
    initial: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) fn new(initial: Duration, max: Duration) -> Self {
        Self {
            initial,
            max,
            next: Duration::ZERO,
        }
    }

    /// How long to wait after an attempt that ran for `ran`.
    pub(crate) fn after(&mut self, ran: Duration) -> Duration {
        if ran > self.max * 2 {
            self.next = Duration::ZERO;
        }
        let wait = self.next;
        self.next = (wait * 2).clamp(self.initial, self.max.max(self.initial));
        wait
    }
}

#[cfg(test)]
mod tests;
