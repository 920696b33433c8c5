//! Level 2: the roles of containers (sidecars, ephemeral containers) and what restarts them, with the real shim and real
//! processes.

use std::{fs, path::Path, time::Duration};

use anyhow::ensure;
use knoc_proto::pb::{self, container_status::State};
use knoc_tests::{
    site::{Options, Pod, Site, container},
    wait_for,
};

const SOON: Duration = Duration::from_secs(40);

fn shell(name: &str, script: &str) -> pb::Container {
    container(name, &["/bin/sh", "-c", script], &[])
}

/// Says in the file that it has started and, on TERM, that it has ended.
fn logging(name: &str, log: &Path) -> pb::Container {
    let log = log.display();
    let script = format!(
        "echo +{name} >> {log}; trap 'echo -{name} >> {log}; exit 0' TERM; while :; do sleep 0.1; done"
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
    let command = ["test".to_owned(), "-e".to_owned(), path.display().to_string()];
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

#[tokio::test]
async fn the_containers_own_policy_and_its_rules_decide_about_restarts() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let count = site.path("count").display().to_string();
    // 42, 42, then 7.
    let script = format!(
        "echo run >> {count}; test $(wc -l < {count}) -gt 2 && exit 7; exit 42"
    );
    let mut ruled = shell("ruled", &script);
    ruled.restart_policy = pb::RestartPolicy::Never.into();
    ruled.restart_rules = vec![pb::RestartRule {
        not_in: false,
        exit_codes: vec![42],
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
