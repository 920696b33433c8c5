use serde_json::{Value, json};

use super::*;

mod address;
mod behind;
mod ephemeral;
mod gates;
mod hooks;
mod messages;
mod restarts;
mod sidecars;
mod users;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn pod(policy: &str, init: bool, status: &Value) -> Pod {
    let mut pod = json!({
        "metadata": {"name": "p", "namespace": "ns", "uid": "u", "generation": 2},
        "spec": {
            "restartPolicy": policy,
            "containers": [{"name": "a", "image": "busybox"}, {"name": "b", "image": "busybox"}],
        },
        "status": status,
    });
    if init {
        pod["spec"]["initContainers"] = json!([{"name": "i", "image": "busybox"}]);
    }
    serde_json::from_value(pod).unwrap()
}

fn job() -> pb::Job {
    pb::Job {
        id: "12".to_owned(),
        state: "PENDING".to_owned(),
        reason: "Priority".to_owned(),
        estimated_start: 7200,
        ..pb::Job::default()
    }
}

fn observed(phase: PodPhase, containers: Vec<pb::ContainerStatus>) -> pb::PodObserved {
    pb::PodObserved {
        uid: "u".to_owned(),
        spec_generation: 2,
        phase: phase.into(),
        job: Some(job()),
        containers,
        ..pb::PodObserved::default()
    }
}

fn container(name: &str, state: State) -> pb::ContainerStatus {
    pb::ContainerStatus {
        name: name.to_owned(),
        ready: matches!(state, State::Running(_)),
        started: true,
        image: "busybox".to_owned(),
        image_id: "sha256:1".to_owned(),
        container_id: format!("apptainer://12.{name}.0"),
        state: Some(state),
        ..pb::ContainerStatus::default()
    }
}

use knoc_proto::pb::container_status::State;

fn running() -> State {
    State::Running(pb::Running {
        started_at: 5_000_000_000,
    })
}

fn ended(exit_code: i32) -> State {
    State::Terminated(pb::Terminated {
        exit_code,
        reason: if exit_code == 0 { "Completed" } else { "Error" }.to_owned(),
        started_at: 5_000_000_000,
        finished_at: 6_000_000_000,
        ..pb::Terminated::default()
    })
}

fn waiting(reason: &str) -> State {
    State::Waiting(pb::Waiting {
        reason: reason.to_owned(),
        message: String::new(),
    })
}

fn compute(pod: &Pod, observed: Option<&pb::PodObserved>) -> PodStatus {
    let input = Input {
        pod,
        observed,
        hold: None,
        rejection: None,
        lacking: &[],
        refused: &[],
        unreachable: false,
        pod_ip: PodIp::None,
        judged: pod.metadata.generation,
        now: at(1000),
    };
    status(&input).unwrap()
}

fn json_of(status: &PodStatus) -> String {
    serde_json::to_string_pretty(status).unwrap()
}

#[test]
fn the_first_status_names_every_container() {
    let status = compute(&pod("Always", true, &json!({})), None);
    insta::assert_snapshot!(json_of(&status));
}

#[test]
fn init_statuses_are_in_the_order_of_the_spec_and_others_in_that_of_their_names() {
    let mut given = serde_json::to_value(pod("Always", false, &json!({}))).unwrap();
    let named = |name: &str| json!({"name": name, "image": "busybox"});
    given["spec"]["containers"] = json!([named("web"), named("app")]);
    given["spec"]["initContainers"] = json!([named("second"), named("first")]);
    given["spec"]["ephemeralContainers"] = json!([named("look"), named("debug")]);
    let status = compute(&serde_json::from_value(given).unwrap(), None);
    let order = |list: Option<Vec<ContainerStatus>>| {
        let all = list.unwrap().into_iter().map(|one| one.name);
        all.collect::<Vec<_>>()
    };
    assert_eq!(order(status.container_statuses), ["app", "web"]);
    assert_eq!(order(status.init_container_statuses), ["second", "first"]);
    assert_eq!(
        order(status.ephemeral_container_statuses),
        ["debug", "look"]
    );
    let mut conditions = status.conditions.into_iter().flatten();
    let ready = conditions
        .find(|one| one.type_ == "ContainersReady")
        .unwrap();
    let text = "containers with unready status: [web app]";
    assert_eq!(ready.message.as_deref(), Some(text));
}

