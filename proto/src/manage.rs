//! PURE: what `knocctl agent` and `knoc-agent manage` say to each other over SSH: one request as JSON on standard input, and
//! the answer as one line of standard output, behind whatever a login shell has printed.
//!
//! Both sides may be of different versions: fields are only ever added, with a default.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What the line of the answer begins with.
pub const ANSWER: &str = "knoc-agent manage: ";
/// The largest request.
pub const MAX_REQUEST: usize = 64 << 10;
/// The largest answer: a few certificates and findings.
pub const MAX_ANSWER: usize = 1 << 20;

/// How the agent is kept running on a login node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunMode {
    /// A unit of the user's systemd, which goes on after the logout.
    Systemd,
    /// A line of the user's crontab starts the agent if it does not run.
    Cron,
    /// Slurm's cron starts a job with the agent if none runs.
    Scrontab,
    /// A job that submits its successor.
    Job,
    /// Each link starts the agent if it does not run.
    OnDemand,
}

impl RunMode {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Systemd,
        Self::Cron,
        Self::Scrontab,
        Self::Job,
        Self::OnDemand,
    ];

    /// Its name on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Systemd => "systemd",
            Self::Cron => "cron",
            Self::Scrontab => "scrontab",
            Self::Job => "job",
            Self::OnDemand => "on-demand",
        }
    }

    /// Whether the agent runs in a job, so that it needs a partition and changes its host.
    #[must_use]
    pub fn is_in_job(self) -> bool {
        matches!(self, Self::Scrontab | Self::Job)
    }
}

impl fmt::Display for RunMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for RunMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut all = Self::ALL.into_iter();
        let found = all.find(|mode| mode.as_str() == text);
        found.ok_or_else(|| "systemd, cron, scrontab, job or on-demand".to_owned())
    }
}

/// What `knocctl agent` and `knocctl doctor --preflight` ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "do")]
pub enum Request {
    /// Installs the program that runs, configures the agent and starts it.
    Install(Box<Install>),
    /// Looks at what an installation would need; installs nothing.
    Preflight {
        /// Also runs a job of some seconds that looks at a compute node.
        probe: bool,
    },
    /// Tells which version runs, and how.
    Status,
    /// Installs the program that runs beside the old one, and restarts the agent.
    Upgrade {
        /// The length of the program, to find a transfer that was cut.
        length: u64,
    },
    /// Stops the agent and removes its programs.
    Uninstall {
        /// Also if pods run.
        force: bool,
    },
}

/// The options of an installation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Install {
    /// The length of the program, to find a transfer that was cut.
    pub length: u64,
    /// The name of the site.
    pub site: String,
    /// The addresses at which kubelets reach the agent; if empty, over SSH only.
    pub addresses: Vec<String>,
    /// Namespaces whose pods are accepted.
    pub namespaces: Vec<String>,
    /// The scheduler, as for `knoc-agent init`.
    pub scheduler: Option<String>,
    /// The container runtime, as for `knoc-agent init`.
    pub runtime: Option<String>,
    /// How to keep the agent running; unset: the best that the site allows.
    pub run_mode: Option<RunMode>,
    /// The partition of an agent that runs in a job.
    pub partition: Option<String>,
}

/// What was done or found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Answer {
    /// The version of the program that answers.
    pub version: String,
    /// What was done or found, in order. Nothing follows a step that failed.
    pub steps: Vec<Step>,
    /// What was installed, if it was.
    pub installed: Option<Installed>,
}

/// One step or finding.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Step {
    /// What it is about.
    pub what: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What was done or found, or the error.
    pub detail: String,
    /// What to do about it.
    pub cure: String,
}

/// What the cluster's side needs to know.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Installed {
    /// The Secret manifest of the kubelet's certificate, with its private key.
    pub bundle: String,
    /// How the agent is kept running.
    pub run_mode: Option<RunMode>,
    /// The absolute path of the program, for a forced command.
    pub program: String,
    /// Whether the agent listens on a port for kubelets.
    pub listens: bool,
    /// The namespaces whose pods are accepted; empty means all.
    pub namespaces: Vec<String>,
}

impl fmt::Debug for Installed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the bundle, which holds a key.
        f.debug_struct("Installed")
            .field("run_mode", &self.run_mode)
            .field("program", &self.program)
            .finish_non_exhaustive()
    }
}

impl Answer {
    /// The line that is printed.
    #[must_use]
    pub fn line(&self) -> String {
        let json = serde_json::to_string(self).unwrap_or_default();
        format!("\n{ANSWER}{json}\n")
    }

    /// The answer in the output of a login: its last line that begins as one.
    #[must_use]
    pub fn find(output: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(output);
        let mut lines = text.lines().rev();
        let json = lines.find_map(|line| line.strip_prefix(ANSWER))?;
        serde_json::from_str(json).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_found_behind_a_banner_without_a_last_newline() {
        let answer = Answer {
            version: "1.2.3".into(),
            steps: vec![Step {
                what: "program".into(),
                detail: "two\nlines".into(),
                ..Step::default()
            }],
            installed: Some(Installed {
                bundle: "key".into(),
                ..Installed::default()
            }),
        };
        let output = format!("Welcome{}logout\n", answer.line());
        assert_eq!(Answer::find(output.as_bytes()), Some(answer.clone()));
        assert_eq!(Answer::find(b"Welcome\n"), None);
        assert_eq!(Answer::find(b"knoc-agent manage: {\"steps\": 3}\n"), None);
        assert!(!format!("{answer:?}").contains("key"), "a key in the log");
    }

    #[test]
    fn a_request_of_another_version_is_read_as_far_as_it_is_known() {
        let later = r#"{"do": "install", "site": "hpc", "colour": "red"}"#;
        let read: Request = serde_json::from_str(later).unwrap();
        assert!(matches!(read, Request::Install(install) if install.site == "hpc"));
        assert!(serde_json::from_str::<Request>(r#"{"do": "dance"}"#).is_err());
    }

    #[test]
    fn every_run_mode_has_the_same_name_everywhere() {
        for mode in RunMode::ALL {
            assert_eq!(mode.as_str().parse::<RunMode>(), Ok(mode));
            let json = serde_json::to_string(&mode).unwrap();
            assert_eq!(json, format!("\"{mode}\""));
        }
    }
}
