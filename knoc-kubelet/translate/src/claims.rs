//! PURE: the volumes of claims. A claim names a PersistentVolume, and the volume says what is mounted.
//!
//! The shape of a pod leaves such volumes without a source until [`bind_claims`] has filled them in, since only the API
//! server knows them. Claims are resolved as by any kubelet, with its messages.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    self as core, CSIPersistentVolumeSource, PersistentVolume, PersistentVolumeClaim,
    PersistentVolumeSpec, Pod,
};
use knoc_proto::pb::{self, volume::Source as Mounted};

use super::{
    carried::PodSpec,
    volume::{self, Claim, Source},
};

/// A claim and the PersistentVolume that it names, as far as they exist.
#[derive(Clone, Debug, Default)]
pub struct FoundClaim {
    /// The claim.
    pub claim: Option<PersistentVolumeClaim>,
    /// The volume that the claim names.
    pub volume: Option<PersistentVolume>,
}

/// Why the volumes of a pod's claims cannot be mounted, with one message for each volume.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unbound {
    /// They may be bound later.
    #[error("{}", .0.join("; "))]
    Waits(Vec<String>),
    /// They never can be mounted.
    #[error("{}", .0.join("; "))]
    Never(Vec<String>),
}

/// One problem of one volume.
enum Problem {
    Waits(String),
    Never(String),
}

/// The names of the pod's claims, each once.
pub(crate) fn names(pod: &Pod) -> Vec<String> {
    let mut names: Vec<String> = of_pod(pod)
        .map(|(volume, claim)| claim.name(pod, &volume.name))
        .collect();
    names.sort();
    names.dedup();
    names
}

fn of_pod(pod: &Pod) -> impl Iterator<Item = (&core::Volume, Claim<'_>)> {
    let spec = pod.spec.as_ref().map(PodSpec::from);
    let volumes = spec
        .into_iter()
        .flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter_map(|volume| match volume::source(volume) {
        Ok(Source::Claim(claim)) => Some((volume, claim)),
        Ok(_) | Err(_) => None,
    })
}

/// Gives the volumes of claims in `shape` their sources.
pub fn bind_claims(
    pod: &Pod,
    shape: &mut pb::PodSpec,
    found: &BTreeMap<String, FoundClaim>,
) -> Result<(), Unbound> {
    let (mut waits, mut never) = (Vec::new(), Vec::new());
    for (volume, claim) in of_pod(pod) {
        let name = claim.name(pod, &volume.name);
        let bound = bound(pod, claim, &name, found.get(&name));
        let source = match bound.and_then(|spec| mounted(spec, &name, claim.read_only())) {
            Ok(source) => source,
            Err(Problem::Waits(why)) => {
                let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
                waits.push(format!("error processing PVC {namespace}/{name}: {why}"));
                continue;
            }
            Err(Problem::Never(why)) => {
                never.push(format!("spec.volumes[{}]: {why}", volume.name));
                continue;
            }
        };
        let place = shape
            .volumes
            .iter_mut()
            .find(|place| place.name == volume.name);
        if let Some(place) = place {
            place.source = Some(source);
        }
    }
    match (never.is_empty(), waits.is_empty()) {
        (false, _) => Err(Unbound::Never(never)),
        (true, false) => Err(Unbound::Waits(waits)),
        (true, true) => Ok(()),
    }
}

/// The volume that the claim is bound to.
fn bound<'a>(
    pod: &Pod,
    claim: Claim<'_>,
    name: &str,
    found: Option<&'a FoundClaim>,
) -> Result<&'a PersistentVolumeSpec, Problem> {
    let waits = |why: &str| Problem::Waits(why.to_owned());
    let pvc = found.and_then(|found| found.claim.as_ref());
    let pvc = pvc.ok_or_else(|| waits(&format!("persistentvolumeclaim \"{name}\" not found")))?;
    if pvc.metadata.deletion_timestamp.is_some() {
        return Err(waits("PVC is being deleted"));
    }
    if matches!(claim, Claim::OfPod) && !is_owned(pvc, pod) {
        return Err(waits(
            "PVC was not created for this pod: it has another owner",
        ));
    }
    let phase = pvc
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    let volume = pvc
        .spec
        .as_ref()
        .and_then(|spec| spec.volume_name.as_deref());
    let volume = volume.unwrap_or_default();
    if phase != Some("Bound") || volume.is_empty() {
        return Err(waits("PVC is not bound"));
    }
    let pv = found
        .and_then(|found| found.volume.as_ref())
        .and_then(|pv| pv.spec.as_ref());
    let pv = pv.ok_or_else(|| waits(&format!("persistentvolume \"{volume}\" not found")))?;
    let owner = pv.claim_ref.as_ref().and_then(|owner| owner.uid.as_deref());
    if owner.is_none() || owner != pvc.metadata.uid.as_deref() {
        return Err(waits(&format!("PV {volume} is not bound to this claim")));
    }
    if pv.volume_mode.as_deref() == Some("Block") {
        return Err(Problem::Never(format!(
            "the volume {volume} of the claim {name:?} has volumeMode Block; only file systems can be mounted"
        )));
    }
    Ok(pv)
}

