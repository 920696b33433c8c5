//! An agent that knows less of a container than was published, as after its restart.

use super::*;
use k8s_openapi::api::core::v1::ContainerStatus;

fn runs(status: pb::ContainerStatus) -> pb::PodObserved {
    observed(PodPhase::Running, vec![status])
}

/// What is shown of the container if the agent reported `before`, which was published, and now reports `now`.
fn shown(before: pb::ContainerStatus, now: pb::ContainerStatus) -> ContainerStatus {
    let mut pod = pod("Always", false, &json!({"phase": "Pending"}));
    // As the API server gives it back, which keeps whole seconds.
    let published = serde_json::to_value(compute(&pod, Some(&runs(before)))).unwrap();
    pod.status = serde_json::from_value(published).unwrap();
    let mut statuses = compute(&pod, Some(&runs(now))).container_statuses.unwrap();
    statuses.remove(0)
}

/// An end of which nobody knows how it came.
fn unknown() -> State {
    State::Terminated(pb::Terminated {
        exit_code: 137,
        reason: "ContainerStatusUnknown".to_owned(),
        ..pb::Terminated::default()
    })
}

/// The exit code of a container that has ended.
fn code(status: &ContainerStatus) -> Option<i32> {
    Some(status.state.as_ref()?.terminated.as_ref()?.exit_code)
}

#[test]
fn no_attempt_goes_back_and_no_exit_code_is_lost() {
    let of = |before: State, now: State| shown(container("a", before), container("a", now));
    let stays = of(running(), waiting("ContainerCreating"));
    assert!(stays.state.unwrap().running.is_some() && stays.ready);
    for older in [waiting("ContainerCreating"), running(), unknown()] {
        assert_eq!(code(&of(ended(3), older)), Some(3));
    }
    // Whatever goes on is shown.
    assert_eq!(code(&of(running(), ended(3))), Some(3));
    assert_eq!(code(&of(running(), unknown())), Some(137));
    assert_eq!(code(&of(unknown(), ended(3))), Some(3));
    let began = of(waiting("ContainerCreating"), running());
    assert!(began.state.unwrap().running.is_some());
}

#[test]
fn a_container_that_was_shown_as_running_does_not_go_back_to_its_post_start_hook() {
    let hooked = || pb::ContainerStatus {
        in_post_start: true,
        ready: false,
        ..container("a", running())
    };
    let stays = shown(container("a", running()), hooked());
    assert!(stays.state.unwrap().running.is_some() && stays.ready);
    assert_eq!(code(&shown(container("a", ended(3)), hooked())), Some(3));
    let goes_on = shown(hooked(), container("a", running()));
    assert!(goes_on.state.unwrap().running.is_some());
    // The hook has failed.
    assert_eq!(code(&shown(hooked(), container("a", ended(3)))), Some(3));
}

#[test]
fn the_next_attempt_is_shown_and_so_is_the_pause_before_it() {
    let mut next = container("a", waiting("ContainerCreating"));
    next.container_id = "apptainer://12.a.1".to_owned();
    let next = shown(container("a", running()), next);
    assert!(next.state.unwrap().waiting.is_some());
    let mut pause = container("a", waiting("CrashLoopBackOff"));
    if let State::Terminated(last) = ended(3) {
        pause.last_termination = Some(pb::Terminated {
            container_id: pause.container_id.clone(),
            ..last
        });
    }
    let shown_pause = shown(container("a", ended(3)), pause.clone());
    assert!(shown_pause.state.unwrap().waiting.is_some());
    let stays = shown(pause, container("a", running()));
    let waiting = stays.state.unwrap().waiting.unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("CrashLoopBackOff"));
}

/// A job that was requeued has the same id. Its attempts have further numbers, unless the report of its first run was lost.
#[test]
fn a_job_that_runs_again_is_shown_even_if_its_attempt_has_the_same_id() {
    let starts = |started_at| State::Running(pb::Running { started_at });
    let end = || {
        State::Terminated(pb::Terminated {
            exit_code: 3,
            started_at: 5_700_000_000,
            finished_at: 6_200_000_000,
            ..pb::Terminated::default()
        })
    };
    let of = |before: State, now: State| shown(container("a", before), container("a", now));
    let again = of(end(), starts(9_500_000_000));
    assert!(again.state.unwrap().running.is_some());
    assert_eq!(code(&of(end(), starts(5_700_000_000))), Some(3));
    // Nothing of the next run has begun.
    let mut idle = container("a", waiting("ContainerCreating"));
    idle.container_id = String::new();
    let idle = shown(container("a", starts(5_700_000_000)), idle);
    assert!(idle.state.unwrap().waiting.is_some());
}
