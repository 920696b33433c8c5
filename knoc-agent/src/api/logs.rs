//! `ReadLogs`: through the shim's link while the pod runs, from the files otherwise.

use std::sync::Arc;

use futures::StreamExt as _;
use knoc_proto::{
    ids::{ContainerName, PodUid},
    pb::{self, container_status::State},
    reason::ErrorReason,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Code, Status};

use super::Answers;
use crate::{
    logs::{filter::Options, read},
    site::Site,
};

/// The bytes of one container instance.
pub(super) async fn read(
    site: &Arc<Site>,
    tasks: &TaskTracker,
    request: pb::ReadLogsRequest,
) -> Result<Answers<pb::LogChunk>, Status> {
    let uid = super::uid(&request.uid)?;
    let container = ContainerName::try_from(request.container.as_str())
        .map_err(|error| ErrorReason::InvalidRequest.status(error.to_string()))?;
    let attempt = attempt(site, &uid, &container, request.previous)?;
    if let Some(mut client) = site.shims.client(&uid) {
        match client.read_logs(request.clone()).await {
            Ok(chunks) => return Ok(chunks.into_inner().boxed()),
            // The link has just gone: the files say the same.
            Err(status) if status.code() == Code::Unavailable => {}
            Err(status) => return Err(status),
        }
    }
    let live = site.state.pod(&uid).log_path(container.as_str(), attempt);
    if !request.follow && !tokio::fs::try_exists(&live).await.unwrap_or(false) {
        let message = format!("container {container} has written no log yet");
        return Err(ErrorReason::NotRunning.status(message));
    }
    let (output, chunks) = mpsc::channel(read::CHUNKS);
    let (ended_by, ended) = watch::channel(false);
    let follow = request.follow.then_some(read::Follow {
        written: None,
        ended,
    });
    let reading = read::read(live, Options::from(&request), follow, output);
    let site = Arc::clone(site);
    tasks.spawn(async move {
        tokio::select! {
            () = reading => {}
            () = tell_end(&site, &uid, &container, attempt, ended_by) => {}
        }
    });
    Ok(ReceiverStream::new(chunks).boxed())
}

/// Which attempt the request means.
fn attempt(
    site: &Site,
    uid: &PodUid,
    container: &ContainerName,
    previous: bool,
) -> Result<u32, Status> {
    let pod = site.board.get(uid.as_str());
    let pod = pod.ok_or_else(|| ErrorReason::NotFound.status(format!("no pod {uid}")))?;
    let status = find(&pod, container).ok_or_else(|| {
        ErrorReason::ContainerNotFound.status(format!("pod {uid} has no container {container}"))
    })?;
    let current = u32::try_from(status.restart_count).unwrap_or(0);
    if previous {
        return current.checked_sub(1).ok_or_else(|| {
            let message = format!("container {container} has no previous instance");
            ErrorReason::ContainerNotFound.status(message)
        });
    }
    if let (Some(State::Waiting(waiting)), 0) = (&status.state, current) {
        let message = format!(
            "container {container} is waiting to start: {}",
            waiting.reason
        );
        return Err(ErrorReason::NotRunning.status(message));
    }
    // Between two attempts the last one that ran is meant.
    let waits = matches!(status.state, Some(State::Waiting(_)));
    Ok(if waits {
        current.saturating_sub(1)
    } else {
        current
    })
}

fn find<'a>(
    pod: &'a pb::PodObserved,
    container: &ContainerName,
) -> Option<&'a pb::ContainerStatus> {
    let mut all = pod.init_containers.iter().chain(&pod.containers);
    all.find(|status| status.name == container.as_str())
}

/// Tells the reader when the instance has ended, then waits for the reader, which ends this.
async fn tell_end(
    site: &Site,
    uid: &PodUid,
    container: &ContainerName,
    attempt: u32,
    ended: watch::Sender<bool>,
) {
    let mut changed = site.board.subscribe();
    loop {
        let over = site.board.get(uid.as_str()).is_none_or(|pod| {
            pod.outcome.is_some()
                || find(&pod, container).is_none_or(|status| {
                    u32::try_from(status.restart_count).unwrap_or(0) > attempt
                        || matches!(status.state, Some(State::Terminated(_)))
                })
        });
        if over || changed.changed().await.is_err() {
            ended.send_replace(true);
            break;
        }
    }
    std::future::pending::<()>().await;
}
