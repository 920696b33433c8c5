//! Which pods can be reached by a step, which steps there are, and who uses them. No clock of its
//! own and no I/O.

use std::collections::HashMap;

use knoc_proto::{
    ids::{JobId, PodUid},
    pb,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::Phase;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Table {
    known: HashMap<PodUid, (JobId, pb::ShimRoute)>,
    steps: HashMap<PodUid, Entry>,
    counter: u64,
}

/// A step that starts or carries a link.
#[derive(Debug)]
pub(super) struct Entry {
    number: u64,
    users: usize,
    /// Since when there are no users.
    idle_since: Option<Instant>,
    phase: watch::Receiver<Phase>,
    /// Tells the carrier to end.
    close: CancellationToken,
}

impl Entry {
    /// A step that starts now, with one user.
    pub(super) fn new(phase: watch::Receiver<Phase>, close: CancellationToken) -> Self {
        Self {
            number: 0,
            users: 1,
            idle_since: None,
            phase,
            close,
        }
    }
}

impl Table {
    pub(super) fn know(&mut self, uid: &PodUid, job: JobId, route: &pb::ShimRoute) {
        self.known.insert(uid.clone(), (job, route.clone()));
    }

    pub(super) fn known(&self, uid: &PodUid) -> Option<(JobId, pb::ShimRoute)> {
        self.known.get(uid).cloned()
    }

    pub(super) fn forget(&mut self, uid: &PodUid) {
        self.known.remove(uid);
    }

    pub(super) fn len(&self) -> usize {
        self.steps.len()
    }

    /// Adds a user to the pod's step, if there is one.
    pub(super) fn hold(&mut self, uid: &PodUid) -> Option<(u64, watch::Receiver<Phase>)> {
        let entry = self.steps.get_mut(uid)?;
        entry.users += 1;
        entry.idle_since = None;
        Some((entry.number, entry.phase.clone()))
    }

    /// Removes a user.
    pub(super) fn release(&mut self, uid: &PodUid, number: u64, now: Instant) {
        let Some(entry) = self
            .steps
            .get_mut(uid)
            .filter(|entry| entry.number == number)
        else {
            return;
        };
        entry.users = entry.users.saturating_sub(1);
        if entry.users == 0 {
            entry.idle_since = Some(now);
        }
    }

    /// Adds a step; returns its number.
    pub(super) fn insert(&mut self, uid: &PodUid, entry: Entry) -> u64 {
        self.counter += 1;
        let number = self.counter;
        self.steps.insert(uid.clone(), Entry { number, ..entry });
        number
    }

    /// Removes a step, unless it was replaced.
    pub(super) fn remove(&mut self, uid: &PodUid, number: u64) {
        if self
            .steps
            .get(uid)
            .is_some_and(|entry| entry.number == number)
        {
            self.steps.remove(uid);
        }
    }

    /// Tells all steps to end.
    pub(super) fn close_all(&self) {
        for entry in self.steps.values() {
            entry.close.cancel();
        }
    }

    /// Makes room for one more step than there are, of at most `most`: ends the one that has been
    /// idle longest. `false` if all are in use.
    pub(super) fn make_room(&mut self, most: usize) -> bool {
        if self.steps.len() < most {
            return true;
        }
        let idle = self
            .steps
            .iter()
            .filter_map(|(uid, entry)| Some((entry.idle_since?, uid)));
        let Some(uid) = idle
            .min_by_key(|(since, _)| *since)
            .map(|(_, uid)| uid.clone())
        else {
            return false;
        };
        if let Some(entry) = self.steps.remove(&uid) {
            entry.close.cancel();
        }
        self.steps.len() < most
    }

    /// Removes the step if it has been idle since `before` or longer, and returns true; else says
    /// since when it has been idle, if it is.
    pub(super) fn end_if_idle(
        &mut self,
        uid: &PodUid,
        number: u64,
        before: Option<Instant>,
    ) -> Result<(), Option<Instant>> {
        let entry = self.steps.get(uid).filter(|entry| entry.number == number);
        let Some(entry) = entry else { return Ok(()) };
        match (entry.idle_since, before) {
            (Some(since), Some(before)) if since <= before => {
                self.steps.remove(uid);
                Ok(())
            }
            (since, _) => Err(since),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn uid(name: &str) -> PodUid {
        PodUid::try_from(name).unwrap()
    }

    fn entry() -> (Entry, CancellationToken) {
        let close = CancellationToken::new();
        let (_, phase) = watch::channel(Phase::Starting);
        (Entry::new(phase, close.clone()), close)
    }

    #[tokio::test]
    async fn a_step_in_use_keeps_its_place_and_the_longest_idle_one_gives_way() {
        let mut table = Table::default();
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let ((first, first_close), (second, second_close)) = (entry(), entry());
        let one = table.insert(&uid("a"), first);
        let two = table.insert(&uid("b"), second);
        assert!(table.make_room(3));
        assert!(!table.make_room(2), "both are in use");
        table.release(&uid("b"), two, now);
        table.release(&uid("a"), one, later);
        assert!(table.make_room(2));
        assert!(second_close.is_cancelled() && !first_close.is_cancelled());
        assert!(table.hold(&uid("b")).is_none(), "it is ending");
        assert!(table.hold(&uid("a")).is_some());
        // The end of a use of the step that was replaced changes nothing.
        table.release(&uid("a"), two, now);
        assert!(!table.make_room(1));
    }

    #[tokio::test]
    async fn only_an_idle_step_ends_and_not_before_its_time() {
        let mut table = Table::default();
        let now = Instant::now();
        let (entry, _) = entry();
        let number = table.insert(&uid("a"), entry);
        assert_eq!(table.end_if_idle(&uid("a"), number, Some(now)), Err(None));
        table.release(&uid("a"), number, now);
        let earlier = now - Duration::from_millis(1);
        assert_eq!(
            table.end_if_idle(&uid("a"), number, Some(earlier)),
            Err(Some(now))
        );
        assert!(table.hold(&uid("a")).is_some());
        table.release(&uid("a"), number, now);
        assert_eq!(table.end_if_idle(&uid("a"), number, Some(now)), Ok(()));
        assert_eq!(table.len(), 0);
    }
}
