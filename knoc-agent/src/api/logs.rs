//! `ReadLogs`: reads through the shim's link while the pod runs, and from the log files otherwise.
//! If the link is lost on the way, the rest comes from the files. A reader whose own link was lost
//! continues at the position that it has reached; a shim that is too old for that is not asked.

use std::{future::ready, sync::Arc};

use futures::{
    Stream, StreamExt as _,
    stream::{self, BoxStream},
};
use knoc_contract::{
    capability,
    logs::{
        self,
        filter::Options,
        read::{self, Series},
    },
};
use knoc_link::bulk::{self, Messages};
use knoc_proto::{
    ids::{ContainerName, PodUid},
    pb::{self, container_status::State},
    reason::ErrorReason,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Code, Status};

use crate::site::Site;

/// The stream that a reader receives.
pub(super) type Chunks = BoxStream<'static, Result<pb::LogChunk, Status>>;

/// Reads the log of one container instance.
pub(super) async fn read(
    site: &Arc<Site>,
    tasks: &TaskTracker,
    request: pb::ReadLogsRequest,
) -> Result<Chunks, Status> {
    let uid = super::uid(&request.uid)?;
    let container = ContainerName::try_from(request.container.as_str())
        .map_err(|error| ErrorReason::InvalidRequest.status(error.to_string()))?;
    let attempt = match &request.from {
        Some(from) => attempt_of(site, &uid, &container, from)?,
        None => attempt(site, &uid, &container, request.previous)?,
    };
    let log = Log {
        site: Arc::clone(site),
        uid,
        container,
        attempt,
    };
    let shim = match request.from {
        Some(_) => {
            let able = site.shim_links.able(&log.uid, capability::LOG_POSITIONS);
            able.and_then(Result::ok)
        }
        None => site.shim_links.client(&log.uid),
    };
    if let Some(mut client) = shim {
        match client.read_logs(request.clone()).await {
            Ok(chunks) => return Ok(relay(log, tasks, &request, bulk::output(&chunks)).boxed()),
            // The link has just closed: the files have the same log.
            Err(status) if status.code() == Code::Unavailable => {}
            Err(status) => return Err(status),
        }
    }
    let live = log.series().live;
    let exists = async |path| tokio::fs::try_exists(path).await.unwrap_or(false);
    // During a rotation one name at a time is missing.
    let written = exists(live.clone()).await || exists(logs::rotated(&live, 1)).await;
    if let Some(from) = &request.from
        && from.inode != 0
        && !written
    {
        let message = format!(
            "the log of instance {attempt} of container {} no longer exists",
            log.container
        );
        return Err(ErrorReason::ContainerNotFound.status(message));
    }
    if !request.follow && !written {
        let message = format!("container {} has written no log yet", log.container);
        return Err(ErrorReason::NotRunning.status(message));
    }
    let options = Options::from(&request);
    Ok(log.read_files(tasks, options, request.follow).boxed())
}

/// The attempt at which a reader continues, whatever has become of the container since then.
fn attempt_of(
    site: &Site,
    uid: &PodUid,
    container: &ContainerName,
    from: &pb::LogPosition,
) -> Result<u32, Status> {
    let pod = site.board.get(uid.as_str());
    let pod = pod.ok_or_else(|| ErrorReason::NotFound.status(format!("no pod {uid}")))?;
    if find(&pod, container).is_none() {
        let message = format!("pod {uid} has no container {container}");
        return Err(ErrorReason::ContainerNotFound.status(message));
    }
    u32::try_from(from.attempt).map_err(|_| {
        let message = format!("from.attempt is {}, which is below 0", from.attempt);
        ErrorReason::InvalidRequest.status(message)
    })
}

/// The log of one attempt of one container.
#[derive(Clone)]
struct Log {
    site: Arc<Site>,
    uid: PodUid,
    container: ContainerName,
    attempt: u32,
}

/// How far a stream of chunks has come.
#[derive(Debug, Default)]
struct Progress {
    bytes: u64,
    next: Option<pb::LogPosition>,
    /// Whether the reader wants to know the positions.
    positions: bool,
}

/// What to do with a chunk.
#[derive(Debug)]
enum Next {
    /// Send it to the reader and go on.
    Pass(pb::LogChunk),
    /// The log is complete; send this last.
    End(Option<Result<pb::LogChunk, Status>>),
    /// The chunk is empty.
    Skip,
    /// The shim or its link is gone.
    Cut,
}

impl Progress {
    /// Whether this status comes from the shim itself, or from an older shim, which does not report
    /// positions.
    fn is_final(&self, status: &Status) -> bool {
        ErrorReason::of(status).is_some() || (self.bytes > 0 && self.next.is_none())
    }

