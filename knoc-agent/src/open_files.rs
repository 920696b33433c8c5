//! Raises the agent's limit on open files once, at start; child processes get the original limit.
//!
//! Each link needs a descriptor, and the usual soft limit of 1024 is enough for few pods only.
//! Child processes get the original limit because `sbatch` passes its own limits on to the job, and
//! programs that close or scan all possible descriptors would be slow.

use std::{io, os::unix::process::CommandExt as _, process::Command, sync::OnceLock};

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// The soft and the hard limit before they were raised.
static BEFORE: OnceLock<(rlim_t, rlim_t)> = OnceLock::new();

/// Raises the soft limit to the hard one, and returns the limit that is now in effect.
pub(crate) fn raise() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return 1024;
    };
    if soft >= hard {
        return soft;
    }
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => {
            BEFORE.get_or_init(|| (soft, hard));
            hard
        }
        Err(error) => {
            tracing::warn!(%error, soft, hard, "the limit of open files was not raised");
            soft
        }
    }
}

/// Restores the original limit in the child.
#[expect(
    unsafe_code,
    reason = "setrlimit between fork and exec: one async-signal-safe call"
)]
pub(crate) fn keep_for_child(command: &mut Command) {
    let Some((soft, hard)) = BEFORE.get().copied() else {
        return;
    };
    // SAFETY: setrlimit(2) is a plain system call and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard).map_err(io::Error::from)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lowers the limit for a moment, for other tests too; none of them opens that many files.
    #[tokio::test]
    async fn the_agents_limit_is_the_hard_one_and_its_childrens_is_not() {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let lower = soft.min(512);
        setrlimit(Resource::RLIMIT_NOFILE, lower, hard).unwrap();
        assert_eq!(raise(), hard);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
        let asked = crate::command::Command::new("/bin/sh").args(["-c", "ulimit -Sn"]);
        let said = asked.run().await.unwrap();
        assert_eq!(said.text().trim(), lower.to_string());
    }
}
