//! PURE: in-place resize, which a Slurm job does not allow: the pod goes on with the resources that it was accepted with.
//!
//! These are in the container statuses, and those of the pod as a whole in its status, where a kubelet publishes what it
//! has actuated. A spec that asks for others (the subresource `resize`) is infeasible, which the condition
//! `PodResizePending` says.

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

/// The resources of the pod as a whole that its status is to show: those that it was accepted with; None if its spec has
/// none.
pub(crate) fn shown_whole(pod: &Pod) -> Option<ResourceRequirements> {
    let wanted = pod.spec.as_ref()?.resources.as_ref()?;
    let status = pod.status.as_ref();
    let before = status.and_then(|status| status.resources.as_ref());
    Some(ResourceRequirements {
        claims: None,
        ..before.unwrap_or(wanted).clone()
    })
}

/// Does the spec ask for other resources than the pod was accepted with?
pub(crate) fn is_asked(pod: &Pod) -> bool {
    let whole = pod.spec.as_ref().and_then(|spec| spec.resources.as_ref());
    let shown_whole = shown_whole(pod);
    let mut whole = whole.into_iter().zip(&shown_whole);
    let of_whole = whole.any(|(wanted, shown)| differ(wanted, shown));
    of_whole
        || containers(pod).any(|container| {
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
        spec.resources = shown_whole(pod);
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

    #[test]
    fn a_pod_goes_on_with_the_resources_of_the_whole_too() {
        let whole = |cpu: &str| json!({"requests": {"cpu": cpu}});
        let mut json = serde_json::to_value(&*pod("1", Some("1"))).unwrap();
        json["spec"]["resources"] = whole("4");
        let parse = |json: &serde_json::Value| -> Arc<Pod> {
            Arc::new(serde_json::from_value(json.clone()).unwrap())
        };
        let shown = |pod: &Pod| shown_whole(pod).unwrap().requests.unwrap()["cpu"].0.clone();
        let new = parse(&json);
        assert!(!is_asked(&new));
        assert_eq!(shown(&new), "4");
        json["status"]["resources"] = whole("2");
        let resized = parse(&json);
        assert!(is_asked(&resized));
        let accepted = as_accepted(&resized);
        assert!(!is_asked(&accepted));
        assert_eq!(
            accepted.spec.as_ref().unwrap().resources,
            shown_whole(&resized)
        );
        assert_eq!(
            (shown(&resized), cpu(&accepted)),
            ("2".to_owned(), "1".to_owned())
        );
    }
}
