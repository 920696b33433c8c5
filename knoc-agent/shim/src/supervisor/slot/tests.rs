use std::time::Duration;

use super::{super::super::role::SlotId, *};

fn ephemeral() -> Slot {
    let spec = ContainerSpec {
        id: SlotId::after(0),
        role: Role::Ephemeral,
        restart: RestartRule::Never,
        container: pb::Container::default(),
        image: pb::ResolvedImage::default(),
    };
    Slot::new(spec, Backoff::new(Duration::ZERO, Duration::ZERO), None)
}

fn main(restart: RestartRule, image: &str) -> Slot {
    of_role(Role::Main, restart, image)
}

fn of_role(role: Role, restart: RestartRule, image: &str) -> Slot {
    let spec = ContainerSpec {
        id: SlotId::after(0),
        role,
        restart,
        container: pb::Container {
            image: image.to_owned(),
            ..pb::Container::default()
        },
        image: pb::ResolvedImage::default(),
    };
    let second = Duration::from_secs(1);
    Slot::new(spec, Backoff::new(second, second * 300), None)
}

fn image(name: &str) -> pb::ResolvedImage {
    pb::ResolvedImage {
        image: name.to_owned(),
        ..pb::ResolvedImage::default()
    }
}

fn failed() -> Ended {
    Ended {
        exit: crate::children::Exit { code: 1, signal: 0 },
        reason: "Error",
        message: String::new(),
        finished_at: Timestamp::UNIX_EPOCH,
        losses: knoc_contract::logs::writer::Losses::default(),
        used: Counters::default(),
        unconfigured: false,
        lost: None,
    }
}

#[test]
fn a_container_that_runs_is_restarted_with_its_new_image_whatever_its_policy() {
    let mut slot = main(RestartRule::Never, "a");
    drop(slot.begin());
    slot.phase = Phase::Running;
    slot.health = Health::unprobed();
    let kill_at = Duration::from_secs(30);
    assert!(slot.renew(image("b"), kill_at));
    assert!(
        !slot.renew(image("c"), kill_at * 2),
        "it is stopped already"
    );
    assert_eq!(slot.view().health.live, Liveness::Failed { kill_at });
    let ran = |slot: &Slot| slot.history.image.clone().unwrap_or_default().image;
    assert_eq!(ran(&slot), "a");
    slot.end(&failed(), String::new(), Duration::from_secs(5));
    assert_eq!(slot.view().restart, RestartRule::Always);
    assert_eq!(slot.history.pause, Duration::ZERO);
    drop(slot.begin());
    assert_eq!((ran(&slot), slot.history.attempt), ("c".to_owned(), 1));
    assert_eq!(slot.view().health.live, Liveness::Live);
    slot.end(&failed(), String::new(), Duration::from_secs(9));
    assert_eq!(slot.view().restart, RestartRule::Never);
}

#[test]
fn between_two_attempts_the_previous_one_is_the_one_that_crashed() {
    let mut slot = main(RestartRule::Always, "a");
    let mut seen = Vec::new();
    for _ in 0..2 {
        drop(slot.begin());
        slot.phase = Phase::Running;
        seen.push(slot.entry().previous);
        slot.end(&failed(), String::new(), Duration::ZERO);
        seen.push(slot.entry().previous);
    }
    assert_eq!(seen, [None, Some(0), Some(0), Some(1)]);
    let mut slot = main(RestartRule::Never, "a");
    drop(slot.begin());
    slot.end(&failed(), String::new(), Duration::ZERO);
    assert_eq!(slot.entry().previous, None, "it has ended for good");
}

/// What a client measures as the pause between two attempts depends on it.
#[test]
fn whenever_somebody_looks_the_number_of_restarts_belongs_to_the_times_beside_it() {
    let mut slot = main(RestartRule::Always, "a");
    let pod = pb::PodSpec::default();
    let seen = |slot: &Slot, now| {
        let situation = report::Situation {
            phase: slot.phase,
            health: slot.health,
            history: &slot.history,
            restart: slot.restart(),
            target_missing: None,
            in_post_start: slot.in_post_start(),
        };
        let context = report::StatusContext {
            pod: &pod,
            initialized: true,
            stopping: false,
            starts_over: false,
            missing: None,
            now,
        };
        report::status(&slot.spec, situation, &context, String::new())
    };
    let began = |attempt: i64| Timestamp::from_second(1000 * (attempt + 1)).unwrap();
    let check = |status: &pb::ContainerStatus| {
        let number = i64::from(status.restart_count);
        let ended = status.last_termination.as_ref().map(|last| last.started_at);
        let expected = |attempt: i64| (attempt >= 0).then(|| report::nanos(began(attempt)));
        match &status.state {
            Some(State::Running(running)) => {
                assert_eq!(running.started_at, report::nanos(began(number)));
                assert_eq!(ended, expected(number - 1));
            }
            Some(State::Waiting(_)) if ended.is_none() => assert_eq!(number, 0),
            Some(State::Waiting(_)) => assert_eq!(ended, expected(number)),
            Some(State::Terminated(_)) | None => panic!("{status:?}"),
        }
    };
    check(&seen(&slot, Duration::ZERO));
    for attempt in 0..4 {
        drop(slot.begin());
        check(&seen(&slot, Duration::ZERO));
        slot.phase = Phase::Running;
        slot.history.started_at = Some(began(attempt));
        check(&seen(&slot, Duration::ZERO));
        slot.end(&failed(), String::new(), Duration::ZERO);
        // In the back-off, and after it.
        check(&seen(&slot, Duration::ZERO));
        check(&seen(&slot, Duration::from_hours(1)));
    }
}

