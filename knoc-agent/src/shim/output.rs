//! Task: drains a container's output into its log, and hands it to attached clients. One per attempt.
//!
//! The pipes are always drained: while a batch is being written (on a blocking thread) the next one fills; when that
//! is full too the program waits, but not longer than [`STALL`]: then lines are dropped and counted. A batch goes as
//! soon as the writer is free, so an idle pipe's line is written at once.

use std::{io, pin::Pin, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{attach::hub::Hub, fdio::Stream};
use crate::logs::{
    cri::{Cutter, stamp},
    writer::{Losses, Writer},
};

/// How much may wait for the writer.
const BATCH: usize = 256 << 10;

/// How long a full batch waits for a file system that hangs.
const STALL: Duration = Duration::from_secs(10);

/// How long silence must last, after the program has ended, before what it left behind is not waited for.
const DRAIN: Duration = Duration::from_secs(1);

/// One of the program's streams.
#[derive(Debug)]
pub(crate) struct Source {
    /// A terminal is input as well.
    stream: Arc<Stream>,
    kind: crate::logs::cri::Stream,
    cutter: Cutter,
    open: bool,
}

impl Source {
    pub(crate) fn new(stream: impl Into<Arc<Stream>>, kind: crate::logs::cri::Stream) -> Self {
        Self {
            stream: stream.into(),
            kind,
            cutter: Cutter::new(kind),
            open: true,
        }
    }
}

type Writing = JoinHandle<(Writer, Vec<u8>)>;

/// Drains `sources` until all have ended, or until silence once `ended` is cancelled.
pub(crate) async fn pump(
    sources: Vec<Source>,
    writer: Writer,
    written: watch::Sender<u64>,
    ended: CancellationToken,
    hub: &Hub,
) -> Losses {
    let mut pump = Pump::new(sources, hub);
    let mut idle = Some(writer);
    let mut writing: Option<Writing> = None;
    loop {
        if !pump.batch.is_empty()
            && let Some(writer) = idle.take()
        {
            writing = Some(pump.write(writer));
        }
        let open = pump.sources.iter().any(|source| source.open);
        if !open && writing.is_none() {
            break;
        }
        let full = pump.batch.len() >= BATCH;
        let silence = Instant::now() + DRAIN;
        tokio::select! {
            biased;
            done = finished(&mut writing), if writing.is_some() => {
                writing = None;
                let Some((writer, spare)) = done else { break };
                pump.spare = spare;
                idle = Some(writer);
                written.send_modify(|batches| *batches += 1);
            }
            () = pump.readable(), if open && !full => pump.read(),
            () = tokio::time::sleep(STALL), if full => pump.lose(),
            () = silent(&ended, silence), if open && !full => pump.close(),
        }
    }
    finish(idle, pump).await
}

async fn finish(writer: Option<Writer>, mut pump: Pump<'_>) -> Losses {
    let Some(mut writer) = writer else {
        return Losses::default();
    };
    pump.close();
    let (batch, lines, dropped) = (pump.batch, pump.lines, pump.dropped);
    let finishing = tokio::task::spawn_blocking(move || {
        writer.lose(dropped);
        if !batch.is_empty() {
            writer.append(&batch, lines);
        }
        writer.finish();
        writer.losses().clone()
    });
    finishing.await.unwrap_or_default()
}

async fn finished(writing: &mut Option<Writing>) -> Option<(Writer, Vec<u8>)> {
    match writing {
        Some(task) => Pin::new(task).await.ok(),
        None => None,
    }
}

async fn silent(ended: &CancellationToken, until: Instant) {
    ended.cancelled().await;
    tokio::time::sleep_until(until).await;
}

struct Pump<'a> {
    sources: Vec<Source>,
    hub: &'a Hub,
    batch: Vec<u8>,
    lines: u64,
    /// Lines given up since the last write.
    dropped: u64,
    /// Memory of the last batch, for the next.
    spare: Vec<u8>,
    buffer: Vec<u8>,
}

impl<'a> Pump<'a> {
    fn new(sources: Vec<Source>, hub: &'a Hub) -> Self {
        Self {
            sources,
            hub,
            batch: Vec::new(),
            lines: 0,
            dropped: 0,
            spare: Vec::new(),
            buffer: vec![0; 64 << 10],
        }
    }

    fn write(&mut self, mut writer: Writer) -> Writing {
        let batch = std::mem::replace(&mut self.batch, std::mem::take(&mut self.spare));
        let lines = std::mem::take(&mut self.lines);
        let dropped = std::mem::take(&mut self.dropped);
        tokio::task::spawn_blocking(move || {
            writer.lose(dropped);
            writer.append(&batch, lines);
            let mut spare = batch;
            spare.clear();
            (writer, spare)
        })
    }

    async fn readable(&self) {
        let [first, second] = [self.sources.first(), self.sources.get(1)];
        let wait = async |source: Option<&Source>| match source.filter(|source| source.open) {
            // A failure shows at the read.
            Some(source) => drop(source.stream.readable().await),
            None => std::future::pending().await,
        };
        tokio::select! {
            () = wait(first) => {}
            () = wait(second) => {}
        }
    }

    /// Takes what is there from all sources in turn, until the batch is full.
    fn read(&mut self) {
        let stamp = stamp(Timestamp::now());
        let mut more = true;
        while more && self.batch.len() < BATCH {
            more = false;
            for source in self.sources.iter_mut().filter(|source| source.open) {
                match source.stream.try_read(&mut self.buffer) {
                    Ok(None) => {}
                    Ok(Some(0)) | Err(_) => {
                        source.open = false;
                        self.lines += source.cutter.finish(&stamp, &mut self.batch);
                    }
                    Ok(Some(count)) => {
                        more = true;
                        let data = self.buffer.get(..count).unwrap_or_default();
                        self.hub.publish(source.kind, data);
                        self.lines += source.cutter.push(data, &stamp, &mut self.batch);
                    }
                }
            }
        }
    }

    /// Gives up what waits, so that the program goes on.
    fn lose(&mut self) {
        tracing::warn!(
            lines = self.lines,
            "log lines dropped: the file system hangs"
        );
        self.dropped += std::mem::take(&mut self.lines);
        self.batch.clear();
    }

    fn close(&mut self) {
        let stamp = stamp(Timestamp::now());
        for source in &mut self.sources {
            source.open = false;
            self.lines += source.cutter.finish(&stamp, &mut self.batch);
        }
    }
}

/// Reads `stream` to its end, keeping the last `limit` bytes in `tail`.
pub(crate) async fn keep_tail(
    stream: Stream,
    limit: usize,
    tail: std::sync::Arc<std::sync::Mutex<Vec<u8>>>,
) -> io::Result<()> {
    let mut buffer = vec![0; 4096];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        let mut kept = tail
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        kept.extend_from_slice(buffer.get(..count).unwrap_or_default());
        let excess = kept.len().saturating_sub(limit);
        kept.drain(..excess);
    }
}
