//! How much memory packets and datagrams take that wait: containers can send much that nobody takes.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The bytes that may still wait.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    all: Arc<Semaphore>,
    /// Those of a part.
    own: Option<Arc<Semaphore>>,
}

/// A packet that counts until it is dropped.
struct Counted {
    packet: Vec<u8>,
    _room: [Option<OwnedSemaphorePermit>; 2],
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.packet
    }
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        Self {
            all: Arc::new(Semaphore::new(bytes)),
            own: None,
        }
    }

    /// A part of it, of which no more than this may wait: what waits counts for both.
    pub(crate) fn part(&self, bytes: usize) -> Self {
        Self {
            all: Arc::clone(&self.all),
            own: Some(Arc::new(Semaphore::new(bytes))),
        }
    }

    /// A copy of the packet. `None` if too much waits already; what `always_fits` is copied all the same, and does not count.
    pub(crate) fn copy(&self, packet: &[u8], always_fits: bool) -> Option<Bytes> {
        let size = u32::try_from(packet.len()).ok()?;
        let take = |room: &Arc<Semaphore>| Arc::clone(room).try_acquire_many_owned(size).ok();
        let (all, own) = (take(&self.all), self.own.as_ref().map(take));
        let fits = all.is_some() && own.as_ref().is_none_or(Option::is_some);
        if !fits && !always_fits {
            return None;
        }
        Some(Bytes::from_owner(Counted {
            packet: packet.to_vec(),
            _room: [all, own.flatten()],
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 64 << 10;

    fn filled(budget: &Budget) -> Vec<Bytes> {
        let packet = vec![7_u8; SIZE];
        std::iter::from_fn(|| budget.copy(&packet, false)).collect()
    }

    #[test]
    fn packets_that_wait_are_bounded_in_bytes_and_free_their_room() {
        let (budget, packet) = (Budget::new(10 * SIZE), vec![7_u8; SIZE]);
        let waiting = filled(&budget);
        assert_eq!(waiting.len(), 10);
        let only = budget.copy(&packet, true).unwrap();
        assert_eq!(only, packet);
        assert!(budget.copy(&packet, false).is_none());
        drop(only);
        assert!(budget.copy(&packet, false).is_none(), "it did not count");
        drop(waiting);
        assert!(budget.copy(&packet, false).is_some());
    }

    #[test]
    fn what_waits_in_a_part_counts_for_the_whole_and_leaves_room_for_other_parts() {
        let budget = Budget::new(10 * SIZE);
        let parts = [budget.part(4 * SIZE), budget.part(8 * SIZE)];
        let first = filled(&parts[0]);
        assert_eq!((first.len(), filled(&parts[1]).len()), (4, 6));
        assert_eq!(filled(&budget).len(), 6, "what was refused holds nothing");
        drop(first);
        assert_eq!(filled(&parts[1]).len(), 8);
    }
}
