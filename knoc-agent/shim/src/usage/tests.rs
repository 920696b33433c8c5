use proptest::prelude::*;

use super::*;

fn cpu(cpu: u64) -> Counters {
    Counters {
        cpu,
        ..Counters::default()
    }
}

fn sample(pid: u32, parent: u32, own: u64, kids: u64) -> Sample {
    Sample {
        process: Process {
            pid,
            parent,
            session: 1,
        },
        start: u64::from(pid),
        used: Used {
            own: cpu(own),
            kids: cpu(kids),
        },
        resident: 0,
        shared: 0,
        swapped: 0,
        namespace: Some(5),
    }
}

#[test]
fn a_child_that_was_waited_for_counts_once() {
    let mut account = Account::default();
    assert_eq!(
        account.take(&[sample(1, 0, 10, 0), sample(2, 1, 5, 0)]).cpu,
        15
    );
    // It used 2 more, ended, and its parent has all of it.
    assert_eq!(account.take(&[sample(1, 0, 10, 7)]).cpu, 17);
}

#[test]
fn what_was_reaped_outside_is_kept() {
    let mut account = Account::default();
    // 9 was started by exec, so its parent is outside the container. 10 is its child.
    let exec = [
        sample(1, 0, 10, 0),
        sample(9, 77, 5, 0),
        sample(10, 9, 1, 0),
    ];
    assert_eq!(account.take(&exec).cpu, 16);
    assert_eq!(account.take(&[sample(1, 0, 12, 0)]).cpu, 18);
    assert_eq!(account.end(cpu(13)).cpu, 19);
}

#[test]
fn a_child_that_nobody_waits_for_makes_no_counter_fall_and_hides_no_growth() {
    let mut account = Account::default();
    assert_eq!(
        account
            .take(&[sample(1, 0, 10, 0), sample(2, 1, 30, 0)])
            .cpu,
        40
    );
    // 1 ignores SIGCHLD, so the time of 2 is not added to any process.
    assert_eq!(account.take(&[sample(1, 0, 12, 0)]).cpu, 40);
    assert_eq!(account.take(&[sample(1, 0, 20, 0)]).cpu, 48);
}

#[test]
fn a_pid_given_again_is_another_process() {
    let mut account = Account::default();
    assert_eq!(
        account
            .take(&[sample(1, 0, 0, 0), sample(9, 77, 50, 0)])
            .cpu,
        50
    );
    let again = Sample {
        start: 1000,
        ..sample(9, 77, 1, 0)
    };
    assert_eq!(account.take(&[sample(1, 0, 0, 0), again]).cpu, 51);
}

#[test]
fn members_are_of_the_namespace_and_below() {
    let of = |pid, parent, namespace| Sample {
        namespace,
        ..sample(pid, parent, 0, 0)
    };
    let all = [
        of(100, 50, Some(7)),
        of(101, 100, Some(7)),
        // A container inside the container, out of order.
        of(90, 102, Some(9)),
        of(102, 101, Some(8)),
        // Started by exec; its helper is outside.
        of(201, 200, Some(7)),
        of(200, 50, Some(1)),
        // Another container.
        of(300, 50, Some(6)),
        of(301, 300, None),
    ];
    let program = Identity {
        pid: 100,
        start: 100,
    };
    let pids = |found: Vec<Sample>| -> Vec<u32> {
        found.iter().map(|sample| sample.process.pid).collect()
    };
    assert_eq!(pids(members(&all, program, true)), [100, 101, 90, 102, 201]);
    let other = Identity {
        pid: 300,
        start: 300,
    };
    assert_eq!(pids(members(&all, other, true)), [300, 301]);
    let ended = Identity {
        pid: 100,
        start: 99,
    };
    assert_eq!(members(&all, ended, true), []);
}

#[test]
fn without_a_namespace_members_are_of_the_session_and_below() {
    let of = |pid, parent, session| {
        let mut one = sample(pid, parent, 0, 0);
        one.process.session = session;
        one
    };
    let all = [
        of(100, 50, 100),
        of(101, 100, 101),
        // An orphan, which the shim has inherited.
        of(102, 50, 100),
        of(200, 50, 200),
    ];
    let program = Identity {
        pid: 100,
        start: 100,
    };
    let found = members(&all, program, false);
    let pids: Vec<_> = found.iter().map(|sample| sample.process.pid).collect();
    assert_eq!(pids, [100, 101, 102]);
}

