//! The floors of T1 and T2: Slurm and Apptainer by hand, on the login node, as the same user.

use std::time::Duration;

use anyhow::Context as _;

use super::bed::{Bed, EXEC, FOLDER};
use super::stats::bash_time;
use crate::wait_for;

/// Of one job.
const SOON: Duration = Duration::from_mins(2);

/// When `sbatch` was called and when it had answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Submission {
    pub(super) began: i64,
    pub(super) ended: i64,
}

/// One job by hand: `sbatch` and, in it, `apptainer exec`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job {
    pub(super) submission: Submission,
    /// The batch script's first line.
    pub(super) script: i64,
    /// The program's first line.
    pub(super) program: i64,
}

/// So many `sbatch` in a row.
pub(super) async fn sbatch_row(bed: &Bed, count: usize) -> anyhow::Result<Vec<Submission>> {
    let text = format!(
        "for i in $(seq {count}); do b=$EPOCHREALTIME; \
         sbatch --parsable -J knoc-floor -c 1 --mem 64 -t 1 -o /dev/null --wrap true >/dev/null || exit 1; \
         echo $b $EPOCHREALTIME; done"
    );
    let output = bed.shell("login", &text).ok().await?;
    output.text().lines().map(submission).collect()
}

/// So many jobs at once that start a container each.
pub(super) async fn jobs(bed: &Bed, count: usize) -> anyhow::Result<Vec<Job>> {
    let script = format!(
        "#!/bin/bash\necho script $EPOCHREALTIME\nexec {EXEC} {} /knoc-stamp 0\n",
        Bed::image_path()
    );
    let text = format!(
        "cd {FOLDER} && printf %s '{script}' > floor.sh && \
         for i in $(seq {count}); do b=$EPOCHREALTIME; \
         j=$(sbatch --parsable -J knoc-floor -c 1 --mem 128 -t 1 -o floor-%j.out floor.sh) || exit 1; \
         echo $b $EPOCHREALTIME $j; done"
    );
    let output = bed.shell("login", &text).ok().await?.text();
    let mut jobs = Vec::new();
    for line in output.lines() {
        let id = line.split(' ').nth(2).context("no job id")?;
        let path = bed.here(FOLDER).join(format!("floor-{id}.out"));
        let (script, program) = wait_for(&format!("job {id} by hand"), SOON, async || {
            let text = std::fs::read_to_string(&path).map_err(|error| error.to_string())?;
            let find = |word: &str| text.lines().find_map(|line| line.strip_prefix(word));
            let program = find("start ").and_then(|time| time.parse().ok());
            find("script ")
                .and_then(bash_time)
                .zip(program)
                .ok_or_else(|| text.clone())
        })
        .await?;
        jobs.push(Job {
            submission: submission(line)?,
            script,
            program,
        });
    }
    Ok(jobs)
}

fn submission(line: &str) -> anyhow::Result<Submission> {
    let mut times = line.split(' ').map(bash_time);
    let mut time = || {
        times
            .next()
            .flatten()
            .with_context(|| format!("no times: {line}"))
    };
    Ok(Submission {
        began: time()?,
        ended: time()?,
    })
}
