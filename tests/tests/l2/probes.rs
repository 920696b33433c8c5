//! Level 2: probes and hooks, run by the real shim in real processes.

use std::{fs, path::Path, time::Duration};

use anyhow::ensure;
use knoc_proto::pb::{self, agent_client::AgentClient, container_status::State};
use knoc_tests::{
    site::{Options, Pod, Site, container},
    wait_for,
};
use tonic::transport::Channel;

const SOON: Duration = Duration::from_mins(2);

fn shell(script: &str) -> pb::Container {
    container("main", &["/bin/sh", "-c", script], &[])
}

fn exec(script: &str) -> pb::ExecAction {
    let command = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    pb::ExecAction { command }
}

/// A probe that is tried every second, and whose first result counts. On a busy machine it may take its time.
fn probe(action: pb::probe::Action) -> pb::Probe {
    pb::Probe {
        action: Some(action),
        period_seconds: 1,
        timeout_seconds: 60,
        failure_threshold: 1,
        ..pb::Probe::default()
    }
}

/// Passes while the file exists.
fn exists(path: &Path) -> pb::Probe {
    let script = format!("test -e {}", path.display());
    probe(pb::probe::Action::Exec(exec(&script)))
}

/// A startup probe that waits until all of the files exist, however long the container takes to start.
fn until(paths: &[&Path]) -> pb::Probe {
    let tests = paths
        .iter()
        .map(|path| format!("test -e {}", path.display()));
    let script = tests.collect::<Vec<_>>().join(" && ");
    pb::Probe {
        failure_threshold: 600,
        ..probe(pb::probe::Action::Exec(exec(&script)))
    }
}

fn hook(script: &str) -> pb::Hook {
    pb::Hook {
        action: Some(pb::hook::Action::Exec(exec(script))),
    }
}

fn status<'a>(pod: &'a pb::PodObserved, name: &str) -> Option<&'a pb::ContainerStatus> {
    pod.containers.iter().find(|status| status.name == name)
}

/// Waits until the container is started and ready as given.
async fn wait_for_health(
    pod: &Pod,
    client: &AgentClient<Channel>,
    (started, ready): (bool, bool),
) -> anyhow::Result<()> {
    let what = format!("started {started}, ready {ready}");
    let is = |pod: &pb::PodObserved| {
        status(pod, "main").is_some_and(|main| {
            let runs = matches!(main.state, Some(State::Running(_)));
            runs && (main.started, main.ready) == (started, ready)
        })
    };
    pod.wait_for_state(client, &what, SOON, is).await?;
    Ok(())
}

/// Waits for a note whose message contains `text`.
async fn wait_for_note(
    pod: &Pod,
    client: &AgentClient<Channel>,
    reason: &str,
    text: &str,
) -> anyhow::Result<pb::PodNote> {
    wait_for(&format!("{reason}: {text}"), SOON, async || {
        let state = pod.state(client).await?;
        let mut notes = state.notes.iter();
        let found = notes.find(|note| note.reason == reason && note.message.contains(text));
        found
            .cloned()
            .ok_or_else(|| anyhow::anyhow!("{:?}", state.notes))
    })
    .await
}

#[tokio::test]
async fn the_startup_probe_comes_first_and_ready_follows_the_readiness_probe() -> anyhow::Result<()>
{
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let [up, ready] = ["up", "ready"].map(|name| site.path(name));
    let mut main = shell("exec sleep 600");
    main.startup_probe = Some(until(&[&up]));
    main.readiness_probe = Some(exists(&ready));
    let pod = Pod::new("gates", vec![main]);
    site.put("ready", "")?;
    pod.ensure(&client).await?;
    wait_for_health(&pod, &client, (false, false)).await?;
    site.put("up", "")?;
    wait_for_health(&pod, &client, (true, true)).await?;
    fs::remove_file(&ready)?;
    wait_for_health(&pod, &client, (true, false)).await?;
    let note = wait_for_note(&pod, &client, "Unhealthy", "Readiness probe failed: ").await?;
    ensure!(note.warning && note.count >= 1, "{note:?}");
    // A startup probe that passed is not tried again.
    fs::remove_file(&up)?;
    site.put("ready", "")?;
    wait_for_health(&pod, &client, (true, true)).await?;
    let state = pod.state(&client).await?;
    ensure!(state.containers[0].restart_count == 0, "{state:?}");
    pod.remove(&client).await
}

