//! PURE: which Services pods may reach, as patterns that the cluster and the site list; address ranges; and the bounds of an
//! `EgressNetwork`.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
};

use crate::{
    names,
    patterns::{PART, glob, is_part, parse_list},
    pb,
    text::quote,
};

/// What pods may reach if nobody decides otherwise: the API server and the cluster's DNS.
pub const DEFAULT_ALLOW: [&str; 2] = ["default/kubernetes", "kube-system/kube-dns"];
/// How long a connection waits for an answer to its attempt, in seconds.
pub const PATIENCE: u64 = 10;
/// The most ranges of an `EgressNetwork`.
pub const MAX_RANGES: usize = 16;
/// The most ports of an `EgressNetwork`, of each protocol.
pub const MAX_PORTS: usize = 4096;
/// The most patterns of a list.
pub const MAX_PATTERNS: usize = 1024;

/// The longest `NAMESPACE/NAME` of a Service.
const SERVICE: usize = 2 * PART + 1;
/// How much of a wrong text an error shows.
const SHOWN: usize = 80;

/// `NAMESPACE/SERVICE`; in both parts `*` stands for any characters, or none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePattern {
    namespace: String,
    name: String,
}

/// A text that is not a pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is not `NAMESPACE/SERVICE`: both parts are names of lower-case letters, digits and `-`, in which `*` stands for any characters"
)]
pub struct InvalidPattern(String);

impl FromStr for ServicePattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        match text.split_once('/') {
            Some((namespace, name)) if is_part(namespace) && is_part(name) => Ok(Self {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            }),
            Some(_) | None => Err(InvalidPattern(quote(text, SHOWN))),
        }
    }
}

impl fmt::Display for ServicePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl ServicePattern {
    /// Does the pattern match this Service?
    #[must_use]
    pub fn matches(&self, namespace: &str, name: &str) -> bool {
        glob(&self.namespace, namespace) && glob(&self.name, name)
    }

    fn is_exact(&self) -> bool {
        !self.namespace.contains('*') && !self.name.contains('*')
    }
}

/// A list of patterns.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowList(Vec<ServicePattern>);

impl AllowList {
    /// Reads a list.
    ///
    /// # Errors
    /// Returns one sentence for each text that is not a pattern.
    pub fn parse<T: AsRef<str>>(texts: &[T]) -> Result<Self, Vec<String>> {
        parse_list(texts, MAX_PATTERNS).map(Self)
    }

    /// Does the list contain this Service?
    #[must_use]
    pub fn permits(&self, namespace: &str, name: &str) -> bool {
        self.0.iter().any(|one| one.matches(namespace, name))
    }

    /// Does the list name this Service without `*`?
    #[must_use]
    pub fn names(&self, namespace: &str, name: &str) -> bool {
        let mut exact = self.0.iter().filter(|one| one.is_exact());
        exact.any(|one| one.matches(namespace, name))
    }
}

/// A range of addresses, such as `10.96.0.0/12`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    address: IpAddr,
    length: u8,
}

/// A text that is not a range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a range of addresses such as `10.96.0.0/12`")]
pub struct InvalidRange(String);

impl FromStr for Range {
    type Err = InvalidRange;