#[test]
fn pending_says_why_and_until_when() {
    let observed = observed(PodPhase::Queued, vec![]);
    let status = compute(
        &pod("Never", false, &json!({"phase": "Pending"})),
        Some(&observed),
    );
    assert_eq!(status.phase.as_deref(), Some("Pending"));
    let text = "Slurm job 12 pending: Priority, estimated start 1970-01-01T02:00Z";
    assert_eq!(status.message.as_deref(), Some(text));
    let waiting = status.container_statuses.unwrap()[0]
        .state
        .clone()
        .unwrap()
        .waiting
        .unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("ContainerCreating"));
    assert_eq!(waiting.message.as_deref(), Some(text));
}

/// A new process that does not know yet what the agent has, or why the agent does not have the pod.
#[test]
fn a_process_that_knows_nothing_changes_nothing() {
    let mut running = observed(PodPhase::Running, vec![container("a", running())]);
    running.host_ip = "10.0.0.7".to_owned();
    let queued = observed(PodPhase::Queued, vec![]);
    let hold = Hold {
        reason: "CreateContainerConfigError".to_owned(),
        message: "configmap \"later\" not found".to_owned(),
    };
    let new = pod("Always", true, &json!({"phase": "Pending"}));
    for (observed, hold) in [
        (Some(&running), None),
        (Some(&queued), None),
        (None, Some(&hold)),
    ] {
        let input = |pod, observed, hold, now| Input {
            pod,
            observed,
            hold,
            rejection: None,
            lacking: &[],
            refused: &[],
            unreachable: false,
            pod_ip: PodIp::None,
            judged: Some(2),
            now: at(now),
        };
        let first = status(&input(&new, observed, hold, 1000)).unwrap();
        let mut published = new.clone();
        published.status = Some(first.clone());
        let second = Input {
            judged: None,
            ..input(&published, None, None, 2000)
        };
        assert_eq!(status(&second).unwrap(), first);
        let again = input(&published, observed, hold, 2000);
        assert_eq!(status(&again).unwrap(), first);
    }
}

#[test]
fn an_image_that_cannot_be_pulled_is_the_containers_reason() {
    let mut observed = observed(PodPhase::Staging, vec![]);
    observed.reason = "ErrImagePull".to_owned();
    observed.message = "FATAL: no such image".to_owned();
    let status = compute(&pod("Never", false, &json!({})), Some(&observed));
    let waiting = status.container_statuses.unwrap()[0]
        .state
        .clone()
        .unwrap()
        .waiting
        .unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("ErrImagePull"));
}

#[test]
fn running_and_ready() {
    let mut observed = observed(
        PodPhase::Running,
        vec![container("a", running()), container("b", running())],
    );
    observed.job.as_mut().unwrap().started_at = 4;
    observed.host_ip = "10.0.0.7".to_owned();
    let status = compute(
        &pod("Never", false, &json!({"phase": "Pending"})),
        Some(&observed),
    );
    insta::assert_snapshot!(json_of(&status));
}

type Case = (
    &'static str,
    &'static str,
    PodPhase,
    [Option<State>; 2],
    &'static str,
);

/// Restart policy, phase in the API server, the agent's phase, the states of both containers, the resulting phase.
#[rustfmt::skip]
fn phase_cases() -> Vec<Case> {
    use PodPhase::{Finished, Lost, Queued, Running, Throttled};
    let two = |a, b| [Some(a), Some(b)];
    vec![
        ("Never", "Pending", Running, two(running(), running()), "Running"),
        ("Never", "Pending", Running, two(waiting("ContainerCreating"), running()), "Pending"),
        ("Never", "Running", Running, two(ended(0), running()), "Running"),
        // The containers have ended, but the pod has not until the agent reports it.
        ("Never", "Running", Running, two(ended(0), ended(0)), "Running"),
        ("Never", "Running", Running, two(ended(0), ended(1)), "Running"),
        ("OnFailure", "Running", Running, two(ended(1), ended(0)), "Running"),
        ("Always", "Running", Running, two(ended(0), ended(0)), "Running"),
        // Running is never left for Pending.
        ("Always", "Running", Running, two(waiting("CrashLoopBackOff"), running()), "Running"),
        ("Never", "Running", Lost, [None, None], "Running"),
        ("Never", "Pending", Lost, [None, None], "Pending"),
        ("Never", "Pending", Throttled, [None, None], "Pending"),
        ("Always", "Running", Queued, [None, None], "Running"),
        // Without an outcome a pod never succeeds.
        ("Always", "Running", Finished, two(ended(0), ended(0)), "Failed"),
    ]
}

