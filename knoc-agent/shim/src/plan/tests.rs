//! The rules of the plan by example.

mod properties;

use knoc_proto::pb::RestartPolicy;

use super::*;

const NEVER: RestartPolicy = RestartPolicy::Never;

fn container(index: usize, role: Role, policy: RestartPolicy, phase: Phase) -> Container {
    Container {
        id: SlotId::after(index),
        role,
        restart: RestartRule::of(role, policy),
        phase,
        health: if phase == Phase::Running {
            Health::unprobed()
        } else {
            Health::down()
        },
        stop: StopStage::NotStopped,
        pre_stop_pending: false,
        post_start_pending: false,
        spared_until: Time::ZERO,
    }
}

fn exited(code: i32) -> Phase {
    Phase::Exited {
        code,
        unhealthy: false,
        restart_at: Time::ZERO,
    }
}

fn id(index: usize) -> SlotId {
    SlotId::after(index)
}

fn pod(policy: RestartPolicy, containers: &[(Role, Phase)]) -> View {
    let containers = containers.iter().enumerate();
    View {
        containers: containers
            .map(|(index, (role, phase))| container(index, *role, policy, *phase))
            .collect(),
        values: true,
        kill_at: None,
        last: None,
        now: Time::from_secs(5),
    }
}

fn view(init: &[Phase], main: &[Phase]) -> View {
    with_policy(NEVER, init, main)
}

fn with_policy(policy: RestartPolicy, init: &[Phase], main: &[Phase]) -> View {
    let init = init.iter().map(|phase| (Role::Init, *phase));
    let main = main.iter().map(|phase| (Role::Main, *phase));
    pod(policy, &init.chain(main).collect::<Vec<_>>())
}

fn finished() -> Plan {
    Plan {
        progress: Progress::Finished,
        ..Plan::default()
    }
}

#[test]
fn containers_start_one_by_one_in_the_order_of_the_pod() {
    let idle = [Phase::Idle, Phase::Idle];
    assert_eq!(decide(&view(&idle, &idle)).actions, [Action::Start(id(0))]);
    assert_eq!(
        decide(&view(&[Phase::Running, Phase::Idle], &idle)).actions,
        []
    );
    assert_eq!(
        decide(&view(&[exited(0), Phase::Idle], &idle)).actions,
        [Action::Start(id(1))]
    );
    let done = [exited(0), exited(0)];
    assert_eq!(decide(&view(&done, &idle)).actions, [Action::Start(id(2))]);
    let starting = [Phase::Starting, Phase::Idle];
    assert_eq!(decide(&view(&done, &starting)).actions, []);
    // Its program runs, or could not be started.
    for first in [Phase::Running, exited(0), exited(128)] {
        let next = decide(&view(&done, &[first, Phase::Idle])).actions;
        assert_eq!(next, [Action::Start(id(3))], "{first:?}");
    }
}

#[test]
fn a_container_that_waits_for_its_back_off_holds_up_no_other() {
    let failed = Phase::Exited {
        code: 128,
        unhealthy: false,
        restart_at: Time::from_secs(9),
    };
    let mut view = with_policy(RestartPolicy::Always, &[], &[failed, Phase::Idle]);
    assert_eq!(decide(&view).actions, [Action::Start(id(1))]);
    // Once it is over, its turn is before those behind it.
    view.now = Time::from_secs(9);
    assert_eq!(decide(&view).actions, [Action::Start(id(0))]);
}

#[test]
fn a_container_that_cannot_be_configured_is_tried_again_whatever_its_policy_and_holds_up_no_other()
{
    let lacks = Phase::Unconfigured {
        retry_at: Time::from_secs(9),
    };
    let mut view = view(&[], &[lacks, Phase::Idle]);
    // A postStart hook holds up others only behind a program.
    view.containers[0].post_start_pending = true;
    let plan = decide(&view);
    assert_eq!(plan.actions, [Action::Start(id(1))]);
    view.containers[1].phase = exited(0);
    let waits = Plan {
        wake: Some(Time::from_secs(9)),
        ..Plan::default()
    };
    assert_eq!(decide(&view), waits, "the pod is not over");
    view.now = Time::from_secs(9);
    assert_eq!(decide(&view).actions, [Action::Start(id(0))]);
    // Nothing of it has to be stopped.
    view.kill_at = Some(Time::from_secs(30));
    assert_eq!(decide(&view), finished());
    // The next one of the startup sequence waits for it.
    let init = pod(NEVER, &[(Role::Init, lacks), (Role::Main, Phase::Idle)]);
    assert_eq!(decide(&init), waits);
    let debug = pod(
        NEVER,
        &[(Role::Main, Phase::Running), (Role::Ephemeral, lacks)],
    );
    assert_eq!(decide(&debug), waits);
}

