//! Level 2: the roles of containers (sidecars, ephemeral containers) and what restarts them, with the real shim and real
//! processes.

use std::{fs, path::Path, time::Duration};

use anyhow::ensure;
use knoc_proto::pb::{self, agent_client::AgentClient, container_status::State};
use knoc_tests::{
    site::{Options, Pod, Site, container},
    wait_for,
};
use tonic::transport::Channel;

const SOON: Duration = Duration::from_mins(2);

fn shell(name: &str, script: &str) -> pb::Container {
    container(name, &["/bin/sh", "-c", script], &[])
}

/// Says in the file that it has started and waits for TERM and, on TERM, that it has ended.
fn logging(name: &str, log: &Path) -> pb::Container {
    let log = log.display();
    let script = format!(
        "trap 'echo -{name} >> {log}; exit 0' TERM; echo +{name} >> {log}; while :; do sleep 0.1; done"
    );
    shell(name, &script)
}

fn sidecar(container: pb::Container) -> pb::Container {
    pb::Container {
        restart_policy: pb::RestartPolicy::Always.into(),
        ..container
    }
}

/// Passes while the file exists; tried every second.
fn exists(path: &Path) -> pb::Probe {
    let command = [
        "test".to_owned(),
        "-e".to_owned(),
        path.display().to_string(),
    ];
    pb::Probe {
        action: Some(pb::probe::Action::Exec(pb::ExecAction {
            command: command.to_vec(),
        })),
        period_seconds: 1,
        failure_threshold: 600,
        ..pb::Probe::default()
    }
}

fn with_init(uid: &str, init: Vec<pb::Container>, main: Vec<pb::Container>) -> Pod {
    let mut pod = Pod::new(uid, main);
    if let Some(spec) = &mut pod.request.spec {
        spec.init_containers = init;
    }
    pod
}

fn status<'a>(pod: &'a pb::PodObserved, name: &str) -> Option<&'a pb::ContainerStatus> {
    let mut all = pod.init_containers.iter().chain(&pod.containers);
    all.find(|status| status.name == name)
}

fn runs(status: &pb::ContainerStatus) -> bool {
    matches!(status.state, Some(State::Running(_)))
}

#[tokio::test]
async fn sidecars_gate_the_start_and_are_stopped_in_reverse_order_after_the_containers()
-> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let [log, up] = ["log", "up"].map(|name| site.path(name));
    let mut first = sidecar(logging("first", &log));
    first.startup_probe = Some(exists(&up));
    let init = vec![
        first,
        shell("between", &format!("echo between >> {}", log.display())),
        sidecar(logging("second", &log)),
    ];
    let pod = with_init("sidecars", init, vec![logging("main", &log)]);
    pod.ensure(&client).await?;
    let first_runs = |pod: &pb::PodObserved| {
        status(pod, "first").is_some_and(|first| runs(first) && !first.started)
    };
    let state = pod
        .wait_for_state(&client, "the first sidecar runs", SOON, first_runs)
        .await?;
    for name in ["between", "second", "main"] {
        let waits = |one: &pb::ContainerStatus| matches!(one.state, Some(State::Waiting(_)));
        ensure!(status(&state, name).is_some_and(waits), "{name}: {state:?}");
    }
    site.put("up", "")?;
    let state = pod.running(&client, SOON).await?;
    for name in ["first", "second"] {
        let fine = |one: &pb::ContainerStatus| runs(one) && one.ready && one.started;
        ensure!(status(&state, name).is_some_and(fine), "{name}: {state:?}");
    }
    // Each says that it runs after it was started.
    wait_for("all have begun", SOON, async || {
        let text = fs::read_to_string(&log)?;
        ensure!(text.lines().count() == 4, "{text}");
        Ok(())
    })
    .await?;
    pod.delete(&client, 30).await?;
    pod.finished(&client, SOON).await?;
    let text = fs::read_to_string(&log)?;
    let lines: Vec<&str> = text.lines().collect();
    ensure!(lines[..2] == ["+first", "between"], "{text}");
    ensure!(lines[4..] == ["-main", "-second", "-first"], "{text}");
    Ok(())
}

