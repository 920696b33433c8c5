//! PURE: whether a new pod is admitted, judged from its spec alone and once, before the agent has the pod. Whether it
//! fits this node's labels and taints is judged in [`mod@crate::node::predicates`], whether the node has enough left
//! for it in [`mod@crate::node::allocations`].

use k8s_openapi::api::core::v1::Pod;
use knoc_proto::pb;
use knoc_translate::verdict::Findings;

use crate::{
    node::{allocations::Insufficient, predicates::Mismatch},
    pods::status::Rejection,
};

mod sysctls;

/// The operating system of the nodes, as in `spec.os.name`.
const OS: &str = "linux";
const OS_LABEL: &str = "kubernetes.io/os";

/// Returns the shape of the pod, or one rejection with all reasons why it can never run here, however empty the node
/// is. A pod for another operating system gets only Kubernetes' own message about that, which tools look for.
///
/// `maps_privileged`: whether containers that ask for privileges run without them; `None` if only the agent knows.
pub(super) fn admit(
    pod: &Pod,
    findings: &Findings,
    maps_privileged: Option<bool>,
) -> Result<pb::PodSpec, Rejection> {
    other_system(pod)?;
    sysctls::admit(pod)?;
    let mut problems = findings.rejected.clone();
    if tolerates_everything(pod) {
        problems.push(
            "spec.tolerations: pods of a DaemonSet that tolerates everything are not run on this node; exclude the node by node affinity: \
             `type` NotIn [virtual-kubelet]"
                .to_owned(),
        );
    }
    if maps_privileged == Some(false) {
        problems.extend(privileged(pod));
    }
    let shape = knoc_translate::shape(pod);
    if let Err(more) = &shape {
        let new = more
            .iter()
            .filter(|problem| !already_reported(problem, &findings.rejected));
        problems.extend(new.cloned());
    }
    match shape {
        Ok(shape) if problems.is_empty() => Ok(shape),
        Ok(_) | Err(_) => Err(Rejection::new("UnsupportedPodSpec", &problems.join("; "))),
    }
}

/// One problem for each container that asks for privileges.
fn privileged(pod: &Pod) -> Vec<String> {
    let spec = pod.spec.as_ref();
    let init = spec.and_then(|spec| spec.init_containers.as_deref());
    let init = init.unwrap_or_default().iter();
    let containers = spec.map_or(&[][..], |spec| &spec.containers);
    let asking = init.chain(containers).filter(|container| {
        let context = container.security_context.as_ref();
        context.is_some_and(|context| context.privileged == Some(true))
    });
    asking
        .map(|container| knoc_proto::pod::no_privileges(&container.name))
        .collect()
}

/// Was this field, or a field inside it, rejected already?
fn already_reported(problem: &str, refused: &[String]) -> bool {
    let path = problem.split_once(": ").map_or(problem, |(path, _)| path);
    refused.iter().any(|refusal| refusal.starts_with(path))
}

/// Does the same as `rejectPodAdmissionBasedOnOSSelector` and `…OnOSField` of the kubelet, in their order. The first
/// looks at the pod's own labels; node selectors are judged in [`mod@crate::node::predicates`].
fn other_system(pod: &Pod) -> Result<(), Rejection> {
    let label = pod
        .metadata
        .labels
        .as_ref()
        .and_then(|labels| labels.get(OS_LABEL));
    if label.is_some_and(|label| label != OS) {
        return Err(Rejection::new(
            "PodOSSelectorNodeLabelDoesNotMatch",
            "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label",
        ));
    }
    let field = pod.spec.as_ref().and_then(|spec| spec.os.as_ref());
    if field.is_some_and(|os| os.name != OS) {
        return Err(Rejection::new(
            "PodOSNotSupported",
            "Failed to admit pod as the OS field doesn't match node OS",
        ));
    }
    Ok(())
}

/// The rejection of a pod that does not match the node's labels or taints.
pub(super) fn mismatch(mismatch: Mismatch) -> Rejection {
    Rejection::new(mismatch.reason(), &mismatch.to_string())
}

/// The rejection of a pod for which the node has not enough left.
pub(super) fn out_of(short: &Insufficient) -> Rejection {
    Rejection::new(&format!("OutOf{}", short.resource), &short.to_string())
}

