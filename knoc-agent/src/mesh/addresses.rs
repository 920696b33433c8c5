//! PURE: which pod has which address.
//!
//! A pod keeps its address until it is taken back, which happens when its job has ended. An address that was taken back rests for
//! [`REST`]: until then EndpointSlices, DNS caches and programs may still lead to the pod that had it. Addresses are given in the
//! order of the range, so the one that rested longest comes first. Where the order begins is the caller's choice: after a
//! restart nobody knows which addresses forgotten pods had, and a random one is most likely none of them.

use std::{
    collections::{BTreeSet, HashMap, VecDeque, hash_map::Entry},
    net::Ipv4Addr,
    time::Duration,
};

use knoc_proto::{
    ids::PodUid,
    mesh::{MAX_RANGES, PodRange},
};
use tokio::time::Instant;

/// How long an address rests.
pub(super) const REST: Duration = Duration::from_mins(2);

/// No address of the range can be given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the range {range} of the node's pods has no free address: {used} are in use, and {resting} were given back less than two \
     minutes ago; give the node a larger range (spec.podCIDR, or node.podRange of the kubelet), or run fewer pods at a time"
)]
pub(crate) struct Exhausted {
    range: PodRange,
    used: usize,
    resting: usize,
}

/// The addresses of all pods.
#[derive(Debug)]
pub(super) struct Addresses {
    used: HashMap<Ipv4Addr, PodUid>,
    of_pod: HashMap<PodUid, Ipv4Addr>,
    /// Those that were taken back, in the order in which that happened.
    resting: VecDeque<(Instant, Ipv4Addr)>,
    /// The address of each range that was given last.
    last: HashMap<PodRange, Ipv4Addr>,
    /// The ranges of all pods that had an address, which are few: one for each node.
    ranges: BTreeSet<PodRange>,
    /// Decides where the order of a range begins.
    seed: u32,
}

impl Addresses {
    pub(super) fn new(seed: u32) -> Self {
        Self {
            used: HashMap::new(),
            of_pod: HashMap::new(),
            resting: VecDeque::new(),
            last: HashMap::new(),
            ranges: BTreeSet::new(),
            seed,
        }
    }

    /// The address of the pod, a new one if it has none.
    pub(super) fn give(
        &mut self,
        uid: &PodUid,
        range: PodRange,
        now: Instant,
    ) -> Result<Ipv4Addr, Exhausted> {
        if let Some(address) = self.of_pod.get(uid) {
            return Ok(*address);
        }
        self.wake(now);
        let Some(address) = self.free(range) else {
            let used = self.used.keys().filter(|one| range.contains(**one));
            let resting = self.resting.iter().filter(|one| range.contains(one.1));
            return Err(Exhausted {
                range,
                used: used.count(),
                resting: resting.count(),
            });
        };
        self.note_range(range);
        if self.ranges.contains(&range) {
            self.last.insert(range, address);
        }
        self.used.insert(address, uid.clone());
        self.of_pod.insert(uid.clone(), address);
        Ok(address)
    }

    /// The ranges of which pods have addresses.
    pub(super) fn ranges(&self) -> &BTreeSet<PodRange> {
        &self.ranges
    }

    fn note_range(&mut self, range: PodRange) {
        if self.ranges.len() < MAX_RANGES {
            self.ranges.insert(range);
        }
    }

    /// Takes up a pod that had this address before the agent started. Returns false if another pod has it.
    pub(super) fn restore(
        &mut self,
        uid: &PodUid,
        address: Ipv4Addr,
        range: Option<PodRange>,
    ) -> bool {
        if let Some(range) = range {
            self.note_range(range);
        }
        match self.used.entry(address) {
            Entry::Occupied(owner) => owner.get() == uid,
            Entry::Vacant(free) => {
                free.insert(uid.clone());
                self.of_pod.insert(uid.clone(), address);
                true
            }
        }
    }

    /// The address of the pod, if it has one.
    pub(super) fn of_pod(&self, uid: &PodUid) -> Option<Ipv4Addr> {
        self.of_pod.get(uid).copied()
    }

    /// Does a pod have this address?
    pub(super) fn is_given(&self, address: Ipv4Addr) -> bool {
        self.used.contains_key(&address)
    }

    /// Takes the address of the pod back. Returns it if the pod had one.
    pub(super) fn take_back(&mut self, uid: &PodUid, now: Instant) -> Option<Ipv4Addr> {
        let address = self.of_pod.remove(uid)?;
        self.used.remove(&address);
        self.resting.push_back((now, address));
        Some(address)
    }

    /// Ends the rest of those that have rested long enough.
    fn wake(&mut self, now: Instant) {
        let rested = |at: Instant| now.saturating_duration_since(at) >= REST;
        while self.resting.front().is_some_and(|(at, _)| rested(*at)) {
            self.resting.pop_front();
        }
    }

