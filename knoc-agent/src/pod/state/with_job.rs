//! PURE: the steps of a pod that has a job: what the scheduler's rounds and the files say about it.

use std::time::Duration;

use jiff::Timestamp;
use knoc_contract::exit_codes::ShimExit;

use super::{
    ending,
    event::Effect,
    pod::{ENDED_BY_US, FILES_AGAIN, LINGER, Pod},
    states::{JobStage, State},
    transition::{conclude, look, reported, run, surplus},
};
use crate::{
    pod::outcome::{Cause, is_in_queue},
    scheduler::{Cancel, JobPhase, JobState, JobView},
};

const NANOS_PER_SECOND: i64 = 1_000_000_000;
/// By how many seconds the clocks of the controller and of a compute node may differ if their times are compared.
const CLOCKS_APART: i64 = 2;

/// After a restart of the agent the files may tell more than the record.
pub(super) fn begin(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let mut effects = vec![Effect::ReadFiles, Effect::PollSoon];
    effects.extend(ending::resume(pod, now));
    effects
}

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
        cancel_surplus(pod, &jobs, now)
    };
    if let Some(view) = jobs.into_iter().find(|view| view.id == own.id) {
        effects.extend(seen(pod, view, now));
    } else if missing {
        effects.extend(gone(pod, now));
    }
    effects
}

/// Cancels surplus jobs that have not started; a running one ends because it does not get the
/// claim. A job that matches the pod only weakly is left alone, because a program in the pod may
/// have submitted it.
fn cancel_surplus(pod: &mut Pod, jobs: &[JobView], now: Timestamp) -> Vec<Effect> {
    let Some(own) = pod.job() else {
        return Vec::new();
    };
    let is_surplus = |view: &&JobView| {
        view.id != own.id && view.marks.sure() && view.state.phase() == JobPhase::Queued
    };
    let mut effects = Vec::new();
    for job in jobs.iter().filter(is_surplus).map(JobView::job) {
        let text = format!(
            "job {} is surplus and was cancelled; {} is the pod's",
            job.id, own.id
        );
        pod.note(true, "SlurmJobSurplus", text, now);
        let how = Cancel::Queued;
        effects.push(Effect::Cancel { job, how });
    }
    effects
}

/// The scheduler knows the placement's job.
fn seen(pod: &mut Pod, view: JobView, now: Timestamp) -> Vec<Effect> {
    let phase = view.state.phase();
    pod.unseen = None;
    if out_of_date(pod, &view) {
        return Vec::new();
    }
    let before = pod.view.replace(view);
    match phase {
        JobPhase::Ended => return ended(pod, now),
        JobPhase::Running | JobPhase::Queued => {}
    }
    match &pod.state {
        State::WithJob { .. } => seen_alive(pod, before.as_ref(), phase, now),
        State::Finished { .. } => linger(pod, now),
        State::BeforeJob(_) | State::Forgotten => Vec::new(),
    }
}

/// The scheduler shows the job in the queue or on its nodes.
fn seen_alive(
    pod: &mut Pod,
    before: Option<&JobView>,
    phase: JobPhase,
    now: Timestamp,
) -> Vec<Effect> {
    let Some(stage) = pod.stage() else {
        return Vec::new();
    };
    let runs = phase == JobPhase::Running;
    match stage {
        JobStage::Queued { .. } | JobStage::Lost { .. } if runs => started(pod, now),
        // A note that is not in the record would be made again after a restart of the agent.
        JobStage::Queued { .. } => {
            let news = pending(pod, before, now) || before.is_none();
            news.then_some(Effect::Persist).into_iter().collect()
        }
        JobStage::Running if went_back(pod, before) => back_in_queue(pod, before, now),
        JobStage::Running => {
            let news = running(pod, before, now);
            news.then_some(Effect::Persist).into_iter().collect()
        }
        // The job is known again. A job that had ended may also have been requeued by hand.
        JobStage::Lost { .. } => {
            pod.enter_stage(JobStage::Queued { never: None }, now);
            vec![Effect::Persist]
        }
        JobStage::Settling { cause: None, .. } if runs && !reported(pod) => started(pod, now),
        // It was not shown for a while, and was never told to end, or not for long enough.
        JobStage::Settling { cause: Some(_), .. } if !reported(pod) => {
            ending::still_there(pod, phase, now)
        }
        // The job went from its nodes back to the queue: it was requeued.
        JobStage::Settling { cause: None, .. } if reported(pod) && went_back(pod, before) => {
            end_requeued(pod, now)
        }
        JobStage::Settling { .. } => Vec::new(),
        JobStage::Stopping { .. } => ending::still_there(pod, phase, now),
    }
}

/// The scheduler says that the placement's job has started.
fn started(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    match pod.placement().cloned() {
        Some(placement) => run(pod, placement, now),
        None => Vec::new(),
    }
}

