//! Which networks the running pods are in, as their shims found the compute nodes, and which networks of the site they do not reach.

use std::collections::{BTreeMap, BTreeSet};

use knoc_proto::{
    egress::Range,
    overlap,
    pb::{self, Finding, NetworkMode, PodNetwork},
};

use super::finding;
use crate::{config::NetworkSetting, site::Site};

/// The most different reasons that are shown.
const SHOWN: usize = 3;

/// The IPv4 routes of this host. Those of compute nodes lead to the same networks of the site, in most cases.
const ROUTES: &str = "/proc/self/net/route";

/// What the shims of the running pods report.
pub(super) fn pods(site: &Site) -> Finding {
    let (pods, _) = site.board.snapshot();
    let running = pods
        .iter()
        .filter(|pod| pod.phase() == pb::PodPhase::Running);
    let networks: Vec<PodNetwork> = running.filter_map(|pod| pod.network.clone()).collect();
    judge(site.config.job.network, &networks)
}

/// PURE: the finding. A reason is a problem only if the site wants networks of the pods' own.
fn judge(setting: NetworkSetting, networks: &[PodNetwork]) -> Finding {
    let setting = match setting {
        NetworkSetting::Auto => "auto",
        NetworkSetting::Private => "private",
        NetworkSetting::Host => "host",
    };
    let count = |mode: NetworkMode| networks.iter().filter(|one| one.mode() == mode).count();
    let (own, of_node) = (count(NetworkMode::Private), count(NetworkMode::Host));
    let mut text = format!(
        "job.network is {setting}; of the running pods, {own} have a network of their own and {of_node} are in the node's"
    );
    let addressed = networks.iter().filter(|one| !one.address.is_empty());
    let addressed = addressed.count();
    if addressed > 0 {
        text += "; with addresses of their own: ";
        text += &addressed.to_string();
    }
    if networks.is_empty() {
        text += "; what the compute nodes can do is known once a pod runs";
    }
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for one in networks.iter().filter(|one| !one.reason.is_empty()) {
        *reasons.entry(&one.reason).or_default() += 1;
    }
    let result = if reasons.is_empty() {
        Ok(text)
    } else {
        let named = reasons.iter().take(SHOWN);
        let named: Vec<_> = named
            .map(|(reason, count)| format!("{reason} ({count} pods)"))
            .collect();
        Err(format!("{text}: {}", named.join("; ")))
    };
    finding(
        "network: pods",
        result,
        "allow user namespaces, install pasta (package passt) and the kernel module veth on the compute nodes, or set \
         `network = \"host\"` under [job]",
    )
}

/// Which networks of this host have addresses that lead pods to the cluster, or to other pods.
pub(super) fn ranges(site: &Site) -> Finding {
    let routes = std::fs::read_to_string(ROUTES).unwrap_or_default();
    let of_clusters = site.egress.ranges().into_iter();
    judge_ranges(&of_clusters.chain(site.mesh.ranges()).collect(), &routes)
}

/// PURE: the finding about these ranges.
fn judge_ranges(ranges: &BTreeSet<String>, routes: &str) -> Finding {
    let mut hidden = Vec::new();
    for text in ranges {
        let range = text.parse::<Range>().ok().and_then(|range| range.ipv4());
        let networks = range.map(|range| overlap::hidden(range, routes));
        let networks = networks.unwrap_or_default().join(", ");
        if !networks.is_empty() {
            hidden.push(format!("{networks} (in {text})"));
        }
    }
    let all: Vec<_> = ranges.iter().map(String::as_str).collect();
    let result = match (hidden.is_empty(), all.is_empty()) {
        (false, _) => Err(format!(
            "pods with a network of their own do not reach these networks of this host: {}",
            hidden.join("; ")
        )),
        (true, true) => Ok("no kubelet has named addresses of its cluster or of pods".to_owned()),
        (true, false) => Ok(format!("no network of this host is in {}", all.join(", "))),
    };
    finding(
        "network: ranges",
        result,
        "choose another range if it is that of pods (node.podRange of the kubelet, or spec.podCIDR of the Node); pods that need such a network \
         can be in the node's: `knoc.io/network: host`",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(mode: NetworkMode, reason: &str) -> PodNetwork {
        PodNetwork {
            address: String::new(),
            mode: mode.into(),
            reason: reason.to_owned(),
        }
    }

    #[test]
    fn what_the_nodes_cannot_do_is_counted_by_its_reason() {
        let unknown = judge(NetworkSetting::Auto, &[]);
        assert!(
            unknown.ok && unknown.detail.contains("once a pod runs"),
            "{unknown:?}"
        );
        let good = [one(NetworkMode::Private, ""), one(NetworkMode::Host, "")];
        let found = judge(NetworkSetting::Auto, &good);
        assert!(found.ok, "{found:?}");
        assert!(
            found
                .detail
                .contains("1 have a network of their own and 1 are in"),
            "{found:?}"
        );
        let missing = "pasta is not installed";
        let bad = [
            one(NetworkMode::Host, missing),
            one(NetworkMode::Host, missing),
        ];
        let found = judge(NetworkSetting::Auto, &bad);
        assert!(!found.ok && found.cure.contains("passt"), "{found:?}");
        assert!(
            found.detail.contains("pasta is not installed (2 pods)"),
            "{found:?}"
        );
    }

    #[test]
    fn networks_of_the_site_in_a_range_of_the_cluster_are_a_problem() {
        let routes = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n";
        let hexadecimal = |octets| format!("{:08X}", u32::from_ne_bytes(octets));
        let (network, mask) = (hexadecimal([10, 96, 7, 0]), hexadecimal([255, 255, 255, 0]));
        let routes = format!("{routes}eth0 {network} 0 1 0 0 0 {mask} 0 0 0\n");
        let judge = |ranges: &[&str]| {
            let ranges = ranges.iter().map(|&text| text.to_owned()).collect();
            judge_ranges(&ranges, &routes)
        };
        let unknown = judge(&[]);
        assert!(
            unknown.ok && unknown.detail.contains("no kubelet"),
            "{unknown:?}"
        );
        let apart = judge(&["10.112.0.0/12", "fd00::/108"]);
        assert!(
            apart.ok && apart.detail.ends_with("10.112.0.0/12, fd00::/108"),
            "{apart:?}"
        );
        let hidden = judge(&["10.112.0.0/12", "10.96.0.0/12"]);
        assert!(
            !hidden.ok && hidden.detail.ends_with(": 10.96.7.0/24 (in 10.96.0.0/12)"),
            "{hidden:?}"
        );
        assert!(hidden.cure.contains("node.podRange"), "{hidden:?}");
    }
}
