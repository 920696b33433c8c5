//! PURE: the time limits of the whole pod: its active deadline, and how long it may wait for its values, since a job that
//! waits keeps nodes from others.

use std::time::Duration;

use super::super::plan::{self, Action, Container, Time, View};

/// The time limits of the pod, and since when it waits.
#[derive(Debug)]
pub(super) struct Timeouts {
    /// `activeDeadlineSeconds`.
    active_deadline: Option<Time>,
    values: Duration,
    waiting_since: Option<Time>,
}

/// A time limit that has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expired {
    ActiveDeadline,
    /// The values did not come within this time.
    Values(Duration),
}

impl Timeouts {
    pub(super) fn new(active_deadline: Option<Time>, values: Duration) -> Self {
        Self {
            active_deadline,
            values,
            waiting_since: None,
        }
    }

    /// Looks at the pod as it is now. A pod that is being stopped has no time limits any more.
    pub(super) fn check(&mut self, view: &View) -> Option<Expired> {
        self.waiting_since = lacks_values(view).then(|| self.waiting_since.unwrap_or(view.now));
        if view.kill_at.is_some() {
            return None;
        }
        let passed = |limit: Option<Time>| limit.is_some_and(|limit| view.now >= limit);
        if passed(self.active_deadline) {
            Some(Expired::ActiveDeadline)
        } else if passed(self.values_deadline()) {
            Some(Expired::Values(self.values))
        } else {
            None
        }
    }

    /// When the next time limit passes, as of the last check.
    pub(super) fn next(&self, stopping: bool) -> Option<Time> {
        if stopping {
            return None;
        }
        let limits = [self.active_deadline, self.values_deadline()];
        limits.into_iter().flatten().min()
    }

    fn values_deadline(&self) -> Option<Time> {
        self.waiting_since.map(|since| since + self.values)
    }
}

/// Whether no container lives, and one would be started if there were values.
fn lacks_values(view: &View) -> bool {
    if view.values || view.kill_at.is_some() || view.containers.iter().any(Container::lives) {
        return false;
    }
    let with_values = View {
        values: true,
        ..view.clone()
    };
    let starts = |action: &Action| matches!(action, Action::Start(_));
    plan::decide(&with_values).actions.iter().any(starts)
}

#[cfg(test)]
mod tests {
    use super::{
        super::super::{
            plan::{Health, Phase, StopStage},
            role::{RestartRule, Role, SlotId},
        },
        *,
    };

    const fn at(seconds: u64) -> Time {
        Time::from_secs(seconds)
    }

    fn view(phase: Phase, values: bool, now: Time) -> View {
        let container = Container {
            id: SlotId::after(0),
            role: Role::Main,
            restart: RestartRule::OnFailure,
            phase,
            health: Health::down(),
            stop: StopStage::NotStopped,
            pre_stop_pending: false,
            post_start_pending: false,
            spared_until: Time::ZERO,
        };
        View {
            containers: vec![container],
            values,
            kill_at: None,
            last: None,
            now,
        }
    }

    #[test]
    fn only_a_pod_that_could_start_waits_too_long_for_values() {
        let failed = |restart_at| Phase::Exited {
            code: 1,
            unhealthy: false,
            restart_at,
        };
        for (what, phase, values, expected) in [
            ("waits for values", Phase::Idle, false, true),
            ("has values", Phase::Idle, true, false),
            ("runs", Phase::Running, false, false),
            ("starts", Phase::Starting, false, false),
            ("backs off", failed(at(1000)), false, false),
            ("is due again", failed(at(0)), false, true),
        ] {
            let mut timeouts = Timeouts::new(None, at(60));
            assert_eq!(timeouts.check(&view(phase, values, at(10))), None, "{what}");
            assert_eq!(timeouts.next(false), expected.then(|| at(70)), "{what}");
            assert_eq!(timeouts.check(&view(phase, values, at(69))), None, "{what}");
            let over = timeouts.check(&view(phase, values, at(70)));
            assert_eq!(over, expected.then(|| Expired::Values(at(60))), "{what}");
        }
    }

    #[test]
    fn values_that_come_meanwhile_restart_the_wait() {
        let mut timeouts = Timeouts::new(None, at(60));
        assert_eq!(timeouts.check(&view(Phase::Idle, false, at(0))), None);
        assert_eq!(timeouts.check(&view(Phase::Running, true, at(30))), None);
        assert_eq!(timeouts.check(&view(Phase::Idle, false, at(80))), None);
        assert_eq!(timeouts.next(false), Some(at(140)));
    }

    #[test]
    fn the_active_deadline_counts_from_the_start_until_a_stop() {
        let mut timeouts = Timeouts::new(Some(at(30)), at(60));
        let mut view = view(Phase::Idle, false, at(29));
        assert_eq!(timeouts.check(&view), None);
        assert_eq!(timeouts.next(false), Some(at(30)));
        view.now = at(100);
        assert_eq!(timeouts.check(&view), Some(Expired::ActiveDeadline));
        view.kill_at = Some(at(110));
        assert_eq!(timeouts.check(&view), None);
        assert_eq!(timeouts.next(true), None);
    }
}
