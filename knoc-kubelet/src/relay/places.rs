//! The places of all relayed connections: who has each, when a byte was last sent on it, and how it is freed for a new one.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use knoc_link::admission::Source;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    idle::{self, Known},
    plan::PodPort,
};

/// Permission for one connection of a pod, of the node and of a namespace, until it is dropped.
pub(super) type Permits = [OwnedSemaphorePermit; 3];

/// When a byte was last sent on a connection; clones share it.
#[derive(Debug, Clone)]
pub(super) struct Activity {
    began: Instant,
    /// Milliseconds from `began` to the last byte, and one more; 0 if there was none.
    moved: Arc<AtomicU64>,
}

impl Activity {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            moved: Arc::default(),
        }
    }

    /// A byte is sent now.
    pub(super) fn note(&self) {
        let since = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.moved.store(since.saturating_add(1), Ordering::Relaxed);
    }

    fn moved(&self) -> Option<Instant> {
        let since = self.moved.load(Ordering::Relaxed).checked_sub(1)?;
        self.began.checked_add(Duration::from_millis(since))
    }
}

/// The places that are taken; clones are handles on the same ones. The lock is never held across an await.
#[derive(Debug, Clone, Default)]
pub(super) struct Places(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    next: u64,
    taken: HashMap<u64, Taken>,
}

#[derive(Debug)]
struct Taken {
    to: PodPort,
    source: Source,
    activity: Activity,
    cut: CancellationToken,
    permits: Permits,
}

impl Taken {
    fn known(&self, id: u64) -> Known {
        Known {
            id,
            source: self.source,
            began: self.activity.began,
            moved: self.activity.moved(),
        }
    }
}

/// The place of one connection, which is free once it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    id: u64,
    places: Places,
    activity: Activity,
    cut: CancellationToken,
}

impl Places {
    /// A place for a connection from `source`.
    pub(super) fn take(&self, to: &PodPort, source: Source, permits: Permits) -> Place {
        let (activity, cut) = (Activity::new(), CancellationToken::new());
        let taken = Taken {
            to: to.clone(),
            source,
            activity: activity.clone(),
            cut: cut.clone(),
            permits,
        };
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        state.taken.insert(id, taken);
        Place {
            id,
            places: self.clone(),
            activity,
            cut,
        }
    }

    /// Frees the place of an idle connection, of those that `may` allows; returns whose it was, and its permits. Bytes that come after
    /// that are lost with the connection.
    pub(super) fn give_way(&self, may: impl Fn(&Permits) -> bool) -> Option<(PodPort, Permits)> {
        let mut state = self.state();
        let now = Instant::now();
        loop {
            let open = state.taken.iter().filter(|(_, taken)| may(&taken.permits));
            let known = open.map(|(id, taken)| taken.known(*id));
            let id = idle::gives_way(known, now)?;
            // A byte may have been sent since the others were looked at. Then this one is not idle any more, and another one is chosen.
            let chosen = state.taken.get(&id).map(|taken| taken.known(id));
            if idle::gives_way(chosen.into_iter(), now).is_some() {
                let taken = state.taken.remove(&id)?;
                taken.cut.cancel();
                return Some((taken.to, taken.permits));
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    pub(super) fn activity(&self) -> &Activity {
        &self.activity
    }

    /// Returns when the connection has to be closed, because its place was given to another one. Cancel safe.
    pub(super) async fn given_away(&self) {
        self.cut.cancelled().await;
    }

    #[cfg(test)]
    pub(super) fn is_given_away(&self) -> bool {
        self.cut.is_cancelled()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.state().taken.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::sync::Semaphore;

    use super::*;

    fn taken(places: &Places, all: &Arc<Semaphore>) -> Place {
        let to = PodPort {
            uid: "u-1".parse().unwrap(),
            number: 80,
        };
        let permit = || Arc::clone(all).try_acquire_owned().unwrap();
        let source = Source::V4([10, 0, 0, 1].into());
        places.take(&to, source, [permit(), permit(), permit()])
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_is_used_after_it_was_looked_at_stays() {
        let (places, all) = (Places::default(), Arc::new(Semaphore::new(6)));
        let both = [taken(&places, &all), taken(&places, &all)];
        tokio::time::advance(idle::SILENT).await;
        let asked = Cell::new(0);
        // Whichever is looked at first is idle then, and is used while the other one is looked at.
        let may = |_: &Permits| {
            asked.set(asked.get() + 1);
            if asked.get() == 2 {
                for place in &both {
                    place.activity().note();
                }
            }
            true
        };
        assert!(places.give_way(may).is_none());
        assert!(both.iter().all(|place| !place.is_given_away()));
        tokio::time::advance(idle::IDLE).await;
        let given = places.give_way(|_| true);
        assert!(given.is_some(), "both are idle again");
        assert_eq!(both.iter().filter(|place| place.is_given_away()).count(), 1);
    }
}
