//! The agent's key pair for the links of shims. It is kept, because running shims pin it.
//!
//! Two agents that are started at the same moment get here before the lease has told them apart. So whoever creates the pair holds a
//! lock meanwhile, and the other one reads what was created.

use std::{
    fs::{File, TryLockError},
    path::Path,
    time::Duration,
};

use knoc_contract::jobdir::{
    StateDir,
    atomic::{self, FileError},
};
use knoc_link::{CredentialsError, pinned::KeyPair};
use knoc_proto::error::chain;
use tokio::time::{Instant, sleep};

/// How long another agent may take to create the pair. Afterwards, as on a file system without locks, it is created without the lock.
const PATIENCE: Duration = Duration::from_secs(5);
/// The pause between two attempts to take the lock: a call that waits could not be given up.
const BETWEEN: Duration = Duration::from_millis(20);

/// Why there is no pair.
#[derive(Debug, thiserror::Error)]
pub(super) enum PairError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Keys(#[from] CredentialsError),
}

/// Reads the pair of this state directory, or creates it.
pub(super) async fn pair(state: &StateDir) -> Result<KeyPair, PairError> {
    let (cert, key) = state.shim_hop();
    let _lock = lock(&key.with_extension("lock")).await;
    // A file system that fails for a moment must not look like a missing pair: running shims would know no agent any more.
    if exists(&cert)? && exists(&key)? {
        match KeyPair::from_files(&cert, &key) {
            Err(error @ CredentialsError::Unusable { .. }) => {
                // Two agents without a lock have written one file each. No shim can have pinned that.
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

/// The locked file; `None` if there is no lock to be had.
async fn lock(path: &Path) -> Option<File> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .ok()?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Some(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => sleep(BETWEEN).await,
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;

    use super::*;

    fn state() -> (tempfile::TempDir, StateDir) {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        state.create().unwrap();
        (folder, state)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn agents_that_start_at_once_have_one_pair() {
        let (_folder, state) = state();
        let mut agents = JoinSet::new();
        for _ in 0..8 {
            let state = state.clone();
            agents.spawn(async move { pair(&state).await.unwrap() });
        }
        let pairs = agents.join_all().await;
        let kept = pair(&state).await.unwrap();
        for one in pairs {
            assert_eq!(one.cert_pem(), kept.cert_pem());
            assert_eq!(one.key_pem(), kept.key_pem());
        }
    }

    #[tokio::test]
    async fn a_key_of_another_certificate_is_created_again_and_an_unreadable_one_is_an_error() {
        let (_folder, state) = state();
        let first = pair(&state).await.unwrap();
        let (cert, key) = state.shim_hop();
        let other = KeyPair::generate("other").unwrap();
        atomic::write(&key, other.key_pem().as_bytes(), 0o600).unwrap();
        let again = pair(&state).await.unwrap();
        assert_ne!(again.cert_pem(), first.cert_pem());
        assert_eq!(again.key_pem(), pair(&state).await.unwrap().key_pem());
        atomic::write(&cert, b"not a certificate", 0o600).unwrap();
        assert!(matches!(pair(&state).await, Err(PairError::Keys(_))));
    }

    #[tokio::test]
    async fn a_pair_is_not_replaced_because_nobody_can_see_whether_it_is_there() {
        let (_folder, state) = state();
        let (cert, key) = state.shim_hop();
        // A link to itself leads to an error.
        std::os::unix::fs::symlink(&cert, &cert).unwrap();
        assert!(matches!(pair(&state).await, Err(PairError::File(_))));
        assert!(cert.is_symlink() && !key.exists());
        std::fs::remove_file(&cert).unwrap();
        pair(&state).await.unwrap();
    }
}