#[tokio::test]
async fn a_failed_liveness_probe_restarts_the_container_within_its_own_grace_period()
-> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let [alive, up] = ["alive", "up"].map(|name| site.path(name));
    let mut main = shell(&format!(
        "trap '' TERM; touch {}; while :; do sleep 1; done",
        up.display()
    ));
    // Liveness is not probed before it ignores TERM and the file is there, also after its restart.
    main.startup_probe = Some(until(&[&up, &alive]));
    main.liveness_probe = Some(pb::Probe {
        termination_grace_period_seconds: Some(1),
        ..exists(&alive)
    });
    let mut pod = Pod::new("alive", vec![main]);
    if let Some(spec) = &mut pod.request.spec {
        spec.restart_policy = pb::RestartPolicy::Always.into();
        spec.termination_grace_period_seconds = 600;
    }
    site.put("alive", "")?;
    pod.ensure(&client).await?;
    wait_for_health(&pod, &client, (true, true)).await?;
    fs::remove_file(&alive)?;
    wait_for_note(&pod, &client, "Unhealthy", "Liveness probe failed: ").await?;
    site.put("alive", "")?;
    let killed = "Container main failed liveness probe, will be restarted";
    let note = wait_for_note(&pod, &client, "Killing", killed).await?;
    ensure!(!note.warning && note.container == "main", "{note:?}");
    let restarted = |pod: &pb::PodObserved| {
        status(pod, "main").is_some_and(|main| {
            let code = main.last_termination.as_ref().map(|ended| ended.exit_code);
            main.restart_count == 1 && main.ready && code == Some(137)
        })
    };
    pod.wait_for_state(&client, "it was restarted", SOON, restarted)
        .await?;
    pod.remove(&client).await
}

#[tokio::test]
async fn a_container_that_liveness_stopped_is_restarted_on_failure_although_it_exits_with_0()
-> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let [alive, polite, up] = ["alive", "polite", "up"].map(|name| site.path(name));
    let mut main = shell(&format!(
        "trap 'touch {}; exit 0' TERM; touch {}; while :; do sleep 0.1; done",
        polite.display(),
        up.display()
    ));
    // Liveness is not probed before it has its trap and the file is there, also after its restart.
    main.startup_probe = Some(until(&[&up, &alive]));
    main.liveness_probe = Some(exists(&alive));
    let mut pod = Pod::new("polite", vec![main]);
    if let Some(spec) = &mut pod.request.spec {
        spec.restart_policy = pb::RestartPolicy::OnFailure.into();
    }
    site.put("alive", "")?;
    pod.ensure(&client).await?;
    wait_for_health(&pod, &client, (true, true)).await?;
    fs::remove_file(&alive)?;
    let killed = "Container main failed liveness probe, will be restarted";
    wait_for_note(&pod, &client, "Killing", killed).await?;
    site.put("alive", "")?;
    let restarted = |pod: &pb::PodObserved| {
        status(pod, "main").is_some_and(|main| main.restart_count == 1 && main.ready)
    };
    pod.wait_for_state(&client, "it was restarted", SOON, restarted)
        .await?;
    ensure!(polite.exists(), "it did not exit with 0");
    pod.remove(&client).await
}

#[tokio::test]
async fn a_startup_probe_that_never_passes_ends_a_pod_that_is_not_restarted() -> anyhow::Result<()>
{
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let mut main = shell("exec sleep 600");
    main.startup_probe = Some(exists(&site.path("never")));
    let pod = Pod::new("never", vec![main]);
    pod.ensure(&client).await?;
    let outcome = pod.finished(&client, SOON).await?;
    ensure!(outcome.kind() == pb::OutcomeKind::Failed, "{outcome:?}");
    let note = wait_for_note(&pod, &client, "Killing", "failed startup probe").await?;
    ensure!(!note.message.contains("restarted"), "{note:?}");
    Ok(())
}

