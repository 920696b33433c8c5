//! PURE: the states of the ranks of one attempt, and what follows from them.
//!
//! ```text
//! Awaited ──hello──► Connected ──running──► Running
//!    │                  │  └──────ended─────────┤ ended
//!    │ lost, or hello   │ lost                  │ lost
//!    │ too late         │                       │
//!    └──────────────────┴───────────────────────┴────────► Over (absorbs everything)
//! ```
//!
//! As with mpiexec, the first rank that fails ends the others: they would wait for it without end. What they exit with
//! then is our doing and says nothing about the program, so it does not count. If the pod is being stopped, every exit
//! code counts and no rank ends another one, because each has the grace period of the pod.

use std::cmp::Reverse;

/// The exit code of a rank whose helper or node was lost, as if it had been killed.
const LOST: i32 = 137;

/// How a rank was lost whose end nobody has reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Loss {
    /// The connection to its helper broke: the helper may have been killed, or its node have failed.
    Rank,
    /// Its node, or the network to it, did not answer any more. No program brings that about.
    Node,
}

/// What is known about a rank that has ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) code: i32,
    pub(crate) reason: String,
    pub(crate) message: String,
    /// Its end is not known, because it was lost.
    pub(crate) lost: Option<Loss>,
}

impl End {
    /// A rank that was lost ends as if it had been killed.
    fn lost(rank: usize, host: &str, loss: Loss) -> Self {
        let why = match loss {
            Loss::Rank => "its node, its helper or the network failed",
            Loss::Node => "its node or the network to it does not answer any more",
        };
        Self {
            code: LOST,
            reason: "Error".to_owned(),
            message: format!("the connection to rank {rank} on {host} was lost: {why}"),
            lost: Some(loss),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Awaited,
    Connected,
    Running,
    /// `counts`: it ended before another rank made us end it.
    Over {
        end: End,
        counts: bool,
    },
}

/// What has happened to a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Input {
    /// Its helper has connected.
    Hello { host: String },
    /// Its program runs.
    Running,
    /// Its program has ended, or could not be started.
    Ended(End),
    /// Its connection has ended before its program did.
    Lost(Loss),
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    Nothing,
    /// Tell the helper what to start.
    Start,
    /// The ranks are being ended: close the connection, so that the helper starts nothing.
    SendAway,
    /// Rank 0 runs, and so the container does.
    FirstRuns,
    /// A rank has failed: end the others.
    EndOthers,
}

#[derive(Debug)]
struct Rank {
    host: String,
    state: State,
}

/// The worst rank.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Worst<'a> {
    pub(crate) rank: usize,
    pub(crate) host: &'a str,
    pub(crate) end: &'a End,
}

/// All ranks of one attempt.
#[derive(Debug)]
pub(crate) struct Table {
    ranks: Vec<Rank>,
    /// The pod stops the container.
    stopping: bool,
    /// A rank has failed, and the others are being ended.
    failed: bool,
}

impl Table {
    pub(crate) fn new(ranks: usize) -> Self {
        let awaited = || Rank {
            host: String::new(),
            state: State::Awaited,
        };
        Self {
            ranks: std::iter::repeat_with(awaited).take(ranks).collect(),
            stopping: false,
            failed: false,
        }
    }

    /// Whether the helper of this rank may connect: the rank exists, and none has connected before.
    pub(crate) fn admits(&self, rank: usize) -> bool {
        let rank = self.ranks.get(rank);
        rank.is_some_and(|rank| rank.state == State::Awaited)
    }

    /// Whether the program of this rank runs.
    pub(crate) fn runs(&self, rank: usize) -> bool {
        let rank = self.ranks.get(rank);
        rank.is_some_and(|rank| rank.state == State::Running)
    }

    /// Whether the ranks are being ended: by the pod, or because one has failed.
    pub(crate) fn is_ending(&self) -> bool {
        self.stopping || self.failed
    }

    /// The node of the rank, once its helper has connected.
    pub(crate) fn host(&self, rank: usize) -> &str {
        self.ranks.get(rank).map_or("", |rank| &rank.host)
    }

