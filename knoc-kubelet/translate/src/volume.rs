//! PURE: the source of a volume, which must be one that this version supports.

use k8s_openapi::api::core::v1::{self as core, Pod};
use knoc_proto::{paths, pb};

use super::{
    carried::{
        ClaimVolume, ConfigMapVolume, DownwardApiVolume, EmptyDir, HostPathVolume, ImageVolume,
        NfsVolume, ProjectedVolume, SecretVolume, Volume,
    },
    container::pull_policy,
    quantity,
};

/// The source of a volume's contents.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    /// An empty folder.
    EmptyDir(EmptyDir<'a>),
    /// A path of the compute node.
    HostPath(HostPathVolume<'a>),
    /// An image.
    Image(ImageVolume<'a>),
    /// An NFS export.
    Nfs(NfsVolume<'a>),
    /// The volume that a claim is bound to.
    Claim(Claim<'a>),
    /// Files that are sent with the pod's values.
    Files(FilesSource<'a>),
}

/// The source of a volume's files.
#[derive(Clone, Copy, Debug)]
pub(crate) enum FilesSource<'a> {
    ConfigMap(ConfigMapVolume<'a>),
    Secret(SecretVolume<'a>),
    DownwardApi(DownwardApiVolume<'a>),
    Projected(ProjectedVolume<'a>),
}

/// Whose claim a volume is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Claim<'a> {
    /// A claim that the pod names.
    Named(ClaimVolume<'a>),
    /// A claim that Kubernetes has created for this volume of the pod (`ephemeral`).
    OfPod,
}

impl Claim<'_> {
    pub(crate) fn name(self, pod: &Pod, volume: &str) -> String {
        match self {
            Self::Named(claim) => claim.claim_name.clone(),
            Self::OfPod => {
                let name = pod.metadata.name.as_deref().unwrap_or_default();
                format!("{name}-{volume}")
            }
        }
    }

    pub(crate) fn read_only(self) -> bool {
        match self {
            Self::Named(claim) => *claim.read_only == Some(true),
            Self::OfPod => false,
        }
    }
}

/// The volume has none of the sources in [`Source`]. If a pod names no source at all, the API server fills in
/// `emptyDir`, so a volume without a known source has an unknown one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("spec.volumes[{volume}]: volumes of this kind are not known to this version of KNoC")]
pub(crate) struct UnknownSource {
    volume: String,
}

/// Finds the source of a volume.
pub(crate) fn source(volume: &core::Volume) -> Result<Source<'_>, UnknownSource> {
    let Volume {
        config_map,
        downward_api,
        empty_dir,
        ephemeral,
        host_path,
        image,
        name,
        nfs,
        persistent_volume_claim,
        projected,
        secret,
    } = Volume::from(volume);
    if let Some(empty) = empty_dir {
        return Ok(Source::EmptyDir(empty.into()));
    }
    if let Some(host) = host_path {
        return Ok(Source::HostPath(host.into()));
    }
    if let Some(image) = image {
        return Ok(Source::Image(image.into()));
    }
    if let Some(nfs) = nfs {
        return Ok(Source::Nfs(nfs.into()));
    }
    if let Some(claim) = persistent_volume_claim {
        return Ok(Source::Claim(Claim::Named(claim.into())));
    }
    if ephemeral.is_some() {
        return Ok(Source::Claim(Claim::OfPod));
    }
    let files = if let Some(map) = config_map {
        FilesSource::ConfigMap(map.into())
    } else if let Some(secret) = secret {
        FilesSource::Secret(secret.into())
    } else if let Some(downward) = downward_api {
        FilesSource::DownwardApi(downward.into())
    } else if let Some(projected) = projected {
        FilesSource::Projected(projected.into())
    } else {
        let volume = name.clone();
        return Err(UnknownSource { volume });
    };
    Ok(Source::Files(files))
}

/// Translates a volume, or records what is wrong with it. The volume of a claim has no source yet.
pub(crate) fn shape(volume: &core::Volume, problems: &mut Vec<String>) -> Option<pb::Volume> {
    let source = match source(volume) {
        Ok(Source::EmptyDir(empty)) => Some(pb::volume::Source::EmptyDir(shape_empty_dir(
            &volume.name,
            empty,
            problems,
        ))),
        Ok(Source::HostPath(host)) => {
            // The verdict of a type that is not known is "rejected".
            let kind = host_path_type(host.type_.as_deref()).unwrap_or_default();
            let host = host_path(host.path, kind).unwrap_or_else(|why| {
                let name = &volume.name;
                problems.push(format!("spec.volumes[{name}].hostPath.path: {why}"));
                pb::HostPath::default()
            });
            Some(pb::volume::Source::HostPath(host))
        }
        Ok(Source::Image(image)) => {
            let reference = image.reference.clone().unwrap_or_default();
            let policy = pull_policy(image.pull_policy.as_deref(), &reference);
            Some(pb::volume::Source::Image(pb::ImageVolume {
                reference,
                pull_policy: policy.into(),
            }))
        }
        Ok(Source::Nfs(nfs)) => {
            let nfs = self::nfs(nfs, String::new(), false);
            Some(pb::volume::Source::Nfs(nfs))
        }
        Ok(Source::Claim(_)) => None,
        Ok(Source::Files(_)) => Some(pb::volume::Source::Files(pb::FilesVolume {})),
        Err(unknown) => {
            problems.push(unknown.to_string());
            return None;
        }
    };
    Some(pb::Volume {
        name: volume.name.clone(),
        source,
    })
}

fn shape_empty_dir(volume: &str, empty: EmptyDir<'_>, problems: &mut Vec<String>) -> pb::EmptyDir {
    let size = empty.size_limit.as_ref().map_or(Ok(0), quantity::units);
    pb::EmptyDir {
        memory: empty.medium.as_deref() == Some("Memory"),
        size_limit_bytes: size.unwrap_or_else(|error| {
            problems.push(format!(
                "spec.volumes[{volume}].emptyDir.sizeLimit: {error}"
            ));
            0
        }),
    }
}

/// An NFS export. `read_only`: whatever the export says itself.
pub(crate) fn nfs(source: NfsVolume<'_>, claim: String, read_only: bool) -> pb::NfsVolume {
    pb::NfsVolume {
        server: source.server.clone(),
        path: source.path.clone(),
        read_only: read_only || *source.read_only == Some(true),
        claim,
    }
}

/// A path of the compute node, or why the path is not valid.
pub(crate) fn host_path(path: &str, kind: pb::HostPathType) -> Result<pb::HostPath, String> {
    let path = paths::in_container(path).map_err(|error| format!("{path:?} {error}"))?;
    Ok(pb::HostPath {
        path,
        r#type: kind.into(),
        ..pb::HostPath::default()
    })
}

/// The type of a host path, if it is known.
pub(crate) fn host_path_type(kind: Option<&str>) -> Option<pb::HostPathType> {
    Some(match kind.unwrap_or_default() {
        "" => pb::HostPathType::Unspecified,
        "DirectoryOrCreate" => pb::HostPathType::DirectoryOrCreate,
        "Directory" => pb::HostPathType::Directory,
        "FileOrCreate" => pb::HostPathType::FileOrCreate,
        "File" => pb::HostPathType::File,
        "Socket" => pb::HostPathType::Socket,
        "CharDevice" => pb::HostPathType::CharDevice,
        "BlockDevice" => pb::HostPathType::BlockDevice,
        _ => return None,
    })
}
