//! Tests of a deadline that is lowered while the pod runs.

use super::*;

/// The report of a shim that began at `began` and ends nothing.
pub(super) fn first_report(id: &str, sequence: i64, began: Timestamp) -> Event {
    let Event::Report(mut first) = report(id, sequence, false) else {
        panic!()
    };
    first.ended_by = pb::EndedBy::Unspecified.into();
    first.started_at = nanos(began);
    Event::Report(first)
}

/// A pod that has run since 1 s, whose deadline was lowered to `seconds` at 10 s.
pub(super) fn lowered(seconds: u64) -> Pod {
    let (mut pod, _) = feed(and(running(), [Event::Link(true)]));
    (pod, _) = step(pod, first_report("1", 1, at(1)), at(6));
    let facts = Facts {
        deadline: Some(Duration::from_secs(seconds)),
        ..pod.facts.clone()
    };
    step(pod, Event::Update(facts), at(10)).0
}

fn ended_by(by: pb::EndedBy, outcome: pb::OutcomeKind) -> Event {
    let Event::Report(mut last) = report("1", 7, true) else {
        panic!()
    };
    (last.ended_by, last.outcome) = (by.into(), outcome.into());
    Event::Report(last)
}

#[test]
fn a_deadline_that_was_lowered_while_the_pod_runs_ends_it() {
    let pod = lowered(60);
    let due = at(61) + SHIM_FIRST;
    assert_eq!(pod.wake(), Some(due));
    let (pod, effects) = step(pod, Event::Tick, at(60));
    assert_eq!((&pod.state, effects), (&runs_as("1"), vec![]));
    let (pod, effects) = step(pod, Event::Tick, due);
    let own = pod.job().unwrap();
    let grace = Duration::from_secs(30);
    assert_eq!(
        effects,
        [
            Effect::Persist,
            Effect::Stop { job: own, grace },
            Effect::PollSoon
        ]
    );
    let told = pod.notes.iter();
    let told = told.filter(|note| note.reason == "DeadlineExceeded" && !note.warning);
    assert_eq!(told.count(), 1, "{:?}", pod.notes);
    // The containers get the whole grace period; then the job is cancelled.
    assert_eq!(pod.wake(), Some(due + grace + Duration::from_secs(15)));
    for outcome_of_containers in [pb::OutcomeKind::Failed, pb::OutcomeKind::Succeeded] {
        let last = ended_by(pb::EndedBy::Stop, outcome_of_containers);
        let (pod, _) = step(pod.clone(), last, at(70));
        let (pod, _) = step(pod, seen("1", JobState::Completed), at(71));
        assert_eq!(outcome(&pod), (false, "DeadlineExceeded"));
    }
    let last = ended_by(pb::EndedBy::Themselves, pb::OutcomeKind::Succeeded);
    let (done, _) = step(pod.clone(), last, at(62));
    let (done, _) = step(done, seen("1", JobState::Completed), at(71));
    assert_eq!(outcome(&done), (true, ""), "it was faster");
    let (deleted, _) = step(pod, delete(), at(65));
    let last = ended_by(pb::EndedBy::Stop, pb::OutcomeKind::Failed);
    let (deleted, _) = step(deleted, last, at(70));
    let (deleted, _) = step(deleted, seen("1", JobState::Completed), at(71));
    assert_eq!(
        outcome(&deleted),
        (false, "DeadlineExceeded"),
        "it came first"
    );
}

#[test]
fn a_deadline_that_is_over_when_it_comes_ends_the_pod_at_once() {
    assert!(lowered(1).wake().unwrap() <= at(10));
}

#[test]
fn a_shim_that_ends_its_pod_is_not_told_of_the_deadline() {
    let pod = lowered(60);
    let Event::Report(mut ending) = report("1", 2, false) else {
        panic!()
    };
    ending.ended_by = pb::EndedBy::Deadline.into();
    ending.started_at = nanos(at(1));
    let (pod, _) = step(pod, Event::Report(ending), at(61));
    assert_eq!(pod.wake(), None);
    let last = ended_by(pb::EndedBy::Deadline, pb::OutcomeKind::Failed);
    let (pod, _) = step(pod, last, at(62));
    assert_eq!(outcome(&pod), (false, "DeadlineExceeded"));
}

#[test]
fn a_job_that_starts_again_or_is_suspended_has_no_deadline() {
    let (pod, _) = step(lowered(60), seen("1", JobState::Suspended), at(20));
    assert_eq!(pod.wake(), None);
    let mut again = view("1", JobState::Running);
    again.restarts = 1;
    let again = Event::Round {
        jobs: vec![again],
        missing: false,
    };
    let (pod, _) = step(lowered(60), again, at(20));
    assert_eq!(pod.wake(), None, "its new shim has not said when it began");
}
