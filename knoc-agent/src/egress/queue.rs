//! PURE: the connections of a node's pods that wait until the kubelet asks for the next one, and those that it was told of and
//! has neither taken nor refused: the next call is told of them again.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

use knoc_proto::{egress::PATIENCE, pb};
use tokio::time::Instant;

use super::counts::Reason;

/// The most connections that wait, of all pods together.
const WAITING: usize = 4096;
/// The most connections of one pod that wait, so that one pod cannot keep out the others.
const WAITING_OF_ONE: usize = 256;
/// The shim gives up a connection that waited longer.
const PATIENT: Duration = Duration::from_secs(PATIENCE);

/// Too many connections wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Full {
    /// Of this pod.
    #[error("{WAITING_OF_ONE} connections of this pod wait to be taken")]
    Pod,
    /// Of all pods of the node.
    #[error("{WAITING} connections of the node's pods wait to be taken")]
    Node,
}

impl Full {
    /// As metrics show it.
    pub(super) fn reason(self) -> Reason {
        match self {
            Self::Pod => Reason::LimitOfPod,
            Self::Node => Reason::LimitOfNode,
        }
    }
}

/// The connections that wait, in the order of their arrival.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: VecDeque<(Instant, pb::EgressAttempt)>,
    of_pod: HashMap<String, usize>,
    /// Those that the present call was told of.
    told: BTreeMap<(String, u64), (Instant, pb::EgressAttempt)>,
}

impl Queue {
    /// Adds a connection.
    pub(super) fn push(&mut self, now: Instant, attempt: pb::EgressAttempt) -> Result<(), Full> {
        while self
            .waiting
            .front()
            .is_some_and(|(at, _)| is_over(*at, now))
        {
            self.take();
        }
        if self.waiting.len() >= WAITING {
            return Err(Full::Node);
        }
        let count = self.of_pod.entry(attempt.uid.clone()).or_default();
        if *count >= WAITING_OF_ONE {
            return Err(Full::Pod);
        }
        *count += 1;
        self.waiting.push_back((now, attempt));
        Ok(())
    }

    /// The oldest connection for which somebody still waits.
    pub(super) fn pop(&mut self, now: Instant) -> Option<pb::EgressAttempt> {
        loop {
            let (at, attempt) = self.take()?;
            if !is_over(at, now) {
                if self.told.len() >= WAITING {
                    self.told.retain(|_, (at, _)| !is_over(*at, now));
                }
                if self.told.len() < WAITING {
                    let key = (attempt.uid.clone(), attempt.id);
                    self.told.insert(key, (at, attempt.clone()));
                }
                return Some(attempt);
            }
        }
    }

    /// How many wait.
    pub(super) fn waiting(&self, now: Instant) -> usize {
        let waiting = self.waiting.iter();
        waiting.filter(|(at, _)| !is_over(*at, now)).count()
    }

    /// The connection was taken or refused.
    pub(super) fn settle(&mut self, uid: &str, id: u64) {
        self.told.remove(&(uid.to_owned(), id));
    }

    /// A new call is told of everything that was not settled.
    pub(super) fn again(&mut self, now: Instant) {
        let told = std::mem::take(&mut self.told).into_values();
        let mut all: Vec<_> = told.filter(|(at, _)| !is_over(*at, now)).collect();
        for (_, attempt) in &all {
            *self.of_pod.entry(attempt.uid.clone()).or_default() += 1;
        }
        all.sort_by_key(|(at, _)| *at);
        for one in all.into_iter().rev() {
            self.waiting.push_front(one);
        }
    }

    fn take(&mut self) -> Option<(Instant, pb::EgressAttempt)> {
        let (at, attempt) = self.waiting.pop_front()?;
        if let Some(count) = self.of_pod.get_mut(&attempt.uid) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.of_pod.remove(&attempt.uid);
            }
        }
        Some((at, attempt))
    }
}

fn is_over(at: Instant, now: Instant) -> bool {
    now.saturating_duration_since(at) >= PATIENT
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(uid: &str, id: u64) -> pb::EgressAttempt {
        pb::EgressAttempt {
            uid: uid.to_owned(),
            id,
            ..pb::EgressAttempt::default()
        }
    }

    #[test]
    fn one_pod_does_not_keep_out_the_others() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for id in 0..WAITING_OF_ONE {
            queue
                .push(now, attempt("busy", id.try_into().unwrap()))
                .unwrap();
        }
        assert_eq!(queue.push(now, attempt("busy", 999)), Err(Full::Pod));
        queue.push(now, attempt("other", 0)).unwrap();
        assert_eq!(queue.pop(now).map(|one| one.id), Some(0));
        queue.push(now, attempt("busy", 999)).unwrap();
        let rest: Vec<_> = std::iter::from_fn(|| queue.pop(now)).collect();
        assert_eq!(rest.len(), WAITING_OF_ONE + 1);
        assert!(queue.of_pod.is_empty());
    }

    #[test]
    fn a_new_call_is_told_again_of_what_was_not_settled() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for id in 1..=4 {
            let later = now + Duration::from_millis(id);
            queue.push(later, attempt("pod", 10 - id)).unwrap();
        }
        for id in [9, 8, 7] {
            assert_eq!(queue.pop(now).map(|one| one.id), Some(id));
        }
        queue.settle("pod", 8);
        queue.settle("other", 9);
        queue.again(now);
        let all: Vec<_> = std::iter::from_fn(|| queue.pop(now))
            .map(|one| one.id)
            .collect();
        assert_eq!(all, [9, 7, 6]);
        assert!(queue.of_pod.is_empty());
        queue.again(now + PATIENT + PATIENT);
        assert_eq!(queue.pop(now), None, "their shims have given up");
    }

    #[test]
    fn what_nobody_waits_for_makes_room() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for id in 0..WAITING {
            let uid = format!("pod{}", id % 32);
            queue.push(now, attempt(&uid, 1)).unwrap();
        }
        assert_eq!(queue.push(now, attempt("late", 1)), Err(Full::Node));
        let later = now + PATIENT;
        assert_eq!((queue.waiting(now), queue.waiting(later)), (WAITING, 0));
        queue.push(later, attempt("late", 2)).unwrap();
        assert_eq!(queue.pop(later).map(|one| one.id), Some(2));
        assert_eq!(queue.pop(later), None);
        queue.push(now, attempt("old", 3)).unwrap();
        assert_eq!(queue.pop(later), None, "it is over");
    }
}
