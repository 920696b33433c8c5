//! The rules of the plan for all states, and for all histories of a simulated pod.

use std::collections::BTreeSet;

use knoc_proto::pb::RestartPolicy;
use proptest::prelude::*;

use super::{super::*, NEVER, container, pod};

fn any_phase() -> impl Strategy<Value = Phase> {
    prop_oneof![
        Just(Phase::Idle),
        Just(Phase::Starting),
        Just(Phase::Running),
        (0_u64..20).prop_map(|at| Phase::Unconfigured {
            retry_at: Time::from_secs(at),
        }),
        (0_u64..20).prop_map(|at| Phase::Again {
            restart_at: Time::from_secs(at),
        }),
        (prop_oneof![Just(0), Just(1)], any::<bool>(), 0_u64..20).prop_map(
            |(code, unhealthy, at)| {
                Phase::Exited {
                    code,
                    unhealthy,
                    restart_at: Time::from_secs(at),
                }
            }
        ),
    ]
}

fn any_policy() -> impl Strategy<Value = RestartPolicy> {
    prop_oneof![
        Just(RestartPolicy::Always),
        Just(RestartPolicy::OnFailure),
        Just(RestartPolicy::Never)
    ]
}

fn any_startup_role() -> impl Strategy<Value = Role> {
    prop_oneof![Just(Role::Init), Just(Role::Sidecar)]
}

/// The roles that the API server accepts: a startup sequence, at least one main container, and ephemeral ones at the end.
fn any_roles() -> impl Strategy<Value = Vec<Role>> {
    let startup = proptest::collection::vec(any_startup_role(), 0..4);
    (startup, 1_usize..3, 0_usize..3).prop_map(|(startup, main, ephemeral)| {
        let main = std::iter::repeat_n(Role::Main, main);
        let ephemeral = std::iter::repeat_n(Role::Ephemeral, ephemeral);
        startup.into_iter().chain(main).chain(ephemeral).collect()
    })
}

fn any_stop() -> impl Strategy<Value = StopStage> {
    prop_oneof![
        3 => Just(StopStage::NotStopped),
        1 => Just(StopStage::PreStop),
        1 => Just(StopStage::Term),
        1 => Just(StopStage::Kill),
    ]
}

prop_compose! {
    fn any_health()(
        started in any::<bool>(),
        ready in any::<bool>(),
        failed_until in proptest::option::weighted(0.2, 0_u64..20),
    ) -> Health {
        let live = failed_until.map_or(Liveness::Live, |seconds| Liveness::Failed {
            kill_at: Time::from_secs(seconds),
        });
        Health { started, ready: started && ready, live }
    }
}

prop_compose! {
    fn any_container()(
        phase in any_phase(),
        health in any_health(),
        stop in any_stop(),
        pending in any::<[bool; 2]>(),
        spared_until in prop_oneof![Just(0), 0_u64..20],
    ) -> (Phase, Health, StopStage, [bool; 2], Time) {
        let health = if phase == Phase::Running { health } else { Health::down() };
        (phase, health, stop, pending, Time::from_secs(spared_until))
    }
}

prop_compose! {
    fn any_view()(
        (roles, states) in any_roles().prop_flat_map(|roles| {
            let states = proptest::collection::vec(any_container(), roles.len());
            (Just(roles), states)
        }),
        policy in any_policy(),
        values in any::<bool>(),
        kill_at in proptest::option::of(0_u64..20),
        now in 0_u64..20,
        restarts_all in proptest::option::weighted(0.2, 0_usize..8),
    ) -> View {
        let containers = roles.into_iter().zip(states).enumerate();
        let mut view = View {
            containers: containers
                .map(|(index, (role, (phase, health, stop, [pre, post], spared_until)))| Container {
                    health,
                    stop,
                    pre_stop_pending: pre,
                    post_start_pending: post,
                    spared_until,
                    ..container(index, role, policy, phase)
                })
                .collect(),
            values,
            kill_at: kill_at.map(Time::from_secs),
            last: None,
            now: Time::from_secs(now),
        };
        let one = restarts_all.and_then(|at| view.containers.get_mut(at));
        if let Some(one) = one.filter(|one| one.role != Role::Ephemeral) {
            one.restart = RestartRule::All;
        }
        view
    }
}

fn find(view: &View, id: SlotId) -> &Container {
    let mut containers = view.containers.iter();
    containers.find(|one| one.id == id).expect("a known id")
}

