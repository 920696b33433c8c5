//! PURE: the source of a volume, which must be one that this version supports.

use k8s_openapi::api::core::v1 as core;
use knoc_proto::pb;

use super::carried::{
    ConfigMapVolume, DownwardApiVolume, EmptyDir, ProjectedVolume, SecretVolume, Volume,
};
use super::quantity;

/// The source of a volume's contents.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    /// An empty folder.
    EmptyDir(EmptyDir<'a>),
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
        name,
        projected,
        secret,
    } = Volume::from(volume);
    if let Some(empty) = empty_dir {
        return Ok(Source::EmptyDir(empty.into()));
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

/// Translates a volume, or records what is wrong with it.
pub(crate) fn shape(volume: &core::Volume, problems: &mut Vec<String>) -> Option<pb::Volume> {
    let source = match source(volume) {
        Ok(Source::EmptyDir(empty)) => {
            pb::volume::Source::EmptyDir(shape_empty_dir(&volume.name, empty, problems))
        }
        Ok(Source::Files(_)) => pb::volume::Source::Files(pb::FilesVolume {}),
        Err(unknown) => {
            problems.push(unknown.to_string());
            return None;
        }
    };
    Some(pb::Volume {
        name: volume.name.clone(),
        source: Some(source),
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
