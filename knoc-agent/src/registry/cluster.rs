//! Which cluster this agent serves, and who leads there.
//!
//! The cluster id is pinned at its first use by a kubelet, a node's leadership epoch only grows; both are on disk before a
//! request that changes them goes on, so that an agent restarted between two kubelets still refuses the older one. Each
//! node has a Lease of its own, so each has an epoch of its own. An epoch is at least the time (ADR 0034): one that lies
//! ahead of the clock, as older agents took from anybody, binds nobody.

use std::{path::PathBuf, sync::Arc};

use knoc_contract::jobdir::{self, JobDirError, StateDir, schema::Cluster};
use knoc_proto::{error::chain, reason::ErrorReason};
use tokio::sync::Mutex;

use crate::pod::input::Refused;

/// An epoch may be this many seconds ahead of our clock: as far as clocks of login nodes are off.
pub const EPOCH_AHEAD: i64 = 300;
/// Nodes whose epochs are kept. Each is the name of a kubelet's certificate, or stands in the site file.
const MAX_NODES: usize = 1024;

/// The leadership of a kubelet that asks for a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leader<'a> {
    /// Of which node.
    pub node: &'a str,
    /// Of the node's leadership Lease.
    pub epoch: i64,
}

/// The pinned cluster. The lock serialises the rare writes; it is held across them on purpose, also by a write whose
/// caller has gone.
#[derive(Debug)]
pub struct Pin {
    path: PathBuf,
    known: Arc<Mutex<Cluster>>,
}

impl Pin {
    /// Reads what was pinned before.
    pub fn load(state: &StateDir) -> Result<Self, JobDirError> {
        let path = state.cluster();
        let known: Cluster = jobdir::read_json(&path)?.unwrap_or_default();
        let known = Arc::new(Mutex::new(known));
        Ok(Self { path, known })
    }

    /// The cluster served, empty where none is; `configured` is what the site file says, which goes first.
    pub async fn cluster_id(&self, configured: Option<&str>) -> String {
        let known = self.known.lock().await;
        configured.unwrap_or(&known.cluster_id).to_owned()
    }

    /// Every node with an epoch that binds at `now`.
    pub async fn nodes(&self) -> Vec<String> {
        self.known.lock().await.leaders.keys().cloned().collect()
    }

    /// May a request of this cluster, by this leader, be served? Changes nothing.
    pub async fn verify(&self, request: &Asked<'_>) -> Result<(), Refused> {
        let known = self.known.lock().await;
        judge(&known, request).map(drop)
    }

    /// The same, and what it claims is kept: the cluster where none is pinned, the epoch of the node.
    ///
    /// Cancel safety: a dropped call may have pinned, on disk and in memory alike.
    pub async fn claim(&self, request: &Asked<'_>) -> Result<(), Refused> {
        let mut known = Arc::clone(&self.known).lock_owned().await;
        let next = judge(&known, request)?;
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

/// What a request says of cluster and leadership.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Empty: none (knocctl).
    pub cluster_id: &'a str,
    /// `policy.cluster_id` of the site file.
    pub configured: Option<&'a str>,
    /// None: it claims no leadership (knocctl).
    pub leader: Option<Leader<'a>>,
    /// May it pin the cluster? A kubelet may.
    pub pins: bool,
    /// Our clock, Unix seconds.
    pub now: i64,
}

/// PURE: what is known after this request; an error: it is refused.
fn judge(known: &Cluster, request: &Asked<'_>) -> Result<Cluster, Refused> {
    let mut next = known.clone();
    if let Some(id) = request.configured
        && *id != known.cluster_id
    {
        // Another cluster has other Leases.
        next = Cluster {
            cluster_id: id.to_owned(),
            ..Cluster::default()
        };
    }
    let (asked, pinned) = (request.cluster_id, &next.cluster_id);
    if !asked.is_empty() && !pinned.is_empty() && asked != pinned {
        let how = if request.configured.is_some() {
            "by its site file"
        } else {
            "since its first use"
        };
        let message = format!(
            "this agent serves the cluster {pinned} {how}, not {asked}; a new cluster needs \
             policy.cluster_id in the site file, or an empty state directory"
        );
        return Err(Refused::new(ErrorReason::ClusterMismatch, message));
    }
    if request.pins && !asked.is_empty() {
        asked.clone_into(&mut next.cluster_id);
    }
    let Some(Leader { node, epoch }) = request.leader else {
        return Ok(next);
    };
    let newest = newest_epoch(&next, node, request.now);
    if epoch < newest {
        let message = format!(
            "leadership epoch {epoch} of node {node} is older than {newest}: another kubelet leads"
        );
        return Err(Refused::new(ErrorReason::StaleLeader, message));
    }
    next.leaders.retain(|_, epoch| binds(*epoch, request.now));
    if next.leaders.len() >= MAX_NODES && !next.leaders.contains_key(node) {
        let message = format!("{MAX_NODES} nodes are led already, which is the limit");
        return Err(Refused::new(ErrorReason::Overloaded, message));
    }
    next.leaders.insert(node.to_owned(), epoch);
    // An agent of before, put back, judges all nodes by one.
    next.leadership_epoch = next.leaders.values().copied().max().unwrap_or(0);
    Ok(next)
}

/// PURE: could this epoch be one? One far ahead of the clock is from an agent that took any.
fn binds(epoch: i64, now: i64) -> bool {
    epoch.saturating_sub(now) <= EPOCH_AHEAD
}

/// PURE: the newest epoch that binds who leads this node. An agent of before kept one for all nodes.
fn newest_epoch(known: &Cluster, node: &str, now: i64) -> i64 {
    let newest = if known.leaders.is_empty() {
        known.leadership_epoch
    } else {
        known.leaders.get(node).copied().unwrap_or(0)
    };
    if binds(newest, now) { newest } else { 0 }
}

#[cfg(test)]
mod tests;
