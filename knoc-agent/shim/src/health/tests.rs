//! The rules by example, and for all histories of results.

use proptest::prelude::*;

use super::*;

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn failed() -> Outcome {
    Outcome::Failed("no".to_owned())
}

fn probe(successes: i32, failures: i32) -> pb::Probe {
    pb::Probe {
        period_seconds: 10,
        success_threshold: successes,
        failure_threshold: failures,
        ..pb::Probe::default()
    }
}

fn all_three() -> pb::Container {
    pb::Container {
        startup_probe: Some(probe(1, 2)),
        liveness_probe: Some(pb::Probe {
            initial_delay_seconds: 30,
            ..probe(1, 3)
        }),
        readiness_probe: Some(probe(2, 1)),
        ..pb::Container::default()
    }
}

/// Tries a probe once.
fn once(checks: &mut Checks, kind: Kind, now: u64, outcome: &Outcome) -> Option<Change> {
    checks.begin(kind, seconds(now));
    checks.end(kind, outcome)
}

#[test]
fn a_container_without_probes_has_none_to_try() {
    let container = pb::Container::default();
    assert!(Checks::of(&container).is_none());
    assert_eq!(at_start(&container), Health::unprobed());
}

#[test]
fn the_startup_probe_comes_before_the_others_and_is_tried_no_more_once_it_passed() {
    let container = all_three();
    let mut checks = Checks::of(&container).unwrap();
    assert_eq!(at_start(&container), Health::down());
    assert_eq!(checks.next(), Some((Kind::Startup, Duration::ZERO)));
    assert_eq!(once(&mut checks, Kind::Startup, 0, &failed()), None);
    assert_eq!(checks.next(), Some((Kind::Startup, seconds(10))));
    let passed = once(&mut checks, Kind::Startup, 10, &Outcome::Passed);
    assert_eq!(passed, Some(Change::Started));
    let health = after(Health::down(), Change::Started, &container);
    assert_eq!((health.started, health.ready), (true, false));
    // Readiness at once, liveness after its delay.
    assert_eq!(checks.next(), Some((Kind::Readiness, Duration::ZERO)));
    checks.begin(Kind::Readiness, seconds(10));
    assert_eq!(checks.next(), Some((Kind::Liveness, seconds(30))));
}

#[test]
fn after_a_startup_or_liveness_probe_that_failed_only_readiness_is_probed() {
    let mut checks = Checks::of(&all_three()).unwrap();
    assert_eq!(once(&mut checks, Kind::Startup, 0, &failed()), None);
    let end = once(&mut checks, Kind::Startup, 10, &failed());
    assert_eq!(end, Some(Change::Failed(Kind::Startup)));
    assert!(checks.over(), "it has never started");
    assert_eq!(checks.next(), None);

    let mut checks = Checks::of(&all_three()).unwrap();
    once(&mut checks, Kind::Startup, 0, &Outcome::Passed);
    for now in [30, 40] {
        assert_eq!(once(&mut checks, Kind::Liveness, now, &failed()), None);
    }
    let end = once(&mut checks, Kind::Liveness, 50, &failed());
    assert_eq!(end, Some(Change::Failed(Kind::Liveness)));
    assert_eq!(checks.next(), Some((Kind::Readiness, Duration::ZERO)));
    checks.begin(Kind::Readiness, seconds(50));
    assert_eq!(checks.next(), None);
    assert!(!checks.over());
}

#[test]
fn a_container_that_is_to_stop_fails_no_more_but_its_readiness_is_probed() {
    let mut checks = Checks::of(&all_three()).unwrap();
    once(&mut checks, Kind::Startup, 0, &Outcome::Passed);
    for now in [30, 40] {
        once(&mut checks, Kind::Liveness, now, &failed());
    }
    checks.begin(Kind::Liveness, seconds(50));
    checks.stop();
    assert_eq!(checks.end(Kind::Liveness, &failed()), None);
    assert_eq!(
        once(&mut checks, Kind::Readiness, 50, &Outcome::Passed),
        None
    );
    let ready = once(&mut checks, Kind::Readiness, 60, &Outcome::Passed);
    assert_eq!(ready, Some(Change::Ready(true)));
    let unready = once(&mut checks, Kind::Readiness, 70, &failed());
    assert_eq!(unready, Some(Change::Ready(false)));
}

#[test]
fn a_try_that_could_not_be_made_counts_for_nothing() {
    let mut checks = Checks::of(&all_three()).unwrap();
    once(&mut checks, Kind::Startup, 0, &failed());
    for now in 1..20 {
        let error = Outcome::Errored("odd".to_owned());
        assert_eq!(once(&mut checks, Kind::Startup, now, &error), None);
    }
    let end = once(&mut checks, Kind::Startup, 20, &failed());
    assert_eq!(end, Some(Change::Failed(Kind::Startup)));
}

#[test]
fn a_warning_passes() {
    let mut checks = Checks::of(&all_three()).unwrap();
    let warned = Outcome::Warned("redirected".to_owned());
    let started = once(&mut checks, Kind::Startup, 0, &warned);
    assert_eq!(started, Some(Change::Started));
}