/// What must be true of everything in front of `started` in the startup sequence.
fn its_gate_is_open(view: &View, started: &Container) -> bool {
    let mut before = view.startup_sequence().filter(|one| match started.role {
        Role::Init | Role::Sidecar => one.id < started.id,
        Role::Main => true,
        Role::Ephemeral => false,
    });
    before.all(|one| match one.role {
        Role::Init => one.succeeded(),
        Role::Sidecar => one.health.started || view.started_after(one),
        Role::Main | Role::Ephemeral => false,
    })
}

/// A program that runs and was not sent TERM yet. A hook that was begun ends with TERM, too.
fn is_untold(container: &Container) -> bool {
    let runs = container.stop == StopStage::NotStopped && container.phase == Phase::Running;
    runs || container.stop == StopStage::PreStop
}

fn is_to_be_killed(view: &View, container: &Container) -> bool {
    // TERM, or what came of it, gives it a moment more.
    let spared = is_untold(container) || view.now < container.spared_until;
    !spared && end(view, container).is_some_and(|end| view.now >= end)
}

/// A main container behind one that is being started, or whose postStart hook has not ended.
fn waits_for_its_turn(view: &View, plan: &Plan, container: &Container) -> bool {
    let mut before = view.of_role(Role::Main).filter(|one| one.id < container.id);
    container.role == Role::Main
        && before.any(|one| {
            let ended = matches!(
                one.phase,
                Phase::Exited { .. } | Phase::Unconfigured { .. } | Phase::Again { .. }
            );
            let hook = one.post_start_pending && !ended;
            let starts = plan.actions.contains(&Action::Start(one.id));
            hook || starts || one.phase == Phase::Starting
        })
}

/// A sidecar or main container that has ended and that its rule restarts, in a pod that goes on.
fn is_to_be_restarted(view: &View, plan: &Plan, container: &Container) -> bool {
    let Phase::Exited {
        code,
        unhealthy,
        restart_at,
    } = container.phase
    else {
        return false;
    };
    let wanted = match container.restart {
        RestartRule::Always | RestartRule::All => true,
        RestartRule::OnFailure => code != 0 || unhealthy,
        RestartRule::Never => false,
    };
    let turn = match container.role {
        Role::Sidecar => true,
        Role::Main => !waits_for_its_turn(view, plan, container),
        Role::Init | Role::Ephemeral => false,
    };
    let goes_on = view.values && view.kill_at.is_none() && !view.completed();
    let goes_on = goes_on && !view.starts_over();
    let due = view.now >= restart_at;
    wanted && turn && due && goes_on && its_gate_is_open(view, container)
}

/// When a container that lives must end at the latest, if it must.
fn end(view: &View, container: &Container) -> Option<Time> {
    let own = match container.health.live {
        Liveness::Live => None,
        // The stop that is due comes first.
        Liveness::Failed { .. } if view.completed() && view.kill_at.is_none() => None,
        // Those that go on while all others begin anew have no probes.
        Liveness::Failed { .. } if view.starts_over() && container.role == Role::Ephemeral => None,
        Liveness::Failed { kill_at } => Some(kill_at),
    };
    let end = [view.kill_at, own].into_iter().flatten().min();
    end.filter(|_| container.lives())
}

