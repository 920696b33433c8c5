//! PURE: what the results of a container's probes mean, and when each probe is tried. Kubernetes' rules:
//!
//! - Until the startup probe has passed, no other probe is tried. It is tried no more once it has.
//! - A result counts once it came as often in a row as its threshold says. A try that could not be made counts for
//!   nothing.
//! - Startup and liveness probes that failed end the container; no probe is tried from then on.
//! - No probe is tried twice at the same time. A try that takes longer than the period is followed by the next at once.
//!
//! Times count from the start of the program.

use std::time::Duration;

use knoc_proto::pb;

use super::plan::Health;

/// How often a failure is told in a row; then once every [`TELLING`].
const TOLD_AT_ONCE: u32 = 3;
const TELLING: Duration = Duration::from_secs(30);

/// The three probes that a container may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Startup,
    Liveness,
    Readiness,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Startup, Self::Liveness, Self::Readiness];

    /// As Kubernetes writes it at the start of a message.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }

    /// As Kubernetes writes it within a message.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Startup => "startup",
            Self::Liveness => "liveness",
            Self::Readiness => "readiness",
        }
    }

    /// This probe of a container, if it has one.
    pub(crate) fn of(self, container: &pb::Container) -> Option<&pb::Probe> {
        match self {
            Self::Startup => container.startup_probe.as_ref(),
            Self::Liveness => container.liveness_probe.as_ref(),
            Self::Readiness => container.readiness_probe.as_ref(),
        }
    }
}

/// How one try of a probe ended. The texts are for users.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Passed,
    /// Passed, but not as it should.
    Warned(String),
    Failed(String),
    /// The try could not be made.
    Errored(String),
}

/// What changed for the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// The startup probe has passed.
    Started,
    /// The readiness probe passes, or does not pass any more.
    Ready(bool),
    /// A startup or liveness probe has failed for good.
    Failed(Kind),
}

/// The health of a container whose program has just started.
pub(crate) fn at_start(container: &pb::Container) -> Health {
    if container.startup_probe.is_some() {
        return Health::down();
    }
    Health {
        ready: container.readiness_probe.is_none(),
        ..Health::unprobed()
    }
}

/// What a change of a program of `container` makes of its health. A failed probe is handled by the caller, who knows the
/// time.
pub(crate) fn after(health: Health, change: Change, container: &pb::Container) -> Health {
    match change {
        Change::Started => Health {
            started: true,
            ready: container.readiness_probe.is_none(),
            ..health
        },
        Change::Ready(ready) => Health { ready, ..health },
        Change::Failed(_) => health,
    }
}

/// One probe of a running program.
#[derive(Debug, Clone)]
struct Watch {
    kind: Kind,
    period: Duration,
    successes: u32,
    failures: u32,
    /// Not tried before this time.
    next: Duration,
    running: bool,
    /// The last result, and how often it came in a row.
    row: Option<(bool, u32)>,
}

impl Watch {
    fn new(kind: Kind, probe: &pb::Probe) -> Self {
        Self {
            kind,
            period: probe.period(),
            successes: probe.successes(),
            failures: probe.failures(),
            next: probe.initial_delay(),
            running: false,
            row: None,
        }
    }

    /// Counts a result. Returns it once it came often enough.
    fn count(&mut self, passed: bool) -> Option<bool> {
        let run = match self.row {
            Some((last, run)) if last == passed => run.saturating_add(1),
            Some(_) | None => 1,
        };
        self.row = Some((passed, run));
        let threshold = if passed {
            self.successes
        } else {
            self.failures
        };
        (run >= threshold).then_some(passed)
    }
}

/// The probes of one running program.
#[derive(Debug, Clone)]
pub(crate) struct Checks {
    watches: Vec<Watch>,
    started: bool,
    ready: bool,
    failed: bool,
}

impl Checks {
    /// `None` for a container without probes.
    pub(crate) fn of(container: &pb::Container) -> Option<Self> {
        let watches: Vec<_> = Kind::ALL
            .into_iter()
            .filter_map(|kind| Some(Watch::new(kind, kind.of(container)?)))
            .collect();
        (!watches.is_empty()).then(|| Self {
            started: container.startup_probe.is_none(),
            ready: false,
            failed: false,
            watches,
        })
    }

    /// Whether no probe will ever be tried again.
    pub(crate) fn over(&self) -> bool {
        !self.watches.iter().any(|watch| self.wanted(watch.kind))
    }

    fn wanted(&self, kind: Kind) -> bool {
        !self.failed && (kind == Kind::Startup) != self.started
    }

    fn waiting(&self) -> impl Iterator<Item = &Watch> {
        let mut watches = self.watches.iter();
        std::iter::from_fn(move || watches.find(|one| !one.running && self.wanted(one.kind)))
    }

    /// The next probe to try, and when.
    pub(crate) fn next(&self) -> Option<(Kind, Duration)> {
        let next = self.waiting().min_by_key(|watch| watch.next)?;
        Some((next.kind, next.next))
    }

    /// A try begins.
    pub(crate) fn begin(&mut self, kind: Kind, now: Duration) {
        if let Some(watch) = self.watch(kind) {
            watch.running = true;
            watch.next = now.saturating_add(watch.period);
        }
    }

    /// A try has ended. Returns what it changes.
    pub(crate) fn end(&mut self, kind: Kind, outcome: &Outcome) -> Option<Change> {
        let watch = self.watch(kind)?;
        watch.running = false;
        let passed = match outcome {
            Outcome::Passed | Outcome::Warned(_) => true,
            Outcome::Failed(_) => false,
            Outcome::Errored(_) => return None,
        };
        let result = watch.count(passed)?;
        if !self.wanted(kind) {
            return None;
        }
        match (kind, result) {
            (Kind::Startup, true) => {
                self.started = true;
                Some(Change::Started)
            }
            (Kind::Startup | Kind::Liveness, false) => {
                self.failed = true;
                Some(Change::Failed(kind))
            }
            (Kind::Liveness, true) => None,
            (Kind::Readiness, ready) => {
                let changed = self.ready != ready;
                self.ready = ready;
                changed.then_some(Change::Ready(ready))
            }
        }
    }

    fn watch(&mut self, kind: Kind) -> Option<&mut Watch> {
        self.watches.iter_mut().find(|watch| watch.kind == kind)
    }
}

/// Decides which of many failures are told: the first ones at once, then one every [`TELLING`], with the count of those
/// since the last one.
#[derive(Debug, Clone)]
pub(crate) struct Telling {
    left: u32,
    since: Duration,
    silent: u32,
}

impl Telling {
    pub(crate) fn new() -> Self {
        Self {
            left: TOLD_AT_ONCE,
            since: Duration::ZERO,
            silent: 0,
        }
    }

    /// One more failure. Returns how many are to be told now, if any.
    pub(crate) fn failed(&mut self, now: Duration) -> Option<i32> {
        self.silent = self.silent.saturating_add(1);
        let due = now.saturating_sub(self.since) >= TELLING;
        if self.left == 0 && !due {
            return None;
        }
        self.left = self.left.saturating_sub(1);
        self.since = now;
        let count = std::mem::take(&mut self.silent);
        Some(i32::try_from(count).unwrap_or(i32::MAX))
    }
}

#[cfg(test)]
mod tests;
