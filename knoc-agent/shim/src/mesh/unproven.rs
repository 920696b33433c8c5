//! The tunnels whose other end the agent has not named yet. Whoever reaches the node can open some, so they are bounded in number, and
//! for a new one the oldest of the source that has the most ends.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use knoc_link::{
    Origin,
    admission::{Admissions, Source, Ticket},
};
use tokio::sync::oneshot;

/// How many there may be, and how many of one source: as many as a large node has pods that may all begin at once, such as the workers of
/// a program that look for its scheduler.
const ALL: usize = 256;
const OF_ONE: usize = 128;

/// A handle to them; clones share it.
#[derive(Debug, Clone)]
pub(super) struct Unproven(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    admissions: Admissions,
    /// Dropping one tells its tunnel that it has lost its place.
    places: HashMap<Ticket, oneshot::Sender<()>>,
}

/// The place of one tunnel, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    all: Unproven,
    ticket: Ticket,
    lost: oneshot::Receiver<()>,
}

impl Default for Unproven {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State {
            admissions: Admissions::new(ALL, OF_ONE),
            places: HashMap::new(),
        })))
    }
}

impl Unproven {
    /// A place for a tunnel from there.
    pub(super) fn admit(&self, origin: Origin) -> Place {
        let (keeper, lost) = oneshot::channel();
        let mut state = self.lock();
        let (ticket, evicted) = state.admissions.admit(Source::from(origin));
        state.places.insert(ticket, keeper);
        if let Some((evicted, _)) = evicted {
            state.places.remove(&evicted);
        }
        drop(state);
        Place {
            all: self.clone(),
            ticket,
            lost,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Waits until another tunnel has taken the place. Cancel safe.
    pub(super) async fn lost(&mut self) {
        // Nothing is ever sent.
        (&mut self.lost).await.ok();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.all.lock();
        state.admissions.remove(self.ticket);
        state.places.remove(&self.ticket);
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use futures::FutureExt as _;

    use super::*;

    fn from(host: u8) -> Origin {
        Origin::Address(SocketAddr::from(([10, 0, 0, host], 4001)))
    }

    fn is_lost(place: &mut Place) -> bool {
        place.lost().now_or_never().is_some()
    }

    #[test]
    fn the_pods_of_a_whole_node_begin_at_once() {
        let all = Unproven::default();
        let mut pods: Vec<Place> = (0..128).map(|_| all.admit(from(1))).collect();
        assert!(!pods.iter_mut().any(is_lost));
    }

    #[test]
    fn who_opens_many_tunnels_loses_its_own_and_nobody_elses() {
        let all = Unproven::default();
        let mut other = all.admit(from(1));
        let mut many: Vec<Place> = (0..=OF_ONE).map(|_| all.admit(from(2))).collect();
        let lost: Vec<bool> = many.iter_mut().map(is_lost).collect();
        assert!(lost[0] && !lost[1..].contains(&true), "{lost:?}");
        assert!(!is_lost(&mut other));
        // From several hosts: the oldest of the one with the most.
        let further = (3..8).flat_map(|host| (0..OF_ONE).map(move |_| host));
        let further: Vec<Place> = further.map(|host| all.admit(from(host))).collect();
        assert!(!is_lost(&mut other));
        assert!(all.lock().admissions.len() <= ALL);
        drop((further, many, other));
        let state = all.lock();
        assert!(state.admissions.is_empty() && state.places.is_empty());
    }
}
