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
};
use tokio::sync::watch;

use super::{
    container::Ended,
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
    /// The back-off between the last attempt and the next one.
    pub(crate) pause: Duration,
    /// How the last attempt ended, and the one before.
    pub(crate) ended: Option<pb::Terminated>,
    pub(crate) ended_before: Option<pb::Terminated>,
    /// What the running attempt, or the last one, was started with.
    pub(crate) image: Option<RanImage>,
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
}

/// What a container's status depends on besides the container itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StatusContext<'a> {
    pub(crate) pod: &'a pb::PodSpec,
    /// The startup sequence of the pod is over.
    pub(crate) initialized: bool,
    /// The pod is being stopped: no container is restarted.
    pub(crate) stopping: bool,
    /// Why containers wait for values.
    pub(crate) values_missing: Option<&'a str>,
    pub(crate) now: Time,
}

/// PURE: the state of a container in Kubernetes' own terms.
fn state(spec: &ContainerSpec, now: Situation<'_>, context: &StatusContext<'_>) -> State {
    let Situation { phase, history, .. } = now;
    let waiting = |reason: &str, message: &str| {
        State::Waiting(pb::Waiting {
            reason: reason.to_owned(),
            message: message.to_owned(),
        })
    };
    // In a pod with init containers this is Kubernetes' reason for every container that was never started.
    let creating = if context.pod.init_containers.is_empty() {
        "ContainerCreating"
    } else {
        "PodInitializing"
    };
    match phase {
        Phase::Running => State::Running(pb::Running {
            started_at: history.started_at.map(nanos).unwrap_or_default(),
        }),
        Phase::Exited { restart_at, .. } => {
            if context.stopping || phase.is_final(now.restart) {
                return State::Terminated(history.ended.clone().unwrap_or_default());
            }
            if context.now < restart_at {
                let (pause, pod) = (history.pause.as_secs(), context.pod);
                let message = format!(
                    "back-off {} restarting failed container={} pod={}_{}({})",
                    minutes(pause),
                    spec.name(),
                    pod.name,
                    pod.namespace,
                    pod.uid
                );
                return waiting("CrashLoopBackOff", &message);
            }
            waiting("ContainerCreating", "")
        }
        Phase::Idle if spec.role == Role::Main && !context.initialized => {
            waiting("PodInitializing", "")
        }
        Phase::Idle => match context.values_missing {
            Some(why) => waiting("CreateContainerConfigError", why),
            None => match now.target_missing {
                Some(why) => waiting("CreateContainerConfigError", why),
                None => waiting(creating, ""),
            },
        },
        Phase::Starting if history.attempt == 0 => waiting(creating, ""),
        Phase::Starting => waiting("ContainerCreating", ""),
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
        container_id: if phase == Phase::Idle {
            String::new()
        } else {
            container_id
        },
    }
}