#[tokio::test]
async fn a_sidecar_does_not_keep_the_pod_from_completing_and_is_restarted_until_then()
-> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let go = site.path("go");
    let main = shell(
        "main",
        &format!("until test -e {}; do sleep 0.1; done", go.display()),
    );
    // It fails at first, then runs until it is told to stop.
    let once = site.path("once");
    let script = format!(
        "test -e {0} || {{ touch {0}; exit 3; }}; exec sleep 600",
        once.display()
    );
    let init = vec![sidecar(shell("side", &script))];
    let pod = with_init("completes", init, vec![main]);
    pod.ensure(&client).await?;
    let restarted = |pod: &pb::PodObserved| {
        status(pod, "side").is_some_and(|side| {
            let code = side.last_termination.as_ref().map(|ended| ended.exit_code);
            runs(side) && side.restart_count == 1 && code == Some(3)
        })
    };
    pod.wait_for_state(&client, "the sidecar was restarted", SOON, restarted)
        .await?;
    site.put("go", "")?;
    pod.succeeded(&client, SOON).await?;
    let state = pod.state(&client).await?;
    let ended = |one: &pb::ContainerStatus| matches!(one.state, Some(State::Terminated(_)));
    ensure!(status(&state, "side").is_some_and(ended), "{state:?}");
    Ok(())
}

/// As on any node: only then is the pod over.
#[tokio::test]
async fn a_deadline_that_passes_while_only_sidecars_stop_fails_the_pod() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let ready = site.path("ready");
    let ready = ready.display();
    // Its end takes longer than the deadline.
    let loops = format!("trap 'sleep 8; exit 0' TERM; touch {ready}; while :; do sleep 0.1; done");
    let main = shell(
        "main",
        &format!("until test -e {ready}; do sleep 0.1; done"),
    );
    let mut pod = with_init("overtime", vec![sidecar(shell("side", &loops))], vec![main]);
    if let Some(spec) = &mut pod.request.spec {
        spec.active_deadline_seconds = 6;
        spec.termination_grace_period_seconds = 60;
    }
    pod.ensure(&client).await?;
    let outcome = pod.finished(&client, SOON).await?;
    ensure!(outcome.reason == "DeadlineExceeded", "{outcome:?}");
    ensure!(pod.terminated(&client, "main").await?.exit_code == 0);
    let seen = pod.state(&client).await?;
    let mut notes = seen.notes.iter();
    ensure!(
        notes.any(|note| note.reason == "DeadlineExceeded" && !note.warning),
        "{:?}",
        seen.notes
    );
    Ok(())
}

#[tokio::test]
async fn the_containers_own_policy_and_its_rules_decide_about_restarts() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let count = site.path("count").display().to_string();
    // 42, 42, then 7.
    let script = format!("echo run >> {count}; test $(wc -l < {count}) -gt 2 && exit 7; exit 42");
    let mut ruled = shell("ruled", &script);
    ruled.restart_policy = pb::RestartPolicy::Never.into();
    ruled.restart_rules = vec![pb::RestartRule {
        not_in: false,
        exit_codes: vec![42],
        restart_all: false,
    }];
    let mut once = shell("once", "exit 5");
    once.restart_policy = pb::RestartPolicy::Never.into();
    let mut pod = Pod::new("ruled", vec![ruled, once]);
    if let Some(spec) = &mut pod.request.spec {
        spec.restart_policy = pb::RestartPolicy::Always.into();
    }
    pod.ensure(&client).await?;
    let outcome = pod.finished(&client, SOON).await?;
    ensure!(outcome.kind() == pb::OutcomeKind::Failed, "{outcome:?}");
    let state = pod.state(&client).await?;
    let restarts = |name| status(&state, name).map(|one| one.restart_count);
    ensure!(restarts("ruled") == Some(2), "{state:?}");
    ensure!(restarts("once") == Some(0), "{state:?}");
    ensure!(pod.terminated(&client, "ruled").await?.exit_code == 7);
    ensure!(pod.terminated(&client, "once").await?.exit_code == 5);
    Ok(())
}

