//! `job.network` of the site file, the network of pods that ask for none, and `job.node_dns_suffixes`.

use knoc_proto::{names, pb::NetworkMode, text::quote};
use serde::Deserialize;

/// The network of pods that ask for none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkSetting {
    /// One of their own if the compute node can do it, else the node's.
    #[default]
    Auto,
    /// One of their own. A pod fails on a node that cannot do it.
    Private,
    /// The compute node's.
    Host,
}

impl From<NetworkSetting> for NetworkMode {
    fn from(setting: NetworkSetting) -> Self {
        match setting {
            NetworkSetting::Auto => Self::Auto,
            NetworkSetting::Private => Self::Private,
            NetworkSetting::Host => Self::Host,
        }
    }
}

/// The most entries of `job.node_dns_suffixes`.
const SUFFIXES: usize = 64;
/// How much of a wrong suffix an error shows.
const SHOWN: usize = 80;

/// What is wrong with `job.node_dns_suffixes`.
pub(super) fn suffix_mistakes(suffixes: &[String]) -> Vec<String> {
    let mut mistakes = Vec::new();
    if suffixes.len() > SUFFIXES {
        mistakes.push(format!(
            "has {} entries; the limit is {SUFFIXES}",
            suffixes.len()
        ));
    }
    let is_wrong = |text: &&String| {
        names::dns_subdomain(text).is_err() || text.split('.').any(|label| label.len() > 63)
    };
    for wrong in suffixes.iter().take(SUFFIXES).filter(is_wrong) {
        let wrong = quote(wrong, SHOWN);
        mistakes.push(format!(
            "{wrong} is not the end of a DNS name such as `hpc.example.org`, in lower case and without a dot at either end"
        ));
    }
    mistakes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mistakes(suffixes: &[&str]) -> Vec<String> {
        let suffixes: Vec<_> = suffixes.iter().map(|&text| text.to_owned()).collect();
        suffix_mistakes(&suffixes)
    }

    #[test]
    fn a_suffix_is_the_end_of_a_name() {
        assert!(mistakes(&["hpc.example.org", "lan", "x-1.y"]).is_empty());
        let long = "a".repeat(64);
        for wrong in ["", ".lan", "lan.", "A.b", "a b", "*.lan", &long] {
            let found = mistakes(&["lan", wrong]);
            assert_eq!(found.len(), 1, "{wrong}: {found:?}");
            assert!(found[0].contains("such as `hpc.example.org`"), "{found:?}");
        }
        let many = mistakes(&vec!["lan"; SUFFIXES + 1]);
        assert_eq!(many, ["has 65 entries; the limit is 64"]);
    }
}
