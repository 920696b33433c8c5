//! How much of what pods refer to is in memory at once, for all pods together: an object has up to a megabyte, and many pods may name
//! hundreds of them.

use std::sync::{Mutex, PoisonError};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::ResolveError;

/// How many objects are read at once. An answer is in memory about three times until it is read.
pub(super) const READS: usize = 32;
/// What each pod keeps without taking room: enough for a usual pod, and little for all workers together.
const FREE: usize = 256 << 10;
/// The unit in which room is taken.
const UNIT: usize = 64 << 10;
/// The most, in bytes, that one pod keeps, and that all pods keep beyond what is free. It is more than the values of a pod may have,
/// so the translation is the one to say that they are too much.
const MOST: usize = 24 << 20;

static READING: Semaphore = Semaphore::const_new(READS);
static KEPT: Semaphore = Semaphore::const_new(MOST / UNIT);

/// What a pod holds until its values are sent; `None` if it needs none.
pub(crate) type Room = Option<SemaphorePermit<'static>>;

/// Waits until an object may be read.
pub(super) async fn turn() -> Room {
    READING.acquire().await.ok()
}

/// What is kept for one pod.
#[derive(Debug)]
pub(super) struct Keeping {
    all: &'static Semaphore,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    bytes: usize,
    room: Room,
}

impl Keeping {
    pub(super) fn new() -> Self {
        Self::within(&KEPT)
    }

    fn within(all: &'static Semaphore) -> Self {
        Self {
            all,
            state: Mutex::default(),
        }
    }

    /// Keeps this many bytes more, or says that they are `too_much` or that there is no room for them now. Nobody waits for room, so two
    /// pods do not wait for each other.
    pub(super) fn add(&self, bytes: usize, too_much: &'static str) -> Result<(), ResolveError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.bytes = state.bytes.saturating_add(bytes);
        if state.bytes > MOST {
            return Err(ResolveError::TooMuch(too_much));
        }
        let units = state.bytes.saturating_sub(FREE).div_ceil(UNIT);
        let held = state.room.as_ref().map_or(0, SemaphorePermit::num_permits);
        let more = u32::try_from(units.saturating_sub(held)).unwrap_or(u32::MAX);
        if more == 0 {
            return Ok(());
        }
        let Ok(more) = self.all.try_acquire_many(more) else {
            return Err(ResolveError::Busy);
        };
        match state.room.take() {
            Some(mut room) => {
                room.merge(more);
                state.room = Some(room);
            }
            None => state.room = Some(more),
        }
        Ok(())
    }

    pub(super) fn into_room(self) -> Room {
        let state = self.state.into_inner();
        state.unwrap_or_else(PoisonError::into_inner).room
    }
}

/// Takes all room that there is.
#[cfg(test)]
pub(crate) async fn take_all() -> Room {
    let all = u32::try_from(MOST / UNIT).unwrap();
    KEPT.acquire_many(all).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// A semaphore that only this test uses.
    fn all() -> &'static Semaphore {
        Box::leak(Box::new(Semaphore::new(MOST / UNIT)))
    }

    #[test]
    fn a_usual_pod_needs_no_room_and_a_large_one_what_it_keeps() {
        let all = all();
        let usual = Keeping::within(all);
        for _ in 0..4 {
            usual.add(FREE / 4, "too much").unwrap();
        }
        assert!(usual.into_room().is_none());
        let large = Keeping::within(all);
        for _ in 0..20 {
            large.add(MIB, "too much").unwrap();
        }
        let room = large.into_room().unwrap();
        assert_eq!(room.num_permits(), (20 * MIB - FREE) / UNIT);
        // Another large pod comes later, and a usual one at once.
        let next = Keeping::within(all);
        let first = (0..20).find_map(|_| next.add(MIB, "too much").err());
        assert!(matches!(first, Some(ResolveError::Busy)), "{first:?}");
        drop(next);
        Keeping::within(all).add(FREE, "too much").unwrap();
        drop(room);
        assert_eq!(all.available_permits(), MOST / UNIT);
    }

    #[test]
    fn what_no_message_has_room_for_is_not_kept() {
        let all = all();
        let keeping = Keeping::within(all);
        let first = (0..30).find_map(|_| keeping.add(MIB, "too much").err());
        let text = first.map(|error| error.to_string());
        assert_eq!(text.as_deref(), Some("too much"));
        drop(keeping);
        assert_eq!(all.available_permits(), MOST / UNIT);
    }
}
