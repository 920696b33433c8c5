//! PURE: which port of the kubelet belongs to which port of a pod.
//!
//! ```text
//!   free ──assign──► taken ──release, or it could not be used──► resting ──after REST──► free
//! ```
//!
//! A port that was given back rests for a while: proxies of the cluster may still send the clients of one pod there, and must not
//! lead them to another pod. It rests longer if an EndpointSlice still names it, because the slice could not be deleted yet.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ops::RangeInclusive,
    time::Duration,
};

use tokio::time::Instant;

use super::plan::{OF_POD, PodPort};

/// How long a port rests. Proxies follow EndpointSlices within seconds.
const REST: Duration = Duration::from_mins(1);

/// The ports of the kubelet.
#[derive(Debug)]
pub(super) struct Ports {
    free: VecDeque<u16>,
    /// In the order in which they become free.
    resting: VecDeque<(u16, Instant)>,
    taken: HashMap<PodPort, u16>,
}

impl Ports {
    pub(super) fn new(ports: RangeInclusive<u16>) -> Self {
        Self {
            free: ports.collect(),
            resting: VecDeque::new(),
            taken: HashMap::new(),
        }
    }

    /// The port of this port of a pod, a new one if it has none; `None` if all are in use or rest, or if the pod has its share.
    pub(super) fn assign(&mut self, key: &PodPort, now: Instant) -> Option<u16> {
        if let Some(port) = self.taken.get(key) {
            return Some(*port);
        }
        let of_pod = self.taken.keys().filter(|one| one.uid == key.uid);
        if of_pod.count() >= OF_POD {
            return None;
        }
        while let Some((port, until)) = self.resting.front().copied() {
            if until > now {
                break;
            }
            self.resting.pop_front();
            self.free.push_back(port);
        }
        let port = self.free.pop_front()?;
        self.taken.insert(key.clone(), port);
        Some(port)
    }

    /// Gives the port back.
    pub(super) fn release(&mut self, key: &PodPort, now: Instant) {
        if let Some(port) = self.taken.remove(key) {
            self.resting.push_back((port, now + REST));
        }
    }

    /// Lets the ports rest that slices name and no pod has: those of an earlier process, and those of slices that could not be
    /// deleted yet.
    pub(super) fn rest(&mut self, named: &HashSet<u16>, now: Instant) {
        let resting = self.resting.iter().map(|(port, _)| *port);
        let idle = resting.chain(self.free.iter().copied());
        let again: Vec<u16> = idle.filter(|port| named.contains(port)).collect();
        self.resting.retain(|(port, _)| !named.contains(port));
        self.free.retain(|port| !named.contains(port));
        let again = again.into_iter().map(|port| (port, now + REST));
        self.resting.extend(again);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(uid: &str, number: u16) -> PodPort {
        let uid = uid.parse().unwrap();
        PodPort { uid, number }
    }

    #[test]
    fn a_port_that_was_given_back_rests_before_another_pod_gets_it() {
        let now = Instant::now();
        let mut ports = Ports::new(10..=12);
        assert_eq!(ports.assign(&of("a", 80), now), Some(10));
        assert_eq!(ports.assign(&of("a", 80), now), Some(10), "it keeps it");
        assert_eq!(ports.assign(&of("a", 81), now), Some(11));
        ports.release(&of("a", 80), now);
        assert_eq!(ports.assign(&of("b", 80), now), Some(12));
        assert_eq!(ports.assign(&of("c", 80), now), None);
        assert_eq!(ports.assign(&of("c", 80), now + REST), Some(10));
        // To give back what nobody has changes nothing.
        ports.release(&of("d", 80), now);
        assert_eq!(ports.assign(&of("d", 80), now + REST * 2), None);
    }

    #[test]
    fn a_pod_does_not_take_the_ports_of_all_others() {
        let now = Instant::now();
        let mut ports = Ports::new(1000..=1999);
        let got = (1..=100).filter(|number| ports.assign(&of("a", *number), now).is_some());
        assert_eq!(got.count(), OF_POD);
        assert!(ports.assign(&of("b", 80), now).is_some());
        ports.release(&of("a", 1), now);
        assert!(ports.assign(&of("a", 99), now).is_some());
    }

    #[test]
    fn ports_of_an_earlier_process_rest() {
        let now = Instant::now();
        let mut ports = Ports::new(10..=11);
        ports.rest(&HashSet::from([10, 99]), now);
        assert_eq!(ports.assign(&of("a", 80), now), Some(11));
        assert_eq!(ports.assign(&of("b", 80), now), None);
        assert_eq!(ports.assign(&of("b", 80), now + REST), Some(10));
        assert_eq!(ports.assign(&of("c", 80), now + REST), None);
    }

    #[test]
    fn a_port_that_a_slice_still_names_does_not_become_another_pods() {
        let now = Instant::now();
        let mut ports = Ports::new(10..=11);
        assert_eq!(ports.assign(&of("a", 80), now), Some(10));
        assert_eq!(ports.assign(&of("b", 80), now), Some(11));
        ports.release(&of("a", 80), now);
        // The slice was not deleted within the minute.
        let later = now + REST;
        ports.rest(&HashSet::from([10, 11]), later);
        assert_eq!(ports.assign(&of("c", 80), later), None);
        assert_eq!(ports.assign(&of("b", 80), later), Some(11), "it keeps it");
        ports.rest(&HashSet::new(), later);
        assert_eq!(ports.assign(&of("c", 80), later + REST), Some(10));
    }
}
