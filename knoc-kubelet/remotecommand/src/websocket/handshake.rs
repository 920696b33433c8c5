//! PURE: the opening handshake of a WebSocket (RFC 6455, section 4.2), and the choice of the subprotocol.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderValue, header};
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use thiserror::Error;

/// The GUID that is appended to the client's key before it is hashed (RFC 6455, section 1.3).
const MAGIC: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// The only version of the protocol (RFC 6455).
pub const VERSION: &str = "13";

/// Why the handshake is rejected.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BadHandshake {
    /// The version is not supported: HTTP status 400, with our version in the response.
    #[error("unable to upgrade: Sec-WebSocket-Version must be {VERSION}")]
    Version,
    /// The key is missing or malformed: HTTP status 400.
    #[error("unable to upgrade: Sec-WebSocket-Key is missing or not 16 bytes of base64")]
    Key,
    /// No subprotocol is supported: HTTP status 403. Clients that support SPDY fall back to it on any response but 101.
    #[error("unable to upgrade: none of the WebSocket subprotocols {offered} is supported")]
    Subprotocol {
        /// The subprotocols of the client, joined by commas.
        offered: String,
    },
}

/// The value of `Sec-WebSocket-Accept` for a valid request.
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

/// The client's first subprotocol that is in `ours`, with its meaning. A client that offers none gets the first of
/// `ours`, without a name.
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
    fn rejects_other_versions_and_keys() {
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
    fn agrees_on_the_first_subprotocol_of_the_client() {
        let ours = [("a", 1), ("b", 2)];
        let agreed = |pairs: &[_]| agree(&headers(pairs), &ours, 0);
        let protocol = "sec-websocket-protocol";
        assert_eq!(agreed(&[]), Ok((None, 0)));
        assert_eq!(
            agreed(&[(protocol, "x, b"), (protocol, "a")]),
            Ok((Some("b"), 2))
        );
        let error = agreed(&[(protocol, "x, v9.channel.k8s.io")]).unwrap_err();
        assert!(
            error.to_string().contains("x, v9.channel.k8s.io"),
            "{error}"
        );
    }
}
