//! What is counted about connections between pods and the cluster: those that pods open (`egress`), and those that the cluster
//! opens to pods (`relay`). The labels are words of this file, never what a pod or a client sent.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Why a connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The endpoint does not answer.
    Dial,
    /// The endpoints are addresses that pods never reach, or of nodes, or of pods of the node that are not reached like this.
    Endpoint,
    /// The pod or the node has too many connections.
    Limit,
    /// The agent announced what is no connection.
    Malformed,
    /// The Service has no endpoint that is ready.
    NoEndpoint,
    /// The cluster's list does not have the Service.
    NotListed,
    /// The cluster's Services are not known yet.
    NotRead,
    /// The pod's side is gone or could not be reached.
    Pod,
    /// The site's policy.
    Policy,
    /// No Service has the address and the port.
    Unknown,
}

/// All reasons, in the order of their labels.
const REASONS: [Reason; 10] = [
    Reason::Dial,
    Reason::Endpoint,
    Reason::Limit,
    Reason::Malformed,
    Reason::NoEndpoint,
    Reason::NotListed,
    Reason::NotRead,
    Reason::Pod,
    Reason::Policy,
    Reason::Unknown,
];

impl Reason {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Dial => "dial",
            Self::Endpoint => "endpoint",
            Self::Limit => "limit",
            Self::Malformed => "malformed",
            Self::NoEndpoint => "no_endpoint",
            Self::NotListed => "not_listed",
            Self::NotRead => "not_read",
            Self::Pod => "pod",
            Self::Policy => "policy",
            Self::Unknown => "unknown",
        }
    }
}

/// The counters of one direction in which connections are opened; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Direction(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    open: AtomicU64,
    made: AtomicU64,
    to_pod: AtomicU64,
    from_pod: AtomicU64,
    refused: [AtomicU64; REASONS.len()],
}

/// The counters at the time of a request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    pub(crate) open: u64,
    pub(crate) made: u64,
    pub(crate) to_pod: u64,
    pub(crate) from_pod: u64,
    /// Reasons that have occurred.
    pub(crate) refused: BTreeMap<Reason, u64>,
}

/// A connection that was made, until it is dropped.
#[derive(Debug)]
pub struct Open(Direction);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Open {
    /// Counts bytes that were sent to the pod.
    pub fn add_to_pod(&self, bytes: usize) {
        add(&self.0.0.to_pod, bytes);
    }

    /// Counts bytes that came from the pod.
    pub fn add_from_pod(&self, bytes: usize) {
        add(&self.0.0.from_pod, bytes);
    }
}

impl Direction {
    /// Counts a connection that was made.
    #[must_use]
    pub fn made(&self) -> Open {
        self.0.made.fetch_add(1, Ordering::Relaxed);
        self.0.open.fetch_add(1, Ordering::Relaxed);
        Open(self.clone())
    }

    /// Counts a connection that was refused.
    pub fn refused(&self, reason: Reason) {
        let mut all = REASONS.iter().zip(&self.0.refused);
        if let Some((_, count)) = all.find(|(one, _)| **one == reason) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn counted(&self) -> Counted {
        let now = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counters = &*self.0;
        let refused = REASONS.iter().zip(&counters.refused);
        Counted {
            open: now(&counters.open),
            made: now(&counters.made),
            to_pod: now(&counters.to_pod),
            from_pod: now(&counters.from_pod),
            refused: refused
                .map(|(reason, count)| (*reason, now(count)))
                .filter(|(_, count)| *count > 0)
                .collect(),
        }
    }
}

fn add(count: &AtomicU64, bytes: usize) {
    let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
    count.fetch_add(bytes, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_open_until_they_are_dropped_and_every_reason_counts_once() {
        let direction = Direction::default();
        let (one, other) = (direction.made(), direction.clone().made());
        one.add_to_pod(3);
        one.add_from_pod(5);
        other.add_from_pod(7);
        drop(other);
        for reason in REASONS {
            direction.refused(reason);
        }
        let counted = direction.counted();
        assert_eq!((counted.open, counted.made), (1, 2));
        assert_eq!((counted.to_pod, counted.from_pod), (3, 12));
        assert_eq!(counted.refused, REASONS.map(|reason| (reason, 1)).into());
    }

    #[test]
    fn reasons_are_in_the_order_of_their_labels() {
        let labels = REASONS.map(Reason::label);
        assert!(labels.is_sorted() && REASONS.is_sorted(), "{labels:?}");
    }
}
