//! How bytes get from one side to the other: `tcp:host:port` or `unix:/path`.
//!
//! Pure.
use std::{fmt, path::PathBuf, str::FromStr};

/// The way to a peer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Carrier {
    /// `host:port`, spoken TLS over.
    Tcp(String),
    /// A socket whose peer's user is checked; no TLS.
    Unix(PathBuf),
}

/// Why a text is no carrier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCarrier {
    /// Not `host:port`.
    #[error("{address:?} is not HOST:PORT (an IPv6 address stands in brackets)")]
    Address {
        /// As given.
        address: String,
    },
    /// A socket's path that is not absolute.
    #[error("the socket path {path:?} is not absolute")]
    Relative {
        /// As given.
        path: String,
    },
    /// A scheme that this version does not know.
    #[error("the carrier {scheme:?} is not supported; use tcp:HOST:PORT or unix:/PATH")]
    Scheme {
        /// As given.
        scheme: String,
    },
}

impl FromStr for Carrier {
    type Err = InvalidCarrier;

    fn from_str(text: &str) -> Result<Self, InvalidCarrier> {
        match text.split_once(':') {
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(("unix", path)) => Err(InvalidCarrier::Relative {
                path: path.to_owned(),
            }),
            Some(("tcp", address)) => tcp(address),
            Some((scheme, rest)) if scheme == "exec" || rest.starts_with("//") => {
                Err(InvalidCarrier::Scheme {
                    scheme: scheme.to_owned(),
                })
            }
            Some(_) | None => tcp(text),
        }
    }
}

fn tcp(address: &str) -> Result<Carrier, InvalidCarrier> {
    let wrong = || InvalidCarrier::Address {
        address: address.to_owned(),
    };
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    let bare_ipv6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
    let spaced = host.contains(|c: char| c.is_whitespace() || c == '/');
    if host.is_empty() || bare_ipv6 || spaced || port.parse::<u16>().is_err() {
        return Err(wrong());
    }
    Ok(Carrier::Tcp(address.to_owned()))
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        for (text, shown) in [
            ("login:10350", "tcp:login:10350"),
            ("tcp:10.0.0.1:1", "tcp:10.0.0.1:1"),
            ("[::1]:10350", "tcp:[::1]:10350"),
            ("unix:/run/knoc/agent.sock", "unix:/run/knoc/agent.sock"),
        ] {
            let carrier: Carrier = text.parse().unwrap();
            assert_eq!(carrier.to_string(), shown);
            assert_eq!(shown.parse::<Carrier>().unwrap(), carrier);
        }
    }

    #[test]
    fn refusals_name_the_cause() {
        for (text, words) in [
            ("login", "not HOST:PORT"),
            ("login:http", "not HOST:PORT"),
            ("::1:10350", "brackets"),
            ("unix:agent.sock", "not absolute"),
            ("https://x:1", "not supported"),
            ("exec:ssh login", "not supported"),
        ] {
            let error = text.parse::<Carrier>().unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
