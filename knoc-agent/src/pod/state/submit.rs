//! PURE: the steps up to the job: staging, submission, and looking for a job that may have been accepted.

use std::time::Duration;

use jiff::Timestamp;
use knoc_contract::exit_codes::ShimExit;

use super::{Effect, LOOK_AGAIN, LOOKS, Look, Otherwise, Pod, State, Trouble, ending, job};
use crate::{
    pod::outcome::{Cause, Outcome},
    scheduler::{Cancel, JobPhase, JobView, RefusalKind, Submitted},
};

/// Shown right after a failed pull …
pub(super) const ERR_IMAGE_PULL: &str = "ErrImagePull";
/// … and from then on until the next one.
const IMAGE_PULL_BACK_OFF: &str = "ImagePullBackOff";
/// The longest pause while the controller is away.
const AWAY_PAUSE_MAX: Duration = Duration::from_secs(30);
/// How long the error itself is shown.
pub(super) const SHOW_ERROR: Duration = Duration::from_secs(1);

/// The actor has started: the effect that the state waits for is under way nowhere.
pub(super) fn begin(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let mut effects = job::resume(pod, now);
    if !effects.is_empty() {
        effects.push(Effect::Hurry);
        return effects;
    }
    match &mut pod.state {
        State::Accepted => {
            if pod.deletion.is_some() {
                return deleted_before_job(pod, now);
            }
            pod.enter(
                State::Staging {
                    tries: 0,
                    trouble: None,
                },
                now,
            );
            vec![Effect::Stage]
        }
        State::Staging { trouble, .. } => {
            *trouble = None;
            vec![Effect::Stage]
        }
        // The agent died between the intent and the answer: the job may exist.
        State::Submitting { look } => {
            let message = "the agent was restarted during the submission".to_owned();
            *look = Some(Look {
                tries: 0,
                at: now + LOOK_AGAIN,
                message,
                otherwise: Otherwise::Submit,
            });
            vec![Effect::Find]
        }
        State::Queued { .. }
        | State::Running { .. }
        | State::Lost { .. }
        | State::Settling { .. } => vec![Effect::ReadFiles, Effect::Hurry],
        State::Stopping { deadline, .. } => {
            *deadline = now;
            vec![Effect::ReadFiles, Effect::Hurry]
        }
        // The agent may have died between the record and the values.
        State::Finished { lingering, .. } => {
            let mut effects = vec![Effect::CleanUp];
            effects.extend(lingering.as_ref().map(|_| Effect::Hurry));
            effects
        }
        State::Throttled { .. } | State::Forgotten => Vec::new(),
    }
}

pub(super) fn staged(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    if !matches!(pod.state, State::Staging { .. }) {
        return Vec::new();
    }
    submit(pod, now)
}

fn submit(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    if pod.deletion.is_some() {
        return deleted_before_job(pod, now);
    }
    pod.attempt += 1;
    pod.sbatch = None;
    pod.enter(State::Submitting { look: None }, now);
    vec![Effect::Persist, Effect::Submit]
}

pub(super) fn stage_failed(
    pod: &mut Pod,
    container: String,
    reason: String,
    message: String,
    now: Timestamp,
) -> Vec<Effect> {
    let State::Staging { tries, .. } = pod.state else {
        return Vec::new();
    };
    if pod.deletion.is_some() {
        return deleted_before_job(pod, now);
    }
    let text = format!("{reason}: {message}");
    pod.note_of(&container, true, "Failed", text, now);
    let retry_at = now + pod.pause(tries);
    let trouble = Trouble {
        container,
        reason,
        message,
        since: now,
        retry_at,
    };
    pod.state = State::Staging {
        tries: tries + 1,
        trouble: Some(trouble),
    };
    Vec::new()
}

pub(super) fn submitted(pod: &mut Pod, submitted: Submitted, now: Timestamp) -> Vec<Effect> {
    let call = Some((submitted.began, submitted.ended));
    let State::Submitting { .. } = pod.state else {
        // An answer nobody waits for: the machine went on by another way; the round will sort the job out.
        if pod.job().is_some_and(|job| job.id == submitted.job) {
            pod.sbatch = call;
        }
        return vec![Effect::Hurry];
    };
    pod.sbatch = call;
    let text = format!("job {} was submitted", submitted.job);
    pod.note(false, "SlurmJobSubmitted", text, now);
    for text in submitted.notes {
        pod.note(false, "SlurmRequestChanged", text, now);
    }
    pod.enter(
        State::Queued {
            job: submitted.job,
            never: None,
        },
        now,
    );
    let mut effects = vec![Effect::Persist, Effect::Hurry];
    if let Some(deletion) = pod.deletion.clone() {
        effects.extend(ending::dequeue(pod, Cause::Deleted(deletion.reason), now));
    }
    effects
}

