//! Tests of the machine's rules: scenarios for each edge, then random events.

mod deadline;
mod identity;
mod images;
mod random;
mod requeued;
mod restart;

use std::time::Duration;

use knoc_proto::ids::{JobId, PodUid};

use super::{
    pod::{FILES_UNLINKED, LOOKS, NOTES, SHIM_FIRST},
    *,
};
use crate::{
    pod::placement::Placement,
    scheduler::{Cancel, JobExit, JobRef, JobState, JobView, Marks, SubmitErrorKind, Submitted},
};

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

fn uid() -> PodUid {
    PodUid::try_from("u").unwrap()
}

fn job(id: &str) -> JobId {
    JobId::try_from(id).unwrap()
}

fn new() -> Pod {
    let timeouts = Timeouts {
        report_grace: Duration::from_secs(90),
        never_ends_after: Duration::from_mins(10),
        lost_after: Duration::from_mins(5),
        stop_slack: Duration::from_secs(15),
        backoff_initial: Duration::from_secs(10),
        backoff_max: Duration::from_mins(5),
    };
    let (grace, deadline) = (Duration::from_secs(30), None);
    Pod::new(
        Facts {
            uid: uid(),
            grace,
            deadline,
            timeouts,
        },
        at(0),
    )
}

fn view(id: &str, state: JobState) -> JobView {
    let started = !matches!(state, JobState::Pending);
    JobView {
        id: job(id),
        uid: uid(),
        marks: Marks::ALL,
        cluster_id: String::new(),
        attempt: 1,
        state,
        reason: String::new(),
        exit: None,
        nodes: "c1".to_owned(),
        partition: "batch".to_owned(),
        submitted_at: Some(1),
        started_at: started.then_some(2),
        ended_at: None,
        estimated_start: None,
        time_limit_minutes: None,
        restarts: 0,
    }
}

fn seen(id: &str, state: JobState) -> Event {
    Event::Round {
        jobs: vec![view(id, state)],
        missing: false,
    }
}

fn submitted(id: &str) -> Event {
    Event::Submitted(Submitted {
        job: job(id),
        began: at(0),
        ended: at(0),
        notes: Vec::new(),
    })
}

fn report(id: &str, sequence: i64, last: bool) -> Event {
    Event::Report(Box::new(pb::Report {
        uid: "u".to_owned(),
        job_id: id.to_owned(),
        sequence,
        r#final: last,
        ended_by: pb::EndedBy::Themselves.into(),
        outcome: pb::OutcomeKind::Succeeded.into(),
        ..pb::Report::default()
    }))
}

fn delete() -> Event {
    Event::Delete {
        grace: None,
        reason: "test".to_owned(),
    }
}

/// Feeds events a second apart; returns the pod and the effects of the last one.
fn feed(events: impl IntoIterator<Item = Event>) -> (Pod, Vec<Effect>) {
    let mut pod = new();
    let mut effects = Vec::new();
    for (n, event) in events.into_iter().enumerate() {
        (pod, effects) = step(pod, event, at(i64::try_from(n).unwrap()));
    }
    (pod, effects)
}

fn with_job(id: &str, stage: JobStage) -> State {
    let placement = Placement::own_job(job(id));
    State::WithJob { placement, stage }
}

fn runs_as(id: &str) -> State {
    with_job(id, JobStage::Running)
}

fn queued_as(id: &str) -> State {
    with_job(id, JobStage::Queued { never: None })
}

fn queued() -> Vec<Event> {
    vec![Event::Begin, Event::Staged, submitted("1")]
}

fn running() -> Vec<Event> {
    let mut events = queued();
    events.push(seen("1", JobState::Running));
    events
}

fn and(mut events: Vec<Event>, more: impl IntoIterator<Item = Event>) -> Vec<Event> {
    events.extend(more);
    events
}

fn cancels(effects: &[Effect], id: &str, wanted: Cancel) -> bool {
    effects.iter().any(|effect| {
        matches!(effect, Effect::Cancel { job: it, how } if it.id == job(id) && *how == wanted)
    })
}

fn missing() -> Event {
    Event::Round {
        jobs: Vec::new(),
        missing: true,
    }
}

