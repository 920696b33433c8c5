//! PURE: what to do next for one pod. All policy of the controller stands here.
//!
//! ```text
//!              ┌────────────── not both lists read, or link down ──────────────► Wait
//!  present ────┤ refused, never accepted ──────────────────────────────────────► Reject
//!              │ agent does not know it ── it ran already, or is being deleted ► Lose   (never run twice)
//!              │                        └── else ──────────────────────────────► Ensure
//!              │ newer generation ─────────────────────────────────────────────► Ensure
//!              │ values due ───────────────────────────────────────────────────► Refresh
//!              │ deletionTimestamp ── job not ended ───────────────────────────► Stop(grace)
//!              │                  └── job ended, or never was ── not terminal ─► Settle (or Reject, Lose: terminal first)
//!              │                                              └── terminal ─────► Release
//!  gone ───────┤ agent knows it ── not ended ──────────────────────────────────► Stop(0)
//!              │                └── ended ─────────────────────────────────────► Forget
//!              └ on neither side ──────────────────────────────────────────────► Drop
//! ```
//!
//! Nothing here ends the job of a pod that this process has never seen: that is [`super::orphans`].

use knoc_proto::pb::PodPhase;
use knoc_translate::Grace;

/// What is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Desired {
    /// This process never saw the pod: not ours to judge.
    Unseen,
    /// It was seen, and is gone from the API server.
    Gone,
    /// It is bound to our node.
    Present(Present),
}

/// A pod bound to our node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "facts read off one object, not states of a machine"
)]
pub struct Present {
    /// metadata.generation.
    pub generation: i64,
    /// Its phase in the API server is terminal.
    pub terminal: bool,
    /// Its status says that a container ran.
    pub ran: bool,
    /// Its grace, if it is being deleted.
    pub deletion: Option<Grace>,
    /// Admission refuses it.
    pub refused: bool,
    /// A mirror pod: another kubelet's.
    pub mirror: bool,
}

/// What the agent says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentSide {
    /// The link is down, or not both first lists have been read.
    Unknown,
    /// The agent does not know the pod.
    Absent,
    /// The agent knows it.
    Known {
        /// Where the pod stands.
        phase: PodPhase,
        /// The generation acted on.
        generation: i64,
        /// A deletion was asked for.
        deleting: bool,
    },
}

/// What this process did before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// The newest generation that the agent answered for.
    pub ensured: i64,
    /// The shortest grace it was told.
    pub stop: Option<Grace>,
    /// Values are due to be refreshed.
    pub refresh_due: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing: an event will come.
    Wait,
    /// Phase Failed with all reasons; no job.
    Reject,
    /// resolve, translate, `EnsurePod`.
    Ensure,
    /// The agent does not know the pod, which ran or is being deleted: Failed, never a (second) run.
    Lose,
    /// The job has ended and the pod is being deleted: its terminal phase is published first, whoever waits for it.
    Settle,
    /// resolve, `UpdateValues`.
    Refresh,
    /// `DeletePod` with this grace.
    Stop(Grace),
    /// The last DELETE: grace 0, UID precondition.
    Release,
    /// `ForgetPod`.
    Forget,
    /// Nothing is left on either side.
    Drop,
}

/// Decides.
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
        // Without a job there is nothing to wait for.
        AgentSide::Unknown | AgentSide::Absent if pod.refused => match pod.deletion {
            _ if !pod.terminal => Decision::Reject,
            Some(_) => Decision::Release,
            None => Decision::Wait,
        },
        AgentSide::Unknown => Decision::Wait,
        AgentSide::Absent if pod.terminal && pod.deletion.is_some() => Decision::Release,
        AgentSide::Absent if pod.terminal => Decision::Wait,
        AgentSide::Absent if pod.ran || pod.deletion.is_some() => Decision::Lose,
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
            // Others ended it in the API (pod GC, an eviction): the job must not outlive it.
            None if pod.terminal => stop(Grace::NONE, deleting, done),
            None if generation.max(done.ensured) < pod.generation => Decision::Ensure,
            None if done.refresh_due && !deleting => Decision::Refresh,
            None => Decision::Wait,
        },
    }
}

/// Once, and again only with a shorter grace.
fn stop(grace: Grace, deleting: bool, done: Done) -> Decision {
    match done.stop {
        Some(told) if deleting && told <= grace => Decision::Wait,
        Some(_) | None => Decision::Stop(grace),
    }
}

#[cfg(test)]
mod tests;