/// PURE: how often the container was restarted. An attempt counts once its program runs, or if it could not be started:
/// nobody sees the new number beside the times of the attempt before.
fn restarts(phase: Phase, history: &History) -> u32 {
    match phase {
        Phase::Starting => history.attempt.saturating_sub(1),
        Phase::Idle | Phase::Running | Phase::Exited { .. } => history.attempt,
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
mod tests {
    use tokio::task::JoinSet;

    use super::{super::role::SlotId, *};

    /// How long a test waits for a level, in paused time.
    const SOON: Duration = Duration::from_hours(1);

    fn job_dir() -> (tempfile::TempDir, JobDir) {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("u");
        std::fs::create_dir(&path).unwrap();
        let dir = JobDir::open(path).unwrap();
        (root, dir)
    }

    async fn written(dir: &JobDir) -> pb::Report {
        let looking = async {
            loop {
                if let Ok(Some(report)) = dir.report() {
                    return report;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let looked = tokio::time::timeout(SOON, looking).await;
        looked.unwrap_or_else(|_| panic!("no report was written"))
    }

    fn spec(role: Role) -> ContainerSpec {
        ContainerSpec {
            id: SlotId::after(0),
            role,
            restart: RestartRule::of(role, pb::RestartPolicy::Always),
            container: pb::Container {
                name: "main".to_owned(),
                ..Default::default()
            },
            image: pb::ResolvedImage::default(),
        }
    }

    #[test]
    fn ready_and_started_are_what_the_probes_say_and_not_that_the_program_runs() {
        let pod = pb::PodSpec::default();
        let history = History::default();
        let context = StatusContext {
            pod: &pod,
            initialized: true,
            stopping: false,
            values_missing: None,
            now: Duration::ZERO,
        };
        let shown = |role, phase, health| {
            let situation = Situation {
                phase,
                health,
                history: &history,
                restart: RestartRule::Always,
                target_missing: None,
            };
            let status = status(&spec(role), situation, &context, String::new());
            (status.started, status.ready)
        };
        let not_ready = Health {
            ready: false,
            ..Health::unprobed()
        };
        let succeeded = Phase::Exited {
            code: 0,
            unhealthy: false,
            restart_at: Duration::ZERO,
        };
        for role in [Role::Main, Role::Sidecar] {
            let shown = |phase, health| shown(role, phase, health);
            assert_eq!(shown(Phase::Running, Health::unprobed()), (true, true));
            assert_eq!(shown(Phase::Running, not_ready), (true, false));
            assert_eq!(shown(Phase::Running, Health::down()), (false, false));
            assert_eq!(shown(succeeded, Health::down()), (false, false));
        }
        // An init container is ready when it is done; nobody waits for an ephemeral one to be ready.
        let init = |phase, health| shown(Role::Init, phase, health);
        assert_eq!(init(Phase::Running, Health::unprobed()), (true, false));
        assert_eq!(init(succeeded, Health::down()), (false, true));
        let ephemeral = shown(Role::Ephemeral, Phase::Running, Health::unprobed());
        assert_eq!(ephemeral, (true, false));
    }

    #[test]
    fn a_container_that_waits_says_so_as_a_kubelet_does() {
        let pod = pb::PodSpec {
            uid: "7d1".to_owned(),
            namespace: "lab".to_owned(),
            name: "web".to_owned(),
            ..Default::default()
        };
        let phase = Phase::Exited {
            code: 1,
            unhealthy: false,
            restart_at: Duration::from_secs(100),
        };
        let said = |pause, now| {
            let history = History {
                pause: Duration::from_secs(pause),
                ..History::default()
            };
            let situation = Situation {
                phase,
                health: Health::down(),
                history: &history,
                restart: RestartRule::Always,
                target_missing: None,
            };
            let context = StatusContext {
                pod: &pod,
                initialized: true,
                stopping: false,
                values_missing: None,
                now: Duration::from_secs(now),
            };
            match state(&spec(Role::Main), situation, &context) {
                State::Waiting(waiting) => [waiting.reason, waiting.message],
                state @ (State::Running(_) | State::Terminated(_)) => panic!("{state:?}"),
            }
        };
        for (pause, shown) in [(20, "20s"), (80, "1m20s"), (300, "5m0s")] {
            let message =
                format!("back-off {shown} restarting failed container=main pod=web_lab(7d1)");
            assert_eq!(said(pause, 99), ["CrashLoopBackOff".to_owned(), message]);
        }
        assert_eq!(said(20, 100), ["ContainerCreating", ""]);
    }

    #[test]
    fn a_restart_counts_once_the_program_runs() {
        let shown = |phase, attempt| {
            let history = History {
                attempt,
                ..History::default()
            };
            restarts(phase, &history)
        };
        let ended = Phase::Exited {
            code: 1,
            unhealthy: false,
            restart_at: Duration::ZERO,
        };
        assert_eq!(shown(Phase::Starting, 0), 0);
        assert_eq!([shown(Phase::Running, 0), shown(ended, 0)], [0, 0]);
        assert_eq!(
            [shown(Phase::Starting, 1), shown(Phase::Running, 1)],
            [0, 1]
        );
        assert_eq!([shown(ended, 1), shown(Phase::Starting, 2)], [1, 1]);
    }

    #[test]
    fn a_rank_that_was_lost_is_why_the_containers_ended() {
        assert_eq!(by_themselves(None), pb::EndedBy::Themselves);
        assert_eq!(by_themselves(Some(Loss::Rank)), pb::EndedBy::LostRank);
        assert_eq!(by_themselves(Some(Loss::Node)), pb::EndedBy::LostNode);
    }

    #[tokio::test(start_paused = true)]
    async fn a_report_that_could_not_be_written_is_written_later_without_any_news() {
        let (_root, dir) = job_dir();
        // Nothing can be renamed over a folder.
        std::fs::create_dir(dir.report_path()).unwrap();
        let mut publisher = Publisher::new(pb::Report::default());
        let mut keeper = JoinSet::new();
        keeper.spawn(keep(dir.clone(), publisher.subscribe()));
        publisher.update(|report| report.hostname = "c1".to_owned());
        tokio::time::sleep(Duration::from_mins(10)).await;
        std::fs::remove_dir(dir.report_path()).unwrap();
        assert_eq!(written(&dir).await.hostname, "c1");
        publisher.update(|report| report.r#final = true);
        assert!(keeper.join_next().await.unwrap().unwrap());
        assert!(written(&dir).await.r#final);
    }

    #[tokio::test(start_paused = true)]
    async fn a_final_report_that_cannot_be_written_is_given_up() {
        let (_root, dir) = job_dir();
        std::fs::create_dir(dir.report_path()).unwrap();
        let mut publisher = Publisher::new(pb::Report::default());
        let mut keeper = JoinSet::new();
        keeper.spawn(keep(dir, publisher.subscribe()));
        publisher.update(|report| report.r#final = true);
        drop(publisher);
        assert!(!keeper.join_next().await.unwrap().unwrap());
    }
}
