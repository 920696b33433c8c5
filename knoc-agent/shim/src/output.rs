//! Task: writes the output of one attempt into the container's log, and passes it to attached clients.
//!
//! While a batch is being written (on a blocking thread) the next one fills. If that is full too, the program has to wait,
//! but no longer than [`STALL`]: then the waiting lines are dropped and counted. A batch is written as soon as the writer
//! is free, so a single line of an idle program is written at once.

use std::{io, path::PathBuf, pin::Pin, sync::Arc, time::Duration};

use jiff::Timestamp;
use knoc_contract::logs::{
    cri::{Cutter, stamp},
    writer::{Limits, Losses, Writer, forget_older},
};
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{attach::hub::Hub, fdio::Stream};

/// How many bytes may wait for the writer.
const BATCH: usize = 256 << 10;

/// How long a full batch waits for a file system that hangs.
const STALL: Duration = Duration::from_secs(10);

/// How long the streams must be silent, after the program has ended, before they are closed although a process that it left
/// behind still holds them.
const DRAIN: Duration = Duration::from_secs(1);

/// Lost lines are reported at once, and then no more often than this.
const TELL_AGAIN: Duration = Duration::from_mins(5);

/// Where the output goes.
pub(crate) struct Log<'a> {
    /// The live file; opened on a blocking thread.
    pub(crate) live: PathBuf,
    pub(crate) limits: Limits,
    /// Counts written batches, which wakes the readers of the log.
    pub(crate) written: watch::Sender<u64>,
    /// Is called with all losses so far if lines were lost while the program runs; returns `false` if it could not take them.
    pub(crate) lost: Box<dyn Fn(&Losses) -> bool + Send + Sync + 'a>,
    /// Is called once all streams have ended, before the last lines are written; more than once if that takes a while.
    pub(crate) closed: Box<dyn Fn() + Send + Sync + 'a>,
}

/// One of the program's streams.
#[derive(Debug)]
pub(crate) struct Source {
    /// Shared, as a terminal is used for input as well.
    stream: Arc<Stream>,
    kind: knoc_contract::logs::cri::Stream,
    cutter: Cutter,
    open: bool,
}

impl Source {
    pub(crate) fn new(
        stream: impl Into<Arc<Stream>>,
        kind: knoc_contract::logs::cri::Stream,
    ) -> Self {
        Self {
            stream: stream.into(),
            kind,
            cutter: Cutter::new(kind),
            open: true,
        }
    }
}

type Writing = JoinHandle<(Writer, Vec<u8>)>;

