//! The claim of a job directory, which ensures that at most one job of a pod runs its containers.
//!
//! `sbatch` may time out although the job was accepted, and two agents may share one home
//! directory, so two jobs may be started for one pod. Before anything else the shim calls
//! [`claim`]. It uses `link(2)` to give a file with the job ID and restart count the name
//! `claim.<n>`, which succeeds for exactly one process on one file system. A job takes
//! `claim.<n+1>` only if the newest claim has its own job ID and a lower restart count (Slurm has
//! requeued the job), and only if the pod may run again. Other pods are submitted with
//! `--no-requeue`, but an administrator can override that. Claims are never removed during the life
//! of the directory. All functions block on file I/O.

use std::{
    fs,
    path::{Path, PathBuf},
};

pub use super::decode::Claim;
use super::{
    atomic::{self, FileError},
    decode::{self, DecodeError, MAX_CLAIM},
};

/// Why the caller must not run the containers.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another job, or an equal or newer restart of this one, holds the claim: this job is surplus.
    #[error("job {} (restart {}) on {} holds the claim", holder.job_id, holder.restart, holder.host)]
    Surplus {
        /// The newest claim.
        holder: Claim,
    },
    /// A file operation failed.
    #[error("claim the job directory")]
    File(#[from] FileError),
    /// A claim file cannot be parsed. It may be another job's, so nothing is run.
    #[error("{} is not a claim", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: DecodeError,
    },
}

/// Claims `folder` for `wanted`, and returns the claim's number. A number of 2 or more means that
/// an earlier run of the same job has started the containers; this is an error unless the pod may
/// run `again`.
pub fn claim(folder: &Path, wanted: &Claim, again: bool) -> Result<u32, ClaimError> {
    let mine = atomic::temporary(&folder.join("claim"));
    let bytes = serde_json::to_vec(wanted).map_err(|source| ClaimError::Malformed {
        path: mine.clone(),
        source: source.into(),
    })?;
    atomic::create_synced(&mine, &bytes, 0o600)?;
    let outcome = take(folder, &mine, wanted, again);
    // The temporary name is no longer needed. The outcome is the same if it cannot be removed.
    drop(fs::remove_file(&mine));
    outcome
}

/// The newest claim and its number, if there is one.
pub fn newest(folder: &Path) -> Result<Option<(u32, Claim)>, ClaimError> {
    let mut found = None;
    // Opens one name after the other. A listing of the folder may be out of date on a shared file
    // system.
    for n in 1.. {
        let path = path(folder, n);
        let Some(bytes) = atomic::read_bounded(&path, MAX_CLAIM)? else {
            break;
        };
        let claim =
            decode::claim(&bytes).map_err(|source| ClaimError::Malformed { path, source })?;
        found = Some((n, claim));
    }
    Ok(found)
}

fn path(folder: &Path, n: u32) -> PathBuf {
    folder.join(format!("claim.{n}"))
}

fn take(folder: &Path, mine: &Path, wanted: &Claim, again: bool) -> Result<u32, ClaimError> {
    loop {
        let n = match newest(folder)? {
            None => 1,
            Some((n, holder)) if again && may_follow(&holder, wanted) => n + 1,
            Some((_, holder)) => return Err(ClaimError::Surplus { holder }),
        };
        let target = path(folder, n);
        if atomic::link_once(mine, &target)? {
            return Ok(n);
        }
    }
}

fn may_follow(holder: &Claim, wanted: &Claim) -> bool {
    holder.job_id == wanted.job_id && holder.restart < wanted.restart
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    fn job(id: &str, restart: u32) -> Claim {
        Claim {
            job_id: id.to_owned(),
            restart,
            host: "c1".to_owned(),
        }
    }

    #[test]
    fn the_second_job_is_surplus_and_a_restart_follows_where_it_may() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(claim(folder.path(), &job("7", 0), false).unwrap(), 1);
        for loser in [job("8", 0), job("8", 1), job("7", 0)] {
            let error = claim(folder.path(), &loser, true).unwrap_err();
            assert!(matches!(&error, ClaimError::Surplus { holder } if *holder == job("7", 0)));
        }
        assert!(claim(folder.path(), &job("7", 2), false).is_err());
        assert_eq!(claim(folder.path(), &job("7", 2), true).unwrap(), 2);
        assert!(claim(folder.path(), &job("7", 1), true).is_err());
        assert_eq!(newest(folder.path()).unwrap(), Some((2, job("7", 2))));
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            2,
            "no temporary file stays"
        );
    }

    #[test]
    fn a_claim_that_cannot_be_read_runs_nothing() {
        let folder = tempfile::tempdir().unwrap();
        atomic::write(&folder.path().join("claim.1"), b"{", 0o600).unwrap();
        let error = claim(folder.path(), &job("7", 0), true).unwrap_err();
        assert!(matches!(error, ClaimError::Malformed { .. }));
    }

    #[test]
    fn exactly_one_of_many_concurrent_claims_wins() {
        const RACERS: usize = 16;
        for _ in 0..20 {
            let folder = tempfile::tempdir().unwrap();
            let barrier = Barrier::new(RACERS);
            let race = |n: usize| {
                barrier.wait();
                claim(folder.path(), &job(&n.to_string(), 0), false).is_ok()
            };
            let won = std::thread::scope(|scope| {
                let racers: Vec<_> = (0..RACERS).map(|n| scope.spawn(move || race(n))).collect();
                racers
                    .into_iter()
                    .map(|racer| usize::from(racer.join().unwrap()))
                    .sum::<usize>()
            });
            assert_eq!(won, 1);
        }
    }
}
