//! The JSON files of the state directory, except the pods' records.
//!
//! They are a versioned protocol between agents and shims of different releases. Fields are only
//! ever added, with a default that keeps the old behaviour; unknown fields are ignored.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `endpoint.json`: how a shim reaches the agent. It is replaced atomically; shims read it before
/// each connection attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The agent's addresses for shims, as `host:port`, in the order in which to try them.
    pub addresses: Vec<String>,
    /// SHA-256 (hex) of the public key that the agent uses with shims.
    pub spki: String,
    /// Identifies these addresses: it grows whenever the agent starts or tries again whether compute
    /// nodes can reach it. What a shim reports about the addresses counts for this trial only.
    #[serde(default)]
    pub trial: i64,
    /// Compute nodes are known not to reach the addresses, so a shim dials seldom and does not report
    /// that it failed.
    #[serde(default)]
    pub isolated: bool,
}

/// `shim-route.json`: what the agent has found out about the way to its shims. It is replaced
/// atomically.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundRoute {
    /// The newest [`Endpoint::trial`].
    #[serde(default)]
    pub trial: i64,
    /// The address that worked although it was not the first one.
    #[serde(default)]
    pub preferred: String,
    /// Since when compute nodes are known not to reach the agent.
    #[serde(default)]
    pub isolated: Option<Cause>,
    /// Since when the scheduler is known to refuse steps that enter a running job.
    #[serde(default)]
    pub refused: Option<Cause>,
}

/// Why something does not work, and when that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// Unix seconds.
    pub at: i64,
    /// One line.
    pub detail: String,
}

/// `agent.lease`: which agent may submit jobs from this state directory. It is replaced atomically.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The holder's host name.
    pub host: String,
    /// `/proc/sys/kernel/random/boot_id` of the holder's host.
    pub boot_id: String,
    /// The holder's process ID on that host.
    pub pid: u32,
    /// Incremented by every agent that starts on this directory; an agent with a higher epoch
    /// fences the others.
    pub epoch: i64,
    /// When the holder last renewed the lease, in Unix seconds.
    pub heartbeat: i64,
    /// The holder's version; older agents do not name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// `cluster.json`: the Kubernetes cluster that this agent serves, pinned at first use, and its
/// leadership.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// UID of the namespace `kube-system`.
    #[serde(default)]
    pub cluster_id: String,
    /// The highest leadership epoch (`leaseTransitions`) of all kubelets. Only older agents judge
    /// by it.
    #[serde(default)]
    pub leadership_epoch: i64,
    /// The highest leadership epoch by node, since each node has its own Lease.
    #[serde(default)]
    pub leaders: BTreeMap<String, i64>,
}
