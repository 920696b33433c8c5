//! Tasks: dial the kubelets of `[[dial_out]]`, which are then served like those that dial the agent.
//!
//! For each kubelet one connection waits until the kubelet takes it, and then the next one is dialled. A failure is tried
//! again after a pause that doubles and is jittered, since all agents of a site may lose a kubelet at the same time.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::FutureExt as _;
use jiff::Timestamp;
use knoc_link::{
    Carrier, Connection, Credentials, ExpectPeer, Incoming, LinkError,
    dial_out::{self, Caller, Target},
    proxy::InvalidEnvironment,
};
use knoc_proto::{error::chain, pb::Finding};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::{config::Config, lease::Process};

/// The pause after the first failure.
const PAUSE: Duration = Duration::from_millis(250);
/// The longest pause: after an outage, every agent is back within it.
const PAUSE_MOST: Duration = Duration::from_secs(15);
/// The pause after the kubelet preferred another agent of this site, which only a restart of this one changes.
const SUPERSEDED: Duration = Duration::from_mins(1);
/// The pause before the next connection if one was taken at once.
const BETWEEN: Duration = Duration::from_millis(20);
/// A connection that lasted this long does not count as a failure.
const LIVED: Duration = Duration::from_secs(10);

/// The state of the link to one kubelet.
#[derive(Debug, Clone)]
struct Status {
    address: String,
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    Dialling,
    /// A connection waits, or was taken by `peer`.
    Up {
        peer: String,
        since: Timestamp,
    },
    Down {
        error: String,
        cure: &'static str,
        since: Timestamp,
    },
}

/// The states of the links to the kubelets that are dialled. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Board(Arc<Mutex<Vec<Status>>>);

impl Board {
    fn set(&self, index: usize, state: State) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(status) = all.get_mut(index) {
            status.state = state;
        }
    }

    /// One finding for each kubelet.
    #[must_use]
    pub fn findings(&self) -> Vec<Finding> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(finding).collect()
    }
}

fn finding(status: &Status) -> Finding {
    let (ok, detail, cure) = match &status.state {
        State::Dialling => (true, "not tried yet".to_owned(), ""),
        State::Up { peer, since } => (true, format!("{peer} is reached since {since:.0}"), ""),
        State::Down { error, cure, since } => (false, format!("since {since:.0}: {error}"), *cure),
    };
    Finding {
        check: format!("link: dial out to {}", status.address),
        ok,
        detail,
        cure: cure.to_owned(),
    }
}

/// How the kubelets of the site file are reached.
pub fn targets(config: &Config) -> Result<Vec<Target>, InvalidEnvironment> {
    let variable = |name: &str| {
        let of_site = config.env.get(name).cloned();
        of_site.or_else(|| std::env::var(name).ok())
    };
    let entries = config.dial_out.iter().map(|entry| {
        // The site file was checked.
        let via = entry.via().unwrap_or_default();
        Ok(Target {
            carrier: Carrier::Tcp(entry.address.clone()).via(&via, variable)?,
            server_name: entry.server_name.clone(),
            expect: entry.expect().unwrap_or(ExpectPeer::AnyKubelet),
        })
    });
    entries.collect()
}

/// Starts a task for each kubelet. Their connections arrive in the stream, which ends with the tasks.
pub fn start(
    targets: Vec<Target>,
    credentials: &Credentials,
    epoch: i64,
    board: &Board,
    stop: &CancellationToken,
    tasks: &mut JoinSet<()>,
) -> Incoming {
    let process = Process::own();
    let instance = format!("{}/{}/{}", process.host, process.boot_id, process.pid);
    let caller = Caller::new(&instance, epoch, &process.host);
    let statuses = targets.iter().map(|target| Status {
        address: target.carrier.address().unwrap_or_default().to_owned(),
        state: State::Dialling,
    });
    *board.0.lock().unwrap_or_else(PoisonError::into_inner) = statuses.collect();
    let (taken_to, taken) = mpsc::channel(1);
    for (index, target) in targets.into_iter().enumerate() {
        let dialling = Dialling {
            target,
            index,
            credentials: credentials.clone(),
            caller: caller.clone(),
            board: board.clone(),
            taken: taken_to.clone(),
        };
        tasks.spawn(
            stop.clone()
                .run_until_cancelled_owned(dialling.run())
                .map(drop),
        );
    }
    Incoming::of(ReceiverStream::new(taken))
}

