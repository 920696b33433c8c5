//! Containers whose postStart hook runs, or has failed.

use super::*;

/// An attempt of the container `a` whose program runs, and whose hook has not succeeded.
fn hooked(attempt: i32) -> pb::ContainerStatus {
    pb::ContainerStatus {
        ready: false,
        started: false,
        in_post_start: true,
        restart_count: attempt,
        container_id: format!("apptainer://12.a.{attempt}"),
        ..container("a", running())
    }
}

fn seen(a: pb::ContainerStatus) -> pb::PodObserved {
    observed(PodPhase::Running, vec![a, container("b", running())])
}

/// The status of the container `a`.
fn first(status: &PodStatus) -> Value {
    let all = status.container_statuses.as_deref().unwrap();
    serde_json::to_value(&all[0]).unwrap()
}

#[test]
fn a_container_runs_once_its_hook_has_succeeded() {
    let mut pod = pod("Always", false, &json!({"phase": "Pending"}));
    let status = compute(&pod, Some(&seen(hooked(0))));
    assert_eq!(status.phase.as_deref(), Some("Pending"));
    let a = first(&status);
    assert_eq!(
        a["state"],
        json!({"waiting": {"reason": "ContainerCreating"}})
    );
    assert_eq!((&a["ready"], &a["started"]), (&json!(false), &json!(false)));
    assert_eq!(a["restartCount"], 0);
    // By the id it is known that it may have run.
    assert_eq!(a["containerID"], "apptainer://12.a.0");
    pod.status = Some(status);
    let status = compute(&pod, Some(&seen(container("a", running()))));
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert!(first(&status)["state"]["running"]["startedAt"].is_string());
}

#[test]
fn in_a_pod_with_init_containers_it_is_initializing() {
    let pod = pod("Always", true, &json!({"phase": "Pending"}));
    let mut observed = seen(hooked(0));
    observed.init_containers = vec![container("i", ended(0))];
    let a = first(&compute(&pod, Some(&observed)));
    assert_eq!(a["state"]["waiting"]["reason"], "PodInitializing");
}

#[test]
fn a_restart_is_shown_once_the_hook_has_succeeded() {
    let before = json!({"phase": "Running", "containerStatuses": [
        {"name": "a", "image": "busybox", "imageID": "x", "ready": false, "restartCount": 1,
         "state": {"waiting": {"reason": "CrashLoopBackOff"}}},
    ]});
    let pod = pod("Always", false, &before);
    let last = match ended(3) {
        State::Terminated(ended) => Some(ended),
        State::Running(_) | State::Waiting(_) => None,
    };
    let mut again = pb::ContainerStatus {
        last_termination: last,
        ..hooked(2)
    };
    let status = compute(&pod, Some(&seen(again.clone())));
    assert_eq!(status.phase.as_deref(), Some("Running"));
    let a = first(&status);
    assert_eq!(a["state"]["waiting"]["reason"], "ContainerCreating");
    assert_eq!(a["lastState"]["terminated"]["exitCode"], 3);
    assert_eq!(a["restartCount"], 1);
    again.in_post_start = false;
    let a = first(&compute(&pod, Some(&seen(again))));
    assert!(a["state"]["running"].is_object());
    assert_eq!(a["restartCount"], 2);
}

#[test]
fn a_pod_that_ends_during_the_hook_has_run() {
    let pod = pod("Never", false, &json!({"phase": "Pending"}));
    let observed = finished(OutcomeKind::Failed, "NodeFailed", vec![hooked(0)]);
    let a = first(&compute(&pod, Some(&observed)));
    assert_eq!(a["state"]["terminated"]["exitCode"], 137);
    assert_eq!(
        a["state"]["terminated"]["containerID"],
        "apptainer://12.a.0"
    );
}

/// The agent does not know the pod any more. What is known of it may have been published by an earlier process.
#[test]
fn a_pod_that_is_lost_during_the_hook_keeps_the_id() {
    let mut pod = pod("Never", false, &json!({"phase": "Pending"}));
    pod.status = Some(compute(&pod, Some(&seen(hooked(0)))));
    // The report was not read yet.
    let unread = observed(PodPhase::Running, Vec::new());
    let a = first(&compute(&pod, Some(&unread)));
    assert_eq!(a["state"]["waiting"]["reason"], "ContainerCreating");
    assert_eq!(a["containerID"], "apptainer://12.a.0");
    let lost = finished(OutcomeKind::Failed, "ContainerStatusUnknown", Vec::new());
    let a = first(&compute(&pod, Some(&lost)));
    assert_eq!(
        a["state"]["terminated"]["containerID"],
        "apptainer://12.a.0"
    );
}
