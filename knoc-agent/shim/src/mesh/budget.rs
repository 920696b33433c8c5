//! How much memory packets take that wait for tunnels: containers can send to many pods that do not take anything.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How many bytes wait for all other pods together.
const ALL: usize = 32 << 20;

/// The bytes that may still wait.
#[derive(Debug)]
pub(super) struct Budget(Arc<Semaphore>);

/// A packet that counts until it is dropped.
struct Counted {
    packet: Vec<u8>,
    _room: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.packet
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(ALL)))
    }
}

impl Budget {
    /// A copy of the packet. `None` if too much waits already; the only packet for a pod always fits, so that nobody who sends much
    /// to others keeps the pod from it.
    pub(super) fn copy(&self, packet: &[u8], is_only: bool) -> Option<Bytes> {
        let size = u32::try_from(packet.len()).ok()?;
        let room = Arc::clone(&self.0).try_acquire_many_owned(size).ok();
        if room.is_none() && !is_only {
            return None;
        }
        Some(Bytes::from_owner(Counted {
            packet: packet.to_vec(),
            _room: room,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_that_wait_are_bounded_in_bytes_and_free_their_room() {
        const SIZE: usize = 64 << 10;
        let (budget, packet) = (Budget::default(), vec![7_u8; SIZE]);
        let waiting: Vec<Bytes> = std::iter::from_fn(|| budget.copy(&packet, false)).collect();
        assert_eq!(waiting.len(), ALL / SIZE);
        let only = budget.copy(&packet, true).unwrap();
        assert_eq!(only, packet);
        assert!(budget.copy(&packet, false).is_none());
        drop(only);
        assert!(budget.copy(&packet, false).is_none(), "it did not count");
        drop(waiting);
        assert!(budget.copy(&packet, false).is_some());
    }
}