#[tokio::test]
async fn an_exit_code_restarts_all_containers_of_the_pod_in_order_and_at_once() -> anyhow::Result<()>
{
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let log = site.path("said");
    let said = log.display();
    let mut other = logging("other", &log);
    other.restart_policy = pb::RestartPolicy::Never.into();
    let again = site.path("again").display().to_string();
    let script = format!(
        "echo +cause >> {said}; if test -e {again}; then exec sleep 600; fi; \
         touch {again}; until grep -q +side {said} && grep -q +other {said}; do sleep 0.1; done; exit 42"
    );
    let mut cause = shell("cause", &script);
    cause.restart_policy = pb::RestartPolicy::Never.into();
    cause.restart_rules = vec![pb::RestartRule {
        not_in: false,
        exit_codes: vec![42],
        restart_all: true,
    }];
    let init = vec![
        shell("init", &format!("echo +init >> {said}")),
        sidecar(logging("side", &log)),
    ];
    let pod = with_init("all", init, vec![cause, other]);
    pod.ensure(&client).await?;
    let restarted = |pod: &pb::PodObserved| {
        let once = |name| status(pod, name).is_some_and(|one| one.restart_count == 1);
        let last = |name| {
            let last = status(pod, name)?.last_termination.as_ref()?;
            Some(last.exit_code)
        };
        ["init", "side", "cause", "other"].into_iter().all(once)
            && (last("cause"), last("side"), last("other")) == (Some(42), Some(137), Some(137))
            && ["side", "cause", "other"]
                .into_iter()
                .all(|name| status(pod, name).is_some_and(runs))
    };
    pod.wait_for_state(&client, "all were restarted once", SOON, restarted)
        .await?;
    // Nobody was asked to end, and the order of the start is that of before.
    let lines = || fs::read_to_string(&log);
    wait_for("both starts are complete", SOON, async || {
        let text = lines()?;
        ensure!(text.lines().count() == 8, "{text}");
        anyhow::Ok(())
    })
    .await?;
    let text = lines()?;
    ensure!(!text.contains('-'), "{text}");
    for start in text.lines().collect::<Vec<_>>().chunks(4) {
        let init = start.iter().position(|line| *line == "+init");
        ensure!(init == Some(0), "{text}");
    }
    pod.remove(&client).await
}

/// Asks for the pod with these ephemeral containers too, as a kubelet does after `kubectl debug`. Their environment has
/// `GREETING`.
fn with_ephemeral(pod: &Pod, containers: Vec<pb::Container>) -> Pod {
    let mut pod = pod.clone();
    let env = containers.iter().map(|container| pb::ContainerEnv {
        container: container.name.clone(),
        vars: vec![pb::EnvVar {
            name: "GREETING".to_owned(),
            value: Some(pb::env_var::Value::Template("hello".to_owned())),
        }],
    });
    if let Some(values) = &mut pod.request.values {
        values.revision += 1;
        values.ephemeral_env = env.collect();
    }
    if let Some(spec) = &mut pod.request.spec {
        spec.generation += 1;
        spec.ephemeral_containers = containers;
    }
    pod
}

fn ephemeral<'a>(pod: &'a pb::PodObserved, name: &str) -> Option<&'a pb::ContainerStatus> {
    let mut all = pod.ephemeral_containers.iter();
    all.find(|status| status.name == name)
}

/// Waits until the ephemeral container has ended; returns its exit code.
async fn ended(
    pod: &Pod,
    client: &AgentClient<Channel>,
    name: &'static str,
) -> anyhow::Result<i32> {
    let is = |pod: &pb::PodObserved| {
        ephemeral(pod, name).is_some_and(|one| matches!(one.state, Some(State::Terminated(_))))
    };
    let state = pod
        .wait_for_state(client, &format!("{name} has ended"), SOON, is)
        .await?;
    match ephemeral(&state, name).and_then(|one| one.state.clone()) {
        Some(State::Terminated(ended)) => Ok(ended.exit_code),
        other => anyhow::bail!("{other:?}"),
    }
}

