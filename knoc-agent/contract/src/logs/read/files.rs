//! Finds the files of a series by their identity, because they are renamed while they are read. All
//! functions block on file I/O.

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

/// The identity of a file, which does not change when it is renamed.
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

/// How often a rotation may come in between. Each one renames all files, which takes far less time
/// than filling one.
const TRIES: usize = 100;

/// The files of a series, oldest first, as they were at one moment.
fn files(live: &Path) -> Vec<(PathBuf, Identity)> {
    let look = || {
        let files = series(live).into_iter();
        files
            .filter_map(|path| Some((Identity::at(&path)?, path)))
            .map(|(file, path)| (path, file))
            .collect::<Vec<_>>()
    };
    // During a rotation a file may be seen twice or not at all. An interrupted rotation shows each
    // file once.
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

/// Opens the file whose index `choose` returns, given the existing files, oldest first. `None` if
/// there is no such index.
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
            // The file was rotated in between.
            Ok(_) | Err(_) => {}
        }
    }
    Err(io::Error::other(
        "the log is rotated faster than it is read",
    ))
}

/// The beginning of the wanted tail; `None` if it is the beginning of the series.
pub(super) fn tail_start(live: &Path, mut search: TailSearch) -> io::Result<Option<(Open, u64)>> {
    for (_, wanted) in files(live).into_iter().rev() {
        let file = open(live, |files| {
            let at = files.iter().position(|file| *file == wanted);
            at.unwrap_or(files.len())
        })?;
        // The file was dropped because of the limit in the meantime.
        let Some(open) = file else { continue };
        if let Some(offset) = search_file(&open.file, &mut search)? {
            return Ok(Some((open, offset)));
        }
    }
    Ok(None)
}

/// Walks backwards over the lines of one file, block by block.
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
