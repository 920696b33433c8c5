//! PURE: parses the ports in the query of a WebSocket client of port-forward.

use thiserror::Error;

use crate::query::Query;

/// The parameter that a real kubelet reads, and the one that the API server's own clients write.
const NAMES: [&str; 2] = ["port", "ports"];
/// The most ports of one connection. Each port has two channels, whose numbers are single characters in the base64
/// form.
pub const MAX_PORTS: usize = 32;

/// Why a query is rejected. The texts are those of Kubernetes, except for the limit on the number of ports.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BadPorts {
    /// The query has no parameter with a port.
    #[error("query parameter \"port\" is required")]
    Missing,
    /// A parameter has an empty value.
    #[error("query parameter \"port\" cannot be empty")]
    Empty,
    /// The text is not a port number.
    #[error("unable to parse {text:?} as a port: it is not a number up to 65535")]
    NotAPort {
        /// The text in the query.
        text: String,
    },
    /// Port 0 cannot be connected to.
    #[error("port {text:?} must be > 0")]
    Zero {
        /// The text in the query.
        text: String,
    },
    /// The query has more than [`MAX_PORTS`] ports.
    #[error("more than {MAX_PORTS} ports on one connection")]
    TooMany,
}

/// The ports in order, from repeated parameters or from lists with commas.
pub fn ports(query: &Query) -> Result<Vec<u16>, BadPorts> {
    let mut ports = Vec::new();
    for text in NAMES.into_iter().flat_map(|name| query.all(name)) {
        if text.is_empty() {
            return Err(BadPorts::Empty);
        }
        for port in text.split(',') {
            ports.push(parse(port)?);
        }
    }
    match ports.len() {
        0 => Err(BadPorts::Missing),
        1..=MAX_PORTS => Ok(ports),
        _ => Err(BadPorts::TooMany),
    }
}

/// Parses one port number, 1 to 65535.
pub fn parse(text: &str) -> Result<u16, BadPorts> {
    let text_of = || text.to_owned();
    // Go's ParseUint accepts no sign.
    let number = text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse() {
        Ok(0) => Err(BadPorts::Zero { text: text_of() }),
        Ok(port) if number => Ok(port),
        Ok(_) | Err(_) => Err(BadPorts::NotAPort { text: text_of() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(raw: &str) -> Result<Vec<u16>, BadPorts> {
        ports(&Query::parse(raw).unwrap_or_default())
    }

    #[test]
    fn reads_both_names_repeated_and_in_lists() {
        assert_eq!(of("port=80").unwrap(), [80]);
        assert_eq!(of("port=80,443&port=65535").unwrap(), [80, 443, 65535]);
        assert_eq!(of("ports=1%2C2&x=3").unwrap(), [1, 2]);
    }

    #[test]
    fn rejects_the_rest_with_upstreams_messages() {
        let many = vec!["1"; MAX_PORTS + 1].join(",");
        let cases = [
            ("", "query parameter \"port\" is required"),
            ("port=", "query parameter \"port\" cannot be empty"),
            ("port=0", "port \"0\" must be > 0"),
            ("port=x", "unable to parse \"x\" as a port"),
            ("port=65536", "unable to parse \"65536\" as a port"),
            ("port=%2B80", "unable to parse \"+80\" as a port"),
            ("port=80,", "unable to parse \"\" as a port"),
            (&format!("port={many}"), "more than 32 ports"),
        ];
        for (raw, text) in cases {
            let error = of(raw).unwrap_err().to_string();
            assert!(error.starts_with(text), "{raw}: {error}");
        }
    }
}
