//! Tests of what a restarted agent does with the state that it finds.

use super::{deadline::lowered, *};
use crate::pod::outcome::Cause;

#[test]
fn a_final_report_that_was_written_meanwhile_finishes_after_the_restart() {
    let written = |pod: &Pod| {
        let Event::Report(last) = report("1", 9, true) else {
            panic!()
        };
        let mut pod = pod.clone();
        pod.report = Some(*last);
        step(pod, Event::Begin, at(50)).0
    };
    let (submitting, _) = feed([Event::Begin, Event::Staged]);
    let (queued, _) = feed(queued());
    let (running, _) = feed(running());
    for pod in [&submitting, &queued, &running] {
        assert_eq!(outcome(&written(pod)), (true, ""), "{:?}", pod.state);
    }
    let (deleted, _) = step(running, delete(), at(4));
    assert!(
        !written(&deleted).is_finished(),
        "the job may still be there"
    );
}

/// The agent may have died after it wrote the record and before it removed the values.
#[test]
fn the_values_of_a_finished_pod_are_removed_after_a_restart_too() {
    let (pod, _) = feed(and(running(), [report("1", 2, true)]));
    let (pod, effects) = step(pod, Event::Begin, at(9));
    assert_eq!(effects, [Effect::CleanUp, Effect::PollSoon]);
    let (pod, _) = step(pod, seen("1", JobState::Completed), at(20));
    let (_, effects) = step(pod, Event::Begin, at(21));
    assert_eq!(effects, [Effect::CleanUp]);
}

#[test]
fn a_record_restores_the_pod() {
    use crate::pod::record::Record;
    let (overdue, _) = step(lowered(60), Event::Tick, at(100));
    let (settling, _) = step(overdue.clone(), seen("1", JobState::Completed), at(101));
    for pod in [
        vec![Event::Begin],
        vec![Event::Begin, Event::Staged],
        queued(),
        running(),
        and(running(), [delete()]),
        and(running(), [seen("1", JobState::Completed)]),
        and(running(), [report("1", 2, true)]),
    ]
    .into_iter()
    .map(|events| feed(events).0)
    .chain([overdue.clone(), settling, lost(feed(running()).0, 4)])
    {
        let mut pod = pod;
        let record = Record::of(&pod, "c", 3);
        let json = serde_json::to_string(&record).unwrap();
        let back: Record = serde_json::from_str(&json).unwrap();
        let back = back.restore(pod.facts.clone(), pod.report.clone());
        // The times of the next file reads, trouble and the link are not kept.
        let since = pod.since;
        match pod.stage_mut() {
            Some(JobStage::Lost {
                since: of_loss,
                look_at,
            }) => (*of_loss, *look_at) = (since, since),
            Some(JobStage::Settling { look_at, .. }) => *look_at = since,
            Some(JobStage::Queued { .. } | JobStage::Running | JobStage::Stopping { .. })
            | None => {}
        }
        pod.unseen = None;
        let since = pod.since;
        pod.read_soon(since);
        pod.link = false;
        if let Some(view) = &mut pod.view {
            view.attempt = 0;
            view.marks = Marks::default();
        }
        assert_eq!(back, pod);
    }
}

/// How long the containers have by the one effect, which tells them to end.
fn told(effects: &[Effect]) -> Duration {
    let [Effect::Stop { grace, .. }] = effects else {
        panic!("{effects:?}")
    };
    *grace
}

/// Agent, kubelet and scheduler may have been away together: the signal did not arrive, and the link is back.
#[test]
fn the_shim_of_a_deleted_pod_is_told_again_when_its_link_is_back() {
    let (pod, _) = feed(and(running(), [delete()]));
    let (soon, effects) = step(pod.clone(), Event::Link(true), at(14));
    assert_eq!(
        told(&effects),
        Duration::from_secs(20),
        "what is left of it"
    );
    assert_eq!(soon.wake(), Some(at(4 + 30 + 15)));
    let (_, effects) = step(pod.clone(), Event::Link(true), at(40));
    assert_eq!(told(&effects), Duration::ZERO);
    // The scheduler was asked to kill the job, which may have failed, too.
    let (killed, _) = step(pod, Event::Tick, at(49));
    let (linked, effects) = step(killed, Event::Link(true), at(50));
    assert_eq!(told(&effects), Duration::ZERO);
    let due = linked.wake().unwrap();
    let (_, effects) = step(linked, Event::Tick, due);
    assert!(cancels(&effects, "1", Cancel::Kill));
    let stops = |effect: &Effect| matches!(effect, Effect::Stop { grace, .. } if grace.is_zero());
    assert!(effects.iter().any(stops), "{effects:?}");
    // Nobody tells a job that is only taken out of the queue.
    let (dequeued, _) = feed(and(queued(), [delete()]));
    assert_eq!(step(dequeued, Event::Link(true), at(9)).1, []);
}

