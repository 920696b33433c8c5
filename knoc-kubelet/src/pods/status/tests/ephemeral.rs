//! Ephemeral containers.

use super::*;
use k8s_openapi::api::core::v1::ContainerStatus;

fn debugged() -> Pod {
    let mut pod = pod("Always", false, &json!({"phase": "Running"}));
    let spec = pod.spec.as_mut().unwrap();
    spec.ephemeral_containers =
        serde_json::from_value(json!([{"name": "debugger", "image": "busybox"}])).unwrap();
    pod
}

/// The status of the pod's only ephemeral container.
fn said(pod: &Pod, ephemeral: Option<State>, change: fn(&mut Input<'_>)) -> ContainerStatus {
    let mut all = observed(PodPhase::Running, vec![container("a", running())]);
    let seen = ephemeral.map(|state| container("debugger", state));
    all.ephemeral_containers = seen.into_iter().collect();
    let mut input = Input {
        pod,
        observed: Some(&all),
        hold: None,
        rejection: None,
        lacking: &[],
        refused: &[],
        unreachable: false,
        pod_ip: PodIp::None,
        judged: pod.metadata.generation,
        now: at(100),
    };
    change(&mut input);
    let statuses = status(&input)
        .unwrap()
        .ephemeral_container_statuses
        .unwrap();
    let [debugger] = &statuses[..] else {
        panic!("{statuses:?}");
    };
    debugger.clone()
}

#[test]
fn an_ephemeral_container_is_shown_as_the_agent_sees_it() {
    let pod = debugged();
    let waits = said(&pod, None, |_| {});
    let reason = waits.state.unwrap().waiting.unwrap().reason;
    assert_eq!(reason.as_deref(), Some("ContainerCreating"));
    let runs = said(&pod, Some(running()), |_| {});
    assert!(runs.state.unwrap().running.is_some() && !runs.ready);
    let over = said(&pod, Some(ended(3)), |_| {});
    assert_eq!(over.state.unwrap().terminated.unwrap().exit_code, 3);
    let none = super::pod("Always", false, &json!({}));
    assert_eq!(compute(&none, None).ephemeral_container_statuses, None);
}

#[test]
fn a_rejected_ephemeral_container_is_terminated_with_the_reason_and_one_that_lacks_something_waits()
{
    let pod = debugged();
    let rejected = ["spec.ephemeralContainers[debugger].ports: none".to_owned()];
    assert!(refused(&rejected, "debug").is_none());
    assert_eq!(refused(&rejected, "debugger").as_ref(), rejected.first());
    let over = said(&pod, None, |input| {
        input.refused = Box::leak(Box::new([
            "spec.ephemeralContainers[debugger].ports: none".to_owned()
        ]));
    });
    let over = over.state.unwrap().terminated.unwrap();
    assert_eq!(over.reason.as_deref(), Some("ContainerCannotRun"));
    assert!(over.message.unwrap().contains("debugger].ports: none"));
    let waits = said(&pod, None, |input| {
        input.hold = Some(Box::leak(Box::new(Hold {
            reason: "CreateContainerConfigError".to_owned(),
            message: "no secret".to_owned(),
        })));
    });
    let waits = waits.state.unwrap().waiting.unwrap();
    assert_eq!(waits.reason.as_deref(), Some("CreateContainerConfigError"));
    assert_eq!(waits.message.as_deref(), Some("no secret"));
}

fn lacks(input: &mut Input<'_>, container: &str) {
    input.lacking = Box::leak(Box::new([Lacking {
        container: container.to_owned(),
        messages: vec!["no secret".to_owned(), "no key".to_owned()],
    }]));
}

#[test]
fn only_the_ephemeral_container_that_lacks_something_says_so() {
    let pod = debugged();
    let own = said(&pod, None, |input| lacks(input, "debugger"));
    let own = own.state.unwrap().waiting.unwrap();
    assert_eq!(own.reason.as_deref(), Some("CreateContainerConfigError"));
    assert_eq!(own.message.as_deref(), Some("no secret; no key"));
    let other = said(&pod, None, |input| lacks(input, "other"));
    let other = other.state.unwrap().waiting.unwrap();
    assert_eq!(other.reason.as_deref(), Some("ContainerCreating"));
    assert_eq!(other.message, None);
}
