//! The floors of T1 and T2: Slurm and Apptainer without KNoC, on the login node, as the same user.

use std::time::Duration;

use anyhow::Context as _;

use super::bed::{Bed, EXEC, FOLDER, began};
use super::stats::bash_time;
use crate::wait_for;

/// The time limit for one job.
const SOON: Duration = Duration::from_mins(2);

/// The times at which `sbatch` was started and had exited.
#[derive(Debug, Clone, Copy)]
pub(super) struct Submission {
    pub(super) began: i64,
    pub(super) ended: i64,
}

/// One job without KNoC: `sbatch` and, in the job, `apptainer exec`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job {
    pub(super) submission: Submission,
    /// The beginning of the job, determined as for a pod's job.
    pub(super) began: i64,
    /// The time in the first line that the program prints.
    pub(super) program: i64,
}

/// Runs `sbatch` `count` times in a row, for jobs of that partition or of the default one.
pub(super) async fn sbatch_row(
    bed: &Bed,
    count: usize,
    partition: Option<&str>,
) -> anyhow::Result<Vec<Submission>> {
    let partition = partition.map_or_else(String::new, |name| format!("-p {name} "));
    let text = format!(
        "for i in $(seq {count}); do b=$EPOCHREALTIME; \
         sbatch --parsable -J knoc-floor {partition}-c 1 --mem 64 -t 1 -o /dev/null --wrap true >/dev/null || exit 1; \
         echo $b $EPOCHREALTIME; done"
    );
    let output = bed.shell("login", &text).ok().await?;
    output.text().lines().map(submission).collect()
}

/// The root file system of a container without KNoC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Root {
    /// Writable as in a pod: what the container writes goes to a folder on the node.
    Writable,
    /// Read-only, which is Apptainer's default.
    ReadOnly,
}

/// Submits `count` jobs at once, each of which starts a container.
pub(super) async fn jobs(bed: &Bed, count: usize, root: Root) -> anyhow::Result<Vec<Job>> {
    let image = Bed::image_path();
    let overlay = match root {
        Root::Writable => " --overlay $over",
        Root::ReadOnly => "",
    };
    let script = format!(
        "#!/bin/bash\nover=$(mktemp -d)\n{EXEC}{overlay} {image} /knoc-stamp 0\nrm -rf $over\n"
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
        let program = wait_for(&format!("job {id} by hand"), SOON, async || {
            let text = std::fs::read_to_string(&path).map_err(|error| error.to_string())?;
            let start = text.lines().find_map(|line| line.strip_prefix("start "));
            start.and_then(|time| time.parse().ok()).ok_or(text)
        })
        .await?;
        jobs.push(Job {
            submission: submission(line)?,
            began: began(&path)?,
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
