//! Level 2: the run modes. systemd, cron and Slurm are scripts that record what they are asked.

use std::{fs, path::PathBuf};

use anyhow::ensure;
use knoc_tests::site::binary;

use super::install::Far;

/// systemd, cron and Slurm; returns the files of crontab and scrontab.
fn site_programs(far: &Far) -> anyhow::Result<(PathBuf, PathBuf)> {
    let cron = far.crontab("crontab")?;
    let scron = far.crontab("scrontab")?;
    far.tool("systemctl", "exit 0")?;
    far.tool("loginctl", "case $1 in show-user) echo no ;; esac")?;
    far.tool("sinfo", "echo 'service infinite'")?;
    far.tool("sbatch", "echo 77")?;
    far.tool("squeue", "echo 77")?;
    far.tool("scancel", "")?;
    Ok((cron, scron))
}

/// `init` lists the run modes that the site has the programs for.
async fn init_lists_what_the_site_offers(far: &Far) -> anyhow::Result<()> {
    let listed = far
        .there(binary("knoc-agent")?)
        .args([
            "init",
            "--site",
            "hpc",
            "--scheduler",
            "local",
            "--runtime",
            "process",
            "--no-port",
        ])
        .ok()
        .await?
        .text();
    for part in [
        "systemd    yes",
        "linger is off",
        "scrontab   yes",
        "service (infinite)",
        "run-mode systemd",
    ] {
        ensure!(listed.contains(part), "{part}: {listed}");
    }
    Ok(())
}

/// Sets up a run mode, or lists them all; returns what it printed.
async fn set_up(far: &Far, words: &[&str]) -> anyhow::Result<String> {
    let agent = far.there(binary("knoc-agent")?);
    let output = agent.arg("run-mode").args(words).ok().await?;
    Ok(output.text())
}

/// Where there is systemd, `auto` chooses it; returns the file of the unit.
async fn systemd_is_set_up_by_itself(far: &Far) -> anyhow::Result<PathBuf> {
    let agent = binary("knoc-agent")?;
    let said = set_up(far, &["auto"]).await?;
    let unit = far.home().join(".config/systemd/user/knoc-agent.service");
    let text = fs::read_to_string(&unit)?;
    ensure!(
        text.contains(&format!("ExecStart={} serve\n", agent.display())),
        "{text}"
    );
    ensure!(said.contains("linger is switched on"), "{said}");
    let asked = far.asked("systemctl");
    ensure!(
        asked.contains("--user enable --now knoc-agent.service"),
        "{asked}"
    );
    Ok(unit)
}

#[tokio::test]
async fn a_run_mode_is_set_up_in_the_words_of_the_site_and_replaces_the_one_before()
-> anyhow::Result<()> {
    let far = Far::new()?;
    let (cron, scron) = site_programs(&far)?;
    init_lists_what_the_site_offers(&far).await?;
    let unit = systemd_is_set_up_by_itself(&far).await?;

    set_up(&far, &["scrontab", "--partition", "service"]).await?;
    let asked = far.asked("systemctl");
    ensure!(
        asked.contains("--user disable --now") && !unit.exists(),
        "{asked}"
    );
    let table = fs::read_to_string(&scron)?;
    ensure!(table.contains("#SCRON --partition=service\n"), "{table}");

    set_up(&far, &["job", "--partition", "service"]).await?;
    ensure!(
        !fs::read_to_string(&scron)?.contains("knoc-agent"),
        "both start the agent"
    );
    let script = far.state().join("agent-job.sh");
    let text = fs::read_to_string(&script)?;
    ensure!(text.contains("#SBATCH --partition=service\n"), "{text}");
    ensure!(
        far.asked("sbatch").contains("--parsable"),
        "{}",
        far.asked("sbatch")
    );
    far.there("/bin/sh").arg("-n").arg(&script).ok().await?;

    let listed = set_up(&far, &[]).await?;
    ensure!(listed.contains("job        yes  set up;"), "{listed}");
    set_up(&far, &["on-demand"]).await?;
    ensure!(!script.exists(), "jobs go on");
    ensure!(
        far.asked("scancel").contains("--name=knoc-agent-service"),
        "{}",
        far.asked("scancel")
    );
    ensure!(!cron.exists(), "the crontab was written");
    let wrong = far
        .there(binary("knoc-agent")?)
        .args(["run-mode", "cron", "--partition", "x"])
        .output()
        .await?;
    ensure!(
        wrong.code == 1 && wrong.stderr.contains("--partition is for"),
        "{wrong}"
    );
    Ok(())
}

