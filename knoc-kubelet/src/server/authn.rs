//! Authentication: a client certificate of the cluster's CA, else a bearer token that the API server knows.
//!
//! User names and groups are those of Kubernetes: common name and organizations of the certificate, or the answer of a
//! `TokenReview`. There is no anonymous user. Rejected requests are logged with the peer's address and claimed
//! identity.

use std::sync::Arc;

use http::HeaderMap;
use knoc_link::Origin;
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{connections::ConnectionSlot, tls::Verifier, user::User};

/// The peer of a connection; an extension of every request.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    pub(super) origin: Origin,
    /// The presented certificates, end-entity certificate first.
    pub(super) certificates: Arc<[CertificateDer<'static>]>,
    /// Whether the connection counts as identified or not.
    pub(super) slot: Arc<ConnectionSlot>,
}

/// The user of the certificates that a peer presented, `None` if it presented none; the error says why they are not
/// valid.
pub(super) fn user(
    certificates: &[CertificateDer<'_>],
    verifier: &Verifier,
    now: UnixTime,
) -> Option<Result<User, String>> {
    let (end_entity, intermediates) = certificates.split_first()?;
    let Some(verifier) = verifier else {
        return Some(Err("no client CA is known yet".to_owned()));
    };
    let checked = verifier.verify_client_cert(end_entity, intermediates, now);
    Some(match checked {
        Ok(_) => subject(end_entity),
        Err(error) => Err(error.to_string()),
    })
}

impl Peer {
    /// The user of the peer's certificate, see [`user`].
    pub(super) fn user(&self, verifier: &Verifier, now: UnixTime) -> Option<Result<User, String>> {
        user(&self.certificates, verifier, now)
    }

    /// The subject that the certificate claims, for the log.
    pub(super) fn claims(&self) -> String {
        let Some(certificate) = self.certificates.first() else {
            return "no certificate".to_owned();
        };
        match X509Certificate::from_der(certificate) {
            Ok((_, parsed)) => parsed.subject().to_string(),
            Err(_) => "unreadable certificate".to_owned(),
        }
    }
}

fn subject(certificate: &CertificateDer<'_>) -> Result<User, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
    let name = parsed
        .subject()
        .iter_common_name()
        .find_map(|attribute| attribute.as_str().ok())
        .filter(|name| !name.is_empty())
        .ok_or("the certificate has no common name")?;
    let groups = parsed
        .subject()
        .iter_organization()
        .filter_map(|attribute| attribute.as_str().ok())
        .map(str::to_owned)
        .collect();
    let user = User {
        name: name.to_owned(),
        groups,
        ..User::default()
    };
    Ok(user.authenticated())
}

/// The bearer token of a request.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(http::header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_a_bearer_token_and_nothing_else() {
        let with = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(http::header::AUTHORIZATION, value.parse().unwrap());
            bearer(&headers).map(str::to_owned)
        };
        assert_eq!(with("Bearer abc").as_deref(), Some("abc"));
        assert_eq!(with("bearer  abc ").as_deref(), Some("abc"));
        assert_eq!(with("Basic abc"), None);
        assert_eq!(with("Bearer "), None);
        assert_eq!(bearer(&HeaderMap::new()), None);
    }
}