/// Whether the scheduler shows a job in the queue that is known to have started. Its answer then
/// predates the start: it comes from a cache, or another answer overtook it. Slurm always gives a
/// requeued job a later submit time.
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
        // The two times come from clocks of different hosts.
        (None, Some(began)) if began > 0 => Some(began.saturating_add(CLOCKS_APART)),
        (None, _) => None,
    };
    match (known, view.submitted_at) {
        (Some(known), Some(at)) => at <= known,
        (_, None) | (None, _) => false,
    }
}

/// Whether a job that ran is in the queue again.
fn went_back(pod: &Pod, before: Option<&JobView>) -> bool {
    let waits = |view: &&JobView| is_in_queue(view) && view.state != JobState::Configuring;
    let Some(view) = pod.view.as_ref().filter(waits) else {
        return false;
    };
    before.is_some_and(|view| view.state.phase() == JobPhase::Running) || submitted_again(pod, view)
}

/// Whether the job was submitted after its shim had begun. An agent that was restarted may not have seen the job run.
fn submitted_again(pod: &Pod, view: &JobView) -> bool {
    let (Some(report), Some(at)) = (&pod.report, view.submitted_at) else {
        return false;
    };
    let began = report.started_at / NANOS_PER_SECOND;
    report.job_id == view.id.as_str() && began > 0 && at > began.saturating_add(CLOCKS_APART)
}

/// The job went back into the queue without a final report: its shim was killed. Slurm may hold it there, so that it would never
/// start again, and if it did its shim would find the claim taken. A job whose shim never reported waits as it did before its start:
/// its launch may have failed.
fn back_in_queue(pod: &mut Pod, before: Option<&JobView>, now: Timestamp) -> Vec<Effect> {
    running(pod, before, now);
    if pod.report.is_some() {
        let settling = JobStage::Settling {
            cause: None,
            until: now + ENDED_BY_US,
            look_at: now + FILES_AGAIN,
        };
        pod.enter_stage(settling, now);
    } else {
        pod.enter_stage(JobStage::Queued { never: None }, now);
        pending(pod, None, now);
    }
    vec![Effect::Persist, Effect::ReadFiles]
}

/// Ends a job that was requeued: it would start once more, only to find the claim taken.
fn end_requeued(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let cancel = ending::cancel(pod, Cancel::Queued);
    let mut effects = conclude(pod, None, now);
    effects.extend(cancel);
    effects
}

/// Notes why a queued job waits, and since when it has waited for a reason that never ends. Returns whether one of both is new.
fn pending(pod: &mut Pod, before: Option<&JobView>, now: Timestamp) -> bool {
    let Some(view) = pod.view.clone() else {
        return false;
    };
    let never_starts = view.never_starts();
    let text = format!("job {} waits: {}", view.id, view.reason);
    let goes_on = before.is_some_and(|before| before.reason == view.reason);
    // Reasons come and go; each one gets one Event.
    let noted = pod.notes.iter().any(|note| note.message == text);
    let mut news = !goes_on && !view.reason.is_empty() && !noted;
    if news {
        let reason = if never_starts {
            "SlurmJobNeverStarts"
        } else {
            "SlurmJobPending"
        };
        pod.note(never_starts, reason, text, now);
    }
    if let Some(JobStage::Queued { never }) = pod.stage_mut() {
        let since = never_starts.then(|| never.unwrap_or(now));
        news |= since != *never;
        *never = since;
    }
    news
}

/// Notes that a job was suspended, resumed or requeued. Returns whether there is a new note.
fn running(pod: &mut Pod, before: Option<&JobView>, now: Timestamp) -> bool {
    let Some(view) = pod.view.clone() else {
        return false;
    };
    if before.is_some_and(|before| before.state == view.state) {
        return false;
    }
    let was_suspended = before.is_some_and(|before| before.state == JobState::Suspended);
    let (warning, reason) = if matches!(view.state, JobState::Suspended | JobState::Stopped) {
        (true, "SlurmJobSuspended")
    } else if view.state == JobState::Running && was_suspended {
        (false, "SlurmJobResumed")
    } else if is_in_queue(&view) && view.state != JobState::Configuring {
        (true, "SlurmJobRequeued")
    } else {
        return false;
    };
    let mut text = format!("job {} is {}", view.id, view.state);
    // Who holds it, for example.
    if view.state.phase() == JobPhase::Queued && !view.reason.is_empty() {
        text = format!("{text}: {}", view.reason);
    }
    pod.note(warning, reason, text, now);
    true
}

/// The job has ended. The report says how, but may take a while to appear.
fn ended(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    if let State::Finished { lingering, .. } = &mut pod.state {
        *lingering = None;
    }
    let State::WithJob { placement, stage } = &pod.state else {
        return Vec::new();
    };
    let (job, cause) = (placement.job().clone(), stage.cause().cloned());
    let settling = matches!(stage, JobStage::Settling { .. });
    // If the report waited for Slurm's state, here it is.
    if reported(pod) {
        return conclude(pod, cause.as_ref(), now);
    }
    if settling {
        return Vec::new();
    }
    if surplus(pod) {
        let message = format!("job {job} found the claim taken");
        pod.note(true, "SlurmJobSurplus", message.clone(), now);
        return look(pod, message, now);
    }
    let settling = JobStage::Settling {
        cause,
        until: now + report_grace(pod),
        look_at: now + FILES_AGAIN,
    };
    pod.enter_stage(settling, now);
    vec![Effect::Persist, Effect::ReadFiles]
}

