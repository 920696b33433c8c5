//! Tests of a job that somebody requeues.

use super::{deadline, *};

#[test]
fn a_job_that_goes_back_into_the_queue_is_taken_out_and_its_pod_has_failed() {
    let completing = seen("1", JobState::Completing);
    let (pod, _) = feed(and(running(), [by_signal(), completing]));
    assert!(matches!(pod.stage(), Some(JobStage::Settling { .. })));
    let odd = JobState::Unknown("DANCING".to_owned());
    let (same, _) = step(pod.clone(), seen("1", odd), at(9));
    assert!(matches!(same.stage(), Some(JobStage::Settling { .. })));
    // Slurm gives a requeued job a later submit time.
    let mut back = view("1", JobState::Pending);
    back.submitted_at = Some(9);
    let round = Event::Round {
        jobs: vec![back],
        missing: false,
    };
    let (pod, effects) = step(pod, round, at(9));
    assert_eq!(outcome(&pod), (false, "SlurmJobRequeued"));
    assert!(cancels(&effects, "1", Cancel::Queued));
}

/// A round that shows the job held in the queue again; Slurm gives a requeued job a later submit time.
fn held(submitted_at: i64) -> Event {
    let mut held = view("1", JobState::RequeueHold);
    held.submitted_at = Some(submitted_at);
    held.reason = "JobHeldUser".to_owned();
    Event::Round {
        jobs: vec![held],
        missing: false,
    }
}

#[test]
fn a_held_job_whose_shim_was_killed_without_a_report_ends_its_pod() {
    let began = deadline::first_report("1", 1, at(2));
    let (pod, effects) = feed(and(running(), [began, held(9)]));
    assert_eq!(effects, [Effect::Persist, Effect::ReadFiles]);
    assert!(matches!(pod.stage(), Some(JobStage::Settling { .. })));
    let told = pod.notes.last().unwrap();
    assert_eq!(told.message, "job 1 is REQUEUE_HOLD: JobHeldUser");
    let (pod, _) = step(pod, held(9), at(6));
    let (pod, effects) = step(pod, Event::Tick, at(20));
    assert!(cancels(&effects, "1", Cancel::Queued), "{effects:?}");
    assert_eq!(outcome(&pod), (false, "SlurmJobRequeued"));
    let outcome = pod.outcome().unwrap();
    assert!(outcome.disruption);
    assert!(
        outcome.message.contains("REQUEUE_HOLD: JobHeldUser"),
        "{outcome:?}"
    );
}

#[test]
fn an_agent_that_did_not_see_the_job_run_sees_that_it_was_submitted_again() {
    let began = deadline::first_report("1", 1, at(2));
    let (pod, _) = feed(and(queued(), [began]));
    let later = at(60).as_second();
    let (pod, _) = step(pod, held(later), at(70));
    assert!(matches!(pod.stage(), Some(JobStage::Settling { .. })));
}

#[test]
fn a_job_whose_shim_never_began_waits_as_before() {
    let (pod, _) = feed(and(running(), [held(9)]));
    assert_eq!(pod.state, queued_as("1"));
    // Released, it starts, and runs the pod once.
    let (pod, _) = step(pod, seen("1", JobState::Running), at(60));
    assert_eq!(pod.state, runs_as("1"));
}