#[test]
fn the_phase_function_table() {
    for (policy, before, phase, states, expected) in phase_cases() {
        let containers = ["a", "b"].into_iter().zip(states);
        let containers = containers.filter_map(|(name, state)| Some(container(name, state?)));
        let observed = observed(phase, containers.collect());
        let pod = pod(policy, false, &json!({"phase": before}));
        let status = compute(&pod, Some(&observed));
        let case = format!("{policy} {before} {phase:?}");
        assert_eq!(status.phase.as_deref(), Some(expected), "{case}");
    }
}

#[test]
fn init_containers_come_first() {
    let run = |policy: &str, state: State| {
        let mut observed = observed(PodPhase::Running, vec![]);
        observed.init_containers = vec![container("i", state)];
        compute(
            &pod(policy, true, &json!({"phase": "Pending"})),
            Some(&observed),
        )
    };
    let status = run("Always", running());
    assert_eq!(status.phase.as_deref(), Some("Pending"));
    let find = |status: &PodStatus, kind: &str| {
        let list = status.conditions.clone().unwrap();
        list.into_iter().find(|one| one.type_ == kind).unwrap()
    };
    let condition = find(&status, "Initialized");
    assert_eq!(condition.status, "False");
    assert_eq!(
        condition.message.as_deref(),
        Some("containers with incomplete status: [i]")
    );
    let waiting = status.container_statuses.as_ref().unwrap()[0]
        .state
        .clone()
        .unwrap();
    assert_eq!(
        waiting.waiting.unwrap().reason.as_deref(),
        Some("PodInitializing")
    );
    assert_eq!(find(&run("Always", ended(0)), "Initialized").status, "True");
    assert_eq!(run("Always", ended(1)).phase.as_deref(), Some("Pending"));
}

fn finished(
    kind: OutcomeKind,
    reason: &str,
    containers: Vec<pb::ContainerStatus>,
) -> pb::PodObserved {
    let mut observed = observed(PodPhase::Finished, containers);
    observed.outcome = Some(pb::Outcome {
        kind: kind.into(),
        reason: reason.to_owned(),
        message: if reason.is_empty() {
            String::new()
        } else {
            format!("because of {reason}")
        },
        disruption: reason == "NodeFailed",
        finished_at: 9_000_000_000,
    });
    observed
}

#[test]
fn a_succeeded_pod() {
    let containers = vec![container("a", ended(0)), container("b", ended(0))];
    let observed = finished(OutcomeKind::Succeeded, "", containers);
    let status = compute(
        &pod("Never", false, &json!({"phase": "Running"})),
        Some(&observed),
    );
    insta::assert_snapshot!(json_of(&status));
}

#[test]
fn a_failed_node_is_a_disruption_and_no_guess_of_success() {
    let containers = vec![container("a", running()), container("b", ended(0))];
    let observed = finished(OutcomeKind::Failed, "NodeFailed", containers);
    let status = compute(
        &pod("Never", false, &json!({"phase": "Running"})),
        Some(&observed),
    );
    insta::assert_snapshot!(json_of(&status));
}

#[test]
fn a_job_without_report_is_unknown() {
    let observed = finished(OutcomeKind::Failed, "ContainerStatusUnknown", vec![]);
    let status = compute(
        &pod("Always", false, &json!({"phase": "Running"})),
        Some(&observed),
    );
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    for one in status.container_statuses.unwrap() {
        let terminated = one.state.unwrap().terminated.unwrap();
        assert_eq!(terminated.reason.as_deref(), Some("ContainerStatusUnknown"));
    }
}

