//! Tests of the machine's rules under random events.

use proptest::prelude::*;

use super::{deadline::first_report, *};

fn any_state() -> impl Strategy<Value = JobState> {
    prop::sample::select(vec![
        JobState::Pending,
        JobState::Configuring,
        JobState::Running,
        JobState::Completing,
        JobState::Suspended,
        JobState::Requeued,
        JobState::Completed,
        JobState::Failed,
        JobState::Cancelled { by: Some(7) },
        JobState::Timeout,
        JobState::OutOfMemory,
        JobState::NodeFail,
        JobState::Preempted,
        JobState::Unknown("DANCING".to_owned()),
    ])
}

fn any_view() -> impl Strategy<Value = JobView> {
    let exit = prop::option::of((prop::sample::select(vec![0, 1, 64, 65, 66, 67]), 0..1_i32));
    (1..4_u8, any_state(), exit).prop_map(|(id, state, exit)| JobView {
        exit: exit.map(|(code, signal)| JobExit { code, signal }),
        ..view(&id.to_string(), state)
    })
}

fn any_event() -> impl Strategy<Value = Event> {
    let kinds = vec![
        SubmitErrorKind::Permanent,
        SubmitErrorKind::Throttled,
        SubmitErrorKind::ControllerAway,
        SubmitErrorKind::Ambiguous,
        SubmitErrorKind::NoJobId,
    ];
    let jobs = || prop::collection::vec(any_view(), 0..3);
    prop_oneof![
        1 => Just(Event::Begin),
        3 => Just(Event::Staged),
        1 => Just(Event::LookAgain),
        1 => Just(Event::StageFailed {
            container: "main".to_owned(),
            image: "x".to_owned(),
            reason: "ErrImagePull".to_owned(),
            message: String::new()
        }),
        3 => (1..4_u8).prop_map(|id| submitted(&id.to_string())),
        1 => prop::sample::select(kinds)
            .prop_map(|kind| Event::SubmitFailed { kind, message: String::new() }),
        1 => jobs().prop_map(Event::Found),
        1 => Just(Event::FindFailed(String::new())),
        4 => (jobs(), any::<bool>()).prop_map(|(jobs, missing)| Event::Round { jobs, missing }),
        1 => (1..4_u8, 0..20_i64, any::<bool>()).prop_map(|(id, n, last)| report(&id.to_string(), n, last)),
        1 => (1..4_u8, 0..20_i64, 1..9_i64).prop_map(|(id, n, began)| first_report(&id.to_string(), n, at(began))),
        1 => (1..90_u64).prop_map(|seconds| Event::Update(Facts {
            deadline: Some(Duration::from_secs(seconds)),
            ..new().facts
        })),
        1 => any::<bool>().prop_map(Event::Link),
        1 => Just(Event::Files { batch_tail: "x".to_owned(), claimed: true }),
        1 => (prop::option::of(0..60_u64)).prop_map(|grace| Event::Delete {
            grace: grace.map(Duration::from_secs),
            reason: String::new()
        }),
        4 => Just(Event::Tick),
    ]
}

proptest! {
    /// A terminal state is final; a submission follows only a written record; at most one job is
    /// the pod's; notes stay in order.
    #[test]
    fn rules_hold_under_any_events(events in prop::collection::vec((any_event(), 0..40_i64), 0..60)) {
        let mut pod = new();
        let mut now = 0;
        let mut alive = None;
        for (event, pause) in events {
            now += pause;
            let before = pod.clone();
            let effects;
            (pod, effects) = step(pod, event, at(now));
            if let State::Finished { outcome, .. } = &before.state {
                let same = matches!(&pod.state, State::Finished { outcome: now, .. } if now == outcome);
                prop_assert!(same, "terminal absorbs");
                prop_assert!(!effects.contains(&Effect::Submit));
            }
            if let Some(n) = effects.iter().position(|effect| *effect == Effect::Submit) {
                prop_assert!(effects[..n].contains(&Effect::Persist), "the record goes first");
                prop_assert!(alive.is_none(), "submitted while job {alive:?} may be alive");
                prop_assert_eq!(pod.attempt, before.attempt + 1);
            }
            alive = pod.job();
            prop_assert!(pod.deletion.is_some() || before.deletion.is_none(), "a deletion stays");
            let idle = matches!(pod.stage(), Some(JobStage::Queued { .. } | JobStage::Running));
            prop_assert!(pod.deletion.is_none() || !idle, "nobody ends the job: {:?}", pod.state);
            prop_assert!(pod.notes.windows(2).all(|two| two[0].sequence < two[1].sequence));
            prop_assert!(pod.notes.len() <= NOTES);
        }
    }

    /// Whatever came before: a pod ends once it is deleted, given answers and given time.
    #[test]
    fn deletion_always_ends(events in prop::collection::vec(any_event(), 0..40)) {
        let mut pod = new();
        let mut now = 0;
        let mut effects = Vec::new();
        for event in events.into_iter().chain([Event::Begin, delete()]) {
            now += 1;
            let more;
            (pod, more) = step(pod, event, at(now));
            effects.extend(more);
        }
        for _ in 0..40 {
            now += 100;
            // Everything answers: no job is known by name, and every job is gone.
            let answers = std::mem::take(&mut effects).into_iter().filter_map(|effect| match effect {
                Effect::Stage => Some(Event::Staged),
                Effect::Submit => Some(submitted("3")),
                Effect::Find => Some(Event::Found(Vec::new())),
                Effect::ReadFiles => Some(Event::Files { batch_tail: String::new(), claimed: true }),
                Effect::Persist | Effect::Cancel { .. } | Effect::Stop { .. } | Effect::CleanUp | Effect::PollSoon | Effect::Remove => None,
            });
            let gone = Event::Round { jobs: Vec::new(), missing: true };
            for event in answers.collect::<Vec<_>>().into_iter().chain([Event::Link(false), Event::Tick, gone]) {
                let more;
                (pod, more) = step(pod, event, at(now));
                effects.extend(more);
            }
        }
        prop_assert!(pod.is_finished(), "{:?}", pod.state);
    }
}
