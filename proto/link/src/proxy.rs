//! PURE: which HTTP proxy a connection goes through, if any: that of a setting, else that of the environment
//! (`HTTPS_PROXY`, and `NO_PROXY` for peers that are connected to directly), which is read as curl and Go read it.
//!
//! [`NoProxy`] knows these forms, separated by commas: `*` (everything), an IP address, a network (`10.0.0.0/8`), a name
//! (`example.org`, which covers its subdomains), `.example.org` (its subdomains only); an address or a name may have a
//! port. A loopback address and `localhost` are never reached through a proxy of the environment.
use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
};

use percent_encoding::percent_decode_str;

/// The variables that are read.
pub const VARIABLES: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"];

/// The port of an `http://` address without one.
const HTTP_PORT: u16 = 80;

/// An HTTP proxy that supports `CONNECT`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Proxy {
    /// `host:port`
    address: String,
    login: Login,
}

/// The credentials that the proxy gets.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) enum Login {
    Nothing,
    /// `user:password`, from the environment.
    Text(String),
    /// A file with `user:password`, read for each connection.
    File(PathBuf),
}

/// Never shows a password.
impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Proxy").field(&self.to_string()).finish()
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.address)
    }
}

/// Why a text names no proxy. The text is not repeated, since it may contain a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidProxy {
    /// The text does not have the form `http://HOST:PORT`.
    #[error("is not like http://proxy.example.org:3128")]
    Form,
    /// The scheme is not supported.
    #[error("begins with {scheme}://, and only http:// proxies are supported")]
    Scheme {
        /// The scheme as configured.
        scheme: String,
    },
    /// The setting contains a user or a password, which would be shown with it.
    #[error(
        "contains a user or a password: write `user:password` into a file of mode 0600 and name that file instead"
    )]
    Login,
    /// A file with credentials is configured, but no proxy.
    #[error("belongs to a proxy, and `proxy` names none")]
    NeedlessCredentials,
    /// The user or the password contains characters that a header cannot carry.
    #[error("contains a user or a password with characters that are not allowed")]
    LoginText,
}

impl Proxy {
    /// The proxy that a setting names, `http://HOST:PORT`, and the file with its credentials.
    pub(crate) fn of_setting(text: &str, credentials: Option<&Path>) -> Result<Self, InvalidProxy> {
        let mut proxy = Self::parse(text)?;
        if proxy.login != Login::Nothing {
            return Err(InvalidProxy::Login);
        }
        if let Some(file) = credentials {
            proxy.login = Login::File(file.to_owned());
        }
        Ok(proxy)
    }

    /// `[http://][user:password@]host[:port][/]`
    fn parse(text: &str) -> Result<Self, InvalidProxy> {
        let text = text.trim();
        let rest = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some((scheme, _)) if scheme.chars().all(|c| c.is_ascii_alphanumeric()) => {
                let scheme = scheme.to_owned();
                return Err(InvalidProxy::Scheme { scheme });
            }
            Some(_) => return Err(InvalidProxy::Form),
            None => text,
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (login, authority) = match rest.rsplit_once('@') {
            Some((login, authority)) => (Login::Text(decoded(login)?), authority),
            None => (Login::Nothing, rest),
        };
        let (host, port) = split(authority).ok_or(InvalidProxy::Form)?;
        let named = |c: char| c.is_ascii_alphanumeric() || "-._:%".contains(c);
        if host.is_empty() || !host.chars().all(named) {
            return Err(InvalidProxy::Form);
        }
        let port = port.unwrap_or(HTTP_PORT);
        let address = if host.contains(':') {
            format!("[{host}]:{port}")
        } else {
            format!("{host}:{port}")
        };
        Ok(Self { address, login })
    }

    /// `host:port`
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn login(&self) -> &Login {
        &self.login
    }
}

fn decoded(login: &str) -> Result<String, InvalidProxy> {
    let text = percent_decode_str(login).decode_utf8();
    let text = text.map_err(|_| InvalidProxy::LoginText)?.into_owned();
    if text.chars().any(char::is_control) {
        return Err(InvalidProxy::LoginText);
    }
    Ok(if text.contains(':') {
        text
    } else {
        format!("{text}:")
    })
}

/// Host and port. An IPv6 address may be in brackets; if a port follows, it must be.
fn split(authority: &str) -> Option<(&str, Option<u16>)> {
    if let Some(rest) = authority.strip_prefix('[') {
        let (host, after) = rest.split_once(']')?;
        return match after.strip_prefix(':') {
            Some(port) => Some((host, Some(port.parse().ok()?))),
            None => after.is_empty().then_some((host, None)),
        };
    }
    match authority.split_once(':') {
        Some((_, rest)) if rest.contains(':') => Some((authority, None)),
        Some((host, port)) => Some((host, Some(port.parse().ok()?))),
        None => Some((authority, None)),
    }
}

/// The value of the setting that overrides a proxy of the environment.
const NONE: &str = "none";

