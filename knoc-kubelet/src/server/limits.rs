//! How many sessions, and calls to the agent, go on at once. What exceeds them is refused by name: it would hang
//! otherwise, or hold up others.

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Upgraded connections, which no longer count as connections: each holds two buffers and what it has received.
pub(super) const MAX_SESSIONS: usize = 1024;
/// Readers of logs, execs, attachments and connections to ports. They share one link to the agent, and its window is
/// that of 512 streams ([`knoc_link::CONNECTION_WINDOW`]): so many may stand still and every other one still moves.
pub(super) const MAX_CALLS: usize = 480;

/// A bound on what goes on at once.
#[derive(Debug, Clone)]
pub(super) struct Limit {
    what: &'static str,
    most: usize,
    free: Arc<Semaphore>,
}

/// Room for one, until it is dropped.
pub(super) type Permit = OwnedSemaphorePermit;

/// There is no place.
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

    /// Takes a place, or says that there is none.
    pub(super) fn take(&self) -> Result<Permit, Busy> {
        let Self { what, most, .. } = *self;
        let place = Arc::clone(&self.free).try_acquire_owned();
        place.map_err(|_| {
            tracing::warn!(what, most, "refused a request, too many go on");
            Busy { what, most }
        })
    }
}

impl IntoResponse for Busy {
    fn into_response(self) -> Response {
        (StatusCode::SERVICE_UNAVAILABLE, format!("{self}\n")).into_response()
    }
}
