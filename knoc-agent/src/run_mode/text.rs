//! PURE: the unit, the lines and the batch script that keep an agent running.

use super::{Agent, RunModeError, is_plain, word};

/// The name of the job; nothing else of ours has it.
pub const JOB: &str = "knoc-agent-service";
/// The name of the unit.
pub const UNIT: &str = "knoc-agent.service";
/// The line before ours in a crontab.
const CRON_BEGIN: &str =
    "# knoc-agent: starts the agent if it does not run (`knoc-agent run-mode` wrote these lines)";
/// The line after ours.
const CRON_END: &str = "# knoc-agent: end";
/// The unit of the package.
const UNIT_TEXT: &str = include_str!("../../../packaging/agent/knoc-agent.service");
/// How often cron looks for the agent.
const EVERY: &str = "*/5 * * * *";

/// The unit for systemd.
pub fn unit(agent: &Agent) -> Result<String, RunModeError> {
    let program = word(&agent.program)?;
    let site_file = word(&agent.site_file)?;
    let usual = agent.home.join(".config/knoc/agent.toml");
    let option = if agent.site_file == usual {
        String::new()
    } else {
        format!(" --config {site_file}")
    };
    let start = format!("ExecStart={program} serve{option}");
    Ok(UNIT_TEXT.replace("ExecStart=@PREFIX@/bin/knoc-agent serve", &start))
}

/// The lines of a crontab.
pub fn cron(agent: &Agent) -> Result<Vec<String>, RunModeError> {
    let (program, site_file) = (word(&agent.program)?, word(&agent.site_file)?);
    Ok(vec![format!(
        "{EVERY} {program} serve --detach --config {site_file}"
    )])
}

/// The lines of a scrontab.
pub fn scrontab(agent: &Agent, partition: Option<&str>) -> Result<Vec<String>, RunModeError> {
    let (program, site_file) = (word(&agent.program)?, word(&agent.site_file)?);
    let partition = self::partition(partition)?;
    let log = log(agent)?;
    Ok(vec![
        format!("#SCRON --job-name={JOB}"),
        format!("#SCRON --partition={partition}"),
        "#SCRON --open-mode=append".to_owned(),
        format!("#SCRON --output={log}"),
        format!("{EVERY} {program} serve --config {site_file}"),
    ])
}

/// The batch script of an agent that submits its successor before it starts. `sbatch` is its absolute path.
pub fn job(agent: &Agent, partition: Option<&str>, sbatch: &str) -> Result<String, RunModeError> {
    let (program, site_file) = (word(&agent.program)?, word(&agent.site_file)?);
    let partition = self::partition(partition)?;
    let (script, log) = (script(agent)?, log(agent)?);
    if !is_plain(sbatch) {
        return Err(RunModeError::Word {
            word: sbatch.to_owned(),
        });
    }
    Ok(format!(
        "#!/bin/sh\n\
         # Written by `knoc-agent run-mode`: the agent as a job of the partition {partition}.\n\
         #SBATCH --job-name={JOB}\n\
         #SBATCH --partition={partition}\n\
         #SBATCH --nodes=1\n\
         #SBATCH --ntasks=1\n\
         #SBATCH --no-requeue\n\
         #SBATCH --export=NONE\n\
         #SBATCH --signal=B:TERM@60\n\
         #SBATCH --open-mode=append\n\
         #SBATCH --output={log}\n\
         # The next job of this name starts once this one has ended, whatever ends it, and at most once a minute. It is not\n\
         # submitted any more once this file is gone.\n\
         (until [ ! -e {script} ] || {sbatch} --quiet --dependency=singleton --begin=now+60 {script}; do sleep 60; done) &\n\
         exec {program} serve --config {site_file}\n"
    ))
}

/// The path of the batch script.
pub fn script(agent: &Agent) -> Result<String, RunModeError> {
    word(&agent.state_dir.join("agent-job.sh")).map(str::to_owned)
}

fn log(agent: &Agent) -> Result<String, RunModeError> {
    word(&agent.state_dir.join("agent.log")).map(str::to_owned)
}

fn partition(name: Option<&str>) -> Result<&str, RunModeError> {
    let name = name.ok_or(RunModeError::NoPartition)?;
    let wrong = || RunModeError::Word {
        word: name.to_owned(),
    };
    is_plain(name).then_some(name).ok_or_else(wrong)
}

