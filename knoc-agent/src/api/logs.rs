//! `ReadLogs`: through the shim's link while the pod runs, from the files otherwise, and from the files where the link
//! is lost on the way.

use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use knoc_proto::{
    bulk::{self, Messages},
    ids::{ContainerName, PodUid},
    pb::{self, container_status::State},
    reason::ErrorReason,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Code, Status};

use crate::{
    logs::{
        filter::Options,
        read::{self, Series},
    },
    site::Site,
};

/// What a reader is sent.
pub(super) type Chunks = ReceiverStream<Result<pb::LogChunk, Status>>;

/// The bytes of one container instance.
pub(super) async fn read(
    site: &Arc<Site>,
    tasks: &TaskTracker,
    request: pb::ReadLogsRequest,
) -> Result<Chunks, Status> {
    let uid = super::uid(&request.uid)?;
    let container = ContainerName::try_from(request.container.as_str())
        .map_err(|error| ErrorReason::InvalidRequest.status(error.to_string()))?;
    let attempt = attempt(site, &uid, &container, request.previous)?;
    let log = Log {
        site: Arc::clone(site),
        uid,
        container,
        attempt,
    };
    if let Some(mut client) = site.shims.client(&log.uid) {
        match client.read_logs(request.clone()).await {
            Ok(chunks) => {
                let (output, answer) = mpsc::channel(read::CHUNKS);
                tasks.spawn(log.relay(bulk::output(&chunks), request, output));
                return Ok(ReceiverStream::new(answer));
            }
            // The link has just gone: the files say the same.
            Err(status) if status.code() == Code::Unavailable => {}
            Err(status) => return Err(status),
        }
    }
    let live = log.series().live;
    if !request.follow && !tokio::fs::try_exists(&live).await.unwrap_or(false) {
        let message = format!("container {} has written no log yet", log.container);
        return Err(ErrorReason::NotRunning.status(message));
    }
    let (output, answer) = mpsc::channel(read::CHUNKS);
    let options = Options::from(&request);
    tasks.spawn(log.read_files(options, request.follow, output));
    Ok(ReceiverStream::new(answer))
}

/// The log of one attempt of one container.
struct Log {
    site: Arc<Site>,
    uid: PodUid,
    container: ContainerName,
    attempt: u32,
}

/// How far a stream of chunks came.
#[derive(Debug, Default)]
struct Progress {
    bytes: u64,
    next: Option<pb::LogPosition>,
}

impl Progress {
    /// Is this the shim's own word, or an older one's, which does not say where it stands?
    fn is_final(&self, status: &Status) -> bool {
        ErrorReason::of(status).is_some() || (self.bytes > 0 && self.next.is_none())
    }
}

/// How a stream of chunks ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The reader has all of it, or the reason why not, or is gone.
    Told,
    /// Whoever sent it is gone, or the link.
    Cut,
}

impl Log {
    fn series(&self) -> Series {
        let jobdir = self.site.state.pod(&self.uid);
        Series {
            live: jobdir.log_path(self.container.as_str(), self.attempt),
            attempt: self.attempt,
        }
    }

    /// Task: passes on what the shim sends. Where it is cut, the files say the rest, from the same byte.
    async fn relay(
        mut self,
        chunks: Messages<pb::LogChunk>,
        request: pb::ReadLogsRequest,
        output: read::Output,
    ) {
        let mut progress = Progress::default();
        if pass_on(chunks, &output, &mut progress).await == End::Told {
            return;
        }
        tracing::debug!(uid = %self.uid, container = %self.container, "a log goes on from the files");
        let mut options = Options::from(&request);
        if let Some(next) = &progress.next {
            // The shim chose; a restart may have come between the question and its answer.
            self.attempt = u32::try_from(next.attempt).unwrap_or(self.attempt);
            options.from = Some(next.into());
            options.limit_bytes = options
                .limit_bytes
                .map(|limit| limit.saturating_sub(progress.bytes));
        }
        self.read_files(options, request.follow, output).await;
    }

    /// Task: reads the files, and follows them until the instance has ended.
    async fn read_files(self, options: Options, follow: bool, output: read::Output) {
        let (ended_by, ended) = watch::channel(false);
        let follow = follow.then_some(read::Follow {
            written: None,
            ended,
        });
        let (read_to, chunks) = mpsc::channel(read::CHUNKS);
        let reading = read::read(self.series(), options, follow, read_to);
        let mut progress = Progress::default();
        let passing = pass_on(ReceiverStream::new(chunks), &output, &mut progress);
        tokio::select! {
            _ = async { tokio::join!(reading, passing) } => {}
            () = tell_end(&self, ended_by) => {}
        }
    }
}

/// Passes chunks on, without what only a relay needs to know.
async fn pass_on(
    mut chunks: impl Stream<Item = Result<pb::LogChunk, Status>> + Unpin,
    output: &read::Output,
    progress: &mut Progress,
) -> End {
    loop {
        let chunk = tokio::select! {
            biased;
            () = output.closed() => return End::Told,
            chunk = chunks.next() => chunk,
        };
        let chunk = match chunk {
            Some(Ok(chunk)) => chunk,
            Some(Err(status)) if progress.is_final(&status) => {
                // Where the reader is gone nobody is left to be told.
                drop(output.send(Err(status)).await);
                return End::Told;
            }
            None if progress.bytes > 0 && progress.next.is_none() => return End::Told,
            Some(Err(_)) | None => return End::Cut,
        };
        progress.bytes += u64::try_from(chunk.data.len()).unwrap_or_default();
        if chunk.next.is_some() {
            progress.next = chunk.next;
        }
        if !chunk.data.is_empty() {
            let bare = pb::LogChunk {
                data: chunk.data,
                ..pb::LogChunk::default()
            };
            if output.send(Ok(bare)).await.is_err() {
                return End::Told;
            }
        }
        if chunk.end {
            return End::Told;
        }
    }
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
async fn tell_end(log: &Log, ended: watch::Sender<bool>) {
    let mut changed = log.site.board.subscribe();
    loop {
        let over = log.site.board.get(log.uid.as_str()).is_none_or(|pod| {
            pod.outcome.is_some()
                || find(&pod, &log.container).is_none_or(|status| {
                    u32::try_from(status.restart_count).unwrap_or(0) > log.attempt
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
