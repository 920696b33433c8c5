//! Container logs in the CRI format. The shim writes them; the shim and, from the shared file
//! system, the agent read them.
//!
//! A series is the log of one attempt of one container: its live file and the rotated files
//! (`0.log`, `0.log.1` the newest, `0.log.2` …). [`cri`] and [`filter`] are PURE; [`writer`] is the
//! only writer; [`read`] is the task that sends a reader what it asked for, block by block, and
//! follows the log across rotations.

pub mod cri;
pub mod filter;
#[cfg(any(test, feature = "fuzzed"))]
pub mod fuzzed;
pub mod read;
pub mod writer;

use std::path::{Path, PathBuf};

/// The maximum number of files in a series, whatever the settings.
const MOST_FILES: u32 = 10_000;

/// The existing files of the series whose live file is `live`, oldest first.
#[must_use]
pub fn series(live: &Path) -> Vec<PathBuf> {
    // During a rotation one name at a time is missing, so a single gap is not the end of the
    // series.
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
