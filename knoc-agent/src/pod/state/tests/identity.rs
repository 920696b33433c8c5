//! Tests of which job is the pod's while the scheduler answers late or in part.

use super::*;

fn rejected(kind: SubmitErrorKind) -> [Event; 3] {
    let message =
        "sbatch reported success without a job id; it printed: Valid gres options are: gpu"
            .to_owned();
    [
        Event::Begin,
        Event::Staged,
        Event::SubmitFailed { kind, message },
    ]
}

fn reasons(pod: &Pod) -> Vec<&str> {
    pod.notes.iter().map(|note| note.reason.as_str()).collect()
}

#[test]
fn success_without_a_job_id_is_searched_for_twice_and_then_rejected() {
    let (pod, effects) = feed(rejected(SubmitErrorKind::NoJobId));
    assert_eq!(effects, [Effect::Find]);
    let (pod, effects) = step(pod, Event::Found(Vec::new()), at(3));
    assert!(effects.is_empty() && !pod.is_finished());
    // A wrapper around sbatch that prints no ID.
    let (found, _) = step(
        pod.clone(),
        Event::Found(vec![view("7", JobState::Pending)]),
        at(6),
    );
    assert_eq!(found.job().unwrap().id, job("7"));
    let (pod, effects) = step(pod, Event::Tick, at(6));
    assert_eq!(effects, [Effect::Find]);
    let (pod, effects) = step(pod, Event::Found(Vec::new()), at(7));
    assert!(!effects.contains(&Effect::Submit));
    assert_eq!(outcome(&pod), (false, "Rejected"));
    let message = &pod.outcome().unwrap().message;
    assert!(message.contains("Valid gres options"), "{message}");
}

/// A repeated submission waits longer each time, whatever the reason, and the pauses of two pods
/// differ.
#[test]
fn every_repeated_submission_backs_off() {
    let pauses = |uid: &str| {
        let mut pod = new();
        pod.facts.uid = PodUid::try_from(uid).unwrap();
        for event in [Event::Begin, Event::Staged] {
            pod = step(pod, event, at(0)).0;
        }
        let (mut pauses, mut now) = (Vec::new(), at(0));
        for kind in [
            SubmitErrorKind::Ambiguous,
            SubmitErrorKind::Throttled,
            SubmitErrorKind::Ambiguous,
            SubmitErrorKind::Throttled,
        ] {
            let message = String::new();
            (pod, _) = step(pod, Event::SubmitFailed { kind, message }, now);
            if kind == SubmitErrorKind::Ambiguous {
                for _ in 0..LOOKS {
                    let effects;
                    (pod, effects) = step(pod, Event::Found(Vec::new()), now);
                    assert!(!effects.contains(&Effect::Submit));
                }
            }
            let due = pod.wake().unwrap();
            pauses.push(Duration::try_from(due - now).unwrap());
            now = due;
            let effects;
            (pod, effects) = step(pod, Event::Tick, now);
            assert_eq!(effects, [Effect::Persist, Effect::Submit]);
        }
        pauses
    };
    let one = pauses("u");
    assert!(one.windows(2).all(|two| two[0] < two[1]), "{one:?}");
    assert_ne!(one, pauses("v"), "jitter");
}

#[test]
fn a_queue_that_shows_a_job_late_loses_none() {
    let (pod, effects) = feed(and(queued(), [missing()]));
    assert_eq!(effects, [Effect::ReadFiles]);
    let (pod, _) = step(pod, missing(), at(50));
    assert_eq!(pod.state, queued_as("1"));
    assert!(pod.poll_soon());
    let (shown, _) = step(pod.clone(), seen("1", JobState::Pending), at(55));
    let (shown, _) = step(shown, missing(), at(70));
    assert!(!reasons(&shown).contains(&"SlurmJobLost"), "a new lag");
    let (pod, _) = step(pod, missing(), at(70));
    assert!(matches!(pod.stage(), Some(JobStage::Lost { since, .. }) if *since == at(3)));
    assert!(reasons(&pod).contains(&"SlurmJobLost"));
}