    /// What a chunk, or the end of the stream, means to the reader, with positions only if it wants
    /// them.
    fn next(&mut self, chunk: Option<Result<pb::LogChunk, Status>>) -> Next {
        let chunk = match chunk {
            Some(Ok(chunk)) => chunk,
            Some(Err(status)) if self.is_final(&status) => return Next::End(Some(Err(status))),
            None if self.bytes > 0 && self.next.is_none() => return Next::End(None),
            Some(Err(_)) | None => return Next::Cut,
        };
        self.bytes += u64::try_from(chunk.data.len()).unwrap_or_default();
        if chunk.next.is_some() {
            self.next.clone_from(&chunk.next);
        }
        let end = chunk.end;
        let passed = if self.positions {
            Some(chunk)
        } else {
            (!chunk.data.is_empty()).then(|| pb::LogChunk {
                data: chunk.data,
                ..pb::LogChunk::default()
            })
        };
        match passed {
            passed if end => Next::End(passed.map(Ok)),
            Some(passed) => Next::Pass(passed),
            None => Next::Skip,
        }
    }
}

/// The source of the next chunk.
enum From {
    Shim(Messages<pb::LogChunk>),
    Files(Chunks),
    Nobody,
}

/// Passes on what the shim sends. If the stream breaks, the rest is read from the files, from the
/// same byte on. Nothing runs unless the reader waits for a chunk.
fn relay(
    log: Log,
    tasks: &TaskTracker,
    request: &pb::ReadLogsRequest,
    chunks: Messages<pb::LogChunk>,
) -> impl Stream<Item = Result<pb::LogChunk, Status>> + use<> {
    let (options, follow, tasks) = (Options::from(request), request.follow, tasks.clone());
    let progress = Progress {
        positions: options.positions,
        ..Progress::default()
    };
    let files =
        move |progress: &Progress| log.clone().rest(&tasks, options.clone(), follow, progress);
    let start = (From::Shim(chunks), progress, files);
    stream::unfold(start, async |(mut from, mut progress, files)| {
        loop {
            let chunks = match &mut from {
                From::Shim(chunks) => chunks,
                From::Files(chunks) => {
                    let chunk = chunks.next().await?;
                    return Some((chunk, (from, progress, files)));
                }
                From::Nobody => return None,
            };
            let chunk = match progress.next(chunks.next().await) {
                Next::Pass(chunk) => Ok(chunk),
                Next::End(last) => {
                    from = From::Nobody;
                    last?
                }
                Next::Skip => continue,
                Next::Cut => {
                    from = From::Files(files(&progress));
                    continue;
                }
            };
            return Some((chunk, (from, progress, files)));
        }
    })
}

impl Log {
    fn series(&self) -> Series {
        let jobdir = self.site.state.pod(&self.uid);
        Series {
            live: jobdir.log_path(self.container.as_str(), self.attempt),
            attempt: self.attempt,
        }
    }

    /// Reads the part of the log that the shim has not sent.
    fn rest(
        mut self,
        tasks: &TaskTracker,
        mut options: Options,
        follow: bool,
        progress: &Progress,
    ) -> Chunks {
        tracing::debug!(uid = %self.uid, container = %self.container, "the link broke: the rest of the log is read from the files");
        if let Some(next) = &progress.next {
            // The shim chose the attempt; the container may have restarted between the request and
            // the answer.
            self.attempt = u32::try_from(next.attempt).unwrap_or(self.attempt);
            options.from = Some(next.into());
            options.limit_bytes = options
                .limit_bytes
                .map(|limit| limit.saturating_sub(progress.bytes));
        }
        self.read_files(tasks, options, follow).boxed()
    }

    /// Reads the files in a task, and follows them until the instance has ended.
    fn read_files(
        self,
        tasks: &TaskTracker,
        options: Options,
        follow: bool,
    ) -> impl Stream<Item = Result<pb::LogChunk, Status>> + use<> {
        let (ended_by, ended) = watch::channel(false);
        let follow = follow.then_some(read::Follow {
            written: None,
            ended,
        });
        let mut progress = Progress {
            positions: options.positions,
            ..Progress::default()
        };
        let (output, chunks) = mpsc::channel(read::CHUNKS);
        let reading = read::read(self.series(), options, follow, output);
        tasks.spawn(async move {
            tokio::select! {
                () = reading => {}
                () = tell_end(&self, ended_by) => {}
            }
        });
        ReceiverStream::new(chunks).filter_map(move |chunk| {
            ready(match progress.next(Some(chunk)) {
                Next::Pass(chunk) => Some(Ok(chunk)),
                Next::End(last) => last,
                Next::Skip | Next::Cut => None,
            })
        })
    }
}

