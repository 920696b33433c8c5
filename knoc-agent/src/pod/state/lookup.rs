//! PURE: the search by name for a job that may have been accepted.

use jiff::Timestamp;
use knoc_contract::exit_codes::ShimExit;

use super::{
    before_job::{back_off, rejected},
    event::Effect,
    pod::{LOOK_AGAIN, LOOKS, Pod},
    states::{BeforeJob, Look, Otherwise, State},
    transition::{conclude, deletion_cause, queue, surplus},
    with_job,
};
use crate::{
    pod::placement::Placement,
    scheduler::{JobPhase, JobView},
};

/// The search found `jobs`. The one that may be alive is the pod's; the others are surplus.
pub(super) fn found(pod: &mut Pod, jobs: Vec<JobView>, now: Timestamp) -> Vec<Effect> {
    let State::BeforeJob(BeforeJob::Submitting { look: Some(look) }) = &pod.state else {
        return Vec::new();
    };
    let Some(best) = best(&jobs) else {
        let look = look.clone();
        return not_found(pod, look, !jobs.is_empty(), now);
    };
    let (job, found_by) = (best.id.clone(), found_by(best));
    let text = format!("job {job} was found again by its {found_by}");
    pod.note(false, "SlurmJobSubmitted", text, now);
    queue(pod, Placement::own_job(job), now);
    pod.view = None;
    pod.sbatch = None;
    let mut effects = vec![Effect::Persist];
    effects.extend(with_job::round(pod, jobs, false, now));
    effects
}

/// Picks one of several jobs: first one that is definitely ours; then a running job before a queued
/// one before one that has ended; then the newest. Never one that lost the claim.
fn best(jobs: &[JobView]) -> Option<&JobView> {
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
    best.map(|(_, view)| view)
}

/// The search found no job that may be alive. `others` is set if it found jobs that lost the claim.
fn not_found(pod: &mut Pod, look: Look, others: bool, now: Timestamp) -> Vec<Effect> {
    let tries = look.tries + 1;
    if tries < LOOKS {
        let at = now + LOOK_AGAIN;
        let look = Some(Look { tries, at, ..look });
        pod.state = State::BeforeJob(BeforeJob::Submitting { look });
        return Vec::new();
    }
    if surplus(pod) || others {
        // Another job holds the claim, so a further submission would fail in the same way.
        let cause = deletion_cause(pod);
        return conclude(pod, cause.as_ref(), now);
    }
    match look.otherwise {
        Otherwise::Submit => back_off(pod, "SubmissionUncertain", look.message, None, now),
        Otherwise::Reject => rejected(pod, look.message, now),
    }
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

/// The search itself failed. That tells nothing about the job, so it does not count as a search.
pub(super) fn find_failed(pod: &mut Pod, message: String, now: Timestamp) -> Vec<Effect> {
    let pause = pod.pause(0);
    if let State::BeforeJob(BeforeJob::Submitting { look: Some(look) }) = &mut pod.state {
        look.at = now + pause;
        look.message = message;
    }
    Vec::new()
}
