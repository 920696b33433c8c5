//! What a worker remembers of a pod between rounds, grouped by concept. It starts empty after a restart, which is safe.

use std::collections::{BTreeMap, HashSet};

use jiff::Timestamp;
use knoc_translate::{Grace, Lacking};
use tokio::time::Instant;

use super::hashes::Hashes;
use crate::pods::{
    resolve::Tokens,
    status::{Hold, Rejection},
};

/// What a worker remembers of a pod between rounds.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pub(super) admission: Admission,
    pub(super) agent: AgentSide,
    pub(super) values: Values,
    pub(super) status: Status,
    pub(super) events: SentEvents,
    /// When the last DELETE request was answered.
    pub(super) released: Option<Instant>,
    /// Failed attempts in a row.
    pub(super) attempts: u32,
}

/// What admission decided about the pod.
#[derive(Debug, Default)]
pub(super) struct Admission {
    pub(super) rejection: Option<Rejection>,
    /// The newest generation that was judged.
    pub(super) judged: i64,
    /// The generation that was last seen, and its annotations that say how the job is submitted, with hashes of their values.
    pub(super) options: Option<(i64, BTreeMap<String, u64>)>,
}

/// What the agent was told, and what it answered.
#[derive(Debug, Default)]
pub(super) struct AgentSide {
    /// The newest generation that the agent answered for.
    pub(super) ensured: i64,
    /// The newest generation that the agent has answered and does not take.
    pub(super) refused: i64,
    /// The shortest grace period that the agent was sent.
    pub(super) stop: Option<Grace>,
    /// The pod ran or is being deleted, but the agent does not know it, or no longer.
    pub(super) lost: bool,
}

/// The values that the agent was sent, and when to send them again.
#[derive(Debug, Default)]
pub(super) struct Values {
    pub(super) tokens: Tokens,
    pub(super) revision: i64,
    /// Hashes of the values and credentials that the agent accepted last.
    pub(super) sent: Option<Hashes>,
    pub(super) refresh_at: Option<Timestamp>,
    /// When to read objects again that nothing watches.
    pub(super) look_at: Option<Timestamp>,
    /// When the objects were read last, and the level of their changes then.
    pub(super) read: Option<(Timestamp, u64)>,
    /// The ephemeral containers that lacked something when the values were last made.
    pub(super) lacking: Vec<Lacking>,
    /// When values that the agent asked for were last sent again.
    pub(super) resent_at: Option<Timestamp>,
    /// Hash of the labels and annotations from which the values were made.
    pub(super) metadata: Option<u64>,
}

/// What the API server was sent.
#[derive(Debug, Default)]
pub(super) struct Status {
    /// Why the pod waits before the agent has it.
    pub(super) hold: Option<Hold>,
    /// The last status patch, and the resourceVersion that it led to.
    pub(super) sent: Option<(serde_json::Value, Option<String>)>,
    /// Since when the status differs from the published one.
    pub(super) differs_since: Option<Instant>,
}

/// Which Events were recorded.
#[derive(Debug, Default)]
pub(super) struct SentEvents {
    /// Sequence number of the newest note of the agent that was recorded or replaced by a later one.
    pub(super) note: Option<i64>,
    /// Since when a note about the queue is held that may be replaced by a later one.
    pub(super) held_since: Option<Instant>,
    /// Hashes of Events that are recorded only once: starts and failures of containers, and warnings.
    pub(super) once: HashSet<u64>,
}
