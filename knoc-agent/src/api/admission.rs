//! Admission: judges whether the site's policy, which the cluster cannot widen, accepts a new pod.

use knoc_proto::{
    pb::{self, volume::Source},
    pod::{self, PodSpec},
    reason::ErrorReason,
};
use tonic::Status;

use crate::{policy::host_paths, scheduler::SubmitErrorKind, site::Site};

/// The runtime of a site without containers.
const PROCESS: &str = "process";

/// Admits a pod that was never seen before, or rejects it with all reasons in one message.
pub(super) fn admit(site: &Site, spec: &PodSpec, cluster_id: &str) -> Result<(), Status> {
    let policy = site.policy.now();
    let namespaces = &policy.namespaces;
    if !namespaces.is_empty() && !namespaces.contains(&spec.namespace) {
        let message = format!(
            "namespace {:?} is not among policy.namespaces",
            spec.namespace
        );
        return Err(ErrorReason::PermissionDenied.status(message));
    }
    let mut problems: Vec<String> = spec
        .all_containers()
        .filter_map(|container| site.images.check(&container.image).err())
        .map(|error| error.to_string())
        .collect();
    problems.extend(image_volumes(site, spec));
    if !policy.maps_privileged() {
        problems.extend(privileged(spec));
    }
    problems.extend(policy.denied_host_ports(spec));
    problems.extend(host_paths::problems(spec, &policy, &site.host_paths()));
    if let Err(error) = site
        .scheduler
        .render(&super::submit_request(site, spec, cluster_id))
        && error.kind == SubmitErrorKind::Permanent
    {
        problems.push(error.message);
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(ErrorReason::InvalidSpec.status(problems.join("; ")))
    }
}

/// One problem for each image volume that this site cannot have.
fn image_volumes(site: &Site, spec: &PodSpec) -> Vec<String> {
    let problem = |volume: &pb::Volume| {
        let Some(Source::Image(image)) = &volume.source else {
            return None;
        };
        let why = if site.runtime.name == PROCESS {
            "this site has no container runtime, so it cannot mount an image".to_owned()
        } else {
            site.images.check(&image.reference).err()?.to_string()
        };
        Some(format!("spec.volumes[{}].image: {why}", volume.name))
    };
    spec.volumes.iter().filter_map(problem).collect()
}

/// PURE: one problem for each container that asks for privileges.
fn privileged(spec: &PodSpec) -> Vec<String> {
    let asking = spec
        .all_containers()
        .filter(|container| container.privileged);
    asking
        .map(|container| pod::no_privileges(&container.name))
        .collect()
}
