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
pub(super) fn problems(spec: &PodSpec, policy: &Policy, allowed: &HostPaths) -> Vec<String> {
    let problem = |volume: &pb::Volume| {
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
        let writes = !read_only && is_written(spec, &volume.name);
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
    };
    spec.volumes.iter().filter_map(problem).collect()
}

/// Whether a container mounts the volume and may write there.
fn is_written(spec: &PodSpec, volume: &str) -> bool {
    let mounts = spec
        .all_containers()
        .flat_map(|container| &container.mounts);
    let mut mounts = mounts.filter(|mount| mount.volume == volume);
    mounts.any(|mount| !mount.read_only)
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
