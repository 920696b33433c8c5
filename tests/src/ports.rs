//! Ports for servers of tests. A process gives none out twice, neither alone nor within a range, so that tests that run at once do not
//! take each other's.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, TcpListener},
    ops::{Range, RangeInclusive},
    sync::{Mutex, PoisonError},
};

use anyhow::Context as _;

/// Below the ports that the system gives to clients, so that a port stays free until its server begins, and while that is down. Above
/// those that tests have as constants, such as host ports.
const PORTS: Range<u16> = 22_000..32_000;

/// A port of this host on which nobody listens.
pub fn free_port() -> anyhow::Result<u16> {
    take(1).context("no port is free")
}

/// So many ports of this host, one after the other, on which nobody listens.
pub fn free_range(count: u16) -> anyhow::Result<RangeInclusive<u16>> {
    let first = take(count).with_context(|| format!("no {count} ports in a row are free"))?;
    Ok(first..=first + count.saturating_sub(1))
}

/// A port for a server in a pod, even; the next one is the pod's, too. Pods in the network of a node share its ports, so each takes its
/// own. If there are no others any more, the first ones are given out again, and whoever needs both fails.
#[must_use]
pub fn some_port() -> u16 {
    take(2).unwrap_or(PORTS.start)
}

/// The first of so many ports in a row, which are given out with it. One alone takes the place of two, so that pairs are even. The search
/// begins anywhere, as another process may do the same.
fn take(count: u16) -> Option<u16> {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let size = count.max(2);
    let last = PORTS.end.checked_sub(size)?;
    let places: Vec<u16> = (PORTS.start..=last).step_by(size.into()).collect();
    let (before, after) = places.split_at(rand::random_range(0..=places.len()));
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let first = *after.iter().chain(before).find(|first| {
        let mut all = **first..**first + count;
        all.all(|port| !given.contains(&port) && is_free(port))
    })?;
    given.extend(first..first + count);
    Some(first)
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_port_is_given_out_twice_by_any_of_the_functions() {
        let mut all = Vec::new();
        for _ in 0..50 {
            let pods = some_port();
            assert_eq!(pods % 2, 0);
            all.extend([pods, pods + 1, free_port().unwrap()]);
            let range = free_range(40).unwrap();
            assert_eq!(range.clone().count(), 40);
            all.extend(range);
        }
        assert!(all.iter().all(|port| PORTS.contains(port)));
        let different: BTreeSet<u16> = all.iter().copied().collect();
        assert_eq!(different.len(), all.len());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        free_range(u16::MAX).unwrap_err();
        free_range(20_000).unwrap_err();
    }
}
