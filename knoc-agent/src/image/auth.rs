//! PURE: parses how a registry asks for a token, and the token that it then issues.
//!
//! Both come from an untrusted server: their sizes are bounded, and the parts that are used are
//! checked here.

use std::time::Duration;

use http::HeaderValue;
use serde::Deserialize;

/// The longest `WWW-Authenticate` header that is accepted.
pub(super) const MAX_CHALLENGE: usize = 8 * 1024;
/// How many `WWW-Authenticate` headers are parsed.
const MAX_CHALLENGES: usize = 8;
/// The largest answer that holds a token.
pub(super) const MAX_TOKEN: usize = 64 * 1024;
/// The longest token; servers do not accept longer headers.
const MAX_BEARER: usize = 16 * 1024;
/// The lifetime of a token without `expires_in`, according to the specification.
const LIFETIME: Duration = Duration::from_mins(1);
/// A token is not used this long before it expires.
const MARGIN: Duration = Duration::from_secs(10);
/// The longest lifetime that is accepted, whatever the answer says.
const LONGEST: Duration = Duration::from_hours(1);

/// What a registry demands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A user name and a password.
    Basic,
    /// A token.
    Bearer(Realm),
}

/// Where a token can be requested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Realm {
    pub(super) url: String,
    pub(super) service: Option<String>,
    pub(super) scope: Option<String>,
}

/// The challenge in the headers of a 401 response, `Bearer` before `Basic`.
pub(super) fn challenge<'a>(
    headers: impl Iterator<Item = &'a [u8]>,
) -> Result<Challenge, &'static str> {
    let mut basic = false;
    for header in headers.take(MAX_CHALLENGES) {
        let text = std::str::from_utf8(header).ok();
        let Some(text) = text.filter(|text| text.len() <= MAX_CHALLENGE) else {
            return Err("its WWW-Authenticate header is too long or not text");
        };
        let Ok(all) = http_auth::parse_challenges(text) else {
            return Err("its WWW-Authenticate header cannot be read");
        };
        for one in all {
            basic |= one.scheme.eq_ignore_ascii_case("basic");
            if !one.scheme.eq_ignore_ascii_case("bearer") {
                continue;
            }
            let value = |name: &str| {
                let mut found = one.params.iter();
                let found = found.find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.to_unescaped())
            };
            let url = value("realm").ok_or("its WWW-Authenticate header names no realm")?;
            return Ok(Challenge::Bearer(Realm {
                url,
                service: value("service"),
                scope: value("scope"),
            }));
        }
    }
    if basic {
        return Ok(Challenge::Basic);
    }
    Err("it asks for credentials of an unknown kind")
}

/// The URL that issues the token: the realm with its query.
pub(super) fn token_url(challenge: &Realm, scope: &str) -> String {
    let realm = challenge.url.split('#').next();
    let mut url = realm.unwrap_or_default().to_owned();
    let scope = challenge.scope.as_deref().unwrap_or(scope);
    let service = challenge.service.as_deref();
    for (name, value) in [("service", service), ("scope", Some(scope))] {
        let Some(value) = value else { continue };
        url.push(if url.contains('?') { '&' } else { '?' });
        url.push_str(name);
        url.push('=');
        let plain = percent_encoding::NON_ALPHANUMERIC;
        url.extend(percent_encoding::utf8_percent_encode(value, plain));
    }
    url
}

/// A token, and how long it may be used.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Token {
    pub(super) bearer: HeaderValue,
    pub(super) lifetime: Duration,
}

/// The header with a token.
pub(super) fn bearer(token: &str) -> Result<HeaderValue, String> {
    if token.len() > MAX_BEARER {
        return Err(format!("its token is longer than {MAX_BEARER} bytes"));
    }
    let bearer = HeaderValue::try_from(format!("Bearer {token}"));
    let mut bearer = bearer
        .map_err(|_| "its token holds characters that a header may not contain".to_owned())?;
    bearer.set_sensitive(true);
    Ok(bearer)
}

/// Parses the answer of a realm.
pub(super) fn token(body: &[u8]) -> Result<Token, String> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
        expires_in: Option<u64>,
    }
    let answer: Answer = serde_json::from_slice(body)
        .map_err(|error| format!("its answer is not a token: {error}"))?;
    let given = [answer.token, answer.access_token];
    let token = given.into_iter().flatten().find(|token| !token.is_empty());
    let bearer = bearer(&token.ok_or("its answer holds no token")?)?;
    let lifetime = answer.expires_in.map_or(LIFETIME, Duration::from_secs);
    let lifetime = lifetime.min(LONGEST).saturating_sub(MARGIN);
    Ok(Token { bearer, lifetime })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Realm, &'static str> {
        match challenge([text.as_bytes()].into_iter())? {
            Challenge::Bearer(realm) => Ok(realm),
            Challenge::Basic => Err("basic"),
        }
    }

    #[test]
    fn challenges_of_registries() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/busybox:pull""#;
        let found = read(hub).unwrap();
        assert_eq!(
            token_url(&found, "other"),
            "https://auth.docker.io/token?service=registry%2Edocker%2Eio&scope=repository%3Alibrary%2Fbusybox%3Apull"
        );
        let found = read(r#"bearer Realm="https://a.b/t?x=1""#).unwrap();
        assert_eq!(
            token_url(&found, "repository:x:pull"),
            "https://a.b/t?x=1&scope=repository%3Ax%3Apull"
        );
        assert_eq!(read(r#"Basic realm="x""#), Err("basic"));
        let both = [&b"Basic realm=\"x\""[..], b"Bearer realm=\"https://a.b/t\""];
        assert!(matches!(
            challenge(both.into_iter()),
            Ok(Challenge::Bearer(_))
        ));
        assert!(read("Bearer service=\"x\"").unwrap_err().contains("realm"));
        assert!(read("Negotiate").is_err());
        assert!(read("\u{0}").is_err());
        assert!(read(&format!("Bearer realm=\"{}\"", "a".repeat(MAX_CHALLENGE))).is_err());
        assert!(challenge(std::iter::empty()).is_err());
    }

    #[test]
    fn tokens_of_realms() {
        let token = |text: &str| super::token(text.as_bytes());
        let given = token(r#"{"access_token":"abc","expires_in":300}"#).unwrap();
        assert_eq!(given.bearer, "Bearer abc");
        assert_eq!(given.lifetime, Duration::from_secs(290));
        assert_eq!(
            token(r#"{"token":"a"}"#).unwrap().lifetime,
            Duration::from_secs(50)
        );
        for bad in [
            "",
            "{}",
            r#"{"token":""}"#,
            r#"{"token":"a\r\nX: y"}"#,
            r#"{"token":7}"#,
        ] {
            assert!(token(bad).is_err(), "{bad}");
        }
        let forever = token(r#"{"token":"a","expires_in":18446744073709551615}"#);
        assert!(forever.unwrap().lifetime < LONGEST);
    }
}
