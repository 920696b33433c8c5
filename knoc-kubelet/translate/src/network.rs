//! PURE: which network a pod asks for.

use k8s_openapi::api::core::v1::Pod;
use knoc_proto::pb::NetworkMode;

use crate::carried::PodSpec;

/// Overrides the site's setting for pods that do not ask for `hostNetwork`.
const ANNOTATION: &str = "knoc.io/network";

/// The network that the pod asks for; not specified if it leaves that to the site.
pub(super) fn mode(pod: &Pod, spec: PodSpec<'_>, problems: &mut Vec<String>) -> NetworkMode {
    let annotations = pod.metadata.annotations.as_ref();
    let asked = annotations.and_then(|all| all.get(ANNOTATION));
    let asked = asked.map(|value| value.trim());
    let of_host = *spec.host_network == Some(true);
    match asked {
        Some("private") if of_host => {
            problems.push(format!(
                "metadata.annotations[{ANNOTATION}]: `private` contradicts `spec.hostNetwork: true`; leave one of them out"
            ));
            NetworkMode::Unspecified
        }
        Some("private") => NetworkMode::Private,
        Some("host") => NetworkMode::Host,
        None if of_host => NetworkMode::Host,
        None => NetworkMode::Unspecified,
        Some(other) => {
            problems.push(format!(
                "metadata.annotations[{ANNOTATION}]: `{other}` is not `private` or `host`"
            ));
            NetworkMode::Unspecified
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(annotation: Option<&str>, host_network: bool) -> Result<NetworkMode, String> {
        let mut pod = json!({"spec": {"containers": [], "hostNetwork": host_network}});
        if let Some(value) = annotation {
            pod["metadata"] = json!({"annotations": {ANNOTATION: value}});
        }
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let mut problems = Vec::new();
        let spec = pod.spec.as_ref().map(PodSpec::from).unwrap();
        let mode = mode(&pod, spec, &mut problems);
        problems.pop().map_or(Ok(mode), Err)
    }

    #[test]
    fn the_host_network_or_the_annotation_decides() {
        assert_eq!(of(None, false), Ok(NetworkMode::Unspecified));
        assert_eq!(of(None, true), Ok(NetworkMode::Host));
        assert_eq!(of(Some("host"), true), Ok(NetworkMode::Host));
        assert_eq!(of(Some(" private "), false), Ok(NetworkMode::Private));
        assert_eq!(of(Some("host"), false), Ok(NetworkMode::Host));
        let wrong = of(Some("bridge"), false).unwrap_err();
        assert!(
            wrong.contains("`bridge` is not `private` or `host`"),
            "{wrong}"
        );
        let wrong = of(Some("private"), true).unwrap_err();
        assert!(wrong.contains("contradicts"), "{wrong}");
    }
}
