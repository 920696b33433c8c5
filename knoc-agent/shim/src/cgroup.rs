//! The cgroups of the job, v1 and v2: where they are, and how much CPU and memory they report.
//!
//! Slurm calls the job's folder `job_N`. If no such folder is above this process, its cgroup is not the pod's alone, and
//! its numbers are not the pod's. Reads `/proc` and the cgroup file system: the calls block, but touch no disk.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::usage::Counters;

/// The cgroup version, which decides the names and formats of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    V2,
}

/// The cgroup of this process for one controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ControllerCgroup {
    pub(super) version: Version,
    /// The folder of the cgroup and those above it, up to the job's.
    pub(super) folders: Vec<PathBuf>,
    /// Whether the last folder is the job's. If not, there is only the folder of the process itself.
    pub(super) of_job: bool,
}

/// The cgroup of the calling process for a v1 controller, or for its v2 counterpart.
pub(super) fn controller_cgroup(controller: &str) -> Option<ControllerCgroup> {
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    find(&cgroups, &mounts, controller)
}

/// PURE: finds the cgroup in the texts of `/proc/self/cgroup` and `/proc/self/mountinfo`.
fn find(cgroups: &str, mounts: &str, controller: &str) -> Option<ControllerCgroup> {
    let (version, root, folder) = locate(cgroups, mounts, controller)?;
    let above = folder
        .ancestors()
        .take_while(|above| above.starts_with(&root) && **above != root);
    let mut folders: Vec<PathBuf> = Vec::new();
    for folder in above {
        folders.push(folder.to_owned());
        // The folders above the job's are shared with other jobs.
        if folder
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"job_"))
        {
            return Some(ControllerCgroup {
                version,
                folders,
                of_job: true,
            });
        }
    }
    folders.truncate(1);
    Some(ControllerCgroup {
        version,
        folders,
        of_job: false,
    })
}

/// PURE: the version, the mount point and the folder of the process's cgroup.
fn locate(cgroups: &str, mounts: &str, controller: &str) -> Option<(Version, PathBuf, PathBuf)> {
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
        if controllers.split(',').any(|name| name == controller) {
            let v1 = |kind: &str, options: &str| {
                kind == "cgroup" && options.split(',').any(|option| option == controller)
            };
            let (point, folder) = below(mount(&v1)?, path);
            return Some((Version::V1, point, folder));
        }
    }
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let (point, folder) = below(mount(&|kind, _| kind == "cgroup2")?, path);
    Some((Version::V2, point, folder))
}

/// Memory as a cgroup reports it, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) usage: u64,
    pub(crate) working_set: u64,
    pub(crate) rss: u64,
    pub(crate) swap: u64,
}

/// The job's cgroups, as far as they can be read.
#[derive(Debug, Clone, Default)]
pub(crate) struct JobCgroup {
    cpu: Option<(Version, PathBuf)>,
    memory: Option<(Version, PathBuf)>,
}

impl JobCgroup {
    /// Finds the cgroups of the calling process's job.
    pub(crate) fn find() -> Self {
        let of_job = |controller| {
            let cgroup = controller_cgroup(controller).filter(|cgroup| cgroup.of_job)?;
            Some((cgroup.version, cgroup.folders.last()?.clone()))
        };
        Self {
            cpu: of_job("cpuacct"),
            memory: of_job("memory"),
        }
    }

    /// CPU time of all processes the job ever had, in nanoseconds; `None` if it cannot be read.
    pub(crate) fn cpu(&self) -> Option<u64> {
        let (version, folder) = self.cpu.as_ref()?;
        cpu(*version, reader(folder))
    }

    /// Memory now, and page faults so far (CPU is left 0); `None` if it cannot be read.
    pub(crate) fn memory(&self) -> Option<(Memory, Counters)> {
        let (version, folder) = self.memory.as_ref()?;
        memory(*version, reader(folder))
    }
}

fn reader(folder: &Path) -> impl Fn(&str) -> Option<String> {
    |file| fs::read_to_string(folder.join(file)).ok()
}

/// PURE: CPU time in nanoseconds, from the texts of the files.
fn cpu(version: Version, read: impl Fn(&str) -> Option<String>) -> Option<u64> {
    match version {
        Version::V1 => read("cpuacct.usage")?.trim().parse().ok(),
        Version::V2 => value(&read("cpu.stat")?, "usage_usec").map(|micros| micros * 1000),
    }
}

/// PURE: memory and page faults, from the texts of the files.
fn memory(version: Version, read: impl Fn(&str) -> Option<String>) -> Option<(Memory, Counters)> {
    let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
    let stat = read("memory.stat")?;
    let at = |key: &str| value(&stat, key).unwrap_or_default();
    let (usage, inactive, rss, swap, faults, major) = match version {
        Version::V1 => (
            number("memory.usage_in_bytes")?,
            at("total_inactive_file"),
            at("total_rss"),
            at("total_swap"),
            at("total_pgfault"),
            at("total_pgmajfault"),
        ),
        Version::V2 => (
            number("memory.current")?,
            at("inactive_file"),
            at("anon"),
            number("memory.swap.current").unwrap_or_default(),
            at("pgfault"),
            at("pgmajfault"),
        ),
    };
    let memory = Memory {
        usage,
        working_set: usage.saturating_sub(inactive),
        rss,
        swap,
    };
    let counters = Counters {
        cpu: 0,
        faults,
        major,
    };
    Some((memory, counters))
}

