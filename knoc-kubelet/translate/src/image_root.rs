//! PURE: the annotation `knoc.io/image-root`, a folder in which images lie that are named by a path.

use k8s_openapi::api::core::v1::Pod;
use knoc_proto::{paths, pb};

/// The annotation, and its name in the Go KNoC. The first that is set counts.
const NAMES: [&str; 2] = ["knoc.io/image-root", "slurm-job.knoc.io/image-root"];

/// Puts the folder before the images that begin with a slash.
pub(super) fn apply(pod: &Pod, containers: &mut [pb::Container], problems: &mut Vec<String>) {
    let annotations = pod.metadata.annotations.as_ref();
    let found = NAMES
        .iter()
        .find_map(|name| Some((name, annotations?.get(*name)?)));
    let Some((name, value)) = found else {
        return;
    };
    let root = match paths::in_container(value.trim()) {
        Ok(root) => root,
        Err(error) => {
            problems.push(format!("metadata.annotations[{name}]: `{value}` {error}"));
            return;
        }
    };
    for container in containers {
        if container.image.starts_with('/') {
            container.image = format!("{}{}", root.trim_end_matches('/'), container.image);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(annotations: &[(&str, &str)], image: &str) -> Result<String, Vec<String>> {
        let mut pod = Pod::default();
        let annotations = annotations.iter();
        let annotations =
            annotations.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        pod.metadata.annotations = Some(annotations.collect());
        let mut containers = [pb::Container {
            image: image.to_owned(),
            ..pb::Container::default()
        }];
        let mut problems = Vec::new();
        apply(&pod, &mut containers, &mut problems);
        let [container] = containers;
        if problems.is_empty() {
            Ok(container.image)
        } else {
            Err(problems)
        }
    }

    #[test]
    fn only_images_that_are_paths_lie_below_the_root() {
        let root = [("knoc.io/image-root", "/images/mine/")];
        assert_eq!(image(&root, "/a.sif"), Ok("/images/mine/a.sif".to_owned()));
        assert_eq!(image(&root, "busybox"), Ok("busybox".to_owned()));
        assert_eq!(image(&[], "/a.sif"), Ok("/a.sif".to_owned()));
        let old = [("slurm-job.knoc.io/image-root", "/old")];
        assert_eq!(image(&old, "/a.sif"), Ok("/old/a.sif".to_owned()));
        let both = [root[0], old[0]];
        assert_eq!(image(&both, "/a.sif"), Ok("/images/mine/a.sif".to_owned()));
        for wrong in ["images", "/images/../etc", ""] {
            let problems = image(&[("knoc.io/image-root", wrong)], "/a.sif").unwrap_err();
            let named = problems[0].starts_with("metadata.annotations[knoc.io/image-root]: ");
            assert!(named && problems.len() == 1, "{problems:?}");
        }
    }
}
