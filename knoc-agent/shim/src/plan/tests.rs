//! The rules of the plan: by example, and for all histories.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn container(phase: Phase) -> Container {
    Container {
        phase,
        signalled: Signalled::Nothing,
    }
}

fn exited(code: i32) -> Phase {
    Phase::Exited {
        code,
        restart_at: Time::ZERO,
    }
}

fn view(init: &[Phase], main: &[Phase]) -> View {
    View {
        containers: init
            .iter()
            .chain(main)
            .map(|phase| container(*phase))
            .collect(),
        init: init.len(),
        policy: RestartPolicy::Never,
        values: true,
        kill_at: None,
        now: Time::from_secs(5),
    }
}

#[test]
fn init_containers_come_one_by_one_then_all_others() {
    let idle = [Phase::Idle, Phase::Idle];
    assert_eq!(decide(&view(&idle, &idle)).actions, [Action::Start(0)]);
    assert_eq!(
        decide(&view(&[Phase::Running, Phase::Idle], &idle)).actions,
        []
    );
    assert_eq!(
        decide(&view(&[exited(0), Phase::Idle], &idle)).actions,
        [Action::Start(1)]
    );
    let both = [Action::Start(2), Action::Start(3)];
    assert_eq!(decide(&view(&[exited(0), exited(0)], &idle)).actions, both);
}

#[test]
fn a_failed_init_container_ends_the_pod_or_is_tried_again() {
    let mut view = view(&[exited(3)], &[Phase::Idle]);
    assert_eq!(
        decide(&view),
        Plan {
            finished: true,
            ..Plan::default()
        }
    );
    for policy in [RestartPolicy::Always, RestartPolicy::OnFailure] {
        view.policy = policy;
        assert_eq!(decide(&view).actions, [Action::Start(0)]);
    }
}

#[test]
fn back_off_is_waited_for() {
    let mut view = view(
        &[],
        &[Phase::Exited {
            code: 1,
            restart_at: Time::from_secs(9),
        }],
    );
    view.policy = RestartPolicy::OnFailure;
    assert_eq!(
        decide(&view),
        Plan {
            wake: Some(Time::from_secs(9)),
            ..Plan::default()
        }
    );
    view.now = Time::from_secs(9);
    assert_eq!(decide(&view).actions, [Action::Start(0)]);
}

#[test]
fn without_values_nothing_starts_and_nothing_ends() {
    let mut view = view(&[], &[Phase::Idle]);
    view.values = false;
    assert_eq!(decide(&view), Plan::default());
}

#[test]
fn a_stop_sends_term_then_kill_then_ends() {
    let mut view = view(
        &[],
        &[Phase::Running, Phase::Starting, exited(0), Phase::Idle],
    );
    view.kill_at = Some(Time::from_secs(10));
    let plan = decide(&view);
    assert_eq!(plan.actions, [Action::Term(0), Action::Term(1)]);
    assert_eq!(plan.wake, view.kill_at);
    view.containers[0].signalled = Signalled::Term;
    view.now = Time::from_secs(10);
    assert_eq!(decide(&view).actions, [Action::Kill(0), Action::Kill(1)]);
    view.containers[0].phase = exited(137);
    view.containers[1].phase = exited(137);
    assert!(decide(&view).finished);
}

#[test]
fn the_back_off_grows_and_is_forgotten() {
    let seconds = Duration::from_secs;
    let mut backoff = Backoff::new(seconds(10), seconds(300));
    let waits: Vec<u64> = (0..8)
        .map(|_| backoff.after(seconds(1)).as_secs())
        .collect();
    assert_eq!(waits, [0, 10, 20, 40, 80, 160, 300, 300]);
    assert_eq!(backoff.after(seconds(601)), Duration::ZERO);
    assert_eq!(backoff.after(seconds(1)), seconds(10));
}

fn phase() -> impl Strategy<Value = Phase> {
    prop_oneof![
        Just(Phase::Idle),
        Just(Phase::Starting),
        Just(Phase::Running),
        (prop_oneof![Just(0), Just(1)], 0_u64..20).prop_map(|(code, at)| Phase::Exited {
            code,
            restart_at: Time::from_secs(at)
        }),
    ]
}

prop_compose! {
    fn any_view()(
        phases in proptest::collection::vec(phase(), 1..6),
        init in 0_usize..3,
        policy in prop_oneof![
            Just(RestartPolicy::Always), Just(RestartPolicy::OnFailure), Just(RestartPolicy::Never)
        ],
        values in any::<bool>(),
        kill_at in proptest::option::of(0_u64..20),
        now in 0_u64..20,
    ) -> View {
        let init = init.min(phases.len() - 1);
        View {
            containers: phases.into_iter().map(container).collect(),
            init,
            policy,
            values,
            kill_at: kill_at.map(Time::from_secs),
            now: Time::from_secs(now),
        }
    }
}

proptest! {
    #[test]
    fn rules_that_hold_always(view in any_view()) {
        let plan = decide(&view);
        let lives = |index: &usize| view.containers[*index].lives();
        let mut touched = BTreeSet::new();
        for action in &plan.actions {
            let index = match action {
                Action::Start(index) => {
                    prop_assert!(!lives(index), "started twice");
                    prop_assert!(view.values && view.kill_at.is_none());
                    let earlier = &view.containers[..view.init.min(*index)];
                    let done = |c: &Container| matches!(c.phase, Phase::Exited { code: 0, .. });
                    prop_assert!(earlier.iter().all(done), "an init container is not done");
                    index
                }
                Action::Term(index) | Action::Kill(index) => {
                    prop_assert!(lives(index) && view.kill_at.is_some());
                    index
                }
            };
            prop_assert!(touched.insert(*index), "two actions for one container");
        }
        if plan.finished {
            prop_assert!(plan.actions.is_empty());
            prop_assert!(view.init > 0 || view.containers.iter().all(|c| !c.lives()));
        } else if plan.actions.is_empty() && plan.wake.is_none() {
            // Then something lives, or values are missing: else the pod would hang for ever.
            prop_assert!(!view.values || (0..view.containers.len()).any(|index| lives(&index)));
        }
        prop_assert!(plan.wake.is_none_or(|at| at > view.now), "wakes in the past spin");
    }
}
