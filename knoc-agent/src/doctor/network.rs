//! Which networks the running pods are in, as their shims found the compute nodes.

use std::collections::BTreeMap;

use knoc_proto::pb::{self, Finding, NetworkMode, PodNetwork};

use super::finding;
use crate::{config::NetworkSetting, site::Site};

/// The most different reasons that are shown.
const SHOWN: usize = 3;

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
}
