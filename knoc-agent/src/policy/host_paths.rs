//! PURE: whether the site lets a pod mount the host paths that it names. Only the text of a path is judged here: the path
//! exists on the compute node, where the shim opens it and judges the place to which it leads.

use std::path::Path;

use knoc_contract::host_paths::HostPaths;
use knoc_proto::{
    pb::{self, volume::Source},
    pod::PodSpec,
};

use crate::config::Policy;

/// One problem for each path of the compute nodes that the site does not let this pod mount.
pub(crate) fn problems(spec: &PodSpec, policy: &Policy, allowed: &HostPaths) -> Vec<String> {
    let volumes = spec.volumes.iter();
    let problem = |volume| problem(volume, is_written(spec, volume), policy, allowed);
    volumes.filter_map(problem).collect()
}

/// One problem for each path of the compute nodes that the site does not let this container mount, which is added to a pod
/// that was admitted.
pub(crate) fn problems_of(
    container: &pb::Container,
    spec: &PodSpec,
    policy: &Policy,
    allowed: &HostPaths,
) -> Vec<String> {
    let mounts = |volume: &pb::Volume| {
        let mut all = container.mounts.iter();
        all.any(|mount| mount.volume == volume.name)
    };
    let volumes = spec.volumes.iter().filter(|volume| mounts(volume));
    let problem = |volume| problem(volume, writes(container, volume), policy, allowed);
    volumes.filter_map(problem).collect()
}

/// Why the site does not let pods mount the volume. `written`: whether a container would write there if the volume lets it.
fn problem(
    volume: &pb::Volume,
    written: bool,
    policy: &Policy,
    allowed: &HostPaths,
) -> Option<String> {
    let source = volume.source.as_ref()?;
    let (kind, claim, read_only) = match source {
        Source::HostPath(host) => ("hostPath.path", &host.claim, host.read_only),
        Source::Nfs(nfs) => ("nfs", &nfs.claim, nfs.read_only),
        Source::Csi(csi) => ("csi", &csi.claim, csi.read_only),
        Source::EmptyDir(_) | Source::Files(_) | Source::Image(_) => return None,
    };
    let path = match (source, policy.mapped(source)) {
        (_, Some(mapped)) => mapped,
        (Source::HostPath(host), None) => Ok(host.path.clone()),
        (_, None) => return None,
    };
    let writes = written && !read_only;
    let judged = path.and_then(|path| {
        let judged = allowed.judge(Path::new(&path), writes);
        judged.map(drop).map_err(|refusal| refusal.to_string())
    });
    let why = judged.err()?;
    let name = &volume.name;
    Some(if claim.is_empty() {
        format!("spec.volumes[{name}].{kind}: {why}")
    } else {
        format!("spec.volumes[{name}]: the volume of the claim {claim:?}: {why}")
    })
}

/// Whether an init container or a container of the pod may write to the volume.
fn is_written(spec: &PodSpec, volume: &pb::Volume) -> bool {
    let mut all = spec.all_containers();
    all.any(|container| writes(container, volume))
}

fn writes(container: &pb::Container, volume: &pb::Volume) -> bool {
    let mut mounts = container.mounts.iter();
    mounts.any(|mount| mount.volume == volume.name && !mount.read_only)
}

#[cfg(test)]
mod tests {
    use knoc_contract::host_paths::Prefix;

    use super::*;

    /// The problems of a pod that mounts this path twice, the second time as given.
    fn of(path: &str, read_only: bool, of_volume: bool) -> String {
        let mount = |path: &str, read_only| pb::Mount {
            volume: "v".to_owned(),
            path: path.to_owned(),
            read_only,
            ..pb::Mount::default()
        };
        let host = pb::HostPath {
            path: path.to_owned(),
            read_only: of_volume,
            ..pb::HostPath::default()
        };
        let spec = pb::PodSpec {
            volumes: vec![pb::Volume {
                name: "v".to_owned(),
                source: Some(pb::volume::Source::HostPath(host)),
            }],
            containers: vec![pb::Container {
                mounts: vec![mount("/a", true), mount("/b", read_only)],
                ..pb::Container::default()
            }],
            ..pb::PodSpec::default()
        };
        let prefix = |path: &str, writable| Prefix {
            path: path.into(),
            writable,
        };
        let allowed = HostPaths {
            prefixes: vec![prefix("/data", false), prefix("/scratch", true)],
            ..HostPaths::default()
        };
        let spec = PodSpec::accepted_before("u".try_into().unwrap(), spec);
        problems(&spec, &Policy::default(), &allowed).join("; ")
    }

