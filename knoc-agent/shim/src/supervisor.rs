//! Task: the pod's supervisor. Owns the state of all containers; the only one to start and end them.
//!
//! Wakes on events of its attempts, on [`Command`]s (from the link, from signals), and on time. Each time it asks
//! [`plan::decide`] and performs the answer, then publishes the report and the [`Directory`].

mod patience;
mod slot;
mod stats;

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use knoc_contract::logs::writer::Losses;
use knoc_proto::{
    error::chain,
    pb::{self, EndedBy, OutcomeKind},
};
use rustix::process::Signal;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use self::{patience::Patience, slot::Slot};
use super::{
    container::{self, Attempt, Ended, Event, News, Program},
    directory::Directory,
    plan::{self, Action, Backoff, Phase, Plan, Signalled, Time, View},
    pod::Pod,
    report::{self, Light, Publisher},
    signals,
    usage::{Counters, Sample},
};

const EVENTS: usize = 64;
const BACKOFF_INITIAL: Duration = Duration::from_secs(10);
const BACKOFF_MAX: Duration = Duration::from_mins(5);
/// Job files of older agents do not say how long to wait for values.
const VALUES_WAIT: Duration = Duration::from_mins(10);

const VALUES_EXPIRED: &str = "the values have expired; waits for fresh ones from the agent";

/// Nothing to wake for: far enough that it never comes.
const NEVER: Duration = Duration::from_hours(24 * 365);

/// What others ask of the supervisor.
#[derive(Debug)]
pub(crate) enum Command {
    /// Ends the pod. Idempotent: an earlier end of the grace period counts.
    Stop {
        grace: Duration,
        by: EndedBy,
        reason: String,
    },
    /// What the containers use, by a measurement of just now.
    Stats(Vec<Sample>, oneshot::Sender<pb::PodStats>),
    /// Newer values; the answer comes when they are written.
    Values(pb::PodValues, oneshot::Sender<Result<(), String>>),
}

struct Stop {
    kill_at: Time,
    by: EndedBy,
    reason: String,
}

/// See the module.
pub(crate) struct Supervisor {
    pod: Arc<Pod>,
    began: Instant,
    slots: Vec<Slot>,
    values: Option<Arc<pb::PodValues>>,
    /// Why there are none, in words.
    values_missing: String,
    patience: Patience,
    stop: Option<Stop>,
    attempts: JoinSet<(usize, Ended)>,
    events: (mpsc::Sender<Event>, mpsc::Receiver<Event>),
    commands: mpsc::Receiver<Command>,
    publisher: Publisher,
    directory: watch::Sender<Arc<Directory>>,
    /// The pod's counters as they were last shown.
    shown: Counters,
}

impl Supervisor {
    pub(crate) fn new(
        pod: Arc<Pod>,
        previous: Option<&pb::Report>,
        commands: mpsc::Receiver<Command>,
        publisher: Publisher,
        directory: watch::Sender<Arc<Directory>>,
    ) -> Self {
        let settings = pod.settings();
        let or = |millis: i64, default| {
            u64::try_from(millis)
                .ok()
                .filter(|n| *n > 0)
                .map_or(default, Duration::from_millis)
        };
        let backoff = Backoff::new(
            or(settings.backoff_initial_ms, BACKOFF_INITIAL),
            or(settings.backoff_max_ms, BACKOFF_MAX),
        );
        let before = |name: &str| {
            let report = previous?;
            let mut all = report.init_containers.iter().chain(&report.containers);
            all.find(|status| status.name == name)
        };
        let slots = pod
            .containers()
            .map(|c| Slot::new(backoff, before(&c.name)))
            .collect();
        Self {
            pod,
            began: Instant::now(),
            slots,
            values: None,
            values_missing: "waits for its values from the agent".to_owned(),
            patience: Patience::new(or(settings.values_wait_ms, VALUES_WAIT)),
            stop: None,
            attempts: JoinSet::new(),
            events: mpsc::channel(EVENTS),
            commands,
            publisher,
            directory,
            shown: Counters::default(),
        }
    }

    /// Runs the pod to its end; the final report is published when this returns.
    pub(crate) async fn run(mut self, values: Option<pb::PodValues>) {
        if let Some(values) = values
            && let Err(error) = self.take_values(values)
        {
            tracing::error!("the staged values cannot be used: {error}");
        }
        loop {
            self.check_deadline();
            self.check_values();
            let plan = plan::decide(&self.view());
            for action in &plan.actions {
                self.perform(*action);
            }
            if plan.finished {
                break;
            }
            self.publish();
            self.wait(&plan).await;
        }
        self.finish();
    }

    fn now(&self) -> Time {
        self.began.elapsed()
    }

    fn deadline(&self) -> Option<Time> {
        let deadline = self.pod.spec().deadline()?;
        self.stop.is_none().then_some(deadline)
    }

