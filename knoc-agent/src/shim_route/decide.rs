//! PURE: how the shims of a site are reached: they dial the agent, or the agent enters their jobs
//! with a step of the scheduler, or neither works.
//!
//! Each trial of `endpoint.json` begins without prejudice: shims dial. The first shim that reaches
//! the agent decides that compute nodes can; as long as none has, the first one that reports a
//! failure decides that they cannot, and from then on shims dial seldom. That is tried again daily.
//! Only reports about the present trial count: what a shim saw while the agent was not running says
//! nothing about the network. Whether steps may enter a job is remembered for a day as well.

use jiff::{SignedDuration, Timestamp};
use knoc_contract::jobdir::schema::{Cause, FoundRoute};
use knoc_proto::{pb, text};

/// How long a finding is relied on before it is tried again.
const AGAIN: SignedDuration = SignedDuration::from_hours(24);

/// The longest text of another process that is kept, in bytes.
const DETAIL: usize = 500;

/// What is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    /// What is remembered on disk.
    pub(super) found: FoundRoute,
    /// A shim has reached the agent during this trial.
    reached: bool,
}

/// How a shim without a link can be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Way {
    /// The shim dials; there is nothing that the agent can do.
    Wait,
    /// By a step that enters its job.
    Step,
    /// Not at all: the scheduler refuses such steps, with this message.
    Refused(String),
}

impl Route {
    /// What an agent that starts at `now` knows from what `found` its predecessor.
    pub(super) fn begin(found: FoundRoute, now: Timestamp) -> Self {
        let mut route = Self {
            found,
            reached: false,
        };
        route.next_trial(now);
        route.expire(now);
        route
    }

    /// Trials are numbered with the time, so that they grow even if the file is lost.
    fn next_trial(&mut self, now: Timestamp) {
        self.found.trial = now.as_second().max(self.found.trial.saturating_add(1));
        self.reached = false;
    }

    /// Forgets what was found a day ago.
    fn expire(&mut self, now: Timestamp) {
        for cause in [&mut self.found.isolated, &mut self.found.refused] {
            cause.take_if(|cause| due(cause) <= now);
        }
    }

    /// When to call [`Self::tick`] at the latest.
    pub(super) fn wake(&self) -> Option<Timestamp> {
        let causes = [&self.found.isolated, &self.found.refused];
        causes.into_iter().flatten().map(due).min()
    }

    /// Tries again what was found a day ago.
    pub(super) fn tick(&mut self, now: Timestamp) {
        let isolated = self.found.isolated.is_some();
        self.expire(now);
        if isolated && self.found.isolated.is_none() {
            self.next_trial(now);
        }
    }

    /// A shim has dialled the agent and proved its key.
    pub(super) fn linked(&mut self) {
        self.reached = true;
        self.found.isolated = None;
    }

    /// A shim has reported its route.
    pub(super) fn reported(&mut self, route: &pb::ShimRoute, now: Timestamp) {
        if route.trial != self.found.trial {
            return;
        }
        if !route.reached.is_empty() {
            self.found.preferred = line(&route.reached);
            self.linked();
        } else if !route.unreachable.is_empty() && !self.reached && self.found.isolated.is_none() {
            self.found.isolated = Some(cause(&route.unreachable, now));
        }
    }

    /// The scheduler has refused a step.
    pub(super) fn refused(&mut self, detail: &str, now: Timestamp) {
        self.found.refused = Some(cause(detail, now));
    }

    /// A step has entered a job.
    pub(super) fn entered(&mut self) {
        self.found.refused = None;
    }

    /// How to reach a shim that last reported `route` and has no link.
    pub(super) fn way(&self, route: &pb::ShimRoute) -> Way {
        let failed = route.trial == self.found.trial && !route.unreachable.is_empty();
        if route.socket.is_empty() || !(failed || self.found.isolated.is_some()) {
            return Way::Wait;
        }
        match &self.found.refused {
            Some(refused) => Way::Refused(refused.detail.clone()),
            None => Way::Step,
        }
    }

    /// The addresses in the order in which shims are to try them.
    pub(super) fn order(&self, mut addresses: Vec<String>) -> Vec<String> {
        let preferred = &self.found.preferred;
        if let Some(at) = addresses.iter().position(|address| address == preferred) {
            addresses[..=at].rotate_right(1);
        }
        addresses
    }

    /// How shims are reached, in one sentence, and whether that works.
    pub(super) fn describe(&self, steps: bool) -> (String, bool) {
        let Some(isolated) = &self.found.isolated else {
            let preferred = &self.found.preferred;
            let text = match (self.reached, preferred.as_str()) {
                (true, "") => "shims dial the agent".to_owned(),
                (true, address) => format!("shims dial the agent, at {address}"),
                (false, _) => "no shim has dialled the agent yet".to_owned(),
            };
            return (text, true);
        };
        let again = due(isolated);
        let cannot = format!(
            "compute nodes cannot reach the agent ({}); tried again at {again}",
            isolated.detail
        );
        match &self.found.refused {
            _ if !steps => (
                format!("{cannot}; limits.srun_links = 0 permits no job step to them"),
                false,
            ),
            None => (
                format!("{cannot}; a job step on demand carries the link"),
                true,
            ),
            Some(refused) => {
                let (detail, again) = (&refused.detail, due(refused));
                (
                    format!(
                        "{cannot}; a job step is refused as well ({detail}), tried again at {again}"
                    ),
                    false,
                )
            }
        }
    }
}

