//! The agent that runs, by its lease: where, since when, which version; how to stop it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use knoc_contract::jobdir::{self, StateDir, schema::Lease};
use knoc_proto::manage::RunMode;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::Instant;

use super::{Account, Failed, Steps};
use crate::{
    config::Config,
    connect,
    lease::Process,
    pod::record::Record,
    run_mode::{Agent, is_set_up},
};

/// How long an agent may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(40);
/// Between two looks at the lease.
const LOOK: Duration = Duration::from_millis(100);

/// The agent that holds the lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Running {
    /// None lives.
    No,
    /// It is a process of this host.
    Here {
        /// Its process.
        pid: i32,
        /// Its lease.
        lease: Lease,
    },
    /// It has shown recently that it lives on another host.
    Elsewhere(Lease),
}

impl Running {
    /// Looks at the lease of the state directory.
    pub(super) fn look(state_dir: &Path) -> Result<Self, Failed> {
        let state = StateDir::new(state_dir);
        let lease: Option<Lease> =
            jobdir::read_json(&state.lease()).map_err(Failed::of("look at the lease file"))?;
        let own = Process::own();
        let now = Timestamp::now().as_second();
        if connect::lives_elsewhere(lease.as_ref(), &own.host, now) {
            return Ok(lease.map_or(Self::No, Self::Elsewhere));
        }
        let Some(lease) = lease else {
            return Ok(Self::No);
        };
        let pid = i32::try_from(lease.pid).unwrap_or_default();
        let process = PathBuf::from(format!("/proc/{pid}"));
        let here = lease.host == own.host && lease.boot_id == own.boot_id && lease.heartbeat > 0;
        if !here || pid <= 1 || !is_agent(&process) {
            return Ok(Self::No);
        }
        Ok(Self::Here { pid, lease })
    }

    /// Whether it is the same process.
    pub(super) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Here { pid, lease },
                Self::Here {
                    pid: other,
                    lease: there,
                },
            ) => pid == other && lease.epoch == there.epoch,
            (Self::No | Self::Here { .. } | Self::Elsewhere(_), _) => false,
        }
    }

    pub(super) fn epoch(&self) -> i64 {
        match self {
            Self::No => 0,
            Self::Here { lease, .. } | Self::Elsewhere(lease) => lease.epoch,
        }
    }

    pub(super) fn describe(&self) -> String {
        let since = |lease: &Lease| {
            // An epoch is the time at which its agent started.
            let at = Timestamp::from_second(lease.epoch).unwrap_or_default();
            at.strftime("%Y-%m-%d %H:%M:%SZ").to_string()
        };
        match self {
            Self::No => "no agent runs".to_owned(),
            Self::Here { lease, .. } | Self::Elsewhere(lease) => {
                let version = lease.version.as_deref();
                let version = version.map_or_else(String::new, |version| format!(" {version}"));
                let since = since(lease);
                format!(
                    "knoc-agent{version} is process {} on {} since {since}",
                    lease.pid, lease.host
                )
            }
        }
    }
}

/// Whether the process is a program of ours: a process ID may be used again.
fn is_agent(process: &Path) -> bool {
    let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
    let mut words = line.split(|byte| *byte == 0);
    let program = String::from_utf8_lossy(words.next().unwrap_or_default());
    let serves = program.contains("knoc-agent") && words.any(|word| word == b"serve");
    let state = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
    let state = state.rsplit_once(") ").map(|(_, rest)| rest.to_owned());
    serves && state.is_some_and(|state| !state.starts_with(['Z', 'X']))
}

/// How many pods there are, and how many may still have a job.
pub(super) fn pods(state_dir: &Path) -> Result<(usize, usize), Failed> {
    let state = StateDir::new(state_dir);
    if !state.pods().exists() {
        return Ok((0, 0));
    }
    let cure = "look at the state directory";
    let all = state.list().map_err(Failed::of(cure))?;
    let mut live = 0;
    for dir in &all {
        let record: Option<Record> =
            jobdir::read_json(&dir.record_path()).map_err(Failed::of(cure))?;
        live += usize::from(record.is_some_and(|record| !record.is_over()));
    }
    Ok((all.len(), live))
}

/// The modes that are set up.
pub(super) async fn modes(account: &Account, agent: &Agent) -> Vec<RunMode> {
    let mut found = Vec::new();
    for mode in RunMode::ALL {
        if is_set_up(mode, agent, &account.login).await {
            found.push(mode);
        }
    }
    found
}

