//! PURE: the steps of a pod that has a job: what the scheduler's rounds and the shim's reports mean for it.

use jiff::Timestamp;
use knoc_contract::exit_codes::ShimExit;
use knoc_proto::{ids::JobId, pb};

use super::{ENDED_BY_US, Effect, FILES_AGAIN, LINGER, Pod, State, ending, submit};
use crate::{
    pod::outcome::{Cause, Evidence, decide, is_in_queue},
    scheduler::{Cancel, JobPhase, JobState, JobView},
};

const NANOS_PER_SECOND: i64 = 1_000_000_000;
/// By how many seconds the clocks of the controller and a compute node may differ where their times are compared.
const CLOCKS_APART: i64 = 2;

pub(super) fn round(
    pod: &mut Pod,
    jobs: Vec<JobView>,
    missing: bool,
    now: Timestamp,
) -> Vec<Effect> {
    let Some(own) = pod.job() else {
        return Vec::new();
    };
    let mut effects = if pod.is_finished() {
        Vec::new()
    } else {
        submit::cancel_surplus(pod, &jobs, now)
    };
    if let Some(view) = jobs.into_iter().find(|view| view.id == own.id) {
        effects.extend(seen(pod, view, now));
    } else if missing {
        effects.extend(gone(pod, now));
    }
    effects
}

/// The scheduler knows the pod's job.
fn seen(pod: &mut Pod, view: JobView, now: Timestamp) -> Vec<Effect> {
    let (phase, id) = (view.state.phase(), view.id.clone());
    pod.unseen = None;
    if out_of_date(pod, &view) {
        return Vec::new();
    }
    let first = pod.view.is_none();
    let before = pod.view.replace(view);
    match phase {
        JobPhase::Ended => return ended(pod, now),
        JobPhase::Running | JobPhase::Queued => {}
    }
    match &pod.state {
        State::Queued { .. } | State::Lost { .. } if phase == JobPhase::Running => {
            run(pod, id, now)
        }
        State::Queued { .. } => {
            pending(pod, before.as_ref(), now);
            if first {
                vec![Effect::Persist]
            } else {
                Vec::new()
            }
        }
        State::Running { .. } => {
            running(pod, before.as_ref(), now);
            Vec::new()
        }
        // Known again; what ended may also have been requeued by hand.
        State::Lost { .. } => {
            pod.enter(
                State::Queued {
                    job: id,
                    never: None,
                },
                now,
            );
            vec![Effect::Persist]
        }
        State::Settling { cause: None, .. } if phase == JobPhase::Running && !reported(pod) => {
            run(pod, id, now)
        }
        // From its nodes back into the queue: somebody requeued it.
        State::Settling { cause: None, .. } if reported(pod) && went_back(pod, before.as_ref()) => {
            end_requeued(pod, now)
        }
        State::Stopping { .. } => ending::still_there(pod, phase, now),
        State::Finished { .. } => linger(pod, now),
        State::Settling { .. }
        | State::Accepted
        | State::Staging { .. }
        | State::Throttled { .. }
        | State::Submitting { .. }
        | State::Forgotten => Vec::new(),
    }
}

/// Does the scheduler show a job in the queue that is known to have started? Then its answer is from before the start:
/// a cache's, or one that another answer overtook. Slurm gives a job that it requeues a later submit time, always.
fn out_of_date(pod: &Pod, view: &JobView) -> bool {
    if !matches!(view.state, JobState::Pending | JobState::Configuring) {
        return false;
    }
    let before = pod.view.as_ref().filter(|before| before.id == view.id);
    let ran = before.filter(|before| before.state.phase() == JobPhase::Running);
    let report = pod.report.as_ref();
    let report = report.filter(|report| report.job_id == view.id.as_str());
    let began = report.map(|report| report.started_at / NANOS_PER_SECOND);
    let known = match (ran, began) {
        (Some(before), _) => before.submitted_at,
        // The clocks of two hosts.
        (None, Some(began)) if began > 0 => Some(began.saturating_add(CLOCKS_APART)),
        (None, _) => None,
    };
    match (known, view.submitted_at) {
        (Some(known), Some(at)) => at <= known,
        (_, None) | (None, _) => false,
    }
}