#[test]
fn a_failed_init_container_ends_the_pod_or_is_tried_again() {
    assert_eq!(decide(&view(&[exited(3)], &[Phase::Idle])), finished());
    for policy in [RestartPolicy::Always, RestartPolicy::OnFailure] {
        let view = with_policy(policy, &[exited(3)], &[Phase::Idle]);
        assert_eq!(decide(&view).actions, [Action::Start(id(0))]);
    }
}

#[test]
fn back_off_is_waited_for() {
    let failed = Phase::Exited {
        code: 1,
        unhealthy: false,
        restart_at: Time::from_secs(9),
    };
    let mut view = with_policy(RestartPolicy::OnFailure, &[], &[failed]);
    assert_eq!(
        decide(&view),
        Plan {
            wake: Some(Time::from_secs(9)),
            ..Plan::default()
        }
    );
    view.now = Time::from_secs(9);
    assert_eq!(decide(&view).actions, [Action::Start(id(0))]);
}

#[test]
fn without_values_nothing_starts_and_nothing_ends() {
    let mut view = view(&[], &[Phase::Idle]);
    view.values = false;
    assert_eq!(decide(&view), Plan::default());
}

#[test]
fn a_stop_sends_term_then_kill_then_ends() {
    let mut view = view(
        &[],
        &[Phase::Running, Phase::Starting, exited(0), Phase::Idle],
    );
    view.kill_at = Some(Time::from_secs(10));
    let plan = decide(&view);
    assert_eq!(plan.actions, [Action::Term(id(0)), Action::Term(id(1))]);
    assert_eq!(plan.wake, view.kill_at);
    view.containers[0].stop = StopStage::Term;
    view.now = Time::from_secs(10);
    let kills = [Action::Kill(id(0)), Action::Kill(id(1))];
    assert_eq!(decide(&view).actions, kills);
    view.containers[0].phase = exited(137);
    view.containers[1].phase = exited(137);
    assert_eq!(decide(&view), finished());
}

#[test]
fn term_waits_for_the_pre_stop_hook_until_the_grace_period_is_over() {
    let mut view = view(&[], &[Phase::Running]);
    view.kill_at = Some(Time::from_secs(10));
    view.containers[0].pre_stop_pending = true;
    assert_eq!(decide(&view).actions, [Action::PreStop(id(0))]);
    view.containers[0].stop = StopStage::PreStop;
    let waits = Plan {
        wake: view.kill_at,
        ..Plan::default()
    };
    assert_eq!(decide(&view), waits);
    let mut late = view.clone();
    late.now = Time::from_secs(10);
    let plan = decide(&late);
    assert_eq!(plan.actions, [Action::Term(id(0))]);
    assert_eq!(plan.wake, Some(Time::from_secs(12)), "a moment for TERM");
    late.containers[0].stop = StopStage::Term;
    late.containers[0].spared_until = Time::from_secs(12);
    late.now = Time::from_secs(11);
    let plan = decide(&late);
    assert_eq!(
        (plan.actions, plan.wake),
        (vec![], Some(Time::from_secs(12)))
    );
    late.now = Time::from_secs(12);
    assert_eq!(decide(&late).actions, [Action::Kill(id(0))]);
    view.containers[0].pre_stop_pending = false;
    assert_eq!(decide(&view).actions, [Action::Term(id(0))]);
    // A hook cannot run before the program runs.
    view.containers[0] = Container {
        phase: Phase::Starting,
        stop: StopStage::NotStopped,
        pre_stop_pending: true,
        ..view.containers[0]
    };
    assert_eq!(decide(&view).actions, [Action::Term(id(0))]);
}

#[test]
fn main_containers_wait_for_the_post_start_hook_of_those_before_them() {
    let mut view = view(&[], &[Phase::Idle, Phase::Idle]);
    view.containers[0].post_start_pending = true;
    assert_eq!(decide(&view).actions, [Action::Start(id(0))]);
    for phase in [Phase::Starting, Phase::Running] {
        view.containers[0].phase = phase;
        assert_eq!(decide(&view).actions, [], "{phase:?}");
    }
    // It ended without it, or the hook has.
    view.containers[0].phase = exited(1);
    assert_eq!(decide(&view).actions, [Action::Start(id(1))]);
    view.containers[0].phase = Phase::Running;
    view.containers[0].post_start_pending = false;
    assert_eq!(decide(&view).actions, [Action::Start(id(1))]);
}