/// The pod after a round that lacks its job, and another one after the job should have been shown.
fn lost(pod: Pod, now: i64) -> Pod {
    let (pod, _) = step(pod, missing(), at(now));
    step(pod, missing(), at(now + 60)).0
}

fn outcome(pod: &Pod) -> (bool, &str) {
    let outcome = pod.outcome().unwrap();
    (outcome.succeeded, &outcome.reason)
}

#[test]
fn the_intent_is_on_disk_before_the_submission() {
    let (pod, effects) = feed([Event::Begin, Event::Staged]);
    assert_eq!(effects, [Effect::Persist, Effect::Submit]);
    assert_eq!(
        pod.state,
        State::BeforeJob(BeforeJob::Submitting { look: None })
    );
}

#[test]
fn a_final_report_finishes_at_once() {
    let (pod, effects) = feed(and(
        running(),
        [report("1", 1, false), report("1", 2, true)],
    ));
    assert_eq!(outcome(&pod), (true, ""));
    assert_eq!(
        effects,
        [Effect::Persist, Effect::CleanUp, Effect::PollSoon]
    );
    let (pod, _) = step(pod, seen("1", JobState::Completed), at(20));
    assert_eq!(pod.job(), None);
}

#[test]
fn a_report_runs_a_queued_pod_before_the_round() {
    let (pod, _) = feed(and(queued(), [report("1", 1, false)]));
    assert_eq!(pod.state, runs_as("1"));
}

#[test]
fn after_a_restart_the_job_is_looked_for_before_it_is_submitted_again() {
    let mut pod = new();
    pod.state = State::BeforeJob(BeforeJob::Submitting { look: None });
    let (pod, effects) = step(pod, Event::Begin, at(0));
    assert_eq!(effects, [Effect::Find]);
    let (pod, effects) = step(pod, Event::Found(Vec::new()), at(1));
    assert_eq!(effects, []);
    let (pod, effects) = step(pod, Event::Tick, at(60));
    assert_eq!(effects, [Effect::Find]);
    let (again, effects) = step(pod.clone(), Event::Found(Vec::new()), at(61));
    assert_eq!(effects, [Effect::Persist], "not at once");
    let (again, effects) = step(again.clone(), Event::Tick, again.wake().unwrap());
    assert_eq!(effects, [Effect::Persist, Effect::Submit]);
    assert_eq!(again.attempt, 1);
    let (found, _) = step(
        pod,
        Event::Found(vec![view("7", JobState::Pending)]),
        at(61),
    );
    assert_eq!(found.job().unwrap().id, job("7"));
}

#[test]
fn of_two_jobs_the_running_one_is_ours_and_a_queued_one_is_cancelled() {
    let (pod, _) = feed([
        Event::Begin,
        Event::Staged,
        Event::SubmitFailed {
            kind: SubmitErrorKind::Ambiguous,
            message: "timed out".to_owned(),
        },
    ]);
    let jobs = vec![view("2", JobState::Pending), view("1", JobState::Running)];
    let (pod, effects) = step(pod, Event::Found(jobs), at(3));
    assert_eq!(pod.state, runs_as("1"));
    assert!(cancels(&effects, "2", Cancel::Queued));
}

#[test]
fn the_claimant_is_the_pods_job() {
    let (pod, _) = feed(and(queued(), [report("9", 1, false)]));
    assert_eq!(pod.state, runs_as("9"));
}

#[test]
fn the_job_that_holds_the_claim_is_the_pods() {
    let mut lost = view("1", JobState::Failed);
    lost.exit = Some(JobExit {
        code: 66,
        signal: 0,
    });
    let round = Event::Round {
        jobs: vec![lost.clone()],
        missing: false,
    };
    let (pod, effects) = feed(and(running(), [round]));
    assert_eq!(effects, [Effect::Persist, Effect::Find]);
    let jobs = vec![lost.clone(), view("2", JobState::Running)];
    let (other, _) = step(pod.clone(), Event::Found(jobs), at(9));
    assert_eq!(other.state, runs_as("2"));
    let (pod, _) = step(pod, Event::Found(vec![lost.clone()]), at(9));
    let (pod, effects) = step(pod, Event::Found(vec![lost]), at(12));
    assert!(!effects.contains(&Effect::Submit));
    assert_eq!(outcome(&pod), (false, "ContainerStatusUnknown"));
}

