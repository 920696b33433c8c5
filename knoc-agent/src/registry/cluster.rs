//! Which cluster this agent serves, and who leads there.
//!
//! The cluster id is pinned at its first use, the leadership epoch only grows; both are on disk before a request that
//! changes them goes on, so that an agent restarted between two kubelets still refuses the older one. Kubelets of several
//! nodes may share an agent; each node has a Lease of its own, so the epochs are kept by the node.

use std::{path::PathBuf, sync::Arc};

use knoc_proto::{error::chain, reason::ErrorReason};
use tokio::sync::Mutex;

use crate::{
    jobdir::{self, JobDirError, StateDir, schema::Cluster},
    pod::actor::Refused,
};

/// The leadership of a kubelet that asks for a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leader<'a> {
    /// Of which node.
    pub node: &'a str,
    /// Of the node's leadership Lease. 0: none (knocctl).
    pub epoch: i64,
}

impl Leader<'_> {
    /// Of somebody who reads.
    const NONE: Self = Self { node: "", epoch: 0 };
}

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
                ..Cluster::default()
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
        self.check(cluster_id, Leader::NONE).await
    }

    /// May a change be made by the leader of this epoch? 0 (knocctl): always.
    ///
    /// Cancel safety: a dropped call may have pinned, on disk and in memory alike.
    pub async fn check(&self, cluster_id: &str, leader: Leader<'_>) -> Result<(), Refused> {
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
        let newest = newest_epoch(&known, leader.node);
        if leader.epoch != 0 && leader.epoch < newest {
            let message = format!(
                "leadership epoch {} is older than {newest}: another kubelet leads",
                leader.epoch
            );
            return Err(Refused::new(ErrorReason::StaleLeader, message));
        }
        let mut next = known.clone();
        if !cluster_id.is_empty() {
            cluster_id.clone_into(&mut next.cluster_id);
        }
        if leader.epoch != 0 {
            next.leaders.insert(leader.node.to_owned(), leader.epoch);
            next.leadership_epoch = next.leadership_epoch.max(leader.epoch);
        }
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

/// PURE: the newest epoch that a kubelet led this node with. An agent of before kept one for all nodes.
fn newest_epoch(known: &Cluster, node: &str) -> i64 {
    if known.leaders.is_empty() {
        known.leadership_epoch
    } else {
        known.leaders.get(node).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn leader(node: &str, epoch: i64) -> Leader<'_> {
        Leader { node, epoch }
    }

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
                let gone = std::pin::pin!(pin.check("one", leader("a", 3)));
                assert!(futures::poll!(gone).is_pending());
            }
            let next = pin.check("two", leader("a", 1));
            let (refused, ()) = tokio::join!(next, async { drop(gate) });
            assert_eq!(refused.unwrap_err().reason, ErrorReason::ClusterMismatch);
            busy.await.unwrap();
        });
        let kept: Cluster = jobdir::read_json(&state.cluster()).unwrap().unwrap();
        assert_eq!(kept.cluster_id, "one");
    }

    #[tokio::test]
    async fn kubelets_of_several_nodes_lead_each_for_itself() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        let pin = Pin::load(&state, None).unwrap();
        pin.check("one", leader("a", 9)).await.unwrap();
        pin.check("one", leader("b", 3)).await.unwrap();
        let pin = Pin::load(&state, None).unwrap();
        for (node, older) in [("a", 8), ("b", 2)] {
            let refused = pin.check("one", leader(node, older)).await;
            assert_eq!(refused.unwrap_err().reason, ErrorReason::StaleLeader);
        }
        pin.check("one", leader("b", 4)).await.unwrap();
    }

    /// What an older agent pinned goes for whoever comes first.
    #[tokio::test]
    async fn an_epoch_of_an_older_agent_still_counts() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        let older = br#"{"cluster_id": "one", "leadership_epoch": 7}"#;
        jobdir::atomic::write(&state.cluster(), older, 0o600).unwrap();
        let pin = Pin::load(&state, None).unwrap();
        let refused = pin.check("one", leader("a", 6)).await;
        assert_eq!(refused.unwrap_err().reason, ErrorReason::StaleLeader);
        pin.check("one", leader("a", 8)).await.unwrap();
        pin.check("one", leader("b", 1)).await.unwrap();
        let kept: Cluster = jobdir::read_json(&state.cluster()).unwrap().unwrap();
        assert_eq!(kept.leadership_epoch, 8, "for an agent that is put back");
    }

    #[tokio::test]
    async fn pinned_at_first_use_and_epochs_only_grow() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        let pin = Pin::load(&state, None).unwrap();
        pin.check("", leader("a", 0)).await.unwrap();
        pin.check("one", leader("a", 3)).await.unwrap();
        let other = pin.check("two", leader("a", 4)).await.unwrap_err();
        assert_eq!(other.reason, ErrorReason::ClusterMismatch);
        let pin = Pin::load(&state, None).unwrap();
        assert_eq!(
            pin.check("one", leader("a", 2)).await.unwrap_err().reason,
            ErrorReason::StaleLeader
        );
        pin.check("one", leader("a", 0)).await.unwrap();
        pin.check("one", leader("a", 3)).await.unwrap();
        // A kubelet that was installed anew begins with the time.
        pin.check("one", leader("a", 1_795_000_000)).await.unwrap();
        let older = pin.check("one", leader("a", 4)).await.unwrap_err();
        assert_eq!(older.reason, ErrorReason::StaleLeader);
        let pin = Pin::load(&state, Some("two".to_owned())).unwrap();
        assert_eq!(
            pin.check("one", leader("a", 9)).await.unwrap_err().reason,
            ErrorReason::ClusterMismatch
        );
        pin.check("two", leader("a", 1)).await.unwrap();
    }
}
