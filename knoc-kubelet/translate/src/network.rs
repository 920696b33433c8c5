//! PURE: which network a pod asks for, and the ports of the node that lead to it.

use k8s_openapi::api::core::v1::Pod;
use knoc_proto::{
    names::without_leading_zeros,
    pb::{self, NetworkMode},
};

use crate::carried::{Container, ContainerPort, PodSpec};

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

/// The ports of the node that lead to the container. In the node's network there are none: programs listen there
/// themselves, and the API server gives each port the same host port.
pub(super) fn host_ports(
    spec: PodSpec<'_>,
    container: Container<'_>,
    problems: &mut Vec<String>,
) -> Vec<pb::HostPort> {
    if *spec.host_network == Some(true) {
        return Vec::new();
    }
    let mut found = Vec::new();
    for port in container.ports.iter().flatten().map(ContainerPort::from) {
        let Some(host_port) = port.host_port.filter(|number| *number != 0) else {
            continue;
        };
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        if protocol != "TCP" && protocol != "UDP" {
            problems.push(format!(
                "ports: hostPort {host_port} with the protocol {protocol}; only TCP and UDP ports of the node are forwarded"
            ));
            continue;
        }
        // The agent refuses numbers that are no ports.
        let number = |value: i32| value.try_into().unwrap_or_default();
        found.push(pb::HostPort {
            host_port: number(host_port),
            container_port: number(*port.container_port),
            host_ip: without_leading_zeros(port.host_ip.as_deref().unwrap_or_default()),
            udp: protocol == "UDP",
        });
    }
    found
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
        let pod: Pod = serde_json::from_value(pod).map_err(|error| error.to_string())?;
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

    #[test]
    fn a_pod_in_the_nodes_network_has_the_nodes_host_name() {
        let of_node = |host_network: bool| {
            let pod: Pod = serde_json::from_value(json!({
                "metadata": {"name": "p", "uid": "u", "annotations": {ANNOTATION: "host"}},
                "spec": {
                    "hostname": "h", "hostNetwork": host_network,
                    "containers": [{"name": "main", "image": "i"}],
                },
            }))
            .unwrap();
            crate::shape(&pod).unwrap().node_hostname
        };
        assert!(of_node(true));
        // Only `hostNetwork` means that on any node.
        assert!(!of_node(false));
    }

    #[test]
    fn host_ports_lead_to_a_pod_that_is_not_in_the_nodes_network() {
        let of = |host_network: bool| {
            let pod: Pod = serde_json::from_value(json!({"spec": {
                "hostNetwork": host_network,
                "containers": [{"name": "a", "ports": [
                    {"containerPort": 80, "hostPort": 8080, "hostIP": "127.000.0.01"},
                    {"containerPort": 81},
                    {"containerPort": 53, "hostPort": 53, "protocol": "UDP"},
                    {"containerPort": 54, "hostPort": 54, "protocol": "SCTP"},
                ]}],
            }}))
            .unwrap();
            let spec = pod.spec.as_ref().map(PodSpec::from).unwrap();
            let mut problems = Vec::new();
            let container = Container::from(&spec.containers[0]);
            (host_ports(spec, container, &mut problems), problems)
        };
        let expected = pb::HostPort {
            host_port: 8080,
            container_port: 80,
            host_ip: "127.0.0.1".to_owned(),
            udp: false,
        };
        let datagrams = pb::HostPort {
            host_port: 53,
            container_port: 53,
            host_ip: String::new(),
            udp: true,
        };
        let (found, problems) = of(false);
        assert_eq!(found, [expected, datagrams]);
        let [problem] = problems.as_slice() else {
            panic!("{problems:?}");
        };
        assert!(
            problem.starts_with("ports: hostPort 54 with the protocol SCTP"),
            "{problem}"
        );
        assert_eq!(of(true), (Vec::new(), Vec::new()));
    }
}
