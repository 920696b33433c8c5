//! Ends an agent that was started on demand once it had no link for a while.

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How many connections of kubelets and knocctls are open. Clones count into one number.
#[derive(Debug, Clone)]
pub struct Links(watch::Sender<usize>);

impl Default for Links {
    fn default() -> Self {
        Self(watch::Sender::new(0))
    }
}

/// An open connection; it is counted until this is dropped.
#[derive(Debug)]
pub(crate) struct Counted(watch::Sender<usize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open = open.saturating_sub(1));
    }
}

impl Links {
    /// Counts a connection.
    pub(crate) fn count(&self) -> Counted {
        self.0.send_modify(|open| *open += 1);
        Counted(self.0.clone())
    }

    /// Task: cancels `shutdown` once there was no connection for `linger`. Jobs are not touched: the next link starts an
    /// agent again.
    pub async fn end_without(
        self,
        linger: Duration,
        shutdown: CancellationToken,
        stop: CancellationToken,
    ) {
        let mut open = self.0.subscribe();
        loop {
            let idle = *open.borrow_and_update() == 0;
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                // `self` holds the sender, so this does not fail.
                Ok(()) = open.changed() => {}
                () = tokio::time::sleep(linger), if idle => {
                    tracing::info!(?linger, "no link for this long: an agent that was started on demand ends");
                    shutdown.cancel();
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_ends_only_after_a_whole_pause_without_any_link() {
        let (links, shutdown) = (Links::default(), CancellationToken::new());
        let linger = Duration::from_mins(10);
        let ending = links.clone();
        let ending = ending.end_without(linger, shutdown.clone(), CancellationToken::new());
        let life = async {
            let [first, second] = [links.count(), links.count()];
            tokio::time::sleep(linger * 3).await;
            drop(first);
            tokio::time::sleep(linger * 3).await;
            assert!(!shutdown.is_cancelled(), "a link is open");
            drop(second);
            tokio::time::sleep(linger / 2).await;
            drop(links.count());
            tokio::time::sleep(linger * 3 / 4).await;
            assert!(
                !shutdown.is_cancelled(),
                "the pause begins with each link again"
            );
        };
        tokio::join!(ending, life);
        assert!(shutdown.is_cancelled());
    }
}
