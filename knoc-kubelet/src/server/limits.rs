//! Limits the sessions and the calls to the agent at a time. Further requests are rejected with the reason, since
//! otherwise they would hang or delay others.

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Upgraded connections, which no longer count as connections. Each holds two buffers and what it has received.
pub(super) const MAX_SESSIONS: usize = 1024;
/// Followed logs, execs, attachments and connections to ports. They share one link to the agent, whose window is that
/// of 512 streams ([`knoc_link::CONNECTION_WINDOW`]): so many may stand still while every other stream still moves.
pub(super) const MAX_CALLS: usize = 480;

/// A limit on how many of something run at a time.
#[derive(Debug, Clone)]
pub(super) struct Limit {
    what: &'static str,
    most: usize,
    free: Arc<Semaphore>,
}

/// Permission for one, until it is dropped.
pub(super) type Permit = OwnedSemaphorePermit;

/// The limit was reached.
#[derive(Debug, Error)]
#[error("too many {what} at once on this node ({most}), try again when some have ended")]
pub(super) struct Busy {
    what: &'static str,
    most: usize,
}

impl Limit {
    pub(super) fn sessions() -> Self {
        Self::new("sessions of exec, attach and port-forward", MAX_SESSIONS)
    }

    pub(super) fn calls() -> Self {
        Self::new("logs, execs and forwarded connections", MAX_CALLS)
    }

    fn new(what: &'static str, most: usize) -> Self {
        let free = Arc::new(Semaphore::new(most));
        Self { what, most, free }
    }

    /// Takes a permit, or returns that the limit was reached.
    pub(super) fn take(&self) -> Result<Permit, Busy> {
        let Self { what, most, .. } = *self;
        let slot = Arc::clone(&self.free).try_acquire_owned();
        slot.map_err(|_| {
            tracing::warn!(what, most, "rejected a request, too many are running");
            Busy { what, most }
        })
    }
}

impl IntoResponse for Busy {
    fn into_response(self) -> Response {
        (StatusCode::SERVICE_UNAVAILABLE, format!("{self}\n")).into_response()
    }
}