/// Is a job that ran in the queue again?
fn went_back(pod: &Pod, before: Option<&JobView>) -> bool {
    pod.view.as_ref().is_some_and(is_in_queue)
        && before.is_some_and(|view| view.state.phase() == JobPhase::Running)
}

/// It would start once more, only to find the claim taken.
fn end_requeued(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let job = pod.job();
    let mut effects = conclude(pod, None, now);
    effects.extend(job.map(|job| Effect::Cancel {
        job,
        how: Cancel::Queued,
    }));
    effects
}

fn run(pod: &mut Pod, job: JobId, now: Timestamp) -> Vec<Effect> {
    let nodes = pod.view.as_ref().map_or("", |view| view.nodes.as_str());
    let text = if nodes.is_empty() {
        format!("job {job} has started")
    } else {
        format!("job {job} has started on {nodes}")
    };
    pod.note(false, "SlurmJobStarted", text, now);
    pod.enter(State::Running { job }, now);
    pod.read_at = now;
    vec![Effect::Persist]
}

/// A queued job: why it waits, and whether it waits for ever.
fn pending(pod: &mut Pod, before: Option<&JobView>, now: Timestamp) {
    let Some(view) = pod.view.clone() else { return };
    let never_starts = view.never_starts();
    if before.is_none_or(|before| before.reason != view.reason) && !view.reason.is_empty() {
        let text = format!("job {} waits: {}", view.id, view.reason);
        let reason = if never_starts {
            "SlurmJobNeverStarts"
        } else {
            "SlurmJobPending"
        };
        // Reasons come and go; each is worth one Event.
        if !pod.notes.iter().any(|note| note.message == text) {
            pod.note(never_starts, reason, text, now);
        }
    }
    if let State::Queued { never, .. } = &mut pod.state {
        *never = never_starts.then(|| never.unwrap_or(now));
    }
}

fn running(pod: &mut Pod, before: Option<&JobView>, now: Timestamp) {
    let Some(view) = pod.view.clone() else { return };
    if before.is_some_and(|before| before.state == view.state) {
        return;
    }
    let was_suspended = before.is_some_and(|before| before.state == JobState::Suspended);
    let (warning, reason) = if matches!(view.state, JobState::Suspended | JobState::Stopped) {
        (true, "SlurmJobSuspended")
    } else if view.state == JobState::Running && was_suspended {
        (false, "SlurmJobResumed")
    } else if is_in_queue(&view) && view.state != JobState::Configuring {
        (true, "SlurmJobRequeued")
    } else {
        return;
    };
    let text = format!("job {} is {}", view.id, view.state);
    pod.note(warning, reason, text, now);
}

/// The job has ended: how is the report's word, which may take a while to show.
fn ended(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let (job, cause) = match &pod.state {
        State::Queued { job, .. } | State::Running { job } | State::Lost { job, .. } => {
            (job.clone(), None)
        }
        State::Stopping { job, cause, .. } => (job.clone(), Some(cause.clone())),
        // Where the report was waiting for Slurm's word, here it is.
        State::Settling { job, cause, .. } => (job.clone(), cause.clone()),
        State::Finished { .. } => {
            if let State::Finished { lingering, .. } = &mut pod.state {
                *lingering = None;
            }
            return Vec::new();
        }
        State::Accepted
        | State::Staging { .. }
        | State::Throttled { .. }
        | State::Submitting { .. }
        | State::Forgotten => return Vec::new(),
    };
    if reported(pod) {
        return conclude(pod, cause.as_ref(), now);
    }
    if let State::Settling { .. } = pod.state {
        return Vec::new();
    }
    if surplus(pod) {
        let message = format!("job {job} found the claim taken");
        pod.note(true, "SlurmJobSurplus", message.clone(), now);
        return submit::look(pod, message, now);
    }
    let until = now + patience(pod);
    pod.enter(
        State::Settling {
            job,
            cause,
            until,
            look_at: now + FILES_AGAIN,
        },
        now,
    );
    vec![Effect::Persist, Effect::ReadFiles]
}

