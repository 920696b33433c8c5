//! `knoc-agent run-mode`, and what `init` says about run modes.

use std::path::{Path, PathBuf};

use knoc_proto::manage::RunMode;

use super::{
    Agent, Login, Possible, RunModeError, check, choose, detect, is_set_up, set_up, tear_down,
};
use crate::config::{Config, ConfigError, Home};

/// The options of `run-mode`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Keeps the agent running in this way: systemd, cron, scrontab, job, on-demand, or auto to choose one [default: lists what
    /// the site allows]
    #[arg(value_name = "MODE", value_parser = wanted)]
    mode: Option<Wanted>,
    /// With scrontab or job: the partition in which the agent runs
    #[arg(long, value_name = "NAME", requires = "mode")]
    partition: Option<String>,
    /// The site file [default: ~/.config/knoc/agent.toml]
    #[arg(long, env = "KNOC_AGENT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

/// The run mode that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// The best that the site allows.
    Auto,
    /// This one.
    Mode(RunMode),
}

/// PURE: reads a run mode of the command line.
pub(crate) fn wanted(text: &str) -> Result<Wanted, String> {
    if text == "auto" {
        return Ok(Wanted::Auto);
    }
    let mode = text.parse().map(Wanted::Mode);
    mode.map_err(|known: String| format!("auto, {known}"))
}

/// Why a run mode was not set up or listed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The site file is needed for the paths.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It cannot be set up.
    #[error("set up the run mode {mode}")]
    Mode {
        /// Which.
        mode: RunMode,
        /// Why.
        #[source]
        source: RunModeError,
    },
    /// Another mode was set up before.
    #[error("take away the run mode {mode}, which was set up before")]
    Before {
        /// Which.
        mode: RunMode,
        /// Why.
        #[source]
        source: RunModeError,
    },
}

/// PURE: the path that stays when the agent is upgraded, if this program is installed there.
fn stable(program: PathBuf, link: PathBuf) -> PathBuf {
    let same = link.canonicalize().is_ok_and(|target| {
        program
            .canonicalize()
            .is_ok_and(|program| program == target)
    });
    if same { link } else { program }
}

/// The agent of this site file, run by this program.
#[must_use]
pub fn agent(config: &Config, site_file: &Path, home: &Home) -> Agent {
    let link = home.home.join(".local/bin/knoc-agent");
    let program = std::env::current_exe().unwrap_or_else(|_| link.clone());
    let config_home = std::env::var_os("XDG_CONFIG_HOME").filter(|value| !value.is_empty());
    Agent {
        program: stable(program, link),
        site_file: site_file.to_owned(),
        state_dir: config.state_dir.clone(),
        home: home.home.clone(),
        config_home: config_home.map_or_else(|| home.home.join(".config"), PathBuf::from),
    }
}

/// Sets up the mode after taking away the others. Returns the mode and what was done.
pub async fn change(
    wanted: Wanted,
    agent: &Agent,
    partition: Option<&str>,
    login: &Login,
) -> Result<(RunMode, String), CliError> {
    let mode = match wanted {
        Wanted::Mode(mode) => mode,
        Wanted::Auto => choose(&detect(login).await),
    };
    // What runs now is not taken away for a mode that is refused.
    let checked = check(mode, agent, partition);
    checked.map_err(|source| CliError::Mode { mode, source })?;
    let mut notes = Vec::new();
    for other in RunMode::ALL.into_iter().filter(|other| *other != mode) {
        let taken = tear_down(other, agent, login).await;
        let note = taken.map_err(|source| CliError::Before {
            mode: other,
            source,
        })?;
        notes.extend(note);
    }
    let done = set_up(mode, agent, partition, login).await;
    let done = done.map_err(|source| CliError::Mode { mode, source })?;
    notes.insert(0, done);
    Ok((mode, notes.join("; ")))
}

/// `knoc-agent run-mode`.
pub async fn run(options: &Options, home: &Home) -> Result<String, CliError> {
    let usual = || home.home.join(".config/knoc/agent.toml");
    let site_file = options.config.clone().unwrap_or_else(usual);
    let config = Config::load(&site_file, home)?;
    let agent = agent(&config, &site_file, home);
    let login = Login::own();
    let Some(wanted) = options.mode else {
        return Ok(list(&detect(&login).await, &agent, &login).await);
    };
    let (mode, done) = change(wanted, &agent, options.partition.as_deref(), &login).await?;
    Ok(format!("{mode}: {done}\n"))
}

/// What `init` says and does about run modes, after it has written its files.
pub async fn after_init(
    site_file: &Path,
    wanted: Option<Wanted>,
    partition: Option<&str>,
    home: &Home,
) -> Result<String, CliError> {
    let config = Config::load(site_file, home)?;
    let agent = agent(&config, site_file, home);
    let login = Login::own();
    let listed = list(&detect(&login).await, &agent, &login).await;
    let Some(wanted) = wanted else {
        return Ok(format!("\n{listed}"));
    };
    let (mode, done) = change(wanted, &agent, partition, &login).await?;
    Ok(format!("\n{listed}\n{mode}: {done}\n"))
}

async fn list(found: &[Possible], agent: &Agent, login: &Login) -> String {
    let best = choose(found);
    let mut lines = vec!["How this site lets the agent be kept running:\n".to_owned()];
    for it in found {
        let allowed = if it.allowed { "yes" } else { "no" };
        let set_up = if is_set_up(it.mode, agent, login).await {
            "set up; "
        } else {
            ""
        };
        lines.push(format!(
            "  {:<10} {allowed:<4} {set_up}{}\n",
            it.mode.as_str(),
            it.why
        ));
    }
    lines.push(format!("To set one up: knoc-agent run-mode {best}\n"));
    lines.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_mode_is_auto_or_one_of_the_five() {
        assert_eq!(wanted("auto"), Ok(Wanted::Auto));
        assert_eq!(wanted("job"), Ok(Wanted::Mode(RunMode::Job)));
        assert!(wanted("nohup").unwrap_err().contains("on-demand"));
    }

    #[test]
    fn the_path_that_stays_is_used_only_if_it_leads_to_this_program() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("1.0");
        let link = folder.path().join("link");
        std::fs::File::create(&program).unwrap();
        assert_eq!(stable(program.clone(), link.clone()), program);
        std::os::unix::fs::symlink(&program, &link).unwrap();
        assert_eq!(stable(program, link.clone()), link);
    }
}