    #[test]
    fn a_read_only_path_is_mounted_read_only_everywhere() {
        assert_eq!(of("/scratch/x", false, false), "");
        assert_eq!(of("/data/x", true, false), "");
        assert_eq!(of("/data/x", false, true), "");
        let problem = of("/data/x", false, false);
        assert!(
            problem.starts_with("spec.volumes[v].hostPath.path: \"/data/x\"")
                && problem.contains("readOnly: true"),
            "{problem}"
        );
        assert!(of("/etc", true, false).contains("/data, /scratch"));
    }

    #[test]
    fn a_container_that_is_added_is_judged_by_its_own_mounts() {
        let volume = |name: &str, path: &str| pb::Volume {
            name: name.to_owned(),
            source: Some(Source::HostPath(pb::HostPath {
                path: path.to_owned(),
                ..pb::HostPath::default()
            })),
        };
        let spec = pb::PodSpec {
            volumes: vec![volume("v", "/data/x"), volume("w", "/etc")],
            ..pb::PodSpec::default()
        };
        let spec = PodSpec::accepted_before("u".try_into().unwrap(), spec);
        let allowed = HostPaths {
            prefixes: vec![Prefix {
                path: "/data".into(),
                writable: false,
            }],
            ..HostPaths::default()
        };
        let of = |mounts: &[(&str, bool)]| {
            let mount = |(volume, read_only): &(&str, bool)| pb::Mount {
                volume: (*volume).to_owned(),
                path: format!("/{volume}"),
                read_only: *read_only,
                ..pb::Mount::default()
            };
            let container = pb::Container {
                mounts: mounts.iter().map(mount).collect(),
                ..pb::Container::default()
            };
            problems_of(&container, &spec, &Policy::default(), &allowed).join("; ")
        };
        assert_eq!(of(&[]), "");
        assert_eq!(of(&[("v", true)]), "");
        let problem = of(&[("v", false)]);
        assert!(
            problem.starts_with("spec.volumes[v].hostPath.path: \"/data/x\"")
                && problem.contains("readOnly: true"),
            "{problem}"
        );
        assert!(of(&[("w", true)]).contains("\"/etc\" is not below"));
    }

    #[test]
    fn what_the_site_maps_is_judged_by_the_path_that_it_is_mapped_to() {
        let source = Source::Nfs(pb::NfsVolume {
            server: "filer".to_owned(),
            path: "/export/x".to_owned(),
            read_only: true,
            claim: "c".to_owned(),
        });
        let spec = pb::PodSpec {
            volumes: vec![pb::Volume {
                name: "v".to_owned(),
                source: Some(source),
            }],
            ..pb::PodSpec::default()
        };
        let spec = PodSpec::accepted_before("u".try_into().unwrap(), spec);
        let prefix = Prefix {
            path: "/data".into(),
            writable: false,
        };
        let allowed = HostPaths {
            prefixes: vec![prefix],
            ..HostPaths::default()
        };
        let entry = |path: &str| crate::config::Nfs {
            server: "filer".to_owned(),
            export: "/export".into(),
            path: path.into(),
        };
        let of = |nfs| {
            let policy = Policy {
                nfs,
                ..Policy::default()
            };
            problems(&spec, &policy, &allowed).join("; ")
        };
        assert_eq!(of(vec![entry("/data")]), "");
        let unmapped = of(Vec::new());
        assert!(
            unmapped.starts_with("spec.volumes[v]: the volume of the claim \"c\": the site maps"),
            "{unmapped}"
        );
        assert!(of(vec![entry("/etc")]).contains("\"/etc/x\" is not below"));
    }
}
