//! The addresses of one agent, tried in order.
//!
//! A site may have several login nodes, of which one at a time runs the agent. The address that worked last comes first,
//! then the others in the order of the configuration; one that failed is left out until its [`Backoff`] allows the next
//! attempt. All connections of a kubelet share this, so that two of them do not log in twice with a key that is refused.
use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use knoc_proto::error::chain;
use tokio::time::Instant;

use super::{
    Carrier, Connection, Credentials, ExpectPeer, LinkError,
    backoff::{Backoff, Kind},
    connect::connect,
};

/// One or more addresses of an agent. Clones share what is known about them.
#[derive(Clone)]
pub struct Route(Arc<Shared>);

struct Shared {
    /// At least one.
    carriers: Vec<Carrier>,
    /// Held for no await.
    state: Mutex<State>,
    /// Attempts that cost a login are made one after the other.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// For each carrier, once it has failed.
    failed: Vec<Option<Failed>>,
    /// The one that worked last.
    worked: usize,
}

struct Failed {
    backoff: Backoff,
    /// The last error.
    error: String,
    /// Of the files that the attempt used.
    fingerprint: u64,
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Route").field(&self.0.carriers).finish()
    }
}

/// Two routes are equal if their addresses are, whatever is known about these.
impl PartialEq for Route {
    fn eq(&self, other: &Self) -> bool {
        self.carriers() == other.carriers()
    }
}

impl Eq for Route {}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.0.carriers.iter().map(Carrier::to_string).collect();
        f.write_str(&all.join(", "))
    }
}

impl From<Carrier> for Route {
    fn from(carrier: Carrier) -> Self {
        Self::of(vec![carrier])
    }
}

impl Route {
    /// These addresses; `None` if there is not one.
    #[must_use]
    pub fn new(carriers: Vec<Carrier>) -> Option<Self> {
        (!carriers.is_empty()).then(|| Self::of(carriers))
    }

    fn of(carriers: Vec<Carrier>) -> Self {
        let state = State {
            failed: carriers.iter().map(|_| None).collect(),
            worked: 0,
        };
        Self(Arc::new(Shared {
            carriers,
            state: Mutex::new(state),
            turn: tokio::sync::Mutex::default(),
        }))
    }

    /// The addresses, in the order of the configuration.
    #[must_use]
    pub fn carriers(&self) -> &[Carrier] {
        &self.0.carriers
    }

    /// A connection to the first address that answers, with its peer checked.
    pub async fn connect(
        &self,
        credentials: Option<&Credentials>,
        expect: &ExpectPeer,
    ) -> Result<Connection, LinkError> {
        if let [carrier] = self.carriers()
            && !carrier.starts_a_process()
        {
            // The caller's own pauses are enough.
            return connect(carrier, credentials, expect).await;
        }
        let _turn = self.0.turn.lock().await;
        let mut failures = Vec::new();
        for index in self.order() {
            let carrier = &self.0.carriers[index];
            let fingerprint = fingerprint(carrier);
            if let Some(error) = self.too_early(index, fingerprint) {
                failures.push(LinkError::TooEarly { error });
                continue;
            }
            match connect(carrier, credentials, expect).await {
                Ok(connection) => {
                    self.worked(index);
                    return Ok(connection);
                }
                Err(error) => {
                    self.failed(index, &error, fingerprint);
                    failures.push(error);
                }
            }
        }
        if failures.len() == 1
            && let Some(only) = failures.pop()
        {
            return Err(only);
        }
        let errors = failures.iter().map(|error| chain(error)).collect();
        Err(LinkError::NoAddress { errors })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one that worked last, then the others in their own order.
    fn order(&self) -> Vec<usize> {
        let first = self.state().worked;
        let others = (0..self.0.carriers.len()).filter(|index| *index != first);
        std::iter::once(first).chain(others).collect()
    }

    /// The last error of this address, if it may not be tried yet. Files that have changed since count as another address.
    fn too_early(&self, index: usize, fingerprint: u64) -> Option<String> {
        let state = self.state();
        let failed = state.failed[index].as_ref()?;
        let early = !failed.backoff.allows(Instant::now()) && failed.fingerprint == fingerprint;
        early.then(|| failed.error.clone())
    }

    fn worked(&self, index: usize) {
        let mut state = self.state();
        state.worked = index;
        state.failed[index] = None;
    }

    fn failed(&self, index: usize, error: &LinkError, fingerprint: u64) {
        let kind = Kind::of(error, &self.0.carriers[index]);
        let mut state = self.state();
        let before = state.failed[index].take();
        let mut backoff = before
            .filter(|before| before.fingerprint == fingerprint)
            .map_or_else(Backoff::default, |before| before.backoff);
        backoff.failed(kind, Instant::now(), rand::random());
        state.failed[index] = Some(Failed {
            backoff,
            error: chain(error),
            fingerprint,
        });
    }
}

fn fingerprint(carrier: &Carrier) -> u64 {
    match carrier {
        Carrier::Ssh(ssh) => ssh.fingerprint(),
        Carrier::Tcp(_) | Carrier::HttpConnect { .. } | Carrier::Unix(_) | Carrier::Exec(_) => 0,
    }
}

#[cfg(test)]
mod tests;