/// Asks the agent of this host to stop, and waits until it has.
pub(super) async fn stop(running: &Running, state_dir: &Path) -> Result<String, Failed> {
    let Running::Here { pid, .. } = running else {
        return Ok(running.describe());
    };
    let told = kill(Pid::from_raw(*pid), Signal::SIGTERM);
    told.map_err(Failed::of("end the process yourself"))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        if Running::look(state_dir)? != *running && !is_agent(Path::new(&format!("/proc/{pid}"))) {
            return Ok(format!("process {pid} has ended"));
        }
        if Instant::now() >= deadline {
            return Err(Failed::new(
                format!("process {pid} does not end"),
                "look at its log; end it yourself if nothing else helps",
            ));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until an agent with a newer lease than `before` lives.
pub(super) async fn wait_for_newer(before: i64, config: &Config) -> Result<String, Failed> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let running = Running::look(&config.state_dir)?;
        if running != Running::No && running.epoch() > before {
            return Ok(running.describe());
        }
        if Instant::now() >= deadline {
            let log = config.state_dir.join("agent.log");
            return Err(Failed::new(
                format!(
                    "{}, {} s after its start",
                    running.describe(),
                    PATIENCE.as_secs()
                ),
                &format!(
                    "its log is {} or in `journalctl --user --unit knoc-agent`; `knoc-agent serve` on the login node shows the \
                     error",
                    log.display()
                ),
            ));
        }
        tokio::time::sleep(LOOK).await;
    }
}

impl Account {
    /// What is installed and how it runs.
    pub(super) async fn status(&self, steps: &mut Steps) {
        let installed = match self.linked() {
            Some(version) => Ok(format!(
                "knoc-agent {version} is installed in {}",
                self.store().display()
            )),
            None => Err(Failed::new(
                format!(
                    "{} is not a link to an installed version",
                    self.link().display()
                ),
                "run `knocctl agent install`",
            )),
        };
        steps.add("program", installed).ok();
        let config = self.config().map_err(Failed::of(
            "fix the site file, or run `knocctl agent install`",
        ));
        let config = match config {
            Ok(config) => config,
            Err(failed) => {
                steps.bad("configuration", failed);
                return;
            }
        };
        steps.good(
            "configuration",
            format!("site {}, {}", config.site, self.site_file().display()),
        );
        let modes = modes(self, &self.agent(&config)).await;
        let modes: Vec<&str> = modes.iter().map(|mode| mode.as_str()).collect();
        steps.good(
            "run mode",
            if modes.is_empty() {
                "none is set up: a link starts the agent, or you do".to_owned()
            } else {
                modes.join(", ")
            },
        );
        let on_demand = modes.is_empty();
        let running = Running::look(&config.state_dir).and_then(|running| match running {
            Running::No if !on_demand => Err(Failed::new(
                "no agent runs",
                "it should: look at its log, or run `knoc-agent serve` on the login node to see the error",
            )),
            Running::No => Ok("no agent runs now".to_owned()),
            Running::Here { .. } | Running::Elsewhere(_) => Ok(running.describe()),
        });
        steps.add("agent", running).ok();
        let pods = pods(&config.state_dir);
        let pods = pods.map(|(all, live)| format!("{all} pods, {live} of them may have a job"));
        steps.add("jobs", pods).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_of_a_process_that_is_no_agent_is_nobodys() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        assert_eq!(Running::look(folder.path()).unwrap(), Running::No);
        let own = Process::own();
        let lease = Lease {
            host: own.host,
            boot_id: own.boot_id,
            pid: own.pid,
            epoch: 1,
            heartbeat: Timestamp::now().as_second(),
            version: Some("1.2.3".to_owned()),
        };
        jobdir::write_json(&state.lease(), &lease).unwrap();
        // The process ID has been used again, for these tests.
        assert_eq!(Running::look(folder.path()).unwrap(), Running::No);
        let there = Lease {
            host: "login2".into(),
            ..lease
        };
        jobdir::write_json(&state.lease(), &there).unwrap();
        let running = Running::look(folder.path()).unwrap();
        assert!(
            running
                .describe()
                .starts_with("knoc-agent 1.2.3 is process")
                && running.describe().contains("on login2 since 1970"),
            "{running:?}"
        );
    }

    #[test]
    fn no_state_directory_has_no_pods() {
        assert_eq!(pods(Path::new("/nowhere")).unwrap(), (0, 0));
    }
}
