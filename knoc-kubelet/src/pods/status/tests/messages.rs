//! The messages with which containers have ended.

use super::*;

#[test]
fn the_containers_share_what_messages_of_their_ends_may_take() {
    let long = |name: &str, text: &str| {
        let message = text.repeat(4096 / text.len());
        let ended = pb::Terminated {
            exit_code: 1,
            message,
            ..pb::Terminated::default()
        };
        pb::ContainerStatus {
            last_termination: Some(ended.clone()),
            ..container(name, State::Terminated(ended))
        }
    };
    let lengths = |status: &PodStatus| {
        let all = status.container_statuses.iter().flatten();
        let states = all.flat_map(|one| [&one.state, &one.last_state]);
        let ended = states.map(|state| state.clone().unwrap().terminated.unwrap());
        let lengths = ended.map(|ended| ended.message.unwrap().len());
        lengths.collect::<Vec<_>>()
    };
    let both = vec![long("a", "0123456789abcdef"), long("b", "\u{6f22}")];
    let few = pod("Never", false, &json!({}));
    let few = compute(&few, Some(&observed(PodPhase::Running, both.clone())));
    assert_eq!(lengths(&few), [4096, 4096, 4095, 4095]);
    // With three that have no message, each has a fifth. No character is cut.
    let mut many = serde_json::to_value(pod("Never", true, &json!({}))).unwrap();
    let named = |name: &str| json!({"name": name, "image": "busybox"});
    many["spec"]["ephemeralContainers"] = json!([named("d"), named("e")]);
    let of = |pod: &Value| {
        let pod: Pod = serde_json::from_value(pod.clone()).unwrap();
        compute(&pod, Some(&observed(PodPhase::Running, both.clone())))
    };
    let status = of(&many);
    assert_eq!(lengths(&status), [2457; 4]);
    // A sixth is no multiple of the length of this character.
    many["spec"]["initContainers"] = json!([named("i"), named("j")]);
    many["status"] = serde_json::to_value(status).unwrap();
    assert_eq!(lengths(&of(&many)), [2048, 2048, 2046, 2046]);
}