#[test]
fn shared_memory_counts_once() {
    let of = |pid, resident, shared| Sample {
        resident,
        shared,
        swapped: 3,
        ..sample(pid, 1, 0, 0)
    };
    let sum = resident(&[of(1, 100, 60), of(2, 90, 70)]);
    assert_eq!((sum.anonymous, sum.working_set, sum.swapped), (60, 130, 6));
    assert_eq!(resident(&[]), Resident::default());
}

/// A simulated kernel: processes fork, run, exit and are waited for.
#[derive(Debug, Clone)]
struct Kernel {
    /// For each process its pid, parent, own time, and the time of children it waited for.
    living: Vec<(u32, u32, u64, u64)>,
    next: u32,
    /// All time that was ever used.
    truth: u64,
}

#[derive(Debug, Clone)]
enum Step {
    Fork(usize),
    Run(usize, u64),
    Exit(usize),
    Sample,
}

impl Kernel {
    fn step(&mut self, step: &Step) -> Option<Vec<Sample>> {
        let index = |n: usize| n % self.living.len();
        match *step {
            Step::Fork(n) => {
                let parent = self.living[index(n)].0;
                self.living.push((self.next, parent, 0, 0));
                self.next += 1;
            }
            Step::Run(n, time) => {
                let index = index(n);
                self.living[index].2 += time;
                self.truth += time;
            }
            Step::Exit(n) => self.exit(index(n)),
            Step::Sample => {
                let samples = self.living.iter();
                return Some(samples.map(|p| sample(p.0, p.1, p.2, p.3)).collect());
            }
        }
        None
    }

    /// The parent waits at once. Process 1, which never ends, inherits orphans.
    fn exit(&mut self, index: usize) {
        if self.living[index].0 == 1 {
            return;
        }
        let (pid, parent, own, kids) = self.living.remove(index);
        for process in &mut self.living {
            if process.0 == parent {
                process.3 += own + kids;
            }
            if process.1 == pid {
                process.1 = 1;
            }
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        any::<usize>().prop_map(Step::Fork),
        (any::<usize>(), 0..1000_u64).prop_map(|(n, time)| Step::Run(n, time)),
        any::<usize>().prop_map(Step::Exit),
        Just(Step::Sample),
    ]
}

proptest! {
    #[test]
    fn whatever_is_waited_for_the_count_is_exact(steps in prop::collection::vec(step(), 0..200)) {
        let mut kernel = Kernel { living: vec![(1, 0, 0, 0)], next: 2, truth: 0 };
        let mut account = Account::default();
        for step in &steps {
            if let Some(samples) = kernel.step(step) {
                prop_assert_eq!(account.take(&samples).cpu, kernel.truth);
            }
        }
    }

    #[test]
    fn counters_never_fall_whatever_the_samples_say(
        rounds in prop::collection::vec(
            prop::collection::vec((1..8_u32, 0..9_u32, 0..100_u64, 0..100_u64, 0..2_u64), 0..8),
            0..30,
        ),
        last in 0..1000_u64,
    ) {
        let mut account = Account::default();
        let mut before = Counters::default();
        for round in rounds {
            let samples: Vec<_> = round
                .iter()
                .map(|&(pid, parent, own, kids, start)| Sample { start, ..sample(pid, parent, own, kids) })
                .collect();
            let now = account.take(&samples);
            prop_assert_eq!(now.max(before), now);
            before = now;
        }
        let end = account.end(cpu(last));
        prop_assert_eq!(end.max(before), end);
        prop_assert_eq!(account.shown(), end);
    }
}

/// A container may make any tree of processes; the shim has one thread.
#[test]
fn a_long_chain_of_processes_is_walked_once() {
    const LENGTH: u32 = 40_000;
    let chain: Vec<_> = (1..=LENGTH)
        .rev()
        .map(|pid| Sample {
            namespace: None,
            process: Process {
                pid,
                parent: pid - 1,
                session: pid,
            },
            ..sample(pid, pid - 1, 1, 0)
        })
        .collect();
    let program = Identity { pid: 1, start: 1 };
    let began = std::time::Instant::now();
    let all = members(&chain, program, false);
    assert_eq!(all.len(), chain.len());
    let mut account = Account::default();
    assert_eq!(account.take(&all).cpu, u64::from(LENGTH));
    // All but the first end at once, and it has waited for them.
    let left = [sample(1, 0, 1, u64::from(LENGTH) - 1)];
    assert_eq!(account.take(&left).cpu, u64::from(LENGTH));
    assert!(began.elapsed().as_secs() < 10, "{:?}", began.elapsed());
}
