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

/// A crontab without our lines, and with these at its end.
#[must_use]
pub fn with_lines(table: &str, lines: &[String]) -> String {
    let known: Vec<&str> = table.lines().collect();
    let mut rest = known.as_slice();
    let mut text = String::new();
    while let Some((line, after)) = rest.split_first() {
        let (kept, after) = if *line == CRON_BEGIN {
            without_block(after)
        } else {
            (vec![*line], after)
        };
        text.extend(kept.iter().flat_map(|line| [*line, "\n"]));
        rest = after;
    }
    if !lines.is_empty() {
        let lines = lines.join("\n");
        text.extend([CRON_BEGIN, "\n", &lines, "\n", CRON_END, "\n"]);
    }
    text
}

/// Takes our block away, whose first line has been read: what somebody has added to it, and the lines after it.
///
/// Somebody may have removed the line after our block, or any line of it. What follows is then theirs, even if it looks like
/// ours: options (`#SCRON`) before an entry of their own.
fn without_block<'a, 'b>(lines: &'b [&'a str]) -> (Vec<&'a str>, &'b [&'a str]) {
    let begin = lines.iter().position(|line| *line == CRON_BEGIN);
    let end = lines.iter().position(|line| *line == CRON_END);
    let end = end.filter(|end| begin.is_none_or(|begin| *end < begin));
    let (block, after) = if let Some(end) = end {
        (lines.get(..end), lines.get(end + 1..))
    } else {
        let of_block = |line: &&&str| is_option(line) || starts_agent(line);
        let count = lines.iter().take_while(of_block).count();
        (lines.get(..count), lines.get(count..))
    };
    let (block, after) = (block.unwrap_or_default(), after.unwrap_or_default());
    let Some(entry) = block.iter().position(|line| starts_agent(line)) else {
        let ours = block.iter().take_while(|line| is_own_option(line)).count();
        return (block.iter().skip(ours).copied().collect(), after);
    };
    let (before, theirs) = block.split_at(entry);
    let before = before.iter().filter(|line| !is_option(line));
    (
        before.chain(theirs.iter().skip(1)).copied().collect(),
        after,
    )
}

/// Whether the line starts the agent.
fn starts_agent(line: &str) -> bool {
    !line.starts_with('#') && line.contains("knoc-agent serve")
}

/// Whether the line is an option of the entry that follows it.
fn is_option(line: &str) -> bool {
    line.starts_with("#SCRON ")
}

/// Whether the line is an option that we write.
fn is_own_option(line: &str) -> bool {
    line.strip_prefix("#SCRON --").is_some_and(|option| {
        option == format!("job-name={JOB}")
            || option == "open-mode=append"
            || option.starts_with("partition=")
            || (option.starts_with("output=") && option.ends_with("/agent.log"))
    })
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
        let commented = once.replace("*/5", "# every five minutes\n*/5");
        assert_eq!(
            with_lines(&commented, &[]),
            format!("{other}\n# every five minutes\n")
        );
    }

    #[test]
    fn options_of_another_entry_are_kept_whatever_was_removed_of_our_lines() {
        let lines = scrontab(&agent(), Some("service")).unwrap();
        let entry = lines.last().unwrap().as_str();
        let mine = "#SCRON --partition=long\n#SCRON --mem=1G\n0 4 * * * mine\n";
        let table = with_lines("", &lines) + mine;
        assert_eq!(with_lines(&table, &[]), mine);
        let without_end = table.replace(&format!("{CRON_END}\n"), "");
        assert_eq!(with_lines(&without_end, &[]), mine);
        let again = with_lines(&without_end, &lines);
        assert_eq!(again, format!("{mine}{}", with_lines("", &lines)));
        // Without the entry too: an option that we do not write is somebody else's.
        let memory = "#SCRON --mem=1G\n0 4 * * * mine\n";
        let cut = with_lines("", &lines) + memory;
        let cut = cut.replace(&format!("{entry}\n{CRON_END}\n"), "");
        assert_eq!(with_lines(&cut, &[]), memory);
        let no_entry = table.replace(&format!("{entry}\n"), "");
        assert_eq!(with_lines(&no_entry, &[]), mine);
        // Another agent of the user, which is not in our lines.
        let own = "# mine\n* * * * * /opt/knoc-agent serve --config x\n";
        assert_eq!(
            with_lines(&(without_end.clone() + own), &[]),
            format!("{mine}{own}")
        );
        // Our lines twice.
        assert_eq!(
            with_lines(&(without_end + &table), &[]),
            format!("{mine}{mine}")
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