#[test]
fn a_broken_link_asks_the_scheduler() {
    let (_, effects) = feed(and(running(), [Event::Link(true), Event::Link(false)]));
    assert_eq!(effects, [Effect::PollSoon]);
}

#[test]
fn without_a_link_a_running_pods_report_is_read_now_and_then() {
    let (pod, _) = feed(running());
    let [soon, longest] = FILES_UNLINKED;
    let due = at(3) + soon;
    assert_eq!(pod.wake(), Some(due));
    let (pod, effects) = step(pod, Event::Tick, due);
    assert_eq!(effects, [Effect::ReadFiles]);
    // The report that was read shows the containers' state; then it is read again.
    let (pod, _) = step(pod, report("1", 1, false), due);
    assert_eq!(pod.state, runs_as("1"));
    assert_eq!(pod.report.as_ref().map(|report| report.sequence), Some(1));
    assert_eq!(pod.wake(), Some(due + soon), "it changes often now");
    // While it stays the same, it is read less and less often.
    let mut quiet = pod.clone();
    let mut reads = 0;
    while quiet.wake() < Some(due + longest * 10) {
        let now = quiet.wake().unwrap();
        quiet = step(quiet, Event::Tick, now).0;
        reads += 1;
    }
    assert!((12..17).contains(&reads), "{reads}");
    let last = quiet.read_at;
    assert_eq!(quiet.wake(), Some(last + longest));
    let (pod, _) = step(pod, Event::Link(true), due);
    assert_eq!(pod.wake(), None, "the link says it");
    let (pod, _) = step(pod, Event::Link(false), at(60));
    assert_eq!(pod.wake(), Some(at(60) + soon));
}

#[test]
fn the_warning_of_a_time_limit_waits_for_nothing() {
    let Event::Report(mut last) = report("1", 5, true) else {
        panic!()
    };
    last.ended_by = pb::EndedBy::TimeLimit.into();
    last.outcome = pb::OutcomeKind::Failed.into();
    let (pod, _) = feed(and(running(), [Event::Report(last)]));
    assert_eq!(outcome(&pod), (false, "SlurmTimeLimit"));
}

#[test]
fn rejections_for_good_and_for_now() {
    let reject = |kind| {
        feed([
            Event::Begin,
            Event::Staged,
            Event::SubmitFailed {
                kind,
                message: "rejected".to_owned(),
            },
        ])
        .0
    };
    assert_eq!(
        outcome(&reject(SubmitErrorKind::Permanent)),
        (false, "Rejected")
    );
    for kind in [SubmitErrorKind::Throttled, SubmitErrorKind::ControllerAway] {
        let pod = reject(kind);
        let due = pod.wake().unwrap();
        let (pod, effects) = step(pod, Event::Tick, due);
        assert_eq!(effects, [Effect::Persist, Effect::Submit]);
        assert_eq!(pod.attempt, 2);
    }
}

#[test]
fn a_controller_that_is_away_is_asked_again_within_half_a_minute() {
    let longest = |kind| {
        let (mut pod, _) = feed([Event::Begin, Event::Staged]);
        let mut longest = Duration::ZERO;
        for _ in 0..10 {
            let now = pod.wake().unwrap_or_else(|| at(0));
            (pod, _) = step(pod, Event::Tick, now);
            let message = "rejected".to_owned();
            (pod, _) = step(pod, Event::SubmitFailed { kind, message }, now);
            longest = longest.max(Duration::try_from(pod.wake().unwrap() - now).unwrap());
        }
        longest
    };
    assert_eq!(
        longest(SubmitErrorKind::ControllerAway),
        Duration::from_secs(30)
    );
    let throttled = longest(SubmitErrorKind::Throttled);
    let range = Duration::from_mins(4)..=Duration::from_mins(5);
    assert!(range.contains(&throttled), "{throttled:?}");
}

