//! The properties of a node that do not change while the process runs.

use std::collections::BTreeMap;

/// The properties of a node that do not change while the process runs.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The node's name.
    pub name: String,
    /// The address at which the API server reaches the kubelet.
    pub internal_ip: String,
    /// The port of the kubelet API.
    pub port: u16,
    /// Labels that the operator adds.
    pub labels: BTreeMap<String, String>,
    /// The most pods that the node accepts.
    pub pods: u32,
    /// Allocatable is the total times this factor.
    pub queue_factor: u32,
    /// Whether the node carries the provider's taint.
    pub taint: bool,
    /// The DNS domain of the cluster.
    pub cluster_domain: String,
    /// Whether pods have the address of their compute node as `status.podIP`; otherwise they have none.
    pub pod_ip_of_node: bool,
    /// Whether the node declares that the API server may pass WebSockets on to it.
    pub websockets: bool,
}
