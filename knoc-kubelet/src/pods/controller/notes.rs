//! Records what the agent reports of a pod as Events, each once: its notes, and the changes of containers.
//!
//! A note about the queue is held as long as messages may wait: if the job starts meanwhile, the note of its start says
//! enough.
//!
//! Changes of containers are read from their current state: a container's id names one attempt, so `Created` and
//! `Started` are recorded once for each attempt, however many observations were missed. Those of all attempts after the
//! first are one Event, which counts them, as with a kubelet.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use knoc_proto::pb::{self, container_status::State};
use knoc_translate::JOB_ID;
use tokio::time::Instant;

use super::worker::Worker;
use crate::pods::{
    events::{Note, about_pod},
    resize, status,
    store::PodView,
};

/// Reasons of a waiting container that are failures. For failures of images the agent sends notes.
const FAILURES: &[&str] = &[
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
];

/// How the names of annotations begin that are read when a pod is accepted.
const OPTIONS: [&str; 4] = [
    "knoc.io/",
    "slurm-job.knoc.io/",
    "slurm-job.vk.io/",
    "slurm.hpk.io/",
];

/// Notes older than this at the start of the process were recorded by an earlier process.
const EARLIER: SignedDuration = SignedDuration::from_secs(120);

/// Notes about the queue. Each is replaced by any later note of [`REPLACING`].
const QUEUE: &[&str] = &["SlurmJobPending", "SlurmJobSubmitted"];
const REPLACING: &[&str] = &[
    "SlurmJobNeverStarts",
    "SlurmJobPending",
    "SlurmJobStarted",
    "SlurmJobSubmitted",
];

