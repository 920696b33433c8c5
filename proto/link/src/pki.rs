//! Certificates of the links: a small CA, the certificates that it issues, and the self-signed pairs of the shim's
//! link.
//!
//! Keys are ECDSA P-256. Every certificate allows both TLS roles, since configuration decides which side dials; its
//! identity is a URI SAN ([`Identity`]). `notBefore` is back-dated by [`BACKDATE`], because the clocks of login nodes
//! drift. This module writes no files: its callers choose the folder and the modes.
use std::time::Duration;

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::{Identity, InvalidIdentity};

mod renew;

pub use self::renew::{
    Ancestor, MAX_ANCESTORS, RenewError, Request, WARN_BEFORE, due, ends_soon, is_expiring,
    renewable,
};

/// How far `notBefore` is back-dated: by more than the error of any clock that NTP disciplines.
pub const BACKDATE: Duration = Duration::from_mins(5);
/// The validity period of a CA: ten years.
pub const CA_LIFE: Duration = Duration::from_hours(10 * 365 * 24);
/// The validity period of an issued certificate: one year. It is renewed over the link after 70 % of that.
pub const LEAF_LIFE: Duration = Duration::from_hours(365 * 24);
/// The validity period of a pair of the shim's link. Peers pin its key and do not check its dates.
const PINNED_LIFE: Duration = Duration::from_hours(20 * 365 * 24);
/// How many characters an error shows of the names in a foreign certificate.
const SUBJECT: usize = 200;

/// Why a certificate or key cannot be created or read.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// rcgen cannot create or sign the certificate, or cannot read the CA's key.
    #[error("create the certificate of {subject}")]
    Create {
        /// The name or identity for which it was to be created.
        subject: String,
        /// rcgen's error.
        #[source]
        source: rcgen::Error,
    },
    /// The name is neither a DNS name nor an IP address.
    #[error(
        "{name:?} cannot be a subject alternative name: it is neither a DNS name nor an IP address"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// The text is not PEM, or holds no item of the expected kind.
    #[error("read {what} as PEM")]
    Pem {
        /// The text's role, such as "the certificate".
        what: &'static str,
        /// The parser's error.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// The bytes are not an X.509 certificate in DER.
    #[error("parse the certificate: {text}")]
    Der {
        /// The parser's error.
        text: String,
    },
    /// The identity of the certificate is absent, duplicated or malformed.
    #[error("find the identity of the certificate")]
    Identity {
        /// What is wrong with it.
        #[source]
        source: InvalidIdentity,
    },
    /// The key belongs to none of the certificates in the CA's bundle.
    #[error("the key belongs to none of the CA's certificates")]
    ForeignKey,
    /// A date of the certificate cannot be represented.
    #[error("the certificate's dates are out of range")]
    Dates,
}

/// The validity period of a certificate (RFC 5280, section 4.1.2.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The certificate's `notBefore`.
    pub from: Timestamp,
    /// The certificate's `notAfter`.
    pub until: Timestamp,
}

impl Validity {
    /// A period that ends `life` after `now`, and begins [`BACKDATE`] before it.
    #[must_use]
    pub fn starting(now: Timestamp, life: Duration) -> Self {
        Self {
            from: now.saturating_sub(BACKDATE).unwrap_or(now),
            until: now.saturating_add(life).unwrap_or(Timestamp::MAX),
        }
    }

    /// Sets both dates in the parameters of a certificate. Fails if one is before 1970.
    pub fn apply(self, params: &mut CertificateParams) -> Result<(), PkiError> {
        let seconds = |at: Timestamp| {
            u64::try_from(at.as_second())
                .map(Duration::from_secs)
                .map_err(|_| PkiError::Dates)
        };
        let epoch = date_time_ymd(1970, 1, 1);
        params.not_before = epoch + seconds(self.from)?;
        params.not_after = epoch + seconds(self.until)?;
        Ok(())
    }
}

/// A certificate and its private key, both as PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct CertifiedKey {
    /// The certificate as PEM.
    pub cert_pem: String,
    /// The private key as PKCS#8 PEM. Secret.
    pub key_pem: String,
}

impl std::fmt::Debug for CertifiedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertifiedKey")
            .field("cert_pem", &self.cert_pem)
            .finish_non_exhaustive()
    }
}

/// A certificate authority that issues the certificates of one site.
pub struct Ca {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ca")
            .field("certificate_pem", &self.certificate_pem)
            .finish_non_exhaustive()
    }
}

impl Ca {
    /// Generates a CA that is valid for [`CA_LIFE`] from now.
    pub fn generate(name: &str) -> Result<Self, PkiError> {
        Self::generate_for(name, Validity::starting(Timestamp::now(), CA_LIFE))
    }

