//! PURE: the table `[listen]` of the site file.

use std::{net::SocketAddr, path::PathBuf};

use serde::Deserialize;

use super::text;

/// The addresses that the agent listens on.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    /// The address for kubelets and knocctl, which use mutual TLS. If `None`, they connect over SSH only.
    #[serde(deserialize_with = "text::address_or_none")]
    pub kubelet: Option<SocketAddr>,
    /// The address for shims, whose keys are pinned.
    #[serde(deserialize_with = "text::address")]
    pub shim: SocketAddr,
    /// The addresses that shims connect to, as `host:port`. If empty: this host's addresses, with the port of `shim`.
    pub shim_addresses: Vec<String>,
    /// The unix socket. If unset: `$XDG_RUNTIME_DIR/knoc/agent.sock`, else `STATE_DIR/socket/agent.sock`.
    pub socket: Option<PathBuf>,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            kubelet: Some(SocketAddr::from(([0, 0, 0, 0], 10350))),
            shim: SocketAddr::from(([0, 0, 0, 0], 10351)),
            shim_addresses: Vec::new(),
            socket: None,
        }
    }
}