#[test]
fn a_startup_probe_alone_is_over_once_it_passed() {
    let container = pb::Container {
        startup_probe: Some(probe(1, 1)),
        ..pb::Container::default()
    };
    let mut checks = Checks::of(&container).unwrap();
    once(&mut checks, Kind::Startup, 0, &Outcome::Passed);
    assert!(checks.over());
    let health = after(Health::down(), Change::Started, &container);
    assert_eq!(health, Health::unprobed());
}

#[test]
fn failures_are_told_at_once_and_then_rarely_with_their_count() {
    let mut telling = Telling::new();
    let told: Vec<_> = (0..70)
        .filter_map(|second| telling.failed(seconds(second)).map(|count| (second, count)))
        .collect();
    assert_eq!(told, [(0, 1), (1, 1), (2, 1), (32, 30), (62, 30)]);
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Begin,
    End(usize, u8),
    Stop,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => Just(Step::Begin),
        8 => (0_usize..3, 0_u8..3).prop_map(|(kind, result)| Step::End(kind, result)),
        1 => Just(Step::Stop),
    ]
}

fn any_probe() -> impl Strategy<Value = Option<pb::Probe>> {
    proptest::option::weighted(0.8, (1_i32..4, 1_i32..4))
        .prop_map(|thresholds| thresholds.map(|(successes, failures)| probe(successes, failures)))
}

/// The last `count` results, oldest first, if there are as many and all are `result`.
fn last_are(results: &[bool], count: i32, result: bool) -> bool {
    let count = usize::try_from(count).unwrap();
    let last = results.len().checked_sub(count).map(|at| &results[at..]);
    last.is_some_and(|last| last.iter().all(|one| *one == result))
}

proptest! {
    /// Whatever comes in whatever order: what is said follows from the last results alone.
    #[test]
    fn what_changes_follows_from_the_last_results(
        probes in (any_probe(), any_probe(), any_probe()),
        steps in proptest::collection::vec(any_step(), 0..80),
    ) {
        let container = pb::Container {
            startup_probe: probes.0,
            liveness_probe: probes.1,
            readiness_probe: probes.2,
            ..pb::Container::default()
        };
        let Some(mut checks) = Checks::of(&container) else { return Ok(()) };
        let mut health = at_start(&container);
        let mut results: [Vec<bool>; 3] = Default::default();
        let mut running = [false; 3];
        let mut ending = false;
        for (at, step) in steps.into_iter().enumerate() {
            match step {
                // As the task does: only what is next begins.
                Step::Begin => {
                    let Some((kind, _)) = checks.next() else { continue };
                    let index = Kind::ALL.iter().position(|one| *one == kind).unwrap();
                    prop_assert!(!running[index], "tried twice at a time");
                    prop_assert!(!ending || kind == Kind::Readiness, "tried after the end");
                    prop_assert_eq!(kind == Kind::Startup, !health.started);
                    running[index] = true;
                    checks.begin(kind, Duration::from_secs(at as u64));
                }
                Step::End(index, result) => {
                    if !std::mem::take(&mut running[index]) { continue }
                    let kind = Kind::ALL[index];
                    let outcome = match result {
                        0 => Outcome::Passed,
                        1 => failed(),
                        _ => Outcome::Errored(String::new()),
                    };
                    if result < 2 {
                        results[index].push(result == 0);
                    }
                    let change = checks.end(kind, &outcome);
                    let probe = kind.of(&container).unwrap();
                    let passes = last_are(&results[index], probe.success_threshold, true);
                    let fails = last_are(&results[index], probe.failure_threshold, false);
                    let expected = match kind {
                        _ if result == 2 => None,
                        Kind::Startup | Kind::Liveness if ending => None,
                        Kind::Startup if passes => Some(Change::Started),
                        Kind::Startup | Kind::Liveness if fails => Some(Change::Failed(kind)),
                        Kind::Readiness if passes && !health.ready => Some(Change::Ready(true)),
                        Kind::Readiness if fails && health.ready => Some(Change::Ready(false)),
                        Kind::Startup | Kind::Liveness | Kind::Readiness => None,
                    };
                    prop_assert_eq!(change, expected);
                    if let Some(change) = change {
                        health = after(health, change, &container);
                        ending |= matches!(change, Change::Failed(_));
                    }
                }
                Step::Stop => {
                    checks.stop();
                    ending = true;
                }
            }
            prop_assert!(!health.ready || health.started, "ready before it has started");
        }
    }

    /// Each probe is tried once in its period while tries are short, and never before its delay.
    #[test]
    fn tries_come_in_their_period(delay in 0_i32..30, period in 1_i32..30) {
        let container = pb::Container {
            readiness_probe: Some(pb::Probe {
                initial_delay_seconds: delay,
                period_seconds: period,
                ..pb::Probe::default()
            }),
            ..pb::Container::default()
        };
        let mut checks = Checks::of(&container).unwrap();
        for number in 0..5 {
            let (kind, at) = checks.next().unwrap();
            let expected = u64::try_from(delay + number * period).unwrap();
            prop_assert_eq!((kind, at), (Kind::Readiness, seconds(expected)));
            checks.begin(kind, at);
            prop_assert_eq!(checks.next(), None, "while it runs");
            checks.end(kind, &Outcome::Passed);
        }
    }
}
