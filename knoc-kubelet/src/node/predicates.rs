//! PURE: does a pod match this node? Checks its node selector, its required node affinity, and the node's `NoExecute`
//! taints, for pods that were bound without the scheduler. The rules and the messages are those of Kubernetes.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, PodSpec, Taint, Toleration,
};

/// The attributes of a Node that decide which pods match it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeAttributes {
    name: String,
    labels: BTreeMap<String, String>,
    taints: Vec<Taint>,
}

/// Why a pod does not match the node. Tools look for these texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// The pod's selector or affinity does not match.
    #[error("Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector")]
    Affinity,
    /// The pod does not tolerate a `NoExecute` taint, for which it would be evicted at once.
    #[error("Predicate TaintToleration failed: node(s) had taints that the pod didn't tolerate")]
    Taint,
}

impl Mismatch {
    /// The value of `status.reason`.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Affinity => "NodeAffinity",
            Self::Taint => "TaintToleration",
        }
    }
}

impl NodeAttributes {
    /// The attributes of this Node, which includes labels and taints that others set.
    #[must_use]
    pub fn of(node: &Node) -> Self {
        let taints = node.spec.as_ref().and_then(|spec| spec.taints.clone());
        Self {
            name: node.metadata.name.clone().unwrap_or_default(),
            labels: node.metadata.labels.clone().unwrap_or_default(),
            taints: taints.unwrap_or_default(),
        }
    }

    /// Does the pod match this node?
    pub fn fits(&self, pod: &PodSpec) -> Result<(), Mismatch> {
        if !self.is_selected(pod) {
            return Err(Mismatch::Affinity);
        }
        let tolerations = pod.tolerations.as_deref().unwrap_or_default();
        let mut taints = self.taints.iter().filter(|one| one.effect == "NoExecute");
        if taints.any(|taint| !tolerations.iter().any(|one| tolerates(one, taint))) {
            return Err(Mismatch::Taint);
        }
        Ok(())
    }

    fn is_selected(&self, pod: &PodSpec) -> bool {
        let mut selector = pod.node_selector.iter().flatten();
        if !selector.all(|(key, value)| self.labels.get(key) == Some(value)) {
            return false;
        }
        let affinity = pod
            .affinity
            .as_ref()
            .and_then(|one| one.node_affinity.as_ref());
        let required = affinity.and_then(|one| {
            one.required_during_scheduling_ignored_during_execution
                .as_ref()
        });
        required.is_none_or(|required| {
            let mut terms = required.node_selector_terms.iter();
            terms.any(|term| self.matches(term))
        })
    }

    /// Does the node match this term? An empty term matches nothing.
    fn matches(&self, term: &NodeSelectorTerm) -> bool {
        let labels = term.match_expressions.as_deref().unwrap_or_default();
        let fields = term.match_fields.as_deref().unwrap_or_default();
        let label = |one: &NodeSelectorRequirement| {
            by_label(one, self.labels.get(&one.key).map(String::as_str))
        };
        !(labels.is_empty() && fields.is_empty())
            && labels.iter().all(label)
            && fields.iter().all(|one| self.by_field(one))
    }

    /// Does the node match this requirement? The only field is the name.
    fn by_field(&self, requirement: &NodeSelectorRequirement) -> bool {
        let field = match requirement.key.as_str() {
            "metadata.name" => self.name.as_str(),
            _ => "",
        };
        match (requirement.operator.as_str(), values(requirement)) {
            ("In", [value]) => value == field,
            ("NotIn", [value]) => value != field,
            _ => false,
        }
    }
}

/// Does a label match this requirement? A requirement that Kubernetes would not parse matches nothing.
fn by_label(requirement: &NodeSelectorRequirement, label: Option<&str>) -> bool {
    let values = values(requirement);
    let is_listed = || label.is_some_and(|label| values.iter().any(|value| value == label));
    match (requirement.operator.as_str(), values) {
        ("In", [_, ..]) => is_listed(),
        ("NotIn", [_, ..]) => !is_listed(),
        ("Exists", []) => label.is_some(),
        ("DoesNotExist", []) => label.is_none(),
        ("Gt", [bound]) => label.is_some_and(|label| numbers(label, bound, |is, than| is > than)),
        ("Lt", [bound]) => label.is_some_and(|label| numbers(label, bound, |is, than| is < than)),
        _ => false,
    }
}

