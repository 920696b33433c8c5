//! The files of a series, which are renamed while they are read: found by what they are, not by their names. Blocking.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use super::BLOCK;
use crate::logs::{filter::TailSearch, series};

/// An open file of the series.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) file: File,
    pub(super) identity: Identity,
}

/// A file, whatever rotation calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    pub(super) inode: u64,
}

impl Identity {
    pub(super) fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }

    pub(super) fn at(path: &Path) -> Option<Self> {
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
pub(super) fn open(live: &Path, choose: impl Fn(&[Identity]) -> usize) -> io::Result<Option<Open>> {
    for _ in 0..TRIES {
        let (paths, files): (Vec<_>, Vec<_>) = files(live).into_iter().unzip();
        let chosen = choose(&files);
        let (Some(path), Some(wanted)) = (paths.get(chosen), files.get(chosen)) else {
            return Ok(None);
        };
        match File::open(path) {
            Ok(file) if Identity::of(&file.metadata()?) == *wanted => {
                let identity = *wanted;
                return Ok(Some(Open { file, identity }));
            }
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
pub(super) fn tail_start(live: &Path, mut search: TailSearch) -> io::Result<Option<(Open, u64)>> {
    for (_, wanted) in files(live).into_iter().rev() {
        let file = open(live, |files| {
            let at = files.iter().position(|file| *file == wanted);
            at.unwrap_or(files.len())
        })?;
        // Dropped for the limit meanwhile.
        let Some(open) = file else { continue };
        if let Some(offset) = search_file(&open.file, &mut search)? {
            return Ok(Some((open, offset)));
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