    /// The next free address after the one that was given last. Looks at as many as are taken, and one more.
    fn free(&self, range: PodRange) -> Option<Ipv4Addr> {
        let (first, last) = range.hosts();
        let (first, last) = (first.to_bits(), last.to_bits());
        let count = last.checked_sub(first)?.checked_add(1)?;
        let begin = match self.last.get(&range) {
            Some(given) => given.to_bits().saturating_sub(first).saturating_add(1),
            None => self.seed,
        };
        let taken = self.used.len() + self.resting.len();
        let most = u32::try_from(taken).unwrap_or(u32::MAX).saturating_add(1);
        (0..count.min(most))
            .map(|step| {
                let offset = u64::from(begin) + u64::from(step);
                // Smaller than `count`.
                let offset = u32::try_from(offset % u64::from(count)).unwrap_or_default();
                Ipv4Addr::from_bits(first + offset)
            })
            .find(|address| !self.is_taken(*address))
    }

    fn is_taken(&self, address: Ipv4Addr) -> bool {
        self.used.contains_key(&address) || self.resting.iter().any(|(_, one)| *one == address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(name: &str) -> PodUid {
        PodUid::try_from(name).unwrap()
    }

    fn range(text: &str) -> PodRange {
        text.parse().unwrap()
    }

    fn address(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    #[test]
    fn a_pod_keeps_its_address_and_no_two_have_the_same() {
        let (mut all, now) = (Addresses::new(0), Instant::now());
        let range = range("10.1.0.0/29");
        let a = all.give(&uid("a"), range, now).unwrap();
        assert_eq!(a, address("10.1.0.1"), "the first one names the network");
        assert_eq!(all.give(&uid("a"), range, now), Ok(a));
        assert_eq!(all.give(&uid("b"), range, now), Ok(address("10.1.0.2")));
        // Ranges may overlap.
        let wider = super::tests::range("10.1.0.0/28");
        assert_eq!(all.give(&uid("c"), wider, now), Ok(address("10.1.0.3")));
    }

    #[test]
    fn an_address_rests_and_the_one_that_rested_longest_comes_first() {
        let (mut all, now) = (Addresses::new(0), Instant::now());
        let range = range("10.1.0.0/29");
        for name in ["a", "b", "c", "d", "e", "f"] {
            all.give(&uid(name), range, now).unwrap();
        }
        let full = all.give(&uid("g"), range, now).unwrap_err();
        assert_eq!((full.used, full.resting), (6, 0));
        assert!(full.to_string().contains("10.1.0.0/29"), "{full}");
        assert_eq!(all.take_back(&uid("c"), now), Some(address("10.1.0.3")));
        assert_eq!(all.take_back(&uid("c"), now), None);
        let later = now + Duration::from_secs(1);
        assert_eq!(all.take_back(&uid("a"), later), Some(address("10.1.0.1")));
        let rests = all.give(&uid("g"), range, later).unwrap_err();
        assert_eq!((rests.used, rests.resting), (4, 2));
        let rested = now + REST;
        assert_eq!(all.give(&uid("g"), range, rested), Ok(address("10.1.0.3")));
        assert!(all.give(&uid("h"), range, rested).is_err());
        let both = rested + Duration::from_secs(1);
        assert_eq!(all.give(&uid("h"), range, both), Ok(address("10.1.0.1")));
    }

    #[test]
    fn what_was_recorded_is_not_given_again_and_the_order_begins_anywhere() {
        let (mut all, now) = (Addresses::new(7), Instant::now());
        let range = range("10.1.0.0/29");
        assert!(all.restore(&uid("a"), address("10.1.0.2"), None));
        assert!(all.restore(&uid("a"), address("10.1.0.2"), None));
        assert!(all.is_given(address("10.1.0.2")) && !all.is_given(address("10.1.0.4")));
        assert!(!all.restore(&uid("b"), address("10.1.0.2"), None));
        // Six addresses: the seventh from the first one is the second.
        assert_eq!(all.give(&uid("b"), range, now), Ok(address("10.1.0.3")));
        assert_eq!(all.give(&uid("a"), range, now), Ok(address("10.1.0.2")));
        // One that had ended before the restart rests from then on.
        assert!(all.restore(&uid("c"), address("10.1.0.4"), Some(range)));
        all.take_back(&uid("c"), now);
        assert_eq!(all.give(&uid("d"), range, now), Ok(address("10.1.0.5")));
        assert_eq!(all.ranges().len(), 1);
        let largest = super::tests::range("10.0.0.0/8");
        let far = Addresses::new(u32::MAX).give(&uid("e"), largest, now);
        assert!(largest.contains(far.unwrap()));
    }
}