    fn from_str(text: &str) -> Result<Self, InvalidRange> {
        let wrong = || InvalidRange(quote(text, SHOWN));
        let (address, length) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let digits = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
        let length = length.parse().ok().filter(|_| digits).ok_or_else(wrong)?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        // The whole Internet is not a range of a cluster.
        if (1..=most).contains(&length) {
            Ok(Self { address, length })
        } else {
            Err(wrong())
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl Range {
    /// The address and the number of bits, if it is a range of IPv4 addresses. Bits beyond that number may be set.
    #[must_use]
    pub fn ipv4(&self) -> Option<(Ipv4Addr, u8)> {
        match self.address {
            IpAddr::V4(address) => Some((address, self.length)),
            IpAddr::V6(_) => None,
        }
    }

    /// Is the address within the range?
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                let differs = u32::from(own) ^ u32::from(other);
                differs.leading_zeros() >= u32::from(self.length)
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                let differs = u128::from(own) ^ u128::from(other);
                differs.leading_zeros() >= u32::from(self.length)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

/// Checks a network that a peer sent.
///
/// # Errors
/// Returns what is wrong with it, in one sentence.
pub fn check_network(network: &pb::EgressNetwork) -> Result<(), String> {
    if network.ranges.len() > MAX_RANGES {
        let count = network.ranges.len();
        return Err(format!("ranges: {count} ranges; the limit is {MAX_RANGES}"));
    }
    let ranges = network.ranges.iter().map(|text| text.parse::<Range>());
    let ranges: Vec<Range> = ranges
        .collect::<Result<_, _>>()
        .map_err(|error| format!("ranges: {error}"))?;
    for (field, ports) in [
        ("tcp_ports", &network.tcp_ports),
        ("udp_ports", &network.udp_ports),
    ] {
        if ports.len() > MAX_PORTS {
            return Err(format!(
                "{field}: {} ports; the limit is {MAX_PORTS}",
                ports.len()
            ));
        }
        if let Some(port) = ports.iter().find(|port| !is_port(**port)) {
            return Err(format!("{field}: {port} is not from 1 to 65535"));
        }
    }
    for (field, text) in [("dns", &network.dns), ("api_address", &network.api_address)] {
        let address = text.parse::<IpAddr>();
        if !text.is_empty()
            && !address.is_ok_and(|address| ranges.iter().any(|range| range.contains(address)))
        {
            let text = quote(text, SHOWN);
            return Err(format!(
                "{field}: {text} is not an address within the ranges"
            ));
        }
    }
    if !network.api_address.is_empty() && !is_port(network.api_port) {
        return Err(format!(
            "api_port: {} is not from 1 to 65535",
            network.api_port
        ));
    }
    if network.dns_service.len() > SERVICE {
        let length = network.dns_service.len();
        return Err(format!(
            "dns_service: {length} bytes; the limit is {SERVICE}"
        ));
    }
    if !network.domain.is_empty()
        && let Err(why) = names::dns_subdomain(&network.domain)
    {
        return Err(format!("domain: {}: {why}", quote(&network.domain, SHOWN)));
    }
    Ok(())
}

/// Is this the number of a port?
#[must_use]
pub fn is_port(number: u32) -> bool {
    (1..=u32::from(u16::MAX)).contains(&number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_characters_of_its_part() {
        let matches = |pattern: &str, namespace: &str, name: &str| {
            pattern
                .parse::<ServicePattern>()
                .unwrap()
                .matches(namespace, name)
        };
        assert!(matches("default/kubernetes", "default", "kubernetes"));
        assert!(!matches("default/kubernetes", "default", "kubernetes2"));
        assert!(!matches("default/kubernetes", "default2", "kubernetes"));
        assert!(matches("*/*", "a", "b"));
        assert!(
            matches("team-*/redis", "team-a", "redis") && matches("team-*/redis", "team-", "redis")
        );
        assert!(!matches("team-*/redis", "team", "redis"));
        assert!(matches("a/*-db-*", "a", "x-db-db-y") && !matches("a/*-db-*", "a", "x-db"));
        assert!(matches("a/b*b", "a", "bb") && !matches("a/b*b", "a", "b"));
        // It takes no exponential time.
        let stars = format!("a/{}", "*a".repeat(31));
        assert!(!matches(&stars, "a", &"a".repeat(30)));
    }

    #[test]
    fn what_is_no_pattern_is_named() {
        for text in [
            "", "a", "/", "a/", "/a", "a/b/c", "A/b", "a b/c", "a/b\n", "a/b.c",
        ] {
            let error = text.parse::<ServicePattern>().unwrap_err().to_string();
            assert!(
                error.contains("is not `NAMESPACE/SERVICE`"),
                "{text}: {error}"
            );
        }
        let wrong = AllowList::parse(&["a/b", "c", "d"]).unwrap_err();
        assert_eq!(wrong.len(), 2, "{wrong:?}");
        assert!(AllowList::parse(&vec!["a/b"; MAX_PATTERNS + 1]).is_err());
    }

    #[test]
    fn a_list_names_a_service_only_without_a_star() {
        let list = AllowList::parse(&["a/*", "b/c"]).unwrap();
        assert!(list.permits("a", "x") && list.permits("b", "c") && !list.permits("b", "d"));
        assert!(list.names("b", "c") && !list.names("a", "x"));
    }

    #[test]
    fn a_range_contains_the_addresses_with_its_prefix() {
        let range: Range = "10.96.0.0/12".parse().unwrap();
        let contains = |text: &str| range.contains(text.parse().unwrap());
        assert!(contains("10.96.0.1") && contains("10.111.255.255"));
        assert!(!contains("10.112.0.0") && !contains("::1"));
        let one: Range = "fd00::1/128".parse().unwrap();
        assert!(
            one.contains("fd00::1".parse().unwrap()) && !one.contains("fd00::2".parse().unwrap())
        );
        for text in [
            "",
            "10.0.0.0",
            "10.0.0.0/",
            "10.0.0.0/33",
            "0.0.0.0/0",
            "10.0.0.0/+8",
            "x/8",
            "::/129",
        ] {
            text.parse::<Range>().unwrap_err();
        }
    }

    #[test]
    fn a_network_beyond_its_bounds_is_refused() {
        type Change = fn(&mut pb::EgressNetwork);
        let good = pb::EgressNetwork {
            ranges: vec!["10.96.0.0/12".to_owned()],
            tcp_ports: vec![443],
            udp_ports: vec![53],
            dns: "10.96.0.10".to_owned(),
            domain: "cluster.local".to_owned(),
            api_address: "10.96.0.1".to_owned(),
            api_port: 443,
            dns_service: "kube-system/kube-dns".to_owned(),
        };
        check_network(&good).unwrap();
        check_network(&pb::EgressNetwork::default()).unwrap();
        let changes: [(&str, Change); 9] = [
            ("dns_service: ", |network| {
                network.dns_service = "a".repeat(128);
            }),
            ("ranges: 17", |network| {
                network.ranges = vec!["10.0.0.0/8".to_owned(); 17];
            }),
            ("ranges: ", |network| {
                network.ranges.push("10.0.0.1".to_owned());
            }),
            ("tcp_ports: 4097", |network| {
                network.tcp_ports = vec![1; 4097];
            }),
            ("udp_ports: 65536", |network| network.udp_ports.push(65_536)),
            ("dns: ", |network| network.dns = "8.8.8.8".to_owned()),
            ("api_address: ", |network| {
                network.api_address = "x\n".to_owned();
            }),
            ("api_port: 0", |network| network.api_port = 0),
            ("domain: ", |network| network.domain = "a b".to_owned()),
        ];
        for (expected, change) in changes {
            let mut network = good.clone();
            change(&mut network);
            let error = check_network(&network).unwrap_err();
            assert!(error.starts_with(expected), "{expected}: {error}");
        }
    }
}
