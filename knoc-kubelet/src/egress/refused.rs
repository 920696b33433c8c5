//! PURE: why a connection of a pod is not opened, for people and for metrics.

use super::{CROWDED, LAST, OF_ALL, OF_NAMESPACE, OF_ONE, SHARE, decide::Refusal, table::Name};
use crate::metrics::traffic::Reason;

/// Why a connection is not opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error(transparent)]
    Decided(#[from] Refusal),
    #[error("the pod has {OF_ONE} open connections to the cluster, which is the limit")]
    ManyOfPod,
    #[error(
        "the pods of this node have {OF_ALL} open connections to the cluster, which is the limit"
    )]
    ManyOfNode,
    #[error(
        "the pods of this node have {CROWDED} open connections to the cluster or more, and then a pod gets no more than {SHARE}"
    )]
    Crowded,
    #[error(
        "the last {LAST} connections of this node to the cluster are for namespaces whose pods have fewer than {OF_NAMESPACE}"
    )]
    ManyOfNamespace,
    #[error("the kubelet has not read the cluster's Services yet")]
    NotRead,
    #[error(
        "Service {0} leads to a pod of this node at its own address, which is reached only through an agent that gives pods addresses"
    )]
    OwnPod(Name),
    #[error("the agent announced a connection to {0:?}")]
    Malformed(String),
}

impl Refused {
    /// As metrics show it.
    pub(super) fn reason(&self) -> Reason {
        match self {
            Self::Decided(refusal) => match refusal {
                Refusal::Unknown { .. } => Reason::Unknown,
                Refusal::NotAllowed { .. } => Reason::NotListed,
                Refusal::NoEndpoint { .. } => Reason::NoEndpoint,
                Refusal::OfNode { .. } | Refusal::Never { .. } => Reason::Endpoint,
            },
            Self::ManyOfPod | Self::ManyOfNode | Self::Crowded | Self::ManyOfNamespace => {
                Reason::Limit
            }
            Self::NotRead => Reason::NotRead,
            Self::OwnPod(_) => Reason::Endpoint,
            Self::Malformed(_) => Reason::Malformed,
        }
    }
}
