//! One batched question for all jobs: squeue, then sacct for those that left the queue or have ended.

use std::collections::{HashMap, HashSet};

use knoc_proto::ids::JobId;

use super::{Slurm, parse, script};
use crate::command::CommandError;
use crate::scheduler::{Accounting, JobPhase, JobRef, JobView, Round, SchedulerError};

/// Job ids of one sacct: keeps argv far below its limit.
const SACCT_BATCH: usize = 2000;
/// Without accounting every ended job costs a question; the rest has its turn in the next round.
const SCONTROL_BATCH: usize = 32;

/// Is there no accounting at this site?
pub(super) fn accounting_disabled(err: &CommandError) -> bool {
    let words = err.words().unwrap_or_default().to_lowercase();
    words.contains("accounting storage is disabled")
}

pub(super) async fn round(slurm: &Slurm, known: &[JobRef]) -> Result<Round, SchedulerError> {
    let text = slurm.answer("squeue", slurm.squeue()).await?;
    let mut jobs = parse::squeue(&text);
    let asked = to_ask(&jobs, known);
    let mut accounting = Accounting::NotAsked;
    let mut rows = Vec::new();
    for batch in asked.chunks(SACCT_BATCH) {
        let ids: Vec<&str> = batch.iter().map(|job| job.id.as_str()).collect();
        match slurm
            .answer("sacct", slurm.sacct().arg("-j").arg(ids.join(",")))
            .await
        {
            Ok(text) => {
                accounting = Accounting::Answered;
                rows.extend(parse::sacct(&text));
            }
            Err(err) => {
                accounting = unanswered(&err);
                break;
            }
        }
    }
    merge(&mut jobs, rows, &asked);
    if matches!(accounting, Accounting::Disabled | Accounting::Away(_)) {
        exits_from_controller(slurm, &mut jobs, &asked).await;
    }
    let certain = matches!(accounting, Accounting::Answered | Accounting::Disabled);
    let missing = if certain {
        missing(&jobs, &asked)
    } else {
        Vec::new()
    };
    Ok(Round {
        jobs,
        missing,
        accounting,
    })
}

fn unanswered(err: &SchedulerError) -> Accounting {
    match err {
        SchedulerError::Command(err) if accounting_disabled(err) => Accounting::Disabled,
        SchedulerError::Command(_)
        | SchedulerError::Answer { .. }
        | SchedulerError::State(_)
        | SchedulerError::Stopping => Accounting::Away(knoc_proto::error::chain(err)),
    }
}

/// Known jobs that squeue does not show, or shows as ended.
fn to_ask(jobs: &[JobView], known: &[JobRef]) -> Vec<JobRef> {
    let alive: HashSet<JobRef> = jobs
        .iter()
        .filter(|job| job.state.phase() != JobPhase::Ended)
        .map(JobView::job)
        .collect();
    known
        .iter()
        .filter(|job| !alive.contains(job))
        .cloned()
        .collect()
}

/// Rows of the accounting take the place of squeue's ended jobs, since they know the exit. A row that
/// is not of an ended job says nothing: the accounting is late, or the controller lost the job and
/// the row will stay so for ever.
fn merge(jobs: &mut Vec<JobView>, rows: Vec<JobView>, asked: &[JobRef]) {
    let asked: HashSet<&JobRef> = asked.iter().collect();
    let mut newest: HashMap<JobId, JobView> = HashMap::new();
    for row in rows {
        // A requeued job has a row for every life: the last one counts, also where it runs.
        if asked.contains(&row.job()) {
            let before = newest.get(&row.id).map(|life| life.restarts + 1);
            let row = JobView {
                restarts: before.unwrap_or(0),
                ..row
            };
            newest.insert(row.id.clone(), row);
        }
    }
    for row in newest
        .into_values()
        .filter(|row| row.state.phase() == JobPhase::Ended)
    {
        match jobs
            .iter_mut()
            .find(|job| job.id == row.id && job.uid == row.uid)
        {
            Some(job) => {
                let reason = Some(row.reason.clone()).filter(|reason| !reason.is_empty());
                let reason = reason.unwrap_or_else(|| job.reason.clone());
                let (cluster_id, attempt) = (job.cluster_id.clone(), job.attempt);
                *job = JobView {
                    cluster_id,
                    attempt,
                    reason,
                    ..row
                };
            }
            None => jobs.push(row),
        }
    }
}

/// The controller remembers an ended job for `MinJobAge`: its exit code is there too, one job a question.
async fn exits_from_controller(slurm: &Slurm, jobs: &mut [JobView], asked: &[JobRef]) {
    let asked: HashSet<&JobRef> = asked.iter().collect();
    let ended = jobs.iter_mut().filter(|job| {
        job.exit.is_none() && job.state.phase() == JobPhase::Ended && asked.contains(&job.job())
    });
    for job in ended.take(SCONTROL_BATCH) {
        let command = slurm.question(&slurm.settings.scontrol);
        let command = command.args(["show", "job", "-o", job.id.as_str()]);
        let Ok(text) = slurm.answer("scontrol", command).await else {
            return;
        };
        let name = script::job_name(&job.uid);
        if let Some((state, exit, restarts)) = parse::scontrol_job(&text, &name)
            && state.phase() == JobPhase::Ended
        {
            job.exit = exit;
            job.restarts = restarts;
        }
    }
}

fn missing(jobs: &[JobView], asked: &[JobRef]) -> Vec<JobRef> {
    let there: HashSet<JobRef> = jobs.iter().map(JobView::job).collect();
    asked
        .iter()
        .filter(|job| !there.contains(job))
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests;
