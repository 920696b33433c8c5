//! Which run modes the site allows.

use std::time::Duration;

use knoc_proto::manage::RunMode;

use super::{Login, user_name};
use crate::command::{CommandError, CommandErrorKind};

/// How long a program of the site may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The most partitions that are named.
const NAMED: usize = 8;

/// What was found out about one run mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Possible {
    /// The run mode.
    pub mode: RunMode,
    /// Whether the site allows it, as far as can be seen.
    pub allowed: bool,
    /// What was seen.
    pub why: String,
}

/// PURE: the mode to use if nobody asks for another: one that survives a logout, and on this host.
#[must_use]
pub fn choose(found: &[Possible]) -> RunMode {
    let allowed = |mode: &RunMode| found.iter().any(|it| it.mode == *mode && it.allowed);
    let order = [RunMode::Systemd, RunMode::Cron];
    order.into_iter().find(allowed).unwrap_or(RunMode::OnDemand)
}

/// Asks the site's programs. Nothing is changed.
pub async fn detect(login: &Login) -> Vec<Possible> {
    let (systemd, cron, scrontab, job) =
        tokio::join!(systemd(login), cron(login), scrontab(login), job(login));
    let found = |mode, (allowed, why)| Possible { mode, allowed, why };
    let on_demand = "each link over SSH starts the agent; a link over TCP does not".to_owned();
    vec![
        found(RunMode::Systemd, systemd),
        found(RunMode::Cron, cron),
        found(RunMode::Scrontab, scrontab),
        found(RunMode::Job, job),
        found(RunMode::OnDemand, (true, on_demand)),
    ]
}

/// The end of what a program said.
pub(super) fn said(error: &CommandError) -> String {
    if matches!(error.kind, CommandErrorKind::NotFound) {
        return format!("there is no {}", error.program.display());
    }
    let message = error.message().and_then(|text| text.lines().last());
    let message = message.map(str::trim).filter(|text| !text.is_empty());
    message.map_or_else(|| error.to_string(), str::to_owned)
}

async fn systemd(login: &Login) -> (bool, String) {
    let ask = login
        .command("systemctl")
        .args(["--user", "show-environment"]);
    if let Err(error) = ask.deadline(PATIENCE).run().await {
        return (
            false,
            format!("the user has no systemd here: {}", said(&error)),
        );
    }
    match lingers(login).await {
        Ok(true) => (
            true,
            "the user's systemd runs, also after the logout (linger)".to_owned(),
        ),
        Ok(false) => (
            true,
            "the user's systemd runs; linger is off, and is switched on with it if the site allows that".to_owned(),
        ),
        Err(why) => (false, format!("the user's systemd ends with the login: {why}")),
    }
}

/// Whether the user's systemd goes on after the logout.
pub(super) async fn lingers(login: &Login) -> Result<bool, String> {
    let user = user_name().ok_or_else(|| "the user has no name".to_owned())?;
    let ask = login
        .command("loginctl")
        .args(["show-user", &user, "--property=Linger", "--value"]);
    match ask.deadline(PATIENCE).run().await {
        Ok(output) => Ok(output.text().trim() == "yes"),
        Err(error) => Err(said(&error)),
    }
}

async fn cron(login: &Login) -> (bool, String) {
    if let Err(error) = crontab(login).await {
        return (false, said(&error));
    }
    if cron_runs() {
        (
            true,
            "crontab is allowed, and a cron daemon runs".to_owned(),
        )
    } else {
        (
            false,
            "crontab is allowed, but no cron daemon is seen on this host".to_owned(),
        )
    }
}

/// The user's crontab; empty if there is none.
pub(super) async fn crontab(login: &Login) -> Result<String, CommandError> {
    table(login, "crontab").await
}

/// The user's scrontab; empty if there is none.
pub(super) async fn scrontab_text(login: &Login) -> Result<String, CommandError> {
    table(login, "scrontab").await
}