/// What a run mode has set up is taken away whatever state it is in, and what cannot be found out is said.
#[tokio::test]
async fn what_may_start_the_agent_is_taken_away_or_named() -> anyhow::Result<()> {
    let far = Far::new()?;
    site_programs(&far)?;
    init_lists_what_the_site_offers(&far).await?;
    let unit = systemd_is_set_up_by_itself(&far).await?;
    // The user has disabled the unit, which runs nevertheless.
    far.tool(
        "systemctl",
        "case \"$*\" in *is-enabled*) exit 1 ;; *ActiveState*) echo activating ;; esac",
    )?;
    set_up(&far, &["on-demand"]).await?;
    let asked = far.asked("systemctl");
    ensure!(
        asked.contains("--user disable --now") && !unit.exists(),
        "{asked}"
    );
    // The file is gone, and the unit runs nevertheless.
    let said = set_up(&far, &["on-demand"]).await?;
    let asked = far.asked("systemctl");
    ensure!(asked.contains("--user stop knoc-agent.service"), "{asked}");
    ensure!(!said.contains("could not be read"), "{said}");

    // It is not known what the crontab has.
    far.tool("crontab", "echo 'crontab: the spool is away' >&2; exit 1")?;
    let said = set_up(&far, &["on-demand"]).await?;
    ensure!(
        said.contains("the crontab could not be read (crontab: the spool is away)"),
        "{said}"
    );
    // On most clusters Slurm runs no scrontab.
    far.tool(
        "scrontab",
        "echo 'scrontab: fatal: scrontab is disabled on this cluster' >&2; exit 1",
    )?;
    let said = set_up(&far, &["on-demand"]).await?;
    ensure!(!said.contains("scrontab"), "{said}");

    // Slurm is away while a job of the agent may wait.
    far.tool("squeue", "echo 'squeue: error: no controller' >&2; exit 1")?;
    fs::create_dir_all(far.state())?;
    far.site
        .put("login/.local/state/knoc/agent-job.sh", "#!/bin/sh\n")?;
    let agent = far.there(binary("knoc-agent")?);
    let failed = agent.args(["run-mode", "on-demand"]).output().await?;
    ensure!(
        failed.code == 1 && failed.stderr.contains("no controller"),
        "{failed}"
    );
    Ok(())
}

/// A unit that the package has installed and nobody has enabled is no run mode.
#[tokio::test]
async fn a_unit_that_nobody_uses_is_left_alone() -> anyhow::Result<()> {
    let far = Far::new()?;
    site_programs(&far)?;
    init_lists_what_the_site_offers(&far).await?;
    let unit = systemd_is_set_up_by_itself(&far).await?;
    // The user has no systemd on this host.
    far.tool("systemctl", "echo 'Failed to connect to bus' >&2; exit 1")?;
    set_up(&far, &["on-demand"]).await?;
    ensure!(unit.exists(), "the unit of the package is gone");
    // It is enabled, so another host with the same home may run it.
    let wanted = far.home().join(".config/systemd/user/default.target.wants");
    fs::create_dir_all(&wanted)?;
    std::os::unix::fs::symlink("../knoc-agent.service", wanted.join("knoc-agent.service"))?;
    let agent = far.there(binary("knoc-agent")?);
    let failed = agent.args(["run-mode", "on-demand"]).output().await?;
    let path = unit.display().to_string();
    ensure!(
        failed.code == 1
            && failed.stderr.contains("Failed to connect to bus")
            && failed.stderr.contains(&path),
        "{failed}"
    );
    Ok(())
}
