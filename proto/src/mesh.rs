//! PURE: from which ranges pods get addresses of their own, between which namespaces they reach each other, and the bounds of
//! what shims ask about the mesh.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
};

use crate::{
    egress,
    patterns::{glob, is_part, parse_list},
    text::quote,
};

/// The most addresses that a shim asks about at a time.
pub const MAX_ASKED: usize = 1024;
/// The most ranges of the pods of one agent.
pub const MAX_RANGES: usize = 16;
/// The most pairs of a list.
pub const MAX_PAIRS: usize = 1024;

/// The largest and the smallest range: the prefix of a whole class A network, and one that leaves two addresses for pods.
const PREFIXES: std::ops::RangeInclusive<u8> = 8..=30;
/// How much of a wrong text an error shows.
const SHOWN: usize = 80;

/// Ranges of which no pod can have an address: this host, the loopback interface, links, the block of the pods' own networks,
/// and everything that is not the address of one host.
const RESERVED: [(Ipv4Addr, u8); 5] = [
    (Ipv4Addr::UNSPECIFIED, 8),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(192, 0, 0, 0), 29),
    (Ipv4Addr::new(224, 0, 0, 0), 3),
];

/// The range of a node from which its pods get addresses, such as `10.200.0.0/16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodRange {
    first: u32,
    prefix: u8,
}

/// A text that is not such a range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text} is not a range of IPv4 addresses for pods such as `10.200.0.0/16`: {why}")]
pub struct InvalidPodRange {
    text: String,
    why: &'static str,
}

impl FromStr for PodRange {
    type Err = InvalidPodRange;

    fn from_str(text: &str) -> Result<Self, InvalidPodRange> {
        let wrong = |why| InvalidPodRange {
            text: quote(text, SHOWN),
            why,
        };
        let range = text.parse::<egress::Range>();
        let range = range.map_err(|_| wrong("it is no range of addresses"))?;
        let (address, prefix) = range.ipv4().ok_or_else(|| wrong("pods have IPv4 only"))?;
        if !PREFIXES.contains(&prefix) {
            return Err(wrong("its prefix has to be from /8 to /30"));
        }
        let range = Self::new(address, prefix);
        let reserved = RESERVED.map(|(first, prefix)| Self::new(first, prefix));
        if reserved.into_iter().any(|one| one.overlaps(range)) {
            return Err(wrong("it has addresses that no host can have"));
        }
        Ok(range)
    }
}

impl fmt::Display for PodRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from_bits(self.first), self.prefix)
    }
}

impl PodRange {
    /// The range of this prefix in which the address is.
    fn new(address: Ipv4Addr, prefix: u8) -> Self {
        let mask = mask(prefix);
        Self {
            first: address.to_bits() & mask,
            prefix,
        }
    }

    /// The first address of the range, and the number of bits that all of its addresses have in common.
    #[must_use]
    pub fn parts(self) -> (Ipv4Addr, u8) {
        (Ipv4Addr::from_bits(self.first), self.prefix)
    }

    /// Is the address within the range?
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.prefix) == self.first
    }

    /// The first and the last address that a pod can have: the very first one names the network, and the very last one
    /// everybody in it.
    #[must_use]
    pub fn hosts(self) -> (Ipv4Addr, Ipv4Addr) {
        let last = self.first | !mask(self.prefix);
        (
            Ipv4Addr::from_bits(self.first.saturating_add(1)),
            Ipv4Addr::from_bits(last.saturating_sub(1)),
        )
    }

    /// Is an address in both this range and that one?
    #[must_use]
    pub fn meets(self, other: &egress::Range) -> bool {
        let other = other.ipv4();
        other.is_some_and(|(address, prefix)| self.overlaps(Self::new(address, prefix)))
    }

    fn overlaps(self, other: Self) -> bool {
        let common = mask(self.prefix.min(other.prefix));
        self.first & common == other.first & common
    }
}

fn mask(prefix: u8) -> u32 {
    // A shift by all bits is none.
    u32::MAX
        .checked_shl(32 - u32::from(prefix.min(32)))
        .unwrap_or(0)
}

/// `NAMESPACE:NAMESPACE`, between which pods reach each other; in both parts `*` stands for any characters, or none.
#[derive(Debug, Clone, PartialEq, Eq)]
struct NamespacePair {
    one: String,
    other: String,
}

/// A text that is not a pair.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is not `NAMESPACE:NAMESPACE`: both parts are names of lower-case letters, digits and `-`, in which `*` stands for any characters"
)]
struct InvalidPair(String);

impl FromStr for NamespacePair {
    type Err = InvalidPair;

    fn from_str(text: &str) -> Result<Self, InvalidPair> {
        match text.split_once(':') {
            Some((one, other)) if is_part(one) && is_part(other) => Ok(Self {
                one: one.to_owned(),
                other: other.to_owned(),
            }),
            Some(_) | None => Err(InvalidPair(quote(text, SHOWN))),
        }
    }
}

impl NamespacePair {
    fn matches(&self, one: &str, other: &str) -> bool {
        (glob(&self.one, one) && glob(&self.other, other))
            || (glob(&self.one, other) && glob(&self.other, one))
    }
}

/// Between which namespaces pods reach each other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamespacePairs(Vec<NamespacePair>);

impl NamespacePairs {
    /// Reads a list.
    ///
    /// # Errors
    /// Returns one sentence for each text that is not a pair.
    pub fn parse<T: AsRef<str>>(texts: &[T]) -> Result<Self, Vec<String>> {
        parse_list(texts, MAX_PAIRS).map(Self)
    }

