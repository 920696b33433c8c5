//! The lease file, which decides which agent may submit jobs from a state directory.
//!
//! Two login nodes may share one home directory, and a user may start an agent on each. The lease
//! names its holder (host, boot ID, process ID) and an epoch that grows with every start. A second
//! agent that finds a live holder stops with a message; it takes over a lease whose holder is dead
//! (the same host and no such process, or no heartbeat for [`STALE`]). An agent whose epoch is no
//! longer the newest is fenced: [`Holder::check`] reports it before each `sbatch` and before each
//! record, and the agent changes nothing more.
//!
//! ```text
//! lease of epoch E, nobody alive ──► create agent.after.E.1 ──► the lease is still of E? ──► write the lease
//!                                      │ there already            │ no: begin again
//!                                      ├─ its agent lives: stop
//!                                      └─ it has died: agent.after.E.2 …
//! ```
//!
//! Agents that start at the same moment read the same lease, and only one of them can create the file that names who
//! follows it. A heartbeat is not atomic: an older agent that was suspended between reading the lease and writing it may
//! write its own over the newer one's. That fences nobody, and the newer agent's next heartbeat replaces it. All
//! functions block on file I/O. An agent never removes the lease of another.

use std::{
    cmp::Ordering,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use knoc_contract::jobdir::{self, JobDirError, StateDir, schema::Lease};
use knoc_proto::error::chain;

/// The interval between two heartbeats.
pub const HEARTBEAT: Duration = Duration::from_secs(15);
/// A holder whose last heartbeat is older than this is dead.
pub const STALE: Duration = Duration::from_mins(1);

/// How many agents in a row may have died between following a lease and having it, and how often the lease may have changed
/// meanwhile.
const ATTEMPTS: u32 = 16;

/// Why this agent may not submit.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Another agent is alive.
    #[error(
        "another agent holds {}: process {} on {}, last heartbeat {} s ago; stop it first, or wait \
         until its heartbeat is {} s old",
        path.display(), holder.pid, holder.host, age, STALE.as_secs()
    )]
    Held {
        /// The path of the lease file.
        path: PathBuf,
        /// The holder.
        holder: Box<Lease>,
        /// The age of its last heartbeat in seconds.
        age: i64,
    },
    /// A newer agent has taken over.
    #[error("this agent (epoch {own}) was fenced by a newer one (epoch {}, {} on {})", holder.epoch, holder.pid, holder.host)]
    Fenced {
        /// This agent's epoch.
        own: i64,
        /// The present holder.
        holder: Box<Lease>,
    },
    /// Other agents start and die all the time.
    #[error("{} changes all the time: stop what starts agents again and again", path.display())]
    Unsettled {
        /// The path of the lease file.
        path: PathBuf,
    },
    /// The lease file cannot be read or written.
    #[error("read or write the lease file")]
    File(#[from] JobDirError),
}

/// Identifies a process across hosts and reboots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Host name.
    pub host: String,
    /// The host's boot ID.
    pub boot_id: String,
    /// The process ID.
    pub pid: u32,
}

impl Process {
    /// This process.
    #[must_use]
    pub fn own() -> Self {
        let host = nix::unistd::gethostname()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            host,
            boot_id: boot_id.trim().to_owned(),
            pid: std::process::id(),
        }
    }
}

/// The lease that this agent holds.
#[derive(Debug, Clone)]
pub struct Holder {
    path: PathBuf,
    process: Process,
    epoch: i64,
}

impl Holder {
    /// Takes the lease of `state`, unless another live agent holds it.
    pub fn take(state: &StateDir, process: &Process, now: Timestamp) -> Result<Self, LeaseError> {
        let path = state.lease();
        for _ in 0..ATTEMPTS {
            let known: Option<Lease> = jobdir::read_json(&path)?;
            let known = match &known {
                Some(lease) => dead(&path, lease, process, now)?,
                None => 0,
            };
            // The epoch is at least the clock's time, so that it grows even if the file was lost.
            let mut holder = Self {
                path: path.clone(),
                process: process.clone(),
                epoch: known.max(now.as_second()),
            };
            let Some(n) = holder.follow(state, known, now)? else {
                continue;
            };
            // One that was taken for dead and wakes up is the older one.
            holder.epoch = holder.epoch.saturating_add(n.into());
            if holder.settle(&state.follower(known, n), known, now)? {
                if let Err(error) = state.sweep_followers(holder.epoch) {
                    // The next agent tries again.
                    tracing::warn!(
                        error = chain(&error),
                        "the names of agents that followed older leases stay"
                    );
                }
                return Ok(holder);
            }
        }
        Err(LeaseError::Unsettled { path })
    }

