//! Task: sends what a reader asked for of one log series, and follows it across rotation.
//!
//! Reads in blocks on the runtime's blocking threads, as many at once as the reader has room for: the channel to it is
//! bounded, so a slow reader slows only this task. Follows by the writer's own signal where there is one (the shim), else by looking at the file every
//! [`POLL`] (the agent, on a shared file system). Ends with the instance, the byte limit, or the reader. Each chunk says
//! where the next one begins, so that another reader, on another host, can go on from there ([`Position`]).

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use knoc_proto::{pb, reason::ErrorReason};
use memchr::memrchr;
use rustix::buffer::spare_capacity;
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::{
    filter::{Filter, Options, Position, TailSearch},
    series,
};

/// One read. With the heads of short lines taken off it gives about one message ([`knoc_proto::link::CHUNK`]).
const BLOCK: usize = 96 << 10;

/// How often a file that another host writes is looked at.
const POLL: Duration = Duration::from_millis(100);

/// How many chunks may wait for the reader.
pub const CHUNKS: usize = 4;

/// How a follower learns of news.
#[derive(Debug, Clone)]
pub struct Follow {
    /// Changes with each batch written; `None`: look at the file.
    pub written: Option<watch::Receiver<u64>>,
    /// `true` once the instance has ended and all its output is written. A dropped sender counts as ended.
    pub ended: watch::Receiver<bool>,
}

/// The channel to the reader.
pub type Output = mpsc::Sender<Result<pb::LogChunk, Status>>;

/// The series of one attempt.
#[derive(Debug, Clone)]
pub struct Series {
    /// Its live file.
    pub live: PathBuf,
    /// Whose it is.
    pub attempt: u32,
}

/// Sends a series, at last a chunk that says `end`. Returns when all was sent, or the reader is gone.
pub async fn read(series: Series, options: Options, follow: Option<Follow>, output: Output) {
    if let Err(error) = run(series, options, follow, &output).await {
        let message = format!("read the container's log: {error}");
        // Where the reader is gone nobody is left to be told.
        drop(
            output
                .send(Err(ErrorReason::Internal.status(message)))
                .await,
        );
    }
}

async fn run(
    Series { live, attempt }: Series,
    options: Options,
    mut follow: Option<Follow>,
    output: &Output,
) -> io::Result<()> {
    let mut reader = blocking(move || Reader::begin(live, options)).await?;
    loop {
        // Before the read: what is written after it wakes the wait below.
        let ended = follow.as_mut().is_none_or(Follow::observe);
        let room = output.capacity().max(1);
        let (next, mut pieces, at_end) = blocking(move || {
            let mut reader = reader;
            let (pieces, at_end) = reader.several(room)?;
            Ok((reader, pieces, at_end))
        })
        .await?;
        reader = next;
        let end = reader.filter.done() || (at_end && ended);
        if end && pieces.is_empty() {
            pieces.push(reader.piece(Vec::new())?);
        }
        let last = pieces.len();
        for (number, Piece { data, next }) in (1..).zip(pieces) {
            let chunk = pb::LogChunk {
                data,
                next: next.map(|next| next.to_wire(attempt)),
                end: end && number == last,
            };
            if output.send(Ok(chunk)).await.is_err() {
                return Ok(());
            }
        }
        if end {
            return Ok(());
        }
        if at_end && let Some(follow) = &mut follow {
            tokio::select! {
                biased;
                () = output.closed() => return Ok(()),
                () = follow.news() => {}
            }
        }
    }
}

impl Follow {
    /// Marks all news as seen. `true` where the instance has ended.
    fn observe(&mut self) -> bool {
        if let Some(written) = &mut self.written {
            written.mark_unchanged();
        }
        let ended = *self.ended.borrow_and_update();
        ended || self.ended.has_changed().is_err()
    }

