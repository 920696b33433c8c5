//! PURE: whether the site lets a pod mount the host paths that it names. Only the text of a path is judged here: the path
//! exists on the compute node, where the shim opens it and judges the place to which it leads.

use std::path::Path;

use knoc_contract::host_paths::HostPaths;
use knoc_proto::{pb, pod::PodSpec};

/// One problem for each host path that the site does not let this pod mount.
pub(super) fn problems(spec: &PodSpec, allowed: &HostPaths) -> Vec<String> {
    let host_paths = spec.volumes.iter().filter_map(|volume| {
        let Some(pb::volume::Source::HostPath(host)) = &volume.source else {
            return None;
        };
        let writes = !host.read_only && is_written(spec, &volume.name);
        let refusal = allowed.judge(Path::new(&host.path), writes).err()?;
        Some(format!("{}: {refusal}", field(volume, host)))
    });
    host_paths.collect()
}

/// The field of the pod that the path comes from.
fn field(volume: &pb::Volume, host: &pb::HostPath) -> String {
    let (name, claim) = (&volume.name, &host.claim);
    if claim.is_empty() {
        format!("spec.volumes[{name}].hostPath.path")
    } else {
        format!("spec.volumes[{name}]: the volume of the claim {claim:?}")
    }
}

/// Whether a container mounts the volume and may write there.
fn is_written(spec: &PodSpec, volume: &str) -> bool {
    let mounts = spec.all_containers().flat_map(|container| &container.mounts);
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
        problems(&spec, &allowed).join("; ")
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
}
