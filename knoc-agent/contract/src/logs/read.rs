//! A task that sends a reader the requested part of one log series, and follows the series across
//! rotations.
//!
//! It reads in blocks: data in the page cache on its own thread, other data on the runtime's
//! blocking threads, several blocks at once if the channel has room. The channel to the reader is
//! bounded, so a slow reader slows down only this task. In the shim, the writer's own signal wakes
//! a follower; the agent, which reads on a shared file system, checks the file every [`POLL`]. The
//! task ends when the container instance has ended, the byte limit is reached, or the reader is
//! gone. Each chunk says where the next one begins, so that another reader, on another host, can
//! continue from there ([`Position`]).

mod files;

use std::{
    fs::File,
    io::{self, IoSliceMut},
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use knoc_proto::{pb, reason::ErrorReason};
use memchr::memrchr;
use rustix::io::{Errno, ReadWriteFlags};
use tokio::sync::{mpsc, watch};
use tonic::Status;

use self::files::{Identity, Open, open, tail_start};
use super::filter::{Filter, Options, Position, TailSearch};

/// The size of the first read, and of the buffer that an idle follower keeps.
const SMALL: usize = 8 << 10;

/// The maximum size of a read.
const BLOCK: usize = 192 << 10;

/// How many bytes a read should leave once the time stamps are removed. Together with its position
/// this fits into one message, and so into one frame of the link.
const PIECE: usize = knoc_proto::CHUNK - 256;

/// How often to check a file that another host writes.
const POLL: Duration = Duration::from_millis(100);

/// How many chunks may be queued for the reader.
pub const CHUNKS: usize = 4;

/// How a follower learns of new output.
#[derive(Debug, Clone)]
pub struct Follow {
    /// Changes with each batch that is written; `None` if the file must be checked.
    pub written: Option<watch::Receiver<u64>>,
    /// `true` once the instance has ended and all its output is written. A dropped sender counts as
    /// ended.
    pub ended: watch::Receiver<bool>,
}

/// The channel to the reader.
pub type Output = mpsc::Sender<Result<pb::LogChunk, Status>>;

/// The series of one attempt.
#[derive(Debug, Clone)]
pub struct Series {
    /// The path of its live file.
    pub live: PathBuf,
    /// The attempt whose log it is.
    pub attempt: u32,
}

/// Sends a series, and then a chunk with `end` set. Returns when everything was sent or the reader
/// is gone.
pub async fn read(series: Series, options: Options, follow: Option<Follow>, output: Output) {
    if let Err(error) = run(series, options, follow, &output).await {
        let message = format!("read the container's log: {error}");
        // If the reader is gone, nobody needs the error.
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
    let positions = options.positions;
    let mut reader = blocking(move || Reader::begin(live, options)).await?;
    if positions {
        // A reader whose link is lost before there is a line must not choose the last lines anew.
        let next = reader.position().unwrap_or(Position::BEGINNING);
        let chunk = pb::LogChunk {
            next: Some(next.to_wire(attempt)),
            ..pb::LogChunk::default()
        };
        if output.send(Ok(chunk)).await.is_err() {
            return Ok(());
        }
    }
    loop {
        // Checked before the read: whatever is written after this point wakes the wait below.
        let ended = follow.as_mut().is_none_or(Follow::observe);
        let (mut pieces, at_end);
        if let Some(piece) = reader.next_cached()? {
            (pieces, at_end) = (vec![piece], false);
        } else {
            let room = output.capacity().max(1);
            (reader, pieces, at_end) = blocking(move || {
                let (pieces, at_end) = reader.next_pieces(room)?;
                Ok((reader, pieces, at_end))
            })
            .await?;
        }
        let end = reader.filter.done() || (at_end && ended);
        if end && pieces.is_empty() {
            pieces.push(reader.piece(Vec::new()));
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
    /// Marks all news as seen. Returns `true` if the instance has ended.
    fn observe(&mut self) -> bool {
        if let Some(written) = &mut self.written {
            written.mark_unchanged();
        }
        let ended = *self.ended.borrow_and_update();
        ended || self.ended.has_changed().is_err()
    }

    async fn news(&mut self) {
        // A dropped sender also ends the wait; `observe` then reports the end.
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

/// The last lines of a series, reduced to the last `bytes`. Blocks on file I/O.
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

/// The length of an open file; `None` if another host has removed it.
fn length_of(file: &File) -> io::Result<Option<u64>> {
    match file.metadata() {
        Ok(metadata) => Ok(Some(metadata.len())),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::STALE) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Output, and the position of the next piece.
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
    file: Option<Open>,
    offset: u64,
    /// The buffer for reads; its length is the size of the next read.
    block: Vec<u8>,
    /// How many bytes of it are the beginning of a line whose end has not been read yet.
    held: usize,
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
        let (file, offset) = start.unzip();
        Ok(Self {
            live,
            filter,
            file,
            offset: offset.unwrap_or_default(),
            block: vec![0; SMALL],
            held: 0,
        })
    }

    /// The position of the first line that was not sent; `None` if the series has not begun.
    fn position(&self) -> Option<Position> {
        let open = self.file.as_ref()?;
        let held = u64::try_from(self.held).unwrap_or_default();
        let (stamp, at_start) = self.filter.state();
        Some(Position {
            inode: open.identity.inode,
            offset: self.offset.saturating_sub(held),
            stamp: stamp.to_vec(),
            at_start,
        })
    }

    /// The next piece, if it can be had without waiting: the open file has more data in the page
    /// cache, and some of it is wanted. `None` does not mean that [`Self::next_pieces`] would find
    /// nothing.
    fn next_cached(&mut self) -> io::Result<Option<Piece>> {
        let Some(open) = &self.file else {
            return Ok(None);
        };
        let room = self.block.get_mut(self.held..).unwrap_or_default();
        let mut room = [IoSliceMut::new(room)];
        let at_once = ReadWriteFlags::NOWAIT;
        let count = match rustix::io::preadv2(&open.file, &mut room, self.offset, at_once) {
            Ok(count) => count,
            // The read would wait, or the file system or the kernel cannot tell, or the shim on
            // another host has removed the file.
            Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::STALE) => 0,
            Err(error) => return Err(error.into()),
        };
        if count == 0 {
            return Ok(None);
        }
        let data = self.lines(count);
        Ok((!data.is_empty()).then(|| self.piece(data)))
    }

    /// At most `most` pieces, none of them empty. The flag is `true` if there is no more data at
    /// the moment. Blocks on file I/O.
    fn next_pieces(&mut self, most: usize) -> io::Result<(Vec<Piece>, bool)> {
        let mut pieces = Vec::new();
        while let Some(data) = self.next()? {
            if !data.is_empty() {
                pieces.push(self.piece(data));
            }
            if self.filter.done() || pieces.len() == most {
                return Ok((pieces, false));
            }
        }
        // An idle follower keeps only a small buffer.
        if self.held < SMALL && self.block.len() > SMALL {
            self.block.truncate(SMALL);
            self.block.shrink_to_fit();
        }
        Ok((pieces, true))
    }

    fn piece(&self, data: Vec<u8>) -> Piece {
        Piece {
            data: Bytes::from(data),
            next: self.position(),
        }
    }

    /// The wanted part of the next block; `None` if there is no more data at the moment.
    fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let Some(Open { file, .. }) = &self.file else {
                self.file = open(&self.live, |_| 0)?;
                self.offset = 0;
                if self.file.is_none() {
                    return Ok(None);
                }
                continue;
            };
            let room = self.block.get_mut(self.held..).unwrap_or_default();
            // The shim on another host may have removed the file. On NFS it can no longer be read
            // then.
            let count = match rustix::io::pread(file, room, self.offset) {
                Err(Errno::STALE) => 0,
                count => count?,
            };
            if count > 0 {
                return Ok(Some(self.lines(count)));
            }
            // The writer removed a batch that it could not write completely.
            let length = length_of(file)?.unwrap_or(self.offset);
            if length < self.offset {
                self.offset = length;
                self.held = 0;
            }
            // The writer renames a file only after its last write, so if the name leads to another
            // file, this one is complete.
            let Some(next) = self.newer()? else {
                return Ok(None);
            };
            let Some(Open { file, .. }) = &self.file else {
                continue;
            };
            if length_of(file)?.is_none_or(|length| length <= self.offset) {
                self.file = Some(next);
                self.offset = 0;
                self.held = 0;
            }
        }
    }

    /// Takes `count` bytes that were read, and returns the wanted part of the whole lines. The rest
    /// stays in the buffer.
    fn lines(&mut self, count: usize) -> Vec<u8> {
        self.offset += u64::try_from(count).unwrap_or_default();
        let filled = self.held + count;
        let came = self.block.get(..filled).unwrap_or_default();
        let whole = memrchr(b'\n', came).map_or(0, |last| last + 1);
        // A large block with only a few wanted bytes must not stay allocated while it waits for a
        // slow reader.
        let mut kept = Vec::with_capacity(whole.min(PIECE));
        self.filter
            .keep(came.get(..whole).unwrap_or_default(), &mut kept);
        if kept.len() < kept.capacity() / 8 {
            kept.shrink_to_fit();
        }
        self.block.copy_within(whole..filled, 0);
        self.held = filled - whole;
        if filled == self.block.len() {
            self.size(whole, kept.len());
        }
        kept
    }

    /// There is more data: chooses the size of the next read so that one piece takes it, judging by
    /// the share that the last read left.
    fn size(&mut self, whole: usize, kept: usize) {
        let wanted = (PIECE * whole).checked_div(kept).unwrap_or(BLOCK);
        let step = self.block.len() * 2;
        // A line that never ends must not reduce the room for the next read to nothing.
        let least = self.held + SMALL;
        self.block.resize(wanted.min(step).min(BLOCK).max(least), 0);
    }

    /// The file after the open one, if a rotation has created one.
    fn newer(&self) -> io::Result<Option<Open>> {
        let Some(Open { identity: own, .. }) = self.file else {
            return Ok(None);
        };
        if Identity::at(&self.live) == Some(own) {
            return Ok(None);
        }
        open(&self.live, |files| {
            let at = files.iter().position(|file| *file == own);
            // The file no longer exists, because it was dropped for the limit: the oldest remaining
            // file is next.
            at.map_or(0, |index| index + 1)
        })
    }
}

#[cfg(test)]
mod tests;
