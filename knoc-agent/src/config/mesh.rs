//! `policy.pod_traffic` of the site file: between which namespaces pods reach each other at their own addresses.

use knoc_proto::mesh::NamespacePairs;

use super::Policy;

impl Policy {
    /// Between which namespaces pods reach each other.
    #[must_use]
    pub fn pod_traffic(&self) -> NamespacePairs {
        // The pairs were checked when the file was read.
        NamespacePairs::parse(&self.pod_traffic).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_pair_only_pods_of_one_namespace_reach_each_other() {
        let none = Policy::default().pod_traffic();
        assert!(none.permits("a", "a") && !none.permits("a", "b"));
        let listed = Policy {
            pod_traffic: vec!["a:b".to_owned()],
            ..Policy::default()
        };
        assert!(listed.pod_traffic().permits("b", "a"));
    }
}
