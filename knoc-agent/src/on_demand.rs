//! `knoc-agent serve --stdio`: joins the agent of this login, and starts one before if none runs.
//!
//! ```text
//! ssh login knoc-agent serve --stdio ──► socket answers? ──yes──► relay
//!                                            │ no
//!                                            ▼
//!                     knoc-agent serve --on-demand, in a session of its own ──► its socket answers ──► relay
//! ```
//!
//! The agent that is started outlives this process. It ends when it had no link for `serve.linger`, or when the site ends
//! what a user leaves running; jobs do not notice, and the next link starts it again. Two of these processes may start
//! an agent at once: the lease lets one of them run, and both join it.
//!
//! Its sockets lie in the state directory: `$XDG_RUNTIME_DIR` ends with the last session of the user.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use knoc_contract::jobdir::{self, JobDirError, StateDir, atomic::FileError, schema::Lease};
use knoc_link::{carrier::exec::marker::Speaks, file_lock, socket::SocketLocations};
use tokio::time::Instant;

use crate::{
    command::{Command, CommandError},
    config::Config,
    connect::{self, ConnectError, Reached},
    lease::Process,
};

/// From the start of an agent to its socket: it reads its records and asks the container runtime for its version.
const START: Duration = Duration::from_secs(30);
/// Between two looks for its socket.
const LOOK: Duration = Duration::from_millis(50);
/// A log that is larger is put aside before an agent starts.
const LOG_SIZE: u64 = 16 << 20;
/// How much of the log an error shows.
const LOG_SHOWN: u64 = 2 << 10;