#[test]
fn a_sidecar_opens_its_gate_when_it_has_started_and_not_when_it_runs() {
    let idle = (Role::Init, Phase::Idle);
    let main = (Role::Main, Phase::Idle);
    let mut view = pod(NEVER, &[(Role::Sidecar, Phase::Running), idle, main]);
    view.containers[0].health = Health::down();
    assert_eq!(decide(&view), Plan::default());
    view.containers[0].health.started = true;
    assert_eq!(decide(&view).actions, [Action::Start(id(1))]);
    // Once a container behind its gate was started, its failure closes no gate.
    let mut view = pod(
        NEVER,
        &[
            (Role::Sidecar, exited(1)),
            (Role::Init, exited(0)),
            (Role::Sidecar, Phase::Running),
            main,
        ],
    );
    let starts = [Action::Start(id(0)), Action::Start(id(3))];
    assert_eq!(decide(&view).actions, starts);
    view.containers[1].phase = Phase::Running;
    assert_eq!(decide(&view).actions, [Action::Start(id(0))]);
}

#[test]
fn a_sidecar_is_restarted_whatever_the_policy_and_does_not_hold_up_the_end() {
    let sidecar = |phase| (Role::Sidecar, phase);
    let main = |phase| (Role::Main, phase);
    let runs = pod(NEVER, &[sidecar(exited(0)), main(Phase::Running)]);
    assert_eq!(decide(&runs).actions, [Action::Start(id(0))]);
    let over = pod(NEVER, &[sidecar(Phase::Running), main(exited(0))]);
    assert_eq!(decide(&over).progress, Progress::Completed);
    assert_eq!(decide(&over).actions, []);
    let over = pod(NEVER, &[sidecar(exited(1)), main(exited(0))]);
    assert_eq!(decide(&over), finished());
    assert!(over.succeeded());
}

#[test]
fn sidecars_are_stopped_after_the_main_containers_in_reverse_order() {
    let sidecar = (Role::Sidecar, Phase::Running);
    let main = (Role::Main, Phase::Running);
    let mut view = pod(NEVER, &[sidecar, sidecar, main]);
    view.kill_at = Some(Time::from_secs(10));
    for last in [2, 1, 0] {
        assert_eq!(decide(&view).actions, [Action::Term(id(last))]);
        view.containers[last].stop = StopStage::Term;
        assert_eq!(decide(&view).actions, [], "the others wait");
        view.containers[last].phase = exited(143);
    }
    assert_eq!(decide(&view), finished());
}

#[test]
fn a_program_is_told_before_it_is_killed_however_late() {
    let sidecar = (Role::Sidecar, Phase::Running);
    let main = (Role::Main, Phase::Running);
    let mut view = pod(NEVER, &[sidecar, main]);
    view.kill_at = Some(Time::from_secs(10));
    view.containers[1].stop = StopStage::Term;
    view.now = Time::from_secs(10);
    let plan = decide(&view);
    assert_eq!(plan.actions, [Action::Term(id(0)), Action::Kill(id(1))]);
    assert_eq!(plan.wake, Some(Time::from_secs(12)), "a moment for TERM");
    // Without a grace period, too.
    let mut forced = pod(NEVER, &[main]);
    forced.kill_at = Some(forced.now);
    assert_eq!(decide(&forced).actions, [Action::Term(id(0))]);
}

/// Some sites give the programs of a job less time than that (`KillWait`), and then nobody would write the report.
#[test]
fn no_program_is_spared_beyond_the_end_of_the_job() {
    let main = (Role::Main, Phase::Running);
    let mut view = pod(NEVER, &[main, main]);
    let soon = view.now + Time::from_secs(1);
    (view.kill_at, view.last) = (Some(view.now), Some(soon));
    view.containers[1].stop = StopStage::Term;
    view.containers[1].spared_until = view.now + AFTER_TERM;
    let plan = decide(&view);
    assert_eq!(plan.actions, [Action::Term(id(0))]);
    assert_eq!(plan.wake, Some(soon));
    view.now = soon;
    let plan = decide(&view);
    assert_eq!(plan.actions, [Action::Kill(id(0)), Action::Kill(id(1))]);
}

#[test]
fn an_ephemeral_container_starts_at_once_runs_once_and_decides_nothing() {
    let ephemeral = |phase| (Role::Ephemeral, phase);
    let always = RestartPolicy::Always;
    let init = (Role::Init, Phase::Running);
    let added = pod(
        always,
        &[init, (Role::Main, Phase::Idle), ephemeral(Phase::Idle)],
    );
    assert_eq!(decide(&added).actions, [Action::Start(id(2))]);
    let ended = pod(
        always,
        &[(Role::Main, Phase::Running), ephemeral(exited(1))],
    );
    assert_eq!(decide(&ended), Plan::default());
    let mut alone = pod(NEVER, &[(Role::Main, exited(0)), ephemeral(Phase::Running)]);
    assert!(alone.succeeded());
    assert_eq!(decide(&alone).progress, Progress::Completed);
    alone.kill_at = Some(Time::from_secs(10));
    assert_eq!(decide(&alone).actions, [Action::Term(id(1))]);
}