    /// From now on every exit code counts, and no rank ends another one.
    pub(crate) fn stop(&mut self) {
        self.stopping = true;
    }

    /// Takes what has happened to the rank.
    pub(crate) fn step(&mut self, number: usize, input: Input) -> Effect {
        let counts = !self.failed;
        let Some(rank) = self.ranks.get_mut(number) else {
            return Effect::Nothing;
        };
        let end = match (&rank.state, input) {
            (State::Awaited, Input::Hello { host }) => {
                rank.host = host;
                if self.failed || self.stopping {
                    rank.state = State::Over {
                        end: End {
                            code: LOST,
                            ..End::default()
                        },
                        counts: false,
                    };
                    return Effect::SendAway;
                }
                rank.state = State::Connected;
                return Effect::Start;
            }
            (State::Connected, Input::Running) => {
                rank.state = State::Running;
                return if number == 0 {
                    Effect::FirstRuns
                } else {
                    Effect::Nothing
                };
            }
            (State::Connected | State::Running, Input::Ended(end)) => end,
            (State::Awaited | State::Connected | State::Running, Input::Lost(loss)) => {
                End::lost(number, &rank.host, loss)
            }
            // A helper says nothing else; if it does, it is not believed.
            (State::Awaited, Input::Running | Input::Ended(_))
            | (State::Connected, Input::Hello { .. })
            | (State::Running, Input::Hello { .. } | Input::Running)
            | (State::Over { .. }, _) => return Effect::Nothing,
        };
        let bad = end.code != 0;
        rank.state = State::Over { end, counts };
        if bad && !self.stopping && !self.failed {
            self.failed = true;
            return Effect::EndOthers;
        }
        Effect::Nothing
    }

    /// Whether all ranks have ended.
    pub(crate) fn is_over(&self) -> bool {
        let mut ranks = self.ranks.iter();
        ranks.all(|rank| matches!(rank.state, State::Over { .. }))
    }

    /// The ranks whose helpers have not connected.
    pub(crate) fn awaited(&self) -> Vec<usize> {
        let ranks = self.ranks.iter().enumerate();
        let awaited = ranks.filter(|(_, rank)| rank.state == State::Awaited);
        awaited.map(|(number, _)| number).collect()
    }