#[test]
fn deletion_while_queued_leaves_the_queue_and_ends_with_the_job() {
    let (pod, effects) = feed(and(queued(), [delete()]));
    assert!(cancels(&effects, "1", Cancel::Queued));
    assert!(!pod.is_finished());
    let mut cancelled = view("1", JobState::Cancelled { by: None });
    cancelled.started_at = None;
    let (pod, _) = step(
        pod,
        Event::Round {
            jobs: vec![cancelled],
            missing: false,
        },
        at(9),
    );
    let due = pod.wake().unwrap();
    let (pod, _) = step(pod, Event::Tick, due);
    assert_eq!(outcome(&pod), (false, "Deleted"));
}

#[test]
fn deletion_of_a_job_that_starts_meanwhile_tells_its_containers() {
    let (pod, effects) = feed(and(queued(), [delete(), seen("1", JobState::Running)]));
    assert!(matches!(
        pod.stage(),
        Some(JobStage::Stopping {
            how: Ending::Told,
            ..
        })
    ));
    assert!(
        effects
            .iter()
            .any(|effect| matches!(effect, Effect::Stop { .. }))
    );
}

#[test]
fn deletion_while_running_waits_for_the_end_of_the_job() {
    let (pod, effects) = feed(and(running(), [delete()]));
    assert!(
        effects
            .iter()
            .any(|effect| matches!(effect, Effect::Stop { .. }))
    );
    let (pod, _) = step(pod, report("1", 5, true), at(6));
    assert!(
        matches!(pod.stage(), Some(JobStage::Stopping { .. })),
        "the job is still there"
    );
    let (pod, _) = step(pod, seen("1", JobState::Completed), at(7));
    assert!(pod.is_finished());
}

#[test]
fn a_stubborn_job_is_cancelled_past_grace_and_slack() {
    let (pod, _) = feed(and(running(), [delete()]));
    assert_eq!(pod.wake(), Some(at(4 + 30 + 15)));
    let (pod, effects) = step(pod, Event::Tick, at(49));
    assert!(cancels(&effects, "1", Cancel::Kill));
    let (pod, _) = step(
        pod,
        Event::Round {
            jobs: Vec::new(),
            missing: true,
        },
        at(50),
    );
    let due = pod.wake().unwrap();
    let (pod, _) = step(pod, Event::Tick, due.max(at(150)));
    assert!(pod.is_finished());
}

#[test]
fn a_shorter_grace_re_arms_downwards_only() {
    let (pod, _) = feed(and(running(), [delete()]));
    let with = |seconds, now| {
        let grace = Some(Duration::from_secs(seconds));
        step(
            pod.clone(),
            Event::Delete {
                grace,
                reason: String::new(),
            },
            at(now),
        )
    };
    assert_eq!(with(60, 5).1, []);
    let (shorter, effects) = with(1, 5);
    assert!(
        effects
            .iter()
            .any(|effect| matches!(effect, Effect::Stop { .. }))
    );
    assert_eq!(shorter.wake(), Some(at(5 + 1 + 15)));
}

#[test]
fn an_ended_job_waits_for_its_report_and_then_gives_up() {
    let (pod, effects) = feed(and(running(), [seen("1", JobState::Completed)]));
    assert_eq!(effects, [Effect::Persist, Effect::ReadFiles]);
    let (late, _) = step(pod.clone(), report("1", 9, true), at(30));
    assert_eq!(outcome(&late), (true, ""));
    let (pod, effects) = step(pod, Event::Tick, at(10));
    assert_eq!(effects, [Effect::ReadFiles]);
    let (pod, _) = step(pod, Event::Tick, at(94));
    assert_eq!(outcome(&pod), (false, "ContainerStatusUnknown"));
}

#[test]
fn a_node_failure_waits_for_nothing() {
    let (pod, _) = feed(and(running(), [seen("1", JobState::NodeFail)]));
    let (pod, _) = step(pod.clone(), Event::Tick, pod.wake().unwrap());
    assert_eq!(outcome(&pod), (false, "NodeFailed"));
}

/// The final report of job 1, whose containers a signal from outside ended.
fn by_signal() -> Event {
    failed_by(pb::EndedBy::Signal)
}

fn failed_by(by: pb::EndedBy) -> Event {
    let Event::Report(mut last) = report("1", 5, true) else {
        panic!()
    };
    last.ended_by = by.into();
    last.outcome = pb::OutcomeKind::Failed.into();
    Event::Report(last)
}

