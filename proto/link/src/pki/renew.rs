//! Renewal of a certificate over the link: the request, the CA's answer to it, and the time for it.
//!
//! Of a request, the CA uses only the public key and the signature. Identity and validity period are those of the
//! certificate that the peer has proved to hold, so a renewal never grants anything new. The new certificate names
//! every certificate that it descends from (each by a URI among its subject alternative names), so denying any of them
//! denies it too. See ADR 0075.
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rcgen::{
    CertificateSigningRequestParams, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData as _, SanType,
};
use rustls_pki_types::CertificateSigningRequestDer;

use super::{BACKDATE, Ca, CertificateInfo, LEAF_LIFE, PkiError, Validity, common_name, leaf};
use crate::InvalidIdentity;

/// How often a certificate can be renewed before a new one must be created by hand. Each certificate names all its
/// ancestors; that list must neither grow without limit nor be shortened, which would lose a denial.
pub const MAX_ANCESTORS: usize = 64;
/// A certificate that ends within this time is worth a warning.
pub const WARN_BEFORE: Duration = Duration::from_hours(30 * 24);
/// The prefix of a URI that names an ancestor.
const RENEWED_FROM: &str = "knoc://renewed-from/";
/// The largest request in bytes; one of ours has about 200 bytes.
const MAX_REQUEST: usize = 4096;

/// A certificate from which another one was renewed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ancestor {
    /// The serial number, written as by [`serial_text`](super::serial_text).
    pub serial: String,
    /// SHA-256 of the public key, written as by [`spki_sha256`](super::spki_sha256).
    pub spki: String,
}

impl Ancestor {
    /// The ancestors among the URIs of a certificate.
    pub(super) fn of(uris: &[&str]) -> Vec<Self> {
        let named = uris.iter().filter_map(|uri| uri.strip_prefix(RENEWED_FROM));
        let split = named.filter_map(|rest| rest.split_once('/'));
        split
            .map(|(serial, spki)| Self {
                serial: serial.to_owned(),
                spki: spki.to_owned(),
            })
            .collect()
    }

    fn uri(&self) -> String {
        format!("{RENEWED_FROM}{}/{}", self.serial, self.spki)
    }
}

/// Why a certificate cannot be renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// The bytes are not a certificate signing request (PKCS#10), or it is not signed by its own key.
    #[error("read the certificate signing request")]
    Request {
        /// rcgen's error.
        #[source]
        source: rcgen::Error,
    },
    /// The request is too large.
    #[error("the certificate signing request has {size} bytes; the limit is {MAX_REQUEST}")]
    Large {
        /// The size of the request in bytes.
        size: usize,
    },
    /// The key of the request is of an unsupported kind.
    #[error("the key of the request is not ECDSA P-256")]
    Key,
    /// The certificate that the peer holds has no identity.
    #[error("find the identity of the certificate")]
    Identity {
        /// What is wrong with it.
        #[source]
        source: InvalidIdentity,
    },
    /// The certificate has not reached half of its validity period.
    #[error(
        "the certificate is valid from {from} until {until}: it can be renewed from {after} on"
    )]
    Early {
        /// The certificate's `notBefore`.
        from: Timestamp,
        /// The certificate's `notAfter`.
        until: Timestamp,
        /// The time from which on the certificate can be renewed.
        after: Timestamp,
    },
    /// The certificate has expired.
    #[error(
        "the certificate expired at {until}: create a new one with `knoc-agent init --site SITE`"
    )]
    Expired {
        /// The certificate's `notAfter`.
        until: Timestamp,
    },
    /// The certificate has been renewed [`MAX_ANCESTORS`] times.
    #[error(
        "the certificate was renewed {MAX_ANCESTORS} times, which is the limit: create a new one with `knoc-agent init --site SITE`"
    )]
    Often,
    /// The CA would expire before the renewed certificate.
    #[error(
        "the CA ends at {until}: a new CA is needed (move the tls folder away and run `knoc-agent init --site SITE`)"
    )]
    CaEnds {
        /// The CA's `notAfter`.
        until: Timestamp,
    },
    /// The new certificate cannot be created.
    #[error("issue the certificate")]
    Issue {
        /// The cause.
        #[from]
        source: PkiError,
    },
}

/// A new key and the request for a certificate of it.
pub struct Request {
    /// The private key as PKCS#8 PEM. Secret.
    pub key_pem: String,
    /// The request as PKCS#10 in DER.
    pub der: Vec<u8>,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request").finish_non_exhaustive()
    }
}

impl Request {
    /// Generates a key, and a request signed by it. `name` becomes the subject's common name, which the CA ignores.
    pub fn generate(name: &str) -> Result<Self, PkiError> {
        let failed = |source| PkiError::Create {
            subject: name.to_owned(),
            source,
        };
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = common_name(name);
        let request = params.serialize_request(&key).map_err(failed)?;
        Ok(Self {
            key_pem: key.serialize_pem(),
            der: request.der().to_vec(),
        })
    }
}

/// The time at which `percent` of a certificate's validity period are over, without the back-dating. Of a period longer
/// than [`LEAF_LIFE`] only the last part of that length counts, so that the renewed certificate never ends before the
/// old one.
fn share(validity: Validity, percent: u32) -> Timestamp {
    let left = life(validity).min(LEAF_LIFE) / 100 * (100 - percent.min(100));
    validity
        .until
        .saturating_sub(left)
        .unwrap_or(validity.until)
}