/// PURE: the value of `key` in a text of lines `key value`.
pub(super) fn value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| value.trim().parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "36 35 0:30 / /sys/fs/cgroup rw shared:1 - tmpfs tmpfs rw\n\
        37 36 0:31 / /sys/fs/cgroup/memory rw shared:2 - cgroup cgroup rw,memory\n\
        39 36 0:33 / /sys/fs/cgroup/cpu,cpuacct rw shared:2 - cgroup cgroup rw,cpu,cpuacct\n\
        38 36 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn both_versions_are_found() {
        let v1 = "5:cpu,cpuacct:/slurm/uid_1/job_7/step_batch/task_0\n\
                  4:memory:/slurm/job_7/step_batch\n0::/\n";
        let cgroup = find(v1, MOUNTS, "memory").unwrap();
        let folder = Path::new("/sys/fs/cgroup/memory/slurm/job_7/step_batch");
        assert_eq!(cgroup.folders[0], folder);
        assert_eq!(cgroup.folders[1], folder.parent().unwrap());
        assert_eq!((cgroup.version, cgroup.of_job), (Version::V1, true));
        let cgroup = find(v1, MOUNTS, "cpuacct").unwrap();
        let job = Path::new("/sys/fs/cgroup/cpu,cpuacct/slurm/uid_1/job_7");
        assert_eq!(cgroup.folders.last().unwrap(), job);
        let slurm = "0::/system.slice/slurmstepd.scope/job_9/step_batch/user/task_0\n";
        let cgroup = find(slurm, MOUNTS, "cpuacct").unwrap();
        assert!(
            cgroup
                .folders
                .last()
                .unwrap()
                .ends_with("slurmstepd.scope/job_9")
        );
        assert_eq!((cgroup.version, cgroup.of_job), (Version::V2, true));
    }

    #[test]
    fn a_cgroup_outside_of_a_job_is_not_taken_for_the_jobs() {
        let cgroup = find("0::/user.slice/x\n", MOUNTS, "memory").unwrap();
        assert!(!cgroup.of_job);
        assert_eq!(
            cgroup.folders,
            [Path::new("/sys/fs/cgroup/unified/user.slice/x")]
        );
        assert_eq!(find("", "", "memory"), None);
    }

    fn files<'a>(list: &'a [(&str, &str)]) -> impl Fn(&str) -> Option<String> + use<'a> {
        |file| {
            let found = list.iter().find(|(name, _)| *name == file)?;
            Some(found.1.to_owned())
        }
    }

    #[test]
    fn v1_is_read() {
        let v1 = [
            ("cpuacct.usage", "1234567890\n"),
            ("memory.usage_in_bytes", "1000000\n"),
            (
                "memory.stat",
                "inactive_file 1\ntotal_inactive_file 300000\ntotal_rss 200000\ntotal_swap 4096\n\
                 total_pgfault 77\ntotal_pgmajfault 3\n",
            ),
        ];
        assert_eq!(cpu(Version::V1, files(&v1)), Some(1_234_567_890));
        let (memory, counters) = memory(Version::V1, files(&v1)).unwrap();
        assert_eq!(memory.working_set, 700_000);
        assert_eq!((memory.usage, memory.rss), (1_000_000, 200_000));
        assert_eq!(memory.swap, 4096);
        assert_eq!((counters.faults, counters.major), (77, 3));
    }

    #[test]
    fn v2_is_read() {
        let v2 = [
            (
                "cpu.stat",
                "usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\n",
            ),
            ("memory.current", "9000\n"),
            (
                "memory.stat",
                "anon 5000\nfile 4000\nkernel 100\ninactive_file 1000\npgfault 12\npgmajfault 1\n",
            ),
            ("memory.swap.current", "4096\n"),
        ];
        assert_eq!(cpu(Version::V2, files(&v2)), Some(2_500_000_000));
        let (memory, counters) = memory(Version::V2, files(&v2)).unwrap();
        let expected = Memory {
            usage: 9000,
            working_set: 8000,
            rss: 5000,
            swap: 4096,
        };
        assert_eq!(memory, expected);
        assert_eq!((counters.faults, counters.major), (12, 1));
    }

    #[test]
    fn missing_files_give_no_numbers() {
        assert_eq!(cpu(Version::V1, files(&[])), None);
        assert_eq!(
            cpu(Version::V2, files(&[("cpu.stat", "user_usec 1")])),
            None
        );
        assert_eq!(memory(Version::V2, files(&[])), None);
        let none = JobCgroup::default();
        assert_eq!((none.cpu(), none.memory()), (None, None));
    }
}
