//! Writes the unit, the lines or the batch script of a run mode, and takes them away.

use std::{path::PathBuf, time::Duration};

use knoc_contract::jobdir::atomic::{self, FileError};
use knoc_proto::manage::RunMode;

use super::{
    Agent, Login, RunModeError,
    detect::{crontab, is_out_of_use, lingers, said, scrontab_text},
    text, user_name,
};
use crate::command::CommandError;

/// How long systemd or Slurm may take.
const PATIENCE: Duration = Duration::from_mins(1);
/// The mode of the batch script.
const SCRIPT: u32 = 0o700;

/// Whether this mode is set up for this user.
pub async fn is_set_up(mode: RunMode, agent: &Agent, login: &Login) -> bool {
    match mode {
        RunMode::Systemd => {
            let ask = ["--user", "--quiet", "is-enabled", text::UNIT];
            let ask = login.command("systemctl").args(ask);
            unit_file(agent).exists() && ask.deadline(PATIENCE).run().await.is_ok()
        }
        RunMode::Cron => crontab(login)
            .await
            .is_ok_and(|table| text::has_lines(&table)),
        RunMode::Scrontab => scrontab_text(login)
            .await
            .is_ok_and(|table| text::has_lines(&table)),
        RunMode::Job => text::script(agent).is_ok_and(|path| PathBuf::from(path).exists()),
        RunMode::OnDemand => false,
    }
}

fn unit_file(agent: &Agent) -> PathBuf {
    agent.config_home.join("systemd/user").join(text::UNIT)
}

/// PURE: whether the mode can be set up as far as its texts go.
pub fn check(mode: RunMode, agent: &Agent, partition: Option<&str>) -> Result<(), RunModeError> {
    if partition.is_some() && !mode.is_in_job() {
        return Err(RunModeError::NeedlessPartition { mode });
    }
    match mode {
        RunMode::Systemd => text::unit(agent).map(drop),
        RunMode::Cron => text::cron(agent).map(drop),
        RunMode::Scrontab => text::scrontab(agent, partition).map(drop),
        RunMode::Job => text::job(agent, partition, "sbatch").map(drop),
        RunMode::OnDemand => Ok(()),
    }
}

/// Sets up the mode and starts the agent with it, unless it starts by itself later. Returns what was done.
pub async fn set_up(
    mode: RunMode,
    agent: &Agent,
    partition: Option<&str>,
    login: &Login,
) -> Result<String, RunModeError> {
    check(mode, agent, partition)?;
    match mode {
        RunMode::Systemd => systemd(agent, login).await,
        RunMode::Cron => {
            let lines = text::cron(agent)?;
            put_table("crontab", &lines, login).await?;
            start_detached(agent, login).await?;
            Ok(format!("the crontab has the line {}", lines.join(" / ")))
        }
        RunMode::Scrontab => {
            let lines = text::scrontab(agent, partition)?;
            create_state(agent)?;
            put_table("scrontab", &lines, login).await?;
            Ok(format!(
                "the scrontab has the lines {}; Slurm starts the agent within minutes",
                lines.join(" / ")
            ))
        }
        RunMode::Job => job(agent, partition, login).await,
        RunMode::OnDemand => Ok(
            "nothing is set up: each link over SSH starts the agent; for links over TCP start it by `knoc-agent serve --detach`"
                .to_owned(),
        ),
    }
}

fn create_state(agent: &Agent) -> Result<(), FileError> {
    atomic::create_dir(&agent.state_dir)
}

/// Writes the unit. `false` if the user has changed it, so that it is kept.
pub fn write_unit(agent: &Agent) -> Result<bool, RunModeError> {
    let unit = text::unit(agent)?;
    let path = unit_file(agent);
    let known = atomic::read_optional(&path)?;
    if known.is_some_and(|known| known != unit.as_bytes() && !was_ours(agent, &known)) {
        return Ok(false);
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(FileError::on("create", folder))?;
    }
    atomic::write(&path, unit.as_bytes(), 0o644)?;
    Ok(true)
}

async fn systemd(agent: &Agent, login: &Login) -> Result<String, RunModeError> {
    let path = unit_file(agent);
    let theirs = !write_unit(agent)?;
    systemctl(login, &["daemon-reload"]).await?;
    systemctl(login, &["enable", "--now", text::UNIT]).await?;
    let mut done = format!(
        "{} {}",
        path.display(),
        if theirs {
            "is kept as you have changed it, and is enabled"
        } else {
            "is written and enabled"
        }
    );
    if lingers(login).await != Ok(true) {
        let ask = login.command("loginctl").arg("enable-linger");
        match ask.deadline(PATIENCE).run().await {
            Ok(_) => done += "; linger is switched on",
            Err(error) => {
                let refused = format!(
                    "; the site does not switch linger on, so the agent ends with your last login: {}",
                    error.message().unwrap_or_default()
                );
                done += &refused;
            }
        }
    }
    Ok(done)
}

