//! PURE: which addresses an image may make the agent connect to, and with which scheme.
//!
//! A pod names a registry; the registry names the realm that gives out tokens, and the places that its blobs are
//! redirected to. Any of them could be a service of the login node that trusts whoever reaches it. So every connection
//! obeys one rule: TLS, and no address that means this host, this link or a cloud's metadata service. A `[[registry]]`
//! entry exempts the host that it names. The rule is applied to the address that is connected to, not to an earlier
//! look-up.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::config::Registry;

/// Longer URLs are refused; blob stores sign theirs with one or two KiB.
const MAX_URL: usize = 16 * 1024;
/// Where Docker Hub's registry is served.
const HUB_API: &str = "registry-1.docker.io";

/// An `http` or `https` URL.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Url {
    /// `https`.
    pub(super) tls: bool,
    /// Lower case, an IPv6 address without its brackets.
    pub(super) host: String,
    /// Of the URL, else the scheme's default.
    pub(super) port: u16,
    /// Path and query, at least `/`.
    pub(super) path: String,
}

/// Without the query, which may hold a signature.
impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.split('?').next().unwrap_or_default();
        write!(f, "{}://{}{path}", self.scheme(), self.authority())
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Url {
    /// Reads an absolute URL. One with a user name is refused.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if text.len() > MAX_URL {
            return Err(format!("the URL is longer than {MAX_URL} bytes"));
        }
        let text = text.split('#').next().unwrap_or_default();
        let uri: http::Uri = text.parse().map_err(|error| format!("{error}"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            Some(other) => return Err(format!("the scheme {other:?} is not https")),
            None => return Err("it has no scheme".to_owned()),
        };
        let authority = uri.authority().ok_or("it names no host")?;
        if authority.as_str().contains('@') {
            return Err("it holds a user name".to_owned());
        }
        let host = authority.host().trim_matches(['[', ']']);
        if host.is_empty() {
            return Err("it names no host".to_owned());
        }
        let default = if tls { 443 } else { 80 };
        let rest = authority.as_str().rsplit(']').next().unwrap_or_default();
        let port = match rest.rsplit_once(':') {
            Some((_, port)) => port
                .parse()
                .map_err(|_| format!("the port {port:?} is not one"))?,
            None => default,
        };
        if port == 0 {
            return Err("the port is 0".to_owned());
        }
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let slash = if path.starts_with('/') { "" } else { "/" };
        Ok(Self {
            tls,
            host: host.to_ascii_lowercase(),
            port,
            path: format!("{slash}{path}"),
        })
    }

    /// Where a `Location` of an answer from here leads.
    pub(super) fn join(&self, location: &str) -> Result<Self, String> {
        if location.starts_with("//") {
            return Self::parse(&format!("{}:{location}", self.scheme()));
        }
        // What stands before a colon in the first part of a relative path would be a scheme.
        let first = location.split(['/', '?', '#']).next().unwrap_or_default();
        if first.contains(':') {
            return Self::parse(location);
        }
        let here = self.path.split('?').next().unwrap_or_default();
        let folder = here.rsplit_once('/').map_or("", |(folder, _)| folder);
        let path = match location.chars().next() {
            Some('/') => location.to_owned(),
            Some('?') => format!("{here}{location}"),
            Some(_) => format!("{folder}/{location}"),
            None => return Err("it is empty".to_owned()),
        };
        Self::parse(&format!("{}://{}{path}", self.scheme(), self.authority()))
    }

    /// `https`, or `http`.
    #[must_use]
    pub(super) fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }

    /// `HOST[:PORT]`, as in the header `Host`.
    #[must_use]
    pub(super) fn authority(&self) -> String {
        let default = self.port == if self.tls { 443 } else { 80 };
        match (self.host.contains(':'), default) {
            (false, true) => self.host.clone(),
            (false, false) => format!("{}:{}", self.host, self.port),
            (true, true) => format!("[{}]", self.host),
            (true, false) => format!("[{}]:{}", self.host, self.port),
        }
    }

    /// The same scheme, host and port: what credentials are for.
    #[must_use]
    pub(super) fn same_origin(&self, other: &Self) -> bool {
        (self.tls, &self.host, self.port) == (other.tls, &other.host, other.port)
    }
}

/// The first URL of a registry that answers requests about `registry`, as names of images have it.
pub(super) fn base(registry: &str, plain: bool) -> Result<Url, String> {
    let host = if registry == "docker.io" {
        HUB_API
    } else {
        registry
    };
    let scheme = if plain { "http" } else { "https" };
    Url::parse(&format!("{scheme}://{host}/v2/"))
}

/// A host that the site file names.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Named {
    host: String,
    /// `None`: the default port of either scheme.
    port: Option<u16>,
    plain: bool,
}

impl Named {
    fn of(place: &str, plain: bool) -> Option<Self> {
        let scheme = place.split_once("://");
        let plain = plain || scheme.is_some_and(|(scheme, _)| scheme == "http");
        let host = scheme.map_or(place, |(_, rest)| rest).split('/').next()?;
        let url = base(host, plain).ok()?;
        let explicit = host.rsplit(']').next()?.contains(':');
        Some(Self {
            host: url.host,
            port: explicit.then_some(url.port),
            plain,
        })
    }

