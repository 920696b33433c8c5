//! PURE: checks the source of a volume, and what is mounted in one.

use std::{collections::HashSet, path::PathBuf};

use super::{check as check_name, has_control};
use crate::{names, paths, pb, pb::volume::Source};

/// No volume of a real driver has more.
const ATTRIBUTES: usize = 64;
const ATTRIBUTE_BYTES: usize = 4096;

/// Whether the pod's volume of this name is an image.
fn is_image(spec: &pb::PodSpec, volume: &str) -> bool {
    let mut all = spec.volumes.iter();
    let found = all.find(|one| one.name == volume);
    found.is_some_and(|one| matches!(one.source, Some(Source::Image(_))))
}

/// Records what would be mounted below a folder of an image: it would be hidden, since that folder is mounted last.
pub(super) fn check_folders(
    spec: &pb::PodSpec,
    container: &pb::Container,
    problems: &mut Vec<String>,
) {
    let place = |mount: &pb::Mount| paths::in_container(&mount.path).ok().map(PathBuf::from);
    let is_folder = |mount: &&pb::Mount| {
        let whole = mount.sub_path.is_empty() && mount.sub_path_expr.is_empty();
        !whole && is_image(spec, &mount.volume)
    };
    let mounts = container.mounts.iter();
    let folders: HashSet<PathBuf> = mounts.filter(is_folder).filter_map(place).collect();
    for mount in &container.mounts {
        let Some(place) = place(mount) else {
            continue;
        };
        if place
            .ancestors()
            .skip(1)
            .any(|above| folders.contains(above))
        {
            problems.push(format!(
                "container {:?}: mountPath {:?} lies in a subPath of an image volume, where nothing can be mounted",
                container.name, mount.path
            ));
        }
    }
}

/// Records what is wrong with the source.
pub(super) fn check(source: &Source, problems: &mut Vec<String>) {
    let claim = match source {
        Source::EmptyDir(_) | Source::Files(_) => return,
        Source::Image(image) => {
            plain("reference of an image volume", &image.reference, problems);
            return;
        }
        Source::HostPath(host) => {
            if let Err(error) = paths::in_container(&host.path) {
                problems.push(format!("the host path {:?} {error}", host.path));
            }
            if pb::HostPathType::try_from(host.r#type).is_err() {
                problems.push(format!(
                    "the type of the host path {:?} is not known",
                    host.path
                ));
            }
            &host.claim
        }
        Source::Nfs(nfs) => {
            if let Err(error) = paths::in_container(&nfs.path) {
                problems.push(format!("the path {:?} of an NFS export {error}", nfs.path));
            }
            plain("server of an NFS export", &nfs.server, problems);
            &nfs.claim
        }
        Source::Csi(csi) => {
            plain("CSI driver", &csi.driver, problems);
            plain("handle of a CSI volume", &csi.handle, problems);
            if csi.attributes.len() > ATTRIBUTES {
                let count = csi.attributes.len();
                problems.push(format!(
                    "a CSI volume has {count} attributes; the limit is {ATTRIBUTES}"
                ));
            }
            for (key, value) in &csi.attributes {
                if has_control(value) || key.len() + value.len() > ATTRIBUTE_BYTES {
                    problems.push(format!(
                        "the attribute {key:?} of a CSI volume has control characters or is too long"
                    ));
                }
            }
            &csi.claim
        }
    };
    if !claim.is_empty() {
        check_name("claim", claim, names::dns_subdomain(claim), problems);
    }
}

fn plain(what: &str, text: &str, problems: &mut Vec<String>) {
    if text.is_empty() || text.len() > ATTRIBUTE_BYTES || has_control(text) {
        problems.push(format!(
            "the {what} is empty, is too long or has control characters"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_mounted_in_a_folder_of_an_image() {
        let problems = |sub_path: &str, sub_path_expr: &str, other: &str| {
            let mount = |volume: &str, path: &str| pb::Mount {
                volume: volume.to_owned(),
                path: path.to_owned(),
                ..pb::Mount::default()
            };
            let folder = pb::Mount {
                sub_path: sub_path.to_owned(),
                sub_path_expr: sub_path_expr.to_owned(),
                ..mount("models", "/srv/models/")
            };
            let volume = |name: &str, source| pb::Volume {
                name: name.to_owned(),
                source: Some(source),
            };
            let image = pb::ImageVolume {
                reference: "models:1".to_owned(),
                ..pb::ImageVolume::default()
            };
            let spec = pb::PodSpec {
                uid: "u".to_owned(),
                namespace: "n".to_owned(),
                name: "p".to_owned(),
                containers: vec![pb::Container {
                    name: "main".to_owned(),
                    image: "i".to_owned(),
                    mounts: vec![mount("empty", other), folder],
                    ..pb::Container::default()
                }],
                volumes: vec![
                    volume("models", Source::Image(image)),
                    volume("empty", Source::EmptyDir(pb::EmptyDir::default())),
                ],
                ..pb::PodSpec::default()
            };
            let checked = super::super::PodSpec::try_from(spec);
            checked.map_or_else(|invalid| invalid.to_string(), |_| String::new())
        };
        for (sub_path, expr, other, hidden) in [
            ("", "", "/srv/models/a", false),
            ("a", "", "/srv", false),
            ("a", "", "/srv/models2", false),
            ("a/b", "", "/srv/models/a", true),
            ("", "$(A)", "/srv//models/a/b", true),
        ] {
            let text = problems(sub_path, expr, other);
            assert_eq!(
                text.contains("in a subPath of an image volume"),
                hidden,
                "{text}"
            );
            assert_eq!(text.is_empty(), !hidden, "{text}");
        }
    }

    #[test]
    fn a_source_from_another_version_or_with_strange_text_is_rejected() {
        let problems = |source: Source| {
            let mut problems = Vec::new();
            check(&source, &mut problems);
            problems.join("; ")
        };
        let host = |path: &str, kind: i32, claim: &str| {
            Source::HostPath(pb::HostPath {
                path: path.to_owned(),
                r#type: kind,
                claim: claim.to_owned(),
                ..pb::HostPath::default()
            })
        };
        assert_eq!(problems(host("/data", 7, "c")), "");
        assert!(problems(host("/data/..", 0, "")).contains("'..'"));
        assert!(problems(host("/data", 99, "")).contains("type"));
        assert!(problems(host("/data", 0, "a b")).contains("claim"));
        let csi = |handle: &str, count: usize| {
            let attributes = (0..count).map(|n| (n.to_string(), String::new()));
            Source::Csi(pb::CsiVolume {
                driver: "d".to_owned(),
                handle: handle.to_owned(),
                attributes: attributes.collect(),
                ..pb::CsiVolume::default()
            })
        };
        assert_eq!(problems(csi("h", ATTRIBUTES)), "");
        assert!(problems(csi("h", ATTRIBUTES + 1)).contains("the limit is 64"));
        assert!(problems(csi("a\nb", 0)).contains("control characters"));
        let nfs = Source::Nfs(pb::NfsVolume::default());
        assert!(problems(nfs).contains("server"));
        let image = Source::Image(pb::ImageVolume::default());
        assert!(problems(image).contains("reference"));
    }
}
