//! PURE: `[policy.nodes]` of the site file, which assigns nodes to kubelets.

use std::collections::BTreeMap;

/// Whether this kubelet may lead the node.
#[must_use]
pub fn may_lead(kubelet: &str, node: &str, nodes: &BTreeMap<String, String>) -> bool {
    kubelet == node
        || nodes
            .get(node)
            .is_some_and(|identity| assigned(identity) == Some(kubelet))
}

/// The name in `kubelet/NAME` or in the whole URI.
#[must_use]
pub fn assigned(identity: &str) -> Option<&str> {
    let name = identity.strip_prefix("spiffe://knoc/").unwrap_or(identity);
    name.strip_prefix("kubelet/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubelet_leads_its_own_node_and_those_assigned_to_it() {
        let nodes: BTreeMap<_, _> = [
            ("b".to_owned(), "kubelet/a".to_owned()),
            ("c".to_owned(), "spiffe://knoc/kubelet/a".to_owned()),
            ("d".to_owned(), "ctl/a".to_owned()),
        ]
        .into();
        for node in ["a", "b", "c"] {
            assert!(may_lead("a", node, &nodes), "{node}");
        }
        for (kubelet, node) in [("a", "d"), ("a", "e"), ("x", "b"), ("a", "")] {
            assert!(!may_lead(kubelet, node, &nodes), "{kubelet} {node}");
        }
        assert!(
            may_lead("b", "b", &nodes),
            "a kubelet may always lead the node of its own name"
        );
    }
}