/// Reads `sources` until all have ended, or until they are silent after `ended` was cancelled.
pub(crate) async fn pump(
    sources: Vec<Source>,
    log: Log<'_>,
    ended: CancellationToken,
    hub: &Hub,
) -> Losses {
    let mut pump = Pump::new(sources, hub);
    let mut told = Told::default();
    let mut idle = None;
    let (live, limits) = (log.live, log.limits);
    // The log exists even if the program writes nothing.
    let opening = move || {
        if let Err(error) = forget_older(&live) {
            tracing::warn!(%error, "logs of older attempts could not be removed");
        }
        (Writer::open(&live, limits), Vec::new())
    };
    let mut writing: Option<Writing> = Some(tokio::task::spawn_blocking(opening));
    loop {
        if !pump.batch.is_empty()
            && let Some(writer) = idle.take()
        {
            writing = Some(pump.write(writer));
        }
        let open = pump.sources.iter().any(|source| source.open);
        if !open {
            (log.closed)();
            if writing.is_none() {
                break;
            }
        }
        let full = pump.batch.len() >= BATCH;
        let silence = Instant::now() + DRAIN;
        tokio::select! {
            biased;
            done = finished(&mut writing), if writing.is_some() => {
                writing = None;
                let Some((writer, spare)) = done else { break };
                pump.spare = spare;
                pump.dropping = 0;
                pump.lost_before = writer.losses().clone();
                idle = Some(writer);
                log.written.send_modify(|batches| *batches += 1);
            }
            () = pump.readable(), if open && !full => pump.read(),
            () = tokio::time::sleep(STALL), if full => pump.lose(),
            () = silent(&ended, silence), if open && !full => pump.close(),
        }
        told.tell(&pump.losses(), &log.lost);
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

/// What was reported about lost lines.
#[derive(Debug, Default)]
struct Told {
    lines: u64,
    at: Option<Instant>,
}

impl Told {
    fn tell(&mut self, losses: &Losses, lost: &dyn Fn(&Losses) -> bool) {
        let due = self.at.is_none_or(|at| at.elapsed() >= TELL_AGAIN);
        if losses.lines > self.lines && due && lost(losses) {
            self.lines = losses.lines;
            self.at = Some(Instant::now());
        }
    }
}

struct Pump<'a> {
    sources: Vec<Source>,
    hub: &'a Hub,
    batch: Vec<u8>,
    lines: u64,
    /// Lines dropped since the last write.
    dropped: u64,
    /// All losses up to the last write.
    lost_before: Losses,
    /// Lines dropped before the write that is under way.
    dropping: u64,
    /// The buffer of the last batch, to be used for the next.
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
            lost_before: Losses::default(),
            dropping: 0,
            spare: Vec::new(),
            buffer: vec![0; 64 << 10],
        }
    }

    fn write(&mut self, mut writer: Writer) -> Writing {
        let batch = std::mem::replace(&mut self.batch, std::mem::take(&mut self.spare));
        let lines = std::mem::take(&mut self.lines);
        let dropped = std::mem::take(&mut self.dropped);
        self.dropping = dropped;
        tokio::task::spawn_blocking(move || {
            writer.lose(dropped);
            writer.append(&batch, lines);
            let mut spare = batch;
            spare.clear();
            (writer, spare)
        })
    }

    /// All losses known so far.
    fn losses(&self) -> Losses {
        Losses {
            lines: self.lost_before.lines + self.dropping + self.dropped,
            ..self.lost_before.clone()
        }
    }

    async fn readable(&self) {
        let [first, second] = [self.sources.first(), self.sources.get(1)];
        let wait = async |source: Option<&Source>| match source.filter(|source| source.open) {
            // A failure is noticed at the read.
            Some(source) => drop(source.stream.readable().await),
            None => std::future::pending().await,
        };
        tokio::select! {
            () = wait(first) => {}
            () = wait(second) => {}
        }
    }

    /// Reads what is there from all sources in turn, until the batch is full.
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

    /// Drops the lines that wait, so that the program can go on.
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use knoc_contract::logs::cri::Stream as Kind;

    use super::*;

    fn losses(lines: u64) -> Losses {
        Losses {
            lines,
            ..Losses::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn lost_lines_are_reported_at_once_and_then_at_intervals() {
        let heard = Mutex::new(Vec::new());
        let hear = |losses: &Losses| {
            heard.lock().unwrap().push(losses.lines);
            true
        };
        let mut told = Told::default();
        told.tell(&losses(0), &hear);
        told.tell(&losses(3), &|_: &Losses| false);
        told.tell(&losses(3), &hear);
        told.tell(&losses(4), &hear);
        tokio::time::advance(TELL_AGAIN).await;
        told.tell(&losses(9), &hear);
        tokio::time::advance(TELL_AGAIN).await;
        told.tell(&losses(9), &hear);
        assert_eq!(*heard.lock().unwrap(), [3, 9]);
    }

    /// The runtime waits for what is let go of then, and must not wait for the file system of the log.
    #[tokio::test]
    async fn the_end_of_the_output_is_told_although_the_log_cannot_be_opened_yet() {
        let folder = tempfile::tempdir().unwrap();
        // Whoever writes into it waits for a reader.
        let live = folder.path().join("0.log");
        nix::unistd::mkfifo(&live, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (ours, theirs) = super::super::fdio::output_pipe().unwrap();
        let (heard, mut told) = watch::channel(false);
        let log = Log {
            live: live.clone(),
            limits: Limits {
                max_bytes: 1 << 20,
                max_files: 2,
                max_total: 2 << 20,
            },
            written: watch::Sender::new(0),
            lost: Box::new(|_: &Losses| true),
            closed: Box::new(move || {
                heard.send_replace(true);
            }),
        };
        let keeper = super::super::attach::hub::open(false, false, None, None);
        let hub = keeper.hub();
        let sources = vec![Source::new(ours, Kind::Stdout)];
        let pump = pump(sources, log, CancellationToken::new(), &hub);
        let program = async move {
            drop(theirs);
            let told = told.wait_for(|closed| *closed);
            let wait = tokio::time::timeout(Duration::from_secs(20), told);
            let in_time = wait.await.is_ok();
            // Without a reader the thread that opens the log would never end.
            let reader = std::fs::File::open(&live).unwrap();
            assert!(in_time, "the end waits for the log");
            reader
        };
        let (losses, _reader) = tokio::join!(pump, program);
        assert_eq!(losses.lines, 0);
    }

    /// If the log cannot be written, that is reported while the program runs, not when it ends.
    #[tokio::test]
    async fn a_log_that_cannot_be_written_is_reported_while_the_program_runs() {
        let folder = tempfile::tempdir().unwrap();
        // A folder has the name of the log file.
        let live = folder.path().join("0.log");
        std::fs::create_dir(&live).unwrap();
        let (ours, theirs) = super::super::fdio::output_pipe().unwrap();
        let (heard, mut told) = watch::channel(0);
        let log = Log {
            live,
            limits: Limits {
                max_bytes: 1 << 20,
                max_files: 2,
                max_total: 2 << 20,
            },
            written: watch::Sender::new(0),
            lost: Box::new(move |losses| {
                heard.send_replace(losses.lines);
                true
            }),
            closed: Box::new(|| {}),
        };
        let keeper = super::super::attach::hub::open(false, false, None, None);
        let hub = keeper.hub();
        let sources = vec![Source::new(ours, Kind::Stdout)];
        let pump = pump(sources, log, CancellationToken::new(), &hub);
        let program = async move {
            rustix::io::write(&theirs, b"one\ntwo\n").unwrap();
            let told = told.wait_for(|lines| *lines == 2);
            let wait = tokio::time::timeout(Duration::from_secs(20), told);
            drop(wait.await.expect("the loss was not reported").unwrap());
            drop(theirs);
        };
        let (losses, ()) = tokio::join!(pump, program);
        assert_eq!(losses.lines, 2);
    }
}
