//! Tests of a job that somebody requeues.

use super::*;

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