/// Why there is no agent to relay to.
#[derive(Debug, thiserror::Error)]
pub enum OnDemandError {
    /// The relay.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The state directory.
    #[error("prepare the state directory")]
    State(#[from] FileError),
    /// The lease.
    #[error("read the lease")]
    Lease(#[from] JobDirError),
    /// The log of the agent that would be started.
    #[error("open the log {}", path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// The system's message.
        #[source]
        source: std::io::Error,
    },
    /// This program cannot be found.
    #[error("find the program of this process")]
    Program(#[source] std::io::Error),
    /// The agent could not be started.
    #[error("start an agent")]
    Start(#[from] CommandError),
    /// The agent was started and has ended, or serves no socket.
    #[error("the agent that was started {what}; its log {} ends with: {said}", path.display())]
    NotServing {
        /// What it does instead.
        what: &'static str,
        /// Its log.
        path: PathBuf,
        /// The end of it.
        said: String,
    },
}

/// What the agent is started with.
#[derive(Debug)]
pub struct Start {
    /// The site file.
    pub site_file: PathBuf,
    /// The environment of this process.
    pub environment: Vec<(OsString, OsString)>,
    /// Whether the agent ends once it had no link for `serve.linger`.
    pub lingers: bool,
}

/// `serve --detach`: starts an agent in the background, unless one of this state directory lives, on whichever host.
pub async fn ensure(
    config: &Config,
    places: &SocketLocations,
    start: &Start,
) -> Result<(), OnDemandError> {
    let state = StateDir::new(&config.state_dir);
    let lease: Option<Lease> = jobdir::read_json(&state.lease())?;
    let own = Process::own();
    if connect::lives_elsewhere(lease.as_ref(), &own.host, Timestamp::now().as_second()) {
        return Ok(());
    }
    // The agent itself closes a connection that nothing is sent over.
    reach(config, places, Speaks::Plain, start).await.map(drop)
}

/// A connection to the agent of this login, which is started if none answers.
pub async fn reach(
    config: &Config,
    places: &SocketLocations,
    speaks: Speaks,
    start: &Start,
) -> Result<Reached, OnDemandError> {
    let state = StateDir::new(&config.state_dir);
    let first = match connect::reach(config, places, speaks).await {
        Ok(reached) => return Ok(reached),
        Err(error @ ConnectError::NoTls) => return Err(error.into()),
        Err(error) => error,
    };
    let lease: Option<Lease> = jobdir::read_json(&state.lease())?;
    let own = Process::own();
    if connect::lives_elsewhere(lease.as_ref(), &own.host, Timestamp::now().as_second()) {
        return Err(first.into());
    }
    state.create()?;
    let log = config.state_dir.join("agent.log");
    let pid = spawn(&log, start)?;
    let deadline = Instant::now() + START;
    loop {
        // If another one won the lease, this one has ended, and that one's socket answers.
        let error = match connect::reach(config, places, speaks).await {
            Ok(reached) => return Ok(reached),
            Err(error) => error,
        };
        let late = Instant::now() >= deadline;
        if let ConnectError::Elsewhere { .. } = &error
            && !runs(pid)
        {
            return Err(error.into());
        }
        if late || (!runs(pid) && !somebody_holds(&state, &own)?) {
            let what = if late {
                "serves no socket"
            } else {
                "has ended"
            };
            return Err(OnDemandError::NotServing {
                what,
                said: end_of(&log),
                path: log,
            });
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Starts an agent in a session of its own, with its log in a file.
fn spawn(log: &Path, start: &Start) -> Result<i32, OnDemandError> {
    let failed = |source| OnDemandError::Log {
        path: log.to_owned(),
        source,
    };
    let output = open_log(log).map_err(failed)?;
    let program = std::env::current_exe().map_err(OnDemandError::Program)?;
    let kept = start.environment.iter().filter(|(name, _)| {
        let name = name.to_string_lossy();
        name != "XDG_RUNTIME_DIR" && !name.starts_with("SSH_")
    });
    let command = Command::new(program)
        .arg("serve")
        .args(start.lingers.then_some("--on-demand"))
        .arg("--config")
        .arg(&start.site_file)
        .envs(kept.map(|(name, value)| (name, value)))
        .current_dir("/");
    Ok(command.spawn_detached(output)?)
}

/// Opens the log. A large one is put aside before, and only by one of the processes that have found it large: the others would
/// put aside what the first has begun instead, over the large one.
fn open_log(log: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o600);
    let large = options.open(log)?;
    let about = large.metadata()?;
    if about.len() <= LOG_SIZE {
        return Ok(large);
    }
    // A file system without locks has none to wait for.
    file_lock::wait(log, &|| large.try_lock())?;
    if fs::metadata(log).is_ok_and(|now| (now.dev(), now.ino()) == (about.dev(), about.ino())) {
        fs::rename(log, log.with_extension("log.1"))?;
    }
    options.open(log)
}

/// Whether the process has not ended; one that was not waited for has.
fn runs(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest);
    state.is_some_and(|rest| !rest.starts_with(['Z', 'X']))
}

/// Whether an agent of this host holds the lease and lives: it is starting, too. One that follows the lease has it in a moment, and its
/// file is removed after that.
fn somebody_holds(state: &StateDir, own: &Process) -> Result<bool, JobDirError> {
    let read = |path: PathBuf| jobdir::read_json::<Lease>(&path);
    let lives = |lease: &Lease| {
        let pid = i32::try_from(lease.pid).unwrap_or_default();
        lease.host == own.host && lease.boot_id == own.boot_id && lease.heartbeat > 0 && runs(pid)
    };
    let epoch = read(state.lease())?.map_or(0, |lease| lease.epoch);
    let mut n = 1;
    while let Some(next) = read(state.follower(epoch, n))? {
        if lives(&next) {
            return Ok(true);
        }
        n += 1;
    }
    Ok(read(state.lease())?.is_some_and(|lease| lives(&lease)))
}

/// The end of a log, on one line.
fn end_of(log: &Path) -> String {
    let read = || {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_SHOWN)))?;
        let mut bytes = Vec::new();
        file.take(LOG_SHOWN).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    let text = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().rev().take(3).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" / ")
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_large_log_is_put_aside_once_however_many_agents_are_started() {
        const STARTS: usize = 8;
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("agent.log");
        let start = |barrier: &std::sync::Barrier| {
            barrier.wait();
            open_log(&log).unwrap().write_all(b"started\n").unwrap();
        };
        for _ in 0..40 {
            File::create(&log).unwrap().set_len(LOG_SIZE + 1).unwrap();
            let barrier = std::sync::Barrier::new(STARTS);
            std::thread::scope(|scope| {
                for _ in 0..STARTS {
                    scope.spawn(|| start(&barrier));
                }
            });
            let aside = fs::metadata(log.with_extension("log.1")).unwrap();
            assert_eq!(aside.len(), LOG_SIZE + 1);
            let text = fs::read_to_string(&log).unwrap();
            assert_eq!(text, "started\n".repeat(STARTS));
        }
    }

    #[test]
    fn an_agent_that_is_about_to_have_the_lease_holds_it() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        let own = Process::own();
        let holds = || somebody_holds(&state, &own).unwrap();
        assert!(!holds());
        let lease = |pid: u32, epoch: i64, heartbeat: i64| Lease {
            host: own.host.clone(),
            boot_id: own.boot_id.clone(),
            pid,
            epoch,
            heartbeat,
            version: None,
        };
        jobdir::write_json(&state.follower(0, 1), &lease(u32::MAX, 1, 1)).unwrap();
        assert!(!holds(), "it has died");
        jobdir::write_json(&state.follower(0, 2), &lease(own.pid, 2, 1)).unwrap();
        assert!(holds());
        jobdir::write_json(&state.lease(), &lease(own.pid, 2, 0)).unwrap();
        assert!(!holds(), "it has released the lease");
    }

    #[test]
    fn this_process_runs_and_no_process_zero_does() {
        assert!(runs(i32::try_from(std::process::id()).unwrap()));
        assert!(!runs(0));
    }
}
