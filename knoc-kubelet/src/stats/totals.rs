//! PURE: what all pods of the node have used since this kubelet started. The totals never fall, even if pods disappear.

use std::collections::HashMap;

use knoc_proto::{ids::PodUid, pb};

/// Counters that only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// CPU time in nanoseconds.
    pub cpu: u64,
    /// Page faults of both kinds.
    pub faults: u64,
    /// The page faults that read from disk.
    pub major: u64,
}

impl Totals {
    /// The counters of a measurement.
    #[must_use]
    pub fn of(usage: &pb::Usage) -> Self {
        Self {
            cpu: usage.cpu_nanoseconds,
            faults: usage.page_faults,
            major: usage.major_page_faults,
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            cpu: self.cpu.saturating_add(other.cpu),
            faults: self.faults.saturating_add(other.faults),
            major: self.major.saturating_add(other.major),
        }
    }

    fn max(self, other: Self) -> Self {
        Self {
            cpu: self.cpu.max(other.cpu),
            faults: self.faults.max(other.faults),
            major: self.major.max(other.major),
        }
    }
}

/// The counters of all pods, with one entry for each pod that the agent still knows.
#[derive(Debug, Default)]
pub struct NodeTotals {
    gone: Totals,
    pods: HashMap<PodUid, Totals>,
}

impl NodeTotals {
    /// Records the counters of a pod. Values below the recorded ones are ignored.
    pub fn observe(&mut self, uid: &PodUid, used: Totals) {
        match self.pods.get_mut(uid) {
            Some(known) => *known = known.max(used),
            None => {
                self.pods.insert(uid.clone(), used);
            }
        }
    }

    /// Removes a pod that will not be measured again; what it used stays in the total.
    pub fn close(&mut self, uid: &PodUid) {
        if let Some(used) = self.pods.remove(uid) {
            self.gone = self.gone.plus(used);
        }
    }

    /// The sum over all pods.
    #[must_use]
    pub fn total(&self) -> Totals {
        self.pods
            .values()
            .fold(self.gone, |sum, used| sum.plus(*used))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cpu(cpu: u64) -> Totals {
        Totals {
            cpu,
            ..Totals::default()
        }
    }

    #[test]
    fn what_a_pod_used_stays_when_it_goes() {
        let mut totals = NodeTotals::default();
        let [a, b] = ["a", "b"].map(|uid| PodUid::try_from(uid).unwrap());
        totals.observe(&a, cpu(5));
        totals.observe(&b, cpu(7));
        totals.observe(&a, cpu(6));
        assert_eq!(totals.total().cpu, 13);
        totals.close(&a);
        totals.close(&a);
        assert_eq!(totals.total().cpu, 13);
        assert_eq!(totals.pods.len(), 1);
    }

    proptest! {
        #[test]
        fn the_total_never_falls(steps in prop::collection::vec((0..4_u8, 0..100_u64, any::<bool>()), 0..100)) {
            let mut totals = NodeTotals::default();
            let mut before = 0;
            for (pod, used, closes) in steps {
                let uid = PodUid::try_from(pod.to_string()).unwrap();
                if closes {
                    totals.close(&uid);
                } else {
                    totals.observe(&uid, cpu(used));
                }
                prop_assert!(totals.total().cpu >= before);
                before = totals.total().cpu;
            }
        }
    }
}