fn is_owned(pvc: &PersistentVolumeClaim, pod: &Pod) -> bool {
    let mut owners = pvc.metadata.owner_references.iter().flatten();
    owners.any(|owner| {
        owner.controller == Some(true) && Some(&owner.uid) == pod.metadata.uid.as_ref()
    })
}

/// What is mounted of the volume.
fn mounted(spec: &PersistentVolumeSpec, claim: &str, read_only: bool) -> Result<Mounted, Problem> {
    let claim = claim.to_owned();
    let host = spec.host_path.as_ref();
    let host = host.map(|host| (host.path.as_str(), host.type_.as_deref()));
    let local = spec.local.as_ref();
    let local = local.map(|local| (local.path.as_str(), Some("Directory")));
    if let Some((path, kind)) = host.or(local) {
        let kind = volume::host_path_type(kind)
            .ok_or_else(|| format!("the type {:?} is not known", kind.unwrap_or_default()));
        let host = kind
            .and_then(|kind| volume::host_path(path, kind))
            .map_err(|why| Problem::Never(format!("the volume of the claim {claim:?}: {why}")))?;
        return Ok(Mounted::HostPath(pb::HostPath {
            read_only,
            claim,
            ..host
        }));
    }
    if let Some(source) = &spec.nfs {
        return Ok(Mounted::Nfs(volume::nfs(source.into(), claim, read_only)));
    }
    if let Some(source) = &spec.csi {
        return Ok(Mounted::Csi(csi(source, claim, read_only)));
    }
    Err(Problem::Never(format!(
        "the volume of the claim {claim:?} is of a kind that cannot be mounted here; hostPath, local, nfs and csi can"
    )))
}

