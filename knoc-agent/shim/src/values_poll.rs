//! Task: polls the job directory for newer values while the shim has no link to the agent.
//!
//! The agent sends newer values over the link. If there is none, it writes them to the job directory, as it does for a
//! job that is still queued. So a shim whose link is down looks there every few seconds, and unlinks what it has taken.

use std::time::Duration;

use knoc_contract::jobdir::JobDir;
use knoc_proto::error::chain;
use rand::RngExt as _;
use tokio::sync::{mpsc, oneshot, watch};

use super::{link::State, supervisor::Command};

/// Between two polls, before jitter: the agent reads the report of a job without a link as often.
const PERIOD: Duration = Duration::from_secs(10);

/// Polls as long as the link is down. Ends with the supervisor.
pub(super) async fn watch(
    jobdir: JobDir,
    mut link: watch::Receiver<State>,
    commands: mpsc::Sender<Command>,
) {
    while link.wait_for(|state| *state == State::Down).await.is_ok() {
        match take(&jobdir, &commands).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => tracing::warn!("staged values: {error}"),
        }
        let pause = PERIOD.mul_f64(rand::rng().random_range(0.5..1.5));
        tokio::time::sleep(pause).await;
    }
}

/// Gives the supervisor the values that are in the job directory, if any. Returns false if the supervisor has ended.
async fn take(jobdir: &JobDir, commands: &mpsc::Sender<Command>) -> Result<bool, String> {
    let dir = jobdir.clone();
    let read = tokio::task::spawn_blocking(move || dir.values()).await;
    let staged = read
        .map_err(|error| chain(&error))?
        .map_err(|error| chain(&error))?;
    let Some(values) = staged else {
        return Ok(!commands.is_closed());
    };
    let revision = values.revision;
    let (answer, written) = oneshot::channel();
    if commands
        .send(Command::Values(values, answer))
        .await
        .is_err()
    {
        return Ok(false);
    }
    let Ok(written) = written.await else {
        return Ok(false);
    };
    written?;
    let dir = jobdir.clone();
    let removed = tokio::task::spawn_blocking(move || dir.remove_values_up_to(revision)).await;
    removed
        .map_err(|error| chain(&error))?
        .map_err(|error| chain(&error))?;
    Ok(true)
}
