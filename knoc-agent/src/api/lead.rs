//! PURE: decides who may claim the leadership of a node.

use std::collections::BTreeMap;

use jiff::Timestamp;
use knoc_link::{Identity, Peer};
use knoc_proto::reason::ErrorReason;

use crate::{pod::input::RequestError, policy::nodes::may_lead, registry::cluster::EPOCH_AHEAD};

/// The leadership that a request claims.
#[derive(Debug, Clone, Copy)]
pub(super) struct Claim<'a> {
    /// The node of the pod that the request is about; empty if unknown.
    pub(super) node: &'a str,
    /// The leadership epoch; 0 if the request claims none.
    pub(super) epoch: i64,
}

/// Returns the node that the peer leads by this claim, or `None` if it claims nothing.
pub(super) fn judge(
    peer: Option<&Peer>,
    claim: Claim<'_>,
    nodes: &BTreeMap<String, String>,
    now: Timestamp,
) -> Result<Option<String>, RequestError> {
    let denied = |text: String| RequestError::new(ErrorReason::LeadershipDenied, text);
    let Claim { node, epoch } = claim;
    if epoch == 0 {
        return Ok(None);
    }
    let Some(name) = kubelet(peer) else {
        let who = peer.map_or_else(|| "the peer".to_owned(), who);
        let text = format!(
            "{who} cannot claim leadership (epoch {epoch}): only a kubelet with a certificate of its own can; \
             others send no epoch"
        );
        return Err(denied(text));
    };
    // Kubelets of earlier versions name no node in their pods.
    let node = if node.is_empty() { name } else { node };
    if !may_lead(name, node, nodes) {
        let text = format!(
            "spiffe://knoc/kubelet/{name} may not lead node {node}: it needs a certificate of kubelet/{node}, or the \
             line \"{node}\" = \"kubelet/{name}\" in [policy.nodes] of the site file"
        );
        return Err(denied(text));
    }
    let ahead = epoch.saturating_sub(now.as_second());
    if epoch < 0 || ahead > EPOCH_AHEAD {
        let text = format!(
            "leadership epoch {epoch} of node {node} is {ahead} s ahead of this agent's clock ({now}), the limit is \
             {EPOCH_AHEAD} s: compare the clocks of the login node and of the kubelet's node; if they are right, a clock \
             was wrong before: delete the Lease knoc-kubelet-{node} and restart the kubelet"
        );
        return Err(denied(text));
    }
    Ok(Some(node.to_owned()))
}

/// The name of the peer, if it is a kubelet.
pub(super) fn kubelet(peer: Option<&Peer>) -> Option<&str> {
    match peer {
        Some(Peer::Tls {
            identity: Identity::Kubelet { name },
            ..
        }) => Some(name),
        Some(Peer::Tls { .. } | Peer::Unix { .. } | Peer::Pinned { .. } | Peer::Command) | None => {
            None
        }
    }
}

fn who(peer: &Peer) -> String {
    match peer {
        Peer::Tls { identity, .. } => identity.to_string(),
        Peer::Unix { .. } => "a process at the unix socket".to_owned(),
        Peer::Pinned { .. } => "a shim".to_owned(),
        Peer::Command => "the far side of a command".to_owned(),
    }
}

#[cfg(test)]
pub(super) mod tests;
