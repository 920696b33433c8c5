//! The messages of a pod's actor: what it is asked, how it answers, and what it tells the poller.
//!
//! Apart from the actor, so that those who only send to it ([`crate::shim_links`], [`super::stage`]) do not depend on what it
//! does.

use std::time::Duration;

use knoc_proto::{
    pb,
    pod::{PodSpec, PodValues},
    reason::ErrorReason,
};
use tokio::sync::oneshot;

use super::state::Event;
use crate::scheduler::JobRef;

/// What the poller must know of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The job of its placement, if there is one that may be alive.
    pub job: Option<JobRef>,
    /// A change is expected within seconds.
    pub poll_soon: bool,
}

/// Inputs that may wait for a busy actor (one that writes its record).
pub const INPUTS: usize = 64;

/// Why a request failed, as the API reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestError {
    /// For the caller's decision.
    pub reason: ErrorReason,
    /// For people.
    pub message: String,
}

impl RequestError {
    /// An error with its message.
    pub fn new(reason: ErrorReason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }
}

/// The answer to an api request.
pub type Reply<T> = oneshot::Sender<Result<T, RequestError>>;

/// What an actor is asked.
#[derive(Debug)]
pub enum Input {
    /// Something happened.
    Event(Event),
    /// The shim's link came or went. Which it was last, [`crate::shim_links::ShimLinks`] knows: words of two links may overtake each
    /// other.
    Link,
    /// `EnsurePod`. The first input of a new pod.
    Ensure {
        /// The shape.
        spec: Box<PodSpec>,
        /// The values.
        values: Box<PodValues>,
        /// The cluster that wants the pod.
        cluster_id: String,
        /// The pod, and whether it is new.
        reply: Reply<(pb::PodObserved, bool)>,
    },
    /// `UpdateValues`.
    Values {
        /// The values, which the actor checks against the shape.
        values: Box<pb::PodValues>,
        /// When they are staged, or written on the compute node.
        reply: Reply<()>,
    },
    /// `DeletePod`.
    Delete {
        /// Time for the containers; `None`: the pod's own.
        grace: Option<Duration>,
        /// For people.
        reason: String,
        /// When the intent is on disk.
        reply: Reply<pb::PodObserved>,
    },
    /// `ForgetPod`.
    Forget {
        /// When nothing is left on disk.
        reply: Reply<()>,
    },
}

impl Input {
    /// Answers a request with an error; drops an event.
    pub(crate) fn reject(self, error: RequestError) {
        // Who asked may be gone.
        match self {
            Self::Event(_) | Self::Link => {}
            Self::Ensure { reply, .. } => drop(reply.send(Err(error))),
            Self::Delete { reply, .. } => drop(reply.send(Err(error))),
            Self::Values { reply, .. } | Self::Forget { reply } => {
                drop(reply.send(Err(error)));
            }
        }
    }
}
