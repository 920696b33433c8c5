//! `policy.host_ports` of the site file: the ports of a compute node that may lead to a pod.

use std::{ops::RangeInclusive, str::FromStr};

use knoc_proto::pod::PodSpec;

use super::Policy;

/// A port, or a range of ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HostPorts(RangeInclusive<u32>);

impl FromStr for HostPorts {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port > 0);
        match (port(first), port(last)) {
            (Some(first), Some(last)) if first <= last => Ok(Self(first.into()..=last.into())),
            _ => Err(format!(
                "{text:?} is not a port or a range like \"20000-20999\""
            )),
        }
    }
}

impl Policy {
    /// One problem for each host port of the pod that the site does not allow.
    #[must_use]
    pub fn denied_host_ports(&self, spec: &PodSpec) -> Vec<String> {
        let parsed = self.host_ports.iter().map(|text| text.parse());
        let allowed: Vec<HostPorts> = parsed.filter_map(Result::ok).collect();
        let listed = match self.host_ports.as_slice() {
            [] => "none are allowed".to_owned(),
            listed => format!("allowed are {}", listed.join(", ")),
        };
        let mut denied = Vec::new();
        for container in spec.all_containers() {
            for port in container.host_ports.iter().map(|one| one.host_port) {
                if !allowed.iter().any(|range| range.0.contains(&port)) {
                    denied.push(format!(
                        "containers[{}].ports: hostPort {port} is not among policy.host_ports of the site file ({listed})",
                        container.name
                    ));
                }
            }
        }
        denied
    }
}

#[cfg(test)]
mod tests {
    use knoc_proto::{ids::PodUid, pb};

    use super::*;

    #[test]
    fn only_listed_ports_are_allowed() {
        let port = |host_port| pb::HostPort {
            host_port,
            container_port: 80,
            host_ip: String::new(),
            udp: false,
        };
        let container = pb::Container {
            name: "web".to_owned(),
            host_ports: [8080, 20_000, 20_999, 21_000].map(port).to_vec(),
            ..pb::Container::default()
        };
        let shape = pb::PodSpec {
            containers: vec![container],
            ..pb::PodSpec::default()
        };
        let spec = PodSpec::accepted_before(PodUid::try_from("uid").unwrap(), shape);
        let denied = |listed: &[&str]| {
            let policy = Policy {
                host_ports: listed.iter().map(|&text| text.to_owned()).collect(),
                ..Policy::default()
            };
            policy.denied_host_ports(&spec)
        };
        let all = denied(&[]);
        assert_eq!(all.len(), 4);
        assert!(
            all[0].contains("hostPort 8080") && all[0].contains("none are allowed"),
            "{all:?}"
        );
        let some = denied(&["8080", "20000-20999"]);
        assert_eq!(some.len(), 1);
        assert!(some[0].contains("hostPort 21000"), "{some:?}");
        assert!(
            some[0].contains("allowed are 8080, 20000-20999"),
            "{some:?}"
        );
        assert!(denied(&["1-65535"]).is_empty());
    }

    #[test]
    fn a_range_is_two_ports_in_order() {
        for text in ["80", "1-65535", "8000 - 8999"] {
            text.parse::<HostPorts>().unwrap();
        }
        for text in [
            "", "0", "0-80", "90-80", "65536", "80-", "http", "-80", "1-2-3",
        ] {
            text.parse::<HostPorts>().unwrap_err();
        }
    }
}