fn tolerates_everything(pod: &Pod) -> bool {
    let daemon_set = pod
        .metadata
        .owner_references
        .iter()
        .flatten()
        .any(|owner| owner.kind == "DaemonSet");
    let tolerations = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.tolerations.as_deref());
    daemon_set
        && tolerations.unwrap_or_default().iter().any(|toleration| {
            toleration.operator.as_deref() == Some("Exists")
                && toleration.key.as_deref().unwrap_or_default().is_empty()
                && toleration.effect.as_deref().unwrap_or("NoSchedule") == "NoSchedule"
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(requests: &serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "uid": "u"},
            "spec": {"containers": [{"name": "a", "image": "i", "resources": {"requests": requests}}]},
        }))
        .unwrap()
    }

    #[test]
    fn unsupported_fields_and_bad_numbers_come_in_one_message() {
        let mut pod = pod(&json!({"cpu": "much"}));
        pod.metadata.annotations = Some([("knoc.io/time".to_owned(), "soon".to_owned())].into());
        let findings = Findings {
            rejected: vec!["spec.x: no".to_owned()],
            mapped: Vec::new(),
        };
        let rejection = admit(&pod, &findings, None).unwrap_err();
        assert_eq!(rejection.reason, "UnsupportedPodSpec");
        for part in ["spec.x: no", "`much`", "`soon`"] {
            assert!(rejection.message.contains(part), "{}", rejection.message);
        }
    }

    #[test]
    fn privileges_are_refused_with_all_else_unless_the_site_maps_them() {
        let mut json = serde_json::to_value(pod(&json!({}))).unwrap();
        json["spec"]["initContainers"] = json!([
            {"name": "i", "image": "i", "securityContext": {"privileged": true}},
            {"name": "j", "image": "i", "securityContext": {"privileged": false}},
        ]);
        json["spec"]["containers"][0]["securityContext"] = json!({"privileged": true});
        let pod: Pod = serde_json::from_value(json).unwrap();
        let findings = Findings {
            rejected: vec!["spec.x: no".to_owned()],
            mapped: Vec::new(),
        };
        let message = admit(&pod, &findings, Some(false)).unwrap_err().message;
        for part in [
            "spec.x: no",
            "containers[i]",
            "containers[a].securityContext.privileged",
        ] {
            assert!(message.contains(part), "{message}");
        }
        assert!(!message.contains("containers[j]"), "{message}");
        for maps in [None, Some(true)] {
            let shape = admit(&pod, &Findings::default(), maps).unwrap();
            assert!(shape.containers[0].privileged && !shape.init_containers[1].privileged);
        }
    }

    #[test]
    fn a_volume_of_an_unknown_kind_is_rejected_once() {
        let json = |volume: serde_json::Value| {
            let mut json = serde_json::to_value(pod(&json!({}))).unwrap();
            json["spec"]["volumes"] = json!([volume]);
            json
        };
        for (volume, message) in [
            (
                json!({"name": "v", "hostPath": {"path": "/", "type": "Pipe"}}),
                "spec.volumes[v].hostPath.type (`Pipe`): this type is not known",
            ),
            (
                json!({"name": "v", "fromTheFuture": {}}),
                "spec.volumes[v].fromTheFuture: this field is not known to this version of KNoC",
            ),
            (
                json!({"name": "v"}),
                "spec.volumes[v]: volumes of this kind are not known to this version of KNoC",
            ),
        ] {
            let json = json(volume);
            let findings = knoc_translate::verdict::judge(&json);
            let pod: Pod = serde_json::from_value(json).unwrap();
            let rejection = admit(&pod, &findings, None).unwrap_err();
            assert_eq!(rejection.message, format!("Pod was rejected: {message}"));
        }
    }

    #[test]
    fn a_pod_for_another_os_is_rejected_with_the_message_of_kubernetes() {
        let judged = |label: Option<&str>, os: Option<&str>| {
            let mut json = serde_json::to_value(pod(&json!({"cpu": "much"}))).unwrap();
            if let Some(label) = label {
                json["metadata"]["labels"] = json!({"kubernetes.io/os": label});
            }
            if let Some(os) = os {
                json["spec"]["os"] = json!({"name": os});
            }
            let pod: Pod = serde_json::from_value(json).unwrap();
            let findings = Findings {
                rejected: vec!["spec.os.name: no".to_owned()],
                mapped: Vec::new(),
            };
            admit(&pod, &findings, None).unwrap_err()
        };
        let windows = judged(None, Some("windows"));
        assert_eq!(windows.reason, "PodOSNotSupported");
        assert_eq!(
            windows.message,
            "Pod was rejected: Failed to admit pod as the OS field doesn't match node OS"
        );
        let label = judged(Some("windows"), Some("windows"));
        assert_eq!(label.reason, "PodOSSelectorNodeLabelDoesNotMatch");
        assert_eq!(
            judged(Some("linux"), Some("linux")).reason,
            "UnsupportedPodSpec"
        );
    }

    #[test]
    fn a_daemon_set_that_tolerates_everything_is_rejected() {
        let mut json = serde_json::to_value(pod(&json!({}))).unwrap();
        json["spec"]["tolerations"] = json!([{"operator": "Exists"}]);
        let alone: Pod = serde_json::from_value(json.clone()).unwrap();
        json["metadata"]["ownerReferences"] =
            json!([{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "d", "uid": "d"}]);
        let owned: Pod = serde_json::from_value(json).unwrap();
        assert!(admit(&alone, &Findings::default(), None).is_ok());
        assert!(admit(&owned, &Findings::default(), None).is_err());
    }
}
