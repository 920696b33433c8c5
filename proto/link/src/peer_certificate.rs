//! The certificate that a peer presented in its handshake, and whether the CA accepts it at any later time.
//!
//! A handshake proves once that the peer holds the key. Whether the certificate is still valid is checked again for
//! every request: since then it may have expired, the CA may have been replaced, or the site may have denied it (ADR
//! 0050).
use std::{fmt, sync::Arc};

use jiff::Timestamp;
use rustls::{
    CertificateError, RootCertStore,
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, UnixTime};

use super::verifier::provider;
use crate::pki::{self, CertificateInfo, PkiError};

/// The certificate that a peer presented, with its chain. Cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerCertificate(Arc<Inner>);

#[derive(PartialEq, Eq)]
struct Inner {
    /// The peer's own certificate first, then the intermediate ones.
    chain: Vec<CertificateDer<'static>>,
    info: CertificateInfo,
}

impl fmt::Debug for PeerCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerCertificate")
            .field("serial", &self.info().serial)
            .field("spki", &self.info().spki)
            .finish_non_exhaustive()
    }
}

impl PeerCertificate {
    /// Reads the chain that a handshake received. Fails if it is empty or its first certificate cannot be parsed.
    pub fn of(chain: Option<&[CertificateDer<'static>]>) -> Result<Self, PkiError> {
        let chain = chain.unwrap_or_default().to_vec();
        let info = pki::inspect(chain.first().map_or(&[], |der| der))?;
        Ok(Self(Arc::new(Inner { chain, info })))
    }

    /// What the certificate says about itself.
    #[must_use]
    pub fn info(&self) -> &CertificateInfo {
        &self.0.info
    }
}

/// The CA certificates that are trusted at present.
#[derive(Clone)]
pub struct Trust(Arc<dyn ClientCertVerifier>);

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Trust")
    }
}

/// Why a certificate is no longer accepted.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Untrusted {
    /// The certificate has expired.
    #[error("the certificate expired at {until}; it is {now} here")]
    Expired {
        /// The certificate's `notAfter`.
        until: Timestamp,
        /// The time of this host's clock.
        now: Timestamp,
    },
    /// The certificate is not valid yet.
    #[error(
        "the certificate is valid only from {from} on and it is {now} here: compare the clocks of both sides"
    )]
    Early {
        /// The certificate's `notBefore`.
        from: Timestamp,
        /// The time of this host's clock.
        now: Timestamp,
    },
    /// No CA that is trusted at present has issued the certificate.
    #[error("the certificate was not issued by the CA that is trusted now")]
    UnknownIssuer {
        /// rustls' error.
        #[source]
        source: rustls::Error,
    },
}

impl Trust {
    pub(super) fn new(roots: Arc<RootCertStore>) -> Result<Self, rustls::Error> {
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
        let verifier = verifier.map_err(|error| rustls::Error::General(error.to_string()))?;
        Ok(Self(verifier))
    }

    /// Checks that the certificate is valid at the time `now`.
    pub fn check(&self, certificate: &PeerCertificate, now: Timestamp) -> Result<(), Untrusted> {
        let validity = certificate.info().validity;
        if now > validity.until {
            let until = validity.until;
            return Err(Untrusted::Expired { until, now });
        }
        if now < validity.from {
            let from = validity.from;
            return Err(Untrusted::Early { from, now });
        }
        self.check_chain(certificate, now)
    }

    /// Checks everything but the dates, for a certificate that has been renewed since.
    pub fn check_expired(&self, certificate: &PeerCertificate) -> Result<(), Untrusted> {
        self.check_chain(certificate, certificate.info().validity.until)
    }

    fn check_chain(&self, certificate: &PeerCertificate, at: Timestamp) -> Result<(), Untrusted> {
        let untrusted = |source| Untrusted::UnknownIssuer { source };
        let [end_entity, intermediates @ ..] = certificate.0.chain.as_slice() else {
            return Err(untrusted(CertificateError::BadEncoding.into()));
        };
        let seconds = u64::try_from(at.as_second()).unwrap_or_default();
        let at = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
        let verified = self.0.verify_client_cert(end_entity, intermediates, at);
        verified.map(drop).map_err(untrusted)
    }
}