/// When the holder of a certificate should renew it: after 70 % of its validity period.
#[must_use]
pub fn due(validity: Validity) -> Timestamp {
    share(validity, 70)
}

/// From when on the agent renews a certificate: after half of its validity period.
#[must_use]
pub fn renewable(validity: Validity) -> Timestamp {
    share(validity, 50)
}

/// Whether a certificate that is still valid ends within [`WARN_BEFORE`].
#[must_use]
pub fn is_expiring(validity: Validity, now: Timestamp) -> bool {
    ends_soon(validity.until, now)
}

/// Whether the time `until` is less than [`WARN_BEFORE`] after `now`.
#[must_use]
pub fn ends_soon(until: Timestamp, now: Timestamp) -> bool {
    let left = until.duration_since(now);
    SignedDuration::try_from(WARN_BEFORE).is_ok_and(|soon| left <= soon)
}

impl Ca {
    /// Issues a certificate for the key of `request`, with the identity of the certificate that the peer holds and no
    /// other name. It is valid as long as that one originally was, but at most [`LEAF_LIFE`]. Returns it as PEM.
    pub fn renew(
        &self,
        held: &CertificateInfo,
        request: &[u8],
        now: Timestamp,
    ) -> Result<String, RenewError> {
        let public_key = public_key(request)?;
        let identity = held.identity.clone();
        let identity = identity.map_err(|source| RenewError::Identity { source })?;
        let after = renewable(held.validity);
        if now < after {
            let Validity { from, until } = held.validity;
            return Err(RenewError::Early { from, until, after });
        }
        if now > held.validity.until {
            let until = held.validity.until;
            return Err(RenewError::Expired { until });
        }
        if held.ancestors.len() >= MAX_ANCESTORS {
            return Err(RenewError::Often);
        }
        let mut validity = Validity::starting(now, life(held.validity).min(LEAF_LIFE));
        let ca_ends = self.valid_until()?;
        validity.until = validity.until.min(ca_ends);
        if validity.until <= held.validity.until {
            return Err(RenewError::CaEnds { until: ca_ends });
        }
        let mut params = leaf(identity.name());
        let own = Ancestor {
            serial: held.serial.clone(),
            spki: held.spki.clone(),
        };
        let ancestors = held.ancestors.iter().chain([&own]).map(Ancestor::uri);
        for uri in std::iter::once(identity.to_string()).chain(ancestors) {
            let name = uri.as_str().try_into();
            let name = name.map_err(|_| PkiError::BadName { name: uri.clone() })?;
            params.subject_alt_names.push(SanType::URI(name));
        }
        params.use_authority_key_identifier_extension = true;
        validity.apply(&mut params)?;
        let signed = params.signed_by(&public_key, &self.issuer);
        let signed = signed.map_err(|source| PkiError::Create {
            subject: identity.to_string(),
            source,
        })?;
        Ok(signed.pem())
    }
}

impl Ca {
    /// Issues a certificate to the holder of the CA's key itself: with the key, identity and names of `held`, and valid
    /// as long as that one originally was. Returns it as PEM.
    pub fn renew_own(&self, held: &str, key: &str, now: Timestamp) -> Result<String, RenewError> {
        let info = super::inspect_pem(held)?;
        let identity = info.identity.clone();
        let identity = identity.map_err(|source| RenewError::Identity { source })?;
        let names = super::names_of_pem(held)?;
        let mut validity = Validity::starting(now, life(info.validity).min(LEAF_LIFE));
        let ca_ends = self.valid_until()?;
        validity.until = validity.until.min(ca_ends);
        if validity.until <= info.validity.until {
            return Err(RenewError::CaEnds { until: ca_ends });
        }
        let key = KeyPair::from_pem(key).map_err(|source| PkiError::Create {
            subject: identity.to_string(),
            source,
        })?;
        let params = super::named(&identity, &names, validity)?;
        let signed = params.signed_by(&key, &self.issuer);
        let signed = signed.map_err(|source| PkiError::Create {
            subject: identity.to_string(),
            source,
        })?;
        Ok(signed.pem())
    }
}

/// The public key of a request, whose signature by that key has been checked.
fn public_key(request: &[u8]) -> Result<rcgen::PublicKey, RenewError> {
    if request.len() > MAX_REQUEST {
        let size = request.len();
        return Err(RenewError::Large { size });
    }
    let der = CertificateSigningRequestDer::from(request);
    let request = CertificateSigningRequestParams::from_der(&der)
        .map_err(|source| RenewError::Request { source })?;
    let key = request.public_key;
    // An uncompressed point of the curve (SEC 1, section 2.3.3).
    if *key.algorithm() == PKCS_ECDSA_P256_SHA256 && key.der_bytes().len() == 65 {
        Ok(key)
    } else {
        Err(RenewError::Key)
    }
}

/// The length of a validity period without its back-dating.
fn life(validity: Validity) -> Duration {
    let whole = validity.until.duration_since(validity.from);
    let whole = Duration::try_from(whole).unwrap_or_default();
    let forward = whole.checked_sub(BACKDATE).filter(|life| !life.is_zero());
    forward.unwrap_or(whole)
}

#[cfg(test)]
mod tests;