#[tokio::test]
async fn an_ephemeral_container_runs_once_in_the_running_job_and_outlives_a_restart_of_the_agent()
-> anyhow::Result<()> {
    let (site, agent, client) = Site::start(Options::default()).await?;
    let pod = Pod::new("debugged", vec![shell("main", "exec sleep 600")]);
    pod.ensure(&client).await?;
    pod.running(&client, SOON).await?;
    let mut look = shell("look", "echo $GREETING; exit 3");
    look.target = "main".to_owned();
    let looked = with_ephemeral(&pod, vec![look.clone()]);
    looked.ensure(&client).await?;
    ensure!(ended(&pod, &client, "look").await? == 3);
    let log = pod.log(&client, "look").await?;
    ensure!(&log[..] == b"hello\n", "{log:?}");

    // Another one is added, and the first one neither runs again nor changes.
    let stay = shell("stay", "exec sleep 600");
    let both = with_ephemeral(&looked, vec![look.clone(), stay.clone()]);
    both.ensure(&client).await?;
    let runs_now = |pod: &pb::PodObserved| ephemeral(pod, "stay").is_some_and(runs);
    pod.wait_for_state(&client, "stay runs", SOON, runs_now)
        .await?;
    let (said, code) = pod
        .exec(&client, "stay", &["/bin/echo", "inside"], b"")
        .await?;
    ensure!((&said[..], code) == (&b"inside\n"[..], 0), "{said:?}");
    let mut other = look.clone();
    other.command = vec!["true".to_owned()];
    let changed = with_ephemeral(&both, vec![other, stay]);
    let refused = client.clone().ensure_pod(changed.request).await;
    let refused = refused.err().map(|status| status.message().to_owned());
    ensure!(
        refused.as_ref().is_some_and(|why| why.contains("\"look\"")),
        "{refused:?}"
    );

    agent.kill().await?;
    let _agent = site.agent(&[]).await?;
    let state = pod
        .wait_for_state(&client, "stay runs still", SOON, runs_now)
        .await?;
    ensure!(ephemeral(&state, "look").is_some_and(|one| one.restart_count == 0));
    let main = status(&state, "main").map(|main| (main.restart_count, runs(main)));
    ensure!(main == Some((0, true)), "{state:?}");
    // A kubelet that does not know them sends none: they stay.
    let mut older = pod.clone();
    if let Some(spec) = &mut older.request.spec {
        spec.generation = 9;
    }
    older.ensure(&client).await?;
    let state = pod.state(&client).await?;
    ensure!(state.ephemeral_containers.len() == 2, "{state:?}");
    pod.remove(&client).await
}

#[tokio::test]
async fn an_ephemeral_container_waits_for_its_target_and_ends_with_the_pod() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let [up, go] = ["up", "go"].map(|name| site.path(name));
    let wait = |path: &Path| format!("until test -e {}; do sleep 0.1; done", path.display());
    let init = vec![shell("first", &wait(&up))];
    let pod = with_init("target", init, vec![shell("main", &wait(&go))]);
    pod.ensure(&client).await?;
    let first_runs =
        |pod: &pb::PodObserved| status(pod, "first").is_some_and(runs) && pod.shim_connected;
    pod.wait_for_state(&client, "the init container runs", SOON, first_runs)
        .await?;
    let mut debug = shell("debug", "exec sleep 600");
    debug.target = "main".to_owned();
    with_ephemeral(&pod, vec![debug]).ensure(&client).await?;
    let message = "unable to find target container \"main\"";
    let waits = |pod: &pb::PodObserved| {
        ephemeral(pod, "debug").is_some_and(|debug| match &debug.state {
            Some(State::Waiting(waiting)) => waiting.message == message,
            _ => false,
        })
    };
    pod.wait_for_state(&client, "it waits for its target", SOON, waits)
        .await?;
    site.put("up", "")?;
    let runs_now = |pod: &pb::PodObserved| ephemeral(pod, "debug").is_some_and(runs);
    pod.wait_for_state(&client, "it runs", SOON, runs_now)
        .await?;
    // It does not keep the pod from completing.
    site.put("go", "")?;
    pod.succeeded(&client, SOON).await?;
    ensure!(ended(&pod, &client, "debug").await? != 0);
    Ok(())
}

