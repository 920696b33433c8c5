//! PURE: parses the query string of a request, `application/x-www-form-urlencoded` as Go's `net/url` writes it.
//!
//! It is stricter than Go, which drops what it cannot decode: a malformed escape or text that is not UTF-8 is an error,
//! so that no option is lost silently. It never panics (property tests below).

use thiserror::Error;

/// Why a query string cannot be parsed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BadQuery {
    /// `%` is not followed by two hexadecimal digits.
    #[error("malformed percent escape at byte {at}")]
    Escape {
        /// The offset of the `%` in its name or value.
        at: usize,
    },
    /// The decoded bytes are not UTF-8.
    #[error("a name or value is not UTF-8")]
    NotUtf8,
}

/// The names and values of a query string, in order.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Parses a query string; an absent one is an empty string.
    pub fn parse(raw: &str) -> Result<Self, BadQuery> {
        let mut pairs = Vec::new();
        for piece in raw.split('&').filter(|piece| !piece.is_empty()) {
            let (name, value) = piece.split_once('=').unwrap_or((piece, ""));
            pairs.push((decode(name)?, decode(value)?));
        }
        Ok(Self(pairs))
    }

    /// The first value of `name`, as Go's `Values.Get` returns it; `None` if it is absent.
    #[must_use]
    pub fn first(&self, name: &str) -> Option<&str> {
        let mut pairs = self.0.iter();
        pairs
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// Every value of `name`, in order.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .iter()
            .filter(move |(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

fn decode(text: &str) -> Result<String, BadQuery> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'+' => out.push(b' '),
            b'%' => {
                let digits = (
                    bytes.get(at + 1).copied().and_then(hex),
                    bytes.get(at + 2).copied().and_then(hex),
                );
                let (Some(high), Some(low)) = digits else {
                    return Err(BadQuery::Escape { at });
                };
                out.push(high << 4 | low);
                at += 2;
            }
            other => out.push(other),
        }
        at += 1;
    }
    String::from_utf8(out).map_err(|_| BadQuery::NotUtf8)
}

fn hex(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Encodes like Go's `url.QueryEscape`.
    fn encode(text: &str) -> String {
        use std::fmt::Write as _;
        text.bytes().fold(String::new(), |mut out, byte| {
            match byte {
                b' ' => out.push('+'),
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                    out.push(char::from(byte));
                }
                other => write!(out, "%{other:02X}").unwrap(),
            }
            out
        })
    }

    #[test]
    fn reads_repeated_and_bare_names() {
        let query =
            Query::parse("command=sh&command=-c&command=echo+%22a%26b%22&tty&input=1").unwrap();
        let command: Vec<_> = query.all("command").collect();
        assert_eq!(command, ["sh", "-c", "echo \"a&b\""]);
        assert_eq!(query.first("tty"), Some(""));
        assert_eq!(query.first("input"), Some("1"));
        assert_eq!(query.first("error"), None);
    }

    #[test]
    fn rejects_what_it_cannot_decode() {
        assert_eq!(Query::parse("a=%2"), Err(BadQuery::Escape { at: 0 }));
        assert_eq!(Query::parse("a=xy%zz"), Err(BadQuery::Escape { at: 2 }));
        assert_eq!(Query::parse("a=%ff"), Err(BadQuery::NotUtf8));
    }

    proptest! {
        #[test]
        fn never_panics(raw in "\\PC{0,200}") {
            drop(Query::parse(&raw));
        }

        #[test]
        fn never_panics_on_escapes(raw in "[%&=+;a-fA-F0-9]{0,200}") {
            drop(Query::parse(&raw));
        }

        #[test]
        fn round_trips(pairs in prop::collection::vec((any::<String>(), any::<String>()), 0..8)) {
            let raw: Vec<_> = pairs.iter().map(|(k, v)| format!("{}={}", encode(k), encode(v))).collect();
            prop_assert_eq!(Query::parse(&raw.join("&")).unwrap(), Query(pairs));
        }
    }
}
