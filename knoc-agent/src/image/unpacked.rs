//! Computes how large a layer is when unpacked, before anything unpacks it.
//!
//! A layer of a few MB may contain TB: by its compression, by sparse files whose holes take no
//! space in a tar archive, by millions of empty files, or by paths that name thousands of folders. [`Tar`] parses tar headers as the runtime
//! will (PURE; any bytes, in any pieces); [`measure`] feeds it a layer and checks the layer's
//! digest at the same time. Blocking.

use std::{
    collections::HashSet,
    fs::File,
    hash::{BuildHasher as _, Hash as _, Hasher as _, RandomState},
    io::{self, BufRead, BufReader, Read, Write},
    path::Path,
};

use ruzstd::decoding::{
    BlockDecodingStrategy, FrameDecoder,
    errors::{FrameDecoderError, ReadFrameHeaderError},
};

use super::{
    digest::{Digest, Hasher},
    manifest::Packing,
};

const BLOCK: usize = 512;
/// The longest extended header, which holds names and attributes.
const MAX_PAX: u64 = 1 << 20;
/// The most files and directories of one image.
pub(super) const MAX_ENTRIES: u64 = 4_000_000;
const BUFFER: usize = 64 * 1024;
/// The largest zstd window, in memory; the `zstd` command without `--long` needs 8 MiB.
const MAX_WINDOW: u64 = 64 << 20;

/// What the remaining layers of an image may still take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Budget {
    pub(super) bytes: u64,
    pub(super) entries: u64,
}

/// Why a layer is not unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum TarError {
    #[error("the image is larger than allowed when unpacked")]
    Bytes,
    #[error("the image holds more than {MAX_ENTRIES} files")]
    Entries,
    #[error("it is not a tar archive")]
    Head,
    #[error("an extended header in it is longer than {MAX_PAX} bytes")]
    Pax,
    #[error("it ends in the middle of a file")]
    Cut,
}

/// Why a layer is not passed to the runtime.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum LayerError {
    /// It has more bytes than the site allows.
    #[error("the image is larger than allowed when unpacked")]
    TooLarge,
    /// It is broken; the text says why.
    #[error("{0}")]
    Broken(String),
}

/// A tar archive that arrives in pieces.
#[derive(Debug)]
pub(super) struct Tar {
    budget: Budget,
    head: Vec<u8>,
    /// Bytes of content and padding until the next header.
    skip: u64,
    /// How many of them are padding, which some programs omit at the end of an archive.
    padding: u64,
    /// A header before that of its file which is being read: its kind, its text so far, and the length of that.
    pax: Option<(u8, Vec<u8>, u64)>,
    /// The size of the next file, if the last extended header gives it.
    size: Option<u64>,
    /// The path of the next file, if a header before its own gives it.
    path: Option<Vec<u8>>,
    /// Hashes of the folders that there are so far. Each has cost an entry, so that they are bounded.
    folders: HashSet<u64>,
    keys: RandomState,
    zeros: u8,
    /// Whether more headers of a sparse file follow.
    extended: bool,
}

impl Tar {
    pub(super) fn new(budget: Budget) -> Self {
        Self {
            budget,
            head: Vec::with_capacity(BLOCK),
            skip: 0,
            padding: 0,
            pax: None,
            size: None,
            path: None,
            folders: HashSet::new(),
            keys: RandomState::new(),
            zeros: 0,
            extended: false,
        }
    }