#[tokio::test]
async fn an_ephemeral_container_that_the_site_does_not_allow_holds_up_no_other()
-> anyhow::Result<()> {
    let options = Options {
        tables: "[policy]\nhost_paths = [{ path = '/data' }]".into(),
        ..Options::default()
    };
    let (_site, _agent, client) = Site::start(options).await?;
    let mut pod = Pod::new("held", vec![shell("main", "exec sleep 600")]);
    if let Some(spec) = &mut pod.request.spec {
        spec.volumes = vec![pb::Volume {
            name: "data".to_owned(),
            source: Some(pb::volume::Source::HostPath(pb::HostPath {
                path: "/data/x".to_owned(),
                ..pb::HostPath::default()
            })),
        }];
    }
    pod.ensure(&client).await?;
    pod.running(&client, SOON).await?;
    let mut writes = shell("writes", "exit 0");
    writes.mounts = vec![pb::Mount {
        volume: "data".to_owned(),
        path: "/data".to_owned(),
        ..pb::Mount::default()
    }];
    let both = vec![writes, shell("fine", "exit 3")];
    with_ephemeral(&pod, both).ensure(&client).await?;
    ensure!(ended(&pod, &client, "fine").await? == 3);
    let state = pod.state(&client).await?;
    let writes = ephemeral(&state, "writes").and_then(|one| one.state.clone());
    let Some(State::Waiting(waiting)) = writes else {
        anyhow::bail!("{writes:?}");
    };
    ensure!(
        waiting.reason == "CreateContainerConfigError"
            && waiting.message.contains("/data/x")
            && waiting.message.contains("readOnly: true"),
        "{waiting:?}"
    );
    pod.remove(&client).await
}

#[tokio::test]
async fn a_real_time_signal_asks_a_program_to_end() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let up = site.path("up");
    let script = format!(
        "trap 'exit 7' 37; trap '' TERM; touch {}; while :; do sleep 0.1; done",
        up.display()
    );
    let mut main = shell("main", &script);
    main.stop_signal = "SIGRTMIN+3".to_owned();
    let pod = Pod::new("real-time", vec![main]);
    pod.ensure(&client).await?;
    pod.running(&client, SOON).await?;
    wait_for("the file", SOON, async || {
        ensure!(up.exists(), "{:?}", pod.state(&client).await?);
        Ok(())
    })
    .await?;
    pod.delete(&client, 600).await?;
    pod.finished(&client, SOON).await?;
    let ended = pod.terminated(&client, "main").await?;
    ensure!(ended.exit_code == 7, "{ended:?}");
    Ok(())
}

#[tokio::test]
async fn a_container_chooses_its_stop_signal_and_a_grace_period_is_lowered_while_it_stops()
-> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let (up, told) = (site.path("up"), site.path("told"));
    let script = format!(
        "trap 'touch {}' USR1; trap '' TERM; touch {}; while :; do sleep 0.1; done",
        told.display(),
        up.display()
    );
    let mut main = shell("main", &script);
    main.stop_signal = "SIGUSR1".to_owned();
    let pod = Pod::new("signal", vec![main]);
    pod.ensure(&client).await?;
    pod.running(&client, SOON).await?;
    let there = async |path: &Path| {
        wait_for("the file", SOON, async || {
            ensure!(path.exists(), "{:?}", pod.state(&client).await?);
            Ok(())
        })
        .await
    };
    there(&up).await?;
    pod.delete(&client, 600).await?;
    there(&told).await?;
    let state = pod.state(&client).await?;
    ensure!(status(&state, "main").is_some_and(runs), "{state:?}");
    pod.delete(&client, 1).await?;
    pod.finished(&client, SOON).await?;
    ensure!(pod.terminated(&client, "main").await?.exit_code == 137);
    Ok(())
}
