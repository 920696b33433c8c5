//! Sidecars: init containers that run beside the others.

use super::*;

/// A pod with the sidecar `proxy` and the containers `a` and `b`.
fn pod_with_sidecar(policy: &str) -> Pod {
    let mut json = serde_json::to_value(pod(policy, false, &json!({}))).unwrap();
    json["spec"]["initContainers"] =
        json!([{"name": "proxy", "image": "busybox", "restartPolicy": "Always"}]);
    serde_json::from_value(json).unwrap()
}

fn seen(proxy: pb::ContainerStatus, regular: [State; 2]) -> pb::PodObserved {
    let [a, b] = regular;
    pb::PodObserved {
        init_containers: vec![proxy],
        ..observed(
            PodPhase::Running,
            vec![container("a", a), container("b", b)],
        )
    }
}

/// The status and the message of a condition.
fn condition(status: &PodStatus, kind: &str) -> (String, String) {
    let mut all = status.conditions.iter().flatten();
    let one = all.find(|one| one.type_ == kind).unwrap();
    (one.status.clone(), one.message.clone().unwrap_or_default())
}

fn yes() -> (String, String) {
    ("True".to_owned(), String::new())
}

#[test]
fn a_pod_is_initialized_when_its_sidecar_has_started_and_stays_so() {
    let pod = pod_with_sidecar("Never");
    let wait = || waiting("PodInitializing");
    let mut proxy = container("proxy", running());
    proxy.started = false;
    proxy.ready = false;
    let message = "containers with incomplete status: [proxy]".to_owned();
    let no = ("False".to_owned(), message);
    let mut hooked = proxy.clone();
    hooked.in_post_start = true;
    for proxy in [proxy, hooked] {
        let status = compute(&pod, Some(&seen(proxy, [wait(), wait()])));
        assert_eq!(status.phase.as_deref(), Some("Pending"));
        assert_eq!(condition(&status, "Initialized"), no);
    }

    let started = container("proxy", running());
    let status = compute(&pod, Some(&seen(started.clone(), [wait(), wait()])));
    assert_eq!(condition(&status, "Initialized"), yes());
    let status = compute(&pod, Some(&seen(started, [running(), running()])));
    assert_eq!(status.phase.as_deref(), Some("Running"));
    for kind in ["Initialized", "ContainersReady", "Ready"] {
        assert_eq!(condition(&status, kind), yes(), "{kind}");
    }

    // It is being restarted.
    let mut crashed = container("proxy", waiting("CrashLoopBackOff"));
    crashed.last_termination = match ended(1) {
        State::Terminated(ended) => Some(ended),
        State::Waiting(_) | State::Running(_) => None,
    };
    let status = compute(&pod, Some(&seen(crashed, [running(), running()])));
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(condition(&status, "Initialized"), yes());
    let message = "containers with unready status: [proxy]".to_owned();
    let no = ("False".to_owned(), message);
    assert_eq!(condition(&status, "ContainersReady"), no);
}

#[test]
fn a_sidecar_is_ready_when_its_probe_says_so_and_not_when_it_has_ended() {
    let pod = pod_with_sidecar("Never");
    let ready = |proxy: pb::ContainerStatus| {
        let status = compute(&pod, Some(&seen(proxy, [running(), running()])));
        status.init_container_statuses.unwrap()[0].ready
    };
    assert!(ready(container("proxy", running())));
    let mut unready = container("proxy", running());
    unready.ready = false;
    assert!(!ready(unready));
    assert!(!ready(container("proxy", ended(0))));
}

#[test]
fn how_a_sidecar_ended_does_not_count() {
    let pod = pod_with_sidecar("Never");
    let mut all = seen(container("proxy", ended(137)), [ended(0), ended(0)]);
    all.phase = PodPhase::Finished.into();
    all.outcome = Some(pb::Outcome {
        kind: pb::OutcomeKind::Succeeded.into(),
        ..pb::Outcome::default()
    });
    let status = compute(&pod, Some(&all));
    assert_eq!(status.phase.as_deref(), Some("Succeeded"));
    let proxy = status.init_container_statuses.unwrap().remove(0);
    let code = proxy.state.unwrap().terminated.unwrap().exit_code;
    assert_eq!(code, 137);
}
