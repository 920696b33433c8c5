//! PURE: makes certificate requests for the signers of Kubernetes, and self-signed certificates. Only new keys are
//! random.
//!
//! Keys are ECDSA P-256, which cannot encipher, so "key encipherment" is not requested. The subject has one
//! organization, `system:nodes`, and the common name `system:node:NAME`; a serving request also has DNS names and
//! addresses, and nothing else.

use knoc_link::pki::{CertifiedKey, PkiError, Validity};
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PublicKeyData as _, SanType,
};
use sha2::{Digest as _, Sha256};

use super::{ORGANIZATION, Purpose, Wanted};

/// How much of the node's name an object's name takes; the limit for the whole name is 253 characters.
const NODE_IN_NAME: usize = 200;

/// A request for one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The name of its object, which is the same for the same key and contents.
    pub name: String,
    /// The request as PEM, `CERTIFICATE REQUEST`.
    pub pem: String,
    /// What the certificate is for.
    pub purpose: Purpose,
}

/// Generates a key, as PKCS#8 PEM.
pub fn key() -> Result<String, PkiError> {
    let key = KeyPair::generate().map_err(|source| made("a key", source))?;
    Ok(key.serialize_pem())
}

/// Makes the request for a wanted certificate with this key.
pub fn request(wanted: &Wanted, key_pem: &str) -> Result<Request, PkiError> {
    let subject = wanted.common_name();
    let key = KeyPair::from_pem(key_pem).map_err(|source| made(&subject, source))?;
    let request = params(wanted)?.serialize_request(&key);
    let pem = request
        .and_then(|request| request.pem())
        .map_err(|source| made(&subject, source))?;
    Ok(Request {
        name: name(wanted, &key),
        pem,
        purpose: wanted.purpose,
    })
}

fn name(wanted: &Wanted, key: &KeyPair) -> String {
    let mut digest = Sha256::new();
    digest.update(key.subject_public_key_info());
    digest.update(wanted.purpose.signer());
    for name in &wanted.names {
        digest.update([0]);
        digest.update(name);
    }
    let hex = format!("{:x}", digest.finalize());
    let node: String = wanted.node.chars().take(NODE_IN_NAME).collect();
    let node = node.trim_end_matches(['.', '-']);
    format!("knoc-{}-{node}-{hex:.16}", wanted.purpose.name())
}

/// Makes a self-signed pair.
pub fn self_signed(wanted: &Wanted, validity: Validity) -> Result<CertifiedKey, PkiError> {
    let subject = wanted.common_name();
    let mut params = params(wanted)?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![match wanted.purpose {
        Purpose::Serving => ExtendedKeyUsagePurpose::ServerAuth,
        Purpose::Client => ExtendedKeyUsagePurpose::ClientAuth,
    }];
    validity.apply(&mut params)?;
    let key = KeyPair::generate().map_err(|source| made(&subject, source))?;
    let certificate = params
        .self_signed(&key)
        .map_err(|source| made(&subject, source))?;
    Ok(CertifiedKey {
        cert_pem: certificate.pem(),
        key_pem: key.serialize_pem(),
    })
}

fn params(wanted: &Wanted) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, ORGANIZATION);
    subject.push(DnType::CommonName, wanted.common_name());
    params.distinguished_name = subject;
    for name in &wanted.names {
        let bad = |_| PkiError::BadName { name: name.clone() };
        params.subject_alt_names.push(match name.parse() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(name.as_str().try_into().map_err(bad)?),
        });
    }
    Ok(params)
}

fn made(subject: &str, source: rcgen::Error) -> PkiError {
    PkiError::Create {
        subject: subject.to_owned(),
        source,
    }
}