#[test]
fn a_job_that_was_never_shown_has_not_ended_because_its_pod_is_deleted() {
    let (pod, _) = feed(and(queued(), [delete(), missing()]));
    assert!(matches!(pod.stage(), Some(JobStage::Stopping { .. })));
    let (ran, effects) = step(pod.clone(), seen("1", JobState::Running), at(9));
    assert!(
        effects
            .iter()
            .any(|effect| matches!(effect, Effect::Stop { .. }))
    );
    assert!(!ran.is_finished());
    let (pod, _) = step(pod, missing(), at(80));
    let (pod, _) = step(pod, Event::Tick, at(200));
    assert_eq!(outcome(&pod), (false, "Deleted"));
}

/// sbatch timed out, the shim connected, and then the queue shows the state from before.
#[test]
fn an_answer_from_before_the_start_is_not_a_requeue() {
    let [begin, staged, timed_out] = rejected(SubmitErrorKind::Ambiguous);
    let Event::Report(mut first) = report("1", 1, false) else {
        panic!()
    };
    first.started_at = 5 * 1_000_000_000;
    let said = Event::Report(first);
    let waits = |submitted_at: i64| {
        let mut waits = view("1", JobState::Pending);
        waits.submitted_at = Some(submitted_at);
        Event::Round {
            jobs: vec![waits],
            missing: false,
        }
    };
    let (pod, _) = feed([begin, staged, timed_out, said, waits(4)]);
    assert_eq!(pod.state, runs_as("1"));
    assert!(
        !reasons(&pod).contains(&"SlurmJobRequeued"),
        "{:?}",
        pod.notes
    );
    assert_eq!(pod.view, None, "what is out of date is not shown either");
    // The job ran, as the scheduler said too; the answer to an earlier round comes late.
    let (pod, _) = step(pod, seen("1", JobState::Running), at(6));
    let (pod, _) = step(pod, waits(1), at(7));
    assert!(!reasons(&pod).contains(&"SlurmJobRequeued"));
    let (pod, _) = step(pod, waits(50), at(51));
    assert!(reasons(&pod).contains(&"SlurmJobRequeued"), "this one is");
}

#[test]
fn a_job_reference_has_what_tells_the_job_from_a_strangers() {
    let (pod, _) = feed(queued());
    let own = pod.job().unwrap();
    assert_eq!(
        own.call,
        Some((at(0).as_second(), at(0).as_second())),
        "as soon as sbatch has answered"
    );
    assert_eq!((own.submitted_at, own.named), (None, false));
    let (pod, _) = step(pod, seen("1", JobState::Pending), at(4));
    let own = pod.job().unwrap();
    assert_eq!((own.submitted_at, own.named), (Some(1), true));
    let mut renamed = view("1", JobState::Pending);
    renamed.marks.name = false;
    let round = Event::Round {
        jobs: vec![renamed],
        missing: false,
    };
    let (pod, _) = step(pod, round, at(5));
    assert!(!pod.job().unwrap().named);
    assert!(!reasons(&pod).contains(&"SlurmJobLost"));
    // Another job holds the claim, so the call was not for it.
    let (pod, _) = step(pod, report("9", 1, false), at(6));
    assert_eq!(pod.job().unwrap(), JobRef::new(job("9"), uid()));
}

#[test]
fn a_job_that_hardly_names_the_pod_is_not_cancelled_as_surplus() {
    let mut other = view("2", JobState::Pending);
    other.marks = Marks {
        directory: true,
        ..Marks::default()
    };
    let round = |other: JobView| Event::Round {
        jobs: vec![view("1", JobState::Running), other],
        missing: false,
    };
    let (_, effects) = feed(and(running(), [round(other.clone())]));
    assert!(!cancels(&effects, "2", Cancel::Queued));
    other.marks.name = true;
    let (_, effects) = feed(and(running(), [round(other)]));
    assert!(cancels(&effects, "2", Cancel::Queued));
}
