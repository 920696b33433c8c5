//! PURE: hashes of what the agent was sent, by which a worker finds that nothing has changed.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use knoc_proto::pb;
use prost::Message as _;

use crate::agent::Sent;

/// Hashes of what the agent was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hashes {
    values: u64,
    /// `None` if no credentials were sent.
    credentials: Option<u64>,
}

impl Hashes {
    pub(super) fn of(sent: &Sent) -> Self {
        let hash = |credentials: &pb::PullCredentials| {
            let mut hasher = DefaultHasher::new();
            credentials.encode_to_vec().hash(&mut hasher);
            hasher.finish()
        };
        Self {
            values: contents(&sent.values),
            credentials: sent.pull_credentials.as_ref().map(hash),
        }
    }

    /// Does the agent have all of `newer`? It needs no credentials if there are none in it.
    pub(super) fn covers(self, newer: Self) -> bool {
        let credentials = newer.credentials.is_none() || newer.credentials == self.credentials;
        self.values == newer.values && credentials
    }
}

/// A hash of the values, without their revision.
fn contents(values: &pb::PodValues) -> u64 {
    let mut hasher = DefaultHasher::new();
    let bare = pb::PodValues {
        revision: 0,
        ..values.clone()
    };
    bare.encode_to_vec().hash(&mut hasher);
    hasher.finish()
}
