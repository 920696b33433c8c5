//! The agent's key pair for the links of shims. It is kept, because running shims pin it. Only the holder of the lease gets here.

use std::path::Path;

use knoc_contract::jobdir::{
    StateDir,
    atomic::{self, FileError},
};
use knoc_link::{CredentialsError, pinned::KeyPair};
use knoc_proto::error::chain;

/// Why there is no pair.
#[derive(Debug, thiserror::Error)]
pub(super) enum PairError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Keys(#[from] CredentialsError),
}

/// Reads the pair of this state directory, or creates it. Blocks on file I/O.
pub(super) fn pair(state: &StateDir) -> Result<KeyPair, PairError> {
    let (cert, key) = state.shim_hop();
    // A file system that fails for a moment must not look like a missing pair: running shims would know no agent any more.
    if exists(&cert)? && exists(&key)? {
        match KeyPair::from_files(&cert, &key) {
            Err(error @ CredentialsError::Unusable { .. }) => {
                // An agent was suspended until another one had the lease, and each has written one file. No shim can have pinned that.
                let error = chain(&error);
                tracing::warn!(%error, "the key pair for shims is created again");
            }
            read => return Ok(read?),
        }
    }
    let pair = KeyPair::generate("knoc-agent shim hop")?;
    atomic::write(&key, pair.key_pem().as_bytes(), 0o600)?;
    atomic::write(&cert, pair.cert_pem().as_bytes(), 0o600)?;
    Ok(pair)
}

fn exists(path: &Path) -> Result<bool, FileError> {
    path.try_exists().map_err(FileError::on("stat", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> (tempfile::TempDir, StateDir) {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        state.create().unwrap();
        (folder, state)
    }

    #[test]
    fn a_key_of_another_certificate_is_created_again_and_an_unreadable_one_is_an_error() {
        let (_folder, state) = state();
        let first = pair(&state).unwrap();
        let (cert, key) = state.shim_hop();
        let other = KeyPair::generate("other").unwrap();
        atomic::write(&key, other.key_pem().as_bytes(), 0o600).unwrap();
        let again = pair(&state).unwrap();
        assert_ne!(again.cert_pem(), first.cert_pem());
        assert_eq!(again.key_pem(), pair(&state).unwrap().key_pem());
        atomic::write(&cert, b"not a certificate", 0o600).unwrap();
        assert!(matches!(pair(&state), Err(PairError::Keys(_))));
    }

    #[test]
    fn a_pair_is_not_replaced_because_nobody_can_see_whether_it_is_there() {
        let (_folder, state) = state();
        let (cert, key) = state.shim_hop();
        // A link to itself leads to an error.
        std::os::unix::fs::symlink(&cert, &cert).unwrap();
        assert!(matches!(pair(&state), Err(PairError::File(_))));
        assert!(cert.is_symlink() && !key.exists());
        std::fs::remove_file(&cert).unwrap();
        pair(&state).unwrap();
    }
}
