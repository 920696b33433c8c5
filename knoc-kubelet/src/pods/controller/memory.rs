//! What a worker remembers of a pod between rounds, by concept. After a restart an empty memory does.

use std::collections::HashSet;

use jiff::Timestamp;
use knoc_translate::Grace;
use tokio::time::Instant;

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
    pub(super) told: Told,
    /// When the last DELETE was answered.
    pub(super) released: Option<Instant>,
    /// Failed attempts in a row.
    pub(super) attempts: u32,
}

/// The verdict on the pod.
#[derive(Debug, Default)]
pub(super) struct Admission {
    pub(super) rejection: Option<Rejection>,
    /// The newest generation that was judged.
    pub(super) judged: i64,
}

/// What the agent was told, and what it answered.
#[derive(Debug, Default)]
pub(super) struct AgentSide {
    /// The newest generation that the agent answered for.
    pub(super) ensured: i64,
    /// The shortest grace period that it was told.
    pub(super) stop: Option<Grace>,
    /// The pod ran or is being deleted, and the agent does not know it (any more).
    pub(super) lost: bool,
}

/// The values that the agent was sent, and when to send them again.
#[derive(Debug, Default)]
pub(super) struct Values {
    pub(super) tokens: Tokens,
    pub(super) revision: i64,
    /// Hash of the values that the agent accepted last.
    pub(super) sent: Option<u64>,
    pub(super) refresh_at: Option<Timestamp>,
    /// When values that the agent asked for were last sent.
    pub(super) wish_answered: Option<Timestamp>,
    /// Hash of the labels and annotations that the values were made of.
    pub(super) metadata: Option<u64>,
}

/// What the API server was told.
#[derive(Debug, Default)]
pub(super) struct Status {
    /// Why the pod waits.
    pub(super) hold: Option<Hold>,
    /// The last status patch, and the resourceVersion that it led to.
    pub(super) sent: Option<(serde_json::Value, Option<String>)>,
}

/// The Events that were sent.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Sequence number of the newest note.
    pub(super) note: Option<i64>,
    /// Hashes of the attempts and failures of containers, and of warnings, each of which is told once.
    pub(super) once: HashSet<u64>,
}