#[test]
fn a_container_that_is_not_live_is_stopped_alone_and_then_restarted_by_its_rule() {
    let main = (Role::Main, Phase::Running);
    let mut view = pod(RestartPolicy::OnFailure, &[main, main]);
    let kill_at = Time::from_secs(8);
    view.containers[1].health.live = Liveness::Failed { kill_at };
    let plan = decide(&view);
    assert_eq!(
        (plan.actions, plan.wake),
        (vec![Action::Term(id(1))], Some(kill_at))
    );
    view.containers[1].stop = StopStage::Term;
    view.now = kill_at;
    assert_eq!(decide(&view).actions, [Action::Kill(id(1))]);
    view.containers[1].health = Health::down();
    view.containers[1].phase = exited(137);
    assert_eq!(decide(&view).actions, [Action::Start(id(1))]);
}

#[test]
fn a_container_that_a_probe_stopped_is_restarted_even_if_its_program_ended_well() {
    let unhealthy = Phase::Exited {
        code: 0,
        unhealthy: true,
        restart_at: Time::ZERO,
    };
    for (policy, restarts) in [
        (RestartPolicy::Always, true),
        (RestartPolicy::OnFailure, true),
        (NEVER, false),
    ] {
        let plan = decide(&with_policy(policy, &[], &[unhealthy]));
        let starts = plan.actions == [Action::Start(id(0))];
        assert_eq!(starts, restarts, "{policy:?}");
        assert_eq!(plan.progress == Progress::Finished, !restarts, "{policy:?}");
    }
    // One that ended well by itself is done.
    let done = with_policy(RestartPolicy::OnFailure, &[], &[exited(0)]);
    assert_eq!(decide(&done), finished());
}

#[test]
fn an_exit_code_may_have_all_containers_begin_anew_at_once() {
    let roles = [
        (Role::Init, exited(0)),
        (Role::Sidecar, Phase::Running),
        (Role::Main, exited(42)),
        (Role::Main, Phase::Running),
        (Role::Ephemeral, Phase::Running),
    ];
    let mut view = pod(NEVER, &roles);
    view.containers[2].restart = RestartRule::All;
    view.containers[3].pre_stop_pending = true;
    let plan = decide(&view);
    // Without a hook, without a grace period, and whoever needs whom.
    assert_eq!(plan.actions, [Action::Kill(id(1)), Action::Kill(id(3))]);
    assert_eq!(plan.progress, Progress::Running);
    for at in [1, 3] {
        view.containers[at].stop = StopStage::Kill;
    }
    assert_eq!(decide(&view), Plan::default(), "they have not ended yet");
    for at in [1, 3] {
        view.containers[at].phase = exited(137);
    }
    let plan = decide(&view);
    assert_eq!(
        (plan.actions, plan.progress),
        (vec![], Progress::StartsOver)
    );
    for at in 0..4 {
        view.containers[at].phase = Phase::Again {
            restart_at: Time::ZERO,
        };
    }
    assert_eq!(decide(&view).actions, [Action::Start(id(0))]);
    // A stop, and the end of the pod, come first.
    let mut over = pod(
        NEVER,
        &[(Role::Sidecar, exited(42)), (Role::Main, exited(0))],
    );
    over.containers[0].restart = RestartRule::All;
    assert_eq!(decide(&over), finished());
    let mut stopped = pod(NEVER, &roles);
    stopped.containers[2].restart = RestartRule::All;
    stopped.kill_at = Some(Time::from_secs(10));
    assert_eq!(decide(&stopped).actions.first(), Some(&Action::Term(id(3))));
}

#[test]
fn the_back_off_grows_and_is_forgotten() {
    let seconds = Duration::from_secs;
    let mut backoff = Backoff::new(seconds(10), seconds(300));
    let waits: Vec<u64> = (0..8)
        .map(|_| backoff.after(seconds(1)).as_secs())
        .collect();
    assert_eq!(waits, [0, 10, 20, 40, 80, 160, 300, 300]);
    assert_eq!(backoff.after(seconds(601)), Duration::ZERO);
    assert_eq!(backoff.after(seconds(1)), seconds(10));
}
