//! PURE: which port of the kubelet belongs to which port of a pod.
//!
//! ```text
//!   free ──assign──► taken ──release, or it could not be used──► resting ──after REST──► free
//! ```
//!
//! A port that was given back rests for a while: proxies of the cluster may still send the clients of one pod there, and must not
//! lead them to another pod. It rests longer if an EndpointSlice still names it, because the slice could not be deleted yet.
//!
//! The last ports are for namespaces that have few, so that the pods of one namespace do not take those of all others. A port that
//! rests still counts for its namespace: otherwise one that creates and deletes pods would take them all the same.

use std::{
    collections::{HashMap, VecDeque},
    ops::RangeInclusive,
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::plan::{NoPort, OF_POD, PodPort};

/// How long a port rests. Proxies follow EndpointSlices within seconds.
const REST: Duration = Duration::from_mins(1);
/// Once no more than one port in so many is free, a namespace that has its share gets no more.
const RESERVED: usize = 4;
/// The share of a namespace is one port in so many.
const SHARE: usize = 32;

/// The ports of the kubelet.
#[derive(Debug)]
pub(super) struct Ports {
    count: usize,
    free: VecDeque<u16>,
    /// In the order in which they become free.
    resting: VecDeque<Resting>,
    taken: HashMap<PodPort, Held>,
    /// How many ports each namespace has, with those that rest.
    of_namespace: HashMap<Arc<str>, usize>,
}

/// A port that belongs to a namespace.
#[derive(Debug)]
struct Held {
    port: u16,
    namespace: Arc<str>,
}

#[derive(Debug)]
struct Resting {
    port: u16,
    /// None: no pod could use it.
    namespace: Option<Arc<str>>,
    until: Instant,
}

impl Ports {
    pub(super) fn new(ports: RangeInclusive<u16>) -> Self {
        Self {
            count: ports.len(),
            free: ports.collect(),
            resting: VecDeque::new(),
            taken: HashMap::new(),
            of_namespace: HashMap::new(),
        }
    }

    /// The port of this port of a pod of the namespace, a new one if it has none.
    pub(super) fn assign(
        &mut self,
        key: &PodPort,
        namespace: &Arc<str>,
        now: Instant,
    ) -> Result<u16, NoPort> {
        if let Some(held) = self.taken.get(key) {
            return Ok(held.port);
        }
        self.wake(now);
        let port = self.free.front().copied().ok_or(NoPort::All)?;
        let share = (self.count / SHARE).max(1);
        let has = self.of_namespace.get(namespace).copied().unwrap_or(0);
        if self.free.len() <= self.count / RESERVED && has >= share {
            let namespace = Arc::clone(namespace);
            return Err(NoPort::Namespace { namespace, share });
        }
        let of_pod = self.taken.keys().filter(|one| one.uid == key.uid);
        if of_pod.count() >= OF_POD {
            return Err(NoPort::Pod);
        }
        self.free.pop_front();
        self.count_for(namespace);
        let namespace = Arc::clone(namespace);
        self.taken.insert(key.clone(), Held { port, namespace });
        Ok(port)
    }

    /// Frees the ports that have rested long enough.
    fn wake(&mut self, now: Instant) {
        while self.resting.front().is_some_and(|one| one.until <= now) {
            let Some(rested) = self.resting.pop_front() else {
                return;
            };
            self.free.push_back(rested.port);
            if let Some(namespace) = rested.namespace {
                self.discount(&namespace);
            }
        }
    }

    /// Gives the port back.
    pub(super) fn release(&mut self, key: &PodPort, now: Instant) {
        if let Some(Held { port, namespace }) = self.taken.remove(key) {
            self.resting.push_back(Resting {
                port,
                namespace: Some(namespace),
                until: now + REST,
            });
        }
    }

    /// Gives a port back that another program uses: it rests for nobody's account.
    pub(super) fn set_aside(&mut self, key: &PodPort, now: Instant) {
        if let Some(Held { port, namespace }) = self.taken.remove(key) {
            self.discount(&namespace);
            self.resting.push_back(Resting {
                port,
                namespace: None,
                until: now + REST,
            });
        }
    }

    /// Lets the ports rest that slices name and no pod has: those of an earlier process, and those of slices that could not be
    /// deleted yet. They count for the namespaces of these slices.
    pub(super) fn rest(&mut self, named: &HashMap<u16, Arc<str>>, now: Instant) {
        let (again, resting): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut self.resting)
            .into_iter()
            .partition(|one| named.contains_key(&one.port));
        self.resting = resting;
        let until = now + REST;
        let again = again.into_iter().map(|one| Resting { until, ..one });
        self.resting.extend(again);
        let (again, free): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut self.free)
            .into_iter()
            .partition(|port| named.contains_key(port));
        self.free = free;
        for port in again {
            let namespace = named.get(&port).cloned();
            if let Some(namespace) = &namespace {
                self.count_for(namespace);
            }
            self.resting.push_back(Resting {
                port,
                namespace,
                until,
            });
        }
    }

    fn count_for(&mut self, namespace: &Arc<str>) {
        *self.of_namespace.entry(Arc::clone(namespace)).or_default() += 1;
    }

    /// A namespace without a port is forgotten.
    fn discount(&mut self, namespace: &Arc<str>) {
        if let Some(count) = self.of_namespace.get_mut(namespace) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.of_namespace.remove(namespace);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(uid: &str, number: u16) -> PodPort {
        let uid = uid.parse().unwrap();
        PodPort { uid, number }
    }

    /// The port that a pod of namespace `team` gets.
    fn assign(ports: &mut Ports, key: &PodPort, now: Instant) -> Option<u16> {
        ports.assign(key, &"team".into(), now).ok()
    }

    fn named(ports: &[u16]) -> HashMap<u16, Arc<str>> {
        let named = ports.iter().map(|port| (*port, "team".into()));
        named.collect()
    }

    #[test]
    fn a_port_that_was_given_back_rests_before_another_pod_gets_it() {
        let now = Instant::now();
        let mut ports = Ports::new(10..=12);
        assert_eq!(assign(&mut ports, &of("a", 80), now), Some(10));
        let again = assign(&mut ports, &of("a", 80), now);
        assert_eq!(again, Some(10), "it keeps it");
        assert_eq!(assign(&mut ports, &of("a", 81), now), Some(11));
        ports.release(&of("a", 80), now);
        assert_eq!(assign(&mut ports, &of("b", 80), now), Some(12));
        assert_eq!(assign(&mut ports, &of("c", 80), now), None);
        assert_eq!(assign(&mut ports, &of("c", 80), now + REST), Some(10));
        // To give back what nobody has changes nothing.
        ports.release(&of("d", 80), now);
        assert_eq!(assign(&mut ports, &of("d", 80), now + REST * 2), None);
    }

    #[test]
    fn a_pod_does_not_take_the_ports_of_all_others() {
        let now = Instant::now();
        let mut ports = Ports::new(1000..=1999);
        let got = (1..=100).filter(|number| assign(&mut ports, &of("a", *number), now).is_some());
        assert_eq!(got.count(), OF_POD);
        let more = ports.assign(&of("a", 99), &"team".into(), now);
        assert_eq!(more, Err(NoPort::Pod));
        assert!(assign(&mut ports, &of("b", 80), now).is_some());
        ports.release(&of("a", 1), now);
        assert!(assign(&mut ports, &of("a", 99), now).is_some());
    }

    /// How many of 2000 pods get a port.
    fn pods_with_port(ports: &mut Ports, namespace: &str, now: Instant) -> usize {
        let pods = (0..2000).filter(|pod| {
            let key = of(&format!("{namespace}-{pod}"), 80);
            ports.assign(&key, &namespace.into(), now).is_ok()
        });
        pods.count()
    }

    #[test]
    fn the_pods_of_one_namespace_leave_ports_for_those_of_others() {
        let now = Instant::now();
        let mut ports = Ports::new(11_000..=12_023);
        assert_eq!(pods_with_port(&mut ports, "greedy", now), 768);
        let refused = ports.assign(&of("more", 80), &"greedy".into(), now);
        let refused = refused.unwrap_err();
        let text = refused.to_string();
        assert!(
            text.contains("fewer than 32") && text.contains("greedy"),
            "{text}"
        );
        for other in ["a", "b", "c", "d", "e", "f", "g", "h"] {
            assert_eq!(pods_with_port(&mut ports, other, now), 32, "{other}");
        }
        let none = ports.assign(&of("late", 80), &"late".into(), now);
        assert_eq!(none, Err(NoPort::All));
        ports.release(&of("greedy-0", 80), now);
        let later = now + REST;
        assert!(ports.assign(&of("late", 80), &"late".into(), later).is_ok());
    }

    #[test]
    fn ports_that_rest_count_for_the_namespace_that_had_them() {
        let now = Instant::now();
        let mut ports = Ports::new(11_000..=12_023);
        assert_eq!(pods_with_port(&mut ports, "greedy", now), 768);
        for pod in 0..768 {
            ports.release(&of(&format!("greedy-{pod}"), 80), now);
        }
        let soon = now + REST / 2;
        assert_eq!(pods_with_port(&mut ports, "greedy", soon), 0);
        assert_eq!(pods_with_port(&mut ports, "other", soon), 32);
        let later = now + REST;
        assert_eq!(pods_with_port(&mut ports, "greedy", later), 768 - 32);
        assert_eq!(ports.of_namespace.len(), 2);
    }

    #[test]
    fn ports_of_an_earlier_process_count_for_the_namespaces_of_their_slices() {
        let now = Instant::now();
        let mut ports = Ports::new(11_000..=12_023);
        let all: Vec<u16> = (11_000..=11_799).collect();
        ports.rest(&named(&all), now);
        ports.rest(&named(&all), now);
        assert_eq!(ports.of_namespace.get("team"), Some(&800));
        assert_eq!(pods_with_port(&mut ports, "team", now), 0);
        assert_eq!(pods_with_port(&mut ports, "other", now), 32);
        ports.rest(&HashMap::new(), now + REST);
        assert!(pods_with_port(&mut ports, "team", now + REST) > 700);
    }

    #[test]
    fn a_port_that_another_program_uses_counts_for_nobody() {
        let now = Instant::now();
        let mut ports = Ports::new(10..=11);
        assert_eq!(assign(&mut ports, &of("a", 80), now), Some(10));
        ports.set_aside(&of("a", 80), now);
        assert!(ports.of_namespace.is_empty());
        assert_eq!(assign(&mut ports, &of("a", 80), now), Some(11));
        assert_eq!(assign(&mut ports, &of("b", 80), now), None);
        assert_eq!(assign(&mut ports, &of("b", 80), now + REST), Some(10));
        assert_eq!(ports.of_namespace.get("team"), Some(&2));
    }

    #[test]
    fn ports_of_an_earlier_process_rest() {
        let now = Instant::now();
        let mut ports = Ports::new(10..=11);
        ports.rest(&named(&[10, 99]), now);
        assert_eq!(assign(&mut ports, &of("a", 80), now), Some(11));
        assert_eq!(assign(&mut ports, &of("b", 80), now), None);
        assert_eq!(assign(&mut ports, &of("b", 80), now + REST), Some(10));
        assert_eq!(assign(&mut ports, &of("c", 80), now + REST), None);
    }

    #[test]
    fn a_port_that_a_slice_still_names_does_not_become_another_pods() {
        let now = Instant::now();
        let mut ports = Ports::new(10..=11);
        assert_eq!(assign(&mut ports, &of("a", 80), now), Some(10));
        assert_eq!(assign(&mut ports, &of("b", 80), now), Some(11));
        ports.release(&of("a", 80), now);
        // The slice was not deleted within the minute.
        let later = now + REST;
        ports.rest(&named(&[10, 11]), later);
        assert_eq!(assign(&mut ports, &of("c", 80), later), None);
        let kept = assign(&mut ports, &of("b", 80), later);
        assert_eq!(kept, Some(11), "it keeps it");
        ports.rest(&HashMap::new(), later);
        assert_eq!(assign(&mut ports, &of("c", 80), later + REST), Some(10));
    }
}