    /// Parses the next piece.
    pub(super) fn push(&mut self, mut piece: &[u8]) -> Result<(), TarError> {
        self.spend(u64::try_from(piece.len()).unwrap_or(u64::MAX))?;
        // Two empty blocks end an archive; the rest is padding.
        while !piece.is_empty() && self.zeros < 2 {
            // The further headers of a sparse file come before its content.
            if self.skip > 0 && !self.extended {
                let most = usize::try_from(self.skip).unwrap_or(usize::MAX);
                let (skipped, rest) = piece.split_at(most.min(piece.len()));
                self.skip -= u64::try_from(skipped.len()).unwrap_or(0);
                piece = rest;
                if let Some((_, text, _)) = &mut self.pax {
                    text.extend_from_slice(skipped);
                }
                if self.skip == 0
                    && let Some((kind, text, length)) = self.pax.take()
                {
                    let length = usize::try_from(length).unwrap_or(0);
                    let text = text.get(..length).unwrap_or_default();
                    if kind == b'L' {
                        self.path = Some(up_to_nul(text).to_vec());
                    } else {
                        self.extended_head(text)?;
                    }
                }
                continue;
            }
            let (more, rest) = piece.split_at((BLOCK - self.head.len()).min(piece.len()));
            self.head.extend_from_slice(more);
            piece = rest;
            if self.head.len() == BLOCK {
                let head = std::mem::replace(&mut self.head, Vec::with_capacity(BLOCK));
                self.block(&head)?;
            }
        }
        Ok(())
    }

    /// Ends the archive. Returns what is left of the budget.
    pub(super) fn finish(self) -> Result<Budget, TarError> {
        let whole = self.zeros > 0
            || (self.head.is_empty()
                && self.skip <= self.padding
                && !self.extended
                && self.pax.is_none());
        if whole {
            Ok(self.budget)
        } else {
            Err(TarError::Cut)
        }
    }

    fn spend(&mut self, bytes: u64) -> Result<(), TarError> {
        self.budget.bytes = self
            .budget
            .bytes
            .checked_sub(bytes)
            .ok_or(TarError::Bytes)?;
        Ok(())
    }

    fn content(&mut self, size: u64) {
        self.skip = size.checked_next_multiple_of(512).unwrap_or(u64::MAX);
        self.padding = self.skip - size;
    }

    fn block(&mut self, head: &[u8]) -> Result<(), TarError> {
        if std::mem::take(&mut self.extended) {
            self.extended = head.get(504).is_some_and(|more| *more != 0);
            return Ok(());
        }
        if head.iter().all(|byte| *byte == 0) {
            self.zeros += 1;
            return Ok(());
        }
        if self.zeros > 0 || !sums_up(head) {
            return Err(TarError::Head);
        }
        let written = number(field(head, 124, 12)).ok_or(TarError::Head)?;
        let kind = field(head, 156, 1).first().copied().unwrap_or(0);
        match kind {
            // Extended headers, and the long path of the next file.
            b'x' | b'L' => {
                if written > MAX_PAX {
                    return Err(TarError::Pax);
                }
                self.content(written);
                self.pax = (written > 0).then(|| (kind, Vec::new(), written));
                return Ok(());
            }
            // Headers whose text does not matter: defaults for all files, or where the next one, a link, leads.
            b'g' | b'K' => {
                if written > MAX_PAX {
                    return Err(TarError::Pax);
                }
                self.content(written);
                return Ok(());
            }
            _ => {}
        }
        let path = self.path.take().unwrap_or_else(|| path_of(head));
        self.entry(&path, kind == b'5')?;
        let size = self.size.take().unwrap_or(written);
        match kind {
            // Links, devices, directories and pipes have no content, whatever their size field
            // says.
            b'1'..=b'6' => {}
            b'S' => {
                let real = number(field(head, 483, 12)).ok_or(TarError::Head)?;
                self.spend(real)?;
                self.extended = field(head, 482, 1) != [0];
                self.content(size);
            }
            _ => self.content(size),
        }
        Ok(())
    }

    /// Counts a file or a folder, and the folders of its path that nothing before has named.
    fn entry(&mut self, path: &[u8], is_folder: bool) -> Result<(), TarError> {
        let (mut count, mut hasher) = (1, self.keys.build_hasher());
        let parts = path.split(|byte| *byte == b'/');
        let mut parts = parts
            .filter(|part| !part.is_empty() && **part != *b".")
            .peekable();
        while let Some(part) = parts.next() {
            part.hash(&mut hasher);
            let is_last = parts.peek().is_none();
            if is_last && !is_folder {
                break;
            }
            let is_new = self.folders.insert(hasher.finish());
            if is_new && !is_last {
                count += 1;
            }
        }
        let entries = self.budget.entries.checked_sub(count);
        self.budget.entries = entries.ok_or(TarError::Entries)?;
        Ok(())
    }

