//! Renewal of a certificate over the link: the request, what the CA makes of it, and when it is time.
//!
//! The CA looks at nothing of a request but its public key and its signature. Identity and life are those of the
//! certificate that the peer proved to hold, so a renewal never widens anything. The new certificate names every
//! certificate that it descends from (a URI among its subject alternative names for each), so that a denial of any of
//! them covers it. See ADR 0075.
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rcgen::{
    CertificateSigningRequestParams, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData as _, SanType,
};
use rustls_pki_types::CertificateSigningRequestDer;

use super::{BACKDATE, Ca, CertificateInfo, LEAF_LIFE, PkiError, Validity, common_name, leaf};
use crate::InvalidIdentity;

/// How often a certificate can be renewed before a new one has to be made by hand: it names all that went before, and
/// the list must not grow without limit, nor be cut, which would lose a denial.
pub const MAX_ANCESTORS: usize = 64;
/// A certificate that ends sooner is worth a warning.
pub const WARN_BEFORE: Duration = Duration::from_hours(30 * 24);
/// What a URI that names an ancestor begins with.
const RENEWED_FROM: &str = "knoc://renewed-from/";
/// Larger requests are not looked at; one of ours has some 200 bytes.
const MAX_REQUEST: usize = 4096;

/// A certificate that another one was renewed from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ancestor {
    /// Its serial number.
    pub serial: String,
    /// SHA-256 of its public key.
    pub spki: String,
}

impl Ancestor {
    /// Those among the URIs of a certificate.
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

/// Why a certificate is not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// The request is none, is too large, or is not signed by its own key.
    #[error("read the certificate signing request")]
    Request {
        /// What rcgen said.
        #[source]
        source: rcgen::Error,
    },
    /// Too large to be a request.
    #[error("the certificate signing request has {size} bytes; the limit is {MAX_REQUEST}")]
    Large {
        /// Its size.
        size: usize,
    },
    /// Another kind of key.
    #[error("the key of the request is not ECDSA P-256")]
    Key,
    /// The held certificate has no identity.
    #[error("find the identity of the certificate")]
    Identity {
        /// What is wrong with it.
        #[source]
        source: InvalidIdentity,
    },
    /// Half of its life is still to come.
    #[error(
        "the certificate is valid from {from} until {until}: it can be renewed from {after} on"
    )]
    Early {
        /// `notBefore`
        from: Timestamp,
        /// `notAfter`
        until: Timestamp,
        /// From when on it can.
        after: Timestamp,
    },
    /// Its life is over.
    #[error("the certificate ended at {until}: make a new one with `knoc-agent init --site SITE`")]
    Expired {
        /// `notAfter`
        until: Timestamp,
    },
    /// It was renewed too often.
    #[error(
        "the certificate was renewed {MAX_ANCESTORS} times, which is the limit: make a new one with `knoc-agent init --site SITE`"
    )]
    Often,
    /// The CA is about to end, or has ended.
    #[error(
        "the CA ends at {until}: a new CA is needed (move the tls folder away and run `knoc-agent init --site SITE`)"
    )]
    CaEnds {
        /// Its `notAfter`.
        until: Timestamp,
    },
    /// The certificate cannot be made.
    #[error("issue the certificate")]
    Issue {
        /// Why not.
        #[from]
        source: PkiError,
    },
}

/// A key and the request for a certificate of it.
pub struct Request {
    /// PKCS#8 PEM. Secret.
    pub key_pem: String,
    /// The request, PKCS#10 DER.
    pub der: Vec<u8>,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request").finish_non_exhaustive()
    }
}

impl Request {
    /// A new key, and a request signed by it. `name` is only for people: the CA does not look at it.
    pub fn generate(name: &str) -> Result<Self, PkiError> {
        let made = |source| PkiError::Make {
            subject: name.to_owned(),
            source,
        };
        let key = KeyPair::generate().map_err(made)?;
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = common_name(name);
        let request = params.serialize_request(&key).map_err(made)?;
        Ok(Self {
            key_pem: key.serialize_pem(),
            der: request.der().to_vec(),
        })
    }
}

/// When this part of a certificate's life is over, back-dating aside. Of a longer life than [`LEAF_LIFE`] the last part of
/// that length counts, so that the renewal never ends before what it renews.
fn share(validity: Validity, percent: u32) -> Timestamp {
    let left = life(validity).min(LEAF_LIFE) / 100 * (100 - percent.min(100));
    validity
        .until
        .saturating_sub(left)
        .unwrap_or(validity.until)
}

/// When a certificate should be renewed: at 70 % of its life.
#[must_use]
pub fn due(validity: Validity) -> Timestamp {
    share(validity, 70)
}

/// From when on the agent renews it: after half of its life.
#[must_use]
pub fn renewable(validity: Validity) -> Timestamp {
    share(validity, 50)
}

/// Is it worth a warning: does it end within [`WARN_BEFORE`]?
#[must_use]
pub fn is_expiring(validity: Validity, now: Timestamp) -> bool {
    ends_soon(validity.until, now)
}

/// The same by its end alone.
#[must_use]
pub fn ends_soon(until: Timestamp, now: Timestamp) -> bool {
    let left = until.duration_since(now);
    SignedDuration::try_from(WARN_BEFORE).is_ok_and(|soon| left <= soon)
}

impl Ca {
    /// A new certificate for the key of `request`, with the identity of the certificate that the peer holds and no
    /// other name, that lives as long as that one was made for, at most [`LEAF_LIFE`]. Answers the PEM text.
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
        let signed = signed.map_err(|source| PkiError::Make {
            subject: identity.to_string(),
            source,
        })?;
        Ok(signed.pem())
    }
}

impl Ca {
    /// A new certificate for the holder of the CA's key itself: for the same key, identity and names as `held`, that lives
    /// as long as that one was made for. Answers the PEM text.
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
        let key = KeyPair::from_pem(key).map_err(|source| PkiError::Make {
            subject: identity.to_string(),
            source,
        })?;
        let params = super::named(&identity, &names, validity)?;
        let signed = params.signed_by(&key, &self.issuer);
        let signed = signed.map_err(|source| PkiError::Make {
            subject: identity.to_string(),
            source,
        })?;
        Ok(signed.pem())
    }
}

/// The key of a request that is signed by it.
fn public_key(request: &[u8]) -> Result<rcgen::PublicKey, RenewError> {
    if request.len() > MAX_REQUEST {
        let size = request.len();
        return Err(RenewError::Large { size });
    }
    let der = CertificateSigningRequestDer::from(request);
    let request = CertificateSigningRequestParams::from_der(&der)
        .map_err(|source| RenewError::Request { source })?;
    let key = request.public_key;
    // An uncompressed point of the curve.
    if *key.algorithm() == PKCS_ECDSA_P256_SHA256 && key.der_bytes().len() == 65 {
        Ok(key)
    } else {
        Err(RenewError::Key)
    }
}

/// For how long a certificate was made, without its back-dating.
fn life(validity: Validity) -> Duration {
    let whole = validity.until.duration_since(validity.from);
    let whole = Duration::try_from(whole).unwrap_or_default();
    let forward = whole.checked_sub(BACKDATE).filter(|life| !life.is_zero());
    forward.unwrap_or(whole)
}

#[cfg(test)]
mod tests;