pub(super) fn refused(
    pod: &mut Pod,
    kind: RefusalKind,
    words: String,
    now: Timestamp,
) -> Vec<Effect> {
    let State::Submitting { .. } = pod.state else {
        return Vec::new();
    };
    let otherwise = match kind {
        RefusalKind::Ambiguous => Some(Otherwise::Submit),
        RefusalKind::NoJobId => Some(Otherwise::Refuse),
        RefusalKind::Permanent | RefusalKind::Throttled | RefusalKind::ControllerAway => None,
    };
    if let Some(otherwise) = otherwise {
        let look = Look {
            tries: 0,
            at: now + LOOK_AGAIN,
            message: words,
            otherwise,
        };
        pod.state = State::Submitting { look: Some(look) };
        return vec![Effect::Find];
    }
    match kind {
        RefusalKind::Throttled => back_off(pod, "Throttled", words, None, now),
        // Nothing tells when it is back; one that is away refuses cheaply.
        RefusalKind::ControllerAway => {
            let longest = Some(AWAY_PAUSE_MAX);
            back_off(pod, "SchedulerUnavailable", words, longest, now)
        }
        RefusalKind::Permanent | RefusalKind::Ambiguous | RefusalKind::NoJobId => {
            rejected(pod, words, now)
        }
    }
}

/// The same request would be refused again.
fn rejected(pod: &mut Pod, words: String, now: Timestamp) -> Vec<Effect> {
    if pod.deletion.is_some() {
        return deleted_before_job(pod, now);
    }
    pod.note(true, "SlurmRejected", words.clone(), now);
    let outcome = Outcome {
        succeeded: false,
        reason: "Rejected".to_owned(),
        message: words,
        disruption: false,
        finished_at: now,
    };
    ending::finish(pod, outcome, None, now)
}

/// The job is submitted again after a pause, at most `longest`. Nothing is submitted again in another way.
fn back_off(
    pod: &mut Pod,
    reason: &str,
    words: String,
    longest: Option<Duration>,
    now: Timestamp,
) -> Vec<Effect> {
    if pod.deletion.is_some() {
        return deleted_before_job(pod, now);
    }
    pod.note(true, reason, words.clone(), now);
    // The attempt counts the failures in a row as well as need be: each made one.
    let tries = pod.attempt;
    let pause = pod.pause(tries.saturating_sub(1));
    let retry_at = now + longest.map_or(pause, |longest| pause.min(longest));
    pod.enter(
        State::Throttled {
            tries,
            reason: reason.to_owned(),
            message: words,
            retry_at,
        },
        now,
    );
    vec![Effect::Persist]
}

/// The jobs of this pod, by name. The one that may be alive is ours; others are surplus.
pub(super) fn found(pod: &mut Pod, jobs: Vec<JobView>, now: Timestamp) -> Vec<Effect> {
    let State::Submitting { look: Some(look) } = &pod.state else {
        return Vec::new();
    };
    let (look, message, otherwise) = (look.tries + 1, look.message.clone(), look.otherwise);
    // One that surely is ours; one that runs before one that waits before one that ended; else the newest. Never one that
    // lost the claim.
    let surplus = ShimExit::Surplus.code();
    let lost_claim = |view: &JobView| view.exit.is_some_and(|exit| exit.code == surplus);
    let candidates = jobs.iter().filter(|view| !lost_claim(view)).enumerate();
    let best = candidates.min_by_key(|(n, view)| {
        let rank = match view.state.phase() {
            JobPhase::Running => 0,
            JobPhase::Queued => 1,
            JobPhase::Ended => 2,
        };
        (!view.marks.sure(), rank, *n)
    });
    let Some((_, best)) = best else {
        if look < LOOKS {
            let look = Look {
                tries: look,
                at: now + LOOK_AGAIN,
                message,
                otherwise,
            };
            pod.state = State::Submitting { look: Some(look) };
            return Vec::new();
        }
        if job::surplus(pod) || !jobs.is_empty() {
            // Submitted again it would find the claim taken again.
            let cause = pod
                .deletion
                .clone()
                .map(|deletion| Cause::Deleted(deletion.reason));
            return job::conclude(pod, cause.as_ref(), now);
        }
        return match otherwise {
            Otherwise::Submit => back_off(pod, "SubmissionUncertain", message, None, now),
            Otherwise::Refuse => rejected(pod, message, now),
        };
    };
    let job = best.id.clone();
    let text = format!("job {job} was found again by its {}", found_by(best));
    pod.note(false, "SlurmJobSubmitted", text, now);
    pod.enter(State::Queued { job, never: None }, now);
    pod.view = None;
    pod.sbatch = None;
    let mut effects = vec![Effect::Persist];
    effects.extend(job::round(pod, jobs, false, now));
    match (pod.deletion.clone(), &pod.state) {
        (Some(deletion), State::Queued { .. }) => {
            effects.extend(ending::dequeue(pod, Cause::Deleted(deletion.reason), now));
        }
        (Some(_), State::Running { .. }) => effects.extend(ending::tell(pod, now)),
        (Some(_) | None, _) => {}
    }
    effects
}

