//! PURE: decides what to do next for one pod. The whole policy of the controller is here.
//!
//! ```text
//!  present ────┬ rejected, and the agent is not known to have it ── not terminal ────► Reject
//!              │                                               └── terminal ────────► Release if it is being deleted
//!              │ not both lists read, or link down ────────────────────────────────► Wait
//!              │ agent does not know it ── terminal ───────────────────────────────► Release if it is being deleted
//!              │                       ├── it ran already, or is being deleted ────► MarkLost   (never run twice)
//!              │                       └── else ───────────────────────────────────► Ensure
//!              │ finished at the agent ── being deleted, not terminal ─────────────► Settle
//!              │                      └── being deleted, terminal ─────────────────► Release
//!              │ not finished there ── being deleted ──────────────────────────────► Stop(grace)
//!              │                   ├── terminal in the API server ─────────────────► Stop(0)
//!              │                   ├── newer generation ───────────────────────────► Ensure
//!              │                   └── values due ─────────────────────────────────► Refresh
//!  gone ───────┬ agent knows it ── not ended ──────────────────────────────────────► Stop(0)
//!              │               └── ended ──────────────────────────────────────────► Forget
//!              └ on neither side ──────────────────────────────────────────────────► Drop
//! ```
//!
//! The first line that applies decides; if none does, the worker waits. A pod that is rejected, lost or ended gets its
//! terminal phase before it is released. Mirror pods are left alone.
//!
//! Nothing here ends the job of a pod that this process has never seen; [`super::orphans`] does.

use knoc_proto::pb::PodPhase;
use knoc_translate::Grace;

/// What Kubernetes wants of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Desired {
    /// This process never saw the pod, so it does not end its job.
    Unseen,
    /// The pod was seen and is gone from the API server.
    Gone,
    /// The pod is bound to our node.
    Present(Present),
}

/// A pod bound to our node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "facts read off one object, not states of a machine"
)]
pub struct Present {
    /// `metadata.generation`.
    pub generation: i64,
    /// Whether its phase in the API server is terminal.
    pub terminal: bool,
    /// Whether its status says that a container ran.
    pub ran: bool,
    /// Its grace period, if it is being deleted.
    pub deletion: Option<Grace>,
    /// Whether admission rejects it.
    pub rejected: bool,
    /// Whether it is a mirror pod, which belongs to another kubelet.
    pub mirror: bool,
}

/// What the agent reports of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentSide {
    /// The link is down, or not both first lists have been read.
    Unknown,
    /// The agent does not know the pod.
    Absent,
    /// The agent knows the pod.
    Known {
        /// Its phase at the agent.
        phase: PodPhase,
        /// The generation that the agent acts on.
        generation: i64,
        /// Whether its deletion was requested.
        deleting: bool,
    },
}

/// What this process did for the pod before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// The newest generation that the agent answered for.
    pub ensured: i64,
    /// The shortest grace period that the agent was sent.
    pub stop: Option<Grace>,
    /// Whether the values are due to be refreshed.
    pub refresh_due: bool,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Do nothing until something changes.
    Wait,
    /// Publish phase Failed with all reasons; there is no job.
    Reject,
    /// Resolve, translate and call `EnsurePod`.
    Ensure,
    /// The agent does not know the pod, which ran or is being deleted: publish phase Failed and never run it again.
    MarkLost,
    /// The job has ended and the pod is being deleted: publish its terminal phase first, for clients that wait for it.
    Settle,
    /// Resolve and call `UpdateValues`.
    Refresh,
    /// Call `DeletePod` with this grace period.
    Stop(Grace),
    /// Send the last DELETE, with grace 0 and the UID as precondition.
    Release,
    /// Call `ForgetPod`.
    Forget,
    /// Nothing is left of the pod on either side: forget it.
    Drop,
}

/// Decides what to do next for one pod.
#[must_use]
pub fn decide(desired: Desired, agent: AgentSide, done: Done) -> Decision {
    match desired {
        Desired::Unseen => match agent {
            AgentSide::Absent => Decision::Drop,
            AgentSide::Unknown | AgentSide::Known { .. } => Decision::Wait,
        },
        Desired::Gone => gone(agent, done),
        Desired::Present(pod) if pod.mirror => Decision::Wait,
        Desired::Present(pod) => present(pod, agent, done),
    }
}

fn gone(agent: AgentSide, done: Done) -> Decision {
    match agent {
        AgentSide::Unknown => Decision::Wait,
        AgentSide::Absent => Decision::Drop,
        AgentSide::Known {
            phase: PodPhase::Finished,
            ..
        } => Decision::Forget,
        AgentSide::Known { deleting, .. } => stop(Grace::NONE, deleting, done),
    }
}

fn present(pod: Present, agent: AgentSide, done: Done) -> Decision {
    match agent {
        // No job can exist, so there is nothing to wait for.
        AgentSide::Unknown | AgentSide::Absent if pod.rejected => match pod.deletion {
            _ if !pod.terminal => Decision::Reject,
            Some(_) => Decision::Release,
            None => Decision::Wait,
        },
        AgentSide::Unknown => Decision::Wait,
        AgentSide::Absent if pod.terminal && pod.deletion.is_some() => Decision::Release,
        AgentSide::Absent if pod.terminal => Decision::Wait,
        AgentSide::Absent if pod.ran || pod.deletion.is_some() => Decision::MarkLost,
        AgentSide::Absent => Decision::Ensure,
        AgentSide::Known {
            phase: PodPhase::Finished,
            ..
        } => match pod.deletion {
            Some(_) if pod.terminal => Decision::Release,
            Some(_) => Decision::Settle,
            None => Decision::Wait,
        },
        AgentSide::Known {
            deleting,
            generation,
            ..
        } => match pod.deletion {
            Some(grace) => stop(grace, deleting, done),
            // Somebody else ended the pod in the API (pod GC, an eviction): its job must not outlive it.
            None if pod.terminal => stop(Grace::NONE, deleting, done),
            None if generation.max(done.ensured) < pod.generation => Decision::Ensure,
            None if done.refresh_due && !deleting => Decision::Refresh,
            None => Decision::Wait,
        },
    }
}

/// Stops once, and again only with a shorter grace period.
fn stop(grace: Grace, deleting: bool, done: Done) -> Decision {
    match done.stop {
        Some(told) if deleting && told <= grace => Decision::Wait,
        Some(_) | None => Decision::Stop(grace),
    }
}

#[cfg(test)]
mod tests;