async fn table(login: &Login, program: &str) -> Result<String, CommandError> {
    let listing = login.command(program).arg("-l").deadline(PATIENCE);
    match listing.run().await {
        Ok(output) => Ok(output.text()),
        Err(error) if has_none(&error) => Ok(String::new()),
        Err(error) => Err(error),
    }
}

/// PURE: whether the program only says that there is no table yet.
fn has_none(error: &CommandError) -> bool {
    let said = error.message().unwrap_or_default();
    said.contains("no crontab for") || said.contains("no scrontab for")
}

/// PURE: whether nothing can be in a table that could not be read: this host has no such program, or Slurm runs no scrontab.
pub(super) fn is_out_of_use(error: &CommandError) -> bool {
    let said = error.message().unwrap_or_default();
    matches!(error.kind, CommandErrorKind::NotFound) || said.contains("scrontab is disabled")
}

/// Whether a process with the name of a cron daemon is seen.
fn cron_runs() -> bool {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return false;
    };
    processes.filter_map(Result::ok).any(|process| {
        let name = std::fs::read_to_string(process.path().join("comm"));
        name.is_ok_and(|name| matches!(name.trim(), "cron" | "crond" | "fcron" | "busybox-crond"))
    })
}

async fn scrontab(login: &Login) -> (bool, String) {
    match scrontab_text(login).await {
        Ok(_) => (
            true,
            "scrontab is allowed; name a partition for it".to_owned(),
        ),
        Err(error) => (false, said(&error)),
    }
}

async fn job(login: &Login) -> (bool, String) {
    if login.find("sbatch").is_none() {
        return (false, "there is no sbatch".to_owned());
    }
    let ask = login
        .command("sinfo")
        .args(["--noheader", "--format=%R %l"])
        .deadline(PATIENCE);
    match ask.run().await {
        Ok(output) => (true, partitions(&output.text())),
        Err(error) => (false, said(&error)),
    }
}

/// PURE: the partitions with their time limits, from sinfo.
fn partitions(sinfo: &str) -> String {
    let mut names: Vec<String> = sinfo
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, limit)| format!("{name} ({})", limit.trim()))
        .collect();
    names.sort_unstable();
    names.dedup();
    let further = names.len().saturating_sub(NAMED);
    names.truncate(NAMED);
    let more = if further > 0 { ", …" } else { "" };
    format!(
        "name a partition that the site has for services; the partitions and their time limits are {}{more}",
        names.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(allowed: &[RunMode]) -> Vec<Possible> {
        let possible = |mode| Possible {
            mode,
            allowed: allowed.contains(&mode),
            why: String::new(),
        };
        RunMode::ALL.into_iter().map(possible).collect()
    }

    #[test]
    fn a_mode_that_survives_the_logout_is_chosen_and_jobs_only_on_request() {
        use RunMode::{Cron, Job, OnDemand, Scrontab, Systemd};
        assert_eq!(choose(&found(&RunMode::ALL)), Systemd);
        assert_eq!(choose(&found(&[Cron, Scrontab, OnDemand])), Cron);
        assert_eq!(choose(&found(&[Scrontab, Job, OnDemand])), OnDemand);
        assert_eq!(choose(&[]), OnDemand);
    }

    #[test]
    fn partitions_are_named_with_their_limits() {
        let text = partitions("long infinite\nshort 1:00:00\nlong infinite\n");
        assert!(text.ends_with("long (infinite), short (1:00:00)"), "{text}");
        let many: Vec<_> = (0..20).map(|n| format!("p{n:02} 1:00\n")).collect();
        assert!(partitions(&many.concat()).ends_with("p07 (1:00), …"));
    }

    #[tokio::test]
    async fn without_any_program_only_on_demand_is_left_and_each_reason_is_named() {
        let found = detect(&Login::default()).await;
        let allowed: Vec<_> = found.iter().filter(|it| it.allowed).collect();
        assert_eq!(allowed.len(), 1, "{found:?}");
        assert_eq!(choose(&found), RunMode::OnDemand);
        for it in found.iter().filter(|it| !it.allowed) {
            assert!(it.why.contains("there is no"), "{it:?}");
        }
    }
}
