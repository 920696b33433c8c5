//! Task: the postStart hook and then the probes of one running program; and the actions of probes and hooks.
//!
//! [`Checks`] decides what is tried when, and what the results mean; this task tries, at most two probes at a time, and
//! sends what changed to the supervisor, which owns the task and ends it with the program. Nothing here needs a thread or,
//! but for commands in the container, a process. Only what the pod itself listens on is reached.

mod asked;
mod grpc;
mod http;
mod known;
mod tls;

use std::{sync::Arc, time::Duration};

use futures::stream::{FuturesUnordered, StreamExt as _};
use knoc_proto::{
    error::chain,
    expand,
    pb::{self, hook, probe},
    pod::PodValues,
    text,
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use self::known::Known;
use super::{
    container::{Event, News, Program, Told},
    environment,
    exec::{self, Captured},
    health::{Checks, Kind, Outcome, Telling},
    pod::Pod,
    role::ContainerSpec,
};

/// What probes and hooks connect to. If nothing of the pod listens there, see [`known`].
const LOCALHOST: &str = "127.0.0.1";

/// How often a command is tried to be started, as in Kubernetes.
const STARTS: u32 = 3;

/// Longer than any job.
const NO_LIMIT: Duration = Duration::from_hours(24 * 365);

/// The longest text of a probe that is shown: that of an Event.
const SHOWN: usize = 1024;

/// One running program with its probes and hooks.
#[derive(Debug)]
pub(crate) struct Probed {
    pub(crate) pod: Arc<Pod>,
    pub(crate) spec: Arc<ContainerSpec>,
    pub(crate) program: Arc<Program>,
    /// The number of the attempt, by which the supervisor knows old news.
    pub(crate) attempt: u32,
    /// The pod's values as the program got them: commands of probes may refer to them.
    pub(crate) values: Arc<PodValues>,
    pub(crate) events: mpsc::Sender<Event>,
}

impl Probed {
    /// Whether there is anything to do after the start of a program of `container`.
    pub(crate) fn needs(container: &pb::Container) -> bool {
        container.post_start.is_some() || Checks::of(container).is_some()
    }

    /// Runs the postStart hook, and then the probes until none will be tried again. `stop` is cancelled when the container is
    /// to stop: then the hook ends, and only readiness is probed.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let began = Instant::now();
        if let Some(hook) = &self.spec.container.post_start {
            let Some(succeeded) = stop.run_until_cancelled(self.hook(hook)).await else {
                return;
            };
            self.send(News::PostStarted { succeeded }).await;
            if !succeeded {
                return;
            }
        }
        if let Some(checks) = Checks::of(&self.spec.container) {
            self.probe(checks, began, &stop).await;
        }
    }

    /// Runs the preStop hook.
    pub(crate) async fn pre_stop(self) {
        if let Some(hook) = &self.spec.container.pre_stop {
            let succeeded = self.hook(hook).await;
            self.send(News::PreStopped { succeeded }).await;
        }
    }

    async fn probe(&self, mut checks: Checks, began: Instant, stop: &CancellationToken) {
        let mut tellings = Kind::ALL.map(|_| Telling::new());
        let known = &Known::of(self.pod.network.clone());
        let mut tries = FuturesUnordered::new();
        while !checks.over() {
            let now = began.elapsed();
            let next = checks.next();
            if let Some((kind, at)) = next
                && at <= now
            {
                checks.begin(kind, now);
                tries.push(async move { (kind, self.once(kind, known).await) });
                continue;
            }
            let wake = next.map_or(NO_LIMIT, |(_, at)| at);
            tokio::select! {
                biased;
                () = stop.cancelled(), if !checks.is_ending() => checks.stop(),
                Some((kind, outcome)) = tries.next() => {
                    let [startup, liveness, readiness] = &mut tellings;
                    let telling = match kind {
                        Kind::Startup => startup,
                        Kind::Liveness => liveness,
                        Kind::Readiness => readiness,
                    };
                    self.tell(kind, &outcome, telling, began.elapsed()).await;
                    if let Some(change) = checks.end(kind, &outcome) {
                        self.send(News::Probed(change)).await;
                    }
                }
                () = sleep_until(began + wake) => {}
            }
        }
    }

    /// Tells what did not go as it should.
    async fn tell(&self, kind: Kind, outcome: &Outcome, telling: &mut Telling, now: Duration) {
        let title = kind.title();
        let (reason, message) = match outcome {
            Outcome::Passed => return,
            Outcome::Warned(why) => ("ProbeWarning", format!("{title} probe warning: {why}")),
            Outcome::Failed(why) => ("Unhealthy", format!("{title} probe failed: {why}")),
            Outcome::Errored(why) => {
                let message = format!("{title} probe errored and resulted in unknown state: {why}");
                ("Unhealthy", message)
            }
        };
        if let Some(count) = telling.failed(now) {
            let message = text::message(&message, SHOWN);
            self.send(News::Told(Told {
                warning: true,
                reason,
                message,
                count,
            }))
            .await;
        }
    }

    /// Tries a probe once.
    async fn once(&self, kind: Kind, known: &Known) -> Outcome {
        let Some(probe) = kind.of(&self.spec.container) else {
            return Outcome::Errored("there is no such probe".to_owned());
        };
        let limit = probe.timeout();
        let (trying, late) = match &probe.action {
            Some(probe::Action::Exec(action)) => return self.command(action, limit).await,
            Some(probe::Action::HttpGet(action)) => (
                timeout(limit, http::probe(action, known)).await,
                format!(
                    "{}: context deadline exceeded (Client.Timeout exceeded while awaiting headers)",
                    http::name(action)
                ),
            ),
            Some(probe::Action::TcpSocket(action)) => (
                timeout(limit, tcp(action, known)).await,
                format!("dial tcp {LOCALHOST}:{}: i/o timeout", action.port),
            ),
            Some(probe::Action::Grpc(action)) => (
                timeout(limit, grpc::check(action, known)).await,
                format!(
                    "timeout: health rpc did not complete within {}s",
                    limit.as_secs()
                ),
            ),
            None => return Outcome::Errored("this version cannot do what it asks for".to_owned()),
        };
        trying.unwrap_or(Outcome::Failed(late))
    }

    async fn command(&self, action: &pb::ExecAction, limit: Duration) -> Outcome {
        let facts = self.pod.facts_now();
        let vars = environment::variables(&self.spec.container, &self.values, &facts);
        let env = expand::pod_environment(&vars, &facts.fields);
        let argv = expand::argv(&action.command, &env);
        let mut problem = String::new();
        for _ in 0..STARTS {
            let captured = exec::capture(&self.pod, &self.program, &argv, limit).await;
            match captured {
                Ok(Captured::Ended { exit, .. }) if exit.code == 0 => return Outcome::Passed,
                Ok(Captured::Ended { output, .. }) => {
                    return Outcome::Failed(String::from_utf8_lossy(&output).into_owned());
                }
                Ok(Captured::TimedOut) => {
                    let command = action.command.join(" ");
                    return Outcome::Failed(format!(
                        "command timed out: {command:?} timed out after {}s",
                        limit.as_secs()
                    ));
                }
                Err(error) => problem = chain(&error),
            }
        }
        Outcome::Errored(problem)
    }

    /// Runs a hook to its end. Why it failed may contain secrets, so nobody is told.
    async fn hook(&self, hook: &pb::Hook) -> bool {
        match &hook.action {
            Some(hook::Action::Exec(action)) => {
                let argv: Vec<_> = action
                    .command
                    .iter()
                    .map(|argument| argument.clone().into_bytes())
                    .collect();
                let captured = exec::capture(&self.pod, &self.program, &argv, NO_LIMIT).await;
                matches!(captured, Ok(Captured::Ended { exit, .. }) if exit.code == 0)
            }
            Some(hook::Action::HttpGet(action)) => {
                let known = Known::of(self.pod.network.clone());
                http::hook(action, &known).await
            }
            Some(hook::Action::SleepSeconds(seconds)) => {
                sleep(Duration::from_secs((*seconds).try_into().unwrap_or(0))).await;
                true
            }
            None => false,
        }
    }

    async fn send(&self, news: News) {
        let event = Event {
            id: self.spec.id,
            attempt: self.attempt,
            news,
        };
        // The supervisor outlives its tasks.
        self.events.send(event).await.ok();
    }
}

/// A probe that only connects.
async fn tcp(action: &pb::TcpSocketAction, known: &Known) -> Outcome {
    let Ok(port) = u16::try_from(action.port) else {
        return Outcome::Errored(format!("{} is not a port", action.port));
    };
    match known.connect(port).await {
        Ok(_) => Outcome::Passed,
        Err(error) => Outcome::Failed(error),
    }
}