    /// Parses `LENGTH KEY=VALUE
    /// ` records: the size of the next file, and the real size of a sparse one.
    fn extended_head(&mut self, mut text: &[u8]) -> Result<(), TarError> {
        while !text.is_empty() {
            let space = text.iter().position(|byte| *byte == b' ');
            let length = space.and_then(|space| text.get(..space)).and_then(decimal);
            let length = length.and_then(|length| usize::try_from(length).ok());
            let record = length.and_then(|length| text.split_at_checked(length));
            let (record, rest) = record.ok_or(TarError::Head)?;
            let record = record.get(space.unwrap_or(0) + 1..).ok_or(TarError::Head)?;
            let record = record.strip_suffix(b"\n").ok_or(TarError::Head)?;
            let equals = record.iter().position(|byte| *byte == b'=');
            let (key, value) = record.split_at(equals.ok_or(TarError::Head)?);
            let value = value.get(1..).unwrap_or_default();
            match key {
                b"size" => self.size = Some(decimal(value).ok_or(TarError::Head)?),
                b"path" | b"GNU.sparse.name" => self.path = Some(value.to_vec()),
                b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                    self.spend(decimal(value).ok_or(TarError::Head)?)?;
                }
                _ => {}
            }
            text = rest;
        }
        Ok(())
    }
}

fn field(head: &[u8], at: usize, length: usize) -> &[u8] {
    head.get(at..at + length).unwrap_or_default()
}

/// The path in the header of a file.
fn path_of(head: &[u8]) -> Vec<u8> {
    let name = up_to_nul(field(head, 0, 100));
    // Other formats have other fields there.
    let begin = if field(head, 257, 6) == b"ustar\0" {
        up_to_nul(field(head, 345, 155))
    } else {
        &[]
    };
    [begin, name].join(&b'/')
}

fn up_to_nul(text: &[u8]) -> &[u8] {
    text.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn decimal(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    digits.then(|| std::str::from_utf8(text).ok()?.parse().ok())?
}

/// Parses octal digits between spaces and zeros, or a base-256 number.
fn number(field: &[u8]) -> Option<u64> {
    match field.split_first() {
        Some((first, rest)) if first & 0x80 != 0 => {
            if first & 0x40 != 0 {
                return None;
            }
            rest.iter()
                .try_fold(u64::from(first & 0x3f), |number, byte| {
                    Some(number.checked_mul(256)? + u64::from(*byte))
                })
        }
        _ => {
            let text = std::str::from_utf8(field).ok()?;
            let text = text.trim_matches([' ', '\0']);
            let text = text.split('\0').next().unwrap_or_default();
            if text.is_empty() {
                return Some(0);
            }
            text.bytes()
                .all(|byte| byte.is_ascii_digit())
                .then(|| u64::from_str_radix(text, 8).ok())?
        }
    }
}

/// Whether the header's checksum is correct, over unsigned bytes or, as some old programs compute
/// it, over signed ones.
fn sums_up(head: &[u8]) -> bool {
    let Some(written) = number(field(head, 148, 8)) else {
        return false;
    };
    let mut sums = (0_i64, 0_i64);
    for (at, byte) in head.iter().enumerate() {
        let byte = if (148..156).contains(&at) {
            b' '
        } else {
            *byte
        };
        sums.0 += i64::from(byte);
        sums.1 += i64::from(byte.cast_signed());
    }
    let is = |sum: i64| i64::try_from(written).is_ok_and(|written| written == sum);
    is(sums.0) || is(sums.1)
}

/// Computes a digest of everything that is read.
struct Hashing<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(buffer.get(..read).unwrap_or_default());
        Ok(read)
    }
}

