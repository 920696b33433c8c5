//! PURE: hashes of what the agent was sent, by which the kubelet knows whether to send it again.

use std::hash::{DefaultHasher, Hash, Hasher};

use knoc_proto::pb;

/// Hashes of the values and credentials of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hashes {
    values: u64,
    /// `None` if no credentials were sent.
    credentials: Option<u64>,
}

impl Hashes {
    /// Of the values, without their revision, and the credentials.
    pub(super) fn of(values: &pb::PodValues, credentials: Option<&pb::PullCredentials>) -> Self {
        let bare = pb::PodValues {
            revision: 0,
            ..values.clone()
        };
        Self {
            values: hash(&bare),
            credentials: credentials.map(hash),
        }
    }

    /// Does the agent have all of `newer`? It needs no credentials if there are none in it.
    pub(super) fn covers(self, newer: Self) -> bool {
        let credentials = newer.credentials.is_none() || newer.credentials == self.credentials;
        self.values == newer.values && credentials
    }
}

fn hash(message: &impl prost::Message) -> u64 {
    let mut hasher = DefaultHasher::new();
    message.encode_to_vec().hash(&mut hasher);
    hasher.finish()
}
