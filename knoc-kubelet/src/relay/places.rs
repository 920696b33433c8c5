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

    /// Frees the place of an idle connection, of those that `may` allows; returns whose it was, and its permits.
    pub(super) fn give_way(&self, may: impl Fn(&Permits) -> bool) -> Option<(PodPort, Permits)> {
        let mut state = self.state();
        let open = state.taken.iter().filter(|(_, taken)| may(&taken.permits));
        let known = open.map(|(id, taken)| Known {
            id: *id,
            source: taken.source,
            began: taken.activity.began,
            moved: taken.activity.moved(),
        });
        let id = idle::gives_way(known, Instant::now())?;
        let taken = state.taken.remove(&id)?;
        taken.cut.cancel();
        Some((taken.to, taken.permits))
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