fn found_by(view: &JobView) -> &'static str {
    if view.marks.name {
        "name"
    } else if view.marks.comment {
        "comment"
    } else {
        "working directory"
    }
}

/// It is not known which job is the pod's: looks by name before anything else.
pub(super) fn look(pod: &mut Pod, message: String, now: Timestamp) -> Vec<Effect> {
    let look = Look {
        tries: 0,
        at: now + LOOK_AGAIN,
        message,
        otherwise: Otherwise::Submit,
    };
    pod.enter(State::Submitting { look: Some(look) }, now);
    vec![Effect::Persist, Effect::Find]
}

pub(super) fn find_failed(pod: &mut Pod, message: String, now: Timestamp) -> Vec<Effect> {
    let pause = pod.pause(0);
    if let State::Submitting { look: Some(look) } = &mut pod.state {
        // A look that failed says nothing: it does not count.
        look.at = now + pause;
        look.message = message;
    }
    Vec::new()
}

pub(super) fn tick(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    match &mut pod.state {
        State::Staging { trouble, .. } => {
            let Some(waiting) = trouble else {
                return Vec::new();
            };
            if now < waiting.retry_at {
                // Once, however often it is looked at.
                if waiting.reason == ERR_IMAGE_PULL {
                    let Trouble {
                        container,
                        reason,
                        message,
                        ..
                    } = waiting;
                    *message = format!("Back-off pulling image: {reason}: {message}");
                    IMAGE_PULL_BACK_OFF.clone_into(reason);
                    let (container, text) = (container.clone(), message.clone());
                    pod.note_of(&container, false, "BackOff", text, now);
                }
                return Vec::new();
            }
            *trouble = None;
            vec![Effect::Stage]
        }
        State::Throttled { .. } => submit(pod, now),
        State::Submitting { look: Some(look) } => {
            look.at = now + Duration::from_mins(1);
            vec![Effect::Find]
        }
        State::Submitting { look: None }
        | State::Accepted
        | State::Queued { .. }
        | State::Running { .. }
        | State::Stopping { .. }
        | State::Lost { .. }
        | State::Settling { .. }
        | State::Finished { .. }
        | State::Forgotten => Vec::new(),
    }
}

/// No job was ever accepted.
pub(super) fn deleted_before_job(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let message = pod
        .deletion
        .as_ref()
        .map_or_else(String::new, |d| d.reason.clone());
    let outcome = Outcome {
        succeeded: false,
        reason: "Deleted".to_owned(),
        message,
        disruption: false,
        finished_at: now,
    };
    ending::finish(pod, outcome, None, now)
}

/// A surplus job that has not started leaves the queue; one that runs ends by the claim. One that hardly names the pod
/// is left alone: a program of the pod may have submitted it.
pub(super) fn cancel_surplus(pod: &mut Pod, jobs: &[JobView], now: Timestamp) -> Vec<Effect> {
    let Some(own) = pod.job() else {
        return Vec::new();
    };
    let surplus: Vec<_> = jobs
        .iter()
        .filter(|view| {
            view.id != own.id && view.marks.sure() && view.state.phase() == JobPhase::Queued
        })
        .map(JobView::job)
        .collect();
    for job in &surplus {
        let text = format!(
            "job {} is surplus and was cancelled; {} is the pod's",
            job.id, own.id
        );
        pod.note(true, "SlurmJobSurplus", text, now);
    }
    surplus
        .into_iter()
        .map(|job| Effect::Cancel {
            job,
            how: Cancel::Queued,
        })
        .collect()
}
