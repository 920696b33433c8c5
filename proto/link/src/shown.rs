//! The certificate that a peer showed in its handshake, and what the CA says of it at any later time.
//!
//! A handshake proves that the peer holds the key, once. Whether the certificate still counts is asked again for every
//! request: it may have expired since, the CA may have been replaced, or the site may have denied it.
use std::{fmt, sync::Arc};

use jiff::Timestamp;
use rustls::{
    CertificateError, RootCertStore,
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, UnixTime};

use super::verifier::provider;
use crate::pki::{self, CertificateInfo, PkiError};

/// A peer's certificate. Cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct Shown(Arc<Inner>);

#[derive(PartialEq, Eq)]
struct Inner {
    /// The certificate first, then those that lead to the CA.
    chain: Vec<CertificateDer<'static>>,
    info: CertificateInfo,
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shown")
            .field("serial", &self.info().serial)
            .field("spki", &self.info().spki)
            .finish_non_exhaustive()
    }
}

impl Shown {
    /// Of the chain that a handshake brought; an empty one is an error.
    pub fn of(chain: Option<&[CertificateDer<'static>]>) -> Result<Self, PkiError> {
        let chain = chain.unwrap_or_default().to_vec();
        let info = pki::inspect(chain.first().map_or(&[], |der| der))?;
        Ok(Self(Arc::new(Inner { chain, info })))
    }

    /// What the certificate says of itself.
    #[must_use]
    pub fn info(&self) -> &CertificateInfo {
        &self.0.info
    }
}

/// The CA certificates that are trusted now.
#[derive(Clone)]
pub struct Trust(Arc<dyn ClientCertVerifier>);

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Trust")
    }
}

/// Why a certificate does not count any more.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Untrusted {
    /// It has ended.
    #[error("the certificate expired at {until}; it is {now} here")]
    Expired {
        /// `notAfter`
        until: Timestamp,
        /// Our clock.
        now: Timestamp,
    },
    /// It has not begun.
    #[error(
        "the certificate is valid only from {from} on and it is {now} here: compare the clocks of both sides"
    )]
    Early {
        /// `notBefore`
        from: Timestamp,
        /// Our clock.
        now: Timestamp,
    },
    /// No CA that is trusted now signed it.
    #[error("the certificate is not of the CA that is trusted now")]
    Refused {
        /// What rustls said.
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

    /// Does the certificate count at `now`?
    pub fn check(&self, shown: &Shown, now: Timestamp) -> Result<(), Untrusted> {
        let validity = shown.info().validity;
        if now > validity.until {
            let until = validity.until;
            return Err(Untrusted::Expired { until, now });
        }
        if now < validity.from {
            let from = validity.from;
            return Err(Untrusted::Early { from, now });
        }
        self.check_chain(shown, now)
    }

    /// Would it count, if it were still valid? For a certificate that has been renewed since.
    pub fn check_expired(&self, shown: &Shown) -> Result<(), Untrusted> {
        self.check_chain(shown, shown.info().validity.until)
    }

    fn check_chain(&self, shown: &Shown, at: Timestamp) -> Result<(), Untrusted> {
        let refused = |source| Untrusted::Refused { source };
        let [end_entity, intermediates @ ..] = shown.0.chain.as_slice() else {
            return Err(refused(CertificateError::BadEncoding.into()));
        };
        let seconds = u64::try_from(at.as_second()).unwrap_or_default();
        let at = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
        let verified = self.0.verify_client_cert(end_entity, intermediates, at);
        verified.map(drop).map_err(refused)
    }
}
