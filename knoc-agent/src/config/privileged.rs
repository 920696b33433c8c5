//! `policy.privileged`.

use serde::Deserialize;

use super::Policy;

/// What becomes of a pod with a container that asks for `privileged`, which no ordinary user can give.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Privileged {
    /// It is rejected.
    #[default]
    Reject,
    /// The container runs without privileges.
    Unprivileged,
}

impl Policy {
    /// Do containers that ask for `privileged` run without privileges?
    #[must_use]
    pub fn maps_privileged(&self) -> bool {
        self.privileged == Privileged::Unprivileged
    }
}
