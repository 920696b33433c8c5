//! The writes to a pod in the API server: the status (only what changed), and the last DELETE.
//!
//! The patch names the UID, so it conflicts if the pod was recreated with the same name. Fields of other controllers
//! are never sent. This module decides nothing.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodCondition, PodStatus};
use knoc_translate::JOB_ID;
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use serde_json::{Map, Value, json};

use super::resize::RESIZE_PENDING;

/// The deadline of each write.
const DEADLINE: Duration = Duration::from_secs(10);

/// The fields of a status that the kubelet owns. They are sent as null if they have no value but the API server has
/// one.
const OURS: &[&str] = &[
    "allocatedResources",
    "containerStatuses",
    "hostIP",
    "hostIPs",
    "ephemeralContainerStatuses",
    "initContainerStatuses",
    "message",
    "observedGeneration",
    "phase",
    "podIP",
    "podIPs",
    "reason",
    "resources",
    "startTime",
];

/// Why a write failed.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The pod is gone, or another pod has its name.
    #[error("the pod is gone")]
    Gone,
    /// The API server denied the write or failed.
    #[error("{what} of pod {namespace}/{name}")]
    Write {
        /// What was tried.
        what: &'static str,
        /// The pod's namespace.
        namespace: String,
        /// The pod's name.
        name: String,
        /// The error of the API server.
        #[source]
        source: kube::Error,
    },
    /// The API server did not answer in time.
    #[error("{what} of a pod: no answer from the API server within {} s", DEADLINE.as_secs())]
    Late {
        /// What was tried.
        what: &'static str,
    },
}

/// PURE: the body of the patch that makes the status in the API server `wanted`; None if nothing differs.
#[must_use]
pub fn patch(pod: &Pod, wanted: &PodStatus) -> Option<Value> {
    let have = serde_json::to_value(&pod.status).unwrap_or_default();
    let mut want = serde_json::to_value(wanted).unwrap_or_default();
    let mut changes = Map::new();
    for field in OURS {
        let (have, want) = (have.get(field), want.get_mut(*field).map(Value::take));
        let want = want.unwrap_or(Value::Null);
        if *have.unwrap_or(&Value::Null) != want {
            changes.insert((*field).to_owned(), want);
        }
    }
    let before = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_deref());
    let differing = wanted.conditions.iter().flatten();
    let differing = differing.filter(|condition| !is_there(before.unwrap_or_default(), condition));
    let mut conditions: Vec<_> = differing.map(condition_patch).collect();
    let resizes = |list: &[PodCondition]| list.iter().any(|one| one.type_ == RESIZE_PENDING);
    let wants = wanted.conditions.as_deref();
    if before.is_some_and(resizes) && wants.is_some_and(|list| !resizes(list)) {
        conditions.push(json!({"type": RESIZE_PENDING, "$patch": "delete"}));
    }
    if !conditions.is_empty() {
        changes.insert("conditions".to_owned(), conditions.into());
    }
    if changes.is_empty() {
        return None;
    }
    Some(json!({"metadata": {"uid": pod.metadata.uid}, "status": changes}))
}

/// PURE: the patch with the id of the pod's job as an annotation, if the pod does not have it yet. An id alone causes no patch.
#[must_use]
pub fn with_job(mut patch: Value, pod: &Pod, job: &str) -> Value {
    let annotations = pod.metadata.annotations.as_ref();
    let known = annotations.and_then(|list| list.get(JOB_ID));
    let metadata = patch.get_mut("metadata").and_then(Value::as_object_mut);
    if let Some(metadata) = metadata.filter(|_| !job.is_empty() && known.is_none_or(|id| id != job))
    {
        metadata.insert("annotations".to_owned(), json!({JOB_ID: job}));
    }
    patch
}

