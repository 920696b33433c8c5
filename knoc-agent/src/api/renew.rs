//! `RenewCertificate`: issues a new certificate to a client that holds a valid one, signed with the
//! CA key that `init` left next to the CA.
//!
//! [`knoc_link::pki::Ca::renew`] decides what may be issued. This module reads the files, limits
//! the rate and logs what was issued.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use knoc_contract::jobdir::atomic::{self, FileError};
use knoc_link::{
    Peer, PeerCertificate,
    pki::{self, Ca, PkiError, RenewError},
};
use knoc_proto::{error::chain, reason::ErrorReason};
use tonic::Status;

use super::gate::Gate;
use crate::config::Tls;

/// Renewals of one identity that may come at once after a pause: enough for a kubelet, its
/// successor and some retries.
const BURST: u32 = 5;
/// The time after which one more renewal is allowed.
const REFILL: Duration = Duration::from_mins(1);
/// The number of identities whose rate is tracked. Only the CA creates identities, so few exist.
const MAX_IDENTITIES: usize = 1024;

/// Why there is no CA to sign with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoCa {
    /// The CA's key was removed, which is allowed.
    #[error(
        "{path} is not there, so this agent cannot renew certificates: issue new ones where the CA's key is"
    )]
    NoKey {
        /// The expected path of the key.
        path: String,
    },
    /// A file cannot be read.
    #[error("read the CA")]
    File(#[from] FileError),
    /// The CA and its key cannot be used.
    #[error("use the CA's key")]
    Pki(#[from] PkiError),
}

/// Loads the CA of the site file and its key. Blocking.
pub(crate) fn ca(tls: &Tls) -> Result<Ca, NoCa> {
    let path = tls.ca_key();
    let key = atomic::read_optional(&path)?.ok_or_else(|| NoCa::NoKey {
        path: path.display().to_string(),
    })?;
    let bundle = atomic::read(Path::new(&tls.ca))?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Ca::from_bundle(&text(bundle), &text(key))?)
}

/// Renews certificates at a bounded rate for each identity.
#[derive(Debug)]
pub(super) struct Renewer {
    gate: Gate,
    /// Never held across an await.
    rates: Mutex<HashMap<String, Rate>>,
}

#[derive(Debug, Clone, Copy)]
struct Rate {
    left: u32,
    since: Instant,
}

impl Renewer {
    pub(super) fn new(gate: Gate) -> Self {
        let rates = Mutex::default();
        Self { gate, rates }
    }

    /// Returns a new certificate as PEM.
    pub(super) async fn renew(
        &self,
        peer: Option<Peer>,
        tls: Option<Tls>,
        request: Vec<u8>,
    ) -> Result<String, Status> {
        let (Some(Peer::Tls { certificate, .. }), Some(tls)) = (&peer, tls) else {
            let text = "only a client that connected with a certificate can renew it";
            return Err(ErrorReason::PermissionDenied.status(text));
        };
        let who = peer.as_ref().map_or_else(String::new, ToString::to_string);
        let identity = certificate.info().identity.as_ref();
        let identity = identity.map_or_else(|_| String::new(), ToString::to_string);
        if !self.may(&identity, Instant::now()) {
            let text = format!(
                "{identity} has renewed too often: try again in {} s",
                REFILL.as_secs()
            );
            return Err(ErrorReason::Overloaded.status(text));
        }
        let held = certificate.clone();
        let issued = tokio::task::spawn_blocking(move || issue(&tls, &held, &request));
        let issued = issued
            .await
            .map_err(|error| ErrorReason::Internal.status(chain(&error)))?;
        let (pem, info) = issued.inspect_err(|status| {
            tracing::warn!(
                peer = who,
                error = status.message(),
                "a certificate was not renewed"
            );
        })?;
        self.gate.renewed(certificate.info(), info.validity.until);
        tracing::info!(
            peer = who,
            serial = info.serial,
            key = info.spki,
            from = certificate.info().serial,
            until = %info.validity.until,
            "renewed a certificate"
        );
        Ok(pem)
    }

    /// Takes one renewal from this identity's budget, if any is left.
    fn may(&self, identity: &str, now: Instant) -> bool {
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        rates.retain(|_, rate| rate.at(now).left < BURST);
        if rates.len() >= MAX_IDENTITIES && !rates.contains_key(identity) {
            return false;
        }
        let full = Rate {
            left: BURST,
            since: now,
        };
        let rate = rates.entry(identity.to_owned()).or_insert(full);
        *rate = rate.at(now);
        let may = rate.left > 0;
        rate.left = rate.left.saturating_sub(1);
        may
    }
}

impl Rate {
    /// The rate at `now`, with the renewals that were refilled since.
    fn at(self, now: Instant) -> Self {
        let passed = now.saturating_duration_since(self.since);
        let more = u32::try_from(passed.as_secs() / REFILL.as_secs()).unwrap_or(u32::MAX);
        if self.left.saturating_add(more) >= BURST {
            return Self {
                left: BURST,
                since: now,
            };
        }
        Self {
            left: self.left + more,
            since: self.since + REFILL * more,
        }
    }
}

fn issue(
    tls: &Tls,
    held: &PeerCertificate,
    request: &[u8],
) -> Result<(String, pki::CertificateInfo), Status> {
    let ca = ca(tls).map_err(|error| match error {
        NoCa::NoKey { .. } => ErrorReason::Unsupported.status(error.to_string()),
        NoCa::File(_) | NoCa::Pki(_) => ErrorReason::Internal.status(chain(&error)),
    })?;
    let renewed = ca.renew(held.info(), request, Timestamp::now());
    let pem = renewed.map_err(|error| {
        let reason = match error {
            RenewError::Request { .. } | RenewError::Large { .. } | RenewError::Key => {
                ErrorReason::InvalidRequest
            }
            RenewError::Early { .. }
            | RenewError::Often
            | RenewError::Expired { .. }
            | RenewError::CaEnds { .. }
            | RenewError::Identity { .. } => ErrorReason::Unsupported,
            RenewError::Issue { .. } => ErrorReason::Internal,
        };
        reason.status(chain(&error))
    })?;
    let info = pki::inspect_pem(&pem);
    let info = info.map_err(|error| ErrorReason::Internal.status(chain(&error)))?;
    Ok((pem, info))
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;

    use super::*;

    #[test]
    fn renewals_are_bounded_for_each_identity() {
        let (_to, rules) = watch::channel(std::sync::Arc::default());
        let renewer = Renewer::new(Gate::new(rules));
        let start = Instant::now();
        for _ in 0..BURST {
            assert!(renewer.may("a", start));
        }
        assert!(!renewer.may("a", start));
        assert!(renewer.may("b", start), "each identity has its own budget");
        assert!(!renewer.may("a", start + REFILL / 2));
        assert!(renewer.may("a", start + REFILL));
        assert!(!renewer.may("a", start + REFILL));
        let later = start + REFILL * 100;
        for _ in 0..BURST {
            assert!(renewer.may("a", later));
        }
        assert!(!renewer.may("a", later));
    }
}
