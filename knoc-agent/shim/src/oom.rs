//! Counts the kernel's OOM kills in the job's memory cgroup. Reads `/proc` and the cgroup file system.
//!
//! cgroup v1 has the count in `memory.oom_control` (`oom_kill N`, since Linux 4.13), v2 in `memory.events`. If neither can
//! be read, the count stays 0, and a killed container has the reason `Error` instead of `OOMKilled`.
//!
//! The count is the job's, not a container's. So a container that was killed claims one of the kills that happened while it
//! ran, and no other container can claim the same one.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::cgroup::{self, Version};

/// The job's counters.
#[derive(Debug, Clone, Default)]
pub(crate) struct OomCounter {
    /// The files of the cgroup of this process and those above it, up to the job's.
    files: Vec<PathBuf>,
    /// Kills that containers have claimed.
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
            // Each also counts the cgroups below it, so the job's has all kills.
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

    /// Kills so far that no container has claimed.
    pub(crate) fn unclaimed(&self) -> u64 {
        let claimed = self.claimed.load(Ordering::Relaxed);
        self.kills().saturating_sub(claimed)
    }

    /// Claims a kill for a container that started when `before` kills were unclaimed. Returns `false` if there was none since.
    pub(crate) fn claim(&self, before: u64) -> bool {
        let killed = self.unclaimed() > before;
        if killed {
            self.claimed.fetch_add(1, Ordering::Relaxed);
        }
        killed
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
    fn both_formats_are_read() {
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
