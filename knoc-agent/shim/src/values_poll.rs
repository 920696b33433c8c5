//! Task: values that were staged after the shim took its first ones, while it has no link to the agent.
//!
//! The agent gives newer values over the link. Where there is none it stages them in the job directory, as for a job
//! that waits; so a shim whose link is down looks there now and then, and unlinks what it took.

use std::time::Duration;

use knoc_contract::jobdir::JobDir;
use knoc_proto::error::chain;
use rand::RngExt as _;
use tokio::sync::{mpsc, oneshot, watch};

use super::{link::State, supervisor::Command};

/// Between two looks: as often as the agent then reads the report.
const LOOK: Duration = Duration::from_secs(10);

/// Looks whenever the link is down. Ends with the supervisor.
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
        let pause = LOOK.mul_f64(rand::rng().random_range(0.5..1.5));
        tokio::time::sleep(pause).await;
    }
}

/// Takes what is staged. False where the supervisor has ended.
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