proptest! {
    #[test]
    fn rules_that_hold_always(view in any_view()) {
        let plan = decide(&view);
        let mut touched = BTreeSet::new();
        for action in &plan.actions {
            let (Action::Start(id) | Action::PreStop(id) | Action::Term(id) | Action::Kill(id)) = *action;
            let container = find(&view, id);
            prop_assert!(touched.insert(id), "two actions for one container");
            let stage = match action {
                Action::Start(_) => {
                    prop_assert!(!container.lives(), "started twice");
                    prop_assert!(view.values && view.kill_at.is_none());
                    prop_assert!(its_gate_is_open(&view, container), "too early");
                    prop_assert!(!waits_for_its_turn(&view, &plan, container), "before its turn");
                    if container.role == Role::Ephemeral {
                        let never_began = !matches!(container.phase, Phase::Exited { .. });
                        prop_assert!(never_began, "restarted");
                    }
                    continue;
                }
                Action::PreStop(_) => StopStage::PreStop,
                Action::Term(_) => StopStage::Term,
                Action::Kill(_) => StopStage::Kill,
            };
            let failed = container.health.live != Liveness::Live;
            let ends = view.kill_at.is_some() || failed || view.starts_over();
            prop_assert!(container.lives() && ends);
            prop_assert!(stage > container.stop, "a stop goes one way");
            if view.starts_over() {
                prop_assert!(stage == StopStage::Kill && container.role != Role::Ephemeral);
                continue;
            }
            // At the end of the grace period TERM comes, whoever else still runs.
            let ends = [view.kill_at, match container.health.live {
                Liveness::Live => None,
                Liveness::Failed { kill_at } => Some(kill_at),
            }];
            let spared = is_untold(container) || view.now < container.spared_until;
            let late = spared
                && ends.into_iter().flatten().any(|end| view.now >= end);
            if stage < StopStage::Kill && !failed && !late {
                prop_assert!(!view.is_needed_by_others(container), "stopped before its turn");
            }
            if stage == StopStage::Term && container.phase == Phase::Running && !late {
                prop_assert!(!container.pre_stop_pending, "the hook has not ended");
            }
        }
        for container in &view.containers {
            let killed = container.stop == StopStage::Kill || plan.actions.contains(&Action::Kill(container.id));
            prop_assert!(killed || !is_to_be_killed(&view, container), "outlives its grace period");
            let restarted = plan.actions.contains(&Action::Start(container.id));
            prop_assert!(restarted || !is_to_be_restarted(&view, &plan, container), "stays down");
            let Some(end) = end(&view, container).filter(|_| !killed) else { continue };
            // Something happens to it in time, even if nothing else does.
            let told = is_untold(container) && view.now >= end;
            prop_assert!(!told || plan.actions.contains(&Action::Term(container.id)), "nobody tells it");
            let latest = if told { view.now + AFTER_TERM } else { end.max(container.spared_until) };
            prop_assert!(plan.wake.is_some_and(|at| at <= latest), "nobody wakes to kill it");
        }
        let lives = view.containers.iter().any(Container::lives);
        match plan.progress {
            Progress::Finished => prop_assert!(plan.actions.is_empty() && !lives),
            Progress::StartsOver => {
                let mut others = view.living().filter(|one| one.role != Role::Ephemeral);
                prop_assert!(view.starts_over() && others.next().is_none());
            }
            Progress::Completed => {
                prop_assert!(plan.actions.is_empty() && lives && view.kill_at.is_none());
            }
            // Otherwise the pod would hang: a container lives, or values are missing.
            Progress::Running => prop_assert!(
                !plan.actions.is_empty() || plan.wake.is_some() || lives || !view.values
            ),
        }
        prop_assert!(plan.wake.is_none_or(|at| at > view.now), "wakes in the past spin");
    }

    #[test]
    fn ephemeral_containers_change_nothing_for_the_others(view in any_view()) {
        let mut without = view.clone();
        without.containers.retain(|one| one.role != Role::Ephemeral);
        let others = |plan: Plan| {
            let mut actions = plan.actions;
            actions.retain(|action| {
                let (Action::Start(id) | Action::PreStop(id) | Action::Term(id) | Action::Kill(id)) = *action;
                find(&view, id).role != Role::Ephemeral
            });
            actions
        };
        prop_assert_eq!(view.succeeded(), without.succeeded());
        prop_assert_eq!(view.completed(), without.completed());
        prop_assert_eq!(others(decide(&view)), others(decide(&without)));
    }
}

/// One pod as the supervisor would run it: performs what the plan says, at once.
struct Simulation {
    view: View,
    /// What was started, in order; a restart counts again.
    started: Vec<SlotId>,
    /// The containers that were sent TERM or KILL, in the order of the first signal.
    stopped: Vec<SlotId>,
    /// Which containers have a preStop hook.
    hooks: [bool; 8],
}

impl Simulation {
    fn new(policy: RestartPolicy, roles: &[Role]) -> Self {
        let roles: Vec<_> = roles.iter().map(|role| (*role, Phase::Idle)).collect();
        Self {
            view: pod(policy, &roles),
            started: Vec::new(),
            stopped: Vec::new(),
            hooks: [false; 8],
        }
    }

    fn add(&mut self, role: Role) {
        let index = self.view.containers.len();
        let added = container(index, role, NEVER, Phase::Idle);
        self.view.containers.push(added);
    }

