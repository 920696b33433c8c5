//! The messages to a pod's actor, its answers, and what it tells the poller.
//!
//! They are apart from the actor, so that the modules that only send to it ([`crate::shim_links`],
//! [`super::stage`]) do not depend on its code.

use std::{net::Ipv4Addr, time::Duration};

use knoc_proto::{
    pb,
    pod::{PodSpec, PodValues},
    reason::ErrorReason,
};
use tokio::sync::oneshot;

use super::state::Event;
use crate::{image::Credentials, scheduler::JobRef};

/// What the poller must know about a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The job of its placement, if there is one that may be alive.
    pub job: Option<JobRef>,
    /// Whether a change is expected within seconds.
    pub poll_soon: bool,
}

/// The number of inputs that may wait for an actor that is busy, for example with writing its
/// record.
pub const INPUTS: usize = 64;

/// Why a request failed, as the API reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestError {
    /// Tells the caller how to react.
    pub reason: ErrorReason,
    /// The message for users.
    pub message: String,
}

impl RequestError {
    /// The error for `reason` with its message.
    pub fn new(reason: ErrorReason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }
}

/// The channel for the answer to an API request.
pub type Reply<T> = oneshot::Sender<Result<T, RequestError>>;

/// An input of an actor.
#[derive(Debug)]
pub enum Input {
    /// Something happened to the pod.
    Event(Event),
    /// The shim's link came up or went down. [`crate::shim_links::ShimLinks`] knows its present
    /// state, because messages about two links may overtake each other.
    Link,
    /// `EnsurePod`. The first input of a new pod.
    Ensure {
        /// The pod's shape.
        spec: Box<PodSpec>,
        /// The pod's values.
        values: Box<PodValues>,
        /// The credentials for its images, if the caller sent any.
        credentials: Option<Credentials>,
        /// The cluster that wants the pod.
        cluster_id: String,
        /// Answers with the pod, and whether it is new.
        reply: Reply<(pb::PodObserved, bool)>,
    },
    /// `UpdateValues`.
    Values {
        /// The values, which the actor checks against the shape.
        values: Box<pb::PodValues>,
        /// The credentials for its images, if the caller sent any.
        credentials: Option<Credentials>,
        /// Answers once the values are staged, or written on the compute node.
        reply: Reply<()>,
    },
    /// `DeletePod`.
    Delete {
        /// The grace period for the containers; `None` means the pod's own.
        grace: Option<Duration>,
        /// The message for users.
        reason: String,
        /// Answers once the intent is on disk.
        reply: Reply<pb::PodObserved>,
    },
    /// The shim of the pod's job asks for the address of the pod's own.
    Address {
        /// Answers once the address is on disk.
        reply: Reply<Ipv4Addr>,
    },
    /// `ForgetPod`.
    Forget {
        /// Answers once nothing of the pod is left on disk.
        reply: Reply<()>,
    },
}

impl Input {
    /// Answers a request with an error; drops an event.
    pub(crate) fn reject(self, error: RequestError) {
        // The caller may be gone.
        match self {
            Self::Event(_) | Self::Link => {}
            Self::Ensure { reply, .. } => drop(reply.send(Err(error))),
            Self::Delete { reply, .. } => drop(reply.send(Err(error))),
            Self::Address { reply } => drop(reply.send(Err(error))),
            Self::Values { reply, .. } | Self::Forget { reply } => {
                drop(reply.send(Err(error)));
            }
        }
    }
}
