//! PURE: which open connection gives way to a new one for which there is no room.
//!
//! A relayed connection may be silent for as long as it likes, since that belongs to its protocol, and proxies of Kubernetes set no time
//! limit either. Only while its place is needed, one that has been idle for long is closed: without that, clients that send nothing would
//! keep out all others for good. As where connections of unknown peers are admitted ([`knoc_link::admission`]), the source with
//! the most of them loses its oldest one, so that whoever opens many displaces only himself.

use std::{collections::HashMap, time::Duration};

use knoc_link::admission::{Admissions, Source};
use tokio::time::Instant;

/// How long a connection on which no byte was ever sent keeps its place. More than it may take to connect to the pod.
pub(super) const SILENT: Duration = Duration::from_secs(15);
/// How long one on which bytes were sent keeps its place after the last of them.
pub(super) const IDLE: Duration = Duration::from_mins(5);

/// What is known of an open connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known {
    pub(super) id: u64,
    pub(super) source: Source,
    pub(super) began: Instant,
    /// When the last byte was sent in either direction.
    pub(super) moved: Option<Instant>,
}

impl Known {
    fn since(&self) -> Instant {
        self.moved.unwrap_or(self.began)
    }

    fn is_idle(&self, now: Instant) -> bool {
        let limit = if self.moved.is_some() { IDLE } else { SILENT };
        now.saturating_duration_since(self.since()) >= limit
    }
}

/// The connection that gives way: of the source that has the most idle ones, the one that has been idle for longest.
pub(super) fn gives_way(open: impl Iterator<Item = Known>, now: Instant) -> Option<u64> {
    let mut idle: Vec<_> = open.filter(|one| one.is_idle(now)).collect();
    idle.sort_unstable_by_key(|one| (one.since(), one.id));
    let mut admissions = Admissions::new(usize::MAX, usize::MAX);
    let mut ids = HashMap::with_capacity(idle.len());
    for one in idle {
        let (ticket, _) = admissions.admit(one.source);
        ids.insert(ticket, one.id);
    }
    let (ticket, _) = admissions.evict()?;
    ids.remove(&ticket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(id: u64, source: u8, began: Instant, moved: Option<Instant>) -> Known {
        Known {
            id,
            source: Source::V4([10, 0, 0, source].into()),
            began,
            moved,
        }
    }

    #[test]
    fn only_a_connection_that_has_been_idle_for_long_gives_way() {
        let began = Instant::now();
        let now = began + IDLE;
        let just_before = |limit: Duration| now - limit + Duration::from_millis(1);
        let chosen = |open: &[Known]| gives_way(open.iter().copied(), now);
        assert_eq!(chosen(&[]), None);
        let new = known(1, 1, just_before(SILENT), None);
        let lively = known(2, 1, began, Some(just_before(IDLE)));
        assert_eq!(chosen(&[new, lively]), None);
        let silent = known(3, 1, now - SILENT, None);
        assert_eq!(chosen(&[new, lively, silent]), Some(3));
        let left = known(4, 1, began, Some(began));
        assert_eq!(chosen(&[silent, left]), Some(4), "it is idle for longer");
    }

    #[test]
    fn the_source_with_the_most_idle_connections_loses_its_oldest() {
        let began = Instant::now();
        let now = began + IDLE * 2;
        let after = |seconds| began + Duration::from_secs(seconds);
        let open = [
            known(1, 1, began, None),
            known(2, 2, after(2), None),
            known(3, 2, after(1), None),
            // A source that is busy with connections in use has one that is idle.
            known(4, 3, began, Some(now)),
            known(5, 3, began, Some(now)),
            known(6, 3, began, None),
        ];
        assert_eq!(gives_way(open.into_iter(), now), Some(3));
    }
}