    /// Generates a CA with this validity period.
    pub fn generate_for(name: &str, validity: Validity) -> Result<Self, PkiError> {
        let failed = |source| PkiError::Create {
            subject: name.to_owned(),
            source,
        };
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        validity.apply(&mut params)?;
        let certificate_pem = params.self_signed(&key).map_err(failed)?.pem();
        Ok(Self {
            certificate_pem,
            issuer: Issuer::new(params, key),
        })
    }

    /// Parses a CA that was stored as PEM.
    pub fn from_pem(cert_pem: &str, key_pem: &str) -> Result<Self, PkiError> {
        let failed = |source| PkiError::Create {
            subject: "the CA".to_owned(),
            source,
        };
        let key = KeyPair::from_pem(key_pem).map_err(failed)?;
        let issuer = Issuer::from_ca_cert_pem(cert_pem, key).map_err(failed)?;
        Ok(Self {
            certificate_pem: cert_pem.to_owned(),
            issuer,
        })
    }

    /// Parses the certificate to which the key `key_pem` belongs out of `bundle`, which may hold several certificates.
    pub fn from_bundle(bundle: &str, key_pem: &str) -> Result<Self, PkiError> {
        let key = KeyPair::from_pem(key_pem).map_err(|source| PkiError::Create {
            subject: "the CA".to_owned(),
            source,
        })?;
        for der in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
            let der = der.map_err(|source| PkiError::Pem {
                what: "the CA",
                source,
            })?;
            if parse(&der)?.public_key().subject_public_key.data == key.public_key_raw() {
                let pem = pem_of(&der);
                return Self::from_pem(&pem, key_pem);
            }
        }
        Err(PkiError::ForeignKey)
    }

    /// The `notAfter` of the CA's own certificate.
    pub fn valid_until(&self) -> Result<Timestamp, PkiError> {
        let der = CertificateDer::from_pem_slice(self.certificate_pem.as_bytes());
        let der = der.map_err(|source| PkiError::Pem {
            what: "the CA",
            source,
        })?;
        Ok(inspect(&der)?.validity.until)
    }

    /// The CA's certificate as PEM, which peers trust.
    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The CA's key as PEM. Secret; it may be deleted after all certificates were issued.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// Issues a certificate for `identity` that is valid for [`LEAF_LIFE`] from now. `names` are DNS names and IP
    /// addresses that it has in addition, for clients that check host names (such as grpcurl).
    pub fn issue(&self, identity: &Identity, names: &[String]) -> Result<CertifiedKey, PkiError> {
        self.issue_for(
            identity,
            names,
            Validity::starting(Timestamp::now(), LEAF_LIFE),
        )
    }

    /// Does the same as [`Ca::issue`], with this validity period.
    pub fn issue_for(
        &self,
        identity: &Identity,
        names: &[String],
        validity: Validity,
    ) -> Result<CertifiedKey, PkiError> {
        let subject = identity.to_string();
        let failed = |source| PkiError::Create {
            subject: subject.clone(),
            source,
        };
        let params = named(identity, names, validity)?;
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(CertifiedKey {
            cert_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }
}

/// Generates a self-signed pair for the shim's link, whose two sides pin each other's key.
pub fn self_signed(name: &str) -> Result<CertifiedKey, PkiError> {
    let failed = |source| PkiError::Create {
        subject: name.to_owned(),
        source,
    };
    let mut params = leaf(name);
    Validity::starting(Timestamp::now(), PINNED_LIFE).apply(&mut params)?;
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params.self_signed(&key).map_err(failed)?;
    Ok(CertifiedKey {
        cert_pem: certificate.pem(),
        key_pem: key.serialize_pem(),
    })
}

/// The parameters of a certificate for `identity` with the DNS names and IP addresses `names`.
fn named(
    identity: &Identity,
    names: &[String],
    validity: Validity,
) -> Result<CertificateParams, PkiError> {
    let subject = identity.to_string();
    let bad = |name: &str| PkiError::BadName {
        name: name.to_owned(),
    };
    let mut params = leaf(identity.name());
    let uri = subject.as_str().try_into().map_err(|_| bad(&subject))?;
    params.subject_alt_names.push(SanType::URI(uri));
    for name in names {
        params.subject_alt_names.push(match name.parse() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(name.as_str().try_into().map_err(|_| bad(name))?),
        });
    }
    params.use_authority_key_identifier_extension = true;
    validity.apply(&mut params)?;
    Ok(params)
}

fn leaf(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::OrganizationName, "KNoC");
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// What a certificate says about itself. Reading a certificate proves none of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateInfo {
    /// The identity among its URI SANs, or why there is not exactly one.
    pub identity: Result<Identity, InvalidIdentity>,
    /// The issuer's distinguished name.
    pub issuer: String,
    /// The validity period of the certificate.
    pub validity: Validity,
    /// The serial number, written as by [`serial_text`].
    pub serial: String,
    /// SHA-256 of the public key, written as by [`spki_sha256`].
    pub spki: String,
    /// The certificates that this one was renewed from, the oldest first.
    pub ancestors: Vec<Ancestor>,
}

