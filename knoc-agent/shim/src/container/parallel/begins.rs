//! PURE: by when the programs of the ranks must run whose helpers were told to start them. A helper that hangs, for example in a file
//! system of its node, says nothing, and its connection stays.

use std::collections::BTreeMap;

use tokio::time::Instant;

/// The ranks whose programs do not run yet, and until when they may take.
#[derive(Debug, Default)]
pub(super) struct Begins(BTreeMap<usize, Instant>);

impl Begins {
    /// The helper of the rank was told to start its program.
    pub(super) fn add(&mut self, rank: usize, until: Instant) {
        self.0.insert(rank, until);
    }

    /// The program of the rank runs, or its end is known.
    pub(super) fn remove(&mut self, rank: usize) {
        self.0.remove(&rank);
    }

    /// The rank whose time is over first, and when that is.
    pub(super) fn first(&self) -> Option<(Instant, usize)> {
        let all = self.0.iter().map(|(rank, until)| (*until, *rank));
        all.min()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_rank_that_neither_runs_nor_ends_is_late_and_others_are_not() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let mut begins = Begins::default();
        assert_eq!(begins.first(), None);
        for (rank, until) in [(0, 9), (1, 7), (2, 8), (3, 7)] {
            begins.add(rank, at(until));
        }
        assert_eq!(begins.first(), Some((at(7), 1)));
        begins.remove(1);
        assert_eq!(begins.first(), Some((at(7), 3)));
        begins.remove(3);
        begins.remove(3);
        assert_eq!(begins.first(), Some((at(8), 2)));
        begins.remove(2);
        begins.remove(0);
        assert_eq!(begins.first(), None);
    }
}