    /// Decides and performs until there is nothing to do.
    fn settle(&mut self) -> Progress {
        loop {
            let plan = decide(&self.view);
            if plan.progress == Progress::Completed {
                self.view.kill_at = Some(self.view.now + Time::from_secs(30));
                continue;
            }
            let starts_over = plan.progress == Progress::StartsOver;
            if plan.actions.is_empty() && !starts_over {
                return plan.progress;
            }
            for action in plan.actions {
                self.perform(action);
            }
            if starts_over {
                self.start_over();
            }
        }
    }

    /// As the supervisor does, but without a back-off.
    fn start_over(&mut self) {
        let containers = self.view.containers.iter_mut();
        for container in containers.filter(|one| one.role != Role::Ephemeral) {
            container.phase = Phase::Again {
                restart_at: self.view.now,
            };
            container.restart = RestartRule::Never;
        }
    }

    /// Everything starts as soon as it can, and init containers succeed.
    fn come_up(&mut self) {
        for _ in 0..40 {
            self.settle();
            for number in 0..self.view.containers.len() {
                let Some(one) = self.view.containers.get(number) else {
                    continue;
                };
                if one.role == Role::Init || !one.health.started {
                    self.happens(number, 0);
                }
            }
        }
    }

    fn perform(&mut self, action: Action) {
        let (Action::Start(id) | Action::PreStop(id) | Action::Term(id) | Action::Kill(id)) =
            action;
        let mut containers = self.view.containers.iter_mut().zip(self.hooks);
        let (container, hook) = containers
            .find(|(one, _)| one.id == id)
            .expect("a known id");
        let stage = match action {
            Action::Start(_) => {
                self.started.push(id);
                container.phase = Phase::Starting;
                container.stop = StopStage::NotStopped;
                container.pre_stop_pending = hook;
                container.spared_until = Time::ZERO;
                return;
            }
            Action::PreStop(_) => StopStage::PreStop,
            Action::Term(_) => StopStage::Term,
            Action::Kill(_) => StopStage::Kill,
        };
        if stage == StopStage::Term {
            container.spared_until = self.view.now + AFTER_TERM;
        }
        container.stop = stage;
        if stage > StopStage::PreStop && !self.stopped.contains(&id) {
            self.stopped.push(id);
        }
    }

    /// Something happens to the container of this number: its program runs, has started, or ends, or its preStop hook ends.
    fn happens(&mut self, number: usize, code: i32) {
        let count = self.view.containers.len();
        let now = self.view.now;
        let Some(container) = self.view.containers.get_mut(number % count) else {
            return;
        };
        match container.phase {
            Phase::Starting => container.phase = Phase::Running,
            Phase::Running
                if container.stop == StopStage::PreStop
                    && container.pre_stop_pending
                    && code == 0 =>
            {
                container.pre_stop_pending = false;
            }
            Phase::Running if !container.health.started && container.stop < StopStage::Term => {
                container.health = Health::unprobed();
            }
            Phase::Running => {
                container.health = Health::down();
                container.phase = Phase::Exited {
                    code,
                    unhealthy: false,
                    restart_at: now + Time::from_secs(1),
                };
            }
            Phase::Idle
            | Phase::Unconfigured { .. }
            | Phase::Again { .. }
            | Phase::Exited { .. } => {}
        }
        self.view.now += Time::from_secs(1);
    }

    fn role(&self, id: SlotId) -> Role {
        find(&self.view, id).role
    }
}