/// Reads what a certificate in DER says about itself.
pub fn inspect(der: &[u8]) -> Result<CertificateInfo, PkiError> {
    let certificate = parse(der)?;
    let date = |seconds| Timestamp::from_second(seconds).map_err(|_| PkiError::Dates);
    let validity = Validity {
        from: date(certificate.validity().not_before.timestamp())?,
        until: date(certificate.validity().not_after.timestamp())?,
    };
    let uris: Vec<&str> = certificate
        .subject_alternative_name()
        .ok()
        .flatten()
        .map(|extension| {
            extension
                .value
                .general_names
                .iter()
                .filter_map(uri)
                .collect()
        })
        .unwrap_or_default();
    let identity = Identity::one_of(&uris);
    let digest = Sha256::digest(certificate.public_key().raw);
    Ok(CertificateInfo {
        identity,
        issuer: certificate.issuer().to_string(),
        validity,
        serial: serial_text(&certificate.serial.to_bytes_be()),
        spki: format!("{digest:x}"),
        ancestors: Ancestor::of(&uris),
    })
}

/// Writes bytes in lower-case hexadecimal digits.
#[must_use]
pub fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for byte in bytes {
        // Writing to a string cannot fail.
        let _infallible = write!(text, "{byte:02x}");
    }
    text
}

/// Writes a serial number in lower-case hexadecimal digits without leading zeros.
#[must_use]
pub fn serial_text(bytes: &[u8]) -> String {
    let text = hexadecimal(bytes);
    let significant = text.trim_start_matches('0');
    if significant.is_empty() {
        "0".to_owned()
    } else {
        significant.to_owned()
    }
}

/// Does the same as [`inspect`] for the first certificate in a PEM text.
pub fn inspect_pem(pem: &str) -> Result<CertificateInfo, PkiError> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|source| PkiError::Pem {
        what: "the certificate",
        source,
    })?;
    inspect(&der)
}

/// The DNS names and IP addresses of the first certificate in a PEM text.
pub fn names_of_pem(pem: &str) -> Result<Vec<String>, PkiError> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|source| PkiError::Pem {
        what: "the certificate",
        source,
    })?;
    let certificate = parse(&der)?;
    let names = certificate.subject_alternative_name().ok().flatten();
    let names = names.map(|names| names.value.general_names.iter().filter_map(name));
    Ok(names.into_iter().flatten().collect())
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    if let GeneralName::DNSName(name) = name {
        return Some((*name).to_owned());
    }
    let GeneralName::IPAddress(bytes) = name else {
        return None;
    };
    let v4 = <[u8; 4]>::try_from(*bytes).map(std::net::IpAddr::from);
    let address = v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(std::net::IpAddr::from));
    address.ok().map(|address| address.to_string())
}

/// The identity in a certificate in DER; an error if there is not exactly one.
pub fn identity(der: &[u8]) -> Result<Identity, PkiError> {
    inspect(der)?
        .identity
        .map_err(|source| PkiError::Identity { source })
}

/// The subject and the issuer of a foreign certificate, as text for an error.
pub(crate) fn subject(der: &[u8]) -> String {
    let Ok(certificate) = parse(der) else {
        return "unreadable".to_owned();
    };
    let mut text = format!(
        "subject {:?}, issuer {:?}",
        certificate.subject().to_string(),
        certificate.issuer().to_string()
    );
    if let Some((cut, _)) = text.char_indices().nth(SUBJECT) {
        text.truncate(cut);
        text.push('…');
    }
    text
}

/// SHA-256 of the certificate's `SubjectPublicKeyInfo` in hexadecimal digits: the value that the shim's link pins.
pub fn spki_sha256(der: &[u8]) -> Result<String, PkiError> {
    let certificate = parse(der)?;
    let digest = Sha256::digest(certificate.public_key().raw);
    Ok(format!("{digest:x}"))
}

/// Does the same as [`spki_sha256`] for the first certificate in a PEM text.
pub fn spki_sha256_of_pem(pem: &str) -> Result<String, PkiError> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|source| PkiError::Pem {
        what: "the certificate",
        source,
    })?;
    spki_sha256(&der)
}

/// Encodes a certificate as PEM.
fn pem_of(der: &[u8]) -> String {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    let text = BASE64_STANDARD.encode(der);
    let lines: Vec<&str> = (0..text.len())
        .step_by(64)
        .filter_map(|at| text.get(at..text.len().min(at + 64)))
        .collect();
    format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        lines.join("\n")
    )
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, PkiError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|error| PkiError::Der {
        text: error.to_string(),
    })?;
    Ok(certificate)
}

fn uri<'a>(name: &GeneralName<'a>) -> Option<&'a str> {
    if let GeneralName::URI(uri) = name {
        Some(uri)
    } else {
        None
    }
}

#[cfg(test)]
mod tests;
