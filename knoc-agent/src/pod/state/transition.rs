//! PURE: the transitions that steps of several states share, and the questions about a pod that decide between them.

use jiff::Timestamp;
use knoc_contract::exit_codes::ShimExit;

use super::{
    event::Effect,
    pod::{LOOK_AGAIN, Pod},
    states::{BeforeJob, JobStage, Look, Otherwise, State},
};
use crate::{
    pod::{
        outcome::{Cause, DEADLINE_EXCEEDED, Evidence, OVERDUE, Outcome, decide},
        placement::Placement,
    },
    scheduler::JobPhase,
};

/// Whether the shim's final report has arrived.
pub(super) fn reported(pod: &Pod) -> bool {
    pod.report.as_ref().is_some_and(|report| report.r#final)
}

/// Whether the scheduler has said that the job has ended.
pub(super) fn job_ended(pod: &Pod) -> bool {
    let phase = pod.view.as_ref().map(|view| view.state.phase());
    phase == Some(JobPhase::Ended)
}

/// Whether the shim of our job found that another job of this pod holds the claim.
pub(super) fn surplus(pod: &Pod) -> bool {
    let exit = pod.view.as_ref().and_then(|view| view.exit);
    pod.report.is_none() && exit.is_some_and(|exit| exit.code == ShimExit::Surplus.code())
}

/// Why the agent ends the pod if it is being deleted.
pub(super) fn deletion_cause(pod: &Pod) -> Option<Cause> {
    let deletion = pod.deletion.as_ref()?;
    Some(Cause::Deleted(deletion.reason.clone()))
}

/// The job of `placement` waits in the queue.
pub(super) fn queue(pod: &mut Pod, placement: Placement, now: Timestamp) {
    let stage = JobStage::Queued { never: None };
    pod.enter(State::WithJob { placement, stage }, now);
}

/// The job of `placement` has started.
pub(super) fn run(pod: &mut Pod, placement: Placement, now: Timestamp) -> Vec<Effect> {
    let job = placement.job();
    let nodes = pod.view.as_ref().map_or("", |view| view.nodes.as_str());
    let text = if nodes.is_empty() {
        format!("job {job} has started")
    } else {
        format!("job {job} has started on {nodes}")
    };
    pod.note(false, "SlurmJobStarted", text, now);
    let stage = JobStage::Running;
    pod.enter(State::WithJob { placement, stage }, now);
    pod.read_soon(now);
    vec![Effect::Persist]
}

/// It is not known which job is the pod's: the agent looks for it by name before anything else.
pub(super) fn look(pod: &mut Pod, message: String, now: Timestamp) -> Vec<Effect> {
    let look = Some(first_look(message, Otherwise::Submit, now));
    pod.enter_before_job(BeforeJob::Submitting { look }, now);
    vec![Effect::Persist, Effect::Find]
}

/// A search by name that has just begun.
pub(super) fn first_look(message: String, otherwise: Otherwise, now: Timestamp) -> Look {
    Look {
        tries: 0,
        at: now + LOOK_AGAIN,
        message,
        otherwise,
    }
}

/// Decides how the pod ended, and finishes it.
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
    if outcome.reason == DEADLINE_EXCEEDED {
        note_deadline(pod, now);
    }
    let may_linger = !job_ended(pod) && cause.is_none();
    let lingering = pod.placement().filter(|_| may_linger).cloned();
    finish(pod, outcome, lingering, now)
}

/// Notes once that the pod's deadline is over: the shim may have done so.
pub(super) fn note_deadline(pod: &mut Pod, now: Timestamp) {
    let mut notes = pod.notes.iter();
    if !notes.any(|note| note.reason == DEADLINE_EXCEEDED) {
        pod.note(false, DEADLINE_EXCEEDED, OVERDUE, now);
    }
}

/// Finishes a pod for which no job was ever accepted, because it was deleted.
pub(super) fn deleted_before_job(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let deletion = pod.deletion.as_ref();
    let message = deletion.map_or_else(String::new, |deletion| deletion.reason.clone());
    let outcome = Outcome {
        succeeded: false,
        reason: "Deleted".to_owned(),
        message,
        disruption: false,
        finished_at: now,
    };
    finish(pod, outcome, None, now)
}

/// Enters the last state. `lingering` is a placement whose job has not been seen to end yet.
pub(super) fn finish(
    pod: &mut Pod,
    outcome: Outcome,
    lingering: Option<Placement>,
    now: Timestamp,
) -> Vec<Effect> {
    let poll_soon = lingering.is_some();
    pod.enter(State::Finished { outcome, lingering }, now);
    let mut effects = vec![Effect::Persist, Effect::CleanUp];
    effects.extend(poll_soon.then_some(Effect::PollSoon));
    effects
}
