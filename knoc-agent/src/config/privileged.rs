//! `policy.privileged` of the site file: what happens to containers that ask for privileges.

use serde::Deserialize;

use super::Policy;

/// What happens to a pod with a `privileged` container: an ordinary user cannot give it privileges.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Privileged {
    /// The pod is rejected.
    #[default]
    Reject,
    /// The container runs without privileges.
    Unprivileged,
}

impl Policy {
    /// Whether containers that ask for privileges run without them.
    #[must_use]
    pub fn maps_privileged(&self) -> bool {
        self.privileged == Privileged::Unprivileged
    }
}