/// The attempt that the request means.
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
    meant(status, previous).ok_or_else(|| match &status.state {
        _ if previous => {
            let message = format!("container {container} has no previous instance");
            ErrorReason::ContainerNotFound.status(message)
        }
        Some(State::Waiting(waiting)) => {
            let message = format!(
                "container {container} is waiting to start: {}",
                waiting.reason
            );
            ErrorReason::NotRunning.status(message)
        }
        Some(State::Running(_) | State::Terminated(_)) | None => {
            let message = format!("container {container} has not been started");
            ErrorReason::NotRunning.status(message)
        }
    })
}

/// PURE: the attempt that a reader means: the newest, or the `previous` one, whose end is the status's last termination. As in
/// Kubernetes, between two attempts both are the last one that ran.
fn meant(status: &pb::ContainerStatus, previous: bool) -> Option<u32> {
    let newest = newest(status);
    match &status.state {
        Some(State::Waiting(_)) => status.last_termination.as_ref().map(|_| newest),
        Some(State::Running(_) | State::Terminated(_)) | None if previous => newest.checked_sub(1),
        Some(State::Running(_) | State::Terminated(_)) | None => Some(newest),
    }
}

/// PURE: whether an attempt has ended.
fn has_ended(status: &pb::ContainerStatus, attempt: u32) -> bool {
    let newest = newest(status);
    newest > attempt
        || match &status.state {
            Some(State::Terminated(_)) => true,
            // If there is no such attempt yet, it is the next one.
            Some(State::Waiting(_)) => newest == attempt && status.last_termination.is_some(),
            Some(State::Running(_)) | None => false,
        }
}

/// The attempt that runs, or the last one that ran.
fn newest(status: &pb::ContainerStatus) -> u32 {
    u32::try_from(status.restart_count).unwrap_or(0)
}

fn find<'a>(
    pod: &'a pb::PodObserved,
    container: &ContainerName,
) -> Option<&'a pb::ContainerStatus> {
    let mut all = pod
        .init_containers
        .iter()
        .chain(&pod.containers)
        .chain(&pod.ephemeral_containers);
    all.find(|status| status.name == container.as_str())
}

/// Tells the reader when the instance has ended, then waits until the reader is done.
async fn tell_end(log: &Log, ended: watch::Sender<bool>) {
    let mut changed = log.site.board.subscribe();
    loop {
        let over = log.site.board.get(log.uid.as_str()).is_none_or(|pod| {
            pod.outcome.is_some()
                || find(&pod, &log.container).is_none_or(|status| has_ended(status, log.attempt))
        });
        if over || changed.changed().await.is_err() {
            ended.send_replace(true);
            break;
        }
    }
    std::future::pending::<()>().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(state: State, restart_count: i32, has_ended: bool) -> pb::ContainerStatus {
        pb::ContainerStatus {
            state: Some(state),
            restart_count,
            last_termination: has_ended.then(pb::Terminated::default),
            ..pb::ContainerStatus::default()
        }
    }

    fn waiting() -> State {
        State::Waiting(pb::Waiting::default())
    }

    fn running() -> State {
        State::Running(pb::Running::default())
    }

    fn terminated() -> State {
        State::Terminated(pb::Terminated::default())
    }

    #[test]
    fn between_two_attempts_the_log_of_the_one_that_crashed_is_read() {
        for (state, restarts, ended, newest, previous) in [
            (waiting(), 0, false, None, None),
            (running(), 0, false, Some(0), None),
            // It crashed for the first time, and for the fourth time.
            (waiting(), 0, true, Some(0), Some(0)),
            (waiting(), 3, true, Some(3), Some(3)),
            (running(), 4, true, Some(4), Some(3)),
            (terminated(), 4, true, Some(4), Some(3)),
        ] {
            let status = status(state, restarts, ended);
            assert_eq!(meant(&status, false), newest, "{status:?}");
            assert_eq!(meant(&status, true), previous, "{status:?}");
        }
    }

    #[test]
    fn who_follows_a_log_is_told_when_its_attempt_has_ended() {
        for (state, restarts, ended, of_third) in [
            (running(), 3, true, false),
            (waiting(), 3, true, true),
            (terminated(), 3, true, true),
            (running(), 4, true, true),
            // The third one is about to start.
            (waiting(), 2, true, false),
        ] {
            let status = status(state, restarts, ended);
            assert_eq!(has_ended(&status, 3), of_third, "{status:?}");
        }
        assert!(!has_ended(&status(waiting(), 0, false), 0), "the first one");
    }
}
