//! PURE: the names that the resolvers of the compute node answer instead of the cluster's DNS, as the site lists them.

use knoc_proto::names;

/// The suffixes, each as in a message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Suffixes(Vec<Vec<u8>>);

impl Suffixes {
    /// The suffixes of the site file, which the agent has checked. What is none leads nowhere.
    pub(crate) fn new(texts: &[String]) -> Self {
        Self(texts.iter().filter_map(|text| wire(text)).collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the name is below a suffix, or is one. Names of the cluster never are.
    pub(super) fn contain(&self, name: &[u8], cluster: &str) -> bool {
        !is_below(name, wire(cluster).as_deref())
            && self.0.iter().any(|suffix| is_below(name, Some(suffix)))
    }
}

/// A name as it is in a message, in lower case.
fn wire(text: &str) -> Option<Vec<u8>> {
    names::dns_subdomain(text).ok()?;
    let mut name = Vec::new();
    for label in text.split('.') {
        // The highest bits of a length mean something else.
        name.push(
            u8::try_from(label.len())
                .ok()
                .filter(|length| *length < 64)?,
        );
        name.extend(label.as_bytes());
    }
    name.push(0);
    Some(name)
}

fn is_below(name: &[u8], suffix: Option<&[u8]>) -> bool {
    let Some(suffix) = suffix else { return false };
    let mut rest = name;
    while rest.len() > suffix.len() {
        let Some((length, labels)) = rest.split_first() else {
            return false;
        };
        let Some(next) = labels.get(usize::from(*length)..) else {
            return false;
        };
        rest = next;
    }
    rest == suffix
}

#[cfg(test)]
mod tests {
    use super::{super::message::samples::name, *};

    fn contain(texts: &[&str], asked: &str) -> bool {
        let texts: Vec<_> = texts.iter().map(|&text| text.to_owned()).collect();
        Suffixes::new(&texts).contain(&name(asked), "cluster.local")
    }

    #[test]
    fn a_suffix_has_itself_and_what_is_below_it() {
        let site = ["hpc.example.org", "lan"];
        for inside in ["hpc.example.org", "login.hpc.example.org", "a.b.lan", "lan"] {
            assert!(contain(&site, inside), "{inside}");
        }
        for outside in [
            "example.org",
            "xhpc.example.org",
            "lan.example.org",
            "plan",
            "",
        ] {
            assert!(!contain(&site, outside), "{outside}");
        }
        assert!(!contain(&[], "lan") && Suffixes::new(&[]).is_empty());
    }

    #[test]
    fn names_of_the_cluster_stay_in_the_cluster() {
        let site = ["local", "cluster.local", "svc.cluster.local"];
        assert!(!contain(&site, "web.ns.svc.cluster.local"));
        assert!(contain(&site, "printer.local"));
        // The domain of the cluster may not be known.
        let all = Suffixes::new(&["local".to_owned()]);
        assert!(all.contain(&name("web.ns.svc.cluster.local"), ""));
    }

    #[test]
    fn what_is_no_name_is_no_suffix() {
        let long = "a".repeat(64);
        assert!(Suffixes::new(&["A b".to_owned(), String::new(), long]).is_empty());
    }
}