impl Worker<'_> {
    pub(super) fn record_notes(&mut self, view: &PodView) {
        let Some(observed) = &view.observed else {
            return;
        };
        let first = self.memory.events.note.is_none();
        let told = self.memory.events.note.unwrap_or(i64::MIN);
        let started = self.context.process.started;
        let new = observed.notes.iter().filter(|note| note.sequence > told);
        let new: Vec<_> = new.collect();
        let ended = observed.phase() == pb::PodPhase::Finished;
        let held = self.holds(new.last().filter(|_| !ended));
        for (index, note) in new.iter().enumerate() {
            let later = new.get(index + 1..).unwrap_or_default();
            if later.is_empty() && held {
                break;
            }
            if replaced(note, later) {
                self.memory.events.note = Some(note.sequence);
                continue;
            }
            let at = Timestamp::from_nanosecond(i128::from(note.at)).unwrap_or_default();
            self.memory.events.note = Some(note.sequence);
            let (since, salt) = since_and_salt(note, started);
            if first && at < since {
                continue;
            }
            self.context.api.events.record(Note {
                object: about_pod(&view.pod, &note.container),
                warning: note.warning,
                reason: note.reason.clone(),
                message: note.message.clone(),
                at,
                salt,
                times: note.count,
            });
        }
    }

    /// Is the newest note held, because it is about the queue and young?
    fn holds(&mut self, newest: Option<&&pb::PodNote>) -> bool {
        let newest = newest.filter(|note| QUEUE.contains(&note.reason.as_str()));
        if newest.is_none() {
            self.memory.events.held_since = None;
            return false;
        }
        let now = Instant::now();
        let since = *self.memory.events.held_since.get_or_insert(now);
        let left = self
            .patience()
            .messages
            .saturating_sub(now.duration_since(since));
        if left.is_zero() {
            self.memory.events.held_since = None;
            return false;
        }
        self.revisit_in(left);
        true
    }

    /// Records `Created`, `Started`, `BackOff` and `Failed` of containers.
    pub(super) fn record_containers(&mut self, view: &PodView) {
        let Some(observed) = &view.observed else {
            return;
        };
        let since = self
            .context
            .process
            .started
            .checked_sub(EARLIER)
            .unwrap_or(Timestamp::MIN);
        for status in observed_containers(observed) {
            match &status.state {
                Some(State::Running(running)) => {
                    self.record_start(view, status, running.started_at, since);
                }
                Some(State::Terminated(ended)) => {
                    self.record_start(view, status, ended.started_at, since);
                }
                Some(State::Waiting(waiting)) => self.record_waiting(view, status, waiting, since),
                None => {}
            }
        }
    }

    fn record_start(
        &mut self,
        view: &PodView,
        status: &pb::ContainerStatus,
        started_at: i64,
        since: Timestamp,
    ) {
        let Ok(at) = Timestamp::from_nanosecond(i128::from(started_at)) else {
            return;
        };
        let once = hash(&(&status.name, &status.container_id));
        if started_at == 0 || at < since || !self.memory.events.once.insert(once) {
            return;
        }
        let earlier = at < self.context.process.started && is_published(&view.pod, status);
        if earlier && status.restart_count > 0 {
            // An earlier process has counted it.
            return;
        }
        let name = &status.name;
        let salt = salt_of_attempt(status.restart_count, once, self.context.process.started);
        for (reason, verb) in [("Created", "Created"), ("Started", "Started")] {
            let message = format!("{verb} container {name}");
            self.record_container(view, name, false, (reason, message), at, salt);
        }
    }

    fn record_waiting(
        &mut self,
        view: &PodView,
        status: &pb::ContainerStatus,
        waiting: &pb::Waiting,
        since: Timestamp,
    ) {
        if let Some(last) = &status.last_termination {
            // A short attempt was seen neither running nor terminated.
            let last = pb::ContainerStatus {
                container_id: last.container_id.clone(),
                name: status.name.clone(),
                restart_count: status.restart_count,
                state: Some(State::Terminated(last.clone())),
                ..pb::ContainerStatus::default()
            };
            if let Some(State::Terminated(ended)) = &last.state {
                self.record_start(view, &last, ended.started_at, since);
            }
        }
        let reason = match waiting.reason.as_str() {
            "CrashLoopBackOff" => "BackOff",
            failure if FAILURES.contains(&failure) => "Failed",
            _ => return,
        };
        let once = hash(&(
            &status.name,
            &waiting.reason,
            &waiting.message,
            status.restart_count,
        ));
        let started = self.context.process.started;
        let counted = status.restart_count > 0 && waited_before(&view.pod, status, started);
        if self.memory.events.once.insert(once) && !counted {
            let salt = salt_of_attempt(status.restart_count, once, started);
            let message = match waiting.reason.as_str() {
                "CrashLoopBackOff" => back_off(&view.pod, &status.name),
                _ => format!("Error: {}", waiting.message),
            };
            let now = Timestamp::now();
            self.record_container(view, &status.name, true, (reason, message), now, salt);
        }
    }

    /// Records `Killing` for each container that runs.
    pub(super) fn record_killing(&mut self, view: &PodView) {
        let Some(observed) = &view.observed else {
            return;
        };
        let now = Timestamp::now();
        for status in observed_containers(observed) {
            let salt = hash(&("Killing", &status.name, &status.container_id));
            let runs = matches!(status.state, Some(State::Running(_)));
            if runs && self.memory.events.once.insert(salt) {
                let message = format!("Stopping container {}", status.name);
                self.record_container(view, &status.name, false, ("Killing", message), now, salt);
            }
        }
    }

    /// Records a warning that each further round would repeat: once for each pod and message.
    pub(super) fn record_once(&mut self, pod: &Pod, reason: &str, message: &str) {
        if self.memory.events.once.insert(hash(&(reason, message))) {
            self.record(pod, true, reason, message);
        }
    }

    /// Somebody asks for other resources than the pod has.
    pub(super) fn record_resize(&mut self, pod: &Pod) {
        if resize::is_asked(pod) {
            let message = format!("Pod resize infeasible: {}", resize::INFEASIBLE);
            self.record_once(pod, "ResizeInfeasible", &message);
        }
    }

    /// Somebody changed annotations that say how the job is submitted, and nothing else: that makes no newer generation, so the
    /// agent is not sent the pod again.
    pub(super) fn record_late_options(&mut self, pod: &Pod) {
        let now = (pod.metadata.generation.unwrap_or(1), options(pod));
        let before = self.memory.admission.options.replace(now.clone());
        let Some((_, before)) = before.filter(|(generation, _)| *generation == now.0) else {
            return;
        };
        if before == now.1 || status::is_terminal(pod) || !self.accepted(pod) {
            return;
        }
        let names = before.keys().chain(now.1.keys());
        let mut changed: Vec<_> = names
            .filter(|name| before.get(*name) != now.1.get(*name))
            .map(String::as_str)
            .collect();
        changed.sort_unstable();
        changed.dedup();
        let changed = changed.join(", ");
        let message =
            format!("metadata.annotations: {changed}: read only when the pod is accepted");
        self.record_unsupported_change(pod, &message);
    }

    /// An accepted pod was changed to something that does not run here. It goes on as it was accepted.
    pub(super) fn record_unsupported_change(&mut self, pod: &Pod, message: &str) {
        let message = format!("the change is not applied, the pod goes on as before: {message}");
        self.record_once(pod, "UnsupportedChange", &message);
    }

    fn record_container(
        &self,
        view: &PodView,
        container: &str,
        warning: bool,
        (reason, message): (&str, String),
        at: Timestamp,
        salt: u64,
    ) {
        self.context.api.events.record(Note {
            object: about_pod(&view.pod, container),
            warning,
            reason: reason.to_owned(),
            message,
            at,
            salt,
            times: 1,
        });
    }
}

/// PURE: the message about a container that waits for its next attempt.
fn back_off(pod: &Pod, container: &str) -> String {
    let pod = &pod.metadata;
    let [name, namespace, uid] =
        [&pod.name, &pod.namespace, &pod.uid].map(|part| part.as_deref().unwrap_or_default());
    format!("Back-off restarting failed container {container} in pod {name}_{namespace}({uid})")
}

