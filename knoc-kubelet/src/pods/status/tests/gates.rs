//! Readiness gates, and the condition of a resize.

use super::*;

#[test]
fn a_pod_is_ready_only_when_its_gates_are_open() {
    let mut json = serde_json::to_value(pod("Always", false, &json!({}))).unwrap();
    json["spec"]["readinessGates"] = json!([{"conditionType": "example.com/in-the-pool"}]);
    let all = observed(
        PodPhase::Running,
        vec![container("a", running()), container("b", running())],
    );
    let ready = |json: &Value| {
        let pod: Pod = serde_json::from_value(json.clone()).unwrap();
        let status = compute(&pod, Some(&all));
        let ready = status.conditions.unwrap();
        let ready = ready.into_iter().find(|one| one.type_ == "Ready").unwrap();
        let [reason, message] = [ready.reason, ready.message].map(Option::unwrap_or_default);
        (ready.status, reason, message)
    };
    let closed = |message: &str| {
        let reason = "ReadinessGatesNotReady".to_owned();
        ("False".to_owned(), reason, message.to_owned())
    };
    let missing =
        "corresponding condition of pod readiness gate \"example.com/in-the-pool\" does not exist.";
    assert_eq!(ready(&json), closed(missing));
    let gate = |status| json!([{"type": "example.com/in-the-pool", "status": status}]);
    json["status"] = json!({"conditions": gate("False")});
    let shut =
        "the status of pod readiness gate \"example.com/in-the-pool\" is not \"True\", but False";
    assert_eq!(ready(&json), closed(shut));
    json["status"] = json!({"conditions": gate("True")});
    let open = ("True".to_owned(), String::new(), String::new());
    assert_eq!(ready(&json), open);
}

#[test]
fn a_resize_is_infeasible_and_the_status_shows_what_the_pod_has() {
    let mut json = serde_json::to_value(pod("Always", false, &json!({}))).unwrap();
    json["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "2"}});
    let all = observed(
        PodPhase::Running,
        vec![container("a", running()), container("b", running())],
    );
    let pod: Pod = serde_json::from_value(json.clone()).unwrap();
    let status = compute(&pod, Some(&all));
    let resizes = |status: &PodStatus| {
        let mut all = status.conditions.iter().flatten();
        all.any(|one| one.type_ == "PodResizePending")
    };
    assert!(!resizes(&status));
    let cpu = |status: &PodStatus| {
        let statuses = status.container_statuses.as_ref().unwrap();
        let resources = statuses[0].resources.clone().unwrap();
        resources.requests.unwrap()["cpu"].0.clone()
    };
    assert_eq!(cpu(&status), "2");
    let allocated = status.container_statuses.as_ref().unwrap()[0].clone();
    assert_eq!(allocated.allocated_resources.unwrap()["cpu"].0, "2");

    json["status"] = serde_json::to_value(&status).unwrap();
    json["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "3"}});
    let pod: Pod = serde_json::from_value(json).unwrap();
    let status = compute(&pod, Some(&all));
    assert!(resizes(&status));
    assert_eq!(cpu(&status), "2");
}

#[test]
fn a_resize_of_the_pod_as_a_whole_is_infeasible_too() {
    let mut json = serde_json::to_value(pod("Always", false, &json!({}))).unwrap();
    json["spec"]["resources"] = json!({"requests": {"cpu": "4"}, "limits": {"cpu": "6"}});
    let all = observed(PodPhase::Running, vec![container("a", running())]);
    let shown = |json: &Value| {
        let pod: Pod = serde_json::from_value(json.clone()).unwrap();
        serde_json::to_value(compute(&pod, Some(&all))).unwrap()
    };
    let first = shown(&json);
    assert_eq!(first["resources"], json["spec"]["resources"]);
    assert_eq!(first["allocatedResources"], json!({"cpu": "4"}));
    json["status"] = first.clone();
    json["spec"]["resources"] = json!({"requests": {"cpu": "5"}, "limits": {"cpu": "6"}});
    let second = shown(&json);
    assert_eq!(second["resources"], first["resources"]);
    let mut conditions = second["conditions"].as_array().unwrap().iter();
    let pending = conditions.find(|one| one["type"] == "PodResizePending");
    assert_eq!(pending.unwrap()["reason"], "Infeasible");
}

#[test]
fn the_status_shows_the_mounts_of_each_container() {
    let mut json = serde_json::to_value(pod("Always", false, &json!({}))).unwrap();
    let mounts = json!([
        {"name": "token", "mountPath": "/t", "readOnly": true, "subPath": "x"},
        {"name": "data", "mountPath": "/d", "readOnly": false},
    ]);
    json["spec"]["containers"][0]["volumeMounts"] = mounts.clone();
    json["spec"]["ephemeralContainers"] =
        json!([{"name": "e", "image": "busybox", "volumeMounts": mounts}]);
    let pod: Pod = serde_json::from_value(json).unwrap();
    let all = observed(PodPhase::Running, vec![container("a", running())]);
    let status = serde_json::to_value(compute(&pod, Some(&all))).unwrap();
    let shown = json!([
        {"name": "token", "mountPath": "/t", "readOnly": true, "recursiveReadOnly": "Disabled"},
        {"name": "data", "mountPath": "/d"},
    ]);
    assert_eq!(status["containerStatuses"][0]["volumeMounts"], shown);
    assert_eq!(status["containerStatuses"][1]["volumeMounts"], json!(null));
    assert_eq!(
        status["ephemeralContainerStatuses"][0]["volumeMounts"],
        shown
    );
}
