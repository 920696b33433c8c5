//! PURE: the steps that end a pod: deletion, a deadline that was lowered, the measures against its job, and the last state.

use std::time::Duration;

use jiff::Timestamp;

use super::{CANCEL_AGAIN, Deletion, ENDED_BY_US, Effect, Ending, LINGER, Pod, State, submit};
use crate::{
    pod::outcome::{Cause, Outcome},
    scheduler::{Cancel, JobPhase},
};

/// `DeletePod`: idempotent; a shorter grace re-arms downwards.
pub(super) fn delete(
    pod: &mut Pod,
    grace: Option<Duration>,
    reason: String,
    now: Timestamp,
) -> Vec<Effect> {
    let grace = grace.unwrap_or(pod.facts.grace);
    let shorter = pod
        .deletion
        .as_ref()
        .is_none_or(|known| grace < known.grace);
    if !shorter {
        return Vec::new();
    }
    let reason = pod.deletion.take().map_or(reason, |known| known.reason);
    pod.deletion = Some(Deletion {
        grace,
        reason: reason.clone(),
    });
    match &mut pod.state {
        // Staging may be under way: its answer is then ignored.
        State::Accepted | State::Staging { .. } | State::Throttled { .. } => {
            submit::deleted_before_job(pod, now)
        }
        // The answer of sbatch is awaited anyway.
        State::Submitting { .. } | State::Finished { .. } => vec![Effect::Persist],
        State::Settling { until, .. } => {
            *until = (*until).min(now + ENDED_BY_US);
            vec![Effect::Persist]
        }
        State::Queued { .. } => dequeue(pod, Cause::Deleted(reason), now),
        State::Stopping {
            how: Ending::Dequeued | Ending::Cancelled,
            cause,
            ..
        } => {
            if *cause != Cause::Deadline {
                *cause = Cause::Deleted(reason);
            }
            vec![Effect::Persist]
        }
        State::Running { .. }
        | State::Stopping {
            how: Ending::Told, ..
        } => tell(pod, now),
        State::Lost { .. } => {
            let mut effects = tell(pod, now);
            effects.extend(pod.job().map(|job| Effect::Cancel {
                job,
                how: Cancel::Queued,
            }));
            effects
        }
        State::Forgotten => Vec::new(),
    }
}

/// A queued job leaves the queue. Should it have started meanwhile, [`still_there`] tells its containers.
pub(super) fn dequeue(pod: &mut Pod, cause: Cause, now: Timestamp) -> Vec<Effect> {
    let Some(job) = pod.job() else {
        return Vec::new();
    };
    let deadline = now + CANCEL_AGAIN;
    let id = job.id.clone();
    pod.enter(
        State::Stopping {
            job: id,
            cause,
            how: Ending::Dequeued,
            deadline,
        },
        now,
    );
    vec![
        Effect::Persist,
        Effect::Cancel {
            job,
            how: Cancel::Queued,
        },
        Effect::Hurry,
    ]
}

/// The containers of a pod that is being deleted are told to end.
pub(super) fn tell(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let Some(Deletion { grace, reason }) = pod.deletion.clone() else {
        return Vec::new();
    };
    let overdue = matches!(
        pod.state,
        State::Stopping {
            cause: Cause::Deadline,
            ..
        }
    );
    let cause = if overdue {
        // It came first.
        Cause::Deadline
    } else {
        Cause::Deleted(reason)
    };
    stop(pod, cause, grace, now)
}

/// The pod's own deadline is over: its containers are told to end.
pub(super) fn overdue(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let grace = pod.facts.grace;
    stop(pod, Cause::Deadline, grace, now)
}

