//! How often the kernel's OOM killer struck in the job's memory cgroup. Reads `/proc` and the cgroup file system.
//!
//! cgroup v1 has the count in `memory.oom_control` (`oom_kill N`, Linux 4.13), v2 in `memory.events`. Without it the
//! count stays 0 and a killed container is an Error like any other.
//!
//! The count is the job's, not a container's. So a container that was killed claims one strike of those that came in its
//! time, and what is claimed is no other's.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::cgroup::{self, Version};

/// Where the job's counters are.
#[derive(Debug, Clone, Default)]
pub(crate) struct OomCounter {
    /// Of the cgroup of this process and those above it, up to the job's.
    files: Vec<PathBuf>,
    /// Strikes that a container's end was laid to.
    claimed: Arc<AtomicU64>,
}

impl OomCounter {
    /// Finds the counters of the calling process's cgroup.
    pub(crate) fn find() -> Self {
        let Some(cgroup) = cgroup::controller_cgroup("memory") else {
            return Self::default();
        };
        let folders = cgroup.folders.iter();
        Self::of(match cgroup.version {
            Version::V1 => folders.map(|f| f.join("memory.oom_control")).collect(),
            // Each counts those below it as well: the job's has them all.
            Version::V2 => folders
                .last()
                .map(|f| f.join("memory.events"))
                .into_iter()
                .collect(),
        })
    }

    pub(super) fn of(files: Vec<PathBuf>) -> Self {
        Self {
            files,
            claimed: Arc::default(),
        }
    }

    /// Strikes so far that were laid to no container's end.
    pub(crate) fn unclaimed(&self) -> u64 {
        let claimed = self.claimed.load(Ordering::Relaxed);
        self.kills().saturating_sub(claimed)
    }

    /// Takes a strike for a container that began when `before` were unclaimed; `false`: there was none in its time.
    pub(crate) fn claim(&self, before: u64) -> bool {
        let struck = self.unclaimed() > before;
        if struck {
            self.claimed.fetch_add(1, Ordering::Relaxed);
        }
        struck
    }

    /// The sum of all kills seen so far.
    fn kills(&self) -> u64 {
        let texts = self
            .files
            .iter()
            .filter_map(|file| fs::read_to_string(file).ok());
        texts
            .filter_map(|text| cgroup::value(&text, "oom_kill"))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        let count = |text| cgroup::value(text, "oom_kill");
        assert_eq!(
            count("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
            Some(3)
        );
        assert_eq!(
            count("low 0\noom 1\noom_kill 2\noom_group_kill 0\n"),
            Some(2)
        );
        assert_eq!(count("oom_kill_disable 0\n"), None);
        assert_eq!(OomCounter::default().kills(), 0);
    }
}