fn values(requirement: &NodeSelectorRequirement) -> &[String] {
    requirement.values.as_deref().unwrap_or_default()
}

/// Compares both as numbers; false if one of them is not a number.
fn numbers(one: &str, other: &str, compare: impl Fn(i64, i64) -> bool) -> bool {
    matches!((one.parse(), other.parse()), (Ok(one), Ok(other)) if compare(one, other))
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let fits = |ours: &Option<String>, theirs: &str| {
        let ours = ours.as_deref().unwrap_or_default();
        ours.is_empty() || ours == theirs
    };
    let ours = toleration.value.as_deref().unwrap_or_default();
    let theirs = taint.value.as_deref().unwrap_or_default();
    fits(&toleration.effect, &taint.effect)
        && fits(&toleration.key, &taint.key)
        && match toleration.operator.as_deref().unwrap_or_default() {
            "" | "Equal" => ours == theirs,
            "Exists" => true,
            "Gt" => numbers(theirs, ours, |is, than| is > than),
            "Lt" => numbers(theirs, ours, |is, than| is < than),
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn attributes(taints: &Value) -> NodeAttributes {
        let node = json!({
            "metadata": {"name": "knoc-t", "labels": {"disk": "ssd", "gpus": "4", "type": "virtual-kubelet"}},
            "spec": {"taints": taints},
        });
        NodeAttributes::of(&serde_json::from_value(node).unwrap())
    }

    fn spec(fields: &Value) -> PodSpec {
        let mut spec = json!({"containers": []});
        for (field, value) in fields.as_object().unwrap() {
            spec[field] = value.clone();
        }
        serde_json::from_value(spec).unwrap()
    }

    fn selected(fields: &Value) -> bool {
        attributes(&json!([])).fits(&spec(fields)).is_ok()
    }

    /// A pod that requires one of these terms.
    fn required(terms: &Value) -> bool {
        selected(&json!({"affinity": {"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms},
        }}}))
    }

    fn expression(key: &str, operator: &str, values: &[&str]) -> Value {
        json!({"key": key, "operator": operator, "values": values})
    }

    #[test]
    fn a_node_selector_names_labels_that_must_be_there() {
        assert!(selected(&json!({})));
        assert!(selected(&json!({"nodeSelector": {}})));
        assert!(selected(
            &json!({"nodeSelector": {"disk": "ssd", "gpus": "4"}})
        ));
        assert!(!selected(&json!({"nodeSelector": {"disk": "hdd"}})));
        assert!(!selected(
            &json!({"nodeSelector": {"disk": "ssd", "zone": "a"}})
        ));
    }

    #[test]
    fn each_operator_of_an_expression() {
        for (key, operator, values, fits) in [
            ("disk", "In", &["hdd", "ssd"][..], true),
            ("disk", "In", &["hdd"], false),
            ("zone", "In", &["a"], false),
            ("disk", "NotIn", &["hdd"], true),
            ("disk", "NotIn", &["ssd"], false),
            ("zone", "NotIn", &["a"], true),
            ("disk", "Exists", &[], true),
            ("zone", "Exists", &[], false),
            ("disk", "DoesNotExist", &[], false),
            ("zone", "DoesNotExist", &[], true),
            ("gpus", "Gt", &["3"], true),
            ("gpus", "Gt", &["4"], false),
            ("gpus", "Lt", &["10"], true),
            ("gpus", "Lt", &["4"], false),
            ("disk", "Gt", &["3"], false),
            ("zone", "Lt", &["3"], false),
            // These are not valid.
            ("disk", "In", &[], false),
            ("zone", "NotIn", &[], false),
            ("disk", "Exists", &["ssd"], false),
            ("zone", "DoesNotExist", &["a"], false),
            ("gpus", "Gt", &["1", "2"], false),
            ("gpus", "Gt", &["few"], false),
            ("disk", "Like", &["s"], false),
        ] {
            let term = json!([{"matchExpressions": [expression(key, operator, values)]}]);
            assert_eq!(required(&term), fits, "{key} {operator} {values:?}");
        }
    }

    #[test]
    fn the_name_is_the_only_field() {
        for (key, operator, values, fits) in [
            ("metadata.name", "In", &["knoc-t"][..], true),
            ("metadata.name", "In", &["other"], false),
            ("metadata.name", "NotIn", &["other"], true),
            ("metadata.name", "NotIn", &["knoc-t"], false),
            ("metadata.name", "In", &["knoc-t", "other"], false),
            ("metadata.name", "Exists", &[], false),
            ("metadata.uid", "In", &["knoc-t"], false),
            ("metadata.uid", "NotIn", &["knoc-t"], true),
        ] {
            let term = json!([{"matchFields": [expression(key, operator, values)]}]);
            assert_eq!(required(&term), fits, "{key} {operator} {values:?}");
        }
    }

    #[test]
    fn one_term_suffices_and_within_it_all_must_match() {
        let (yes, no) = (
            expression("disk", "Exists", &[]),
            expression("zone", "Exists", &[]),
        );
        let here = expression("metadata.name", "In", &["knoc-t"]);
        let term = |expressions: &[&Value], fields: &[&Value]| json!({"matchExpressions": expressions, "matchFields": fields});
        assert!(required(&json!([term(&[&no], &[]), term(&[&yes], &[])])));
        assert!(!required(&json!([term(&[&yes, &no], &[])])));
        assert!(required(&json!([term(&[&yes], &[&here])])));
        assert!(!required(&json!([term(&[&no], &[&here])])));
        assert!(!required(&json!([])), "no term");
        assert!(!required(&json!([{}])), "an empty term");
        // The selector must match as well as the affinity.
        let both = json!({"nodeSelector": {"disk": "hdd"}, "affinity": {"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term(&[&yes], &[])]},
        }}});
        assert!(!selected(&both));
        // Preferences and affinities to other pods are the scheduler's task.
        assert!(selected(&json!({"affinity": {
            "nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 1, "preference": term(&[&no], &[])},
            ]},
            "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "zone"}]},
        }})));
    }

    #[test]
    fn only_taints_that_evict_must_be_tolerated() {
        let evicting = json!([{"key": "broken", "value": "7", "effect": "NoExecute"}]);
        for (toleration, fits) in [
            (json!({"operator": "Exists"}), true),
            (
                json!({"key": "broken", "operator": "Exists", "effect": "NoExecute"}),
                true,
            ),
            (json!({"key": "broken", "value": "7"}), true),
            (
                json!({"key": "broken", "operator": "Equal", "value": "7", "tolerationSeconds": 5}),
                true,
            ),
            (
                json!({"key": "broken", "operator": "Equal", "value": "8"}),
                false,
            ),
            (
                json!({"key": "broken", "operator": "Exists", "effect": "NoSchedule"}),
                false,
            ),
            (json!({"key": "other", "operator": "Exists"}), false),
            (
                json!({"key": "broken", "operator": "Gt", "value": "6"}),
                true,
            ),
            (
                json!({"key": "broken", "operator": "Lt", "value": "7"}),
                false,
            ),
        ] {
            let spec = spec(&json!({"tolerations": [toleration]}));
            assert_eq!(
                attributes(&evicting).fits(&spec).is_ok(),
                fits,
                "{toleration}"
            );
        }
        let spec = spec(&json!({}));
        assert_eq!(attributes(&evicting).fits(&spec), Err(Mismatch::Taint));
        let mild = json!([{"key": "broken", "effect": "NoSchedule"}, {"key": "x", "effect": "PreferNoSchedule"}]);
        assert_eq!(attributes(&mild).fits(&spec), Ok(()));
    }
}