fn stop(pod: &mut Pod, cause: Cause, grace: Duration, now: Timestamp) -> Vec<Effect> {
    let Some(job) = pod.job() else {
        return Vec::new();
    };
    let deadline = now + grace.saturating_add(pod.facts.patience.stop_slack);
    let state = State::Stopping {
        job: job.id.clone(),
        cause,
        how: Ending::Told,
        deadline,
    };
    // The grace counts from the first telling, also after a restart; leaving the queue was none.
    let told = matches!(
        pod.state,
        State::Stopping {
            how: Ending::Told,
            ..
        }
    );
    if told {
        pod.state = state;
    } else {
        pod.enter(state, now);
    }
    vec![Effect::Persist, Effect::Stop { job, grace }, Effect::Hurry]
}

/// A job that is being ended is still known to the scheduler.
pub(super) fn still_there(pod: &mut Pod, phase: JobPhase, now: Timestamp) -> Vec<Effect> {
    let State::Stopping {
        how: Ending::Dequeued,
        cause,
        job,
        ..
    } = &pod.state
    else {
        return Vec::new();
    };
    match (phase, cause) {
        (JobPhase::Running, Cause::Deleted(_)) => tell(pod, now),
        // It started after all.
        (JobPhase::Running, Cause::NeverStarts(_) | Cause::Deadline) => {
            let job = job.clone();
            pod.enter(State::Running { job }, now);
            vec![Effect::Persist]
        }
        (JobPhase::Queued | JobPhase::Ended, _) => Vec::new(),
    }
}

/// The deadline of a measure has passed: the next, harder one.
pub(super) fn tick(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let Some(job) = pod.job() else {
        return Vec::new();
    };
    let grace = pod
        .deletion
        .as_ref()
        .map_or(pod.facts.grace, |deletion| deletion.grace);
    let slack = pod.facts.patience.stop_slack;
    let State::Stopping { how, deadline, .. } = &mut pod.state else {
        return Vec::new();
    };
    match how {
        Ending::Dequeued => {
            *deadline = now + CANCEL_AGAIN;
            vec![
                Effect::Cancel {
                    job,
                    how: Cancel::Queued,
                },
                Effect::Hurry,
            ]
        }
        // After a restart of the agent it is not known how far this went: the shim knows.
        Ending::Told if now < pod.since + grace.saturating_add(slack) => {
            *deadline = pod.since + grace.saturating_add(slack);
            vec![Effect::Stop { job, grace }, Effect::Hurry]
        }
        Ending::Told | Ending::Cancelled => {
            *how = Ending::Cancelled;
            *deadline = now + CANCEL_AGAIN;
            vec![
                Effect::Persist,
                Effect::Cancel {
                    job,
                    how: Cancel::Kill,
                },
                Effect::Hurry,
            ]
        }
    }
}

/// The last state. `lingering` is a job that has not been seen to end yet.
pub(super) fn finish(
    pod: &mut Pod,
    outcome: Outcome,
    lingering: Option<knoc_proto::ids::JobId>,
    now: Timestamp,
) -> Vec<Effect> {
    let hurry = lingering.is_some();
    pod.enter(State::Finished { outcome, lingering }, now);
    let mut effects = vec![Effect::Persist, Effect::CleanUp];
    effects.extend(hurry.then_some(Effect::Hurry));
    effects
}

/// Lets go of a finished pod; any other is left as it is.
pub(super) fn forget(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    match pod.state {
        State::Finished { .. } => {
            // Right after its final report a job is about to exit by itself.
            let surplus = pod.job().filter(|_| now >= pod.since + LINGER);
            let surplus = surplus.map(|job| Effect::Cancel {
                job,
                how: Cancel::Kill,
            });
            pod.enter(State::Forgotten, now);
            surplus.into_iter().chain([Effect::Remove]).collect()
        }
        State::Accepted
        | State::Staging { .. }
        | State::Throttled { .. }
        | State::Submitting { .. }
        | State::Queued { .. }
        | State::Running { .. }
        | State::Stopping { .. }
        | State::Lost { .. }
        | State::Settling { .. }
        | State::Forgotten => Vec::new(),
    }
}
