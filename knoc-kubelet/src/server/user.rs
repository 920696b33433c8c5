//! The user of a request, as the cluster names it.

use std::collections::BTreeMap;

/// The group of all authenticated users; the Kubernetes kubelet adds it to the groups of a certificate.
const AUTHENTICATED: &str = "system:authenticated";

/// The user of a request, as Kubernetes names it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct User {
    /// The user name.
    pub name: String,
    /// The unique id; empty for certificates.
    pub uid: String,
    /// The groups of the user.
    pub groups: Vec<String>,
    /// Further attributes from the authenticator.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// Is the user in the group that may do everything, whatever RBAC says?
    pub(super) fn is_master(&self) -> bool {
        self.groups.iter().any(|group| group == "system:masters")
    }

    /// The user with the group of all authenticated users, for rights that are bound to it.
    pub(super) fn authenticated(mut self) -> Self {
        if !self.groups.iter().any(|group| group == AUTHENTICATED) {
            self.groups.push(AUTHENTICATED.to_owned());
        }
        self
    }
}
