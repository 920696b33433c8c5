//! PURE: the NetworkPolicies of the cluster, reduced to which pods they select for ingress. The node enforces none of them, so such a
//! pod is not relayed to.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::{
    api::networking::v1::NetworkPolicy, apimachinery::pkg::apis::meta::v1::LabelSelector,
};
use kube::core::{Selector, SelectorExt as _};

/// The most labels and values of a selector that is remembered: whoever may create policies could fill the memory with large ones.
const LABELS: usize = 256;

/// The policies that restrict who may connect to pods, by namespace and name.
#[derive(Debug, Clone, Default)]
pub(super) struct Policies(HashMap<String, BTreeMap<String, Selector>>);

impl Policies {
    /// Stores a policy, in place of an older version of it.
    pub(super) fn set(&mut self, policy: &NetworkPolicy) {
        self.remove(policy);
        if let Some((namespace, name)) = name(policy)
            && let Some(selector) = restricts(policy)
        {
            let of_namespace = self.0.entry(namespace.to_owned()).or_default();
            of_namespace.insert(name.to_owned(), selector);
        }
    }

    /// Removes a policy.
    pub(super) fn remove(&mut self, policy: &NetworkPolicy) {
        let Some((namespace, name)) = name(policy) else {
            return;
        };
        if let Some(of_namespace) = self.0.get_mut(namespace) {
            of_namespace.remove(name);
            if of_namespace.is_empty() {
                self.0.remove(namespace);
            }
        }
    }

    /// The first policy, by name, that restricts who may connect to a pod with these labels.
    pub(super) fn isolating(
        &self,
        namespace: &str,
        labels: &BTreeMap<String, String>,
    ) -> Option<&str> {
        let mut policies = self.0.get(namespace)?.iter();
        let found = policies.find(|(_, selector)| selector.matches(labels));
        found.map(|(name, _)| name.as_str())
    }
}

fn name(policy: &NetworkPolicy) -> Option<(&str, &str)> {
    let meta = &policy.metadata;
    Some((meta.namespace.as_deref()?, meta.name.as_deref()?))
}

/// Which pods the policy restricts; `None` if it is about their own connections only.
fn restricts(policy: &NetworkPolicy) -> Option<Selector> {
    let spec = policy.spec.as_ref();
    let types = spec.and_then(|spec| spec.policy_types.as_ref());
    // A policy that names no type is about ingress, whatever else it is about.
    let is_ingress =
        types.is_none_or(|types| types.is_empty() || types.iter().any(|it| it == "Ingress"));
    let selector = spec.and_then(|spec| spec.pod_selector.clone());
    // No selector selects all pods; so does one that is too large or that this version does not understand, to be on the safe side.
    let selector = selector.filter(|selector| size(selector) <= LABELS);
    let selector = selector.and_then(|selector| Selector::try_from(selector).ok());
    is_ingress.then(|| selector.unwrap_or_default())
}

/// How many labels and values the selector has.
fn size(selector: &LabelSelector) -> usize {
    let labels = selector.match_labels.iter().flatten().count();
    let expressions = selector.match_expressions.iter().flatten();
    let values = expressions.map(|one| 1 + one.values.iter().flatten().count());
    labels + values.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn policy(name: &str, spec: &Value) -> NetworkPolicy {
        let object = json!({"metadata": {"namespace": "team", "name": name}, "spec": spec});
        serde_json::from_value(object).unwrap()
    }

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn policies_for_ingress_isolate_what_they_select() {
        let mut policies = Policies::default();
        let web = labels(&[("app", "web"), ("tier", "front")]);
        let egress = json!({"podSelector": {}, "policyTypes": ["Egress"]});
        policies.set(&policy("out", &egress));
        assert_eq!(policies.isolating("team", &web), None);
        let of_others = json!({"podSelector": {"matchExpressions": [
            {"key": "tier", "operator": "NotIn", "values": ["front"]}]}, "policyTypes": ["Ingress"]});
        policies.set(&policy("others", &of_others));
        assert_eq!(policies.isolating("team", &web), None);
        assert_eq!(policies.isolating("team", &labels(&[])), Some("others"));
        policies.set(&policy(
            "web",
            &json!({"podSelector": {"matchLabels": {"app": "web"}}}),
        ));
        assert_eq!(policies.isolating("team", &web), Some("web"));
        assert_eq!(policies.isolating("other", &web), None, "another namespace");
        policies.set(&policy(
            "web",
            &json!({"podSelector": {"matchLabels": {"app": "db"}}}),
        ));
        assert_eq!(policies.isolating("team", &web), None, "it was changed");
        let all = policy(
            "all",
            &json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
        );
        policies.set(&all);
        assert_eq!(policies.isolating("team", &web), Some("all"));
        policies.remove(&all);
        assert_eq!(policies.isolating("team", &web), None);
    }

    #[test]
    fn a_selector_that_is_too_large_selects_every_pod() {
        let selects = |values: usize| {
            let values: Vec<_> = (0..values).map(|number| format!("v{number}")).collect();
            let expression = json!({"key": "a", "operator": "In", "values": values});
            let mut policies = Policies::default();
            policies.set(&policy(
                "large",
                &json!({"podSelector": {"matchExpressions": [expression]}}),
            ));
            policies
                .isolating("team", &labels(&[("a", "v0")]))
                .is_some()
                && policies.isolating("team", &labels(&[])).is_some()
        };
        assert!(!selects(LABELS - 1) && selects(LABELS));
    }

    #[test]
    fn a_selector_that_is_not_understood_selects_every_pod() {
        let mut policies = Policies::default();
        let odd = json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Near"}]}});
        policies.set(&policy("odd", &odd));
        assert_eq!(policies.isolating("team", &labels(&[])), Some("odd"));
    }
}
