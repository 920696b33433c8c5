//! PURE: decides which addresses the agent may connect to for an image, and by which scheme.
//!
//! A pod names a registry; the registry names the realm that issues tokens, and the URLs that its
//! blobs are redirected to. Any of them could be a service of the login node that trusts local
//! clients. So every connection follows one rule: TLS only, and no address of this host, of this
//! link or of a cloud's metadata service. A `[[registry]]` entry exempts the host that it names, and
//! from TLS only if it says so.
//! The rule is applied to the address that is connected to, not to an earlier look-up.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::name;
use crate::config::Registry;

/// Longer URLs are rejected; the signed URLs of blob stores have one or two KiB.
const MAX_URL: usize = 16 * 1024;
/// The host that serves Docker Hub's registry API.
const HUB_API: &str = "registry-1.docker.io";
/// The names of the loopback address in the `/etc/hosts` of common distributions.
const LOCALHOSTS: [&str; 8] = [
    "localhost",
    "localhost.localdomain",
    "localhost4",
    "localhost4.localdomain4",
    "localhost6",
    "localhost6.localdomain6",
    "ip6-localhost",
    "ip6-loopback",
];

/// An `http` or `https` URL.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Url {
    /// Whether the scheme is `https`.
    pub(super) tls: bool,
    /// In lower case and without a dot at its end; an address is in its usual form, and an IPv6
    /// address has no brackets.
    pub(super) host: String,
    /// The port of the URL, or the default port of its scheme.
    pub(super) port: u16,
    /// Path and query; at least `/`.
    pub(super) path: String,
}

/// Omits the query, which may contain a signature.
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
    /// Parses an absolute URL. A URL with a user name is rejected.
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
        let host = match authority.host().strip_prefix('[') {
            Some(bracketed) => bracketed
                .strip_suffix(']')
                .filter(|host| host.parse::<Ipv6Addr>().is_ok())
                .ok_or("its host is not an IPv6 address in brackets")?,
            None => authority.host(),
        };
        if host.is_empty() {
            return Err("it names no host".to_owned());
        }
        if host.contains(['[', ']']) {
            return Err("its host is not a name or an address".to_owned());
        }
        let host = canonical(host)?;
        let default = if tls { 443 } else { 80 };
        let rest = authority.as_str().rsplit(']').next().unwrap_or_default();
        let port = match rest.rsplit_once(':') {
            Some((_, port)) => port
                .parse()
                .map_err(|_| format!("{port:?} is not a port"))?,
            None => default,
        };
        if port == 0 {
            return Err("the port is 0".to_owned());
        }
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let slash = if path.starts_with('/') { "" } else { "/" };
        Ok(Self {
            tls,
            host,
            port,
            path: format!("{slash}{path}"),
        })
    }

    /// The URL that a `Location` header in a response from this URL refers to.
    pub(super) fn join(&self, location: &str) -> Result<Self, String> {
        if location.starts_with("//") {
            return Self::parse(&format!("{}:{location}", self.scheme()));
        }
        // Before a colon in the first segment of a relative path there would be a scheme.
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

    /// The scheme's name, `https` or `http`.
    #[must_use]
    pub(super) fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }

    /// `HOST[:PORT]`, as in the `Host` header.
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

    /// Whether scheme, host and port are the same; credentials are valid for one origin.
    #[must_use]
    pub(super) fn same_origin(&self, other: &Self) -> bool {
        (self.tls, &self.host, self.port) == (other.tls, &other.host, other.port)
    }
}

/// The one form of a host that has many: what is checked, compared, looked up and told to a proxy
/// is this form.
fn canonical(host: &str) -> Result<String, &'static str> {
    if let Ok(ip) = host.parse::<Ipv6Addr>() {
        return Ok(ip.to_string());
    }
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    if host.is_empty() {
        return Err("it names no host");
    }
    let last = host.rsplit('.').next().unwrap_or_default();
    let decimal = !last.is_empty() && last.bytes().all(|byte| byte.is_ascii_digit());
    let hexadecimal = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !decimal && !last.strip_prefix("0x").is_some_and(hexadecimal) {
        return Ok(host);
    }
    // No name ends in a number, so that a resolver reads it as an address or not at all.
    let ip = inet_aton(&host).ok_or("its host is a number, but not an address")?;
    Ok(ip.to_string())
}

/// The address that resolvers read in one to four numbers, as the C function of this name does:
/// each is decimal, octal or hexadecimal, and the last one fills the bytes that are left.
fn inet_aton(host: &str) -> Option<Ipv4Addr> {
    let parts: Option<Vec<u64>> = host.split('.').map(number).collect();
    let parts = parts?;
    let (last, first) = parts.split_last()?;
    let bits: u32 = *[32, 24, 16, 8].get(first.len())?;
    if first.iter().any(|part| *part > 255) || *last >> bits != 0 {
        return None;
    }
    let high = first.iter().fold(0, |high, part| (high << 8) | *part);
    u32::try_from((high << bits) | *last)
        .ok()
        .map(Ipv4Addr::from)
}

fn number(part: &str) -> Option<u64> {
    let (digits, radix) = match (part.strip_prefix("0x"), part.strip_prefix('0')) {
        (Some(digits), _) => (digits, 16),
        (None, Some(digits)) => (digits, 8),
        (None, None) => (part, 10),
    };
    if digits.is_empty() {
        return (radix != 10).then_some(0);
    }
    let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    u64::from_str_radix(digits, radix).ok().filter(|_| plain)
}

