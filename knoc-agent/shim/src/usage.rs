//! PURE: the accounts of what containers use, made of samples of their processes.
//!
//! The kernel adds the time of a child that was waited for to its parent, so the sum over the living processes of what
//! they and their waited-for children used holds everything — except what was reaped by somebody outside: a process
//! that was exec'd into the container, or one whose parent ignores SIGCHLD. An [`Account`] keeps that, and so never
//! falls while its attempt lasts.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::{Add, Sub},
};

use super::{proc::Process, signals::Identity};

/// What only grows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// CPU time, user and system, nanoseconds.
    pub(crate) cpu: u64,
    /// Page faults that needed no disk, and those that did.
    pub(crate) faults: u64,
    pub(crate) major: u64,
}

impl Counters {
    /// The larger of each.
    pub(crate) fn max(self, other: Self) -> Self {
        Self {
            cpu: self.cpu.max(other.cpu),
            faults: self.faults.max(other.faults),
            major: self.major.max(other.major),
        }
    }
}

impl Add for Counters {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            cpu: self.cpu.saturating_add(other.cpu),
            faults: self.faults.saturating_add(other.faults),
            major: self.major.saturating_add(other.major),
        }
    }
}

/// Never below zero.
impl Sub for Counters {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            cpu: self.cpu.saturating_sub(other.cpu),
            faults: self.faults.saturating_sub(other.faults),
            major: self.major.saturating_sub(other.major),
        }
    }
}

impl std::iter::Sum for Counters {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Self::add)
    }
}

/// What one process used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Used {
    /// Its threads.
    pub(crate) own: Counters,
    /// Children it waited for, with theirs.
    pub(crate) kids: Counters,
}

/// One process as it was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) process: Process,
    /// With the pid it names the process for good.
    pub(crate) start: u64,
    pub(crate) used: Used,
    /// Bytes in memory, and those of them that are of files or shared.
    pub(crate) resident: u64,
    pub(crate) shared: u64,
    /// Bytes swapped out.
    pub(crate) swapped: u64,
    /// The inode of its PID namespace; `None` where it may not be seen.
    pub(crate) namespace: Option<u64>,
}

impl Sample {
    fn identity(&self) -> (u32, u64) {
        (self.process.pid, self.start)
    }

    fn total(&self) -> Counters {
        self.used.own + self.used.kids
    }
}

/// The processes of one container among all of the pod: its program, those of its PID namespace (without one: of its
/// session), and all below them. Nothing where the program is not there.
pub(crate) fn members(all: &[Sample], program: Identity, isolated: bool) -> Vec<Sample> {
    let Some(first) = all
        .iter()
        .find(|sample| sample.identity() == (program.pid, program.start))
    else {
        return Vec::new();
    };
    let is_root = |sample: &Sample| {
        sample.process.pid == program.pid
            || if isolated {
                sample.namespace.is_some() && sample.namespace == first.namespace
            } else {
                sample.process.session == program.pid
            }
    };
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for sample in all {
        let process = sample.process;
        children
            .entry(process.parent)
            .or_default()
            .push(process.pid);
    }
    let roots = all.iter().filter(|sample| is_root(sample));
    let mut queue: Vec<u32> = roots.map(|sample| sample.process.pid).collect();
    let mut inside: HashSet<u32> = queue.iter().copied().collect();
    // Each process is looked at once, whatever tree a container makes of them.
    while let Some(parent) = queue.pop() {
        for child in children.remove(&parent).unwrap_or_default() {
            if inside.insert(child) {
                queue.push(child);
            }
        }
    }
    let is_member = |sample: &&Sample| inside.contains(&sample.process.pid);
    all.iter().filter(is_member).copied().collect()
}

/// Memory of processes, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Resident {
    /// Anonymous memory and the largest shared part.
    pub(crate) working_set: u64,
    /// Anonymous memory.
    pub(crate) anonymous: u64,
    /// What is swapped out.
    pub(crate) swapped: u64,
}

/// Shared parts are mostly the same pages: they count once, by the largest.
pub(crate) fn resident(members: &[Sample]) -> Resident {
    let anonymous = members
        .iter()
        .map(|sample| sample.resident.saturating_sub(sample.shared))
        .sum();
    let shared = members.iter().map(|sample| sample.shared).max();
    Resident {
        working_set: anonymous + shared.unwrap_or_default(),
        anonymous,
        swapped: members.iter().map(|sample| sample.swapped).sum(),
    }
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    parent: u32,
    start: u64,
    total: Counters,
}

/// The counters of one attempt of a container.
#[derive(Debug, Clone, Default)]
pub(crate) struct Account {
    /// The processes of the last sample, by pid.
    known: BTreeMap<u32, Seen>,
    /// Of processes that are gone and in nobody's account of children.
    gone: Counters,
    shown: Counters,
}

impl Account {
    /// Takes the container's processes as they are now; answers the counters, which are never below the last answer.
    pub(crate) fn take(&mut self, members: &[Sample]) -> Counters {
        let now: BTreeMap<u32, Seen> = members
            .iter()
            .map(|sample| {
                let seen = Seen {
                    parent: sample.process.parent,
                    start: sample.start,
                    total: sample.total(),
                };
                (sample.process.pid, seen)
            })
            .collect();
        let mut known_parents = HashMap::new();
        let lost = self.known.iter().filter(|(pid, seen)| {
            !lives(&now, **pid, seen) && !self.absorbed(&now, seen, &mut known_parents)
        });
        self.gone = self.gone + lost.map(|(_, seen)| seen.total).sum();
        self.known = now;
        let living: Counters = self.known.values().map(|seen| seen.total).sum();
        self.show(living)
    }

    /// The attempt has ended; `total`: what its runtime's account of children says of all of them.
    pub(crate) fn end(&mut self, total: Counters) -> Counters {
        self.known.clear();
        self.show(total)
    }

    /// The last answer.
    pub(crate) fn shown(&self) -> Counters {
        self.shown
    }

    fn show(&mut self, counted: Counters) -> Counters {
        let sum = self.gone + counted;
        // What nobody told us of is kept, so that later growth shows.
        self.gone = self.gone + (self.shown - sum);
        self.shown = self.shown.max(sum);
        self.shown
    }

    /// Did a process that lives wait for one that was there, by its parent or through parents that ended too? `told` has
    /// the answers so far by parent, so that a long chain that ends at once is walked once.
    fn absorbed(
        &self,
        now: &BTreeMap<u32, Seen>,
        gone: &Seen,
        told: &mut HashMap<u32, bool>,
    ) -> bool {
        let mut parent = gone.parent;
        let mut passed = Vec::new();
        let answer = loop {
            if let Some(answer) = told.get(&parent) {
                break *answer;
            }
            let Some(seen) = self.known.get(&parent) else {
                break false;
            };
            if lives(now, parent, seen) {
                break true;
            }
            // Should the parents be a circle, whatever the reason, nobody waited.
            told.insert(parent, false);
            passed.push(parent);
            parent = seen.parent;
        };
        told.extend(passed.into_iter().map(|parent| (parent, answer)));
        answer
    }
}

fn lives(now: &BTreeMap<u32, Seen>, pid: u32, seen: &Seen) -> bool {
    now.get(&pid).is_some_and(|found| found.start == seen.start)
}

#[cfg(test)]
mod tests;