#[test]
fn an_init_container_that_runs_goes_on() {
    let mut slot = of_role(Role::Init, RestartRule::OnFailure, "a");
    drop(slot.begin());
    slot.phase = Phase::Running;
    slot.health = Health::unprobed();
    assert!(!slot.renew(image("b"), Duration::from_secs(30)));
    assert_eq!(slot.view().health.live, Liveness::Live);
    slot.end(&failed(), String::new(), Duration::from_secs(5));
    drop(slot.begin());
    let ran = slot.history.image.clone().unwrap_or_default().image;
    assert_eq!(ran, "b", "the next attempt has it");
}

#[test]
fn a_program_is_stopped_by_the_signal_of_its_own_image() {
    let with_signal = |name: &str, signal: &str| pb::ResolvedImage {
        config: Some(pb::ImageConfig {
            stop_signal: signal.to_owned(),
            ..pb::ImageConfig::default()
        }),
        ..image(name)
    };
    let mut slot = main(RestartRule::Always, "a");
    slot.renew(with_signal("b", "SIGQUIT"), Duration::ZERO);
    drop(slot.begin());
    slot.phase = Phase::Running;
    slot.renew(with_signal("c", "SIGTERM"), Duration::from_secs(30));
    assert_eq!(slot.signal, Signal::QUIT);
    for (text, number) in [("SIGRTMIN+3", 37), ("64", 64), ("33", 15)] {
        let mut slot = main(RestartRule::Always, "a");
        slot.renew(with_signal("b", text), Duration::ZERO);
        drop(slot.begin());
        assert_eq!(slot.signal.as_raw(), number, "{text}");
    }
}

#[test]
fn a_new_image_ends_the_back_off_and_starts_nothing_that_has_ended_for_good() {
    let mut slot = main(RestartRule::Always, "a");
    for _ in 0..4 {
        drop(slot.begin());
        slot.end(&failed(), String::new(), Duration::ZERO);
    }
    assert_eq!(slot.history.pause, Duration::from_secs(4));
    assert!(!slot.renew(image("b"), Duration::ZERO));
    let at_once =
        matches!(slot.phase, Phase::Exited { restart_at, .. } if restart_at == Time::ZERO);
    assert!(at_once, "{:?}", slot.phase);
    for pause in [0, 1, 2] {
        drop(slot.begin());
        slot.end(&failed(), String::new(), Duration::ZERO);
        assert_eq!(slot.history.pause, Duration::from_secs(pause));
    }
    let mut slot = main(RestartRule::Never, "a");
    drop(slot.begin());
    slot.end(&failed(), String::new(), Duration::ZERO);
    slot.renew(image("b"), Duration::ZERO);
    assert_eq!(slot.view().restart, RestartRule::Never);
}

#[test]
fn a_start_that_failed_because_its_target_restarts_is_repeated() {
    let mut slot = ephemeral();
    let target = Identity::of(std::process::id()).unwrap();
    drop(slot.begin());
    slot.target = Some(target);
    assert!(!slot.has_lost_target(), "it failed for another reason");
    // Another process has the pid now.
    let ended = Identity {
        start: target.start + 1,
        ..target
    };
    slot.target = Some(ended);
    assert!(slot.has_lost_target());
    slot.take_back();
    assert_eq!(slot.view().phase, Phase::Idle);
    drop(slot.begin());
    assert_eq!(slot.history.attempt, 0);
    slot.target = Some(ended);
    slot.abort.cancel();
    assert!(!slot.has_lost_target(), "the pod ends");
}

#[test]
fn of_containers_that_all_begin_anew_only_the_one_that_caused_it_has_a_back_off() {
    let mut slots = [main(RestartRule::All, "a"), main(RestartRule::Never, "a")];
    for slot in &mut slots {
        for _ in 0..3 {
            drop(slot.begin());
            slot.end(&failed(), String::new(), Duration::ZERO);
        }
    }
    // One that matches by being killed did not cause it.
    let mut killed = main(RestartRule::All, "a");
    drop(killed.begin());
    killed.stop(StopStage::Kill, Duration::ZERO);
    killed.end(&failed(), String::new(), Duration::from_secs(7));
    let [mut cause, mut other] = slots;
    let mut idle = main(RestartRule::Never, "a");
    for slot in [&mut cause, &mut other, &mut killed, &mut idle] {
        slot.start_over();
    }
    let again = |seconds| Phase::Again {
        restart_at: Duration::from_secs(seconds),
    };
    let phases = [&cause, &other, &killed, &idle].map(|slot| slot.phase);
    assert_eq!(phases, [again(2), again(0), again(0), Phase::Idle]);
    // What crashed is what `logs --previous` shows until it starts again.
    assert_eq!(cause.entry().previous, Some(2));
    drop(other.begin());
    assert_eq!(other.history.attempt, 3);
    other.end(&failed(), String::new(), Duration::ZERO);
    assert_eq!(
        other.history.pause,
        Duration::ZERO,
        "its back-off begins anew"
    );
}