    async fn news(&mut self) {
        // A dropped sender ends the wait as well: then `observe` says that it is over.
        let Self { written, ended } = self;
        match written {
            Some(written) => {
                tokio::select! {
                    biased;
                    _ = ended.changed() => {}
                    Ok(()) = written.changed() => {}
                }
            }
            None => {
                drop(tokio::time::timeout(POLL, ended.changed()).await);
            }
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}

/// The last lines of a series, cut to the last `bytes`. Blocking.
pub fn last_text(live: &Path, lines: u64, bytes: usize) -> io::Result<Vec<u8>> {
    let options = Options {
        tail_lines: Some(lines),
        ..Options::default()
    };
    let mut reader = Reader::begin(live.to_owned(), options)?;
    let mut text = Vec::new();
    while let Some(more) = reader.next()? {
        text.extend_from_slice(&more);
        let excess = text.len().saturating_sub(bytes);
        text.drain(..excess);
    }
    Ok(text)
}

/// Output, and where the next one begins.
#[derive(Debug)]
struct Piece {
    data: Bytes,
    next: Option<Position>,
}

/// A position in a series.
#[derive(Debug)]
struct Reader {
    live: PathBuf,
    filter: Filter,
    file: Option<File>,
    offset: u64,
    /// The beginning of a line whose end was not read yet.
    held: Vec<u8>,
}

impl Reader {
    fn begin(live: PathBuf, options: Options) -> io::Result<Self> {
        let from = options.from.clone();
        let start = match (&from, TailSearch::new(&options)) {
            (Some(from), _) => {
                let at =
                    |files: &[Identity]| files.iter().position(|file| file.inode == from.inode);
                let file = open(&live, |files| at(files).unwrap_or(files.len()))?;
                file.map(|file| (file, from.offset))
            }
            (None, Some(search)) => tail_start(&live, search)?,
            (None, None) => None,
        };
        let mut filter = Filter::new(options);
        if from.is_some() && start.is_none() {
            filter.skip_sent();
        }
        let mut reader = Self {
            live,
            filter,
            file: None,
            offset: 0,
            held: Vec::new(),
        };
        if let Some((file, offset)) = start {
            reader.file = Some(file);
            reader.offset = offset;
        }
        Ok(reader)
    }

    /// Where the first line begins that was not sent; none before the series has begun.
    fn position(&self) -> io::Result<Option<Position>> {
        let Some(file) = &self.file else {
            return Ok(None);
        };
        let held = u64::try_from(self.held.len()).unwrap_or_default();
        let (stamp, at_start) = self.filter.state();
        Ok(Some(Position {
            inode: file.metadata()?.ino(),
            offset: self.offset.saturating_sub(held),
            stamp: stamp.to_vec(),
            at_start,
        }))
    }

    /// At most so many pieces, none of them empty. `true` where there is nothing more at the moment.
    fn several(&mut self, most: usize) -> io::Result<(Vec<Piece>, bool)> {
        let mut pieces = Vec::new();
        while let Some(data) = self.next()? {
            if !data.is_empty() {
                pieces.push(self.piece(data)?);
            }
            if self.filter.done() || pieces.len() == most {
                return Ok((pieces, false));
            }
        }
        Ok((pieces, true))
    }

    fn piece(&self, data: Vec<u8>) -> io::Result<Piece> {
        // A whole block does not wait for a slow reader with a few bytes in it.
        let few = data.len() < BLOCK / 8;
        Ok(Piece {
            data: if few {
                Bytes::copy_from_slice(&data)
            } else {
                Bytes::from(data)
            },
            next: self.position()?,
        })
    }

    /// What is wanted of the next block; `None` where there is nothing more at the moment.
    fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let Some(file) = &self.file else {
                self.file = open(&self.live, |_| 0)?;
                self.offset = 0;
                if self.file.is_none() {
                    return Ok(None);
                }
                continue;
            };
            let mut block = Vec::with_capacity(self.held.len() + BLOCK);
            block.extend_from_slice(&self.held);
            let count = rustix::io::pread(file, spare_capacity(&mut block), self.offset)?;
            if count > 0 {
                self.offset += u64::try_from(count).unwrap_or_default();
                return Ok(Some(self.lines(block)));
            }
            // The writer took back what it could not write whole.
            let length = file.metadata()?.len();
            if length < self.offset {
                self.offset = length;
                self.held.clear();
            }
            // The writer renames only after its last write: a name that leads elsewhere means this file is whole.
            let Some(next) = self.newer()? else {
                return Ok(None);
            };
            let Some(file) = &self.file else { continue };
            if file.metadata()?.len() <= self.offset {
                self.file = Some(next);
                self.offset = 0;
                self.held.clear();
            }
        }
    }