    fn is(&self, url: &Url) -> bool {
        let port = self
            .port
            .map_or_else(|| [80, 443].contains(&url.port), |port| port == url.port);
        self.host == url.host && port
    }
}

/// What connections for images may lead to.
#[derive(Debug, Clone, Default)]
pub(super) struct Rules {
    named: Vec<Named>,
}

impl Rules {
    /// The hosts that `[[registry]]` names are exempt: the prefix, and the mirror.
    #[must_use]
    pub(super) fn new(registries: &[Registry]) -> Self {
        let named = registries.iter().flat_map(|entry| {
            let mirror = entry.mirror.as_deref();
            let plain = entry.insecure;
            [
                Named::of(&entry.prefix, plain && mirror.is_none()),
                mirror.and_then(|mirror| Named::of(mirror, plain)),
            ]
        });
        Self {
            named: named.flatten().collect(),
        }
    }

    fn named(&self, url: &Url) -> bool {
        self.named.iter().any(|named| named.is(url))
    }

    /// Whether `url` may be asked at all. `plain`: the registry in question is asked by plain HTTP itself.
    pub(super) fn scheme(&self, url: &Url, plain: bool) -> Result<(), String> {
        let insecure = || self.named.iter().any(|named| named.plain && named.is(url));
        if url.tls || plain || insecure() {
            return Ok(());
        }
        Err(format!(
            "{url} is refused: plain HTTP is only for what [[registry]] names with insecure = true"
        ))
    }

    /// Whether `ip`, which the host of `url` has, may be connected to. `own`: this host has that address itself.
    pub(super) fn address(&self, url: &Url, ip: IpAddr, own: bool) -> Result<(), String> {
        let of_this_host = own.then_some("an address of this host");
        match forbidden(ip).or(of_this_host) {
            Some(kind) if !self.named(url) => Err(format!(
                "{url} is refused: {ip} is {kind}; if it is meant, name {:?} as the prefix of a [[registry]] of the site file",
                url.authority()
            )),
            Some(_) | None => Ok(()),
        }
    }

    /// What can be said of the host without looking it up: where a proxy does that.
    pub(super) fn host(&self, url: &Url) -> Result<(), String> {
        if let Ok(ip) = url.host.parse() {
            return self.address(url, ip, false);
        }
        let name = url.host.trim_end_matches('.');
        if name == "localhost" || name.ends_with(".localhost") {
            return self.address(url, IpAddr::V4(Ipv4Addr::LOCALHOST), false);
        }
        Ok(())
    }
}

/// What an address is that no registry of the internet has; `None` if one may have it.
#[must_use]
pub(super) fn forbidden(ip: IpAddr) -> Option<&'static str> {
    match ip {
        IpAddr::V4(ip) => forbidden_v4(ip),
        IpAddr::V6(ip) => forbidden_v6(ip),
    }
}

/// Metadata services of clouds that are not link-local: Alibaba, Azure, Oracle.
const METADATA: [Ipv4Addr; 3] = [
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(168, 63, 129, 16),
    Ipv4Addr::new(192, 0, 0, 192),
];
/// Amazon's.
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

fn forbidden_v4(ip: Ipv4Addr) -> Option<&'static str> {
    let [first, ..] = ip.octets();
    if METADATA.contains(&ip) || ip == Ipv4Addr::new(169, 254, 169, 254) {
        Some("a metadata service")
    } else if first == 0 {
        Some("an unspecified address")
    } else if ip.is_loopback() {
        Some("a loopback address")
    } else if ip.is_link_local() {
        Some("a link-local address")
    } else if ip.is_multicast() {
        Some("a multicast address")
    } else if first >= 240 {
        Some("a reserved or broadcast address")
    } else {
        None
    }
}

fn forbidden_v6(ip: Ipv6Addr) -> Option<&'static str> {
    let parts = ip.segments();
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        forbidden_v4(Ipv4Addr::new(a, b, c, d))
    };
    if ip == METADATA_V6 {
        return Some("a metadata service");
    }
    match parts {
        [0, 0, 0, 0, 0, 0, 0, 0] => Some("an unspecified address"),
        [0, 0, 0, 0, 0, 0, 0, 1] => Some("a loopback address"),
        // Addresses of IPv4: mapped, compatible, translated (RFC 6052, RFC 2765), and of a 6to4 gateway.
        [0, 0, 0, 0, 0, 0xffff | 0, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0x64, 0xff9b, 0, 0, 0, 0, high, low]
        | [0x2002, high, low, ..] => v4(high, low),
        // Translated within one site (RFC 8215): what it leads to is the site's own choice.
        [0x64, 0xff9b, 1, ..] => Some("a translated address"),
        [first, ..] if first & 0xffc0 == 0xfe80 => Some("a link-local address"),
        [first, ..] if first & 0xff00 == 0xff00 => Some("a multicast address"),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
