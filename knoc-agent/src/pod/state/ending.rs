//! PURE: the steps that end a pod: its deletion, a deadline that was lowered, and the measures against its job.

use std::time::Duration;

use jiff::Timestamp;

use super::{
    event::Effect,
    pod::{CANCEL_AGAIN, Deletion, ENDED_BY_US, LINGER, Pod},
    states::{BeforeJob, Ending, JobStage, State},
    transition::{deleted_before_job, deletion_cause, note_deadline},
};
use crate::{
    pod::outcome::Cause,
    scheduler::{Cancel, JobPhase},
};

/// `DeletePod`. It is idempotent; a shorter grace brings the deadline forward.
pub(super) fn delete(
    pod: &mut Pod,
    grace: Option<Duration>,
    reason: String,
    now: Timestamp,
) -> Vec<Effect> {
    let grace = grace.unwrap_or(pod.facts.grace);
    let known = pod.deletion.as_ref();
    if known.is_some_and(|known| known.grace <= grace) {
        return Vec::new();
    }
    let reason = pod.deletion.take().map_or(reason, |known| known.reason);
    pod.deletion = Some(Deletion { grace, reason });
    match &pod.state {
        State::BeforeJob(before) => match before {
            // Staging may be under way: its answer is then ignored.
            BeforeJob::Accepted | BeforeJob::Staging { .. } | BeforeJob::Throttled { .. } => {
                deleted_before_job(pod, now)
            }
            // The answer of sbatch is awaited anyway.
            BeforeJob::Submitting { .. } => vec![Effect::Persist],
        },
        State::WithJob { .. } => delete_with_job(pod, now),
        State::Finished { .. } => vec![Effect::Persist],
        State::Forgotten => Vec::new(),
    }
}

fn delete_with_job(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let deleted = deletion_cause(pod);
    let (Some(stage), Some(deleted)) = (pod.stage_mut(), deleted) else {
        return Vec::new();
    };
    match stage {
        JobStage::Queued { .. } => dequeue(pod, deleted, now),
        JobStage::Running
        | JobStage::Stopping {
            how: Ending::Told, ..
        } => tell(pod, now),
        JobStage::Stopping {
            how: Ending::Dequeued | Ending::Cancelled,
            cause,
            ..
        } => {
            if *cause != Cause::Deadline {
                *cause = deleted;
            }
            vec![Effect::Persist]
        }
        JobStage::Lost { .. } => {
            let mut effects = tell(pod, now);
            effects.extend(cancel(pod, Cancel::Queued));
            effects
        }
        JobStage::Settling { until, .. } => {
            *until = (*until).min(now + ENDED_BY_US);
            vec![Effect::Persist]
        }
    }
}

/// A deletion is a level: in whatever way a pod that is being deleted has come to a job that nobody ends, that job is ended now.
pub(super) fn obey_deletion(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let Some(deleted) = deletion_cause(pod) else {
        return Vec::new();
    };
    match pod.stage() {
        Some(JobStage::Queued { .. }) => dequeue(pod, deleted, now),
        Some(JobStage::Running) => tell(pod, now),
        Some(JobStage::Stopping { .. } | JobStage::Lost { .. } | JobStage::Settling { .. })
        | None => Vec::new(),
    }
}

/// The link to the shim of a job that is being ended is up: the shim may never have heard of it, because a signal did not arrive. The
/// containers have what is left of their grace period.
pub(super) fn tell_again(pod: &Pod, now: Timestamp) -> Option<Effect> {
    let grace = match pod.stage()? {
        JobStage::Stopping {
            how: Ending::Told,
            deadline,
            ..
        } => {
            let left = Duration::try_from(deadline.duration_since(now));
            let slack = pod.facts.timeouts.stop_slack;
            left.unwrap_or_default().saturating_sub(slack)
        }
        JobStage::Stopping {
            how: Ending::Cancelled,
            ..
        } => Duration::ZERO,
        JobStage::Stopping {
            how: Ending::Dequeued,
            ..
        }
        | JobStage::Queued { .. }
        | JobStage::Running
        | JobStage::Lost { .. }
        | JobStage::Settling { .. } => return None,
    };
    let job = pod.job()?;
    Some(Effect::Stop { job, grace })
}

/// The agent was restarted while the job is being ended: the last measure is repeated, because it may not have been carried out. Only
/// the shim knows how far the stop has come, and no grace period begins anew.
pub(super) fn resume(pod: &mut Pod, now: Timestamp) -> Option<Effect> {
    if let Some(JobStage::Stopping {
        how: Ending::Dequeued | Ending::Cancelled,
        deadline,
        ..
    }) = pod.stage_mut()
    {
        *deadline = now;
        return None;
    }
    tell_again(pod, now)
}

/// Takes a queued job out of the queue. If it has started meanwhile, [`still_there`] tells its containers.
pub(super) fn dequeue(pod: &mut Pod, cause: Cause, now: Timestamp) -> Vec<Effect> {
    let Some(cancel) = cancel(pod, Cancel::Queued) else {
        return Vec::new();
    };
    let stage = JobStage::Stopping {
        cause,
        how: Ending::Dequeued,
        deadline: now + CANCEL_AGAIN,
    };
    pod.enter_stage(stage, now);
    vec![Effect::Persist, cancel, Effect::PollSoon]
}