    /// Writes the lease, if it is still that of epoch `known`. It is not if another agent has followed `known` and has the lease, and
    /// its file was swept before `own` was created, this agent's.
    fn settle(&self, own: &Path, known: i64, now: Timestamp) -> Result<bool, LeaseError> {
        let write = || -> Result<bool, LeaseError> {
            let still: Option<Lease> = jobdir::read_json(&self.path)?;
            let is_known = still.map_or(0, |lease| lease.epoch) == known;
            if is_known {
                self.write(now)?;
            }
            Ok(is_known)
        };
        let written = write();
        if !matches!(written, Ok(true)) {
            // It would count as that of an agent that has died, of which there may be a limited number.
            drop(fs::remove_file(own));
        }
        written
    }

    /// Makes this the only agent that follows the lease of epoch `known`, and returns after how many attempts of agents
    /// that have died. `None`: another one had it meanwhile.
    fn follow(
        &self,
        state: &StateDir,
        known: i64,
        now: Timestamp,
    ) -> Result<Option<u32>, LeaseError> {
        let own = self.lease(now);
        for n in 1..=ATTEMPTS {
            let path = state.follower(known, n);
            if jobdir::create_json(&path, &own)? {
                return Ok(Some(n));
            }
            let Some(other) = jobdir::read_json::<Lease>(&path)? else {
                return Ok(None);
            };
            dead(&path, &other, &self.process, now)?;
        }
        Ok(None)
    }

    /// This agent's epoch.
    #[must_use]
    pub fn epoch(&self) -> i64 {
        self.epoch
    }

    /// Reads the file, and fails if a newer agent has taken over.
    pub fn check(&self) -> Result<(), LeaseError> {
        match jobdir::read_json::<Lease>(&self.path)? {
            Some(holder) if self.is_fenced_by(&holder) => Err(LeaseError::Fenced {
                own: self.epoch,
                holder: Box::new(holder),
            }),
            Some(_) | None => Ok(()),
        }
    }

    /// Like [`Holder::check`], but an unreadable file counts as not fenced. For callers that need
    /// not stop because of it.
    #[must_use]
    pub fn fenced(&self) -> Option<LeaseError> {
        let error = self.check().err()?;
        matches!(error, LeaseError::Fenced { .. }).then_some(error)
    }

    /// Writes a heartbeat, if the lease is still this agent's.
    pub fn heartbeat(&self, now: Timestamp) -> Result<(), LeaseError> {
        self.check()?;
        self.write(now)
    }

    /// Releases the lease, so that the next agent need not wait.
    pub fn release(&self) -> Result<(), LeaseError> {
        self.check()?;
        // The epoch stays; the heartbeat says that no holder is alive.
        self.write(Timestamp::UNIX_EPOCH)
    }

    fn is_fenced_by(&self, lease: &Lease) -> bool {
        let own = lease.pid == self.process.pid && lease.host == self.process.host;
        match lease.epoch.cmp(&self.epoch) {
            // An older agent, which this one has replaced, wrote it late.
            Ordering::Less => false,
            Ordering::Equal => !own,
            Ordering::Greater => true,
        }
    }

    fn write(&self, now: Timestamp) -> Result<(), LeaseError> {
        Ok(jobdir::write_json(&self.path, &self.lease(now))?)
    }

    fn lease(&self, now: Timestamp) -> Lease {
        Lease {
            host: self.process.host.clone(),
            boot_id: self.process.boot_id.clone(),
            pid: self.process.pid,
            epoch: self.epoch,
            heartbeat: now.as_second(),
            version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        }
    }
}

/// The epoch of a lease whose holder is dead.
fn dead(path: &Path, holder: &Lease, own: &Process, now: Timestamp) -> Result<i64, LeaseError> {
    if !is_alive(holder, own, now) {
        return Ok(holder.epoch);
    }
    let age = now.as_second() - holder.heartbeat;
    Err(LeaseError::Held {
        path: path.to_owned(),
        holder: Box::new(holder.clone()),
        age,
    })
}

