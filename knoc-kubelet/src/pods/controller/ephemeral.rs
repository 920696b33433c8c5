//! PURE: the ephemeral containers that were added to a pod which the agent has already.

use k8s_openapi::api::core::v1::Pod;
use knoc_proto::pb;

use crate::pods::store::PodView;

/// The ephemeral containers of the pod that the agent does not know.
pub(super) fn unknown<'a>(
    pod: &'a Pod,
    observed: &'a pb::PodObserved,
) -> impl Iterator<Item = &'a str> {
    let spec = pod.spec.iter();
    let all = spec.flat_map(|spec| spec.ephemeral_containers.iter().flatten());
    all.map(|one| one.name.as_str()).filter(|name| {
        let mut known = observed.ephemeral_containers.iter();
        known.all(|status| status.name != *name)
    })
}

/// What is mapped in ephemeral containers that the agent does not know yet: they were added to a pod that was admitted before.
pub(super) fn mapped(view: &PodView, mapped: &[String]) -> Vec<String> {
    let Some(observed) = &view.observed else {
        return Vec::new();
    };
    let new = unknown(&view.pod, observed);
    let paths: Vec<_> = new
        .map(|name| format!("spec.ephemeralContainers[{name}]."))
        .collect();
    let about = |one: &&String| paths.iter().any(|path| one.starts_with(path));
    mapped.iter().filter(about).cloned().collect()
}
