//! Limits the open connections of the API, depending on what is known of their clients.
//!
//! A client that presents a certificate of the client CA is *identified* from its handshake on. Every other client is
//! *unidentified* until a request on its connection has been authenticated by a token and authorized. Unidentified
//! connections share a small part of the total; if there are too many, the oldest one of the address with the most
//! connections is closed. So a flood of them locks out neither the API server, which has a certificate, nor a client
//! with a token at another address.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use knoc_link::admission::{Admissions, Bounds, Source, Ticket};
use knoc_proto::log_limit::LogLimit;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Identified connections at a time. Each is one stream, so 200 execs, 100 followed logs and a scraper fit many times.
const MAX_IDENTIFIED: usize = 2048;
/// Unidentified connections at a time; metrics-server and Prometheus are two.
const MAX_UNIDENTIFIED: usize = 256;

/// All connections of the port.
#[derive(Debug, Clone)]
pub(super) struct ConnectionSlots(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    identified: Arc<Semaphore>,
    most: usize,
    /// The lock is never held across an await.
    unidentified: Mutex<Unidentified>,
}

#[derive(Debug)]
struct Unidentified {
    admissions: Admissions,
    cuts: HashMap<Ticket, CancellationToken>,
    log: LogLimit<Source>,
}

/// What one connection counts as. Dropping it frees its slot.
#[derive(Debug)]
pub(super) struct ConnectionSlot {
    shared: Arc<Shared>,
    counted: Mutex<Counted>,
    /// Cancelled when an unidentified connection must be closed.
    cut: CancellationToken,
}

#[derive(Debug)]
enum Counted {
    Identified { _slot: OwnedSemaphorePermit },
    Unidentified(Ticket),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Unidentified {
    /// Logs a line about this source, unless there were many.
    fn log(&mut self, source: Source, line: &str) {
        let verdict = self.log.event(Instant::now(), source);
        if let Some(count) = verdict.left_out {
            warn!(count, "further closed connections were not logged");
        }
        if verdict.write {
            warn!(%source, "{line}");
        }
    }
}

impl ConnectionSlots {
    /// Without connections; the limits follow from the file descriptors of this process, two for each connection.
    pub(super) fn own() -> Self {
        let share = Bounds::own().finished;
        Self::new(
            (2 * share).min(MAX_IDENTIFIED),
            (share / 2).min(MAX_UNIDENTIFIED),
        )
    }

    fn new(identified: usize, unidentified: usize) -> Self {
        Self(Arc::new(Shared {
            identified: Arc::new(Semaphore::new(identified)),
            most: identified,
            unidentified: Mutex::new(Unidentified {
                admissions: Admissions::new(unidentified, unidentified / 2),
                cuts: HashMap::new(),
                log: LogLimit::default(),
            }),
        }))
    }

    /// Counts a new connection. `None` if it is identified and there are too many of those.
    pub(super) fn enter(&self, source: Source, identified: bool) -> Option<ConnectionSlot> {
        let shared = Arc::clone(&self.0);
        let cut = CancellationToken::new();
        let counted = if identified {
            let Ok(slot) = Arc::clone(&shared.identified).try_acquire_owned() else {
                let most = shared.most;
                let line = format!("refused a connection, {most} with a certificate are open");
                lock(&shared.unidentified).log(source, &line);
                return None;
            };
            Counted::Identified { _slot: slot }
        } else {
            let mut unidentified = lock(&shared.unidentified);
            let (ticket, evicted) = unidentified.admissions.admit(source);
            unidentified.cuts.insert(ticket, cut.clone());
            if let Some((evicted, source)) = evicted {
                if let Some(cut) = unidentified.cuts.remove(&evicted) {
                    cut.cancel();
                }
                let line = "closed the oldest of too many connections without an identity";
                unidentified.log(source, line);
            }
            Counted::Unidentified(ticket)
        };
        Some(ConnectionSlot {
            shared,
            counted: Mutex::new(counted),
            cut,
        })
    }
}

impl ConnectionSlot {
    /// A request on this connection was authenticated and authorized. Half of the slots of identified connections are
    /// reserved for clients with a certificate; if the other half is in use the connection stays unidentified.
    pub(super) fn identified(&self) {
        let mut counted = lock(&self.counted);
        let free = self.shared.identified.available_permits();
        if let Counted::Unidentified(ticket) = *counted
            && free > self.shared.most / 2
            && let Ok(slot) = Arc::clone(&self.shared.identified).try_acquire_owned()
        {
            self.shared.leave(ticket);
            *counted = Counted::Identified { _slot: slot };
        }
    }

    /// Returns when the connection must be closed in favour of another one. Cancel safe.
    pub(super) async fn revoked(&self) {
        self.cut.cancelled().await;
    }
}

impl Shared {
    fn leave(&self, ticket: Ticket) {
        let mut unidentified = lock(&self.unidentified);
        unidentified.admissions.remove(ticket);
        unidentified.cuts.remove(&ticket);
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        if let Counted::Unidentified(ticket) = *lock(&self.counted) {
            self.shared.leave(ticket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(number: u8) -> Source {
        Source::V4([127, 0, 0, number].into())
    }

    #[test]
    fn tokens_leave_half_of_the_slots_to_certificates() {
        let slots = ConnectionSlots::new(4, 8);
        let by_token: Vec<_> = (1..=4)
            .map(|number| slots.enter(from(number), false).unwrap())
            .collect();
        for slot in &by_token {
            slot.identified();
        }
        assert_eq!(slots.0.identified.available_permits(), 2);
        assert!(slots.enter(from(9), true).is_some());
        // The others stay unidentified.
        assert!(by_token.iter().all(|one| !one.cut.is_cancelled()));
    }

    #[test]
    fn unidentified_connections_displace_only_each_other() {
        let slots = ConnectionSlots::new(4, 8);
        let certified = slots.enter(from(2), true).unwrap();
        let scraper = slots.enter(from(1), false).unwrap();
        let by_token = slots.enter(from(2), false).unwrap();
        by_token.identified();
        let flood: Vec<_> = (0..100)
            .map(|_| slots.enter(from(2), false).unwrap())
            .collect();
        for kept in [&certified, &scraper, &by_token] {
            assert!(!kept.cut.is_cancelled());
        }
        let open = flood.iter().filter(|one| !one.cut.is_cancelled()).count();
        assert_eq!(open, 4, "half of the slots of unidentified connections");
        assert!(!flood[99].cut.is_cancelled(), "the newest stays");
        // The API server is always accepted, up to a limit of its own.
        let more: Vec<_> = (0..2)
            .map(|_| slots.enter(from(3), true).unwrap())
            .collect();
        assert!(slots.enter(from(3), true).is_none());
        drop(more);
        assert!(slots.enter(from(3), true).is_some());
        drop((flood, scraper, by_token, certified));
        let unidentified = lock(&slots.0.unidentified);
        assert!(unidentified.admissions.is_empty() && unidentified.cuts.is_empty());
        assert_eq!(slots.0.identified.available_permits(), 4);
    }
}
