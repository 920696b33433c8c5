//! How often the kernel's OOM killer struck in the job's memory cgroup. Reads `/proc` and the cgroup file system.
//!
//! cgroup v1 has the count in `memory.oom_control` (`oom_kill N`, Linux 4.13), v2 in `memory.events`. Without it the
//! count stays 0 and a killed container is an Error like any other.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Where the job's counters are.
#[derive(Debug, Clone, Default)]
pub(crate) struct OomCounter {
    /// The cgroup of this process and those above it, up to the job's.
    files: Vec<PathBuf>,
}

impl OomCounter {
    /// Finds the counters of the calling process's cgroup.
    pub(crate) fn find() -> Self {
        let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let Some(located) = locate(&cgroups, &mounts) else {
            return Self::default();
        };
        let (root, folder, file) = located;
        let folders = folder
            .ancestors()
            .take_while(|above| above.starts_with(&root) && **above != root);
        let mut files: Vec<PathBuf> = Vec::new();
        for folder in folders {
            files.push(folder.join(file));
            // Slurm's folder of the job: what is above belongs to others too.
            if folder
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"job_"))
            {
                return Self { files };
            }
        }
        files.truncate(1);
        Self { files }
    }

    /// The sum of all kills seen so far.
    pub(crate) fn kills(&self) -> u64 {
        let texts = self
            .files
            .iter()
            .filter_map(|file| fs::read_to_string(file).ok());
        texts.filter_map(|text| count(&text)).sum()
    }
}

/// PURE: mount point, folder of the process's cgroup, and the counter's file name.
fn locate(cgroups: &str, mounts: &str) -> Option<(PathBuf, PathBuf, &'static str)> {
    let mount = |wanted: &dyn Fn(&str, &str) -> bool| {
        mounts.lines().find_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut right = right.split(' ');
            let (kind, options) = (right.next()?, right.nth(1)?);
            let mut left = left.split(' ').skip(3);
            let (inner, point) = (left.next()?, left.next()?);
            wanted(kind, options).then(|| (inner.to_owned(), PathBuf::from(point)))
        })
    };
    let below = |(inner, point): (String, PathBuf), path: &str| {
        let relative = Path::new(path)
            .strip_prefix(&inner)
            .unwrap_or_else(|_| Path::new(path));
        let folder = point.join(relative.strip_prefix("/").unwrap_or(relative));
        (point, folder)
    };
    for line in cgroups.lines() {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        if controllers.split(',').any(|name| name == "memory") {
            let v1 = |kind: &str, options: &str| {
                kind == "cgroup" && options.split(',').any(|option| option == "memory")
            };
            let (point, folder) = below(mount(&v1)?, path);
            return Some((point, folder, "memory.oom_control"));
        }
    }
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let (point, folder) = below(mount(&|kind, _| kind == "cgroup2")?, path);
    Some((point, folder, "memory.events"))
}

/// PURE
fn count(text: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_generations_are_found() {
        let mounts = "36 35 0:30 / /sys/fs/cgroup rw shared:1 - tmpfs tmpfs rw\n\
                      37 36 0:31 / /sys/fs/cgroup/memory rw shared:2 - cgroup cgroup rw,memory\n\
                      38 36 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let v1 = "5:cpu:/\n4:memory:/slurm/job_7/step_batch\n0::/\n";
        let (root, folder, file) = locate(v1, mounts).unwrap();
        assert_eq!(root, Path::new("/sys/fs/cgroup/memory"));
        assert_eq!(
            folder,
            Path::new("/sys/fs/cgroup/memory/slurm/job_7/step_batch")
        );
        assert_eq!(file, "memory.oom_control");
        let (_, folder, file) = locate("0::/system.slice/x\n", mounts).unwrap();
        assert_eq!(folder, Path::new("/sys/fs/cgroup/unified/system.slice/x"));
        assert_eq!(file, "memory.events");
        assert_eq!(locate("", ""), None);
    }

    #[test]
    fn counts() {
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