/// Tells the containers of a pod that is being deleted to end.
pub(super) fn tell(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let Some(Deletion { grace, reason }) = pod.deletion.clone() else {
        return Vec::new();
    };
    let stopping = matches!(pod.stage(), Some(JobStage::Stopping { .. }));
    let cause = if stopping && pod.is_overdue() {
        // The deadline came first.
        Cause::Deadline
    } else {
        Cause::Deleted(reason)
    };
    stop(pod, cause, grace, now)
}

/// Tells the containers to end because the pod's own deadline is over.
pub(super) fn overdue(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    note_deadline(pod, now);
    let grace = pod.facts.grace;
    stop(pod, Cause::Deadline, grace, now)
}

fn stop(pod: &mut Pod, cause: Cause, grace: Duration, now: Timestamp) -> Vec<Effect> {
    let (Some(job), Some(stage)) = (pod.job(), pod.stage()) else {
        return Vec::new();
    };
    let deadline = now + grace.saturating_add(pod.facts.timeouts.stop_slack);
    let (since, deadline) = match stage {
        // The containers were told before, and nobody extends their grace period.
        JobStage::Stopping {
            how: Ending::Told,
            deadline: known,
            ..
        } => (pod.since, deadline.min(*known)),
        // Leaving the queue told nobody.
        JobStage::Stopping {
            how: Ending::Dequeued | Ending::Cancelled,
            ..
        }
        | JobStage::Queued { .. }
        | JobStage::Running
        | JobStage::Lost { .. }
        | JobStage::Settling { .. } => (now, deadline),
    };
    let stage = JobStage::Stopping {
        cause,
        how: Ending::Told,
        deadline,
    };
    pod.enter_stage(stage, since);
    vec![
        Effect::Persist,
        Effect::Stop { job, grace },
        Effect::PollSoon,
    ]
}

/// The scheduler still knows a job that is being ended, or shows one again whose end seemed to have come.
pub(super) fn still_there(pod: &mut Pod, phase: JobPhase, now: Timestamp) -> Vec<Effect> {
    let (again, cause) = match pod.stage() {
        Some(JobStage::Stopping {
            how: Ending::Dequeued,
            cause,
            ..
        }) => (false, cause.clone()),
        Some(JobStage::Settling {
            cause: Some(cause), ..
        }) => (true, cause.clone()),
        Some(
            JobStage::Queued { .. }
            | JobStage::Running
            | JobStage::Stopping { .. }
            | JobStage::Lost { .. }
            | JobStage::Settling { .. },
        )
        | None => return Vec::new(),
    };
    match (phase, cause) {
        (JobPhase::Queued, cause) if again => dequeue(pod, cause, now),
        (JobPhase::Running, Cause::Deleted(_)) => tell(pod, now),
        // It started after all.
        (JobPhase::Running, Cause::NeverStarts(_) | Cause::Deadline) => {
            pod.enter_stage(JobStage::Running, now);
            vec![Effect::Persist]
        }
        (JobPhase::Queued | JobPhase::Ended, _) => Vec::new(),
    }
}

/// The deadline of a measure against the job has passed: takes the next, harder one.
pub(super) fn escalate(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let Some(job) = pod.job() else {
        return Vec::new();
    };
    let linked = pod.link;
    let Some(JobStage::Stopping { how, deadline, .. }) = pod.stage_mut() else {
        return Vec::new();
    };
    match how {
        Ending::Dequeued => {
            *deadline = now + CANCEL_AGAIN;
            let how = Cancel::Queued;
            vec![Effect::Cancel { job, how }, Effect::PollSoon]
        }
        Ending::Told | Ending::Cancelled => {
            *how = Ending::Cancelled;
            *deadline = now + CANCEL_AGAIN;
            // The scheduler may not answer, and the shim may.
            let (how, own) = (Cancel::Kill, job.clone());
            let grace = Duration::ZERO;
            let stop = linked.then_some(Effect::Stop { job: own, grace });
            let cancel = [Effect::Cancel { job, how }, Effect::PollSoon];
            [Effect::Persist]
                .into_iter()
                .chain(stop)
                .chain(cancel)
                .collect()
        }
    }
}

/// The effect that ends the job of the placement, if there is one.
pub(super) fn cancel(pod: &Pod, how: Cancel) -> Option<Effect> {
    pod.job().map(|job| Effect::Cancel { job, how })
}

/// Forgets a finished pod; any other is left as it is.
pub(super) fn forget(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    if !matches!(pod.state, State::Finished { .. }) {
        return Vec::new();
    }
    // Right after its final report a job is about to exit by itself.
    let lingers = now >= pod.since + LINGER;
    let surplus = cancel(pod, Cancel::Kill).filter(|_| lingers);
    pod.enter(State::Forgotten, now);
    surplus.into_iter().chain([Effect::Remove]).collect()
}
