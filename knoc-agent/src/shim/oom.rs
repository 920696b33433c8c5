//! How often the kernel's OOM killer struck in the job's memory cgroup. Reads `/proc` and the cgroup file system.
//!
//! cgroup v1 has the count in `memory.oom_control` (`oom_kill N`, Linux 4.13), v2 in `memory.events`. Without it the
//! count stays 0 and a killed container is an Error like any other.

use std::{fs, path::PathBuf};

use super::cgroup::{self, Version};

/// Where the job's counters are.
#[derive(Debug, Clone, Default)]
pub(crate) struct OomCounter {
    /// Of the cgroup of this process and those above it, up to the job's.
    files: Vec<PathBuf>,
}

impl OomCounter {
    /// Finds the counters of the calling process's cgroup.
    pub(crate) fn find() -> Self {
        let Some(place) = cgroup::place("memory") else {
            return Self::default();
        };
        let file = match place.version {
            Version::V1 => "memory.oom_control",
            Version::V2 => "memory.events",
        };
        Self {
            files: place
                .folders
                .iter()
                .map(|folder| folder.join(file))
                .collect(),
        }
    }

    /// The sum of all kills seen so far.
    pub(crate) fn kills(&self) -> u64 {
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