/// The choice of a proxy by the settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Via {
    /// There is no setting: the environment decides.
    #[default]
    Environment,
    /// No proxy is used.
    Direct,
    /// This one is used.
    Proxy(Proxy),
}

impl Via {
    /// Parses the setting `proxy` (`http://HOST:PORT` or `none`) and the one that names the file with its credentials.
    pub fn of_settings(
        proxy: Option<&str>,
        credentials: Option<&Path>,
    ) -> Result<Self, InvalidProxy> {
        let without = |via| match credentials {
            Some(_) => Err(InvalidProxy::NeedlessCredentials),
            None => Ok(via),
        };
        match proxy {
            None => without(Self::Environment),
            Some(NONE) => without(Self::Direct),
            Some(text) => Proxy::of_setting(text, credentials).map(Self::Proxy),
        }
    }

    /// The proxy for a connection to `address`, which is `host:port`.
    pub fn proxy_for(
        &self,
        address: &str,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Proxy>, InvalidEnvironment> {
        match self {
            Self::Environment => {
                let environment = Environment::read(variable)?;
                Ok(environment.proxy_for(address).cloned())
            }
            Self::Direct => Ok(None),
            Self::Proxy(proxy) => Ok(Some(proxy.clone())),
        }
    }
}

/// What decides about proxies if no setting does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Environment {
    proxy: Option<Proxy>,
    no_proxy: NoProxy,
}

/// An environment variable does not name a usable proxy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the variable {variable} {wrong}; the setting `proxy = \"{NONE}\"` ignores it")]
pub struct InvalidEnvironment {
    /// The variable's name.
    pub variable: &'static str,
    /// What is wrong with its value.
    pub wrong: InvalidProxy,
}

impl Environment {
    /// Reads `HTTPS_PROXY` and `NO_PROXY`, or if these are not set, their lower-case forms.
    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, InvalidEnvironment> {
        let first = |names: [&'static str; 2]| {
            let set = |name| Some((name, variable(name).filter(|value| !value.is_empty())?));
            names.into_iter().find_map(set)
        };
        let proxy = match first(["HTTPS_PROXY", "https_proxy"]) {
            Some((variable, text)) => {
                Some(Proxy::parse(&text).map_err(|wrong| InvalidEnvironment { variable, wrong })?)
            }
            None => None,
        };
        let no_proxy = first(["NO_PROXY", "no_proxy"]);
        Ok(Self {
            proxy,
            no_proxy: no_proxy.map_or_else(NoProxy::default, |(_, text)| NoProxy::parse(&text)),
        })
    }

    /// The proxy for a connection to `address`, which is `host:port`.
    fn proxy_for(&self, address: &str) -> Option<&Proxy> {
        let proxy = self.proxy.as_ref()?;
        let (host, port) = split(address)?;
        (!is_loopback(host) && !self.no_proxy.covers(host, port)).then_some(proxy)
    }
}

fn is_loopback(host: &str) -> bool {
    let address = host.parse::<IpAddr>();
    host.eq_ignore_ascii_case("localhost")
        || address.is_ok_and(|address| address.to_canonical().is_loopback())
}

/// The peers that are connected to directly.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct NoProxy(Vec<Rule>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Rule {
    All,
    Network(IpAddr, u8),
    Address(IpAddr, Option<u16>),
    Name {
        /// In lower case, without a dot at either end.
        name: String,
        /// The name itself is not covered.
        below: bool,
        port: Option<u16>,
    },
}

impl NoProxy {
    fn parse(text: &str) -> Self {
        let entries = text.split(',').map(str::trim);
        Self(entries.filter_map(Rule::parse).collect())
    }

    fn covers(&self, host: &str, port: Option<u16>) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let address = host
            .parse()
            .ok()
            .map(|address: IpAddr| address.to_canonical());
        self.0.iter().any(|rule| rule.covers(&host, address, port))
    }
}

impl Rule {
    /// None if it is empty.
    fn parse(entry: &str) -> Option<Self> {
        if entry == "*" {
            return Some(Self::All);
        }
        if let Some((address, length)) = entry.split_once('/')
            && let (Ok(address), Ok(length)) = (address.parse(), length.parse())
        {
            return Some(Self::Network(address, length));
        }
        let (host, port) = split(entry).unwrap_or((entry, None));
        if let Ok(address) = host.parse::<IpAddr>() {
            return Some(Self::Address(address.to_canonical(), port));
        }
        let bare = host.strip_prefix('*').unwrap_or(host);
        let name = bare.trim_matches('.').to_ascii_lowercase();
        let below = bare.starts_with('.');
        (!name.is_empty()).then_some(Self::Name { name, below, port })
    }

    fn covers(&self, host: &str, address: Option<IpAddr>, port: Option<u16>) -> bool {
        let of_port = |wanted: &Option<u16>| wanted.is_none() || *wanted == port;
        match self {
            Self::All => true,
            Self::Network(network, length) => {
                address.is_some_and(|address| is_within(address, *network, *length))
            }
            Self::Address(own, wanted) => address == Some(*own) && of_port(wanted),
            Self::Name { name, below, port } => {
                let same = !below && host == name;
                let sub = host
                    .strip_suffix(name.as_str())
                    .is_some_and(|rest| rest.ends_with('.'));
                (same || sub) && of_port(port)
            }
        }
    }
}