/// Whether a crontab has our lines.
#[must_use]
pub fn has_lines(table: &str) -> bool {
    table.lines().any(|line| line == CRON_BEGIN)
}

/// A crontab without our lines, and with these in their place.
#[must_use]
pub fn with_lines(table: &str, lines: &[String]) -> String {
    let mut ours = false;
    let mut text = String::new();
    for line in table.lines() {
        ours |= line == CRON_BEGIN;
        // Without an end, as after an edit, nothing but our own lines may be taken away.
        ours &= is_ours(line);
        if !ours {
            text.push_str(line);
            text.push('\n');
        }
        ours &= line != CRON_END;
    }
    if !lines.is_empty() {
        let lines = lines.join("\n");
        text.extend([CRON_BEGIN, "\n", &lines, "\n", CRON_END, "\n"]);
    }
    text
}

fn is_ours(line: &str) -> bool {
    [CRON_BEGIN, CRON_END].contains(&line)
        || line.starts_with("#SCRON ")
        || line.contains("knoc-agent serve")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent() -> Agent {
        Agent {
            program: "/home/ann/.local/bin/knoc-agent".into(),
            site_file: "/home/ann/.config/knoc/agent.toml".into(),
            state_dir: "/home/ann/.local/state/knoc".into(),
            home: "/home/ann".into(),
            config_home: "/home/ann/.config".into(),
        }
    }

    #[test]
    fn a_crontab_keeps_its_other_lines_and_ours_stand_there_once() {
        let lines = cron(&agent()).unwrap();
        let other = "MAILTO=ann\n0 3 * * * backup";
        let once = with_lines(other, &lines);
        assert!(
            once.starts_with("MAILTO=ann\n0 3 * * * backup\n# knoc-agent:"),
            "{once}"
        );
        assert!(once.contains("*/5 * * * * /home/ann/.local/bin/knoc-agent serve --detach"));
        assert_eq!(with_lines(&once, &lines), once);
        assert!(has_lines(&once) && !has_lines(other));
        assert_eq!(with_lines(&once, &[]), format!("{other}\n"));
        // Somebody has removed the end and added a line of their own.
        let edited = once.replace(CRON_END, "5 * * * * mine");
        assert_eq!(
            with_lines(&edited, &[]),
            format!("{other}\n5 * * * * mine\n")
        );
    }

    #[test]
    fn a_job_submits_its_successor_and_then_becomes_the_agent() {
        let text = job(&agent(), Some("service"), "/usr/bin/sbatch").unwrap();
        assert!(text.contains("#SBATCH --partition=service\n"), "{text}");
        assert!(text.contains(
            "--dependency=singleton --begin=now+60 /home/ann/.local/state/knoc/agent-job.sh"
        ));
        assert!(text.ends_with("exec /home/ann/.local/bin/knoc-agent serve --config /home/ann/.config/knoc/agent.toml\n"));
        let lines = scrontab(&agent(), Some("cron")).unwrap().join("\n");
        assert!(lines.contains("#SCRON --partition=cron\n"), "{lines}");
    }

    #[test]
    fn what_a_shell_or_cron_would_read_differently_is_refused() {
        for bad in ["a b", "a%b", "$(id)", "a\nb", "-p", "ä", ""] {
            assert!(
                job(&agent(), Some(bad), "/usr/bin/sbatch").is_err(),
                "{bad:?}"
            );
            assert!(scrontab(&agent(), Some(bad)).is_err(), "{bad:?}");
            let mut agent = agent();
            agent.program = format!("/home/{bad} /knoc-agent").into();
            assert!(cron(&agent).is_err() && unit(&agent).is_err(), "{bad:?}");
        }
        assert!(matches!(
            job(&agent(), None, "/sbatch"),
            Err(RunModeError::NoPartition)
        ));
    }

    #[test]
    fn the_unit_is_that_of_the_package_with_the_path_of_the_program() {
        let text = unit(&agent()).unwrap();
        assert!(
            text.contains("ExecStart=/home/ann/.local/bin/knoc-agent serve\n"),
            "{text}"
        );
        assert!(
            text.contains("KillMode=process") && !text.contains('@'),
            "{text}"
        );
        let mut other = agent();
        other.site_file = "/srv/agent.toml".into();
        let text = unit(&other).unwrap();
        assert!(text.contains("serve --config /srv/agent.toml\n"), "{text}");
    }
}
