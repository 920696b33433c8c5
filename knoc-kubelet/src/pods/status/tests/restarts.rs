//! Rules about exit codes, which restart one container or all of them.

use knoc_proto::pod::RESTARTING_ALL;

use super::*;

/// A pod with the init container `i` and the containers `a` and `b`; `action` is that of a rule of `a`.
fn pod_with_rule(action: &str, status: &Value) -> Pod {
    let mut json = serde_json::to_value(pod("Never", true, status)).unwrap();
    json["spec"]["containers"][0]["restartPolicy"] = "Never".into();
    json["spec"]["containers"][0]["restartPolicyRules"] =
        json!([{"action": action, "exitCodes": {"operator": "In", "values": [42]}}]);
    serde_json::from_value(json).unwrap()
}

fn seen(init: State, regular: [State; 2]) -> pb::PodObserved {
    let [a, b] = regular;
    pb::PodObserved {
        init_containers: vec![container("i", init)],
        ..observed(
            PodPhase::Running,
            vec![container("a", a), container("b", b)],
        )
    }
}

/// The status and the reason of the condition.
fn condition(status: &PodStatus) -> Option<(&str, &str)> {
    let mut all = status.conditions.iter().flatten();
    let one = all.find(|one| one.type_ == "AllContainersRestarting")?;
    Some((
        one.status.as_str(),
        one.reason.as_deref().unwrap_or_default(),
    ))
}

#[test]
fn a_pod_whose_containers_may_all_be_restarted_says_when_they_are() {
    let runs = json!({"phase": "Running"});
    let normal = seen(ended(0), [running(), running()]);
    let pod = pod_with_rule("RestartAllContainers", &runs);
    let status = compute(&pod, Some(&normal));
    assert_eq!(condition(&status), Some(("False", "")));
    let wait = || waiting(RESTARTING_ALL);
    let ends = seen(wait(), [wait(), running()]);
    let status = compute(&pod, Some(&ends));
    let expected = ("True", "RestartAllContainersStarted");
    assert_eq!(condition(&status), Some(expected));
    assert_eq!(status.phase.as_deref(), Some("Running"));
    let mut over = seen(ended(0), [ended(0), ended(0)]);
    over.set_phase(PodPhase::Finished);
    over.outcome = Some(pb::Outcome {
        kind: OutcomeKind::Succeeded.into(),
        ..pb::Outcome::default()
    });
    let status = compute(&pod, Some(&over));
    assert_eq!(condition(&status), Some(("False", "PodCompleted")));
    // No other pod has the condition.
    let status = compute(&pod_with_rule("Restart", &runs), Some(&normal));
    assert_eq!(condition(&status), None);
}

#[test]
fn a_pod_whose_init_container_is_restarted_by_a_rule_is_pending_whatever_its_policy() {
    let pod = pod_with_rule("RestartAllContainers", &json!({"phase": "Pending"}));
    let wait = || waiting("PodInitializing");
    let mut observed = seen(waiting("CrashLoopBackOff"), [wait(), wait()]);
    observed.init_containers[0].last_termination = match ended(42) {
        State::Terminated(ended) => Some(ended),
        State::Running(_) | State::Waiting(_) => None,
    };
    let status = compute(&pod, Some(&observed));
    assert_eq!(status.phase.as_deref(), Some("Pending"));
}
