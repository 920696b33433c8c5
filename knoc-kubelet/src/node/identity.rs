//! The properties of a node that do not change while the process runs.

use std::collections::BTreeMap;

use knoc_proto::mesh::PodRange;

/// What pods have as `status.podIP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodIp {
    /// Nothing.
    None,
    /// The address of their compute node.
    Node,
    /// An address of their own, if they have a network of their own, else that of their compute node.
    Own,
}

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
    /// What pods have as `status.podIP`.
    pub pod_ip: PodIp,
    /// From which range pods get addresses of their own, if the Node has no `spec.podCIDR`.
    pub pod_range: Option<PodRange>,
    /// Whether the node declares that the API server may pass WebSockets on to it.
    pub websockets: bool,
}
