//! The pod's report: how container statuses are built, and the task that keeps the newest report on disk.
//!
//! Only the supervisor publishes reports. Readers (the link) see each newer report in a watch channel at once. The copy on
//! disk follows as fast as the file system allows, and may skip reports.

use std::time::Duration;

use jiff::Timestamp;
use knoc_contract::jobdir::JobDir;
use knoc_proto::{
    crash,
    error::chain,
    pb::{self, container_status::State},
    pod::RESTARTING_ALL,
};
use tokio::sync::watch;

use super::{
    container::{Ended, UNCONFIGURED},
    plan::{Health, Phase, Time},
    ranks::table::Loss,
    role::{ContainerSpec, RestartRule, Role},
};

/// How many notes are kept.
const NOTES: usize = 32;

/// The first and the longest pause between two tries to write a report that is not the final one.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// How often the shim tries to write the final report, and the pause in between.
const FINAL_TRIES: u32 = 5;
const FINAL_PAUSE: Duration = Duration::from_secs(2);

/// A time in Unix nanoseconds.
pub(crate) fn nanos(at: Timestamp) -> i64 {
    i64::try_from(at.as_nanosecond()).unwrap_or(i64::MAX)
}

/// What the supervisor knows of one container besides its [`Phase`].
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    /// The number of the running attempt, or of the last one.
    pub(crate) attempt: u32,
    pub(crate) started_at: Option<Timestamp>,
    /// The user, the group and the further groups that the last program began with.
    pub(crate) user: Vec<u32>,
    /// The back-off between the last attempt and the next one.
    pub(crate) pause: Duration,
    /// How the last attempt ended, and the one before.
    pub(crate) ended: Option<pb::Terminated>,
    pub(crate) ended_before: Option<pb::Terminated>,
    /// What the running attempt, or the last one, was started with.
    pub(crate) image: Option<RanImage>,
    /// Why it could not be configured when that was last tried; empty once it could.
    pub(crate) unconfigured: String,
}

/// The image of an attempt. That of the container may be another one by now.
#[derive(Debug, Clone, Default)]
pub(crate) struct RanImage {
    pub(crate) image: String,
    image_id: String,
}

impl RanImage {
    pub(crate) fn of(spec: &ContainerSpec) -> Self {
        Self {
            image: spec.container.image.clone(),
            image_id: spec.image.image_id.clone(),
        }
    }
}

/// The current state of one container.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Situation<'a> {
    pub(crate) phase: Phase,
    pub(crate) health: Health,
    pub(crate) history: &'a History,
    /// Whether it is restarted once it has ended.
    pub(crate) restart: RestartRule,
    /// Why an ephemeral container does not start yet: its target does not run.
    pub(crate) target_missing: Option<&'a str>,
    /// Whether its program runs, and its postStart hook has not succeeded.
    pub(crate) in_post_start: bool,
}

/// Why containers wait that have everything else.
const ADDRESS_MISSING: &str = "the container waits for the pod's address from the agent";

/// What the pod lacks before containers can begin.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Missing<'a> {
    /// Its values, and why: a failure, unless they come.
    Values(&'a str),
    /// Its address. It comes within a second, so this is a step of the start like any other.
    Address,
}

/// What a container's status depends on besides the container itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StatusContext<'a> {
    pub(crate) pod: &'a pb::PodSpec,
    /// The startup sequence of the pod is over.
    pub(crate) initialized: bool,
    /// The pod is being stopped: no container is restarted.
    pub(crate) stopping: bool,
    /// All containers are being ended, because they begin anew.
    pub(crate) starts_over: bool,
    /// What containers wait for that have not begun.
    pub(crate) missing: Option<Missing<'a>>,
    pub(crate) now: Time,
}

fn waiting(reason: &str, message: &str) -> State {
    State::Waiting(pb::Waiting {
        reason: reason.to_owned(),
        message: message.to_owned(),
    })
}

