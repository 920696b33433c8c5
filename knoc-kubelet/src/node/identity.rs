//! What does not change about a node while the process lives.

use std::collections::BTreeMap;

/// What does not change while the process lives.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The node's name.
    pub name: String,
    /// Where the API server reaches us.
    pub internal_ip: String,
    /// Of the kubelet API.
    pub port: u16,
    /// Labels of the operator.
    pub labels: BTreeMap<String, String>,
    /// The most pods.
    pub pods: u32,
    /// allocatable = total × this.
    pub queue_factor: u32,
    /// With the provider's taint?
    pub taint: bool,
    /// Declare that WebSockets may come as they are?
    pub websockets: bool,
}