/// How long to wait for a final report. If none can come, the files are still read once.
fn report_grace(pod: &Pod) -> Duration {
    let Some(view) = &pod.view else {
        return pod.facts.timeouts.report_grace;
    };
    let never_started = view.started_at.is_none() && pod.report.is_none();
    // The batch script becomes the shim, so its exit code is the shim's: only these two promise a report.
    let code = view.exit.map_or(0, |exit| exit.code);
    let none_can_come = !ShimExit::of(code).is_some_and(ShimExit::promises_report);
    let stopping = matches!(pod.stage(), Some(JobStage::Stopping { .. }));
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
        pod.facts.timeouts.report_grace.min(ENDED_BY_US)
    } else {
        pod.facts.timeouts.report_grace
    }
}

/// Neither the queue nor the accounting knows the job. Both may be late, or answer from a cache.
fn gone(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let since = *pod.unseen.get_or_insert(now);
    let soon = now < since + pod.lag();
    let never_shown = pod.view.is_none();
    let lives = pod.link && !reported(pod);
    let (job, stage) = match &mut pod.state {
        State::WithJob { placement, stage } => (placement.job(), stage),
        State::Finished { lingering, .. } => {
            *lingering = None;
            return Vec::new();
        }
        State::BeforeJob(_) | State::Forgotten => return Vec::new(),
    };
    match stage {
        // Its final report may already be on disk.
        JobStage::Queued { .. } | JobStage::Running if soon => vec![Effect::ReadFiles],
        JobStage::Queued { .. } | JobStage::Running => {
            let text = format!("the scheduler does not know job {job}");
            pod.note(true, "SlurmJobLost", text, now);
            let look_at = now + FILES_AGAIN;
            pod.enter_stage(JobStage::Lost { since, look_at }, now);
            vec![Effect::Persist, Effect::ReadFiles]
        }
        // The job may be alive, and its cancellation may have missed it. While its shim reports and has not told the end, it is.
        JobStage::Stopping { .. } if lives || (soon && never_shown) => Vec::new(),
        JobStage::Stopping { .. } => ended(pod, now),
        JobStage::Lost { .. } | JobStage::Settling { .. } => Vec::new(),
    }
}

/// The files were read, and no final report is there.
pub(super) fn files(
    pod: &mut Pod,
    batch_tail: String,
    claimed: bool,
    now: Timestamp,
) -> Vec<Effect> {
    match pod.stage() {
        Some(JobStage::Settling { .. } | JobStage::Lost { .. }) => {
            pod.batch_tail = batch_tail;
            pod.unclaimed = !claimed;
            tick(pod, now)
        }
        Some(JobStage::Queued { .. } | JobStage::Running | JobStage::Stopping { .. }) | None => {
            Vec::new()
        }
    }
}

pub(super) fn tick(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let timeouts = pod.facts.timeouts.clone();
    let link = pod.link;
    let overdue = pod.overdue_at().is_some_and(|at| now >= at);
    let Some(stage) = pod.stage_mut() else {
        return Vec::new();
    };
    match stage {
        JobStage::Running if overdue => ending::overdue(pod, now),
        JobStage::Running if !link => {
            pod.read_unlinked(now);
            vec![Effect::ReadFiles]
        }
        JobStage::Queued { never: Some(since) } if now >= *since + timeouts.never_ends_after => {
            let view = pod.view.as_ref();
            let reason = view.map_or_else(String::new, |view| view.reason.clone());
            ending::dequeue(pod, Cause::NeverStarts(reason), now)
        }
        JobStage::Settling { until, cause, .. } if now >= *until => {
            let cause = cause.clone();
            if cause.is_none() && pod.view.as_ref().is_some_and(is_in_queue) {
                return end_requeued(pod, now);
            }
            conclude(pod, cause.as_ref(), now)
        }
        // While its shim reports, the job lives, whatever the scheduler says.
        JobStage::Lost { since, .. } if now >= *since + timeouts.lost_after && !link => {
            pod.view = None;
            conclude(pod, None, now)
        }
        JobStage::Settling { look_at, .. } | JobStage::Lost { look_at, .. } if now >= *look_at => {
            *look_at = now + FILES_AGAIN;
            vec![Effect::ReadFiles]
        }
        JobStage::Stopping { .. } => ending::escalate(pod, now),
        JobStage::Running
        | JobStage::Queued { .. }
        | JobStage::Settling { .. }
        | JobStage::Lost { .. } => Vec::new(),
    }
}

/// Cancels a job that outlives its final report, so that no job leaks.
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
