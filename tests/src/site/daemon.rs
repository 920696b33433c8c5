//! A process of the tests: its log goes to a file, it is killed by its own pid, and it is never left behind.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Child;

use crate::wait_for;

/// How long a killed process may take to be gone.
const GONE: Duration = Duration::from_mins(2);

/// A running process; it is killed when this is dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    name: String,
}

impl Daemon {
    /// Starts the process with only HOME, PATH and `env` in its environment.
    pub fn start(
        argv: &[PathBuf],
        env: &[(&str, &str)],
        home: &Path,
        log: &Path,
    ) -> anyhow::Result<Self> {
        let (program, arguments) = argv.split_first().context("an empty command")?;
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)?;
        #[expect(
            clippy::disallowed_methods,
            reason = "tests start the programs under test"
        )]
        let mut command = tokio::process::Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .env("HOME", home)
            .env("PATH", "/usr/bin:/bin");
        command.env("RUST_BACKTRACE", "1").envs(env.iter().copied());
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true);
        let name = program.display().to_string();
        let child = command.spawn().with_context(|| name.clone())?;
        Ok(Self { child, name })
    }

    /// The process id, or `None` once the process has ended.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Returns an error once the process has ended, so that waits can stop early.
    pub fn still_runs(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(format!("{} has ended: {status}", self.name)),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Sends SIGKILL and waits until the process is gone.
    pub async fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill().await.with_context(|| self.name.clone())
    }

    /// Sends SIGTERM and waits for the process's end.
    pub async fn terminate(mut self) -> anyhow::Result<ExitStatus> {
        if let Some(pid) = self
            .pid()
            .and_then(|pid| i32::try_from(pid).ok())
            .and_then(Pid::from_raw)
        {
            kill_process(pid, Signal::TERM)?;
        }
        self.ended(GONE).await
    }

    /// Waits until the process ends by itself.
    pub async fn ended(&mut self, deadline: Duration) -> anyhow::Result<ExitStatus> {
        let ended = tokio::time::timeout(deadline, self.child.wait()).await;
        let ended =
            ended.with_context(|| format!("{} still runs after {deadline:?}", self.name))?;
        Ok(ended?)
    }

    /// Resident memory in KiB.
    pub fn resident(&self) -> anyhow::Result<u64> {
        let pid = self.pid().context("it has ended")?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        Ok(number.context("no VmRSS")?.parse()?)
    }
}

/// The processes, other than this one, whose command line contains that path.
#[must_use]
pub fn processes_naming(path: &Path) -> Vec<(i32, String)> {
    let needle = path.to_string_lossy().into_owned();
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        let Ok(cmdline) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let cmdline = String::from_utf8_lossy(&cmdline).replace('\0', " ");
        if pid != own && cmdline.contains(&needle) {
            found.push((pid, cmdline));
        }
    }
    found
}

/// Waits until no process except the given one has that path in its command line.
pub async fn nothing_names(path: &Path, but: Option<u32>) -> anyhow::Result<()> {
    let but = but.and_then(|pid| i32::try_from(pid).ok());
    wait_for("all processes of the jobs are gone", GONE, async || {
        let mut left = processes_naming(path);
        left.retain(|(pid, _)| Some(*pid) != but);
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    })
    .await
}

/// Kills the processes with the path in their command line, which a failed test left.
pub(super) fn kill_naming(path: &Path) {
    for (pid, _) in processes_naming(path) {
        if let Some(pid) = Pid::from_raw(pid) {
            // It may have ended meanwhile.
            let _gone = kill_process(pid, Signal::KILL);
        }
    }
}