/// As after a lost agent during CrashLoopBackOff: the last attempt's end is known.
#[test]
fn a_container_between_two_attempts_ended_as_its_last_one() {
    let last = json!({"terminated": {"exitCode": 3, "reason": "Error"}});
    let before = json!({"phase": "Running", "containerStatuses": [
        {"name": "a", "image": "busybox", "imageID": "x", "ready": false, "restartCount": 2,
         "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": last},
    ]});
    let observed = finished(OutcomeKind::Failed, "ContainerStatusUnknown", vec![]);
    let status = compute(&pod("Always", false, &before), Some(&observed));
    let shown = serde_json::to_value(&status.container_statuses.unwrap()[0]).unwrap();
    assert_eq!(shown["state"], last);
    assert_eq!(shown.get("lastState"), None);
    assert_eq!(shown["restartCount"], 2);
}

#[test]
fn a_stop_signal_of_the_pod_is_shown() {
    let mut pod = pod("Always", false, &json!({"phase": "Pending"}));
    let containers = &mut pod.spec.as_mut().unwrap().containers;
    containers[0].lifecycle =
        Some(serde_json::from_value(json!({"stopSignal": "SIGUSR1"})).unwrap());
    let observed = observed(PodPhase::Running, vec![container("a", running())]);
    let status = compute(&pod, Some(&observed));
    let shown = status.container_statuses.unwrap();
    assert_eq!(shown[0].stop_signal.as_deref(), Some("SIGUSR1"));
    assert_eq!(shown[1].stop_signal, None);
}

#[test]
fn a_terminal_phase_is_never_left() {
    let pod = pod("Always", false, &json!({"phase": "Failed"}));
    let observed = observed(PodPhase::Running, vec![container("a", running())]);
    let input = Input {
        pod: &pod,
        observed: Some(&observed),
        hold: None,
        rejection: None,
        lacking: &[],
        refused: &[],
        unreachable: false,
        pod_ip: PodIp::None,
        judged: pod.metadata.generation,
        now: at(1),
    };
    assert_eq!(status(&input), None);
}

#[test]
fn a_rejected_pod_fails_with_its_whole_message() {
    let pod = pod("Always", false, &json!({"phase": "Pending"}));
    let rejection = Rejection {
        reason: "UnsupportedPodSpec".to_owned(),
        message: "all".to_owned(),
    };
    let input = Input {
        pod: &pod,
        observed: None,
        hold: None,
        rejection: Some(&rejection),
        lacking: &[],
        refused: &[],
        unreachable: false,
        pod_ip: PodIp::None,
        judged: pod.metadata.generation,
        now: at(1),
    };
    let status = status(&input).unwrap();
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    assert_eq!(status.reason.as_deref(), Some("UnsupportedPodSpec"));
}

#[test]
fn a_missing_config_map_is_shown_by_the_containers() {
    let pod = pod("Always", false, &json!({"phase": "Pending"}));
    let hold = Hold {
        reason: "CreateContainerConfigError".to_owned(),
        message: "configmap \"x\" not found".to_owned(),
    };
    let input = Input {
        pod: &pod,
        observed: None,
        hold: Some(&hold),
        rejection: None,
        lacking: &[],
        refused: &[],
        unreachable: false,
        pod_ip: PodIp::None,
        judged: pod.metadata.generation,
        now: at(1),
    };
    let status = status(&input).unwrap();
    let state = status.container_statuses.unwrap()[1].state.clone().unwrap();
    assert_eq!(
        state.waiting.unwrap().reason.as_deref(),
        Some("CreateContainerConfigError")
    );
    assert_eq!(status.phase.as_deref(), Some("Pending"));
}

#[test]
fn a_cut_link_only_takes_readiness() {
    let before = json!({
        "phase": "Running",
        "startTime": "1970-01-01T00:00:04Z",
        "conditions": [{"type": "PodReadyToStartContainers", "status": "True", "lastTransitionTime": "1970-01-01T00:00:05Z"}],
        "containerStatuses": [
            {"name": "a", "image": "busybox", "imageID": "x", "ready": true, "restartCount": 3, "state": {"running": {}}},
            {"name": "b", "image": "busybox", "imageID": "x", "ready": true, "restartCount": 0, "state": {"running": {}}},
        ],
    });
    let pod = pod("Always", false, &before);
    let input = Input {
        pod: &pod,
        observed: None,
        hold: None,
        rejection: None,
        lacking: &[],
        refused: &[],
        unreachable: true,
        pod_ip: PodIp::None,
        judged: pod.metadata.generation,
        now: at(1000),
    };
    let status = status(&input).unwrap();
    insta::assert_snapshot!(json_of(&status));
}

