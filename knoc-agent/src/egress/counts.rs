//! What the agent counts about connections of pods to the cluster that it refuses itself. The kubelet shows it with its metrics.

use std::sync::atomic::{AtomicU64, Ordering};

use knoc_proto::pb;

/// Why the agent refuses a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Too many connections of the node wait to be taken.
    LimitOfNode,
    /// Too many connections of the pod wait to be taken.
    LimitOfPod,
    /// A shim announced what is no connection.
    Malformed,
    /// `policy.egress` of the site file.
    Policy,
}

/// The counters.
#[derive(Debug, Default)]
pub(super) struct Counts {
    limit_node: AtomicU64,
    limit_pod: AtomicU64,
    malformed: AtomicU64,
    policy: AtomicU64,
}

impl Counts {
    pub(super) fn refused(&self, reason: Reason) {
        let count = match reason {
            Reason::LimitOfNode => &self.limit_node,
            Reason::LimitOfPod => &self.limit_pod,
            Reason::Malformed => &self.malformed,
            Reason::Policy => &self.policy,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// The message for kubelets, if so many connections wait.
    pub(super) fn with_waiting(&self, waiting: usize) -> pb::EgressCounts {
        let all = [
            ("limit_node", &self.limit_node),
            ("limit_pod", &self.limit_pod),
            ("malformed", &self.malformed),
            ("policy", &self.policy),
        ];
        let refused = all
            .into_iter()
            .map(|(reason, count)| (reason.to_owned(), count.load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0);
        pb::EgressCounts {
            waiting: u64::try_from(waiting).unwrap_or(u64::MAX),
            refused: refused.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_counted_by_its_name_once_it_has_occurred() {
        let counts = Counts::default();
        assert!(counts.with_waiting(0).refused.is_empty());
        let reasons = [
            Reason::LimitOfNode,
            Reason::LimitOfPod,
            Reason::Malformed,
            Reason::Policy,
        ];
        for reason in reasons {
            counts.refused(reason);
        }
        counts.refused(Reason::Policy);
        let counted = counts.with_waiting(7);
        let expected = [
            ("limit_node", 1),
            ("limit_pod", 1),
            ("malformed", 1),
            ("policy", 2),
        ];
        let expected = expected.map(|(reason, count)| (reason.to_owned(), count));
        assert_eq!((counted.waiting, counted.refused), (7, expected.into()));
    }
}