    fn check_deadline(&mut self) {
        if self
            .deadline()
            .is_some_and(|deadline| self.now() >= deadline)
        {
            let grace = self.pod.spec().grace();
            let reason = "Pod was active on the node longer than the specified deadline";
            self.order_stop(grace, EndedBy::Deadline, reason.to_owned());
        }
    }

    /// A pod that never gets its values gives its nodes back.
    fn check_values(&mut self) {
        if self.patience.is_over(&self.view()) {
            let (missing, waited) = (&self.values_missing, self.patience.limit().as_secs());
            let reason = format!(
                "gave up after {waited} s: {missing}; see that kubelet, agent and the link to the job work, then create \
                 the pod again"
            );
            self.order_stop(Duration::ZERO, EndedBy::NoValues, reason);
        }
    }

    /// How old values may be matters before the pod's first start only: what runs has them, and starts again with them.
    fn has_values(&self) -> bool {
        let expired = |values: &pb::PodValues| {
            values.not_after > 0 && values.not_after <= Timestamp::now().as_second()
        };
        let started = self.slots.iter().any(|slot| slot.phase != Phase::Idle);
        let values = self.values.as_ref();
        values.is_some_and(|values| started || !expired(values))
    }

    fn view(&self) -> View {
        View {
            containers: self.slots.iter().map(Slot::view).collect(),
            init: self.pod.spec().init_containers.len(),
            policy: self.pod.spec().restart_policy(),
            values: self.has_values(),
            kill_at: self.stop.as_ref().map(|stop| stop.kill_at),
            now: self.now(),
        }
    }

    async fn wait(&mut self, plan: &Plan) {
        let wake = [plan.wake, self.deadline(), self.patience.ends()]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(NEVER);
        tokio::select! {
            biased;
            Some(event) = self.events.1.recv() => self.news(event),
            Some(ended) = self.attempts.join_next() => match ended {
                Ok((index, ended)) => self.ended(index, &ended),
                Err(error) => tracing::error!("an attempt's task failed: {error}"),
            },
            Some(command) = self.commands.recv() => self.obey(command),
            () = sleep_until(self.began + wake) => {}
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Stop { grace, by, reason } => self.order_stop(grace, by, reason),
            Command::Stats(samples, answer) => {
                // Who asked may be gone.
                answer.send(self.stats(&samples)).ok();
            }
            Command::Values(values, answer) => {
                // Who asked may be gone.
                answer.send(self.take_values(values)).ok();
            }
        }
    }

    fn order_stop(&mut self, grace: Duration, by: EndedBy, reason: String) {
        let kill_at = self.now() + grace;
        match &mut self.stop {
            Some(stop) => stop.kill_at = stop.kill_at.min(kill_at),
            None => {
                self.stop = Some(Stop {
                    kill_at,
                    by,
                    reason,
                });
            }
        }
    }

    fn take_values(&mut self, values: pb::PodValues) -> Result<(), String> {
        if self
            .values
            .as_ref()
            .is_some_and(|current| values.revision <= current.revision)
        {
            return Ok(());
        }
        if let Err(error) = self.pod.volumes.write(&values) {
            self.values_missing = chain(&error);
            return Err(self.values_missing.clone());
        }
        VALUES_EXPIRED.clone_into(&mut self.values_missing);
        self.values = Some(Arc::new(values));
        Ok(())
    }

    fn perform(&mut self, action: Action) {
        let isolated = self.pod.runtime.isolates();
        match action {
            Action::Start(index) => self.start(index),
            Action::Term(index) => {
                let Some(slot) = self.slots.get_mut(index) else {
                    return;
                };
                slot.signalled = Signalled::Term;
                match &slot.program {
                    Some(program) => signals::to_program(program.identity, Signal::TERM),
                    // It does not run yet: nobody could take the signal.
                    None => slot.abort.cancel(),
                }
            }
            Action::Kill(index) => {
                let Some(slot) = self.slots.get_mut(index) else {
                    return;
                };
                slot.signalled = Signalled::Kill;
                if let Some(program) = &slot.program {
                    signals::kill_all(program.identity, isolated);
                }
                slot.abort.cancel();
            }
        }
    }

    fn start(&mut self, index: usize) {
        let Some(values) = self.values.clone() else {
            return;
        };
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        let written = slot.begin();
        let attempt = Attempt {
            index,
            number: slot.history.attempt,
            values,
            written,
            abort: slot.abort.clone(),
            events: self.events.0.clone(),
        };
        let pod = Arc::clone(&self.pod);
        self.attempts
            .spawn(async move { (index, container::run(pod, attempt).await) });
    }

    fn news(&mut self, event: Event) {
        match event.news {
            News::Running {
                program,
                started_at,
            } => self.running(event.index, program, started_at),
            News::Lost(losses) => self.note_lost_lines(event.index, &losses),
        }
    }