fn is_alive(holder: &Lease, own: &Process, now: Timestamp) -> bool {
    let fresh = now.as_second() - holder.heartbeat <= STALE.as_secs().try_into().unwrap_or(60);
    if holder.host != own.host {
        return fresh;
    }
    // On this host, the kernel knows better than the heartbeat.
    let running = Path::new("/proc").join(holder.pid.to_string()).exists();
    fresh && holder.boot_id == own.boot_id && running && holder.pid != own.pid
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    fn process(host: &str, pid: u32) -> Process {
        Process {
            host: host.to_owned(),
            boot_id: "b".to_owned(),
            pid,
        }
    }

    #[test]
    fn a_second_agent_waits_for_a_stale_heartbeat_and_then_fences_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        let first = Holder::take(&state, &process("login1", 10), at(0)).unwrap();
        let error = Holder::take(&state, &process("login2", 10), at(60)).unwrap_err();
        assert!(
            error.to_string().contains("process 10 on login1"),
            "{error}"
        );
        first.check().unwrap();
        let second = Holder::take(&state, &process("login2", 10), at(61)).unwrap();
        assert!(second.epoch() > first.epoch());
        assert!(matches!(
            first.heartbeat(at(62)),
            Err(LeaseError::Fenced { .. })
        ));
        second.heartbeat(at(62)).unwrap();
    }

    /// Between reading the file and writing it, an agent may be suspended for longer than a
    /// heartbeat is valid.
    #[test]
    fn a_late_heartbeat_of_an_older_agent_fences_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        let first = Holder::take(&state, &process("login1", 10), at(0)).unwrap();
        let second = Holder::take(&state, &process("login2", 10), at(61)).unwrap();
        first.write(at(1)).unwrap();
        second.check().unwrap();
        second.heartbeat(at(76)).unwrap();
        assert!(matches!(first.check(), Err(LeaseError::Fenced { .. })));
        second.check().unwrap();
    }

    #[test]
    fn on_the_same_host_a_dead_process_holds_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        let dead = process("login1", u32::MAX - 1);
        let first = Holder::take(&state, &dead, at(0)).unwrap();
        let second = Holder::take(&state, &process("login1", 7), at(1)).unwrap();
        assert!(second.epoch() > first.epoch());
        second.release().unwrap();
        Holder::take(&state, &process("login2", 7), at(2)).unwrap();
    }

    /// The kernel lists each thread as a process would be, so threads stand for agents here.
    #[test]
    fn of_agents_that_start_at_once_one_has_the_lease() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        for round in 0..50 {
            // The kernel may list a thread for a moment after it was joined, so that only its heartbeat says that it is dead.
            let now = at(round * 61);
            let (begin, end) = (Barrier::new(8), Barrier::new(8));
            let agent = || {
                let pid = nix::unistd::gettid().as_raw().try_into().unwrap();
                let process = Process {
                    pid,
                    ..Process::own()
                };
                begin.wait();
                let taken = Holder::take(&state, &process, now);
                end.wait();
                taken
            };
            let taken: Vec<_> = std::thread::scope(|scope| {
                let agents: Vec<_> = (0..8).map(|_| scope.spawn(agent)).collect();
                agents
                    .into_iter()
                    .map(|agent| agent.join().unwrap())
                    .collect()
            });
            let (holders, others): (Vec<_>, Vec<_>) = taken.into_iter().partition(Result::is_ok);
            assert_eq!(holders.len(), 1, "round {round}: {others:?}");
            for other in others {
                assert!(matches!(other, Err(LeaseError::Held { .. })), "{other:?}");
            }
            holders
                .into_iter()
                .next()
                .unwrap()
                .unwrap()
                .check()
                .unwrap();
        }
        let left = fs::read_dir(folder.path()).unwrap().count();
        assert!(left <= 2, "{left} files are left");
    }

    #[test]
    fn an_agent_that_died_while_it_took_the_lease_is_followed_and_a_live_one_is_respected() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        let first = Holder::take(&state, &process("login1", u32::MAX - 1), at(0)).unwrap();
        let dying = Holder {
            process: process("login1", u32::MAX - 2),
            epoch: first.epoch() + 1,
            ..first.clone()
        };
        dying.follow(&state, first.epoch(), at(1)).unwrap().unwrap();
        let second = Holder::take(&state, &process("login1", 7), at(2)).unwrap();
        assert!(second.epoch() > dying.epoch());
        assert!(!state.follower(first.epoch(), 1).exists(), "it is swept");
        // On another host only the heartbeat says who lives.
        second.release().unwrap();
        let other = Holder {
            process: process("login2", 7),
            epoch: second.epoch() + 1,
            ..second.clone()
        };
        other
            .follow(&state, second.epoch(), at(3))
            .unwrap()
            .unwrap();
        let error = Holder::take(&state, &process("login1", 8), at(63)).unwrap_err();
        assert!(error.to_string().contains("process 7 on login2"), "{error}");
        Holder::take(&state, &process("login1", 8), at(64)).unwrap();
    }

    /// A disk may be full for as long as a service is started again and again.
    #[test]
    fn an_agent_that_cannot_write_the_lease_follows_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        let agent = Holder {
            path: folder.path().join("missing").join("agent.lease"),
            process: process("login1", 7),
            epoch: 1,
        };
        for _ in 0..2 {
            assert_eq!(agent.follow(&state, 0, at(0)).unwrap(), Some(1));
            let own = state.follower(0, 1);
            assert!(matches!(
                agent.settle(&own, 0, at(0)),
                Err(LeaseError::File(_))
            ));
            assert!(!own.exists());
        }
    }

    #[test]
    fn a_live_process_of_this_host_is_respected() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        let own = Process::own();
        Holder::take(&state, &own, at(0)).unwrap();
        let other = Process { pid: 1, ..own };
        assert!(matches!(
            Holder::take(&state, &other, at(1)),
            Err(LeaseError::Held { .. })
        ));
    }
}
