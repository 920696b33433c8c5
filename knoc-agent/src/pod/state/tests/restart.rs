//! Tests of what a restarted agent does with the state that it finds.

use super::{deadline::lowered, *};
use crate::pod::{outcome::Cause, record::Record};

/// The pod as the next agent reads it from the disk.
fn restored(pod: &Pod) -> Pod {
    let record = Record::of(pod, "c", 3);
    let json = serde_json::to_string(&record).unwrap();
    let back: Record = serde_json::from_str(&json).unwrap();
    back.restore(pod.facts.clone(), pod.report.clone())
}

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
        let back = restored(&pod);
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

/// How long the containers have by the effects, if these tell them to end.
fn grace_in(effects: &[Effect]) -> Option<Duration> {
    effects.iter().find_map(|effect| {
        if let Effect::Stop { grace, .. } = effect {
            Some(*grace)
        } else {
            None
        }
    })
}

/// Neither does it begin anew, nor is one cut that was shortened while it counted down.
#[test]
fn a_grace_period_goes_on_after_a_restart() {
    let after_restart = |pod: &Pod, now: i64| {
        let (pod, effects) = step(restored(pod), Event::Begin, at(now));
        (pod.wake(), grace_in(&effects))
    };
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    let (pod, _) = feed(and(running(), [delete()]));
    assert_eq!(
        after_restart(&pod, 14),
        (Some(at(4 + 30 + 15)), seconds(20))
    );
    let shorter = Event::Delete {
        grace: seconds(5),
        reason: String::new(),
    };
    let (shorter, _) = step(pod, shorter, at(20));
    let cancelled_at = at(20 + 5 + 15);
    assert_eq!(
        after_restart(&shorter, 22),
        (Some(cancelled_at), seconds(3))
    );
    assert_eq!(
        after_restart(&shorter, 30),
        (Some(cancelled_at), seconds(0))
    );
    // The agent was away for the rest of it.
    let (late, _) = step(restored(&shorter), Event::Begin, at(60));
    let (_, effects) = step(late, Event::Tick, at(60));
    assert!(cancels(&effects, "1", Cancel::Kill), "{effects:?}");
    // A job in the queue is cancelled again at once; nobody is told anything.
    let (dequeued, _) = feed(and(queued(), [delete()]));
    assert_eq!(after_restart(&dequeued, 9), (Some(at(9)), None));
}

/// The record has the notes of the time when it was written. A kubelet that goes on running takes those after the newest one that it
/// has read.
#[test]
fn a_note_after_a_restart_is_newer_than_all_before() {
    let warns = Event::Note(Note {
        warning: true,
        reason: "SlurmCancelFailed",
        message: "again".to_owned(),
        container: String::new(),
    });
    let newest = |pod: &Pod| pod.notes.last().map(|note| note.sequence);
    // While its images are pulled, and while it runs.
    for recorded in [vec![Event::Begin], running()] {
        let (recorded, _) = feed(recorded);
        let mut pod = recorded.clone();
        for now in 4..9 {
            (pod, _) = step(pod, warns.clone(), at(now));
        }
        let (after, _) = step(restored(&recorded), warns.clone(), at(9));
        assert!(newest(&after) > newest(&pod), "{after:?}");
    }
}

/// Each has one Event, and a job that never starts is given up in its time.
#[test]
fn what_the_scheduler_said_of_the_job_is_noted_once_whoever_restarts() {
    let mut waits = view("1", JobState::Pending);
    waits.reason = "PartitionTimeLimit".to_owned();
    let waits = Event::Round {
        jobs: vec![waits],
        missing: false,
    };
    let noted = |pod: &Pod, reason: &str| {
        let such = pod.notes.iter().filter(|note| note.reason == reason);
        such.count()
    };
    let shown = seen("1", JobState::Pending);
    let (pod, effects) = feed(and(queued(), [shown, waits.clone()]));
    assert_eq!(effects, [Effect::Persist]);
    let (pod, _) = step(restored(&pod), Event::Begin, at(300));
    let (pod, effects) = step(pod, waits, at(301));
    assert_eq!((effects, noted(&pod, "SlurmJobNeverStarts")), (vec![], 1));
    assert_eq!(pod.wake(), Some(at(4 + 600)));

    let suspended = seen("1", JobState::Suspended);
    let (pod, effects) = feed(and(running(), [suspended.clone()]));
    assert_eq!(effects, [Effect::Persist]);
    let (pod, _) = step(restored(&pod), Event::Begin, at(300));
    let (pod, _) = step(pod, suspended, at(301));
    assert_eq!(noted(&pod, "SlurmJobSuspended"), 1);
}

/// Only the time since the reason has come back counts.
#[test]
fn a_reason_that_never_ends_and_comes_back_counts_anew_whoever_restarts() {
    let waits = |reason: &str| {
        let mut job = view("1", JobState::Pending);
        job.reason = reason.to_owned();
        Event::Round {
            jobs: vec![job],
            missing: false,
        }
    };
    let (mut pod, _) = feed(queued());
    for (reason, now) in [
        ("Priority", 10),
        ("PartitionTimeLimit", 20),
        ("Priority", 100),
        ("PartitionTimeLimit", 200),
    ] {
        let (next, effects) = step(pod, waits(reason), at(now));
        assert_eq!(effects, [Effect::Persist], "{reason} at {now}");
        pod = next;
    }
    let (pod, _) = step(restored(&pod), Event::Begin, at(300));
    let (pod, effects) = step(pod, waits("PartitionTimeLimit"), at(301));
    assert_eq!((effects, pod.wake()), (vec![], Some(at(200 + 600))));
}