    /// Do pods of these namespaces reach each other? Those of one namespace always do.
    #[must_use]
    pub fn permits(&self, one: &str, other: &str) -> bool {
        one == other || self.0.iter().any(|pair| pair.matches(one, other))
    }
}

/// The endpoint at which a shim takes tunnels, if it can be one: an address of one host that is not the loopback interface of
/// whoever dials it, and a port.
#[must_use]
pub fn endpoint(text: &str) -> Option<SocketAddr> {
    let endpoint: SocketAddr = text.parse().ok()?;
    // `::ffff:127.0.0.1` is the loopback interface, too.
    let is_host = match endpoint.ip().to_canonical() {
        IpAddr::V4(address) => {
            !address.is_loopback()
                && !address.is_unspecified()
                && !address.is_multicast()
                && !address.is_broadcast()
                && !address.is_link_local()
        }
        IpAddr::V6(address) => {
            !address.is_loopback()
                && !address.is_unspecified()
                && !address.is_multicast()
                && !address.is_unicast_link_local()
        }
    };
    (is_host && endpoint.port() > 0).then_some(endpoint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_pods_is_ipv4_of_hosts_and_not_too_small() {
        let range: PodRange = "10.200.3.7/16".parse().unwrap();
        assert_eq!(range.to_string(), "10.200.0.0/16");
        assert_eq!(range.parts(), (Ipv4Addr::new(10, 200, 0, 0), 16));
        assert_eq!(
            range.hosts(),
            (
                Ipv4Addr::new(10, 200, 0, 1),
                Ipv4Addr::new(10, 200, 255, 254)
            )
        );
        assert!(range.contains(Ipv4Addr::new(10, 200, 255, 255)));
        assert!(!range.contains(Ipv4Addr::new(10, 201, 0, 0)));
        let least: PodRange = "10.0.0.4/30".parse().unwrap();
        let (low, high) = least.hosts();
        assert_eq!(high.to_bits() - low.to_bits(), 1);
        for (text, why) in [
            ("", "no range"),
            ("10.200.0.0", "no range"),
            ("fd00::/64", "IPv4 only"),
            ("10.0.0.0/7", "prefix"),
            ("10.0.0.0/31", "prefix"),
            ("127.0.0.0/16", "no host"),
            ("169.254.0.0/17", "no host"),
            ("192.0.0.0/24", "no host"),
            ("224.0.0.0/8", "no host"),
            ("255.0.0.0/8", "no host"),
        ] {
            let error = text.parse::<PodRange>().unwrap_err().to_string();
            assert!(
                error.contains(why) && error.contains("10.200.0.0/16"),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn a_range_meets_another_one_if_an_address_is_in_both() {
        let range: PodRange = "10.96.0.0/16".parse().unwrap();
        for (text, expected) in [
            ("10.96.0.0/12", true),
            ("10.96.7.0/24", true),
            ("10.97.0.0/16", false),
            ("0.0.0.0/1", true),
            ("fd00::/8", false),
        ] {
            let other: egress::Range = text.parse().unwrap();
            assert_eq!(range.meets(&other), expected, "{text}");
        }
    }

    #[test]
    fn pods_of_one_namespace_reach_each_other_and_others_by_pairs_in_either_order() {
        let none = NamespacePairs::default();
        assert!(none.permits("a", "a") && !none.permits("a", "b"));
        let list = NamespacePairs::parse(&["team-*:shared", "x:y"]).unwrap();
        assert!(list.permits("team-a", "shared") && list.permits("shared", "team-a"));
        assert!(!list.permits("team-a", "team-b") && !list.permits("x", "shared"));
        assert!(list.permits("y", "x") && list.permits("z", "z"));
        assert!(NamespacePairs::parse(&["*:*"]).unwrap().permits("p", "q"));
    }

    #[test]
    fn what_is_no_pair_is_named() {
        for text in ["", "a", ":", "a:", ":b", "a:b:c", "A:b", "a b:c", "a:b\n"] {
            let wrong = NamespacePairs::parse(&[text]).unwrap_err().join("; ");
            assert!(
                wrong.contains("is not `NAMESPACE:NAMESPACE`"),
                "{text}: {wrong}"
            );
        }
        let wrong = NamespacePairs::parse(&["a:b", "c", "d"]).unwrap_err();
        assert_eq!(wrong.len(), 2, "{wrong:?}");
        assert!(NamespacePairs::parse(&vec!["a:b"; MAX_PAIRS + 1]).is_err());
    }

    #[test]
    fn an_endpoint_is_a_port_of_another_host() {
        assert_eq!(
            endpoint("10.0.0.7:4001"),
            Some("10.0.0.7:4001".parse().unwrap())
        );
        assert!(endpoint("[fd00::7]:4001").is_some());
        for text in [
            "",
            "10.0.0.7",
            "10.0.0.7:0",
            "127.0.0.1:4001",
            "[::1]:4001",
            "[::ffff:127.0.0.1]:4001",
            "[fe80::7]:4001",
            "0.0.0.0:4001",
            "224.0.0.1:4001",
            "169.254.169.254:80",
            "255.255.255.255:1",
            "node:4001",
            "10.0.0.7:65536",
        ] {
            assert_eq!(endpoint(text), None, "{text}");
        }
    }
}