/// Answers 200 at `/ok` if the request has what a probe's has, 302 to another host at `/away`, 304 at `/same`, else 500.
const SERVER: &str = "
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        probe = self.headers.get('User-Agent', '').startswith('kube-probe/')
        code = 302 if self.path == '/away' else 304 if self.path == '/same' else 200 if self.path == '/ok' and probe and self.headers.get('X-A') == '1' else 500
        self.send_response(code)
        if code == 302:
            self.send_header('Location', 'http://0.0.0.0/')
        self.end_headers()
http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()
";

fn get(port: u16, path: &str) -> pb::probe::Action {
    pb::probe::Action::HttpGet(pb::HttpGetAction {
        port: port.into(),
        path: path.to_owned(),
        https: false,
        headers: vec![pb::HttpHeader {
            name: "X-A".to_owned(),
            value: "1".to_owned(),
        }],
    })
}

#[tokio::test]
async fn probes_over_the_network_reach_the_pods_own_listeners_only() -> anyhow::Result<()> {
    let (_site, _agent, client) = Site::start(Options::default()).await?;
    let port = knoc_tests::ports::some_port();
    let mut main = container("main", &["python3", "-c", SERVER, &port.to_string()], &[]);
    main.startup_probe = Some(pb::Probe {
        failure_threshold: 600,
        ..probe(pb::probe::Action::TcpSocket(pb::TcpSocketAction {
            port: port.into(),
        }))
    });
    main.liveness_probe = Some(probe(get(port, "/away")));
    main.readiness_probe = Some(probe(get(port, "/ok")));
    let pod = Pod::new("own", vec![main.clone()]);
    pod.ensure(&client).await?;
    wait_for_health(&pod, &client, (true, true)).await?;
    let redirected = "Liveness probe warning: Probe terminated redirects";
    wait_for_note(&pod, &client, "ProbeWarning", redirected).await?;
    // Another pod, to which the listener does not belong.
    let mut other = shell("exec sleep 600");
    other.readiness_probe = main.readiness_probe;
    let other = Pod::new("other", vec![other]);
    other.ensure(&client).await?;
    let foreign = "belongs to a process outside the pod";
    wait_for_note(&other, &client, "Unhealthy", foreign).await?;
    wait_for_health(&other, &client, (true, false)).await?;
    other.remove(&client).await?;
    pod.remove(&client).await
}

#[tokio::test]
async fn a_response_that_is_no_success_and_a_closed_port_fail() -> anyhow::Result<()> {
    let (_site, _agent, client) = Site::start(Options::default()).await?;
    let port = knoc_tests::ports::some_port();
    let mut main = container("main", &["python3", "-c", SERVER, &port.to_string()], &[]);
    main.readiness_probe = Some(probe(get(port, "/broken")));
    main.startup_probe = Some(pb::Probe {
        failure_threshold: 600,
        ..probe(get(port, "/same"))
    });
    let pod = Pod::new("broken", vec![main]);
    pod.ensure(&client).await?;
    let failed = "Readiness probe failed: HTTP probe failed with statuscode: 500";
    wait_for_note(&pod, &client, "Unhealthy", failed).await?;
    // A redirect to nowhere passes, with a warning.
    let warned = "Startup probe warning: Probe terminated redirects";
    wait_for_note(&pod, &client, "ProbeWarning", warned).await?;
    pod.remove(&client).await?;
    let mut main = shell("exec sleep 600");
    main.readiness_probe = Some(probe(get(port, "/")));
    let pod = Pod::new("closed", vec![main]);
    pod.ensure(&client).await?;
    wait_for_note(&pod, &client, "Unhealthy", "connect: connection refused").await?;
    pod.remove(&client).await
}

/// Checks that no process has this word in its command line.
fn nothing_runs_with(word: &str) -> Result<(), String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let lines = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    let left: Vec<_> = lines.filter(|line| line.contains(word)).collect();
    if left.is_empty() {
        Ok(())
    } else {
        Err(left.join(", "))
    }
}

