//! PURE: the machine of one pod: `step(pod, event, now) -> (pod, effects)`. The diagram is in [`super`].
//!
//! It uses no clock, no file and no process. Deadlines are part of the states and are reported by [`Pod::wake`]; the
//! actor sleeps until then and sends [`Event::Tick`]. The actor performs the effects in their order: a crash between them
//! is harmless because [`Effect::Persist`] comes before [`Effect::Submit`].
//!
//! [`State`] separates the pod from its placement. What is the same in all stages of a job (which job it is, what the
//! scheduler is asked about, that the placement follows the claim) is written once for [`State::WithJob`]. The steps lie
//! in layers, each of which uses only those before it: `transition`, `ending`, then `before_job`, `with_job` and
//! `report`, then `lookup`.

mod before_job;
mod ending;
mod event;
mod lookup;
mod pod;
mod report;
mod states;
mod timeouts;
mod transition;
mod with_job;

use jiff::Timestamp;
use knoc_proto::pb;

pub use event::{Effect, Event, Note};
pub(crate) use pod::nanos;
pub use pod::{Deletion, Facts, Pod};
pub use states::{BeforeJob, Ending, Failure, JobStage, Look, Otherwise, State, Trouble};
pub use timeouts::Timeouts;

/// One step of the machine.
#[must_use]
pub fn step(mut pod: Pod, event: Event, now: Timestamp) -> (Pod, Vec<Effect>) {
    let mut effects = match event {
        Event::Begin => begin(&mut pod, now),
        Event::Staged => before_job::staged(&mut pod, now),
        Event::StageFailed {
            container,
            image,
            reason,
            message,
        } => {
            let failure = Failure {
                container,
                image,
                reason,
                message,
            };
            before_job::stage_failed(&mut pod, failure, now)
        }
        Event::LookAgain => before_job::look_again(&mut pod),
        Event::Submitted(submitted) => before_job::submitted(&mut pod, submitted, now),
        Event::SubmitFailed { kind, message } => {
            before_job::submit_failed(&mut pod, kind, message, now)
        }
        Event::Found(jobs) => lookup::found(&mut pod, jobs, now),
        Event::FindFailed(message) => lookup::find_failed(&mut pod, message, now),
        Event::Round { jobs, missing } => with_job::round(&mut pod, jobs, missing, now),
        Event::Report(report) => report::report(&mut pod, *report, now),
        Event::Files {
            batch_tail,
            claimed,
        } => with_job::files(&mut pod, batch_tail, claimed, now),
        Event::Link(up) => link(&mut pod, up, now),
        Event::Delete { grace, reason } => ending::delete(&mut pod, grace, reason, now),
        Event::Update(facts) => {
            pod.facts = facts;
            vec![Effect::Persist]
        }
        Event::Note(note) => {
            pod.push_note(pb::PodNote {
                warning: note.warning,
                reason: note.reason.to_owned(),
                message: note.message,
                container: note.container,
                at: nanos(now),
                ..pb::PodNote::default()
            });
            Vec::new()
        }
        Event::Tick => tick(&mut pod, now),
        Event::Forget => ending::forget(&mut pod, now),
    };
    effects.extend(ending::obey_deletion(&mut pod, now));
    (pod, effects)
}

/// The link to the shim was established, or broke.
fn link(pod: &mut Pod, up: bool, now: Timestamp) -> Vec<Effect> {
    pod.link = up;
    pod.read_soon(now);
    if up {
        return ending::tell_again(pod, now).into_iter().collect();
    }
    // A link that breaks may mean that the job has ended.
    pod.job().map(|_| Effect::PollSoon).into_iter().collect()
}

/// The actor has started, perhaps after a restart of the agent: no effect that the state waits for is under way.
fn begin(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let mut effects = report::resume(pod, now);
    if !effects.is_empty() {
        effects.push(Effect::PollSoon);
        return effects;
    }
    match &pod.state {
        State::BeforeJob(_) => before_job::begin(pod, now),
        State::WithJob { .. } => with_job::begin(pod, now),
        // The agent may have died after it wrote the record and before it removed the values.
        State::Finished { lingering, .. } => {
            let mut effects = vec![Effect::CleanUp];
            effects.extend(lingering.as_ref().map(|_| Effect::PollSoon));
            effects
        }
        State::Forgotten => Vec::new(),
    }
}

fn tick(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    if pod.wake().is_none_or(|at| now < at) {
        return Vec::new();
    }
    match &pod.state {
        State::BeforeJob(_) => before_job::tick(pod, now),
        State::WithJob { .. } => with_job::tick(pod, now),
        State::Finished { .. } | State::Forgotten => Vec::new(),
    }
}

#[cfg(test)]
mod tests;