/// PURE: the published status of a container, of whatever kind.
fn published<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    let lists = [
        &status.init_container_statuses,
        &status.container_statuses,
        &status.ephemeral_container_statuses,
    ];
    let mut all = lists.into_iter().flatten().flatten();
    all.find(|one| one.name == container)
}

/// PURE: does the published status say of this attempt of a container that it runs, or has ended?
fn is_published(pod: &Pod, attempt: &pb::ContainerStatus) -> bool {
    let Some(known) = published(pod, &attempt.name) else {
        return false;
    };
    let is_it = |id: Option<&String>| id.is_some_and(|id| *id == attempt.container_id);
    // An attempt whose postStart hook runs is published as one that waits.
    let began = attempt.in_post_start
        || known
            .state
            .as_ref()
            .is_some_and(|state| state.waiting.is_none());
    let last = known.last_state.as_ref();
    let last = last.and_then(|last| last.terminated.as_ref());
    (began && is_it(known.container_id.as_ref()))
        || is_it(last.and_then(|last| last.container_id.as_ref()))
}

/// PURE: has the container waited as it does now since before a process that started at `started`, and is that published?
fn waited_before(pod: &Pod, status: &pb::ContainerStatus, started: Timestamp) -> bool {
    let (Some(known), Some(last)) = (published(pod, &status.name), &status.last_termination) else {
        return false;
    };
    let ended = Timestamp::from_nanosecond(i128::from(last.finished_at));
    let reason = known
        .state
        .as_ref()
        .and_then(|state| state.waiting.as_ref()?.reason.as_deref());
    let same = matches!(&status.state, Some(State::Waiting(now)) if reason == Some(&*now.reason));
    same && known.restart_count == status.restart_count && ended.is_ok_and(|ended| ended < started)
}

/// PURE: the statuses of all containers, of whatever kind.
fn observed_containers(pod: &pb::PodObserved) -> impl Iterator<Item = &pb::ContainerStatus> {
    let lasting = pod.init_containers.iter().chain(&pod.containers);
    lasting.chain(&pod.ephemeral_containers)
}

/// PURE: the annotations that are read when the pod is accepted, with hashes of their values.
fn options(pod: &Pod) -> BTreeMap<String, u64> {
    let all = pod.metadata.annotations.iter().flatten();
    let read = all.filter(|(name, _)| {
        name.as_str() != JOB_ID && OPTIONS.iter().any(|start| name.starts_with(start))
    });
    read.map(|(name, value)| (name.clone(), hash(value)))
        .collect()
}

/// PURE: does one of the later notes say what this one says, and more?
fn replaced(note: &pb::PodNote, later: &[&pb::PodNote]) -> bool {
    let one_of = |reasons: &[&str], note: &pb::PodNote| reasons.contains(&note.reason.as_str());
    one_of(QUEUE, note) && later.iter().any(|later| one_of(REPLACING, later))
}

/// PURE: from when on a process that started at `started` records a note, and what distinguishes the note's Event from others
/// of the same text.
///
/// What is counted is one Event. As with a real kubelet a new process begins a new one, because it does not know how far the
/// earlier one has counted.
fn since_and_salt(note: &pb::PodNote, started: Timestamp) -> (Timestamp, u64) {
    if note.count > 0 {
        return (started, hash(&started));
    }
    let since = started.checked_sub(EARLIER).unwrap_or(Timestamp::MIN);
    // Not by its sequence: an agent that was restarted may number the notes of a shim anew.
    (since, hash(&note.at))
}

/// PURE: what distinguishes an Event of an attempt from others of the same text. `first`: of the first attempt, whose Event no
/// process repeats. The Events of later attempts differ only by the process, so they are counted in one.
fn salt_of_attempt(restart_count: i32, first: u64, started: Timestamp) -> u64 {
    if restart_count > 0 {
        hash(&started)
    } else {
        first
    }
}

fn hash(what: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_after_the_first_are_counted_in_one_event() {
        let started = Timestamp::from_second(1000).unwrap();
        let salt = |restart_count, attempt| salt_of_attempt(restart_count, attempt, started);
        assert_eq!(salt(0, 7), 7);
        assert_eq!(salt(1, 8), salt(2, 9));
        let later = Timestamp::from_second(2000).unwrap();
        assert_ne!(salt(1, 8), salt_of_attempt(1, 8, later));
    }

    #[test]
    fn a_new_process_counts_in_a_new_event_and_repeats_no_other() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let note = |count| pb::PodNote {
            sequence: 7,
            count,
            ..pb::PodNote::default()
        };
        let salt = |count, started| since_and_salt(&note(count), at(started)).1;
        assert_eq!(salt(0, 1000), salt(0, 2000));
        assert_eq!(salt(3, 1000), salt(1, 1000));
        assert_ne!(salt(3, 1000), salt(3, 2000));
        assert_eq!(since_and_salt(&note(3), at(1000)).0, at(1000));
        assert_eq!(since_and_salt(&note(0), at(1000)).0, at(880));
    }
}