/// Both crash as soon as they run, and each crash has both begin anew. Without a pause that would go on for ever.
#[test]
fn containers_that_crash_in_turn_do_not_end_each_others_back_off() {
    let mut slots = [main(RestartRule::All, "a"), main(RestartRule::All, "a")];
    let mut pauses = Vec::new();
    for round in 0..12 {
        let [cause, other] = [round % 2, (round + 1) % 2];
        for slot in &mut slots {
            drop(slot.begin());
            slot.phase = Phase::Running;
        }
        slots[cause].end(&failed(), String::new(), Duration::ZERO);
        slots[other].stop(StopStage::Kill, Duration::ZERO);
        slots[other].end(&failed(), String::new(), Duration::ZERO);
        for slot in &mut slots {
            slot.start_over();
        }
        let at = slots.each_ref().map(|slot| {
            let Phase::Again { restart_at } = slot.phase else {
                panic!("{:?}", slot.phase)
            };
            restart_at.as_secs()
        });
        assert_eq!(at[other], 0, "it was killed");
        pauses.push(at[cause]);
    }
    assert_eq!(pauses, [0, 0, 1, 1, 2, 2, 4, 4, 8, 8, 16, 16]);
    // While the first one waits for its turn, the second one crashes.
    let [mut first, mut second] = [main(RestartRule::All, "a"), main(RestartRule::All, "a")];
    let waits = Phase::Again {
        restart_at: Duration::from_secs(40),
    };
    first.phase = waits;
    drop(second.begin());
    second.end(&failed(), String::new(), Duration::from_secs(30));
    for slot in [&mut first, &mut second] {
        slot.start_over();
    }
    assert_eq!(first.phase, waits);
}

/// A program that hangs is killed by its probe, and not because another one has ended.
#[test]
fn a_container_that_a_probe_has_killed_has_a_back_off_if_all_begin_anew_for_it() {
    let mut slot = main(RestartRule::All, "a");
    for pause in [0, 1, 2] {
        drop(slot.begin());
        slot.phase = Phase::Running;
        slot.unhealthy = true;
        slot.stop(StopStage::Kill, Duration::ZERO);
        slot.end(&failed(), String::new(), Duration::ZERO);
        slot.start_over();
        let restart_at = Duration::from_secs(pause);
        assert_eq!(slot.phase, Phase::Again { restart_at });
    }
}

#[test]
fn an_attempt_that_could_not_be_configured_does_not_count() {
    let mut slot = main(RestartRule::OnFailure, "a");
    let second = Duration::from_secs(1);
    drop(slot.begin());
    assert!(slot.hold("no file", second));
    let retry_at = second * 2;
    assert_eq!(slot.view().phase, Phase::Unconfigured { retry_at });
    assert_eq!(slot.entry().previous, None);
    drop(slot.begin());
    assert_eq!(slot.history.attempt, 0);
    assert!(!slot.hold("no file", second), "that is known");
    assert!(slot.hold("no key", second));

    drop(slot.begin());
    slot.end(&failed(), String::new(), second);
    assert_eq!((slot.history.attempt, &*slot.history.unconfigured), (0, ""));
    drop(slot.begin());
    slot.hold("no file", second);
    // The log of the attempt that ran stays the last one.
    let entry = slot.entry();
    assert_eq!(entry.log.map(|log| log.attempt), Some(0));
    assert_eq!(entry.previous, Some(0));
    drop(slot.begin());
    assert_eq!(slot.history.attempt, 1);
    assert_eq!(slot.entry().previous, Some(0));
}

#[test]
fn a_container_is_in_its_post_start_hook_until_that_has_succeeded() {
    let mut slot = main(RestartRule::Always, "a");
    drop(slot.begin());
    slot.phase = Phase::Running;
    assert!(!slot.in_post_start(), "it has no hook");
    slot.end(&failed(), String::new(), Duration::ZERO);
    Arc::make_mut(&mut slot.spec).container.post_start = Some(pb::Hook::default());
    for succeeded in [false, true] {
        drop(slot.begin());
        assert!(!slot.in_post_start(), "no program runs yet");
        slot.phase = Phase::Running;
        let tokens = slot.begin_probing();
        assert!(slot.in_post_start());
        let kill_at = Duration::from_secs(30);
        assert!(slot.post_started(succeeded, Liveness::Failed { kill_at }));
        assert_eq!(slot.in_post_start(), !succeeded);
        drop(tokens);
        slot.end(&failed(), String::new(), Duration::ZERO);
        assert!(!slot.in_post_start());
    }
}
