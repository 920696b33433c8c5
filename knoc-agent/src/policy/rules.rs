//! PURE: decides at a given time whether a peer's certificate is accepted.

use std::collections::HashMap;

use jiff::Timestamp;
use knoc_link::{Identity, PeerCertificate, Trust};
use knoc_proto::error::chain;

use super::denied::{Denied, matches};
use crate::config::Policy;

/// How many renewed certificates are remembered for their open connections. The CA creates few
/// identities, and a certificate lives for months.
const MAX_RENEWALS: usize = 1024;

/// The rules that decide which peers are served.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// Patterns such as `kubelet/knoc` or `ctl/*`; empty means all.
    clients: Vec<String>,
    denied: Vec<Denied>,
    /// The CA. Without one, no peer can connect with a certificate.
    trust: Option<Trust>,
}

/// Why a peer is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerDenied {
    /// `policy.clients` does not match the peer.
    #[error("{identity} is not among policy.clients of the site file")]
    Client {
        /// The peer.
        identity: Identity,
    },
    /// An entry of `policy.denied` covers the certificate.
    #[error(
        "{identity} is denied by {entry:?} in policy.denied of the site file: it needs a new certificate"
    )]
    Denied {
        /// The peer.
        identity: Identity,
        /// The entry.
        entry: String,
    },
    /// The certificate is not valid at this time.
    #[error("{identity}: {why}")]
    Certificate {
        /// The peer.
        identity: Identity,
        /// Why it is not valid.
        why: String,
    },
}

impl Rules {
    /// Creates the rules from a policy and a CA. Entries that cannot be parsed were rejected when
    /// the file was read.
    #[must_use]
    pub fn new(policy: &Policy, trust: Option<Trust>) -> Self {
        let parsed = policy.denied.iter().filter_map(|text| text.parse().ok());
        Self {
            clients: policy.clients.clone(),
            denied: parsed.collect(),
            trust,
        }
    }

    /// Checks whether this peer is served now. A certificate that has expired is still accepted on
    /// connections that were open before if this agent renewed it: its holder has a new one by now,
    /// and open streams are not closed because of it.
    pub fn judge(
        &self,
        identity: &Identity,
        shown: &PeerCertificate,
        renewals: &Renewals,
        now: Timestamp,
    ) -> Result<(), PeerDenied> {
        let named =
            self.clients.is_empty() || self.clients.iter().any(|one| matches(one, identity));
        if !named {
            let identity = identity.clone();
            return Err(PeerDenied::Client { identity });
        }
        let info = shown.info();
        if let Some(entry) = self.denied.iter().find(|one| one.covers(identity, info)) {
            let (identity, entry) = (identity.clone(), entry.to_string());
            return Err(PeerDenied::Denied { identity, entry });
        }
        let bad_certificate = |why: String| PeerDenied::Certificate {
            identity: identity.clone(),
            why,
        };
        let trust = self.trust.as_ref();
        let trust = trust.ok_or_else(|| bad_certificate("no CA is known".to_owned()))?;
        let checked = if renewals.until(&info.spki).is_some_and(|until| now <= until) {
            trust.check_expired(shown)
        } else {
            trust.check(shown, now)
        };
        checked.map_err(|error| bad_certificate(chain(&error)))
    }
}

/// The public keys whose certificates this agent renewed, each with the expiry of the newest
/// renewal. Kept in memory, because it is needed only for connections that are open now.
#[derive(Debug, Clone, Default)]
pub struct Renewals(HashMap<String, Timestamp>);

impl Renewals {
    fn until(&self, spki: &str) -> Option<Timestamp> {
        self.0.get(spki).copied()
    }

    /// Records that the certificate of these keys was renewed until then. A full map first drops
    /// what has expired, and then ignores new entries: those connections end with their
    /// certificate.
    pub fn note<'a>(
        &mut self,
        keys: impl IntoIterator<Item = &'a str>,
        until: Timestamp,
        now: Timestamp,
    ) {
        self.0.retain(|_, until| *until >= now);
        for key in keys {
            if self.0.len() < MAX_RENEWALS || self.0.contains_key(key) {
                self.0.insert(key.to_owned(), until);
            }
        }
    }
}

#[cfg(test)]
mod tests;
