//! `policy.egress` of the site file: which Services of the cluster pods may reach.

use knoc_proto::egress::AllowList;

use super::Policy;

impl Policy {
    /// Does the site let pods reach this Service, `NAMESPACE/NAME`?
    #[must_use]
    pub fn permits_egress(&self, service: &str) -> bool {
        // The patterns were checked when the file was read.
        let list = AllowList::parse(&self.egress).unwrap_or_default();
        let named = service.split_once('/');
        named.is_some_and(|(namespace, name)| list.permits(namespace, name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_api_server_and_dns_are_the_default() {
        let policy = Policy::default();
        assert!(policy.permits_egress("default/kubernetes"));
        assert!(policy.permits_egress("kube-system/kube-dns"));
        for other in ["default/redis", "kubernetes", "", "default/kubernetes/x"] {
            assert!(!policy.permits_egress(other), "{other}");
        }
    }

    #[test]
    fn an_empty_list_permits_nothing_and_a_star_everything() {
        let listed = |patterns: &[&str]| Policy {
            egress: patterns.iter().map(|&text| text.to_owned()).collect(),
            ..Policy::default()
        };
        assert!(!listed(&[]).permits_egress("default/kubernetes"));
        assert!(listed(&["*/*"]).permits_egress("any/service"));
    }
}
