//! PURE: the opening handshake of a WebSocket (RFC 6455, section 4.2), and which subprotocol is spoken.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderValue, header};
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use thiserror::Error;

/// Joined to the client's key before it is hashed, by the protocol.
const MAGIC: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// The only version of the protocol.
pub const VERSION: &str = "13";

/// Why there is no handshake.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BadHandshake {
    /// 400, with our version.
    #[error("unable to upgrade: Sec-WebSocket-Version must be {VERSION}")]
    Version,
    /// 400.
    #[error("unable to upgrade: Sec-WebSocket-Key is missing or not 16 bytes of base64")]
    Key,
    /// 403: clients that can do SPDY fall back to it on any answer but 101.
    #[error("unable to upgrade: none of the WebSocket subprotocols {offered} is spoken here")]
    Subprotocol {
        /// The client's, joined.
        offered: String,
    },
}

/// The value of `Sec-WebSocket-Accept`, where the request is right.
pub fn accept(headers: &HeaderMap) -> Result<HeaderValue, BadHandshake> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    if text(header::SEC_WEBSOCKET_VERSION).map(str::trim) != Some(VERSION) {
        return Err(BadHandshake::Version);
    }
    let key = text(header::SEC_WEBSOCKET_KEY).map_or("", str::trim);
    if STANDARD.decode(key).map_or(0, |bytes| bytes.len()) != 16 {
        return Err(BadHandshake::Key);
    }
    let hash = digest(&SHA1_FOR_LEGACY_USE_ONLY, &[key.as_bytes(), MAGIC].concat());
    HeaderValue::from_str(&STANDARD.encode(hash)).map_err(|_| BadHandshake::Key)
}

/// The subprotocols that the client offers, in its order.
pub fn offered(headers: &HeaderMap) -> Vec<&str> {
    headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .collect()
}

/// The first of the client's subprotocols that is in `ours`, with what it stands for; the first of `ours` without a name
/// for a client that offers none.
pub fn agree<T: Copy>(
    headers: &HeaderMap,
    ours: &[(&'static str, T)],
    unnamed: T,
) -> Result<(Option<&'static str>, T), BadHandshake> {
    let offered = offered(headers);
    if offered.is_empty() {
        return Ok((None, unnamed));
    }
    let own = |name: &&str| ours.iter().find(|(own, _)| own == name);
    match offered.iter().find_map(own) {
        Some((name, meaning)) => Ok((Some(name), *meaning)),
        None => Err(BadHandshake::Subprotocol {
            offered: offered.join(", "),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn answers_the_key_of_the_standard() {
        let right = headers(&[
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ]);
        assert_eq!(accept(&right).unwrap(), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn refuses_other_versions_and_keys() {
        let key = ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
        let version = ("sec-websocket-version", "13");
        let old = headers(&[("sec-websocket-version", "8"), key]);
        assert_eq!(accept(&old), Err(BadHandshake::Version));
        assert_eq!(accept(&headers(&[key])), Err(BadHandshake::Version));
        assert_eq!(accept(&headers(&[version])), Err(BadHandshake::Key));
        let short = headers(&[version, ("sec-websocket-key", "c2hvcnQ=")]);
        assert_eq!(accept(&short), Err(BadHandshake::Key));
    }

    #[test]
    fn agrees_on_the_first_of_the_client() {
        let ours = [("a", 1), ("b", 2)];
        let agreed = |pairs: &[_]| agree(&headers(pairs), &ours, 0);
        let protocol = "sec-websocket-protocol";
        assert_eq!(agreed(&[]), Ok((None, 0)));
        assert_eq!(
            agreed(&[(protocol, "x, b"), (protocol, "a")]),
            Ok((Some("b"), 2))
        );
        let refused = agreed(&[(protocol, "x, v9.channel.k8s.io")]).unwrap_err();
        assert!(
            refused.to_string().contains("x, v9.channel.k8s.io"),
            "{refused}"
        );
    }
}