/// Did the shim of our job find the claim taken? Then another job of this pod runs, or ran.
pub(super) fn surplus(pod: &Pod) -> bool {
    let exit = pod.view.as_ref().and_then(|view| view.exit);
    pod.report.is_none() && exit.is_some_and(|exit| exit.code == ShimExit::Surplus.code())
}

fn reported(pod: &Pod) -> bool {
    pod.report.as_ref().is_some_and(|report| report.r#final)
}

/// How long a final report may still show. Where none can come, the files are read once all the same.
fn patience(pod: &Pod) -> std::time::Duration {
    let Some(view) = &pod.view else {
        return pod.facts.patience.report_grace;
    };
    let never_started = view.started_at.is_none() && pod.report.is_none();
    // The batch script becomes the shim, so its code is the shim's word: any but these two promises no report.
    let code = view.exit.map_or(0, |exit| exit.code);
    let none_can_come = !ShimExit::of(code).is_some_and(ShimExit::promises_report);
    let stopping = matches!(pod.state, State::Stopping { .. });
    let cancelled = matches!(view.state, JobState::Cancelled { .. });
    let cancelled_in_queue = never_started && (cancelled || stopping);
    let crashed = view
        .exit
        .is_some_and(|exit| exit.code == 0 && exit.signal == 53);
    let node_gone = matches!(
        view.state,
        JobState::NodeFail | JobState::BootFail | JobState::LaunchFailed | JobState::ReconfigFail
    );
    if none_can_come || cancelled_in_queue || crashed || node_gone {
        FILES_AGAIN
    } else if stopping {
        pod.facts.patience.report_grace.min(ENDED_BY_US)
    } else {
        pod.facts.patience.report_grace
    }
}

/// Neither queue nor accounting know the job. Both may be late, or answer from a cache.
fn gone(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let since = *pod.unseen.get_or_insert(now);
    let soon = now < since + pod.lag();
    let never_shown = pod.view.is_none();
    match &mut pod.state {
        // Its report may be there already, and says it all.
        State::Queued { .. } | State::Running { .. } if soon => vec![Effect::ReadFiles],
        State::Queued { job, .. } | State::Running { job } => {
            let job = job.clone();
            let text = format!("the scheduler does not know job {job}");
            pod.note(true, "SlurmJobLost", text, now);
            let look_at = now + FILES_AGAIN;
            pod.enter(
                State::Lost {
                    job,
                    since,
                    look_at,
                },
                now,
            );
            vec![Effect::Persist, Effect::ReadFiles]
        }
        // It may be alive, and its cancellation have missed it.
        State::Stopping { .. } if soon && never_shown => Vec::new(),
        State::Stopping { .. } => ended(pod, now),
        State::Finished { lingering, .. } => {
            *lingering = None;
            Vec::new()
        }
        State::Lost { .. }
        | State::Settling { .. }
        | State::Accepted
        | State::Staging { .. }
        | State::Throttled { .. }
        | State::Submitting { .. }
        | State::Forgotten => Vec::new(),
    }
}

/// The shim speaks. Its reports come only from the job that holds the claim.
pub(super) fn report(pod: &mut Pod, report: pb::Report, now: Timestamp) -> Vec<Effect> {
    let newer = pod.report.as_ref().is_none_or(|known| {
        (report.restart, report.sequence, report.r#final)
            > (known.restart, known.sequence, known.r#final)
    });
    if !newer || report.uid != pod.facts.uid.as_str() || pod.is_finished() {
        return Vec::new();
    }
    let Ok(job) = JobId::try_from(report.job_id.as_str()) else {
        return Vec::new();
    };
    adopt(pod, &job, now);
    take_notes(pod, &report);
    let is_final = report.r#final;
    pod.report = Some(report);
    heard(pod, job, is_final, now)
}

/// After a restart of the agent: what the report on disk says goes before any question to the scheduler.
pub(super) fn resume(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let Some(report) = &pod.report else {
        return Vec::new();
    };
    let is_final = report.r#final;
    let Ok(job) = JobId::try_from(report.job_id.as_str()) else {
        return Vec::new();
    };
    heard(pod, job, is_final, now)
}

/// The shim of `job` holds the claim, so the job runs; with its final report it is about to end.
fn heard(pod: &mut Pod, job: JobId, is_final: bool, now: Timestamp) -> Vec<Effect> {
    let mut effects = match &pod.state {
        State::Queued { .. }
        | State::Lost { .. }
        | State::Stopping {
            cause: Cause::NeverStarts(_),
            ..
        } => run(pod, job, now),
        // A look by name is under way, or sbatch has not answered yet: here is the answer.
        State::Submitting { .. } => {
            let effects = run(pod, job, now);
            match pod.deletion.clone() {
                Some(_) => effects.into_iter().chain(ending::tell(pod, now)).collect(),
                None => effects,
            }
        }
        State::Running { .. }
        | State::Stopping { .. }
        | State::Settling { .. }
        | State::Accepted
        | State::Staging { .. }
        | State::Throttled { .. }
        | State::Finished { .. }
        | State::Forgotten => Vec::new(),
    };
    if is_final {
        effects.extend(final_report(pod, now));
    }
    effects
}

/// The claim is another job's than the one we know: that one is the pod's.
fn adopt(pod: &mut Pod, claimant: &JobId, now: Timestamp) {
    let own = match &mut pod.state {
        State::Queued { job, .. }
        | State::Running { job }
        | State::Stopping { job, .. }
        | State::Lost { job, .. }
        | State::Settling { job, .. } => job,
        State::Accepted
        | State::Staging { .. }
        | State::Throttled { .. }
        | State::Submitting { .. }
        | State::Finished { .. }
        | State::Forgotten => return,
    };
    if own == claimant {
        return;
    }
    let text = format!("job {claimant} holds the claim; it is the pod's instead of {own}");
    own.clone_from(claimant);
    pod.view = None;
    pod.sbatch = None;
    pod.note(true, "SlurmJobSurplus", text, now);
}

/// The shim's notes, once each.
fn take_notes(pod: &mut Pod, report: &pb::Report) {
    let known = pod
        .report
        .as_ref()
        .and_then(|known| known.notes.last())
        .map_or(0, |n| n.sequence);
    for note in report.notes.iter().filter(|note| note.sequence > known) {
        pod.push_note(note.clone());
    }
}

/// All containers have ended, and the report of it is synced.
fn final_report(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let by_signal = pod
        .report
        .as_ref()
        .is_some_and(|r| r.ended_by() == pb::EndedBy::Signal);
    match &pod.state {
        // Only Slurm knows why; and only the end of the job finishes a pod that is being deleted.
        State::Running { job } if by_signal => {
            let job = job.clone();
            let until = now + pod.facts.patience.report_grace;
            let look_at = until;
            pod.enter(
                State::Settling {
                    job,
                    cause: None,
                    until,
                    look_at,
                },
                now,
            );
            vec![Effect::Persist, Effect::Hurry]
        }
        State::Running { .. } => conclude(pod, None, now),
        State::Settling { cause: None, .. } if by_signal && !job_ended(pod) => vec![Effect::Hurry],
        State::Settling { cause, .. } => {
            let cause = cause.clone();
            conclude(pod, cause.as_ref(), now)
        }
        State::Stopping { .. } => vec![Effect::Hurry],
        State::Accepted
        | State::Staging { .. }
        | State::Throttled { .. }
        | State::Submitting { .. }
        | State::Queued { .. }
        | State::Lost { .. }
        | State::Finished { .. }
        | State::Forgotten => Vec::new(),
    }
}

fn job_ended(pod: &Pod) -> bool {
    let phase = pod.view.as_ref().map(|view| view.state.phase());
    phase == Some(JobPhase::Ended)
}

/// The files were read; no final report is there.
pub(super) fn files(
    pod: &mut Pod,
    batch_tail: String,
    claimed: bool,
    now: Timestamp,
) -> Vec<Effect> {
    match &pod.state {
        State::Settling { .. } | State::Lost { .. } => {
            pod.batch_tail = batch_tail;
            pod.unclaimed = !claimed;
            tick(pod, now)
        }
        State::Accepted
        | State::Staging { .. }
        | State::Throttled { .. }
        | State::Submitting { .. }
        | State::Queued { .. }
        | State::Running { .. }
        | State::Stopping { .. }
        | State::Finished { .. }
        | State::Forgotten => Vec::new(),
    }
}

pub(super) fn tick(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let lost_after = pod.facts.patience.lost_after;
    let link = pod.link;
    let overdue = pod.overdue_at().is_some_and(|at| now >= at);
    match &mut pod.state {
        State::Running { .. } if overdue => ending::overdue(pod, now),
        State::Queued {
            never: Some(since), ..
        } => {
            if now < *since + pod.facts.patience.never_ends_after {
                return Vec::new();
            }
            let reason = pod
                .view
                .as_ref()
                .map_or_else(String::new, |view| view.reason.clone());
            ending::dequeue(pod, Cause::NeverStarts(reason), now)
        }
        State::Settling { until, cause, .. } if now >= *until => {
            let cause = cause.clone();
            conclude(pod, cause.as_ref(), now)
        }
        // While its shim speaks, the job lives, whatever the scheduler says.
        State::Lost { since, .. } if now >= *since + lost_after && !link => {
            pod.view = None;
            conclude(pod, None, now)
        }
        State::Settling { look_at, .. } | State::Lost { look_at, .. } if now >= *look_at => {
            *look_at = now + FILES_AGAIN;
            vec![Effect::ReadFiles]
        }
        State::Running { .. } if !link => {
            pod.read_at = now;
            vec![Effect::ReadFiles]
        }
        State::Settling { .. }
        | State::Lost { .. }
        | State::Queued { .. }
        | State::Accepted
        | State::Staging { .. }
        | State::Throttled { .. }
        | State::Submitting { .. }
        | State::Running { .. }
        | State::Stopping { .. }
        | State::Finished { .. }
        | State::Forgotten => Vec::new(),
    }
}

/// Decides how the pod ended.
pub(super) fn conclude(pod: &mut Pod, cause: Option<&Cause>, now: Timestamp) -> Vec<Effect> {
    let outcome = decide(
        &Evidence {
            view: pod.view.as_ref(),
            report: pod.report.as_ref(),
            cause,
            deadline: pod.facts.deadline,
            grace: pod.facts.grace,
            batch_tail: &pod.batch_tail,
            unclaimed: pod.unclaimed,
        },
        now,
    );
    let job_ended = job_ended(pod);
    let lingering = pod
        .job()
        .map(|job| job.id)
        .filter(|_| !job_ended && cause.is_none());
    ending::finish(pod, outcome, lingering, now)
}

/// A job that outlives its final report is cancelled: none leaks.
fn linger(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let Some(job) = pod.job() else {
        return Vec::new();
    };
    if now < pod.since + LINGER {
        return Vec::new();
    }
    let text = format!("job {} outlived its pod and was cancelled", job.id);
    if !pod.notes.iter().any(|note| note.message == text) {
        pod.note(true, "SlurmJobSurplus", text, now);
    }
    vec![Effect::Cancel {
        job,
        how: Cancel::Kill,
    }]
}
