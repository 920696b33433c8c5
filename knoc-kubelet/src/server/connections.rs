//! How many connections the API has at once, by what is known of their clients.
//!
//! A client that shows a certificate of the client CA is *identified* from its handshake on. Every other one is a
//! *stranger* until a request on its connection has been authenticated, by a token, and allowed. Strangers share a
//! small part of the connections, and if there are too many, the oldest of the busiest address is closed. So strangers,
//! however many, keep out neither the API server, which has a certificate, nor a client with a token at another
//! address.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use knoc_link::admission::{Admissions, Bounds, Source, Ticket};
use knoc_proto::log_limit::LogLimit;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Identified connections at once: a stream each, so 200 execs, 100 followers and a scraper fit many times over.
const MAX_IDENTIFIED: usize = 2048;
/// Strangers at once; metrics-server and Prometheus are two.
const MAX_STRANGERS: usize = 256;

/// All connections of the port.
#[derive(Debug, Clone)]
pub(super) struct ConnectionSlots(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    identified: Arc<Semaphore>,
    most: usize,
    /// Never held across an await.
    strangers: Mutex<Strangers>,
}

#[derive(Debug)]
struct Strangers {
    admissions: Admissions,
    cuts: HashMap<Ticket, CancellationToken>,
    log: LogLimit<Source>,
}

/// What one connection counts as. Dropping it gives its place back.
#[derive(Debug)]
pub(super) struct ConnectionSlot {
    shared: Arc<Shared>,
    counted: Mutex<Counted>,
    /// Cancelled when a stranger has to go.
    cut: CancellationToken,
}

#[derive(Debug)]
enum Counted {
    Identified { _place: OwnedSemaphorePermit },
    Stranger(Ticket),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Strangers {
    /// Writes a line about this source, unless there were many.
    fn log(&mut self, source: Source, line: &str) {
        let verdict = self.log.event(Instant::now(), source);
        if let Some(count) = verdict.left_out {
            warn!(
                count,
                "further lines about refused connections were left out of the log"
            );
        }
        if verdict.write {
            warn!(%source, "{line}");
        }
    }
}

impl ConnectionSlots {
    /// None yet; as many as the descriptors of this process carry, two for each connection.
    pub(super) fn own() -> Self {
        let share = Bounds::own().finished;
        Self::new(
            (2 * share).min(MAX_IDENTIFIED),
            (share / 2).min(MAX_STRANGERS),
        )
    }

    fn new(identified: usize, strangers: usize) -> Self {
        Self(Arc::new(Shared {
            identified: Arc::new(Semaphore::new(identified)),
            most: identified,
            strangers: Mutex::new(Strangers {
                admissions: Admissions::new(strangers, strangers / 2),
                cuts: HashMap::new(),
                log: LogLimit::default(),
            }),
        }))
    }

    /// A new connection. `None` if it is identified and there are too many of those.
    pub(super) fn enter(&self, source: Source, identified: bool) -> Option<ConnectionSlot> {
        let shared = Arc::clone(&self.0);
        let cut = CancellationToken::new();
        let counted = if identified {
            let Ok(place) = Arc::clone(&shared.identified).try_acquire_owned() else {
                let most = shared.most;
                let line = format!("refused a connection, {most} with a certificate are open");
                lock(&shared.strangers).log(source, &line);
                return None;
            };
            Counted::Identified { _place: place }
        } else {
            let mut strangers = lock(&shared.strangers);
            let (ticket, evicted) = strangers.admissions.admit(source);
            strangers.cuts.insert(ticket, cut.clone());
            if let Some((evicted, source)) = evicted {
                if let Some(cut) = strangers.cuts.remove(&evicted) {
                    cut.cancel();
                }
                let line = "closed the oldest of too many connections without an identity";
                strangers.log(source, line);
            }
            Counted::Stranger(ticket)
        };
        Some(ConnectionSlot {
            shared,
            counted: Mutex::new(counted),
            cut,
        })
    }
}

impl ConnectionSlot {
    /// A request on this connection was authenticated and allowed. Half of the places of identified connections are
    /// kept for clients with a certificate; if the other half is taken the connection goes on as a stranger's.
    pub(super) fn identified(&self) {
        let mut counted = lock(&self.counted);
        let free = self.shared.identified.available_permits();
        if let Counted::Stranger(ticket) = *counted
            && free > self.shared.most / 2
            && let Ok(place) = Arc::clone(&self.shared.identified).try_acquire_owned()
        {
            self.shared.leave(ticket);
            *counted = Counted::Identified { _place: place };
        }
    }

    /// Returns when the connection has to be closed for another one. Cancel safe.
    pub(super) async fn revoked(&self) {
        self.cut.cancelled().await;
    }
}

impl Shared {
    fn leave(&self, ticket: Ticket) {
        let mut strangers = lock(&self.strangers);
        strangers.admissions.remove(ticket);
        strangers.cuts.remove(&ticket);
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        if let Counted::Stranger(ticket) = *lock(&self.counted) {
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
    fn tokens_leave_half_of_the_places_to_certificates() {
        let standings = ConnectionSlots::new(4, 8);
        let by_token: Vec<_> = (1..=4)
            .map(|number| standings.enter(from(number), false).unwrap())
            .collect();
        for standing in &by_token {
            standing.identified();
        }
        assert_eq!(standings.0.identified.available_permits(), 2);
        assert!(standings.enter(from(9), true).is_some());
        // The others go on as strangers.
        assert!(by_token.iter().all(|one| !one.cut.is_cancelled()));
    }

    #[test]
    fn strangers_displace_strangers_and_nobody_who_is_known() {
        let standings = ConnectionSlots::new(4, 8);
        let certified = standings.enter(from(2), true).unwrap();
        let scraper = standings.enter(from(1), false).unwrap();
        let by_token = standings.enter(from(2), false).unwrap();
        by_token.identified();
        let flood: Vec<_> = (0..100)
            .map(|_| standings.enter(from(2), false).unwrap())
            .collect();
        for kept in [&certified, &scraper, &by_token] {
            assert!(!kept.cut.is_cancelled());
        }
        let open = flood.iter().filter(|one| !one.cut.is_cancelled()).count();
        assert_eq!(open, 4, "half of the places of strangers");
        assert!(!flood[99].cut.is_cancelled(), "the newest stays");
        // The API server always gets in, up to a number that is none of strangers.
        let more: Vec<_> = (0..2)
            .map(|_| standings.enter(from(3), true).unwrap())
            .collect();
        assert!(standings.enter(from(3), true).is_none());
        drop(more);
        assert!(standings.enter(from(3), true).is_some());
        drop((flood, scraper, by_token, certified));
        let strangers = lock(&standings.0.strangers);
        assert!(strangers.admissions.is_empty() && strangers.cuts.is_empty());
        assert_eq!(standings.0.identified.available_permits(), 4);
    }
}
