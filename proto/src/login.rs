//! PURE: what the generated code cannot say about credentials for registries.

use std::fmt;

use crate::pb::RegistryLogin;

impl RegistryLogin {
    /// The longest user name and password together, in bytes. Tokens of registries have some thousand bytes.
    pub const MAX_LENGTH: usize = 16 * 1024;
}

/// Hides user name and password.
impl fmt::Debug for RegistryLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryLogin")
            .field("secret_uid", &self.secret_uid)
            .finish_non_exhaustive()
    }
}
