//! Which cluster this agent serves, and who leads its nodes.
//!
//! The cluster ID is pinned by the first kubelet that connects, and a node's leadership epoch only
//! grows. Both are on disk before a request that changes them proceeds, so that an agent which
//! restarts between two kubelets still rejects the older one. Each node has a Lease of its own and
//! therefore an epoch of its own. An epoch is at least the time at which it was taken (ADR 0034);
//! an epoch far ahead of the clock, which older agents accepted from anyone, is ignored.

use std::{path::PathBuf, sync::Arc};

use knoc_contract::jobdir::{self, JobDirError, StateDir, schema::Cluster};
use knoc_proto::{error::chain, reason::ErrorReason};
use tokio::sync::Mutex;

use crate::{lease::Holder, pod::input::RequestError};

/// How many seconds an epoch may be ahead of our clock; the clocks of login nodes may be off by
/// this much.
pub const EPOCH_AHEAD: i64 = 300;
/// How many nodes' epochs are kept. Each node is named by a kubelet's certificate or by the site
/// file.
const MAX_NODES: usize = 1024;

/// The leadership that a kubelet claims with a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leader<'a> {
    /// The node.
    pub node: &'a str,
    /// The epoch of the node's leadership Lease.
    pub epoch: i64,
}

/// The pinned cluster. The lock serialises the rare writes. It is deliberately held across them,
/// even if the caller of a write has gone.
#[derive(Debug)]
pub struct Pin {
    path: PathBuf,
    known: Arc<Mutex<Cluster>>,
    /// Once a newer agent has it, the file is that agent's. `None` in tests.
    lease: Option<Holder>,
}

impl Pin {
    /// Reads what is pinned on disk.
    pub fn load(state: &StateDir) -> Result<Self, JobDirError> {
        let path = state.cluster();
        let known: Cluster = jobdir::read_json(&path)?.unwrap_or_default();
        let known = Arc::new(Mutex::new(known));
        let lease = None;
        Ok(Self { path, known, lease })
    }

    /// The same, which records nothing once a newer agent has this lease: that agent may know a newer epoch, or another cluster.
    #[must_use]
    pub fn under(self, lease: Holder) -> Self {
        let lease = Some(lease);
        Self { lease, ..self }
    }

    /// The cluster that is served, or empty if none is; `configured` is the value of the site file,
    /// which takes precedence.
    pub async fn cluster_id(&self, configured: Option<&str>) -> String {
        let known = self.known.lock().await;
        configured.unwrap_or(&known.cluster_id).to_owned()
    }

    /// The nodes whose epoch is in effect at `now`.
    pub async fn nodes(&self) -> Vec<String> {
        self.known.lock().await.leaders.keys().cloned().collect()
    }

    /// Checks whether a request of this cluster and leader may be served. Changes nothing.
    pub async fn verify(&self, request: &Asked<'_>) -> Result<(), RequestError> {
        let known = self.known.lock().await;
        judge(&known, request).map(drop)
    }

    /// Like [`Self::verify`], and records what the request claims: the cluster if none is pinned,
    /// and the node's epoch.
    ///
    /// Cancel safety: a dropped call may have recorded it, but then both on disk and in memory.
    pub async fn claim(&self, request: &Asked<'_>) -> Result<(), RequestError> {
        let mut known = Arc::clone(&self.known).lock_owned().await;
        let next = judge(&known, request)?;
        if next == *known {
            return Ok(());
        }
        let (path, lease) = (self.path.clone(), self.lease.clone());
        let write = tokio::task::spawn_blocking(move || {
            if let Some(fenced) = lease.and_then(|lease| lease.fenced()) {
                return Err(RequestError::new(ErrorReason::ShuttingDown, chain(&fenced)));
            }
            jobdir::write_json(&path, &next).map_err(|error| failed(&error))?;
            *known = next;
            Ok(())
        });
        write.await.map_err(|error| failed(&error))?
    }
}

fn failed(error: &(dyn std::error::Error + 'static)) -> RequestError {
    let message = format!("cannot pin the cluster: {}", chain(error));
    RequestError::new(ErrorReason::Internal, message)
}

/// The cluster and leadership that a request claims.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Empty if the request names no cluster (knocctl).
    pub cluster_id: &'a str,
    /// `policy.cluster_id` of the site file.
    pub configured: Option<&'a str>,
    /// `None` if the request claims no leadership (knocctl).
    pub leader: Option<Leader<'a>>,
    /// Whether the request may pin the cluster. A kubelet's request may.
    pub pins: bool,
    /// The current time, Unix seconds.
    pub now: i64,
}

/// PURE: returns what is to be recorded after this request, or an error if the request is rejected.
fn judge(known: &Cluster, request: &Asked<'_>) -> Result<Cluster, RequestError> {
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
        return Err(RequestError::new(ErrorReason::ClusterMismatch, message));
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
        return Err(RequestError::new(ErrorReason::StaleLeader, message));
    }
    next.leaders.retain(|_, epoch| binds(*epoch, request.now));
    if next.leaders.len() >= MAX_NODES && !next.leaders.contains_key(node) {
        let message =
            format!("the leadership of {MAX_NODES} nodes is recorded already, which is the limit");
        return Err(RequestError::new(ErrorReason::Overloaded, message));
    }
    next.leaders.insert(node.to_owned(), epoch);
    // Earlier versions of the agent keep one epoch for all nodes; it is written in case of a
    // downgrade.
    next.leadership_epoch = next.leaders.values().copied().max().unwrap_or(0);
    Ok(next)
}

/// PURE: whether this epoch is plausible. An epoch far ahead of the clock comes from an agent that
/// accepted any.
fn binds(epoch: i64, now: i64) -> bool {
    epoch.saturating_sub(now) <= EPOCH_AHEAD
}

/// PURE: the newest epoch in effect for this node. Earlier versions of the agent kept one for all
/// nodes.
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