fn cause(detail: &str, now: Timestamp) -> Cause {
    Cause {
        at: now.as_second(),
        detail: line(detail),
    }
}

/// Text of another process, in one short line.
fn line(text: &str) -> String {
    let short = text::shorten(text, DETAIL);
    text::shorten(&text::escape(&short), DETAIL).into_owned()
}

fn due(cause: &Cause) -> Timestamp {
    let at = Timestamp::from_second(cause.at).unwrap_or(Timestamp::UNIX_EPOCH);
    at.checked_add(AGAIN).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 24 * 3600;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + seconds).unwrap()
    }

    fn shim(trial: i64, reached: &str, unreachable: &str) -> pb::ShimRoute {
        pb::ShimRoute {
            socket: "/tmp/s".to_owned(),
            trial,
            reached: reached.to_owned(),
            unreachable: unreachable.to_owned(),
        }
    }

    fn new() -> (Route, i64) {
        let route = Route::begin(FoundRoute::default(), at(0));
        let trial = route.found.trial;
        (route, trial)
    }

    #[test]
    fn the_first_failed_dial_decides_unless_a_shim_got_through() {
        let (mut route, trial) = new();
        assert_eq!(route.way(&shim(0, "", "")), Way::Wait);
        route.reported(&shim(trial, "", "refused"), at(1));
        assert_eq!(
            route.way(&shim(0, "", "")),
            Way::Step,
            "one that has not tried"
        );
        let (text, works) = route.describe(true);
        assert!(works && text.contains("refused"), "{text}");
        assert!(!route.describe(false).1);
        // A shim on another node gets through: shims dial again.
        route.linked();
        assert_eq!(route.found.isolated, None);
        route.reported(&shim(trial, "", "refused"), at(2));
        assert_eq!(route.found.isolated, None);
        // The one that cannot is reached by a step all the same.
        assert_eq!(route.way(&shim(trial, "", "refused")), Way::Step);
    }

    #[test]
    fn what_was_seen_while_the_agent_was_away_proves_nothing() {
        let (first, trial) = new();
        let mut route = Route::begin(first.found, at(5));
        assert!(route.found.trial > trial);
        route.reported(&shim(trial, "", "refused"), at(6));
        assert_eq!(route.found.isolated, None);
        assert_eq!(route.way(&shim(trial, "", "refused")), Way::Wait);
        // A shim of an older version has no socket.
        let mut old = shim(route.found.trial, "", "refused");
        old.socket.clear();
        assert_eq!(route.way(&old), Way::Wait);
    }

    #[test]
    fn it_is_remembered_and_tried_again_daily() {
        let (mut route, trial) = new();
        route.reported(&shim(trial, "", "refused"), at(0));
        let mut route = Route::begin(route.found, at(DAY - 1));
        assert!(route.found.isolated.is_some(), "a restart forgets nothing");
        assert_eq!(route.wake(), Some(at(DAY)));
        let before = route.found.trial;
        route.tick(at(DAY - 1));
        assert_eq!(route.found.trial, before);
        route.tick(at(DAY));
        assert_eq!(route.found.isolated, None);
        assert!(route.found.trial > before, "the old reports do not count");
        assert_eq!(route.way(&shim(before, "", "refused")), Way::Wait);
        assert_eq!(route.wake(), None);
    }

    #[test]
    fn a_refused_step_is_remembered_for_a_day() {
        let (mut route, trial) = new();
        let cut = shim(trial, "", "refused");
        route.reported(&cut, at(0));
        route.refused("steps are not permitted", at(10));
        assert_eq!(
            route.way(&cut),
            Way::Refused("steps are not permitted".to_owned())
        );
        assert!(!route.describe(true).1);
        let found = route.found.clone();
        let again = Route::begin(found, at(DAY + 10));
        assert_eq!(again.found.refused, None);
        route.entered();
        assert_eq!(route.way(&cut), Way::Step);
    }

    #[test]
    fn the_address_that_worked_comes_first() {
        let (mut route, trial) = new();
        route.reported(&shim(trial, "b:1", ""), at(0));
        let all = ["a:1", "b:1", "c:1"].map(str::to_owned).to_vec();
        assert_eq!(route.order(all.clone()), ["b:1", "a:1", "c:1"]);
        route.found.preferred = "gone:1".to_owned();
        assert_eq!(route.order(all.clone()), all);
    }
}
