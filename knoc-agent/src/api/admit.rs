//! Which pods may come in: the site's policy, which the cluster cannot widen.

use std::path::{Path, PathBuf};

use knoc_proto::{ids::PodUid, pb, pod::PodSpec, reason::ErrorReason};
use tonic::Status;

use crate::{scheduler::RefusalKind, shim_links::Client, site::Site};

/// May this pod, never seen before, come in? Says all reasons in one message.
pub(super) fn pod(site: &Site, spec: &PodSpec, cluster_id: &str) -> Result<(), Status> {
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
    problems.extend(foreign_paths(&spec.volumes, &site.config.host_paths));
    if let Err(refusal) = site
        .scheduler
        .render(&super::submit_request(site, spec, cluster_id))
        && refusal.kind == RefusalKind::Permanent
    {
        problems.push(refusal.words);
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(ErrorReason::InvalidSpec.status(problems.join("; ")))
    }
}

/// Host paths outside the site's roots, a sentence each. Links are followed: what counts is where a path leads.
fn foreign_paths(volumes: &[pb::Volume], roots: &[PathBuf]) -> Vec<String> {
    let canonical = |path: &Path| std::fs::canonicalize(path).ok();
    let roots: Vec<PathBuf> = roots.iter().filter_map(|root| canonical(root)).collect();
    let outside = |volume: &pb::Volume| {
        let Some(pb::volume::Source::HostPath(host)) = &volume.source else {
            return None;
        };
        let inside = canonical(Path::new(&host.path))
            .is_some_and(|path| roots.iter().any(|root| path.starts_with(root)));
        (!inside).then(|| {
            let (name, path) = (&volume.name, &host.path);
            format!("volume {name:?}: {path:?} is not under host_paths of the site file")
        })
    };
    volumes.iter().filter_map(outside).collect()
}

/// The link to the shim of a pod that runs.
pub(super) fn running(site: &Site, uid: &PodUid) -> Result<Client, Status> {
    site.shims.client(uid).ok_or_else(|| no_link(site, uid))
}

/// The same, of a shim that has `capability`.
pub(super) fn able(site: &Site, uid: &PodUid, capability: &str) -> Result<Client, Status> {
    let found = site.shims.able(uid, capability);
    found.unwrap_or_else(|| Err(no_link(site, uid)))
}

/// Why nothing in the pod's job can answer, where Slurm is known to have stopped it.
pub(super) fn suspended(site: &Site, uid: &PodUid) -> Option<Status> {
    let pod = site.board.get(uid.as_str())?;
    let job = pod.job.as_ref()?;
    let stopped = ["SUSPENDED", "STOPPED"].contains(&job.state.as_str());
    (stopped && pod.outcome.is_none()).then(|| {
        let message = format!(
            "job {} of pod {uid} is suspended ({}): nothing in it can answer until it is resumed (`scontrol resume {}`)",
            job.id, job.state, job.id
        );
        ErrorReason::NotRunning.status(message)
    })
}

/// Why a pod has no link.
fn no_link(site: &Site, uid: &PodUid) -> Status {
    let Some(pod) = site.board.get(uid.as_str()) else {
        return ErrorReason::NotFound.status(format!("no pod {uid}"));
    };
    if let Some(suspended) = suspended(site, uid) {
        return suspended;
    }
    let idle = pod.host_ip.is_empty() || pod.outcome.is_some();
    if idle {
        let phase = pod
            .phase()
            .as_str_name()
            .trim_start_matches("POD_PHASE_")
            .to_lowercase();
        return ErrorReason::NotRunning.status(format!("pod {uid} is {phase}"));
    }
    let message = format!(
        "the shim of pod {uid} on {} has no link to the agent: can compute nodes reach {}?",
        pod.host_ip, site.config.listen.shim
    );
    ErrorReason::ShimUnreachable.status(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_paths_stay_under_the_sites_roots() {
        let folder = tempfile::tempdir().unwrap();
        let (root, other) = (folder.path().join("root"), folder.path().join("other"));
        std::fs::create_dir_all(root.join("data")).unwrap();
        std::fs::create_dir_all(&other).unwrap();
        std::os::unix::fs::symlink(&other, root.join("out")).unwrap();
        let problems = |path: &Path, roots: &[PathBuf]| {
            let path = path.display().to_string();
            let source = pb::volume::Source::HostPath(pb::HostPath { path });
            let volume = pb::Volume {
                name: "v".to_owned(),
                source: Some(source),
            };
            foreign_paths(&[volume], roots).len()
        };
        let roots = [root.clone()];
        assert_eq!(problems(&root.join("data"), &roots), 0);
        assert_eq!(problems(&root.join("data"), &[]), 1, "no roots, no paths");
        assert_eq!(
            problems(&root.join("out"), &roots),
            1,
            "a link that leads out"
        );
        assert_eq!(problems(&root.join("../other"), &roots), 1);
        assert_eq!(problems(&root.join("nothing"), &roots), 1);
    }
}