/// The host of `registry`, by which slots are counted: one host counts once, however its name is
/// written and whatever number of ports it has.
#[must_use]
pub(super) fn host_of(registry: &str) -> String {
    let url = base(registry, false);
    url.map_or_else(|_| registry.to_ascii_lowercase(), |url| url.host)
}

/// The root URL of the registry API for `registry`, as image names have it.
pub(super) fn base(registry: &str, plain: bool) -> Result<Url, String> {
    let host = match name::registry(registry) {
        hub if hub == "docker.io" => HUB_API.to_owned(),
        host => host,
    };
    let scheme = if plain { "http" } else { "https" };
    Url::parse(&format!("{scheme}://{host}/v2/"))
}

/// A host that the site file names.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Named {
    host: String,
    /// `None` means the default port of either scheme.
    port: Option<u16>,
    plain: bool,
}

impl Named {
    fn of(address: &str, plain: bool) -> Option<Self> {
        let scheme = address.split_once("://");
        let plain = plain || scheme.is_some_and(|(scheme, _)| scheme.eq_ignore_ascii_case("http"));
        let host = scheme.map_or(address, |(_, rest)| rest).split('/').next()?;
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

/// The rules for connections that are made for images.
#[derive(Debug, Clone, Default)]
pub(super) struct Rules {
    named: Vec<Named>,
}

impl Rules {
    /// Creates the rules. Hosts that a `[[registry]]` names are exempt: its prefix and its mirror; and that of the library at this address.
    #[must_use]
    pub(super) fn new(registries: &[Registry], library: Option<&str>) -> Self {
        let library = library.and_then(|address| Named::of(address, false));
        let named = registries.iter().flat_map(|entry| {
            let mirror = entry.mirror.as_deref();
            let plain = entry.insecure;
            [
                Named::of(&entry.prefix, plain && mirror.is_none()),
                mirror.and_then(|mirror| Named::of(mirror, plain)),
            ]
        });
        Self {
            named: named.flatten().chain(library).collect(),
        }
    }

    fn named(&self, url: &Url) -> bool {
        self.named.iter().any(|named| named.is(url))
    }

    /// Checks the scheme of `url`. `plain`: the registry itself is accessed over plain HTTP; then
    /// its token realm or its blobs may be at another port of a host that is named as insecure, but
    /// not at any other host, which would get a pod's credentials in clear text.
    pub(super) fn scheme(&self, url: &Url, plain: bool) -> Result<(), String> {
        let mut insecure = self.named.iter().filter(|named| named.plain);
        if url.tls || insecure.any(|named| named.is(url) || (plain && named.host == url.host)) {
            return Ok(());
        }
        Err(format!(
            "{url} is refused: plain HTTP is allowed only for hosts that a [[registry]] of the site file names with insecure = true"
        ))
    }

    /// Checks whether the address `ip` of `url`'s host may be connected to. `own`: `ip` is an
    /// address of this host.
    pub(super) fn address(&self, url: &Url, ip: IpAddr, own: bool) -> Result<(), String> {
        let of_this_host = own.then_some("an address of this host");
        match forbidden(ip).or(of_this_host) {
            Some(kind) if !self.named(url) => Err(format!(
                "{url} is refused: {ip} is {kind}; to allow it, name {:?} as the prefix of a [[registry]] of the site file",
                url.authority()
            )),
            Some(_) | None => Ok(()),
        }
    }

    /// Checks what can be said about the host without a look-up, which a proxy does itself.
    pub(super) fn host(&self, url: &Url) -> Result<(), String> {
        if let Ok(ip) = url.host.parse() {
            return self.address(url, ip, false);
        }
        let name = url.host.as_str();
        if LOCALHOSTS.contains(&name) || name.ends_with(".localhost") {
            return self.address(url, IpAddr::V4(Ipv4Addr::LOCALHOST), false);
        }
        Ok(())
    }
}

/// The kind of an address that no registry on the internet can have; `None` if a registry may have
/// it.
#[must_use]
pub(super) fn forbidden(ip: IpAddr) -> Option<&'static str> {
    match ip {
        IpAddr::V4(ip) => forbidden_v4(ip),
        IpAddr::V6(ip) => forbidden_v6(ip),
    }
}

/// Metadata services of clouds that are not at a link-local address: Alibaba, Azure, Oracle.
const METADATA: [Ipv4Addr; 3] = [
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(168, 63, 129, 16),
    Ipv4Addr::new(192, 0, 0, 192),
];
/// The same at private addresses of IPv6: Amazon, Google, Oracle, Scaleway.
const METADATA_V6: [Ipv6Addr; 4] = [
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd00, 0xc1, 0, 0, 0, 0, 0xa9fe, 0xa9fe),
    Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42),
];

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
    if METADATA_V6.contains(&ip) {
        return Some("a metadata service");
    }
    match parts {
        [0, 0, 0, 0, 0, 0, 0, 0] => Some("an unspecified address"),
        [0, 0, 0, 0, 0, 0, 0, 1] => Some("a loopback address"),
        // IPv4 addresses in IPv6: mapped, compatible, translated (RFC 6052, RFC 2765), and of a
        // 6to4 gateway.
        [0, 0, 0, 0, 0, 0xffff | 0, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0x64, 0xff9b, 0, 0, 0, 0, high, low]
        | [0x2002, high, low, ..] => v4(high, low),
        // Translated within one site (RFC 8215): the site decides where it leads.
        [0x64, 0xff9b, 1, ..] => Some("a translated address"),
        [first, ..] if first & 0xffc0 == 0xfe80 => Some("a link-local address"),
        [first, ..] if first & 0xff00 == 0xff00 => Some("a multicast address"),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
