use tokio::task::JoinSet;

use super::{super::role::SlotId, *};

/// How long a test waits for a level, in paused time.
const SOON: Duration = Duration::from_hours(1);

fn job_dir() -> (tempfile::TempDir, JobDir) {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("u");
    std::fs::create_dir(&path).unwrap();
    let dir = JobDir::open(path).unwrap();
    (root, dir)
}

async fn written(dir: &JobDir) -> pb::Report {
    let looking = async {
        loop {
            if let Ok(Some(report)) = dir.report() {
                return report;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    let looked = tokio::time::timeout(SOON, looking).await;
    looked.unwrap_or_else(|_| panic!("no report was written"))
}

fn spec(role: Role) -> ContainerSpec {
    ContainerSpec {
        id: SlotId::after(0),
        role,
        restart: RestartRule::of(role, pb::RestartPolicy::Always),
        container: pb::Container {
            name: "main".to_owned(),
            ..Default::default()
        },
        image: pb::ResolvedImage::default(),
    }
}

#[test]
fn ready_and_started_are_what_the_probes_say_and_not_that_the_program_runs() {
    let pod = pb::PodSpec::default();
    let history = History::default();
    let context = StatusContext {
        pod: &pod,
        initialized: true,
        stopping: false,
        starts_over: false,
        missing: None,
        now: Duration::ZERO,
    };
    let shown = |role, phase, health| {
        let situation = Situation {
            phase,
            health,
            history: &history,
            restart: RestartRule::Always,
            target_missing: None,
            in_post_start: false,
        };
        let status = status(&spec(role), situation, &context, String::new());
        (status.started, status.ready)
    };
    let not_ready = Health {
        ready: false,
        ..Health::unprobed()
    };
    let succeeded = Phase::Exited {
        code: 0,
        unhealthy: false,
        restart_at: Duration::ZERO,
    };
    for role in [Role::Main, Role::Sidecar] {
        let shown = |phase, health| shown(role, phase, health);
        assert_eq!(shown(Phase::Running, Health::unprobed()), (true, true));
        assert_eq!(shown(Phase::Running, not_ready), (true, false));
        assert_eq!(shown(Phase::Running, Health::down()), (false, false));
        assert_eq!(shown(succeeded, Health::down()), (false, false));
    }
    // An init container is ready when it is done; nobody waits for an ephemeral one to be ready.
    let init = |phase, health| shown(Role::Init, phase, health);
    assert_eq!(init(Phase::Running, Health::unprobed()), (true, false));
    assert_eq!(init(succeeded, Health::down()), (false, true));
    let ephemeral = shown(Role::Ephemeral, Phase::Running, Health::unprobed());
    assert_eq!(ephemeral, (true, false));
}

#[test]
fn a_container_that_waits_says_so_as_a_kubelet_does() {
    let pod = pb::PodSpec {
        uid: "7d1".to_owned(),
        namespace: "lab".to_owned(),
        name: "web".to_owned(),
        ..Default::default()
    };
    let phase = Phase::Exited {
        code: 1,
        unhealthy: false,
        restart_at: Duration::from_secs(100),
    };
    let said = |pause, now| {
        let history = History {
            pause: Duration::from_secs(pause),
            ..History::default()
        };
        let situation = Situation {
            phase,
            health: Health::down(),
            history: &history,
            restart: RestartRule::Always,
            target_missing: None,
            in_post_start: false,
        };
        let context = StatusContext {
            pod: &pod,
            initialized: true,
            stopping: false,
            starts_over: false,
            missing: None,
            now: Duration::from_secs(now),
        };
        match state(&spec(Role::Main), situation, &context) {
            State::Waiting(waiting) => [waiting.reason, waiting.message],
            state @ (State::Running(_) | State::Terminated(_)) => panic!("{state:?}"),
        }
    };
    for (pause, shown) in [(20, "20s"), (80, "1m20s"), (300, "5m0s")] {
        let message = format!("back-off {shown} restarting failed container=main pod=web_lab(7d1)");
        assert_eq!(said(pause, 99), ["CrashLoopBackOff".to_owned(), message]);
    }
    assert_eq!(said(20, 100), ["ContainerCreating", ""]);
}

#[test]
fn containers_that_all_begin_anew_say_so_until_their_turn_comes() {
    let pod = pb::PodSpec::default();
    let ended = pb::Terminated {
        exit_code: 42,
        ..pb::Terminated::default()
    };
    let history = History {
        attempt: 1,
        ended: Some(ended.clone()),
        pause: Duration::from_secs(10),
        ..History::default()
    };
    let said = |role, phase, starts_over, stopping| {
        let situation = Situation {
            phase,
            health: Health::down(),
            history: &history,
            restart: RestartRule::Never,
            target_missing: None,
            in_post_start: false,
        };
        let context = StatusContext {
            pod: &pod,
            initialized: false,
            stopping,
            starts_over,
            missing: None,
            now: Duration::from_secs(5),
        };
        let status = status(&spec(role), situation, &context, String::new());
        assert_eq!(status.restart_count, 1, "{role:?}");
        match status.state {
            Some(State::Waiting(waiting)) => waiting.reason,
            Some(State::Terminated(ended)) => ended.exit_code.to_string(),
            Some(State::Running(_)) | None => panic!("{status:?}"),
        }
    };
    let exited = Phase::Exited {
        code: 42,
        unhealthy: false,
        restart_at: Duration::ZERO,
    };
    for role in [Role::Init, Role::Sidecar, Role::Main] {
        assert_eq!(said(role, exited, true, false), RESTARTING_ALL);
    }
    assert_eq!(said(Role::Ephemeral, exited, true, false), "42");
    let again = |seconds| Phase::Again {
        restart_at: Duration::from_secs(seconds),
    };
    assert_eq!(said(Role::Main, again(9), false, false), "PodInitializing");
    assert_eq!(said(Role::Init, again(9), false, false), "CrashLoopBackOff");
    assert_eq!(
        said(Role::Init, again(0), false, false),
        "ContainerCreating"
    );
    // Nothing begins any more.
    for role in [Role::Init, Role::Main] {
        assert_eq!(said(role, again(0), false, true), "42");
    }
}

/// A pod whose init containers have succeeded.
fn initialized(pod: &pb::PodSpec, stopping: bool) -> StatusContext<'_> {
    StatusContext {
        pod,
        initialized: true,
        stopping,
        starts_over: false,
        missing: None,
        now: Duration::ZERO,
    }
}

#[test]
fn a_container_that_cannot_be_configured_says_why_until_it_is_created() {
    let pod = pb::PodSpec::default();
    let shown = |phase, ended: Option<pb::Terminated>, stopping| {
        let history = History {
            attempt: 1,
            ended,
            unconfigured: "no file".to_owned(),
            ..History::default()
        };
        let situation = Situation {
            phase,
            health: Health::down(),
            history: &history,
            restart: RestartRule::Always,
            target_missing: None,
            in_post_start: false,
        };
        let context = initialized(&pod, stopping);
        status(&spec(Role::Main), situation, &context, "x://new".to_owned())
    };
    let lacks = Phase::Unconfigured {
        retry_at: Duration::ZERO,
    };
    let before = pb::Terminated {
        container_id: "x://old".to_owned(),
        ..pb::Terminated::default()
    };
    let first = shown(lacks, None, false);
    assert_eq!(first.state, Some(waiting(UNCONFIGURED, "no file")));
    assert_eq!((first.restart_count, &*first.container_id), (0, ""));
    // Each try in between changes nothing.
    assert_eq!(shown(Phase::Starting, None, false), first);
    let later = shown(lacks, Some(before.clone()), false);
    assert_eq!(later.container_id, "x://old");
    assert_eq!(later.last_termination, Some(before.clone()));
    let stopped = shown(lacks, Some(before.clone()), true);
    assert_eq!(stopped.state, Some(State::Terminated(before)));
}

#[test]
fn a_restart_counts_once_the_program_runs() {
    let shown = |phase, attempt| {
        let history = History {
            attempt,
            ..History::default()
        };
        restarts(phase, &history)
    };
    let ended = Phase::Exited {
        code: 1,
        unhealthy: false,
        restart_at: Duration::ZERO,
    };
    assert_eq!(shown(Phase::Starting, 0), 0);
    assert_eq!([shown(Phase::Running, 0), shown(ended, 0)], [0, 0]);
    assert_eq!(
        [shown(Phase::Starting, 1), shown(Phase::Running, 1)],
        [0, 1]
    );
    assert_eq!([shown(ended, 1), shown(Phase::Starting, 2)], [1, 1]);
}

#[test]
fn a_rank_that_was_lost_is_why_the_containers_ended() {
    assert_eq!(by_themselves(None), pb::EndedBy::Themselves);
    assert_eq!(by_themselves(Some(Loss::Rank)), pb::EndedBy::LostRank);
    assert_eq!(by_themselves(Some(Loss::Node)), pb::EndedBy::LostNode);
}

#[tokio::test(start_paused = true)]
async fn a_report_that_could_not_be_written_is_written_later_without_any_news() {
    let (_root, dir) = job_dir();
    // Nothing can be renamed over a folder.
    std::fs::create_dir(dir.report_path()).unwrap();
    let mut publisher = Publisher::new(pb::Report::default());
    let mut keeper = JoinSet::new();
    keeper.spawn(keep(dir.clone(), publisher.subscribe()));
    publisher.update(|report| report.hostname = "c1".to_owned());
    tokio::time::sleep(Duration::from_mins(10)).await;
    std::fs::remove_dir(dir.report_path()).unwrap();
    assert_eq!(written(&dir).await.hostname, "c1");
    publisher.update(|report| report.r#final = true);
    assert!(keeper.join_next().await.unwrap().unwrap());
    assert!(written(&dir).await.r#final);
}

#[tokio::test(start_paused = true)]
async fn a_final_report_that_cannot_be_written_is_given_up() {
    let (_root, dir) = job_dir();
    std::fs::create_dir(dir.report_path()).unwrap();
    let mut publisher = Publisher::new(pb::Report::default());
    let mut keeper = JoinSet::new();
    keeper.spawn(keep(dir, publisher.subscribe()));
    publisher.update(|report| report.r#final = true);
    drop(publisher);
    assert!(!keeper.join_next().await.unwrap().unwrap());
}

#[test]
fn a_pod_that_waits_for_its_address_is_being_created_and_has_not_failed() {
    let pod = pb::PodSpec::default();
    let history = History::default();
    let reason = |missing| {
        let context = StatusContext {
            pod: &pod,
            initialized: true,
            stopping: false,
            starts_over: false,
            missing: Some(missing),
            now: Duration::ZERO,
        };
        let situation = Situation {
            phase: Phase::Idle,
            health: Health::down(),
            history: &history,
            restart: RestartRule::Always,
            target_missing: None,
            in_post_start: false,
        };
        match state(&spec(Role::Main), situation, &context) {
            State::Waiting(waiting) => waiting.reason,
            state @ (State::Running(_) | State::Terminated(_)) => panic!("{state:?}"),
        }
    };
    assert_eq!(reason(Missing::Address), "ContainerCreating");
    assert_eq!(reason(Missing::Values("they expired")), UNCONFIGURED);
}

#[test]
fn a_program_in_its_post_start_hook_runs_and_the_stop_of_the_pod_ends_the_hook() {
    let pod = pb::PodSpec::default();
    let history = History::default();
    let shown = |stopping| {
        let situation = Situation {
            phase: Phase::Running,
            health: Health::down(),
            history: &history,
            restart: RestartRule::Always,
            target_missing: None,
            in_post_start: true,
        };
        let context = initialized(&pod, stopping);
        let status = status(&spec(Role::Main), situation, &context, String::new());
        assert!(matches!(status.state, Some(State::Running(_))));
        status.in_post_start
    };
    assert_eq!((shown(false), shown(true)), (true, false));
}
