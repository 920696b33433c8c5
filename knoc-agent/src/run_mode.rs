//! How the agent is kept running: finds out what the site allows, and sets it up.
//!
//! ```text
//! systemd    a unit of the user, with linger           the agent stays on this host
//! cron       a line that starts it if it does not run  the agent stays on this host
//! scrontab   Slurm's cron runs it as a job             the agent changes its host
//! job        a job that submits its successor          the agent changes its host
//! on-demand  each link starts it                       nothing is set up
//! ```
//!
//! Whichever it is, the lease lets one agent of a state directory run. The texts ([`text`]) and the choice ([`choose`]) are
//! pure; `detect` and `set_up` run the site's programs.

pub mod cli;
mod detect;
mod set_up;
pub mod text;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use knoc_contract::jobdir::atomic::FileError;
use knoc_proto::manage::RunMode;

use crate::command::{Command, CommandError};

pub use detect::{Possible, choose, detect};
pub use set_up::{
    check, is_set_up, restart_by_mode, set_up, start_detached, tear_down, write_unit,
};

/// Why a run mode cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum RunModeError {
    /// A program of the site refused.
    #[error("{doing}")]
    Command {
        /// What was being done.
        doing: &'static str,
        /// What the program said.
        #[source]
        source: Box<CommandError>,
    },
    /// The unit is there, but systemd does not stop it.
    #[error(
        "stop and disable {}; remove that file yourself if no systemd of this user uses it",
        path.display()
    )]
    Unit {
        /// The file of the unit.
        path: PathBuf,
        /// What systemd said.
        #[source]
        source: Box<RunModeError>,
    },
    /// A file of ours.
    #[error("write the run mode's file")]
    File(#[from] FileError),
    /// A job needs a partition.
    #[error(
        "an agent in a job needs a partition whose jobs may run for long: name it by --partition"
    )]
    NoPartition,
    /// A partition belongs to a job.
    #[error("--partition is for the run modes scrontab and job, not for {mode}")]
    NeedlessPartition {
        /// The mode that was asked for.
        mode: RunMode,
    },
    /// A word that a crontab, a unit or a batch script would not read as it is.
    #[error(
        "{word:?} has characters that a crontab, a unit or a batch script reads differently: use a path of letters, digits and _@+=:,./- only"
    )]
    Word {
        /// The word.
        word: String,
    },
}

impl RunModeError {
    fn of(doing: &'static str) -> impl FnOnce(CommandError) -> Self {
        move |source| Self::Command {
            doing,
            source: Box::new(source),
        }
    }
}

/// What is kept running, and as whom.
#[derive(Debug, Clone)]
pub struct Agent {
    /// The program, by the path that stays when it is upgraded.
    pub program: PathBuf,
    /// Its site file.
    pub site_file: PathBuf,
    /// Its state directory.
    pub state_dir: PathBuf,
    /// The user's home.
    pub home: PathBuf,
    /// `$XDG_CONFIG_HOME`, or the default.
    pub config_home: PathBuf,
}

/// The environment in which the site's programs run: that of the user's login.
#[derive(Debug, Clone, Default)]
pub struct Login(Vec<(OsString, OsString)>);

impl Login {
    /// The environment of this process.
    #[must_use]
    pub fn own() -> Self {
        Self(std::env::vars_os().collect())
    }

    pub(crate) fn get(&self, name: &str) -> Option<&OsString> {
        let mut all = self.0.iter();
        all.find(|(known, _)| known.as_os_str() == name)
            .map(|(_, value)| value)
    }

    /// The path of a program, from `PATH`.
    #[must_use]
    pub fn find(&self, program: &str) -> Option<PathBuf> {
        let path = self.get("PATH")?;
        let mut folders = std::env::split_paths(path).filter(|folder| folder.is_absolute());
        folders.find_map(|folder| Some(folder.join(program)).filter(|path| path.is_file()))
    }

    /// A program of the site; the error of running it names it if it is not there.
    pub(crate) fn command(&self, program: &str) -> Command {
        let variables = self.0.iter().map(|(name, value)| (name, value));
        match self.find(program) {
            Some(path) => Command::new(path).envs(variables),
            // The system has a default for PATH, where nobody has asked to look.
            None => Command::new(program).envs(variables).env("PATH", "/"),
        }
    }
}

/// The name of the user of this process.
#[must_use]
pub fn user_name() -> Option<String> {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid());
    user.ok().flatten().map(|user| user.name)
}

/// PURE: the path as text that every reader of it takes as one word.
fn word(path: &Path) -> Result<&str, RunModeError> {
    let wrong = || RunModeError::Word {
        word: path.display().to_string(),
    };
    let text = path.to_str().ok_or_else(wrong)?;
    is_plain(text).then_some(text).ok_or_else(wrong)
}

/// PURE: whether neither a shell, nor cron, nor systemd reads anything into the text.
fn is_plain(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_@+=:,./-".contains(c);
    !text.is_empty() && !text.starts_with('-') && text.chars().all(plain)
}
