//! PURE: in-place resize, which a Slurm job does not allow: the pod goes on with the resources that it was accepted with.
//!
//! These are in the container statuses, where a kubelet publishes what it has actuated. A spec that asks for others (the
//! subresource `resize`) is infeasible, which the condition `PodResizePending` says.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    Container, ContainerStatus, Pod, PodStatus, ResourceRequirements,
};

/// The condition of a pod whose resize is infeasible. It is removed when the spec asks for what the pod has.
pub(crate) const RESIZE_PENDING: &str = "PodResizePending";

/// Why a resize is infeasible.
pub(crate) const INFEASIBLE: &str = "the resources of a Slurm job cannot be changed; the pod goes on with those that it was started with";

/// The resources that a container was accepted with, as its status says; None if they were not published yet.
fn accepted<'a>(status: &'a PodStatus, container: &str) -> Option<&'a ResourceRequirements> {
    let init = status.init_container_statuses.iter().flatten();
    let all = status.container_statuses.iter().flatten().chain(init);
    let own: Option<&ContainerStatus> = all.into_iter().find(|one| one.name == container);
    own?.resources.as_ref()
}

/// Requests and limits only: the status has no claims.
fn differ(one: &ResourceRequirements, other: &ResourceRequirements) -> bool {
    let list = |list: &Option<std::collections::BTreeMap<_, _>>| list.clone().unwrap_or_default();
    list(&one.requests) != list(&other.requests) || list(&one.limits) != list(&other.limits)
}

fn containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    let spec = pod.spec.iter();
    spec.flat_map(|spec| {
        let init = spec.init_containers.iter().flatten();
        spec.containers.iter().chain(init)
    })
}

/// The resources that the container's status is to show: those that it was accepted with.
pub(crate) fn shown(pod: &Pod, container: &Container) -> ResourceRequirements {
    let status = pod.status.as_ref();
    let before = status.and_then(|status| accepted(status, &container.name));
    let own = before.or(container.resources.as_ref());
    ResourceRequirements {
        claims: None,
        ..own.cloned().unwrap_or_default()
    }
}

/// Does the spec ask for other resources than the pod was accepted with?
pub(crate) fn is_asked(pod: &Pod) -> bool {
    containers(pod).any(|container| {
        let wanted = container.resources.clone().unwrap_or_default();
        differ(&wanted, &shown(pod, container))
    })
}

/// The pod with the resources that it was accepted with.
pub(crate) fn as_accepted(pod: &Arc<Pod>) -> Arc<Pod> {
    if !is_asked(pod) {
        return Arc::clone(pod);
    }
    let mut accepted = Pod::clone(pod);
    if let Some(spec) = &mut accepted.spec {
        let init = spec.init_containers.iter_mut().flatten();
        for container in spec.containers.iter_mut().chain(init) {
            let own = container.resources.as_ref();
            let claims = own.and_then(|own| own.claims.clone());
            container.resources = Some(ResourceRequirements {
                claims,
                ..shown(pod, container)
            });
        }
    }
    Arc::new(accepted)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(wanted: &str, accepted: Option<&str>) -> Arc<Pod> {
        let requests = |cpu: &str| json!({"requests": {"cpu": cpu}});
        let mut pod = json!({
            "metadata": {"name": "p", "uid": "u"},
            "spec": {"containers": [{"name": "a", "image": "i", "resources": requests(wanted)}]},
        });
        if let Some(accepted) = accepted {
            pod["status"] = json!({"containerStatuses": [{
                "name": "a", "image": "i", "imageID": "", "ready": true, "restartCount": 0,
                "resources": requests(accepted),
            }]});
        }
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn cpu(pod: &Pod) -> String {
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let resources = container.resources.as_ref().unwrap();
        resources.requests.as_ref().unwrap()["cpu"].0.clone()
    }

    #[test]
    fn a_pod_goes_on_with_the_resources_that_it_was_accepted_with() {
        let new = pod("2", None);
        assert!(!is_asked(&new));
        assert_eq!(cpu(&as_accepted(&new)), "2");
        let resized = pod("2", Some("1"));
        assert!(is_asked(&resized));
        assert_eq!(cpu(&as_accepted(&resized)), "1");
        // It was taken back.
        let same = pod("1", Some("1"));
        assert!(!is_asked(&same));
        assert!(Arc::ptr_eq(&as_accepted(&same), &same));
    }
}
