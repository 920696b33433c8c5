//! As whom the first processes of containers began.

use super::*;

/// A running container that began with these ids.
fn began(ids: &[u32]) -> pb::ContainerStatus {
    pb::ContainerStatus {
        user: ids.to_vec(),
        ..container("a", running())
    }
}

fn compute_with(pod: &Pod, a: pb::ContainerStatus) -> PodStatus {
    let b = container("b", running());
    compute(pod, Some(&observed(PodPhase::Running, vec![a, b])))
}

/// The user of the container `a`.
fn user(status: &PodStatus) -> Value {
    let all = status.container_statuses.as_deref().unwrap();
    serde_json::to_value(&all[0]).unwrap()["user"].clone()
}

#[test]
fn the_user_and_the_groups_of_a_program_are_shown() {
    let mut pod = pod("Always", false, &json!({"phase": "Pending"}));
    let with = |ids: &[u32]| user(&compute_with(&pod, began(ids)));
    assert_eq!(with(&[]), Value::Null, "an older agent says nothing");
    let shown = json!({"linux": {"uid": 1000, "gid": 0, "supplementalGroups": [0, 4000]}});
    assert_eq!(with(&[1000, 0, 4000]), shown);
    // The API server would reject the whole status.
    assert_eq!(with(&[1000, 0, u32::MAX, 4000]), shown);
    assert_eq!(with(&[u32::MAX, 0]), Value::Null);
    pod.status = Some(compute_with(&pod, began(&[1000, 0, 4000])));
    let hook = pb::ContainerStatus {
        in_post_start: true,
        restart_count: 1,
        container_id: "apptainer://12.a.1".to_owned(),
        ..began(&[7, 7])
    };
    assert_eq!(user(&compute_with(&pod, hook.clone())), shown);
    let runs = pb::ContainerStatus {
        in_post_start: false,
        ..hook
    };
    let other = json!({"linux": {"uid": 7, "gid": 7, "supplementalGroups": [7]}});
    assert_eq!(user(&compute_with(&pod, runs)), other);
}

#[test]
fn a_first_hook_changes_nothing_in_the_status() {
    let mut pod = pod("Always", false, &json!({"phase": "Pending"}));
    let hook = |ids: &[u32]| pb::ContainerStatus {
        in_post_start: true,
        ..began(ids)
    };
    let status = compute_with(&pod, hook(&[]));
    let before = status.container_statuses.clone();
    pod.status = Some(status);
    let status = compute_with(&pod, hook(&[1000, 0]));
    assert_eq!(status.container_statuses, before);
}