/// A job that the scheduler does not show for a while may be there all the same, and the pod that is settled without it would leave it
/// behind: nobody looks for the job of a pod that the agent has ended.
#[test]
fn a_job_that_is_shown_again_is_ended_as_before_whatever_the_reason() {
    let due = at(61) + SHIM_FIRST;
    let (told, _) = step(lowered(60), Event::Tick, due);
    let (linked, _) = step(told, missing(), due);
    assert!(
        matches!(linked.stage(), Some(JobStage::Stopping { .. })),
        "its shim is there"
    );
    let (reported, _) = step(linked.clone(), report("1", 9, true), due);
    assert!(step(reported, missing(), due).0.is_finished());
    let (alone, _) = step(linked, Event::Link(false), due);
    let (hidden, _) = step(alone, missing(), due);
    assert!(matches!(
        hidden.stage(),
        Some(JobStage::Settling {
            cause: Some(Cause::Deadline),
            ..
        })
    ));
    let (shown, _) = step(hidden, seen("1", JobState::Running), due);
    let (shown, effects) = step(shown, Event::Tick, due);
    let stops = |effect: &Effect| matches!(effect, Effect::Stop { .. });
    assert!(effects.iter().any(stops), "{effects:?} {:?}", shown.state);

    let pending = seen("1", JobState::Pending);
    let (waits, _) = feed(and(queued(), [pending.clone()]));
    let (hidden, _) = feed(and(queued(), [pending.clone(), delete(), missing()]));
    assert!(matches!(
        hidden.stage(),
        Some(JobStage::Settling { cause: Some(_), .. })
    ));
    let (again, effects) = step(hidden, pending, at(9));
    assert!(cancels(&effects, "1", Cancel::Queued), "{effects:?}");
    let (ended, _) = step(again, seen("1", JobState::Cancelled { by: None }), at(10));
    assert!(matches!(ended.stage(), Some(JobStage::Settling { .. })));

    // One that was never to start has started.
    let mut never = waits;
    let settling = JobStage::Settling {
        cause: Some(Cause::NeverStarts(String::new())),
        until: at(99),
        look_at: at(99),
    };
    never.enter_stage(settling, at(8));
    let (started, _) = step(never, seen("1", JobState::Running), at(9));
    assert_eq!(started.state, runs_as("1"));
}

/// A deletion is a level: it must not be lost on whatever way the pod comes to a job that runs.
#[test]
fn a_deleted_pod_whose_job_runs_after_all_is_ended() {
    let ended = [seen("1", JobState::Completed), delete()];
    let (settling, _) = feed(and(running(), ended));
    assert!(matches!(
        settling.stage(),
        Some(JobStage::Settling { cause: None, .. })
    ));
    let (mut recorded, _) = feed(running());
    recorded.deletion = Some(Deletion {
        grace: Duration::from_secs(5),
        reason: "test".to_owned(),
    });
    let (hidden, _) = feed(and(running(), [delete(), missing()]));
    assert!(matches!(
        hidden.stage(),
        Some(JobStage::Settling { cause: Some(_), .. })
    ));
    for (pod, event) in [
        (settling, seen("1", JobState::Running)),
        (hidden, seen("1", JobState::Running)),
        (recorded, Event::Begin),
    ] {
        let (pod, effects) = step(pod, event, at(9));
        let told = matches!(
            pod.stage(),
            Some(JobStage::Stopping {
                cause: Cause::Deleted(_),
                how: Ending::Told,
                ..
            })
        );
        assert!(told, "{:?}", pod.state);
        let stops = |effect: &Effect| matches!(effect, Effect::Stop { .. });
        assert!(effects.iter().any(stops), "{effects:?}");
    }
}
