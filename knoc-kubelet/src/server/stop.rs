//! The end that we put to a session: our own shutdown, or that nothing moves any more.
//!
//! A relay that is told of it says why on its error streams, since Go's client takes an error stream that just ends for
//! a success; what is not through after [`CLOSING_TIMEOUT`] is cut.

use tokio_util::sync::CancellationToken;

use knoc_remotecommand::streams::{Activity, CLOSING_TIMEOUT, IDLE};

/// When we end a session, and why.
#[derive(Debug)]
pub(super) struct Stop {
    cut: CancellationToken,
    activity: Activity,
}

impl Stop {
    /// By the server's end, and what moves on the session.
    pub(super) fn new(cut: CancellationToken, activity: Activity) -> Self {
        Self { cut, activity }
    }

    /// Returns when the session shall end, with the reason for its client. Cancel safe.
    pub(super) async fn why(&self) -> String {
        tokio::select! {
            // The shutdown first: it is the one to know.
            biased;
            () = self.cut.cancelled() => "the kubelet is shutting down".to_owned(),
            () = self.activity.idle() => format!("nothing moved for {} h", IDLE.as_secs() / 3600),
        }
    }

    /// Returns when the session should have ended.
    pub(super) async fn overdue(&self) -> String {
        let why = self.why().await;
        tokio::time::sleep(CLOSING_TIMEOUT).await;
        why
    }
}
