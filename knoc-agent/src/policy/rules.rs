//! PURE but for the clock that it is given: does a peer's certificate count now?

use std::collections::HashMap;

use jiff::Timestamp;
use knoc_link::{Identity, Shown, Trust};
use knoc_proto::error::chain;

use super::denied::{Denied, matches};
use crate::config::Policy;

/// Renewed certificates whose older connections are remembered: each has an identity of the CA's and lives for months.
const MAX_RENEWALS: usize = 1024;

/// Who is served.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// `kubelet/knoc`, `ctl/*` …; empty: all.
    clients: Vec<String>,
    denied: Vec<Denied>,
    /// The CA; none: nobody can come with a certificate.
    trust: Option<Trust>,
}

/// Why a peer is not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Not among those served.
    #[error("{identity} is not among policy.clients of the site file")]
    Client {
        /// Who.
        identity: Identity,
    },
    /// Denied by name.
    #[error(
        "{identity} is denied by {entry:?} in policy.denied of the site file: it needs a new certificate"
    )]
    Denied {
        /// Who.
        identity: Identity,
        /// By which entry.
        entry: String,
    },
    /// The certificate does not count any more.
    #[error("{identity}: {why}")]
    Certificate {
        /// Who.
        identity: Identity,
        /// Why not.
        why: String,
    },
}

impl Rules {
    /// By a policy and a CA. Entries that cannot be read were refused when the file was.
    #[must_use]
    pub fn new(policy: &Policy, trust: Option<Trust>) -> Self {
        let parsed = policy.denied.iter().filter_map(|text| text.parse().ok());
        Self {
            clients: policy.clients.clone(),
            denied: parsed.collect(),
            trust,
        }
    }

    /// Is this peer served now? A certificate that has expired counts on connections that were there before, if this agent
    /// renewed it: its holder has another one by now, and nothing that is under way is cut for it.
    pub fn judge(
        &self,
        identity: &Identity,
        shown: &Shown,
        renewals: &Renewals,
        now: Timestamp,
    ) -> Result<(), Refused> {
        let named =
            self.clients.is_empty() || self.clients.iter().any(|one| matches(one, identity));
        if !named {
            let identity = identity.clone();
            return Err(Refused::Client { identity });
        }
        let info = shown.info();
        if let Some(entry) = self.denied.iter().find(|one| one.covers(identity, info)) {
            let (identity, entry) = (identity.clone(), entry.to_string());
            return Err(Refused::Denied { identity, entry });
        }
        let refused = |why: String| Refused::Certificate {
            identity: identity.clone(),
            why,
        };
        let trust = self.trust.as_ref();
        let trust = trust.ok_or_else(|| refused("no CA is known".to_owned()))?;
        let checked = if renewals.until(&info.spki).is_some_and(|until| now <= until) {
            trust.check_expired(shown)
        } else {
            trust.check(shown, now)
        };
        checked.map_err(|error| refused(chain(&error)))
    }
}

/// Public keys whose certificates this agent renewed, and until when the newest renewal is valid. Needed only as long as
/// there are connections from before, so it lives in memory.
#[derive(Debug, Clone, Default)]
pub struct Renewals(HashMap<String, Timestamp>);

impl Renewals {
    fn until(&self, spki: &str) -> Option<Timestamp> {
        self.0.get(spki).copied()
    }

    /// The certificate of these keys was renewed until then. A full map forgets what has ended, and then takes no more:
    /// such a connection ends with its certificate.
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
