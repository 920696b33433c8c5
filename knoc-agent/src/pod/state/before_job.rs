//! PURE: the steps up to the job: staging and submission.

use std::time::Duration;

use jiff::Timestamp;

use super::{
    event::Effect,
    pod::Pod,
    states::{
        BeforeJob, ERR_IMAGE_PULL, Failure, IMAGE_PULL_BACK_OFF, INVALID_IMAGE_NAME, Otherwise,
        State, Trouble,
    },
    transition::{deleted_before_job, finish, first_look, queue},
};
use crate::{
    pod::{outcome::Outcome, placement::Placement},
    scheduler::{SubmitErrorKind, Submitted},
};

/// The longest pause while the controller is away.
const AWAY_PAUSE_MAX: Duration = Duration::from_secs(30);

/// The actor has started: nothing that the state waits for is under way.
pub(super) fn begin(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let State::BeforeJob(before) = &mut pod.state else {
        return Vec::new();
    };
    match before {
        BeforeJob::Accepted if pod.deletion.is_some() => deleted_before_job(pod, now),
        BeforeJob::Accepted => {
            let (tries, trouble) = (0, None);
            pod.enter_before_job(BeforeJob::Staging { tries, trouble }, now);
            vec![Effect::Stage]
        }
        BeforeJob::Staging { trouble, .. } => {
            *trouble = None;
            vec![Effect::Stage]
        }
        // The agent died after it wrote the intent and before sbatch answered: the job may exist.
        BeforeJob::Submitting { look } => {
            let message = "the agent was restarted during the submission".to_owned();
            *look = Some(first_look(message, Otherwise::Submit, now));
            vec![Effect::Find]
        }
        BeforeJob::Throttled { .. } => Vec::new(),
    }
}