    /// What is wanted of the whole lines of a block; the rest is held.
    fn lines(&mut self, mut block: Vec<u8>) -> Vec<u8> {
        let whole = memrchr(b'\n', &block).map_or(0, |last| last + 1);
        self.held.clear();
        self.held
            .extend_from_slice(block.get(whole..).unwrap_or_default());
        block.truncate(whole);
        self.filter.keep(&mut block);
        block
    }

    /// The file after the open one, where rotation made one.
    fn newer(&self) -> io::Result<Option<File>> {
        let Some(file) = &self.file else {
            return Ok(None);
        };
        let own = Identity::of(&file.metadata()?);
        if Identity::at(&self.live) == Some(own) {
            return Ok(None);
        }
        open(&self.live, |files| {
            let at = files.iter().position(|file| *file == own);
            // Not there any more: it was dropped for the limit, the oldest that is left comes next.
            at.map_or(0, |index| index + 1)
        })
    }
}

/// A file, whatever rotation calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }

    fn at(path: &Path) -> Option<Self> {
        fs::metadata(path).ok().map(|metadata| Self::of(&metadata))
    }
}

/// How often a rotation may come in between: each moves all files, in far less time than one is filled.
const TRIES: usize = 100;

/// The files of a series, oldest first, as they stood at one moment.
fn files(live: &Path) -> Vec<(PathBuf, Identity)> {
    let look = || {
        let files = series(live).into_iter();
        files
            .filter_map(|path| Some((Identity::at(&path)?, path)))
            .map(|(file, path)| (path, file))
            .collect::<Vec<_>>()
    };
    // A rotation while we look shows a file twice, or not at all; one that stands still in the middle shows each once.
    let mut found = look();
    for _ in 0..TRIES {
        let again = look();
        if again == found {
            break;
        }
        found = again;
    }
    found
}

/// Opens the file that `choose` points at among those there are, oldest first; `None` where it points past them.
fn open(live: &Path, choose: impl Fn(&[Identity]) -> usize) -> io::Result<Option<File>> {
    for _ in 0..TRIES {
        let (paths, files): (Vec<_>, Vec<_>) = files(live).into_iter().unzip();
        let chosen = choose(&files);
        let (Some(path), Some(wanted)) = (paths.get(chosen), files.get(chosen)) else {
            return Ok(None);
        };
        match File::open(path) {
            Ok(file) if Identity::of(&file.metadata()?) == *wanted => return Ok(Some(file)),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            // It was rotated in between.
            Ok(_) | Err(_) => {}
        }
    }
    Err(io::Error::other(
        "the log is rotated faster than it is read",
    ))
}

/// Where the wanted tail begins; `None`: at the beginning of the series.
fn tail_start(live: &Path, mut search: TailSearch) -> io::Result<Option<(File, u64)>> {
    for (_, wanted) in files(live).into_iter().rev() {
        let file = open(live, |files| {
            let at = files.iter().position(|file| *file == wanted);
            at.unwrap_or(files.len())
        })?;
        // Dropped for the limit meanwhile.
        let Some(file) = file else { continue };
        if let Some(offset) = search_file(&file, &mut search)? {
            return Ok(Some((file, offset)));
        }
    }
    Ok(None)
}

/// Walks the lines of one file from its end, block by block.
fn search_file(file: &File, search: &mut TailSearch) -> io::Result<Option<u64>> {
    let mut end = file.metadata()?.len();
    // The bytes from `end` to the end of the line that begins before it.
    let mut tail: Vec<u8> = Vec::new();
    while end > 0 {
        let begin = end.saturating_sub(u64::try_from(BLOCK).unwrap_or(1));
        let mut block = vec![0; usize::try_from(end - begin).unwrap_or(BLOCK)];
        file.read_exact_at(&mut block, begin)?;
        block.append(&mut tail);
        while let Some(newline) = block.iter().rposition(|byte| *byte == b'\n') {
            let line_start = newline + 1;
            let line = block.get(line_start..).unwrap_or_default();
            if !line.is_empty() && search.is_before(line) {
                let past = u64::try_from(line_start + line.len() + 1).unwrap_or_default();
                return Ok(Some(begin + past));
            }
            block.truncate(newline);
        }
        tail = block;
        end = begin;
    }
    if !tail.is_empty() && search.is_before(&tail) {
        return Ok(Some(u64::try_from(tail.len() + 1).unwrap_or_default()));
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