    fn running(&mut self, index: usize, program: Arc<Program>, started_at: Timestamp) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        slot.phase = Phase::Running;
        slot.history.started_at = Some(started_at);
        // A stop may have come in between: its signal is sent again by the next plan.
        if slot.signalled == Signalled::Term {
            slot.signalled = Signalled::Nothing;
        }
        slot.program = Some(program);
    }

    /// Says how many lines of this attempt's log were lost so far, where it are more than was said.
    fn note_lost_lines(&mut self, index: usize, losses: &Losses) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        if losses.lines <= slot.lost_lines {
            return;
        }
        slot.lost_lines = losses.lines;
        let why = losses.error.as_deref().unwrap_or("the file system hangs");
        let message = format!("{} log lines could not be written: {why}", losses.lines);
        let name = self.pod.container(index).name.clone();
        self.publisher.note("LogLinesLost", message, &name);
    }

    fn ended(&mut self, index: usize, ended: &Ended) {
        let id = self.container_id(index);
        let now = self.now();
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        slot.end(ended, id, now);
        let losses = &ended.losses;
        self.note_lost_lines(index, losses);
        let name = self.pod.container(index).name.clone();
        if losses.files > 0 {
            let message = format!("{} rotated log files were dropped", losses.files);
            self.publisher.note("LogFilesDropped", message, &name);
        }
    }

    fn container_id(&self, index: usize) -> String {
        let attempt = self.slots.get(index).map_or(0, |slot| slot.history.attempt);
        let runtime = self.pod.runtime.name();
        let (job, name) = (&self.pod.claim.job_id, &self.pod.container(index).name);
        format!("{runtime}://{job}.{name}.{attempt}")
    }

    fn statuses(&self) -> (Vec<pb::ContainerStatus>, Vec<pb::ContainerStatus>) {
        let view = self.view();
        let done = |slot: &Slot| matches!(slot.phase, Phase::Exited { code: 0, .. });
        let initialized = self.slots.iter().take(view.init).all(done);
        let missing = (!view.values).then_some(self.values_missing.as_str());
        let mut all: Vec<_> = self
            .slots
            .iter()
            .enumerate()
            .map(|(index, slot)| {
                let light = Light {
                    pod: self.pod.spec(),
                    init: index < view.init,
                    initialized,
                    stopping: self.stop.is_some(),
                    policy: view.policy,
                    values_missing: missing,
                    now: view.now,
                };
                let state = (slot.phase, &slot.history);
                let (container, image) = (self.pod.container(index), self.pod.image(index));
                report::status(container, image, state, &light, self.container_id(index))
            })
            .collect();
        let main = all.split_off(view.init);
        (all, main)
    }

    fn publish(&mut self) {
        let (init, main) = self.statuses();
        let waits = !self.view().values && self.stop.is_none();
        let revision = self.values.as_ref().map_or(0, |values| values.revision);
        let stop = self
            .stop
            .as_ref()
            .map(|stop| (stop.by, stop.reason.clone()));
        self.publisher.update(|report| {
            report.init_containers = init;
            report.containers = main;
            report.waits_for_values = waits;
            report.values_revision = Some(revision);
            if let Some((by, message)) = stop {
                report.ended_by = by.into();
                report.message = message;
            }
        });
        self.publish_directory();
    }

    fn publish_directory(&self) {
        let names = self
            .pod
            .containers()
            .map(|container| container.name.clone());
        let entries = self.slots.iter().map(Slot::entry);
        self.directory
            .send_replace(Arc::new(Directory::new(names.zip(entries))));
    }

    fn finish(&mut self) {
        let (init, main) = self.statuses();
        let by = self
            .stop
            .as_ref()
            .map_or(EndedBy::Themselves, |stop| stop.by);
        let succeeded = self.slots.iter().all(Slot::succeeded)
            && matches!(by, EndedBy::Themselves | EndedBy::Stop);
        let outcome = if succeeded {
            OutcomeKind::Succeeded
        } else {
            OutcomeKind::Failed
        };
        let message = self
            .stop
            .as_ref()
            .map(|stop| stop.reason.clone())
            .unwrap_or_default();
        let usage = self.usage(&[]);
        let no_values = if self.values.is_some() {
            "ValuesExpired"
        } else {
            "ValuesMissing"
        };
        self.publisher.update(|report| {
            report.usage = Some(usage);
            report.init_containers = init;
            report.containers = main;
            report.r#final = true;
            report.waits_for_values = false;
            report.ended_by = by.into();
            report.outcome = outcome.into();
            match by {
                EndedBy::Deadline => "DeadlineExceeded".clone_into(&mut report.reason),
                EndedBy::NoValues => no_values.clone_into(&mut report.reason),
                EndedBy::TimeLimit => "SlurmTimeLimit".clone_into(&mut report.reason),
                EndedBy::Unspecified | EndedBy::Themselves | EndedBy::Stop | EndedBy::Signal => {}
            }
            report.message = message;
        });
        self.publish_directory();
    }
}
