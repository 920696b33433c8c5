//! PURE: computes what containers use from samples of their processes.
//!
//! The kernel adds the time of a child to its parent when the parent waits for it. So the sum over the living processes, of
//! what they and the children they waited for used, has everything except what was reaped from outside the container: a
//! process that was started by exec, or one whose parent ignores SIGCHLD. An [`Account`] remembers that, so its counters
//! never decrease while the attempt lasts.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::{Add, Sub},
};

use super::{proc::Process, signals::Identity};

/// Counters, which only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// CPU time, user and system, in nanoseconds.
    pub(crate) cpu: u64,
    /// Page faults that needed no disk, and those that did.
    pub(crate) faults: u64,
    pub(crate) major: u64,
}

impl Counters {
    /// The larger value of each counter.
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

/// Saturates at zero.
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
    /// What its own threads used.
    pub(crate) own: Counters,
    /// What the children used that it waited for, including their children.
    pub(crate) kids: Counters,
}

/// One process as it was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) process: Process,
    /// The start time, which together with the pid identifies the process.
    pub(crate) start: u64,
    pub(crate) used: Used,
    /// Resident bytes, and those of them that belong to files or are shared.
    pub(crate) resident: u64,
    pub(crate) shared: u64,
    /// Bytes swapped out.
    pub(crate) swapped: u64,
    /// The inode of its PID namespace; `None` if it cannot be read.
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
/// session), and all below them. Empty if the program does not exist.
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
    // Each process is visited once, whatever tree a container makes of its processes.
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

/// The memory of processes, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Resident {
    /// Anonymous memory and the largest shared part.
    pub(crate) working_set: u64,
    /// Anonymous memory.
    pub(crate) anonymous: u64,
    /// What is swapped out.
    pub(crate) swapped: u64,
}

/// The memory of all `members` together. Their shared parts are mostly the same pages, so only the largest is counted.
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
    /// What processes used that have ended and that no living process waited for.
    gone: Counters,
    shown: Counters,
}

impl Account {
    /// Takes the container's processes as they are now, and returns the counters, which are never below those returned before.
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

    /// Ends the attempt. `total` is what the kernel counted for all children of its runtime.
    pub(crate) fn end(&mut self, total: Counters) -> Counters {
        self.known.clear();
        self.show(total)
    }

    /// The counters as they were last returned.
    pub(crate) fn shown(&self) -> Counters {
        self.shown
    }

    fn show(&mut self, counted: Counters) -> Counters {
        let sum = self.gone + counted;
        // If the count has fallen, the difference is remembered, so that later growth shows.
        self.gone = self.gone + (self.shown - sum);
        self.shown = self.shown.max(sum);
        self.shown
    }

    /// Whether a living process waited for `gone`, directly or through parents that ended, too. `told` caches the answers by
    /// parent, so that a long chain that ends at once is walked only once.
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
            // If the parents form a circle, no living process waited.
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