fn is_within(address: IpAddr, network: IpAddr, length: u8) -> bool {
    let same_start = |a: u128, b: u128, bits: u8| {
        let rest = bits.checked_sub(length).map(u32::from);
        rest.is_some_and(|rest| a.checked_shr(rest) == b.checked_shr(rest))
    };
    match (address, network) {
        (IpAddr::V4(address), IpAddr::V4(network)) => same_start(
            u128::from(address.to_bits()),
            u128::from(network.to_bits()),
            32,
        ),
        (IpAddr::V6(address), IpAddr::V6(network)) => {
            same_start(address.to_bits(), network.to_bits(), 128)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> Result<Environment, InvalidEnvironment> {
        Environment::read(|name| {
            let found = pairs.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn a_setting_names_a_proxy_without_its_password() {
        let proxy = |text: &str| Proxy::of_setting(text, None);
        for (text, address) in [
            ("http://proxy:3128", "proxy:3128"),
            ("http://proxy:3128/", "proxy:3128"),
            ("proxy:3128", "proxy:3128"),
            ("HTTP://proxy", "proxy:80"),
            ("http://[fd00::1]:3128", "[fd00::1]:3128"),
        ] {
            assert_eq!(proxy(text).unwrap().address(), address, "{text}");
        }
        for text in [
            "",
            "http://",
            "http://a b",
            "http://a:b",
            "http://a/b",
            "http://a:1\r\nX: y",
            "http://[::1",
        ] {
            assert_eq!(proxy(text), Err(InvalidProxy::Form), "{text}");
        }
        for scheme in ["https", "socks5"] {
            let error = proxy(&format!("{scheme}://proxy:1")).unwrap_err();
            assert!(error.to_string().contains(scheme), "{error}");
        }
        let error = proxy("http://ann:secret@proxy:1").unwrap_err();
        assert!(!error.to_string().contains("secret"), "{error}");
    }

    #[test]
    fn the_environment_is_read_in_both_cases_and_no_password_is_shown() {
        let found = environment(&[("https_proxy", "http://ann:se%40cret@p:3128")]).unwrap();
        let proxy = found.proxy_for("login:10350").unwrap();
        assert!(*proxy.login() == Login::Text("ann:se@cret".into()));
        let shown = format!("{proxy} {proxy:?} {found:?}");
        assert!(!shown.contains("cret"), "{shown}");
        let both = [("HTTPS_PROXY", "upper:1"), ("https_proxy", "lower:1")];
        let found = environment(&both).unwrap();
        assert_eq!(found.proxy_for("a:1").unwrap().address(), "upper:1");
        let error = environment(&[("https_proxy", "socks5://p:1")]).unwrap_err();
        assert!(error.to_string().contains("https_proxy"), "{error}");
        assert!(environment(&[]).unwrap().proxy_for("a:1").is_none());
        let injected = environment(&[("HTTPS_PROXY", "http://a%0d%0aX:b@p:1")]);
        assert_eq!(injected.unwrap_err().wrong, InvalidProxy::LoginText);
    }

    #[test]
    fn no_proxy_has_the_forms_of_curl_and_go() {
        let direct = |rules: &str, address: &str| {
            let found = environment(&[("HTTPS_PROXY", "p:1"), ("no_proxy", rules)]).unwrap();
            found.proxy_for(address).is_none()
        };
        for (rules, address) in [
            ("*", "example.org:1"),
            ("example.org", "example.org:443"),
            ("example.org", "login.Example.org.:443"),
            (".example.org", "login.example.org:1"),
            ("*.example.org", "login.example.org:1"),
            ("a, example.org:443 ,b", "example.org:443"),
            ("10.0.0.0/8", "10.1.2.3:1"),
            ("10.1.2.3", "10.1.2.3:1"),
            ("10.1.2.3:443", "10.1.2.3:443"),
            ("fd00::/16", "[fd00::5]:1"),
            ("fd00::5", "[fd00::5]:1"),
            ("", "localhost:1"),
            ("", "127.0.0.1:1"),
            ("", "[::1]:1"),
            ("0.0.0.0/0", "8.8.8.8:1"),
        ] {
            assert!(direct(rules, address), "{rules}: {address}");
        }
        for (rules, address) in [
            ("", "example.org:1"),
            ("example.org", "notexample.org:1"),
            (".example.org", "example.org:1"),
            ("example.org:443", "example.org:444"),
            ("10.0.0.0/8", "11.1.2.3:1"),
            ("10.0.0.0/99", "10.1.2.3:1"),
            ("10.0.0.0/8", "ten.example.org:1"),
            ("10.1.2.3:443", "10.1.2.3:1"),
            ("fd00::/16", "10.1.2.3:1"),
            (",,", "example.org:1"),
        ] {
            assert!(!direct(rules, address), "{rules}: {address}");
        }
    }
}
