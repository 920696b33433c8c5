//! Single flight: a caller that asks for a key that is being worked on waits for that work.
//!
//! The work is driven by the callers that wait for it: when the last one goes away, the work (such
//! as a pull) is dropped. Its outcome, success or failure, goes to all callers that waited; the
//! next caller starts the work again.

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    hash::Hash,
    sync::{Mutex, PoisonError},
};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};

type Work<V> = BoxFuture<'static, V>;

/// The work in flight, by key.
pub(super) struct Flights<K, V: Clone> {
    flights: Mutex<HashMap<K, WeakShared<Work<V>>>>,
}

impl<K, V: Clone> fmt::Debug for Flights<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flights").finish_non_exhaustive()
    }
}

impl<K, V: Clone> Default for Flights<K, V> {
    fn default() -> Self {
        Self {
            flights: Mutex::new(HashMap::new()),
        }
    }
}

impl<K: Eq + Hash, V: Clone + Send + Sync + 'static> Flights<K, V> {
    /// Waits for the work on `key`, which `start` begins if there is none.
    pub(super) async fn join<F>(&self, key: K, start: impl FnOnce() -> F) -> V
    where
        F: Future<Output = V> + Send + 'static,
    {
        let flight: Shared<Work<V>> = {
            let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
            flights.retain(|_, flight| flight.upgrade().is_some());
            let there = flights.get(&key).and_then(WeakShared::upgrade);
            // Work that has finished is still listed only because a waiting caller has not read its
            // outcome yet.
            if let Some(flight) = there.filter(|flight| flight.peek().is_none()) {
                flight
            } else {
                let flight = start().boxed().shared();
                flights.extend(flight.downgrade().map(|weak| (key, weak)));
                flight
            }
        };
        let outcome = flight.await;
        // The key may have a pod's credentials.
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        flights.retain(|_, flight| flight.upgrade().is_some());
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    #[tokio::test]
    async fn many_wait_for_one() {
        let (flights, runs) = (Flights::default(), Arc::new(AtomicUsize::new(0)));
        let gate = tokio_util::sync::CancellationToken::new();
        let ask = || {
            let (runs, gate) = (Arc::clone(&runs), gate.clone());
            flights.join("k", || async move {
                gate.cancelled().await;
                runs.fetch_add(1, Ordering::SeqCst)
            })
        };
        let mut all = Box::pin(futures::future::join_all((0..10).map(|_| ask())));
        assert!(futures::poll!(&mut all).is_pending());
        gate.cancel();
        assert_eq!(all.await, vec![0; 10]);
        assert_eq!(ask().await, 1, "the next caller starts the work again");
    }

    #[tokio::test]
    async fn a_caller_that_leaves_does_not_stop_the_others() {
        let flights = Flights::default();
        let (send, receive) = tokio::sync::oneshot::channel::<u32>();
        let mut first = Box::pin(flights.join("k", || async { receive.await.unwrap() }));
        assert!(futures::poll!(&mut first).is_pending());
        let mut second = Box::pin(flights.join("k", || async { 0 }));
        assert!(futures::poll!(&mut second).is_pending());
        drop(first);
        send.send(7).unwrap();
        assert_eq!(second.await, 7);
    }
}