/// PURE: does `patch` send only what `before` has sent too? An older API server does not store all fields that we send, and what
/// it does not store would be sent again after each change.
#[must_use]
pub fn repeats(before: &Value, patch: &Value) -> bool {
    const ANNOTATIONS: &str = "/metadata/annotations";
    let annotations = patch.pointer(ANNOTATIONS);
    if annotations.is_some() && annotations != before.pointer(ANNOTATIONS) {
        return false;
    }
    let sent = before.get("status").and_then(Value::as_object);
    let new = patch.get("status").and_then(Value::as_object);
    new.into_iter().flatten().all(|(field, new)| {
        let sent = sent.and_then(|sent| sent.get(field));
        let lists = sent.and_then(Value::as_array).zip(new.as_array());
        let holds =
            |(sent, new): (&Vec<Value>, &Vec<Value>)| new.iter().all(|one| sent.contains(one));
        sent == Some(new) || (field == "conditions" && lists.is_some_and(holds))
    })
}

fn is_there(before: &[PodCondition], condition: &PodCondition) -> bool {
    before.iter().any(|one| {
        one.type_ == condition.type_
            && one.status == condition.status
            && one.reason.as_deref().unwrap_or("") == condition.reason.as_deref().unwrap_or("")
            && one.message.as_deref().unwrap_or("") == condition.message.as_deref().unwrap_or("")
            && one.observed_generation == condition.observed_generation
    })
}

/// The condition with null for empty fields, so that a merge clears them.
fn condition_patch(condition: &PodCondition) -> Value {
    json!({
        "type": condition.type_,
        "status": condition.status,
        "reason": condition.reason,
        "message": condition.message,
        "lastTransitionTime": condition.last_transition_time,
        "observedGeneration": condition.observed_generation,
    })
}

/// Sends a status patch and returns the pod as the API server has it now.
pub async fn send(client: &Client, pod: &Pod, patch: &Value) -> Result<Pod, PublishError> {
    let (api, namespace, name) = api(client, pod);
    knoc_proto::crash::point("kubelet.patch.before");
    let params = PatchParams::default();
    let patch = Patch::Strategic(patch);
    let write = api.patch_status(&name, &params, &patch);
    let answer = within("patch the status", &namespace, &name, write).await;
    knoc_proto::crash::point("kubelet.patch.after");
    let mut pod = answer?;
    pod.metadata.managed_fields = None;
    Ok(pod)
}

/// Sends the last DELETE, after the job is gone.
pub async fn release(client: &Client, pod: &Pod) -> Result<(), PublishError> {
    let (api, namespace, name) = api(client, pod);
    let params = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions {
            uid: pod.metadata.uid.clone(),
            ..Preconditions::default()
        }),
        ..DeleteParams::default()
    };
    knoc_proto::crash::point("kubelet.delete.before");
    let answer = within(
        "delete the object",
        &namespace,
        &name,
        api.delete(&name, &params),
    )
    .await;
    knoc_proto::crash::point("kubelet.delete.after");
    answer.map(drop)
}

fn api(client: &Client, pod: &Pod) -> (Api<Pod>, String, String) {
    let namespace = pod
        .metadata
        .namespace
        .clone()
        .unwrap_or_else(|| "default".to_owned());
    let name = pod.metadata.name.clone().unwrap_or_default();
    (Api::namespaced(client.clone(), &namespace), namespace, name)
}