/// Whether an installed version has written this unit.
fn was_ours(agent: &Agent, unit: &[u8]) -> bool {
    let versions = agent.home.join(".local/lib/knoc");
    let Ok(versions) = std::fs::read_dir(versions) else {
        return false;
    };
    versions.filter_map(Result::ok).any(|version| {
        std::fs::read(version.path().join(text::UNIT)).is_ok_and(|known| known == unit)
    })
}

async fn systemctl(login: &Login, args: &[&str]) -> Result<(), RunModeError> {
    let ask = login.command("systemctl").arg("--user").args(args);
    let done = ask.deadline(PATIENCE).run().await;
    done.map(drop)
        .map_err(RunModeError::of("ask the user's systemd"))
}

async fn put_table(
    program: &'static str,
    lines: &[String],
    login: &Login,
) -> Result<(), RunModeError> {
    let known = match program {
        "crontab" => crontab(login).await,
        _ => scrontab_text(login).await,
    };
    let doing = "change the crontab";
    let known = known.map_err(RunModeError::of(doing))?;
    let wanted = text::with_lines(&known, lines);
    if wanted == known {
        return Ok(());
    }
    let put = login.command(program).arg("-").stdin(wanted.into_bytes());
    let put: Result<_, CommandError> = put.deadline(PATIENCE).run().await;
    put.map(drop).map_err(RunModeError::of(doing))
}

/// Starts the agent in the background, unless it runs.
pub async fn start_detached(agent: &Agent, login: &Login) -> Result<(), RunModeError> {
    let start = login
        .command(&agent.program.to_string_lossy())
        .args(["serve", "--detach", "--config"])
        .arg(&agent.site_file);
    let done = start.deadline(PATIENCE).run().await;
    done.map(drop).map_err(RunModeError::of("start the agent"))
}

async fn job(
    agent: &Agent,
    partition: Option<&str>,
    login: &Login,
) -> Result<String, RunModeError> {
    let sbatch = login.find("sbatch").unwrap_or_else(|| "sbatch".into());
    let script = text::job(agent, partition, &sbatch.to_string_lossy())?;
    let path = PathBuf::from(text::script(agent)?);
    create_state(agent)?;
    if atomic::read_optional(&path)?.as_deref() == Some(script.as_bytes()) && has_job(login).await?
    {
        return Ok("the job of the agent is there already".to_owned());
    }
    cancel(agent, login).await?;
    atomic::write(&path, script.as_bytes(), SCRIPT)?;
    let submit = login.command("sbatch").arg("--parsable").arg(&path);
    let done = submit.deadline(PATIENCE).run().await;
    let done = done.map_err(RunModeError::of("submit the job of the agent"))?;
    Ok(format!(
        "job {} runs {}; each submits its successor",
        done.text().trim(),
        path.display()
    ))
}

async fn has_job(login: &Login) -> Result<bool, RunModeError> {
    let name = format!("--name={}", text::JOB);
    let ask = login.command("squeue").args(["--me", "--noheader", &name]);
    let found = ask.deadline(PATIENCE).run().await;
    let found = found.map_err(RunModeError::of("look for the job of the agent"))?;
    Ok(!found.text().trim().is_empty())
}

/// Removes the batch script, so that no successor is submitted any more, and cancels the jobs. If that fails, the script is put
/// back: without it, nobody looks for the jobs again.
async fn cancel(agent: &Agent, login: &Login) -> Result<(), RunModeError> {
    let path = PathBuf::from(text::script(agent)?);
    let script = atomic::read_optional(&path)?;
    if script.is_some() {
        std::fs::remove_file(&path).map_err(FileError::on("remove", &path))?;
    }
    let cancelled = cancel_jobs(login).await;
    if let (Err(_), Some(script)) = (&cancelled, script) {
        atomic::write(&path, &script, SCRIPT)?;
    }
    cancelled
}

async fn cancel_jobs(login: &Login) -> Result<(), RunModeError> {
    if has_job(login).await? {
        scancel(login, &[]).await?;
    }
    Ok(())
}

async fn scancel(login: &Login, further: &[&str]) -> Result<(), RunModeError> {
    let user = user_name().map(|user| format!("--user={user}"));
    let ask = login
        .command("scancel")
        .arg(format!("--name={}", text::JOB))
        .args(user)
        .args(further);
    let done = ask.deadline(PATIENCE).run().await;
    done.map(drop)
        .map_err(RunModeError::of("cancel the job of the agent"))
}

