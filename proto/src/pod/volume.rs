//! PURE: checks the source of a volume.

use super::{check as check_name, has_control};
use crate::{names, paths, pb, pb::volume::Source};

/// No volume of a real driver has more.
const ATTRIBUTES: usize = 64;
const ATTRIBUTE_BYTES: usize = 4096;

/// Whether the pod's volume of this name is an image.
pub(super) fn is_image(spec: &pb::PodSpec, volume: &str) -> bool {
    let mut all = spec.volumes.iter();
    let found = all.find(|one| one.name == volume);
    found.is_some_and(|one| matches!(one.source, Some(Source::Image(_))))
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
    fn only_the_whole_of_an_image_is_mounted() {
        let mount = |sub_path: &str, sub_path_expr: &str| pb::PodSpec {
            uid: "u".to_owned(),
            namespace: "n".to_owned(),
            name: "p".to_owned(),
            containers: vec![pb::Container {
                name: "main".to_owned(),
                image: "i".to_owned(),
                mounts: vec![pb::Mount {
                    volume: "models".to_owned(),
                    path: "/models".to_owned(),
                    sub_path: sub_path.to_owned(),
                    sub_path_expr: sub_path_expr.to_owned(),
                    ..pb::Mount::default()
                }],
                ..pb::Container::default()
            }],
            volumes: vec![pb::Volume {
                name: "models".to_owned(),
                source: Some(Source::Image(pb::ImageVolume {
                    reference: "models:1".to_owned(),
                    ..pb::ImageVolume::default()
                })),
            }],
            ..pb::PodSpec::default()
        };
        let problems = |spec: pb::PodSpec| match super::super::PodSpec::try_from(spec) {
            Ok(_) => String::new(),
            Err(invalid) => invalid.to_string(),
        };
        assert_eq!(problems(mount("", "")), "");
        for spec in [mount("a", ""), mount("", "$(A)")] {
            let text = problems(spec);
            assert!(text.contains("the image volume \"models\""), "{text}");
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