/// Feeds what is written to it to a tar parser; fails once the pull was cancelled.
struct Sink<'a> {
    tar: Tar,
    failed: Option<TarError>,
    stop: &'a dyn Fn() -> bool,
}

impl Write for Sink<'_> {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if (self.stop)() {
            // Not `Interrupted`, after which writers retry.
            return Err(io::Error::other("the pull was cancelled"));
        }
        if let Err(error) = self.tar.push(piece) {
            self.failed = Some(error);
            return Err(io::Error::other(error));
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads the layer in `path`, checks its digest, and subtracts its unpacked size from the budget.
/// Blocking.
pub(super) fn measure(
    path: &Path,
    digest: &Digest,
    budget: &mut Budget,
    stop: &dyn Fn() -> bool,
) -> Result<Packing, LayerError> {
    let file = File::open(path);
    let file = file.map_err(|error| LayerError::Broken(format!("{}: {error}", path.display())))?;
    let hashing = Hashing {
        inner: file,
        hasher: digest.hasher(),
    };
    let mut reader = BufReader::with_capacity(BUFFER, hashing);
    let broken = |error: io::Error| LayerError::Broken(format!("layer {digest}: {error}"));
    let packing = Packing::of(reader.fill_buf().map_err(broken)?);
    let mut sink = Sink {
        tar: Tar::new(*budget),
        failed: None,
        stop,
    };
    let unpacked = match packing {
        Packing::None => copy(&mut reader, &mut sink),
        Packing::Gzip => copy(
            &mut flate2::bufread::MultiGzDecoder::new(&mut reader),
            &mut sink,
        ),
        Packing::Zstd => zstd(&mut reader, &mut sink),
    };
    match sink.failed {
        Some(TarError::Bytes) => return Err(LayerError::TooLarge),
        Some(error) => return Err(LayerError::Broken(format!("layer {digest}: {error}"))),
        None => {}
    }
    // The rest is read whatever the content was: a wrong digest is the better error.
    let rest = if unpacked.is_ok() || !stop() {
        copy(&mut reader, &mut io::sink())
    } else {
        Ok(())
    };
    rest.map_err(broken)?;
    let found = reader.into_inner().hasher.finish();
    digest.check(&found).map_err(LayerError::Broken)?;
    unpacked.map_err(broken)?;
    let left = sink.tar.finish();
    *budget = left.map_err(|error| LayerError::Broken(format!("layer {digest}: {error}")))?;
    Ok(packing)
}

/// Checks the digest of a file that is used as it is. Blocking.
pub(super) fn verify(path: &Path, digest: &Digest, stop: &dyn Fn() -> bool) -> Result<(), String> {
    let failed = |error: io::Error| format!("{}: {error}", path.display());
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = digest.hasher();
    let mut buffer = vec![0; BUFFER];
    while !stop() {
        let read = file.read(&mut buffer).map_err(failed)?;
        if read == 0 {
            break;
        }
        hasher.update(buffer.get(..read).unwrap_or_default());
    }
    digest.check(&hasher.finish())
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            read => to.write_all(buffer.get(..read).unwrap_or_default())?,
        }
    }
}

/// Decompresses all frames of a zstd file.
fn zstd(reader: &mut impl BufRead, sink: &mut impl Write) -> io::Result<()> {
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(MAX_WINDOW);
    let mut buffer = vec![0; BUFFER];
    while !reader.fill_buf()?.is_empty() {
        match decoder.init(&mut *reader) {
            Ok(()) => {}
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                length,
                ..
            })) => {
                copy(&mut reader.take(u64::from(length)), &mut io::sink())?;
                continue;
            }
            Err(error) => return Err(io::Error::other(error)),
        }
        loop {
            let one = BlockDecodingStrategy::UptoBlocks(1);
            let finished = decoder.decode_blocks(&mut *reader, one);
            let finished = finished.map_err(io::Error::other)?;
            loop {
                match decoder.read(&mut buffer)? {
                    0 => break,
                    read => sink.write_all(buffer.get(..read).unwrap_or_default())?,
                }
            }
            if finished {
                break;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests;
