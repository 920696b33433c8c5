//! Who calls, as the cluster and the kubelet name it.

use std::collections::BTreeMap;

/// The group of all whose identity was proved; upstream's kubelet adds it to the groups of a certificate.
const AUTHENTICATED: &str = "system:authenticated";

/// The caller as Kubernetes names it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct User {
    /// User name.
    pub name: String,
    /// Unique id, empty for certificates.
    pub uid: String,
    /// Groups.
    pub groups: Vec<String>,
    /// Further attributes of the authenticator.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// The group that may do everything, and that RBAC cannot take anything from.
    pub(super) fn is_master(&self) -> bool {
        self.groups.iter().any(|group| group == "system:masters")
    }

    /// With the group of all who proved an identity, for rights that are bound to it.
    pub(super) fn authenticated(mut self) -> Self {
        if !self.groups.iter().any(|group| group == AUTHENTICATED) {
            self.groups.push(AUTHENTICATED.to_owned());
        }
        self
    }
}