proptest! {
    #[test]
    fn every_history_starts_in_order_stops_in_reverse_and_ends(
        roles in any_roles(),
        policy in any_policy(),
        events in proptest::collection::vec((0_usize..8, 0..2), 0..60),
        add_at in 0_usize..60,
        stop_at in 0_usize..60,
        hooks in any::<[bool; 8]>(),
    ) {
        let mut pod = Simulation::new(policy, &roles);
        pod.hooks = hooks;
        for (at, (number, code)) in events.into_iter().enumerate() {
            pod.settle();
            pod.happens(number, code);
            if at == add_at {
                pod.add(Role::Ephemeral);
            }
            if at == stop_at && pod.view.kill_at.is_none() {
                pod.view.kill_at = Some(pod.view.now + Time::from_secs(30));
            }
        }
        let stopped = pod.view.kill_at.get_or_insert(pod.view.now + Time::from_secs(30));
        pod.view.now = pod.view.now.max(*stopped);
        pod.settle();
        pod.view.now += AFTER_TERM;
        pod.settle();
        let killed = |one: &Container| one.stop == StopStage::Kill;
        prop_assert!(pod.view.living().all(killed), "outlives its grace period");
        // So all end.
        for _ in 0..4 {
            pod.settle();
            for number in 0..pod.view.containers.len() {
                pod.happens(number, 137);
            }
        }
        prop_assert_eq!(pod.settle(), Progress::Finished);

        let mut first: Vec<SlotId> = Vec::new();
        for id in &pod.started {
            if !first.contains(id) {
                first.push(*id);
            }
        }
        let ephemeral = |id: &&SlotId| pod.role(**id) == Role::Ephemeral;
        let deciding: Vec<_> = first.iter().filter(|id| !ephemeral(id)).collect();
        prop_assert!(deciding.is_sorted(), "out of order: {deciding:?}");
        let starts_of = |id: &SlotId| pod.started.iter().filter(|one| *one == id).count();
        prop_assert!(first.iter().filter(ephemeral).all(|id| starts_of(id) == 1));
    }

    #[test]
    fn all_containers_are_killed_and_begin_anew_in_order(
        startup in proptest::collection::vec(any_startup_role(), 0..4),
        main in 1_usize..3,
        which in 0_usize..8,
        debugged in any::<bool>(),
    ) {
        let roles: Vec<_> = startup.into_iter().chain(std::iter::repeat_n(Role::Main, main)).collect();
        let mut pod = Simulation::new(NEVER, &roles);
        if debugged {
            pod.add(Role::Ephemeral);
        }
        pod.come_up();
        let in_order: Vec<_> = (0..roles.len()).map(SlotId::after).collect();
        let started = |pod: &Simulation| {
            let all = pod.started.iter().copied();
            all.filter(|id| pod.role(*id) != Role::Ephemeral).collect::<Vec<_>>()
        };
        prop_assert_eq!(started(&pod), in_order.clone());
        let number = which % roles.len();
        pod.view.containers[number].phase = super::exited(42);
        pod.view.containers[number].health = Health::down();
        pod.view.containers[number].restart = RestartRule::All;
        let living: Vec<_> = pod.view.living().filter(|one| one.role != Role::Ephemeral).copied().collect();
        let progress = pod.settle();
        prop_assert_eq!(progress, Progress::Running);
        if !living.is_empty() {
            prop_assert_eq!(started(&pod), in_order.clone(), "one starts while others live");
            for one in &living {
                prop_assert_eq!(find(&pod.view, one.id).stop, StopStage::Kill);
            }
        }
        for number in 0..roles.len() {
            if pod.view.containers[number].lives() && pod.view.containers[number].stop == StopStage::Kill {
                pod.happens(number, 137);
            }
        }
        pod.come_up();
        let twice: Vec<_> = in_order.iter().chain(&in_order).copied().collect();
        prop_assert_eq!(started(&pod), twice);
        let debug = pod.view.of_role(Role::Ephemeral).all(|one| one.phase == Phase::Running && one.stop == StopStage::NotStopped);
        prop_assert!(debug, "an ephemeral container goes on");
    }

    #[test]
    fn sidecars_outlive_the_main_containers(
        startup in proptest::collection::vec(any_startup_role(), 1..4),
        main in 1_usize..3,
    ) {
        let roles: Vec<_> = startup.into_iter().chain(std::iter::repeat_n(Role::Main, main)).collect();
        let mut pod = Simulation::new(NEVER, &roles);
        // Everything succeeds as soon as it can; sidecars end only when they are told to.
        for _ in 0..40 {
            pod.settle();
            for number in 0..roles.len() {
                let Some(one) = pod.view.containers.get(number) else { continue };
                let runs_on = one.role == Role::Sidecar && one.health.started && one.stop < StopStage::Term;
                if !runs_on {
                    pod.happens(number, 0);
                }
            }
            // The steps of the simulation do not take the grace period.
            pod.view.now = Time::from_secs(5);
        }
        prop_assert_eq!(pod.settle(), Progress::Finished);
        prop_assert!(pod.view.succeeded());
        let sidecars: Vec<_> = pod.view.of_role(Role::Sidecar).map(|one| one.id).collect();
        pod.stopped.reverse();
        prop_assert_eq!(pod.stopped, sidecars);
    }
}
