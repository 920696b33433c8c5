//! `knoc-agent manage`: installs, upgrades and removes the agent of this user, and tells how it runs. `knocctl agent` asks
//! for it over SSH.
//!
//! ```text
//! ~/.local/lib/knoc/upload.TOKEN              what knocctl has sent; it runs itself
//! ~/.local/lib/knoc/VERSION/knoc-agent        where it moves to
//! ~/.local/bin/knoc-agent ──► ../lib/knoc/…   replaced by rename, so that it exists at all times
//! ```
//!
//! The layout is that of the package's install.sh. Each operation is a list of [`Steps`]; the first that fails ends it, and
//! running it again completes it. Running jobs have their own copy of the agent and do not notice.

mod install;
mod preflight;
mod programs;
mod running;
mod uninstall;

use std::{
    fmt,
    io::{Read as _, Write as _},
    path::PathBuf,
};

use knoc_proto::{
    error::chain,
    manage::{Answer, MAX_REQUEST, Request, Step},
};

use crate::{
    config::{Config, ConfigError, Home},
    run_mode::{Agent, Login, cli},
};

/// Why a step failed, and what to do.
#[derive(Debug)]
pub(crate) struct Failed {
    detail: String,
    cure: String,
}

impl Failed {
    fn new(detail: impl fmt::Display, cure: &str) -> Self {
        Self {
            detail: detail.to_string(),
            cure: cure.to_owned(),
        }
    }

    fn of<E: std::error::Error + 'static>(cure: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::new(chain(&error), cure)
    }
}

/// What was done so far.
#[derive(Debug, Default)]
pub(crate) struct Steps(Vec<Step>);

/// A step that failed ends the operation; it is listed already.
#[derive(Debug)]
pub(crate) struct Ended;

impl Steps {
    fn good(&mut self, what: &str, detail: impl Into<String>) {
        self.0.push(Step {
            what: what.to_owned(),
            ok: true,
            detail: detail.into(),
            cure: String::new(),
        });
    }

    fn bad(&mut self, what: &str, failed: Failed) -> Ended {
        self.0.push(Step {
            what: what.to_owned(),
            ok: false,
            detail: failed.detail,
            cure: failed.cure,
        });
        Ended
    }

    /// Lists what was done, or why it was not.
    fn add(&mut self, what: &str, done: Result<String, Failed>) -> Result<(), Ended> {
        match done {
            Ok(detail) => {
                self.good(what, detail);
                Ok(())
            }
            Err(failed) => Err(self.bad(what, failed)),
        }
    }
}

/// The agent of this user: its folders, and its site file if there is one.
#[derive(Debug)]
pub(crate) struct Account {
    home: Home,
    login: Login,
}

impl Account {
    fn site_file(&self) -> PathBuf {
        self.home.home.join(".config/knoc/agent.toml")
    }

    fn config(&self) -> Result<Config, ConfigError> {
        Config::load(&self.site_file(), &self.home)
    }

    fn agent(&self, config: &Config) -> Agent {
        Agent {
            program: self.link(),
            ..cli::agent(config, &self.site_file(), &self.home)
        }
    }

    /// The link in the user's PATH.
    fn link(&self) -> PathBuf {
        self.home.home.join(".local/bin/knoc-agent")
    }

    /// The folder of the installed versions.
    fn store(&self) -> PathBuf {
        self.home.home.join(".local/lib/knoc")
    }
}

/// Why the request was not answered.
#[derive(Debug, thiserror::Error)]
enum ManageError {
    #[error("read the request from standard input")]
    Read(#[source] std::io::Error),
    #[error("the request is larger than {} KiB", MAX_REQUEST >> 10)]
    Large,
    #[error(
        "this knoc-agent ({}) does not know what is asked for; use `knocctl agent` of the same version",
        env!("CARGO_PKG_VERSION")
    )]
    Unknown(#[source] serde_json::Error),
}

fn request() -> Result<Request, ManageError> {
    let mut bytes = Vec::new();
    let most = u64::try_from(MAX_REQUEST).unwrap_or(u64::MAX);
    let read = std::io::stdin().take(most + 1).read_to_end(&mut bytes);
    read.map_err(ManageError::Read)?;
    if bytes.len() > MAX_REQUEST {
        return Err(ManageError::Large);
    }
    serde_json::from_slice(&bytes).map_err(ManageError::Unknown)
}

/// Reads the request, does what it says and prints the answer.
pub async fn run(home: &Home) -> anyhow::Result<()> {
    let account = Account {
        home: home.clone(),
        login: Login::own(),
    };
    let mut steps = Steps::default();
    let installed = match request()? {
        Request::Install(wanted) => account.install(&wanted, &mut steps).await.ok(),
        Request::Preflight { probe } => {
            account.preflight(probe, &mut steps).await;
            None
        }
        Request::Status => {
            account.status(&mut steps).await;
            None
        }
        // What fails is listed in the steps.
        Request::Upgrade { length } => {
            account.upgrade(length, &mut steps).await.ok();
            None
        }
        Request::Uninstall { force } => {
            account.uninstall(force, &mut steps).await.ok();
            None
        }
    };
    let answer = Answer {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        steps: steps.0,
        installed,
    };
    std::io::stdout().write_all(answer.line().as_bytes())?;
    Ok(())
}