pub(super) fn staged(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    if !matches!(pod.state, State::BeforeJob(BeforeJob::Staging { .. })) {
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
    pod.enter_before_job(BeforeJob::Submitting { look: None }, now);
    vec![Effect::Persist, Effect::Submit]
}

pub(super) fn stage_failed(pod: &mut Pod, failure: Failure, now: Timestamp) -> Vec<Effect> {
    let State::BeforeJob(BeforeJob::Staging { tries, .. }) = pod.state else {
        return Vec::new();
    };
    if pod.deletion.is_some() {
        return deleted_before_job(pod, now);
    }
    note_failure(pod, &failure, now);
    let retry_at = now + pod.pause(tries);
    let trouble = Trouble {
        failure,
        since: now,
        retry_at,
    };
    pod.state = State::BeforeJob(BeforeJob::Staging {
        tries: tries + 1,
        trouble: Some(trouble),
    });
    Vec::new()
}

/// Records a failure in the words of a kubelet.
fn note_failure(pod: &mut Pod, failure: &Failure, now: Timestamp) {
    let Failure {
        container,
        image,
        reason,
        message,
    } = failure;
    let (event, text) = match reason.as_str() {
        _ if image.is_empty() => {
            let text = format!("{reason}: {message}");
            pod.note_of(container, true, "Failed", text, now);
            return;
        }
        ERR_IMAGE_PULL => (
            "Failed",
            format!("Failed to pull image {image:?}: {message}"),
        ),
        INVALID_IMAGE_NAME => ("InspectFailed", message.clone()),
        reason => (reason, message.clone()),
    };
    pod.note_again(container, true, event, text, now);
    pod.note_again(container, true, "Failed", format!("Error: {reason}"), now);
}

/// Looks up the images at once: they, or their credentials, are others now.
pub(super) fn look_again(pod: &mut Pod) -> Vec<Effect> {
    match &mut pod.state {
        State::BeforeJob(BeforeJob::Staging { tries, trouble }) => {
            *tries = 0;
            *trouble = None;
            vec![Effect::Stage]
        }
        State::BeforeJob(_) | State::WithJob { .. } | State::Finished { .. } | State::Forgotten => {
            Vec::new()
        }
    }
}

pub(super) fn submitted(pod: &mut Pod, submitted: Submitted, now: Timestamp) -> Vec<Effect> {
    let call = Some((submitted.began, submitted.ended));
    let State::BeforeJob(BeforeJob::Submitting { .. }) = pod.state else {
        // Nobody waits for this answer: the machine has learnt of the job in another way, or the
        // next round will find it.
        if pod.job().is_some_and(|job| job.id == submitted.job) {
            pod.sbatch = call;
        }
        return vec![Effect::PollSoon];
    };
    pod.sbatch = call;
    let text = format!("job {} was submitted", submitted.job);
    pod.note(false, "SlurmJobSubmitted", text, now);
    for text in submitted.notes {
        pod.note(false, "SlurmRequestChanged", text, now);
    }
    queue(pod, Placement::own_job(submitted.job), now);
    vec![Effect::Persist, Effect::PollSoon]
}

pub(super) fn submit_failed(
    pod: &mut Pod,
    kind: SubmitErrorKind,
    message: String,
    now: Timestamp,
) -> Vec<Effect> {
    let State::BeforeJob(BeforeJob::Submitting { look }) = &mut pod.state else {
        return Vec::new();
    };
    let otherwise = match kind {
        SubmitErrorKind::Ambiguous => Otherwise::Submit,
        SubmitErrorKind::NoJobId => Otherwise::Reject,
        SubmitErrorKind::Throttled => return back_off(pod, "Throttled", message, None, now),
        // Nothing announces that the controller is back, and a call while it is away costs little.
        SubmitErrorKind::ControllerAway => {
            let longest = Some(AWAY_PAUSE_MAX);
            return back_off(pod, "SchedulerUnavailable", message, longest, now);
        }
        SubmitErrorKind::Permanent => return rejected(pod, message, now),
    };
    *look = Some(first_look(message, otherwise, now));
    vec![Effect::Find]
}

/// Fails the pod, because the scheduler would refuse the same request again.
pub(super) fn rejected(pod: &mut Pod, message: String, now: Timestamp) -> Vec<Effect> {
    if pod.deletion.is_some() {
        return deleted_before_job(pod, now);
    }
    pod.note(true, "SlurmRejected", message.clone(), now);
    let outcome = Outcome {
        succeeded: false,
        reason: "Rejected".to_owned(),
        message,
        disruption: false,
        finished_at: now,
    };
    finish(pod, outcome, None, now)
}

/// Submits the same job again after a pause of at most `longest`. No other path repeats a submission.
pub(super) fn back_off(
    pod: &mut Pod,
    reason: &str,
    message: String,
    longest: Option<Duration>,
    now: Timestamp,
) -> Vec<Effect> {
    if pod.deletion.is_some() {
        return deleted_before_job(pod, now);
    }
    pod.note(true, reason, message.clone(), now);
    // The number of attempts is the number of failures in a row: each failure made one.
    let tries = pod.attempt;
    let pause = pod.pause(tries.saturating_sub(1));
    let retry_at = now + longest.map_or(pause, |longest| pause.min(longest));
    let throttled = BeforeJob::Throttled {
        tries,
        reason: reason.to_owned(),
        message,
        retry_at,
    };
    pod.enter_before_job(throttled, now);
    vec![Effect::Persist]
}

pub(super) fn tick(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let State::BeforeJob(before) = &mut pod.state else {
        return Vec::new();
    };
    match before {
        BeforeJob::Staging { trouble, .. } => match trouble {
            Some(waiting) if now < waiting.retry_at => {
                show_back_off(pod, now);
                Vec::new()
            }
            Some(_) => {
                *trouble = None;
                vec![Effect::Stage]
            }
            None => Vec::new(),
        },
        BeforeJob::Throttled { .. } => submit(pod, now),
        BeforeJob::Submitting { look: Some(look) } => {
            look.at = now + Duration::from_mins(1);
            vec![Effect::Find]
        }
        BeforeJob::Submitting { look: None } | BeforeJob::Accepted => Vec::new(),
    }
}

/// After a failed pull, shows the error first and then the back-off, once for each failure.
fn show_back_off(pod: &mut Pod, now: Timestamp) {
    let State::BeforeJob(BeforeJob::Staging {
        trouble: Some(trouble),
        ..
    }) = &mut pod.state
    else {
        return;
    };
    let failure = &mut trouble.failure;
    if failure.reason != ERR_IMAGE_PULL {
        return;
    }
    let text = format!("Back-off pulling image {:?}", failure.image);
    failure.message = format!("{text}: {}: {}", failure.reason, failure.message);
    IMAGE_PULL_BACK_OFF.clone_into(&mut failure.reason);
    let container = failure.container.clone();
    pod.note_again(&container, false, "BackOff", text, now);
    let text = format!("Error: {IMAGE_PULL_BACK_OFF}");
    pod.note_again(&container, true, "Failed", text, now);
}
