//! PURE: how long a pod that could start waits for its values. A job that waits holds nodes that others want.

use std::time::Duration;

use super::super::plan::{self, Action, Time, View};

/// Since when the pod waits, and for how long it may.
#[derive(Debug)]
pub(super) struct Patience {
    limit: Duration,
    since: Option<Time>,
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, since: None }
    }

    pub(super) fn limit(&self) -> Duration {
        self.limit
    }

    /// Looks at the pod as it is now; true where it has waited for too long.
    pub(super) fn is_over(&mut self, view: &View) -> bool {
        self.since = starved(view).then(|| self.since.unwrap_or(view.now));
        self.ends().is_some_and(|end| view.now >= end)
    }

    /// When it will have waited for too long.
    pub(super) fn ends(&self) -> Option<Time> {
        self.since.map(|since| since + self.limit)
    }
}

/// Nothing lives, and something would be started, were there values.
fn starved(view: &View) -> bool {
    if view.values || view.kill_at.is_some() || view.containers.iter().any(|one| one.lives()) {
        return false;
    }
    let fed = View {
        values: true,
        ..view.clone()
    };
    let starts = |action: &Action| matches!(action, Action::Start(_));
    plan::decide(&fed).actions.iter().any(starts)
}

#[cfg(test)]
mod tests {
    use knoc_proto::pb::RestartPolicy;

    use super::{
        super::super::plan::{Container, Phase, Signalled},
        *,
    };

    const fn at(seconds: u64) -> Time {
        Time::from_secs(seconds)
    }

    fn view(phase: Phase, values: bool, now: Time) -> View {
        let container = Container {
            phase,
            signalled: Signalled::Nothing,
        };
        View {
            containers: vec![container],
            init: 0,
            policy: RestartPolicy::OnFailure,
            values,
            kill_at: None,
            now,
        }
    }

    #[test]
    fn only_a_pod_that_could_start_is_out_of_patience() {
        let failed = |restart_at| Phase::Exited {
            code: 1,
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
            let mut patience = Patience::new(at(60));
            assert!(!patience.is_over(&view(phase, values, at(10))), "{what}");
            assert_eq!(patience.ends(), expected.then(|| at(70)), "{what}");
            assert!(!patience.is_over(&view(phase, values, at(69))), "{what}");
            let over = patience.is_over(&view(phase, values, at(70)));
            assert_eq!(over, expected, "{what}");
        }
    }

    #[test]
    fn values_in_between_begin_the_wait_anew() {
        let mut patience = Patience::new(at(60));
        assert!(!patience.is_over(&view(Phase::Idle, false, at(0))));
        assert!(!patience.is_over(&view(Phase::Running, true, at(30))));
        assert!(!patience.is_over(&view(Phase::Idle, false, at(80))));
        assert_eq!(patience.ends(), Some(at(140)));
    }
}
