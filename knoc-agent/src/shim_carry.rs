//! Runs the job steps that carry links ([`crate::shim_steps`] says when).
//!
//! Owner task: [`serve`], which runs one task per step, from its start to its end.

use std::{io, sync::Arc, time::Duration};

use knoc_link::{
    Connection, Origin, Peer,
    carrier::Unverified,
    pinned::{self, KeyPair},
};
use knoc_proto::{error::chain, ids::PodUid};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    command::{
        CommandError, CommandErrorKind,
        relay::{Relay, Stream},
    },
    shim_connect::MARKER,
    shim_links::Carried,
    shim_steps::{Phase, Request, START},
    site::Site,
};

/// The most bytes that others may print before the stream begins, for example a task prolog.
const NOISE: u64 = 64 << 10;

/// How long steps may take to end when the agent stops.
const LAST: Duration = Duration::from_secs(3);

/// What a step needs.
struct Carrier {
    site: Arc<Site>,
    pair: KeyPair,
    connections: mpsc::Sender<Carried>,
}

impl Carrier {
    async fn run(self, request: Request, places: Arc<Semaphore>) {
        let steps = self.site.shim_steps.clone();
        // A step that was told to give way may still be ending.
        if let Ok(_place) = places.acquire().await {
            self.carry(&request).await;
        }
        steps.ended(&request.uid, request.number);
        request.phase.send_if_modified(|phase| {
            let starting = *phase == Phase::Starting;
            if starting {
                *phase = Phase::Failed("the agent is stopping".to_owned());
            }
            starting
        });
    }

    async fn carry(&self, request: &Request) {
        let uid = &request.uid;
        match self.start(request) {
            Ok((relay, stream)) => self.follow(request, relay, stream).await,
            Err(error) => {
                let text = chain(&error);
                if matches!(error.kind, CommandErrorKind::NotFound) {
                    self.site.shim_route.refused(&text);
                }
                tracing::warn!(%uid, "no job step for the link: {text}");
                request.phase.send_replace(Phase::Failed(text));
            }
        }
    }

    fn start(&self, request: &Request) -> Result<(Relay, Stream), CommandError> {
        let dir = self.site.state.pod(&request.uid);
        let args = ["connect".as_ref(), dir.path().as_os_str()];
        let command = self
            .site
            .scheduler
            .enter(&request.job, &self.site.shim, args);
        command.relay()
    }

    /// Follows the step to its end.
    async fn follow(&self, request: &Request, mut relay: Relay, stream: Stream) {
        let (uid, job) = (&request.uid, &request.job);
        tracing::debug!(%uid, %job, "a job step starts to carry the link");
        let closer = relay.closer();
        let mut ended = std::pin::pin!(relay.ended());
        let opening = tokio::time::timeout(START, self.open(uid, stream));
        let opened = tokio::select! {
            opened = opening => opened.unwrap_or_else(|_| Err(format!("not within {} s", START.as_secs()))),
            () = request.close.cancelled() => Err("another pod needed its place".to_owned()),
            text = &mut ended => Err(format!("the step ended: {text}")),
        };
        if let Err(mut why) = opened {
            closer.cancel();
            // What the step printed says why, for example that steps are not permitted.
            if !ended_already(&why) {
                let text = ended.await;
                if !text.is_empty() {
                    why = format!("{why}: {text}");
                }
            }
            if self.site.scheduler.is_refusal(&why) {
                self.site.shim_route.refused(&why);
            }
            tracing::warn!(%uid, %job, "the job step carries no link: {why}");
            request.phase.send_replace(Phase::Failed(why));
            return;
        }
        tracing::debug!(%uid, %job, "a job step carries the link");
        self.site.shim_route.entered();
        request.phase.send_replace(Phase::Up);
        tokio::select! {
            text = &mut ended => {
                tracing::debug!(%uid, %job, "the job step has ended: {text}");
                return;
            }
            () = request.close.cancelled() => {}
            () = self.site.shim_steps.idle(uid, request.number) => {}
        }
        closer.cancel();
        tracing::debug!(%uid, %job, "the job step ends, because nobody uses the link");
        ended.await;
    }

    /// Begins the link over the step's stream, up to the shim's first report.
    async fn open(&self, uid: &PodUid, mut stream: Stream) -> Result<(), String> {
        skip_noise(&mut stream)
            .await
            .map_err(|error| chain(&error))?;
        let connection = Unverified {
            io: stream,
            origin: Origin::ThisHost,
        };
        let peer = format!("the shim of pod {uid}");
        let connection: Connection = pinned::accept_over(connection, &peer, &self.pair)
            .await
            .map_err(|error| chain(&error))?;
        debug_assert!(matches!(connection.peer(), Peer::Pinned { .. }));
        let (opened, open) = oneshot::channel();
        let carried = Carried {
            connection,
            uid: uid.clone(),
            opened,
        };
        let stopping = || "the agent is stopping".to_owned();
        let sent = self.connections.send(carried).await;
        sent.map_err(|_| stopping())?;
        open.await
            .map_err(|_| "the link was rejected, or broke before the first report".to_owned())
    }
}

/// Task: starts steps on request, until `stop`. Their connections go to `connections`.
pub async fn serve(
    site: Arc<Site>,
    pair: KeyPair,
    mut requests: mpsc::Receiver<Request>,
    connections: mpsc::Sender<Carried>,
    stop: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(site.shim_steps.most()));
    let mut tasks = JoinSet::new();
    loop {
        let request = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = tasks.join_next() => continue,
            request = requests.recv() => request,
        };
        let Some(request) = request else { break };
        let carrier = Carrier {
            site: Arc::clone(&site),
            pair: pair.clone(),
            connections: connections.clone(),
        };
        tasks.spawn(carrier.run(request, Arc::clone(&places)));
    }
    // Steps that end in an orderly way leave nothing behind on the compute nodes.
    site.shim_steps.close_all();
    let all = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST, all).await.is_err() {
        tasks.shutdown().await;
    }
}

fn ended_already(why: &str) -> bool {
    why.starts_with("the step ended: ")
}

/// Reads up to and including [`MARKER`], which `connect` writes first.
async fn skip_noise(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    let mut read = stream.take(NOISE);
    let mut last = [0_u8; MARKER.len()];
    loop {
        let byte = match read.read_u8().await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let message = "`knoc-agent connect` has not begun the stream";
                return Err(io::Error::new(error.kind(), message));
            }
            byte => byte?,
        };
        last.rotate_left(1);
        if let Some(end) = last.last_mut() {
            *end = byte;
        }
        if last == *MARKER {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_prolog_prints_is_skipped_up_to_the_marker() {
        let mut bytes = b"Welcome\nknoc\n".to_vec();
        bytes.extend_from_slice(MARKER);
        bytes.extend_from_slice(b"stream");
        let mut from = bytes.as_slice();
        skip_noise(&mut from).await.unwrap();
        assert_eq!(from, b"stream");
        let error = skip_noise(&mut &b"no marker"[..]).await.unwrap_err();
        assert!(error.to_string().contains("connect"), "{error}");
        let endless = vec![b'x'; usize::try_from(NOISE).unwrap() + MARKER.len()];
        skip_noise(&mut endless.as_slice()).await.unwrap_err();
    }
}