fn csi(source: &CSIPersistentVolumeSource, claim: String, read_only: bool) -> pb::CsiVolume {
    let attributes = source.volume_attributes.clone().unwrap_or_default();
    pb::CsiVolume {
        driver: source.driver.clone(),
        handle: source.volume_handle.clone(),
        attributes: attributes.into_iter().collect(),
        read_only: read_only || source.read_only == Some(true),
        claim,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A pod with the volume `v`.
    fn pod(source: Value) -> Pod {
        let mut volume = source;
        volume["name"] = json!("v");
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "pod-uid"},
            "spec": {"containers": [{"name": "a", "image": "i"}], "volumes": [volume]},
        }))
        .unwrap()
    }

    fn found(change: impl FnOnce(&mut Value, &mut Value)) -> FoundClaim {
        let mut claim = json!({
            "metadata": {"name": "c", "uid": "claim-uid"},
            "spec": {"volumeName": "pv"}, "status": {"phase": "Bound"},
        });
        let mut volume = json!({
            "metadata": {"name": "pv"},
            "spec": {"claimRef": {"uid": "claim-uid"}, "hostPath": {"path": "/data/x/"}},
        });
        change(&mut claim, &mut volume);
        FoundClaim {
            claim: serde_json::from_value(claim).unwrap(),
            volume: serde_json::from_value(volume).unwrap(),
        }
    }

    fn bind(pod: &Pod, name: &str, found: FoundClaim) -> Result<Mounted, Unbound> {
        let mut shape = super::super::shape(pod).map_err(Unbound::Never)?;
        assert_eq!(shape.volumes[0].source, None);
        assert_eq!(names(pod), [name]);
        bind_claims(pod, &mut shape, &[(name.to_owned(), found)].into())?;
        Ok(shape.volumes.remove(0).source.unwrap())
    }

    fn named(change: impl FnOnce(&mut Value, &mut Value)) -> Result<Mounted, Unbound> {
        let pod = pod(json!({"persistentVolumeClaim": {"claimName": "c"}}));
        bind(&pod, "c", found(change))
    }

    #[test]
    fn a_bound_claim_is_what_its_volume_says() {
        let host = |path: &str, kind: pb::HostPathType, read_only| {
            Mounted::HostPath(pb::HostPath {
                path: path.to_owned(),
                r#type: kind.into(),
                read_only,
                claim: "c".to_owned(),
            })
        };
        let any = pb::HostPathType::Unspecified;
        assert_eq!(named(|_, _| ()), Ok(host("/data/x", any, false)));
        let local = named(|_, pv| {
            pv["spec"] = json!({"claimRef": {"uid": "claim-uid"}, "local": {"path": "/l"}});
        });
        assert_eq!(local, Ok(host("/l", pb::HostPathType::Directory, false)));
        let read_only = pod(json!({"persistentVolumeClaim": {"claimName": "c", "readOnly": true}}));
        assert_eq!(
            bind(&read_only, "c", found(|_, _| ())),
            Ok(host("/data/x", any, true))
        );
        let nfs = named(|_, pv| {
            pv["spec"] = json!({"claimRef": {"uid": "claim-uid"}, "nfs": {"server": "h", "path": "/e", "readOnly": true}});
        });
        assert!(matches!(nfs, Ok(Mounted::Nfs(nfs)) if nfs.read_only && nfs.claim == "c"));
        let csi = named(|_, pv| {
            pv["spec"] = json!({"claimRef": {"uid": "claim-uid"}, "csi": {
                "driver": "d", "volumeHandle": "h", "volumeAttributes": {"share": "/s"}}});
        });
        assert!(matches!(csi, Ok(Mounted::Csi(csi)) if csi.attributes["share"] == "/s"));
    }

    #[test]
    fn a_claim_that_is_not_bound_waits_with_the_message_of_a_kubelet() {
        let message = |change: fn(&mut Value, &mut Value)| match named(change) {
            Err(Unbound::Waits(why)) => why.join("; "),
            other => panic!("{other:?}"),
        };
        for (change, why) in [
            (
                (|pvc, _| *pvc = Value::Null) as fn(&mut Value, &mut Value),
                "persistentvolumeclaim \"c\" not found",
            ),
            (
                |pvc, _| pvc["status"] = json!({"phase": "Pending"}),
                "PVC is not bound",
            ),
            (|pvc, _| pvc["spec"] = json!({}), "PVC is not bound"),
            (
                |pvc, _| pvc["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z"),
                "PVC is being deleted",
            ),
            (
                |_, pv| *pv = Value::Null,
                "persistentvolume \"pv\" not found",
            ),
            (
                |_, pv| pv["spec"]["claimRef"]["uid"] = json!("other"),
                "PV pv is not bound to this claim",
            ),
        ] {
            assert_eq!(message(change), format!("error processing PVC ns/c: {why}"));
        }
    }

    #[test]
    fn what_can_never_be_mounted_is_refused() {
        let problem = |change: fn(&mut Value, &mut Value)| match named(change) {
            Err(Unbound::Never(why)) => why.join("; "),
            other => panic!("{other:?}"),
        };
        let block = problem(|_, pv| pv["spec"]["volumeMode"] = json!("Block"));
        assert!(
            block.starts_with("spec.volumes[v]: ") && block.contains("Block"),
            "{block}"
        );
        let kind = problem(|_, pv| {
            pv["spec"] = json!({"claimRef": {"uid": "claim-uid"}, "fc": {}});
        });
        assert!(kind.contains("hostPath, local, nfs and csi"), "{kind}");
        let of_type = problem(|_, pv| pv["spec"]["hostPath"]["type"] = json!("Pipe"));
        assert!(
            of_type.contains("the type \"Pipe\" is not known"),
            "{of_type}"
        );
        let path = problem(|_, pv| pv["spec"]["hostPath"]["path"] = json!("/a/../b"));
        assert!(path.contains("'..'"), "{path}");
    }

    #[test]
    fn a_volume_of_the_pods_own_claim_takes_no_other_pods_claim() {
        let pod = pod(json!({"ephemeral": {"volumeClaimTemplate": {"spec": {}}}}));
        let owned = |uid: &str| {
            let owner = json!([{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": uid, "controller": true}]);
            found(|pvc, _| pvc["metadata"]["ownerReferences"] = owner)
        };
        bind(&pod, "p-v", owned("pod-uid")).unwrap();
        let other = bind(&pod, "p-v", owned("other")).unwrap_err();
        assert!(
            other.to_string().contains("not created for this pod"),
            "{other}"
        );
    }
}