    /// The rank with the highest exit code among those that count, and of several the first one; `None` if none has ended.
    pub(crate) fn worst(&self) -> Option<Worst<'_>> {
        let ranks = self.ranks.iter().enumerate();
        let ended = ranks.filter_map(|(rank, one)| match &one.state {
            State::Over { end, counts: true } => Some(Worst {
                rank,
                host: &one.host,
                end,
            }),
            State::Over { counts: false, .. }
            | State::Awaited
            | State::Connected
            | State::Running => None,
        });
        ended.max_by_key(|worst| (worst.end.code, Reverse(worst.rank)))
    }

    /// The node of rank 0; empty if it has not connected.
    pub(crate) fn first_host(&self) -> &str {
        self.ranks.first().map_or("", |rank| &rank.host)
    }

    /// How rank 0 ended, if it has.
    pub(crate) fn first(&self) -> Option<&End> {
        match &self.ranks.first()?.state {
            State::Over { end, .. } => Some(end),
            State::Awaited | State::Connected | State::Running => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello() -> Input {
        Input::Hello {
            host: "c1".to_owned(),
        }
    }

    fn ended(code: i32) -> Input {
        Input::Ended(End {
            code,
            ..End::default()
        })
    }

    fn running(ranks: usize) -> Table {
        let mut table = Table::new(ranks);
        for rank in 0..ranks {
            assert!(table.admits(rank));
            assert_eq!(table.step(rank, hello()), Effect::Start);
            assert!(!table.admits(rank) && !table.runs(rank));
            let effect = table.step(rank, Input::Running);
            assert!(table.runs(rank));
            assert_eq!(effect == Effect::FirstRuns, rank == 0);
        }
        table
    }

    #[test]
    fn all_that_succeed_are_a_success() {
        let mut table = running(3);
        for rank in [2, 0, 1] {
            assert!(!table.is_over());
            assert_eq!(table.step(rank, ended(0)), Effect::Nothing);
        }
        assert!(table.is_over());
        assert_eq!(table.worst().unwrap().end.code, 0);
        assert_eq!(table.worst().unwrap().rank, 0);
    }

    #[test]
    fn the_first_failure_ends_the_others_whose_codes_do_not_count() {
        let mut table = running(3);
        assert_eq!(table.step(1, ended(3)), Effect::EndOthers);
        assert_eq!(table.step(0, ended(143)), Effect::Nothing);
        let lost = table.step(2, Input::Lost(Loss::Node));
        assert_eq!(lost, Effect::Nothing);
        assert!(table.is_over());
        let worst = table.worst().unwrap();
        assert_eq!((worst.rank, worst.end.code), (1, 3));
        assert_eq!(worst.end.lost, None);
    }

    #[test]
    fn a_rank_that_comes_after_another_has_failed_starts_nothing() {
        let mut table = Table::new(2);
        table.step(0, hello());
        assert_eq!(table.step(0, ended(128)), Effect::EndOthers);
        assert_eq!(table.step(1, hello()), Effect::SendAway);
        assert!(table.is_over());
        let worst = table.worst().unwrap();
        assert_eq!((worst.rank, worst.end.code), (0, 128));
    }

    #[test]
    fn while_the_pod_is_stopped_no_rank_ends_another_and_all_count() {
        let mut table = running(2);
        table.stop();
        assert_eq!(table.step(0, ended(1)), Effect::Nothing);
        assert_eq!(table.step(1, ended(143)), Effect::Nothing);
        assert_eq!(table.worst().unwrap().end.code, 143);
    }

    #[test]
    fn a_rank_that_is_lost_is_a_failure_that_names_its_node() {
        for loss in [Loss::Rank, Loss::Node] {
            let mut table = running(2);
            assert!(!table.is_ending());
            assert_eq!(table.step(1, Input::Lost(loss)), Effect::EndOthers);
            assert!(table.is_ending());
            let worst = table.worst().unwrap();
            assert_eq!((worst.rank, worst.end.code), (1, 137));
            assert_eq!(worst.end.lost, Some(loss));
            assert!(worst.end.message.contains("rank 1 on c1 was lost"));
        }
    }

    #[test]
    fn ranks_that_never_came_are_known() {
        let mut table = Table::new(3);
        table.step(1, hello());
        assert_eq!(table.awaited(), [0, 2]);
        assert!(!table.admits(3));
        assert_eq!(table.step(7, hello()), Effect::Nothing);
        assert_eq!(table.worst(), None);
        assert_eq!(table.first(), None);
    }

    fn input() -> impl Strategy<Value = Input> {
        prop_oneof![
            Just(hello()),
            Just(Input::Running),
            (0..256_i32).prop_map(ended),
            Just(Input::Lost(Loss::Rank)),
        ]
    }

    proptest! {
        #[test]
        fn whatever_happens_each_rank_starts_once_and_ends_once(
            inputs in proptest::collection::vec((0..4_usize, input()), 0..60),
        ) {
            let mut table = Table::new(3);
            let (mut starts, mut ends) = (Vec::new(), 0);
            for (rank, input) in inputs {
                let over = table.is_over();
                match table.step(rank, input) {
                    Effect::Start => starts.push(rank),
                    Effect::EndOthers => ends += 1,
                    Effect::FirstRuns => prop_assert_eq!(rank, 0),
                    Effect::SendAway | Effect::Nothing => {}
                }
                prop_assert!(!over || table.is_over());
            }
            let count = starts.len();
            starts.sort_unstable();
            starts.dedup();
            prop_assert_eq!(count, starts.len());
            prop_assert!(ends <= 1);
            // If all have ended, somebody was not ended by us.
            prop_assert!(!table.is_over() || table.worst().is_some());
        }
    }
}