/// PURE: the state of a container in Kubernetes' own terms.
fn state(spec: &ContainerSpec, now: Situation<'_>, context: &StatusContext<'_>) -> State {
    let Situation { phase, history, .. } = now;
    // In a pod with init containers this is Kubernetes' reason for every container that was never started.
    let creating = if context.pod.init_containers.is_empty() {
        "ContainerCreating"
    } else {
        "PodInitializing"
    };
    let initializing = spec.role == Role::Main
        && !context.initialized
        && (phase == Phase::Idle || !context.stopping);
    match phase {
        Phase::Exited { .. } if context.starts_over && spec.role != Role::Ephemeral => {
            waiting(RESTARTING_ALL, "")
        }
        Phase::Running => State::Running(pb::Running {
            started_at: history.started_at.map(nanos).unwrap_or_default(),
        }),
        Phase::Idle | Phase::Again { .. } if initializing => waiting("PodInitializing", ""),
        Phase::Again { restart_at } | Phase::Exited { restart_at, .. } => {
            if context.stopping || phase.is_final(now.restart) {
                return State::Terminated(history.ended.clone().unwrap_or_default());
            }
            if context.now < restart_at {
                return backing_off(spec.name(), history.pause, context.pod);
            }
            waiting("ContainerCreating", "")
        }
        Phase::Idle => match context.missing {
            Some(Missing::Values(why)) => waiting(UNCONFIGURED, why),
            Some(Missing::Address) => waiting(creating, ADDRESS_MISSING),
            None => match now.target_missing {
                Some(why) => waiting(UNCONFIGURED, why),
                None => waiting(creating, ""),
            },
        },
        Phase::Unconfigured { .. } => unconfigured(history, context.stopping),
        // As in a kubelet, the error is shown until the container is created.
        Phase::Starting if !history.unconfigured.is_empty() => {
            unconfigured(history, context.stopping)
        }
        Phase::Starting if history.attempt == 0 => waiting(creating, ""),
        Phase::Starting => waiting("ContainerCreating", ""),
    }
}

fn backing_off(container: &str, pause: Duration, pod: &pb::PodSpec) -> State {
    let message = format!(
        "back-off {} restarting failed container={container} pod={}_{}({})",
        minutes(pause.as_secs()),
        pod.name,
        pod.namespace,
        pod.uid
    );
    waiting("CrashLoopBackOff", &message)
}

/// PURE: the state of a container that cannot be configured. If its pod is being stopped, only an attempt of before counts.
fn unconfigured(history: &History, stopping: bool) -> State {
    match &history.ended {
        Some(ended) if stopping => State::Terminated(ended.clone()),
        Some(_) | None => waiting(UNCONFIGURED, &history.unconfigured),
    }
}

/// As Go shows a duration of whole seconds: `20s`, `1m20s`.
fn minutes(seconds: u64) -> String {
    match (seconds / 60, seconds % 60) {
        (0, seconds) => format!("{seconds}s"),
        (minutes, seconds) => format!("{minutes}m{seconds}s"),
    }
}

/// PURE: one container's status.
pub(crate) fn status(
    spec: &ContainerSpec,
    now: Situation<'_>,
    context: &StatusContext<'_>,
    container_id: String,
) -> pb::ContainerStatus {
    let Situation {
        phase,
        health,
        history,
        restart: _,
        target_missing: _,
        in_post_start,
    } = now;
    let state = state(spec, now, context);
    let over = matches!(state, State::Terminated(_));
    let ready = match spec.role {
        Role::Init => matches!(phase, Phase::Exited { code: 0, .. }),
        Role::Sidecar | Role::Main => health.ready,
        Role::Ephemeral => false,
    };
    let last = if over {
        &history.ended_before
    } else {
        &history.ended
    };
    let ran = history.image.clone();
    let ran = ran.unwrap_or_else(|| RanImage::of(spec));
    let next = &spec.container.image;
    pb::ContainerStatus {
        name: spec.name().to_owned(),
        next_image: if *next == ran.image {
            String::new()
        } else {
            next.clone()
        },
        state: Some(state),
        last_termination: last.clone(),
        restart_count: i32::try_from(restarts(phase, history)).unwrap_or(i32::MAX),
        ready,
        started: health.started,
        image: ran.image,
        image_id: ran.image_id,
        container_id: shown_id(phase, history, container_id),
        // The stop of the pod has ended the hook.
        in_post_start: in_post_start && !context.stopping,
        user: history.user.clone(),
    }
}

/// PURE: the id of the running attempt or of the last one, if there is one. One that could not be configured is none.
fn shown_id(phase: Phase, history: &History, of_attempt: String) -> String {
    let unconfigured = !history.unconfigured.is_empty();
    match phase {
        Phase::Idle => String::new(),
        Phase::Starting | Phase::Unconfigured { .. } if unconfigured => {
            let ended = history.ended.as_ref();
            ended.map_or_else(String::new, |ended| ended.container_id.clone())
        }
        Phase::Starting
        | Phase::Running
        | Phase::Unconfigured { .. }
        | Phase::Again { .. }
        | Phase::Exited { .. } => of_attempt,
    }
}

/// PURE: how often the container was restarted. An attempt counts once its program runs, or if it could not be started:
/// nobody sees the new number beside the times of the attempt before.
fn restarts(phase: Phase, history: &History) -> u32 {
    match phase {
        Phase::Starting | Phase::Unconfigured { .. } => history.attempt.saturating_sub(1),
        Phase::Idle | Phase::Running | Phase::Again { .. } | Phase::Exited { .. } => {
            history.attempt
        }
    }
}

