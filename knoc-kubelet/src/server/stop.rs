//! Why the kubelet ends a session: its own shutdown, or a session on which nothing moves.
//!
//! A relay writes the reason to its error streams, since Go's client takes an error stream without text for a success.
//! What is not written after [`CLOSING_TIMEOUT`] is cut.

use tokio_util::sync::CancellationToken;

use knoc_remotecommand::streams::{Activity, CLOSING_TIMEOUT, IDLE};

/// When and why the kubelet ends a session.
#[derive(Debug)]
pub(super) struct Stop {
    cut: CancellationToken,
    activity: Activity,
}

impl Stop {
    /// A session ends at the end of the server, or if `activity` stays idle.
    pub(super) fn new(cut: CancellationToken, activity: Activity) -> Self {
        Self { cut, activity }
    }

    /// Returns the reason for the client when the session must end. Cancel safe.
    pub(super) async fn why(&self) -> String {
        tokio::select! {
            // Shutdown comes first, since it is the more useful reason.
            biased;
            () = self.cut.cancelled() => "the kubelet is shutting down".to_owned(),
            () = self.activity.idle() => format!("nothing moved for {} h", IDLE.as_secs() / 3600),
        }
    }

    /// Returns the reason when the session should have ended already.
    pub(super) async fn overdue(&self) -> String {
        let why = self.why().await;
        tokio::time::sleep(CLOSING_TIMEOUT).await;
        why
    }
}
