//! Task: the pod's supervisor. It owns the state of all containers; nothing else starts or ends them.
//!
//! It wakes up for events of its attempts, for [`Command`]s (from the link and from signals), and at points in time that
//! the plan names. Each time it performs the actions of [`plan::decide`], then publishes the report and the [`Directory`].
//! What is known about a container is in its [`slot`], which attempts refer to by its [`SlotId`].

mod address;
mod ephemeral;
mod image;
mod probing;
mod slot;
mod slots;
mod stats;
mod statuses;
mod timeouts;

use std::{collections::BTreeSet, net::Ipv4Addr, sync::Arc, time::Duration};

use jiff::Timestamp;
use knoc_contract::logs::writer::Losses;
use knoc_proto::{
    error::chain,
    pb::{self, EndedBy, OutcomeKind},
    pod::PodValues,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use self::{
    slot::Slot,
    slots::{DuplicateName, Slots},
    statuses::container_id,
    timeouts::{Expired, Timeouts},
};
use super::{
    container::{self, Attempt, Ended, Event, News},
    directory::Directory,
    plan::{self, Action, Backoff, Phase, Plan, Progress, StopStage, Time, View},
    pod::Pod,
    report::{self, Publisher},
    role::SlotId,
    usage::{Counters, Sample},
};

const EVENTS: usize = 64;
const BACKOFF_INITIAL: Duration = Duration::from_secs(10);
const BACKOFF_MAX: Duration = Duration::from_mins(5);
/// Job files of older agents do not say how long to wait for values.
const VALUES_WAIT: Duration = Duration::from_mins(10);

const VALUES_EXPIRED: &str =
    "the values have expired; the container waits for new ones from the agent";

/// The reason of a pod that exceeds the size limit of a volume, as in Kubernetes.
const EVICTED: &str = "Evicted";

/// Used if there is nothing to wake up for: so far away that it never comes.
const NEVER: Duration = Duration::from_hours(24 * 365);

/// A request to the supervisor.
#[derive(Debug)]
pub(crate) enum Command {
    /// Ends the pod. Idempotent: an earlier end of the grace period counts.
    Stop {
        grace: Duration,
        /// How long it is until the job itself is killed, without the time for the final report; `None`: nobody kills it.
        left: Option<Duration>,
        by: EndedBy,
        reason: String,
    },
    /// Asks what the containers use, given a measurement of their processes.
    Stats(Vec<Sample>, oneshot::Sender<pb::PodStats>),
    /// Newer values, not checked yet; the answer comes when they are written.
    Values(pb::PodValues, oneshot::Sender<Result<(), String>>),
    /// How the shim and the agent reach each other, for the report.
    Route(pb::ShimRoute),
    /// Something that users are to know, for an Event.
    Note {
        reason: &'static str,
        message: String,
    },
    /// The pod has its own address, or starts without one.
    Addressed(Option<Ipv4Addr>),
    /// An ephemeral container, which was checked against the pod's shape.
    AddEphemeral {
        container: Box<pb::Container>,
        image: Box<pb::ResolvedImage>,
        answer: oneshot::Sender<Result<(), String>>,
    },
    /// Another image for the container that it names.
    UpdateImage {
        image: Box<pb::ResolvedImage>,
        answer: oneshot::Sender<Result<(), String>>,
    },
}

struct Stop {
    kill_at: Time,
    /// When the job is about to be killed, if it is.
    last: Option<Time>,
    by: EndedBy,
    reason: String,
}

/// The state of the supervisor's task.
pub(crate) struct Supervisor {
    pod: Arc<Pod>,
    began: Instant,
    slots: Slots,
    values: Option<Arc<PodValues>>,
    /// Why there are no values, or none that are still valid; shown in container statuses.
    values_missing: String,
    /// Whether the containers wait for the pod's own address.
    waits_for_address: bool,
    timeouts: Timeouts,
    stop: Option<Stop>,
    attempts: JoinSet<(SlotId, Ended)>,
    /// The tasks of probes and hooks. Each ends with the attempt that it belongs to.
    helpers: JoinSet<()>,
    events: (mpsc::Sender<Event>, mpsc::Receiver<Event>),
    commands: mpsc::Receiver<Command>,
    publisher: Publisher,
    directory: watch::Sender<Arc<Directory>>,
    /// The pod's counters as they were last reported: they never decrease.
    shown: Counters,
    /// The compressions of which an Event has said that such images are unpacked.
    unpacked: BTreeSet<&'static str>,
}

impl Supervisor {
    pub(crate) fn new(
        pod: Arc<Pod>,
        previous: Option<&pb::Report>,
        commands: mpsc::Receiver<Command>,
        publisher: Publisher,
        directory: watch::Sender<Arc<Directory>>,
    ) -> Result<Self, DuplicateName> {
        let settings = pod.settings();
        let or = |millis, default| positive(millis).map_or(default, Duration::from_millis);
        let backoff = Backoff::new(
            or(settings.backoff_initial_ms, BACKOFF_INITIAL),
            or(settings.backoff_max_ms, BACKOFF_MAX),
        );
        let deadline = pod.spec().deadline();
        let timeouts = Timeouts::new(deadline, or(settings.values_wait_ms, VALUES_WAIT));
        let before = |name: &str| {
            let report = previous?;
            let mut all = report.init_containers.iter().chain(&report.containers);
            all.find(|status| status.name == name)
        };
        let mut slots = Slots::new(pod.spec().restart_policy(), backoff);
        for (role, container) in pod.containers() {
            let (image, mut container) = (pod.image(&container.name), container.clone());
            // The shape in the job file may be newer than the images.
            if !image.image.is_empty() {
                container.image.clone_from(&image.image);
            }
            let before = before(&container.name);
            slots.add(role, container, image, before)?;
        }
        Ok(Self {
            waits_for_address: pod.wants_address(),
            pod,
            began: Instant::now(),
            slots,
            values: None,
            values_missing: "the container waits for its values from the agent".to_owned(),
            timeouts,
            stop: None,
            attempts: JoinSet::new(),
            helpers: JoinSet::new(),
            events: mpsc::channel(EVENTS),
            commands,
            publisher,
            directory,
            shown: Counters::default(),
            unpacked: BTreeSet::new(),
        })
    }

    /// Runs the pod to its end; the final report is published when this returns.
    pub(crate) async fn run(mut self, values: Option<pb::PodValues>) {
        if let Some(values) = values
            && let Err(error) = self.take_values(values)
        {
            tracing::error!("the staged values cannot be used: {error}");
        }
        loop {
            self.check_timeouts();
            let plan = plan::decide(&self.view());
            for action in &plan.actions {
                self.perform(*action);
            }
            match plan.progress {
                Progress::Running => {}
                Progress::StartsOver => {
                    self.slots.start_over();
                    continue;
                }
                Progress::Completed => {
                    self.order_stop(self.pod.spec().grace(), EndedBy::Themselves, String::new());
                    continue;
                }
                Progress::Finished => break,
            }
            self.publish();
            self.wait(&plan).await;
        }
        self.finish();
    }

    fn now(&self) -> Time {
        self.began.elapsed()
    }

    fn check_timeouts(&mut self) {
        // The wait for the address has a limit of its own, after which containers start without.
        let view = View {
            values: self.has_values(),
            ..self.view()
        };
        match self.timeouts.check(&view) {
            None => {}
            Some(Expired::ActiveDeadline) => {
                let reason = "Pod was active on the node longer than the specified deadline";
                self.tell_deadline(reason);
                self.order_stop(
                    self.pod.spec().grace(),
                    EndedBy::Deadline,
                    reason.to_owned(),
                );
            }
            // A pod that does not get its values must not keep its nodes.
            Some(Expired::Values(waited)) => {
                let reason = format!(
                    "gave up after {} s: {}; check that the kubelet, the agent and the link to the job work, then create the \
                     pod again",
                    waited.as_secs(),
                    self.values_missing
                );
                self.order_stop(Duration::ZERO, EndedBy::NoValues, reason);
            }
        }
    }

    /// Whether containers can be started. Expired values count only until the pod's first start: containers that have run are
    /// restarted with the values they had.
    fn has_values(&self) -> bool {
        let expired = |values: &PodValues| {
            values.not_after > 0 && values.not_after <= Timestamp::now().as_second()
        };
        let started = self.slots.iter().any(|slot| slot.phase != Phase::Idle);
        let values = self.values.as_deref();
        values.is_some_and(|values| started || !expired(values))
    }

    fn view(&self) -> View {
        View {
            containers: self.slots.view(),
            values: self.has_values() && !self.waits_for_address,
            kill_at: self.stop.as_ref().map(|stop| stop.kill_at),
            last: self.stop.as_ref().and_then(|stop| stop.last),
            now: self.now(),
        }
    }

    async fn wait(&mut self, plan: &Plan) {
        let wake = [plan.wake, self.timeouts.next(self.stop.is_some())]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(NEVER);
        tokio::select! {
            biased;
            Some(event) = self.events.1.recv() => self.news(event),
            Some(ended) = self.attempts.join_next() => match ended {
                Ok((id, ended)) => self.ended(id, &ended),
                Err(error) => tracing::error!("an attempt's task failed: {error}"),
            },
            Some(helped) = self.helpers.join_next() => {
                if let Err(error) = helped {
                    tracing::error!("a task of probes or hooks failed: {error}");
                }
            }
            Some(command) = self.commands.recv() => self.execute(command),
            () = sleep_until(self.began + wake) => {}
        }
    }

    fn execute(&mut self, command: Command) {
        match command {
            Command::Stop {
                grace,
                left,
                by,
                reason,
            } => {
                if by == EndedBy::Evicted && self.stop.is_none() {
                    self.publisher.note(EVICTED, reason.clone(), "");
                }
                self.order_stop(grace, by, reason);
                let last = left.map(|left| self.now() + left);
                if let Some(stop) = &mut self.stop {
                    stop.last = stop.last.into_iter().chain(last).min();
                }
            }
            Command::Stats(samples, answer) => {
                // The caller may have gone away.
                answer.send(self.stats(&samples)).ok();
            }
            Command::Values(values, answer) => {
                // The caller may have gone away.
                answer.send(self.take_values(values)).ok();
            }
            Command::Route(route) => self.publisher.update(|report| report.route = Some(route)),
            Command::Note { reason, message } => self.publisher.note(reason, message, ""),
            Command::Addressed(address) => self.addressed(address),
            Command::AddEphemeral {
                container,
                image,
                answer,
            } => {
                // The caller may have gone away.
                answer.send(self.add_ephemeral(*container, *image)).ok();
            }
            Command::UpdateImage { image, answer } => {
                // The caller may have gone away.
                answer.send(self.update_image(*image)).ok();
            }
        }
    }

    fn order_stop(&mut self, grace: Duration, by: EndedBy, reason: String) {
        let kill_at = self.now() + grace;
        if let Some(stop) = &mut self.stop {
            stop.kill_at = stop.kill_at.min(kill_at);
            return;
        }
        self.stop = Some(Stop {
            kill_at,
            last: None,
            by,
            reason,
        });
        for slot in self.slots.iter_mut() {
            slot.stop_probing();
        }
    }

    /// Checks newer values against the pod's shape, once for whoever sent them, and writes the files of its volumes.
    fn take_values(&mut self, values: pb::PodValues) -> Result<(), String> {
        if self
            .values
            .as_ref()
            .is_some_and(|current| values.revision <= current.revision)
        {
            return Ok(());
        }
        let written = PodValues::check(values, self.pod.spec())
            .map_err(|error| chain(&error))
            .and_then(|values| {
                let written = self.pod.volumes.write(&values);
                written.map(|()| values).map_err(|error| chain(&error))
            });
        match written {
            Ok(values) => {
                VALUES_EXPIRED.clone_into(&mut self.values_missing);
                self.values = Some(Arc::new(values));
                Ok(())
            }
            Err(message) => {
                self.values_missing.clone_from(&message);
                Err(message)
            }
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Start(id) => self.start(id),
            Action::PreStop(id) => self.stop_container(id, StopStage::PreStop),
            Action::Term(id) => self.stop_container(id, StopStage::Term),
            Action::Kill(id) => self.stop_container(id, StopStage::Kill),
        }
    }

    fn stop_container(&mut self, id: SlotId, stage: StopStage) {
        let now = self.now();
        if let Some(slot) = self.slots.get_mut(id) {
            slot.stop(stage, now);
        }
        if stage == StopStage::PreStop {
            self.run_pre_stop(id);
        }
    }

    fn start(&mut self, id: SlotId) {
        let Some(values) = self.values.clone() else {
            return;
        };
        let Ok(target) = self.target_of(id) else {
            // The status says so; the start of the target wakes the supervisor.
            return;
        };
        let Some(slot) = self.slots.get_mut(id) else {
            return;
        };
        let written = slot.begin();
        slot.target = target;
        let attempt = Attempt {
            spec: Arc::clone(&slot.spec),
            number: slot.history.attempt,
            values,
            written,
            abort: slot.abort.clone(),
            events: self.events.0.clone(),
            target,
        };
        let pod = Arc::clone(&self.pod);
        self.attempts
            .spawn(async move { (id, container::run(pod, attempt).await) });
    }

    fn news(&mut self, event: Event) {
        let Some(slot) = self.slots.get_mut(event.id) else {
            return;
        };
        match event.news {
            News::Running {
                program,
                started_at,
            } => {
                slot.running(program, started_at);
                self.watch_health(event.id);
            }
            News::Lost(losses) => note_lost_lines(slot, &mut self.publisher, &losses),
            News::Unmounted(unmounted) => self.image_unmounted(unmounted),
            // An earlier attempt's tasks may still have had something to tell.
            news if event.attempt == slot.history.attempt => self.health_news(event.id, news),
            News::PostStarted { .. }
            | News::PreStopped { .. }
            | News::Probed(_)
            | News::Told(_) => {}
        }
    }

    fn ended(&mut self, id: SlotId, ended: &Ended) {
        let now = self.now();
        let Some(slot) = self.slots.get_mut(id) else {
            return;
        };
        if slot.has_lost_target() {
            slot.take_back();
            return;
        }
        if ended.unconfigured {
            if slot.hold(&ended.message, now) {
                tracing::warn!(container = slot.spec.name(), "{}", ended.message);
            }
            return;
        }
        slot.end(ended, container_id(&self.pod, slot), now);
        let losses = &ended.losses;
        note_lost_lines(slot, &mut self.publisher, losses);
        if losses.files > 0 {
            let message = format!("{} rotated log files were dropped", losses.files);
            self.publisher
                .note("LogFilesDropped", message, slot.spec.name());
        }
    }

    fn publish(&mut self) {
        let statuses = self.statuses();
        let waits = !self.has_values() && self.stop.is_none();
        let revision = self.values.as_ref().map_or(0, |values| values.revision);
        let stop = self
            .stop
            .as_ref()
            .map(|stop| (stop.by, stop.reason.clone()));
        self.publisher.update(|report| {
            statuses.put_into(report);
            report.waits_for_values = waits;
            report.values_revision = Some(revision);
            if let Some((by, message)) = stop {
                report.ended_by = by.into();
                report.message = message;
            }
        });
        self.directory.send_replace(self.slots.directory());
    }

    fn finish(&mut self) {
        let statuses = self.statuses();
        let by = match self.stop.as_ref().map(|stop| stop.by) {
            None | Some(EndedBy::Themselves) => {
                let lost = self.slots.iter().filter_map(|slot| slot.lost_rank);
                report::by_themselves(lost.max())
            }
            Some(by) => by,
        };
        let succeeded =
            self.view().succeeded() && matches!(by, EndedBy::Themselves | EndedBy::Stop);
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
            statuses.put_into(report);
            report.r#final = true;
            report.waits_for_values = false;
            report.ended_by = by.into();
            report.outcome = outcome.into();
            match by {
                EndedBy::Deadline => "DeadlineExceeded".clone_into(&mut report.reason),
                EndedBy::NoValues => no_values.clone_into(&mut report.reason),
                EndedBy::TimeLimit => "SlurmTimeLimit".clone_into(&mut report.reason),
                EndedBy::Evicted => EVICTED.clone_into(&mut report.reason),
                EndedBy::Unspecified
                | EndedBy::Themselves
                | EndedBy::Stop
                | EndedBy::Signal
                | EndedBy::LostRank
                | EndedBy::LostNode => {}
            }
            report.message = message;
        });
        self.directory.send_replace(self.slots.directory());
    }
}

/// Adds a note on how many lines of this attempt's log were lost so far, if more were lost since the last note.
fn note_lost_lines(slot: &mut Slot, publisher: &mut Publisher, losses: &Losses) {
    if losses.lines <= slot.lost_lines {
        return;
    }
    slot.lost_lines = losses.lines;
    let why = losses.error.as_deref().unwrap_or("the file system hangs");
    let message = format!("{} log lines could not be written: {why}", losses.lines);
    publisher.note("LogLinesLost", message, slot.spec.name());
}

fn positive(number: i64) -> Option<u64> {
    u64::try_from(number).ok().filter(|number| *number > 0)
}