#[test]
fn a_generation_counts_once_it_was_judged_whether_it_is_taken_over_or_not() {
    let before = json!({
        "phase": "Running", "observedGeneration": 1,
        "conditions": [
            {"type": "Initialized", "status": "True", "observedGeneration": 1},
            {"type": "Ready", "status": "True", "observedGeneration": 1},
        ],
    });
    let pod = pod("Always", false, &before);
    // The agent goes on with the first generation, because it rejected the second.
    let observed = pb::PodObserved {
        spec_generation: 1,
        ..observed(PodPhase::Running, vec![container("a", running())])
    };
    let said = |judged: Option<i64>| {
        let input = Input {
            pod: &pod,
            observed: Some(&observed),
            hold: None,
            rejection: None,
            lacking: &[],
            refused: &[],
            unreachable: judged.is_none(),
            pod_ip: PodIp::None,
            judged,
            now: at(1000),
        };
        let status = status(&input).unwrap();
        let of = |kind: &str| {
            let list = status.conditions.iter().flatten();
            let mut found = list.filter(|one| one.type_ == kind);
            found.next().unwrap().observed_generation
        };
        let of = ["Initialized", "Ready", "PodScheduled"].map(of);
        (status.observed_generation, of)
    };
    assert_eq!(said(Some(2)), (Some(2), [Some(2); 3]));
    // The link is down: the status is still about the first generation.
    assert_eq!(said(None), (Some(1), [Some(1), Some(1), None]));
}

#[test]
fn restart_counts_never_fall() {
    let before = json!({"phase": "Running", "containerStatuses": [
        {"name": "a", "image": "busybox", "imageID": "x", "ready": true, "restartCount": 3, "state": {"running": {}}},
    ]});
    let observed = observed(PodPhase::Running, vec![container("a", running())]);
    let status = compute(&pod("Always", false, &before), Some(&observed));
    assert_eq!(status.container_statuses.unwrap()[0].restart_count, 3);
}

#[test]
fn messages_are_shown_safely_and_bounded_and_a_programs_own_stays() {
    let nasty = format!("one\ntwo\u{1b}[2J\u{202e}{}", "x".repeat(100_000));
    let own = "its own\u{1b}words".to_owned();
    let ended = State::Terminated(pb::Terminated {
        message: own.clone(),
        ..pb::Terminated::default()
    });
    let mut observed = observed(PodPhase::Throttled, vec![container("a", ended)]);
    observed.message = nasty.clone();
    let pod = pod("Never", false, &json!({"phase": "Pending"}));
    let status = compute(&pod, Some(&observed));
    let message = status.message.unwrap();
    assert!(
        message.contains("one\ntwo\\u{1b}[2J\\u{202e}xxx"),
        "{message}"
    );
    assert!(message.len() <= 8 << 10);
    let containers = status.container_statuses.unwrap();
    let state = |index: usize| containers[index].state.clone().unwrap();
    assert_eq!(state(0).terminated.unwrap().message, Some(own));
    let waiting = state(1).waiting.unwrap().message.unwrap();
    assert!(!waiting.contains('\u{1b}') && waiting.len() <= 8 << 10);
    let rejection = Rejection::new("UnsupportedPodSpec", &nasty);
    let input = Input {
        pod: &pod,
        observed: None,
        hold: None,
        rejection: Some(&rejection),
        lacking: &[],
        refused: &[],
        unreachable: false,
        pod_ip: PodIp::None,
        judged: None,
        now: Timestamp::UNIX_EPOCH,
    };
    let message = super::status(&input).unwrap().message.unwrap();
    assert!(
        !message.contains('\u{1b}') && message.len() <= 8 << 10,
        "{message}"
    );
}
