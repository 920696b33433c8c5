//! The resource limits of a container's program: what its job allows, whatever soft limits the shim inherited.
//!
//! The job, and so Slurm and the site, set the hard limits. The soft limits that the shim inherits are accidental: they come
//! from the login shell in which the agent was started, from slurmd's unit, or from KNoC's own processes (which dump no
//! core and open many files). So the program gets every soft limit equal to the hard one, as with other container
//! runtimes, except for two on whose usual value programs rely. Programs may raise those themselves.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Open files. Above it `select(2)` corrupts memory, and programs that close or check all possible descriptors take
/// seconds. It is the soft limit that systemd sets, and that containers of containerd 2 and Docker inherit.
const OPEN_FILES: u64 = 1024;

/// Stack: the kernel's default. Without a limit the kernel uses its legacy address space layout, and the C library takes
/// the limit as the stack size of every thread.
const STACK: u64 = 8 << 20;

const ALL: [Resource; 16] = [
    Resource::Cpu,
    Resource::Fsize,
    Resource::Data,
    Resource::Stack,
    Resource::Core,
    Resource::Rss,
    Resource::Nproc,
    Resource::Nofile,
    Resource::Memlock,
    Resource::As,
    Resource::Locks,
    Resource::Sigpending,
    Resource::Msgqueue,
    Resource::Nice,
    Resource::Rtprio,
    Resource::Rttime,
];

/// Sets all limits of this process, which is about to become the program.
pub(super) fn set() {
    for resource in ALL {
        let limit = getrlimit(resource);
        let current = soft(resource, limit.maximum);
        // A soft limit up to the hard one is always allowed.
        setrlimit(resource, Rlimit { current, ..limit }).ok();
    }
}

/// PURE: the soft limit for this hard one; `None` means unlimited.
fn soft(resource: Resource, hard: Option<u64>) -> Option<u64> {
    let usual = [(Resource::Nofile, OPEN_FILES), (Resource::Stack, STACK)];
    match usual.into_iter().find(|(one, _)| *one == resource) {
        Some((_, usual)) => Some(hard.map_or(usual, |hard| hard.min(usual))),
        None => hard,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_may_have_what_its_job_may_have() {
        assert_eq!(soft(Resource::Cpu, None), None);
        assert_eq!(soft(Resource::Core, None), None);
        assert_eq!(soft(Resource::Fsize, Some(7)), Some(7));
        assert_eq!(soft(Resource::Nofile, Some(1 << 20)), Some(1024));
        assert_eq!(soft(Resource::Nofile, None), Some(1024));
        assert_eq!(soft(Resource::Nofile, Some(256)), Some(256));
        assert_eq!(soft(Resource::Stack, None), Some(8 << 20));
        assert_eq!(soft(Resource::Stack, Some(1 << 20)), Some(1 << 20));
    }
}