/// PURE: how an attempt ended, as it is reported.
pub(crate) fn terminated(
    ended: &Ended,
    started_at: Option<Timestamp>,
    container_id: String,
) -> pb::Terminated {
    pb::Terminated {
        exit_code: ended.exit.code,
        signal: ended.exit.signal,
        reason: ended.reason.to_owned(),
        message: ended.message.clone(),
        started_at: started_at.map(nanos).unwrap_or_default(),
        finished_at: nanos(ended.finished_at),
        container_id,
    }
}

/// By what containers ended that nobody has stopped, if a rank of theirs was lost in this way.
pub(crate) fn by_themselves(lost: Option<Loss>) -> pb::EndedBy {
    match lost {
        None => pb::EndedBy::Themselves,
        Some(Loss::Rank) => pb::EndedBy::LostRank,
        Some(Loss::Node) => pb::EndedBy::LostNode,
    }
}

/// Holds the current report and publishes each change of it.
#[derive(Debug)]
pub(crate) struct Publisher {
    current: pb::Report,
    sender: watch::Sender<pb::Report>,
}

impl Publisher {
    /// Starts with `first`, which is published at once.
    pub(crate) fn new(first: pb::Report) -> Self {
        Self {
            sender: watch::Sender::new(first.clone()),
            current: first,
        }
    }

    /// When the shim began, Unix nanoseconds.
    pub(crate) fn started_at(&self) -> i64 {
        self.current.started_at
    }

    /// A reader that has not seen the current report yet.
    pub(crate) fn subscribe(&self) -> watch::Receiver<pb::Report> {
        let mut receiver = self.sender.subscribe();
        receiver.mark_changed();
        receiver
    }

    /// Applies `change`, and publishes the report if it did change.
    pub(crate) fn update(&mut self, change: impl FnOnce(&mut pb::Report)) {
        let before = self.current.clone();
        change(&mut self.current);
        if self.current != before {
            self.current.sequence += 1;
            self.sender.send_replace(self.current.clone());
        }
    }

    /// Adds a warning.
    pub(crate) fn note(&mut self, reason: &str, message: String, container: &str) {
        self.add_note(pb::PodNote {
            warning: true,
            reason: reason.to_owned(),
            message,
            container: container.to_owned(),
            ..pb::PodNote::default()
        });
    }

    /// Adds a note of now; beyond a limit the oldest note is removed. A note with a count takes the place of the one before
    /// of the same text.
    pub(crate) fn add_note(&mut self, note: pb::PodNote) {
        self.update(|report| {
            let sequence = report.notes.last().map_or(1, |note| note.sequence + 1);
            let repeats = |one: &pb::PodNote| {
                let texts = (&one.reason, &one.message, &one.container);
                one.count > 0 && texts == (&note.reason, &note.message, &note.container)
            };
            report.notes.retain(|one| !repeats(one));
            report.notes.push(pb::PodNote {
                sequence,
                at: nanos(Timestamp::now()),
                ..note
            });
            let excess = report.notes.len().saturating_sub(NOTES);
            report.notes.drain(..excess);
        });
    }
}

/// Task: keeps the newest report on disk; ends with the final one. Returns `false` if that could not be written.
pub(crate) async fn keep(jobdir: JobDir, mut reports: watch::Receiver<pb::Report>) -> bool {
    let mut pause: Option<Duration> = None;
    loop {
        let news = match pause {
            None => reports.changed().await,
            // A report that could not be written is tried again, even if there is no newer one.
            Some(pause) => {
                let jittered = pause.mul_f64(rand::random_range(0.5..1.5));
                let waited = tokio::time::timeout(jittered, reports.changed()).await;
                waited.unwrap_or(Ok(()))
            }
        };
        if news.is_err() {
            // The supervisor is gone without a final report.
            return false;
        }
        let report = reports.borrow_and_update().clone();
        if report.r#final {
            return keep_final(&jobdir, report).await;
        }
        pause = match write(&jobdir, report).await {
            Ok(()) => None,
            Err(error) => {
                tracing::error!("the report was not written: {error}");
                Some(pause.map_or(FIRST_PAUSE, |pause| (pause * 2).min(LONGEST_PAUSE)))
            }
        };
    }
}

/// Writes the final report. The job waits for this, so the number of tries is limited.
async fn keep_final(jobdir: &JobDir, report: pb::Report) -> bool {
    for left in (0..FINAL_TRIES).rev() {
        match write(jobdir, report.clone()).await {
            Ok(()) => return true,
            Err(error) => tracing::error!("the report was not written: {error}"),
        }
        if left > 0 {
            tokio::time::sleep(FINAL_PAUSE).await;
        }
    }
    false
}

async fn write(jobdir: &JobDir, report: pb::Report) -> Result<(), String> {
    let jobdir = jobdir.clone();
    let writing = tokio::task::spawn_blocking(move || {
        crash::point("shim.report.before");
        let written = jobdir.write_report(&report).map_err(|error| chain(&error));
        crash::point("shim.report.after");
        written
    });
    writing.await.map_err(|error| error.to_string())?
}

#[cfg(test)]
mod tests;
