//! One batched query for all jobs: squeue, and then sacct for those that have left the queue or
//! ended.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;
use knoc_proto::ids::{JobId, PodUid};

use super::{Slurm, ownership, ownership::Ownership, parse, parse::Row};
use crate::{
    command::CommandError,
    scheduler::{Accounting, JobPhase, JobRef, JobState, JobView, Marks, Round, SchedulerError},
};

/// The number of job IDs in one sacct call, which keeps its arguments far below the limit.
const SACCT_BATCH: usize = 2000;
/// Without accounting, every ended job costs one query; the remaining jobs are queried in the next
/// round.
const SCONTROL_BATCH: usize = 32;

/// Whether the site has no accounting storage.
pub(super) fn accounting_disabled(err: &CommandError) -> bool {
    let message = err.message().unwrap_or_default().to_lowercase();
    message.contains("accounting storage is disabled")
}

pub(super) async fn round(slurm: &Slurm, known: &[JobRef]) -> Result<Round, SchedulerError> {
    let text = slurm
        .answer("squeue", slurm.squeue(parse::SQUEUE_FORMAT))
        .await?;
    let rows = parse::squeue(&text).map_err(|problem| unreadable("squeue", problem))?;
    let Sorted { mut jobs, doubts } = sort(rows, known, slurm.pods());
    let undecided = examine(slurm, &mut jobs, doubts).await;
    let asked = to_ask(&jobs, known, &undecided);
    let mut accounting = Accounting::NotAsked;
    let mut rows = Vec::new();
    for batch in asked.chunks(SACCT_BATCH) {
        let ids: Vec<&str> = batch.iter().map(|job| job.id.as_str()).collect();
        match ask_accounting(slurm, &ids).await {
            Ok(answer) => {
                accounting = Accounting::Answered;
                rows.extend(answer);
            }
            Err(err) => {
                accounting = unanswered(&err);
                break;
            }
        }
    }
    merge(&mut jobs, &rows, &asked, slurm.pods());
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

async fn ask_accounting(slurm: &Slurm, ids: &[&str]) -> Result<Vec<Row>, SchedulerError> {
    let command = slurm.sacct(parse::SACCT_FORMAT);
    let text = slurm
        .answer("sacct", command.arg("-j").arg(ids.join(",")))
        .await?;
    parse::sacct(&text).map_err(|problem| unreadable("sacct", problem))
}

pub(super) fn unreadable(program: &'static str, problem: String) -> SchedulerError {
    SchedulerError::Answer { program, problem }
}

/// The rows of squeue, sorted by whose they are.
#[derive(Debug, Default)]
struct Sorted {
    jobs: Vec<JobView>,
    /// Rows that have the ID of one of our jobs, and in which nothing confirms or excludes that
    /// they are ours.
    doubts: Vec<(Row, JobRef)>,
}

/// Matches jobs that were asked for by their ID, and all others by the pod that they name.
fn sort(rows: Vec<Row>, known: &[JobRef], pods: &std::path::Path) -> Sorted {
    let mut by_id: HashMap<&JobId, Vec<&JobRef>> = HashMap::new();
    for job in known {
        by_id.entry(&job.id).or_default().push(job);
    }
    let mut sorted = Sorted::default();
    for row in rows {
        let wanted = by_id.get(&row.id).map_or(&[][..], Vec::as_slice);
        let judged = |job: &JobRef| ownership::judge(&row, job, pods);
        let ours = wanted.iter().find_map(|job| match judged(job) {
            Ownership::Ours(marks) => Some((job.uid.clone(), marks)),
            Ownership::Stranger | Ownership::Doubt => None,
        });
        if let Some((uid, marks)) = ours {
            sorted.jobs.push(row.view(uid, marks));
        } else if let Some(uid) = row.names(pods) {
            sorted
                .jobs
                .push(row.view(uid.clone(), row.marks(&uid, pods)));
        } else {
            let doubtful = wanted.iter().filter(|job| judged(job) == Ownership::Doubt);
            let doubts = doubtful.map(|job| (row.clone(), (*job).clone()));
            sorted.doubts.extend(doubts);
        }
    }
    sorted
}

/// Asks the controller about each doubtful job. Returns the jobs that are still doubtful, which
/// must not be reported as missing.
async fn examine(
    slurm: &Slurm,
    jobs: &mut Vec<JobView>,
    doubts: Vec<(Row, JobRef)>,
) -> HashSet<(JobId, PodUid)> {
    let mut undecided = HashSet::new();
    let mut ahead = None;
    for (n, (row, job)) in doubts.into_iter().enumerate() {
        let decided = if n < SCONTROL_BATCH {
            resolve_doubt(slurm, &row, &job, &mut ahead).await
        } else {
            None
        };
        match decided {
            Some(Ownership::Ours(marks)) => jobs.push(row.view(job.uid, marks)),
            Some(Ownership::Stranger) => {
                tracing::info!(job = %job.id, uid = %job.uid, "the ID belongs to another job by now");
            }
            Some(Ownership::Doubt) | None => {
                undecided.insert((job.id, job.uid));
            }
        }
    }
    undecided
}

/// Decides whose the doubtful job is; `None` if the controller did not answer. `ahead` caches the
/// offset of its clock.
pub(super) async fn resolve_doubt(
    slurm: &Slurm,
    row: &Row,
    job: &JobRef,
    ahead: &mut Option<i64>,
) -> Option<Ownership> {
    let command = slurm.question(&slurm.settings.scontrol);
    let command = command.args(["show", "job", "-o", job.id.as_str()]);
    let text = slurm.answer("scontrol", command).await.ok()?;
    let detail = parse::scontrol_job(&text, &job.id)?;
    if detail.submitted_at != row.submitted_at {
        // The job was requeued, or the ID was reused, between the two queries.
        return None;
    }
    if ahead.is_none() {
        *ahead = clock(slurm).await;
    }
    Some(ownership::decide(row, &detail, job, slurm.pods(), *ahead))
}

/// How many seconds the controller's clock is ahead of ours.
async fn clock(slurm: &Slurm) -> Option<i64> {
    let command = slurm.question(&slurm.settings.scontrol);
    let command = command.args(["show", "config"]);
    let text = slurm.answer("scontrol", command).await.ok()?;
    Some(parse::controller_time(&text)? - Timestamp::now().as_second())
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
fn to_ask(jobs: &[JobView], known: &[JobRef], undecided: &HashSet<(JobId, PodUid)>) -> Vec<JobRef> {
    let alive: HashSet<(&JobId, &PodUid)> = jobs
        .iter()
        .filter(|job| job.state.phase() != JobPhase::Ended)
        .map(|job| (&job.id, &job.uid))
        .collect();
    let asked = known.iter().filter(|job| {
        let open = undecided.contains(&(job.id.clone(), job.uid.clone()));
        !open && !alive.contains(&(&job.id, &job.uid))
    });
    asked.cloned().collect()
}

/// Rows of the accounting database replace squeue's ended jobs, because they contain the exit code.
/// A row of a job that has not ended is ignored: the database is late, or the controller lost the
/// job and the row will stay like this forever.
fn merge(jobs: &mut Vec<JobView>, rows: &[Row], asked: &[JobRef], pods: &std::path::Path) {
    let mut by_id: HashMap<&JobId, Vec<&Row>> = HashMap::new();
    for row in rows {
        by_id.entry(&row.id).or_default().push(row);
    }
    for job in asked {
        let lives = by_id.get(&job.id).map_or(&[][..], Vec::as_slice);
        let newest = newest_life(lives, job, pods);
        let Some(row) = newest.filter(|row| row.state.phase() == JobPhase::Ended) else {
            continue;
        };
        match jobs.iter_mut().find(|view| job.is(view)) {
            Some(known) => {
                let reason = Some(row.reason.clone()).filter(|reason| !reason.is_empty());
                let reason = reason.unwrap_or_else(|| known.reason.clone());
                *known = JobView {
                    cluster_id: known.cluster_id.clone(),
                    attempt: known.attempt,
                    marks: known.marks,
                    reason,
                    ..row
                };
            }
            None => jobs.push(row),
        }
    }
}

/// A requeued job has a row for every run; the last one counts, even if it is still running. A row
/// that follows a requeued run is the same job, whatever its name is by then.
fn newest_life(lives: &[&Row], job: &JobRef, pods: &std::path::Path) -> Option<JobView> {
    let mut newest: Option<JobView> = None;
    let mut restarts = 0;
    for row in lives {
        let marks = match ownership::judge(row, job, pods) {
            Ownership::Ours(marks) => marks,
            Ownership::Doubt if newest.as_ref().is_some_and(was_requeued) => Marks::default(),
            Ownership::Doubt | Ownership::Stranger => continue,
        };
        let view = row.view(job.uid.clone(), marks);
        newest = Some(JobView { restarts, ..view });
        restarts += 1;
    }
    newest
}

fn was_requeued(life: &JobView) -> bool {
    life.state == JobState::Requeued
}

/// The controller keeps an ended job for `MinJobAge`; this reads the exit code from it, with one
/// query per job.
async fn exits_from_controller(slurm: &Slurm, jobs: &mut [JobView], asked: &[JobRef]) {
    let ended = jobs.iter_mut().filter(|view| {
        view.exit.is_none()
            && view.state.phase() == JobPhase::Ended
            && asked.iter().any(|job| job.is(view))
    });
    for job in ended.take(SCONTROL_BATCH) {
        let command = slurm.question(&slurm.settings.scontrol);
        let command = command.args(["show", "job", "-o", job.id.as_str()]);
        let Ok(text) = slurm.answer("scontrol", command).await else {
            return;
        };
        if let Some(detail) = parse::scontrol_job(&text, &job.id)
            && detail.state.phase() == JobPhase::Ended
            && detail.submitted_at == job.submitted_at
        {
            job.exit = detail.exit;
            job.restarts = detail.restarts;
        }
    }
}

fn missing(jobs: &[JobView], asked: &[JobRef]) -> Vec<JobRef> {
    let there: HashSet<(&JobId, &PodUid)> = jobs.iter().map(|job| (&job.id, &job.uid)).collect();
    let missing = asked
        .iter()
        .filter(|job| !there.contains(&(&job.id, &job.uid)));
    missing.cloned().collect()
}

#[cfg(test)]
mod tests;
