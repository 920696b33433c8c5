//! The JSON files of the state directory, other than the pod's record.
//!
//! They are a versioned protocol between agents and shims of different releases: fields are only ever added, with
//! a default that means "as before"; unknown ones are ignored.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `endpoint.json`: where a shim finds the agent. Atomically replaced; read at every reconnect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// `host:port` of the shim hop, in the order to be tried.
    pub addresses: Vec<String>,
    /// SHA-256 (hex) of the agent's public key on the shim hop.
    pub spki: String,
}

/// `agent.lease`: which agent may submit jobs from this state directory. Atomically replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Host name of the holder.
    pub host: String,
    /// `/proc/sys/kernel/random/boot_id` of the holder's host.
    pub boot_id: String,
    /// Process id on that host.
    pub pid: u32,
    /// Grows with every start of an agent on this directory; the newer one fences the older.
    pub epoch: i64,
    /// Unix seconds of the last sign of life.
    pub heartbeat: i64,
}

/// `cluster.json`: the Kubernetes cluster this agent serves, pinned at first use, and its leadership.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// UID of the namespace `kube-system`.
    #[serde(default)]
    pub cluster_id: String,
    /// The highest leadership epoch seen (`leaseTransitions`), of all kubelets: what agents of before judge by.
    #[serde(default)]
    pub leadership_epoch: i64,
    /// The same by node, since each has its own Lease.
    #[serde(default)]
    pub leaders: BTreeMap<String, i64>,
}