async fn within<T>(
    what: &'static str,
    namespace: &str,
    name: &str,
    write: impl Future<Output = kube::Result<T>>,
) -> Result<T, PublishError> {
    match tokio::time::timeout(DEADLINE, write).await {
        Err(_) => Err(PublishError::Late { what }),
        // 409: another pod has the name, with another UID.
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => {
            Err(PublishError::Gone)
        }
        Ok(Err(source)) => Err(PublishError::Write {
            what,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            source,
        }),
        Ok(Ok(answer)) => Ok(answer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(status: &Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p", "uid": "u"}, "status": status}))
            .unwrap()
    }

    fn status(status: Value) -> PodStatus {
        serde_json::from_value(status).unwrap()
    }

    #[test]
    fn a_resize_that_was_taken_back_is_no_condition_any_more() {
        let pod = pod(&json!({"conditions": [{"type": "PodResizePending", "status": "True"}]}));
        let wanted = status(json!({"conditions": []}));
        let sent = patch(&pod, &wanted).unwrap();
        assert_eq!(
            sent["status"]["conditions"],
            json!([{"type": "PodResizePending", "$patch": "delete"}])
        );
    }

    #[test]
    fn only_what_changed_is_sent_and_what_is_over_is_cleared() {
        let pod = pod(&json!({
            "phase": "Pending", "message": "waits", "qosClass": "BestEffort",
            "conditions": [
                {"type": "Ready", "status": "False", "reason": "ContainersNotReady", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                {"type": "example.com/other", "status": "True"},
            ],
        }));
        let wanted = status(json!({
            "phase": "Running",
            "conditions": [
                {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:09Z"},
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
            ],
        }));
        let patch = patch(&pod, &wanted).unwrap();
        assert_eq!(
            patch,
            json!({"metadata": {"uid": "u"}, "status": {
                "phase": "Running", "message": null,
                "conditions": [{"type": "Ready", "status": "True", "reason": null, "message": null,
                                "lastTransitionTime": "2026-01-01T00:00:09Z", "observedGeneration": null}],
            }})
        );
    }

    #[test]
    fn a_newer_generation_alone_is_a_change_and_others_conditions_stay() {
        let with = |generation: i64| {
            json!({
                "observedGeneration": generation,
                "conditions": [
                    {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": generation},
                ],
            })
        };
        let mut have = with(1);
        let other = json!({"type": "example.com/other", "status": "True", "observedGeneration": 1});
        have["conditions"].as_array_mut().unwrap().push(other);
        let pod = pod(&have);
        assert_eq!(patch(&pod, &status(with(1))), None);
        let patch = patch(&pod, &status(with(2))).unwrap();
        let ready = json!({"type": "Ready", "status": "True", "reason": null, "message": null,
                           "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 2});
        let changes = json!({"observedGeneration": 2, "conditions": [ready]});
        assert_eq!(patch["status"], changes);
    }

    #[test]
    fn nothing_is_sent_if_nothing_changed() {
        let same = json!({
            "phase": "Running", "startTime": "2026-01-01T00:00:00Z",
            "containerStatuses": [{"name": "a", "image": "i", "imageID": "", "ready": true, "restartCount": 0,
                                   "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}],
        });
        assert_eq!(patch(&pod(&same), &status(same)), None);
    }

    #[test]
    fn what_an_api_server_did_not_store_is_not_sent_again() {
        let condition =
            |kind: &str| json!({"type": kind, "status": "True", "observedGeneration": 1});
        let patch = |status: Value| json!({"metadata": {"uid": "u"}, "status": status});
        let sent = patch(json!({
            "phase": "Running", "message": null, "resources": {"requests": {"cpu": "1"}},
            "conditions": [condition("Initialized"), condition("Ready")],
        }));
        for (status, again) in [
            (json!({"resources": {"requests": {"cpu": "1"}}}), true),
            (json!({"resources": {"requests": {"cpu": "2"}}}), false),
            (json!({"conditions": [condition("Ready")]}), true),
            (json!({"conditions": [condition("Other")]}), false),
            (json!({"message": null}), true),
            (json!({"message": "waits"}), false),
            (json!({"reason": null}), false),
        ] {
            assert_eq!(repeats(&sent, &patch(status.clone())), again, "{status}");
        }
        let mut with_job = sent.clone();
        with_job["metadata"]["annotations"] = json!({"knoc.io/job-id": "12"});
        assert!(!repeats(&sent, &with_job));
        assert!(repeats(&with_job, &sent));
        assert!(repeats(&with_job, &with_job));
    }

    #[test]
    fn the_id_of_the_job_goes_with_a_patch_once() {
        let mut pod = pod(&json!({}));
        let patch = || json!({"metadata": {"uid": "u"}, "status": {"phase": "Pending"}});
        let first = with_job(patch(), &pod, "12");
        let metadata = json!({"uid": "u", "annotations": {"knoc.io/job-id": "12"}});
        assert_eq!(first["metadata"], metadata);
        assert_eq!(first["status"], patch()["status"]);
        assert_eq!(with_job(patch(), &pod, ""), patch(), "no job yet");
        pod.metadata.annotations = Some([(JOB_ID.to_owned(), "12".to_owned())].into());
        assert_eq!(with_job(patch(), &pod, "12"), patch());
        let other = with_job(patch(), &pod, "13");
        assert_eq!(other["metadata"]["annotations"][JOB_ID], "13");
    }
}
