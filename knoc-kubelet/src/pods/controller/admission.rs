//! PURE: may this pod run here at all? Asked once, before the agent has it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use knoc_proto::pb;

use crate::pods::{quantity, status::Rejection, translate, verdict::Findings};

/// What the node offers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room<'a> {
    /// The most pods.
    pub(super) pods: usize,
    /// Pods there, this one among them.
    pub(super) active: usize,
    /// Slurm's totals; none: not known yet.
    pub(super) total: Option<&'a pb::NodeInfo>,
    /// allocatable = total × this.
    pub(super) queue_factor: u32,
}

/// The shape of the pod, or why it will never run: all reasons at once.
pub(super) fn admit(
    pod: &Pod,
    findings: &Findings,
    room: Room<'_>,
) -> Result<pb::PodSpec, Rejection> {
    let reject = |reason: &str, problems: &[String]| Rejection {
        reason: reason.to_owned(),
        message: format!("Pod was rejected: {}", problems.join("; ")),
    };
    let mut problems = findings.refused.clone();
    if tolerates_everything(pod) {
        problems.push(
            "spec.tolerations: pods of a DaemonSet that tolerates everything do not run here; spare the node by affinity: \
             `type` NotIn [virtual-kubelet]"
                .to_owned(),
        );
    }
    let shape = translate::shape(pod);
    if let Err(more) = &shape {
        problems.extend(more.iter().cloned());
    }
    let shape = match shape {
        Ok(shape) if problems.is_empty() => shape,
        Ok(_) | Err(_) => return Err(reject("UnsupportedPodSpec", &problems)),
    };
    if room.active > room.pods {
        let text = format!("the node takes {} pods", room.pods);
        return Err(reject("OutOfpods", &[text]));
    }
    if let Some(total) = room.total
        && let Some((resource, text)) = exceeds(pod, total, room.queue_factor)
    {
        return Err(reject(&format!("OutOf{resource}"), &[text]));
    }
    Ok(shape)
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

/// The first resource of which the pod alone asks more than all that the node may queue.
fn exceeds(pod: &Pod, total: &pb::NodeInfo, factor: u32) -> Option<(String, String)> {
    let mut sums: BTreeMap<&str, i64> = BTreeMap::new();
    for container in pod.spec.iter().flat_map(|spec| &spec.containers) {
        let requests = container
            .resources
            .as_ref()
            .and_then(|resources| resources.requests.as_ref());
        for (name, value) in requests.into_iter().flatten() {
            let sum = sums.entry(name.as_str()).or_default();
            *sum = sum.saturating_add(quantity::millis(value).unwrap_or(0));
        }
    }
    let offered = |name: &str| match name {
        "cpu" => total.cpu,
        "memory" => total.memory_bytes,
        "ephemeral-storage" => total.ephemeral_storage_bytes,
        other => total.extended.get(other).copied().unwrap_or(0),
    };
    sums.into_iter().find_map(|(name, wanted)| {
        let allocatable = offered(name).saturating_mul(i64::from(factor));
        // What Slurm does not tell (TmpDisk) is not judged here.
        let unknown = name == "ephemeral-storage" && allocatable == 0;
        (wanted > allocatable.saturating_mul(1000) && !unknown).then(|| {
            let asked = quantity::ceil_div(wanted, 1000);
            (
                name.to_owned(),
                format!("{name}: the pod asks for {asked}, the node has {allocatable}"),
            )
        })
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

    fn room(total: &pb::NodeInfo) -> Room<'_> {
        Room {
            pods: 2,
            active: 1,
            total: Some(total),
            queue_factor: 10,
        }
    }

    #[test]
    fn too_much_is_named_as_kubernetes_names_it() {
        let total = pb::NodeInfo {
            cpu: 4,
            memory_bytes: 1 << 30,
            ..pb::NodeInfo::default()
        };
        let admitted = |requests| {
            admit(&pod(&requests), &Findings::default(), room(&total))
                .map(drop)
                .map_err(|no| no.reason)
        };
        assert_eq!(admitted(json!({"cpu": "40"})), Ok(()));
        assert_eq!(
            admitted(json!({"cpu": "40001m"})),
            Err("OutOfcpu".to_owned())
        );
        assert_eq!(
            admitted(json!({"memory": "11Gi"})),
            Err("OutOfmemory".to_owned())
        );
        assert_eq!(
            admitted(json!({"nvidia.com/gpu": "1"})),
            Err("OutOfnvidia.com/gpu".to_owned())
        );
        assert_eq!(admitted(json!({"ephemeral-storage": "1Gi"})), Ok(()));
    }

    #[test]
    fn one_pod_too_many() {
        let total = pb::NodeInfo::default();
        let full = Room {
            active: 3,
            ..room(&total)
        };
        let rejection = admit(&pod(&json!({})), &Findings::default(), full).unwrap_err();
        assert_eq!(rejection.reason, "OutOfpods");
    }

    #[test]
    fn refusals_and_bad_numbers_come_in_one_message() {
        let mut pod = pod(&json!({"cpu": "much"}));
        pod.metadata.annotations = Some([("knoc.io/time".to_owned(), "soon".to_owned())].into());
        let findings = Findings {
            refused: vec!["spec.x: no".to_owned()],
            mapped: Vec::new(),
        };
        let rejection = admit(&pod, &findings, room(&pb::NodeInfo::default())).unwrap_err();
        assert_eq!(rejection.reason, "UnsupportedPodSpec");
        for part in ["spec.x: no", "`much`", "`soon`"] {
            assert!(rejection.message.contains(part), "{}", rejection.message);
        }
    }

    #[test]
    fn a_daemon_set_that_tolerates_everything_is_refused() {
        let mut json = serde_json::to_value(pod(&json!({}))).unwrap();
        json["spec"]["tolerations"] = json!([{"operator": "Exists"}]);
        let alone: Pod = serde_json::from_value(json.clone()).unwrap();
        json["metadata"]["ownerReferences"] =
            json!([{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "d", "uid": "d"}]);
        let owned: Pod = serde_json::from_value(json).unwrap();
        let total = pb::NodeInfo::default();
        assert!(admit(&alone, &Findings::default(), room(&total)).is_ok());
        assert!(admit(&owned, &Findings::default(), room(&total)).is_err());
    }
}