#[tokio::test]
async fn a_command_that_hangs_is_killed_with_all_that_it_started() -> anyhow::Result<()> {
    let (_site, _agent, client) = Site::start(Options::default()).await?;
    let word = format!("86400.{}", rand::random_range(100_000..1_000_000));
    let mut main = shell("exec sleep 600");
    let hangs = exec(&format!("yes & sleep {word} & sleep {word}"));
    main.readiness_probe = Some(pb::Probe {
        period_seconds: 3600,
        timeout_seconds: 1,
        ..probe(pb::probe::Action::Exec(hangs))
    });
    let pod = Pod::new("hangs", vec![main]);
    pod.ensure(&client).await?;
    let note = wait_for_note(&pod, &client, "Unhealthy", "timed out after 1s").await?;
    ensure!(note.message.len() <= 1024, "{note:?}");
    wait_for("the command is gone", SOON, async || {
        nothing_runs_with(&format!("sleep {word}"))
    })
    .await?;
    wait_for_health(&pod, &client, (true, false)).await?;
    pod.remove(&client).await
}

#[tokio::test]
async fn a_command_that_does_not_exist_is_told_and_counts_for_nothing() -> anyhow::Result<()> {
    let (_site, _agent, client) = Site::start(Options::default()).await?;
    let mut main = shell("exec sleep 600");
    main.liveness_probe = Some(probe(pb::probe::Action::Exec(pb::ExecAction {
        command: vec!["/no/such/program".to_owned()],
    })));
    let pod = Pod::new("absent", vec![main]);
    pod.ensure(&client).await?;
    let text = "Liveness probe errored and resulted in unknown state: exec failed";
    wait_for_note(&pod, &client, "Unhealthy", text).await?;
    wait_for_health(&pod, &client, (true, true)).await?;
    pod.remove(&client).await
}

#[tokio::test]
async fn a_container_has_started_when_its_post_start_hook_has_ended() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let go = site.path("go");
    let mut main = shell("exec sleep 600");
    main.post_start = Some(hook(&format!(
        "until test -e {}; do sleep 0.1; done",
        go.display()
    )));
    let mut second = shell("exec sleep 600");
    second.name = "second".to_owned();
    let pod = Pod::new("hooked", vec![main, second]);
    pod.ensure(&client).await?;
    wait_for_health(&pod, &client, (false, false)).await?;
    let state = pod.state(&client).await?;
    let waits = |status: &pb::ContainerStatus| matches!(status.state, Some(State::Waiting(_)));
    ensure!(status(&state, "second").is_some_and(waits), "{state:?}");
    let in_hook = |status: &pb::ContainerStatus| status.in_post_start;
    ensure!(status(&state, "main").is_some_and(in_hook), "{state:?}");
    let open = format!(": > {}", go.display());
    let (_, code) = pod
        .exec(&client, "main", &["/bin/sh", "-c", &open], b"")
        .await?;
    ensure!(code == 0, "exec during the hook: {code}");
    wait_for_health(&pod, &client, (true, true)).await?;
    let state = pod.state(&client).await?;
    let hooked = |status: &pb::ContainerStatus| !in_hook(status);
    ensure!(status(&state, "main").is_some_and(hooked), "{state:?}");
    let all_run = knoc_tests::site::containers_run;
    pod.wait_for_state(&client, "both run", SOON, all_run)
        .await?;
    pod.remove(&client).await
}

#[tokio::test]
async fn a_failed_post_start_hook_ends_the_container() -> anyhow::Result<()> {
    let (_site, _agent, client) = Site::start(Options::default()).await?;
    let mut main = shell("exec sleep 600");
    main.post_start = Some(hook("echo secret; exit 3"));
    let pod = Pod::new("unhooked", vec![main]);
    pod.ensure(&client).await?;
    let outcome = pod.finished(&client, SOON).await?;
    ensure!(outcome.kind() == pb::OutcomeKind::Failed, "{outcome:?}");
    let note = wait_for_note(&pod, &client, "FailedPostStartHook", "PostStartHook failed").await?;
    ensure!(note.warning && !note.message.contains("secret"), "{note:?}");
    wait_for_note(&pod, &client, "Killing", "FailedPostStartHook").await?;
    Ok(())
}