/// One kubelet.
struct Dialling {
    target: Target,
    index: usize,
    credentials: Credentials,
    caller: Caller,
    board: Board,
    taken: mpsc::Sender<Connection>,
}

impl Dialling {
    async fn run(self) {
        let mut pause = PAUSE;
        let mut last = String::new();
        loop {
            let began = tokio::time::Instant::now();
            let error = match self.once(&mut last).await {
                Ok(connection) => {
                    if self.taken.send(connection).await.is_err() {
                        return;
                    }
                    pause = PAUSE;
                    tokio::time::sleep(BETWEEN).await;
                    continue;
                }
                Err(error) => error,
            };
            if began.elapsed() > LIVED && last.is_empty() {
                pause = PAUSE;
            }
            self.failed(&error, &mut last);
            let superseded = matches!(error, LinkError::Superseded { .. });
            let wait = if superseded { SUPERSEDED } else { pause };
            pause = (pause * 2).min(PAUSE_MOST);
            tokio::time::sleep(wait.mul_f64(rand::random_range(0.5..1.5))).await;
        }
    }

    /// A connection that the kubelet has taken. `last` is the error that was reported last.
    async fn once(&self, last: &mut String) -> Result<Connection, LinkError> {
        let waiting = dial_out::dial(&self.target, &self.credentials, &self.caller).await?;
        let peer = waiting.peer().to_string();
        if !last.is_empty() || self.board.is_first(self.index) {
            tracing::info!(kubelet = peer, "the kubelet is reached");
        }
        last.clear();
        self.board.up(self.index, peer);
        waiting.taken().await
    }

    fn failed(&self, error: &LinkError, last: &mut String) {
        let text = chain(error);
        if *last != text {
            let target = &self.target.carrier;
            tracing::warn!(%target, error = text, "the kubelet is not reached; trying again");
            last.clone_from(&text);
        }
        self.board.down(self.index, text, cure(error));
    }
}

impl Board {
    fn is_first(&self, index: usize) -> bool {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(index)
            .is_some_and(|status| matches!(status.state, State::Dialling))
    }

    fn up(&self, index: usize, peer: String) {
        let now = Timestamp::now();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(status) = all.get_mut(index) else {
            return;
        };
        let since = match &status.state {
            State::Up { since, .. } => *since,
            State::Dialling | State::Down { .. } => now,
        };
        status.state = State::Up { peer, since };
    }

    fn down(&self, index: usize, error: String, cure: &'static str) {
        let since = Timestamp::now();
        self.set(index, State::Down { error, cure, since });
    }
}

/// What to do about it.
fn cure(error: &LinkError) -> &'static str {
    match error {
        LinkError::Connect { .. } => {
            "check the address in [[dial_out]], and name resolution, routes and firewalls on this host; if only a proxy leads \
             out, name it in `proxy`"
        }
        LinkError::Timeout { .. } => {
            "a firewall drops the packets, or the kubelet does not run: check `kubectl get pods,services -n knoc-system`; if \
             only a proxy leads out, name it in `proxy`"
        }
        LinkError::Proxy { .. } => {
            "check `proxy` and `proxy_credentials` in [[dial_out]], or the variables HTTPS_PROXY and NO_PROXY"
        }
        LinkError::Handshake { .. } | LinkError::Greeting { .. } => {
            "the kubelet's log has the other side of it; an Ingress has to pass TLS through; the certificates of both sides \
             have to be of one CA, and their clocks right"
        }
        LinkError::Superseded { .. } => {
            "stop one of the two agents; to make this one serve the kubelet, restart it"
        }
        _ => "see the agent's log",
    }
}

#[cfg(test)]
mod tests;
