//! Container logs in CRI format: written by the shim, read by the shim and, from the shared file system, by the agent.
//!
//! A series is one live file and its rotated ones (`0.log`, `0.log.1` the newest, `0.log.2` …), of one attempt of one
//! container. [`cri`] and [`filter`] are PURE; [`writer`] is the only writer; [`read`] is a task that sends what a
//! reader asked for, block by block, and follows across rotation.

pub mod cri;
pub mod filter;
#[cfg(any(test, feature = "fuzzed"))]
pub mod fuzzed;
pub mod read;
pub mod writer;

use std::path::{Path, PathBuf};

/// No series is longer, whatever the settings.
const MOST_FILES: u32 = 10_000;

/// The files of the series whose live file is `live`, oldest first; those that exist.
#[must_use]
pub fn series(live: &Path) -> Vec<PathBuf> {
    // A rotation under way leaves one name free at a time: that gap is not the end.
    let there = |n: &u32| rotated(live, *n).exists();
    let mut files: Vec<PathBuf> = (1..MOST_FILES)
        .take_while(|n| there(n) || there(&(n + 1)))
        .filter(there)
        .map(|n| rotated(live, n))
        .collect();
    files.reverse();
    if live.exists() {
        files.push(live.to_owned());
    }
    files
}

/// The name of the `n`th rotated file; 1 is the newest.
#[must_use]
pub fn rotated(live: &Path, n: u32) -> PathBuf {
    let mut name = live.as_os_str().to_owned();
    name.push(format!(".{n}"));
    PathBuf::from(name)
}