/// A program that says in the file that it was sent TERM, and in its log that it waits for that.
fn polite(file: &str) -> String {
    format!("trap 'echo term >> {file}; exit 0' TERM; echo trapped; while :; do sleep 0.1; done")
}

async fn is_trapped(pod: &Pod, client: &AgentClient<Channel>) -> anyhow::Result<()> {
    pod.running(client, SOON).await?;
    wait_for("the program has its trap", SOON, async || {
        let log = pod.log(client, "main").await?;
        ensure!(&log[..] == b"trapped\n", "{log:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_pre_stop_hook_comes_before_term() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let log = site.path("order").display().to_string();
    let script = polite(&log);
    let mut main = shell(&script);
    main.pre_stop = Some(hook(&format!("sleep 1; echo hook >> {log}; exit 1")));
    let pod = Pod::new("order", vec![main]);
    pod.ensure(&client).await?;
    is_trapped(&pod, &client).await?;
    pod.delete(&client, 600).await?;
    pod.finished(&client, SOON).await?;
    ensure!(fs::read_to_string(&log)? == "hook\nterm\n");
    ensure!(pod.terminated(&client, "main").await?.exit_code == 0);
    let note = wait_for_note(&pod, &client, "FailedPreStopHook", "PreStopHook failed").await?;
    ensure!(note.warning, "{note:?}");
    Ok(())
}

#[tokio::test]
async fn a_pre_stop_hook_that_never_ends_takes_the_grace_period_and_no_more() -> anyhow::Result<()>
{
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let log = site.path("late").display().to_string();
    let word = format!("86400.{}", rand::random_range(100_000..1_000_000));
    let mut main = shell(&polite(&log));
    main.pre_stop = Some(hook(&format!("sleep {word}")));
    let pod = Pod::new("late", vec![main]);
    pod.ensure(&client).await?;
    is_trapped(&pod, &client).await?;
    pod.delete(&client, 2).await?;
    pod.finished(&client, SOON).await?;
    // It still got TERM, and a moment to handle it.
    ensure!(fs::read_to_string(&log)? == "term\n");
    ensure!(pod.terminated(&client, "main").await?.exit_code == 0);
    wait_for("the hook is gone", SOON, async || {
        nothing_runs_with(&format!("sleep {word}"))
    })
    .await
}

#[tokio::test]
async fn readiness_is_probed_to_the_end_of_a_pod_that_is_being_stopped_and_liveness_is_not()
-> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let [alive, there, told, stay] = ["alive", "there", "told", "stay"].map(|name| site.path(name));
    // It is ready once it has its trap.
    let mut main = shell(&format!(
        "trap 'touch {}' TERM; touch {}; while test -e {}; do sleep 0.1; done",
        told.display(),
        there.display(),
        stay.display()
    ));
    main.liveness_probe = Some(exists(&alive));
    main.readiness_probe = Some(exists(&there));
    for name in ["alive", "stay"] {
        site.put(name, "")?;
    }
    let pod = Pod::new("leaving", vec![main]);
    pod.ensure(&client).await?;
    wait_for_health(&pod, &client, (true, true)).await?;
    pod.delete(&client, 600).await?;
    wait_for("TERM", SOON, async || {
        ensure!(told.exists(), "{:?}", pod.state(&client).await?);
        Ok(())
    })
    .await?;
    fs::remove_file(&alive)?;
    // Twice there and back takes longer than the period of liveness.
    for _ in 0..2 {
        fs::remove_file(&there)?;
        wait_for_health(&pod, &client, (true, false)).await?;
        site.put("there", "")?;
        wait_for_health(&pod, &client, (true, true)).await?;
    }
    let notes = pod.state(&client).await?.notes;
    let liveness = |note: &pb::PodNote| note.message.contains("iveness");
    ensure!(!notes.iter().any(liveness), "{notes:?}");
    fs::remove_file(&stay)?;
    pod.finished(&client, SOON).await?;
    Ok(())
}