#[test]
fn a_lost_rank_waits_for_slurms_state_and_a_lost_node_does_not() {
    let (pod, _) = feed(and(running(), [failed_by(pb::EndedBy::LostRank)]));
    assert!(matches!(pod.stage(), Some(JobStage::Settling { .. })));
    let (failed, _) = step(pod.clone(), seen("1", JobState::Failed), at(7));
    assert_eq!(outcome(&failed), (false, ""));
    let (pod, _) = step(pod, seen("1", JobState::NodeFail), at(7));
    assert_eq!(outcome(&pod), (false, "NodeFailed"));
    let (pod, _) = feed(and(running(), [failed_by(pb::EndedBy::LostNode)]));
    assert_eq!(outcome(&pod), (false, "NodeFailed"));
    assert!(pod.outcome().unwrap().disruption);
}

#[test]
fn a_signal_from_outside_waits_for_slurms_state() {
    let (pod, _) = feed(and(running(), [by_signal()]));
    assert!(matches!(pod.stage(), Some(JobStage::Settling { .. })));
    let (pod, _) = step(pod, seen("1", JobState::Running), at(6));
    assert!(matches!(pod.stage(), Some(JobStage::Settling { .. })));
    let (pod, _) = step(pod, seen("1", JobState::Timeout), at(7));
    assert_eq!(outcome(&pod), (false, "SlurmTimeLimit"));
}

#[test]
fn a_lost_job_may_come_back_or_is_given_up() {
    let pod = lost(feed(running()).0, 4);
    assert!(matches!(pod.stage(), Some(JobStage::Lost { .. })));
    let (back, _) = step(pod.clone(), seen("1", JobState::Running), at(90));
    assert_eq!(back.state, runs_as("1"));
    let (linked, _) = step(pod.clone(), Event::Link(true), at(90));
    let (linked, _) = step(linked, Event::Tick, at(1000));
    assert!(
        matches!(linked.stage(), Some(JobStage::Lost { .. })),
        "its shim speaks: it lives"
    );
    let (pod, _) = step(pod, Event::Tick, at(1000));
    assert_eq!(outcome(&pod), (false, "ContainerStatusUnknown"));
}

#[test]
fn a_reason_that_never_ends_is_noted_and_fails_later() {
    let mut waits = view("1", JobState::Pending);
    waits.reason = "PartitionTimeLimit".to_owned();
    let round = Event::Round {
        jobs: vec![waits],
        missing: false,
    };
    let (pod, _) = feed(and(queued(), [round.clone()]));
    assert!(
        pod.notes
            .iter()
            .any(|note| note.reason == "SlurmJobNeverStarts" && note.warning)
    );
    assert_eq!(pod.wake(), Some(at(3 + 600)));
    let (pod, _) = step(pod, round, at(300));
    let (pod, effects) = step(pod, Event::Tick, at(603));
    assert!(
        effects
            .iter()
            .any(|effect| matches!(effect, Effect::Cancel { .. }))
    );
    let gone = Event::Round {
        jobs: Vec::new(),
        missing: true,
    };
    let (pod, _) = step(pod, gone, at(604));
    let (pod, _) = step(pod, Event::Tick, at(700));
    assert_eq!(outcome(&pod), (false, "SlurmJobNeverStarts"));
}

#[test]
fn only_a_finished_pod_is_forgotten() {
    let (pod, effects) = feed(and(running(), [Event::Forget]));
    assert_eq!((effects.len(), pod.is_finished()), (0, false));
    let (pod, effects) = feed(and(running(), [report("1", 2, true), Event::Forget]));
    assert_eq!(pod.state, State::Forgotten);
    assert_eq!(effects, [Effect::Remove]);
}

#[test]
fn a_job_that_outlives_its_report_is_cancelled() {
    let (pod, _) = feed(and(running(), [report("1", 2, true)]));
    let (pod, effects) = step(pod, seen("1", JobState::Running), at(30));
    assert_eq!(effects, []);
    let (_, effects) = step(pod, seen("1", JobState::Running), at(90));
    assert_eq!(effects.len(), 1);
    assert!(cancels(&effects, "1", Cancel::Kill));
}
