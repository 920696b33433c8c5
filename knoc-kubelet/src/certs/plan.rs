//! PURE: decides when a certificate is replaced. The time is an argument.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};
use knoc_link::pki::{CertifiedKey, PkiError};
use rcgen::{KeyPair, PublicKeyData as _};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::{ORGANIZATION, Wanted};

/// Renewal starts after this part of the lifetime, in thousandths …
const EARLIEST: i128 = 700;
/// … and up to this much later, so that nodes that were created together do not renew together.
const SPREAD: i128 = 200;

/// Why a stored or issued certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// The certificate cannot be parsed.
    #[error("read the certificate")]
    Read {
        /// What is wrong with it.
        #[source]
        source: PkiError,
    },
    /// The key cannot be parsed.
    #[error("read the key")]
    Key {
        /// The error of rcgen.
        #[source]
        source: rcgen::Error,
    },
    /// Certificate and key do not belong together.
    #[error("the key does not belong to the certificate")]
    OtherKey,
}

/// The contents of a certificate that matter here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The time `notBefore`.
    pub from: Timestamp,
    /// The time `notAfter`.
    pub until: Timestamp,
    /// The common name of the subject.
    pub common_name: String,
    /// The organizations of the subject.
    pub organizations: Vec<String>,
    /// The DNS names and IP addresses.
    pub names: BTreeSet<String>,
    /// A number from 0 to 999 from the certificate's bytes: as good as random, and the same after a restart.
    pub lot: u16,
}

impl Facts {
    /// Parses the first certificate of the pair, and checks that the key belongs to it.
    pub fn of(pair: &CertifiedKey) -> Result<Self, Unusable> {
        let read = |source| Unusable::Read { source };
        let der = CertificateDer::from_pem_slice(pair.cert_pem.as_bytes()).map_err(|source| {
            read(PkiError::Pem {
                what: "the certificate",
                source,
            })
        })?;
        let (_, parsed) = X509Certificate::from_der(&der).map_err(|error| {
            read(PkiError::Der {
                text: error.to_string(),
            })
        })?;
        let key = KeyPair::from_pem(&pair.key_pem).map_err(|source| Unusable::Key { source })?;
        if key.subject_public_key_info() != parsed.public_key().raw {
            return Err(Unusable::OtherKey);
        }
        let time = |seconds| Timestamp::from_second(seconds).map_err(|_| read(PkiError::Dates));
        let text = |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| {
            attribute.as_str().ok().map(str::to_owned)
        };
        let subject = parsed.subject();
        let digest = Sha256::digest(&der);
        Ok(Self {
            from: time(parsed.validity().not_before.timestamp())?,
            until: time(parsed.validity().not_after.timestamp())?,
            common_name: subject
                .iter_common_name()
                .find_map(text)
                .unwrap_or_default(),
            organizations: subject.iter_organization().filter_map(text).collect(),
            names: names(&parsed),
            lot: u16::from_be_bytes([digest[0], digest[1]]) % 1000,
        })
    }

    /// Does the certificate have the wanted contents, whatever its dates?
    #[must_use]
    pub fn fits(&self, wanted: &Wanted) -> bool {
        self.common_name == wanted.common_name()
            && self.organizations == [ORGANIZATION]
            && self.names == wanted.names
    }
}

fn names(certificate: &X509Certificate<'_>) -> BTreeSet<String> {
    let extension = certificate.subject_alternative_name().ok().flatten();
    let names = extension.map(|extension| extension.value.general_names.iter());
    names
        .into_iter()
        .flatten()
        .filter_map(|name| {
            if let GeneralName::DNSName(name) = name {
                Some((*name).to_owned())
            } else if let GeneralName::IPAddress(bytes) = name {
                address(bytes)
            } else {
                None
            }
        })
        .collect()
}

fn address(bytes: &[u8]) -> Option<String> {
    let four = <[u8; 4]>::try_from(bytes).map(|bytes| std::net::IpAddr::from(bytes).to_string());
    let sixteen =
        <[u8; 16]>::try_from(bytes).map(|bytes| std::net::IpAddr::from(bytes).to_string());
    four.or(sixteen).ok()
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing before this time.
    Keep(Timestamp),
    /// Obtain a new certificate.
    Obtain(Why),
}

/// Why a new certificate is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// There is no certificate.
    None,
    /// It is for another node or other addresses.
    Other,
    /// It has expired, or is not valid yet.
    Expired,
    /// It is in the last part of its lifetime.
    Due,
}

impl Why {
    /// The reason for logs and Events.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::None => "there is no certificate",
            Self::Other => "the node's name or addresses have changed",
            Self::Expired => "it is not valid now",
            Self::Due => "it is due to be renewed",
        }
    }
}

/// When a certificate is to be renewed: between 70 and 90 % of its lifetime, at a point that its own bytes determine.
#[must_use]
pub fn renew_at(facts: &Facts) -> Timestamp {
    let life = facts.until.duration_since(facts.from).as_nanos().max(0);
    let part = EARLIEST * 1000 + SPREAD * i128::from(facts.lot);
    let after = SignedDuration::from_nanos_i128(life / 1_000_000 * part);
    facts.from.saturating_add(after).unwrap_or(facts.until)
}

/// May the certificate be used now?
#[must_use]
pub fn is_valid(facts: &Facts, now: Timestamp) -> bool {
    facts.from <= now && now < facts.until
}

/// Decides what to do about the certificate `have`.
#[must_use]
pub fn step(have: Option<&Facts>, wanted: &Wanted, now: Timestamp) -> Step {
    let Some(facts) = have else {
        return Step::Obtain(Why::None);
    };
    if !is_valid(facts, now) {
        return Step::Obtain(Why::Expired);
    }
    if !facts.fits(wanted) {
        return Step::Obtain(Why::Other);
    }
    let due = renew_at(facts);
    if due <= now {
        Step::Obtain(Why::Due)
    } else {
        Step::Keep(due)
    }
}
