//! Which cluster this agent serves, and who leads there.
//!
//! The cluster id is pinned at its first use, the leadership epoch only grows; both are on disk before a request that
//! changes them goes on, so that an agent restarted between two kubelets still refuses the older one.

use std::{path::PathBuf, sync::Arc};

use knoc_proto::{error::chain, reason::ErrorReason};
use tokio::sync::Mutex;

use crate::{
    jobdir::{self, JobDirError, StateDir, schema::Cluster},
    pod::actor::Refused,
};

/// The pinned cluster. The lock serialises the rare writes; it is held across them on purpose, also by a write whose
/// caller has gone.
#[derive(Debug)]
pub struct Pin {
    path: PathBuf,
    /// What the site file says; it goes before what was pinned.
    configured: Option<String>,
    known: Arc<Mutex<Cluster>>,
}

impl Pin {
    /// Reads what was pinned before.
    pub fn load(state: &StateDir, configured: Option<String>) -> Result<Self, JobDirError> {
        let path = state.cluster();
        let mut known: Cluster = jobdir::read_json(&path)?.unwrap_or_default();
        if let Some(id) = &configured
            && *id != known.cluster_id
        {
            known = Cluster {
                cluster_id: id.clone(),
                leadership_epoch: 0,
            };
        }
        Ok(Self {
            path,
            configured,
            known: Arc::new(Mutex::new(known)),
        })
    }

    /// The pinned cluster, empty where none is.
    pub async fn cluster_id(&self) -> String {
        self.known.lock().await.cluster_id.clone()
    }

    /// May a request of this cluster be served? Pins it where none is. Empty (knocctl): always.
    pub async fn admit(&self, cluster_id: &str) -> Result<(), Refused> {
        self.check(cluster_id, 0).await
    }

    /// May a change be made by the leader of this epoch? 0 (knocctl): always.
    ///
    /// Cancel safety: a dropped call may have pinned, on disk and in memory alike.
    pub async fn check(&self, cluster_id: &str, leadership_epoch: i64) -> Result<(), Refused> {
        let mut known = Arc::clone(&self.known).lock_owned().await;
        let pinned = &known.cluster_id;
        if !cluster_id.is_empty() && !pinned.is_empty() && cluster_id != pinned {
            let how = if self.configured.is_some() {
                "by its site file"
            } else {
                "since its first use"
            };
            let message = format!(
                "this agent serves the cluster {pinned} {how}, not {cluster_id}; a new cluster needs \
                 policy.cluster_id in the site file, or an empty state directory"
            );
            return Err(Refused::new(ErrorReason::ClusterMismatch, message));
        }
        if leadership_epoch != 0 && leadership_epoch < known.leadership_epoch {
            let message = format!(
                "leadership epoch {leadership_epoch} is older than {}: another kubelet leads",
                known.leadership_epoch
            );
            return Err(Refused::new(ErrorReason::StaleLeader, message));
        }
        let mut next = known.clone();
        if !cluster_id.is_empty() {
            cluster_id.clone_into(&mut next.cluster_id);
        }
        next.leadership_epoch = next.leadership_epoch.max(leadership_epoch);
        if next == *known {
            return Ok(());
        }
        let path = self.path.clone();
        let write = tokio::task::spawn_blocking(move || {
            jobdir::write_json(&path, &next)?;
            *known = next;
            Ok::<_, JobDirError>(())
        });
        let failed = |error: &(dyn std::error::Error + 'static)| {
            Refused::new(
                ErrorReason::Internal,
                format!("pin the cluster: {}", chain(error)),
            )
        };
        write.await.map_err(|e| failed(&e))?.map_err(|e| failed(&e))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// What a caller that went away began to write is what the next one is judged by.
    #[test]
    fn a_caller_that_goes_away_leaves_file_and_memory_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .max_blocking_threads(1)
            .build()
            .unwrap();
        runtime.block_on(async {
            let pin = Pin::load(&state, None).unwrap();
            // The only thread for file work is busy.
            let (gate, waits) = mpsc::channel::<()>();
            let busy = tokio::task::spawn_blocking(move || waits.recv().unwrap_or_default());
            {
                let gone = std::pin::pin!(pin.check("one", 3));
                assert!(futures::poll!(gone).is_pending());
            }
            let next = pin.check("two", 1);
            let (refused, ()) = tokio::join!(next, async { drop(gate) });
            assert_eq!(refused.unwrap_err().reason, ErrorReason::ClusterMismatch);
            busy.await.unwrap();
        });
        let kept: Cluster = jobdir::read_json(&state.cluster()).unwrap().unwrap();
        assert_eq!(kept.cluster_id, "one");
    }

    #[tokio::test]
    async fn pinned_at_first_use_and_epochs_only_grow() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        let pin = Pin::load(&state, None).unwrap();
        pin.check("", 0).await.unwrap();
        pin.check("one", 3).await.unwrap();
        let other = pin.check("two", 4).await.unwrap_err();
        assert_eq!(other.reason, ErrorReason::ClusterMismatch);
        let pin = Pin::load(&state, None).unwrap();
        assert_eq!(
            pin.check("one", 2).await.unwrap_err().reason,
            ErrorReason::StaleLeader
        );
        pin.check("one", 0).await.unwrap();
        pin.check("one", 3).await.unwrap();
        // A kubelet that was installed anew begins with the time.
        pin.check("one", 1_795_000_000).await.unwrap();
        let older = pin.check("one", 4).await.unwrap_err();
        assert_eq!(older.reason, ErrorReason::StaleLeader);
        let pin = Pin::load(&state, Some("two".to_owned())).unwrap();
        assert_eq!(
            pin.check("one", 9).await.unwrap_err().reason,
            ErrorReason::ClusterMismatch
        );
        pin.check("two", 1).await.unwrap();
    }
}