/// Takes the mode away and stops what it has started. Nothing happens if nothing of it is there. Returns what could not be
/// found out, for the user.
pub async fn tear_down(
    mode: RunMode,
    agent: &Agent,
    login: &Login,
) -> Result<Option<String>, RunModeError> {
    match mode {
        RunMode::Systemd => take_unit_away(agent, login).await.map(|()| None),
        RunMode::Cron => match crontab(login).await {
            Ok(table) if text::has_lines(&table) => {
                put_table("crontab", &[], login).await.map(|()| None)
            }
            Ok(_) => Ok(None),
            Err(error) => Ok(unknown("crontab", &error)),
        },
        RunMode::Scrontab => match scrontab_text(login).await {
            Ok(table) if text::has_lines(&table) => {
                // Asked first: without our lines, nobody looks for the job again.
                let runs = has_job(login).await?;
                put_table("scrontab", &[], login).await?;
                if runs {
                    scancel(login, &[]).await?;
                }
                Ok(None)
            }
            Ok(_) => Ok(None),
            Err(error) => Ok(unknown("scrontab", &error)),
        },
        RunMode::Job if PathBuf::from(text::script(agent)?).exists() => {
            cancel(agent, login).await.map(|()| None)
        }
        RunMode::Job | RunMode::OnDemand => Ok(None),
    }
}

/// PURE: what the user has to look at, because a table could not be read.
fn unknown(program: &str, error: &CommandError) -> Option<String> {
    (!is_out_of_use(error)).then(|| {
        format!(
            "the {program} could not be read ({}): if it has lines of knoc-agent, remove them",
            said(error)
        )
    })
}

/// Whether the user's systemd of this host runs the unit, or is about to start it again.
async fn unit_runs(login: &Login) -> bool {
    let ask = ["--user", "show", "--property=ActiveState", "--value"];
    let ask = login.command("systemctl").args(ask).arg(text::UNIT);
    let found = ask.deadline(PATIENCE).run().await;
    // Without a systemd of the user there is no unit that runs.
    let state = found.map(|output| output.text()).unwrap_or_default();
    !matches!(state.trim(), "" | "inactive" | "failed")
}

/// Whether the user's systemd starts the unit, here or on another host with the same home.
async fn unit_is_enabled(agent: &Agent, login: &Login) -> bool {
    let wanted = agent.config_home.join("systemd/user/default.target.wants");
    wanted.join(text::UNIT).symlink_metadata().is_ok()
        || is_set_up(RunMode::Systemd, agent, login).await
}

/// Stops and disables the unit, and removes its file unless the user has changed it. A unit that is disabled may run, and so
/// may one whose file is gone. One that the package has installed and nobody uses is left alone.
async fn take_unit_away(agent: &Agent, login: &Login) -> Result<(), RunModeError> {
    let path = unit_file(agent);
    let runs = unit_runs(login).await;
    if !runs && !unit_is_enabled(agent, login).await {
        return Ok(());
    }
    let Some(known) = atomic::read_optional(&path)? else {
        return systemctl(login, &["stop", text::UNIT]).await;
    };
    let stopped = systemctl(login, &["disable", "--now", text::UNIT]).await;
    stopped.map_err(|source| RunModeError::Unit {
        path: path.clone(),
        source: Box::new(source),
    })?;
    if known == text::unit(agent)?.as_bytes() || was_ours(agent, &known) {
        std::fs::remove_file(&path).map_err(FileError::on("remove", &path))?;
    }
    systemctl(login, &["daemon-reload"]).await
}

/// Restarts the agent in the way of its mode. `Ok(false)` if the mode leaves that to the caller.
pub async fn restart_by_mode(mode: RunMode, login: &Login) -> Result<bool, RunModeError> {
    match mode {
        RunMode::Systemd => {
            systemctl(login, &["daemon-reload"]).await?;
            systemctl(login, &["restart", text::UNIT]).await?;
            Ok(true)
        }
        RunMode::Scrontab | RunMode::Job => {
            // The next job starts the new version. Those that wait are not touched.
            let running = ["--state=RUNNING", "--signal=TERM", "--batch"];
            scancel(login, &running).await?;
            Ok(true)
        }
        RunMode::Cron | RunMode::OnDemand => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_job_is_not_forgotten_if_slurm_does_not_answer() {
        let folder = tempfile::tempdir().unwrap();
        let agent = Agent {
            program: folder.path().join("knoc-agent"),
            site_file: folder.path().join("agent.toml"),
            state_dir: folder.path().to_owned(),
            home: folder.path().to_owned(),
            config_home: folder.path().to_owned(),
        };
        let path = PathBuf::from(text::script(&agent).unwrap());
        atomic::write(&path, b"script", SCRIPT).unwrap();
        // This login has no squeue.
        let login = Login::default();
        for _ in 0..2 {
            let failed = tear_down(RunMode::Job, &agent, &login).await;
            failed.unwrap_err();
            assert_eq!(std::fs::read(&path).unwrap(), b"script");
        }
    }
}
