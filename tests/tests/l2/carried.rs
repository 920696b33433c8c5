//! Level 2: compute nodes cannot dial the agent. Here they dial a port where nobody listens; the `local` scheduler enters
//! a job by running the command on this host.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use knoc_proto::{
    pb::{
        self, EgressControl, EgressInput, agent_client::AgentClient, egress_control::Control,
        egress_input::Input,
    },
    reason::ErrorReason,
};
use knoc_tests::{
    Background,
    site::{CLUSTER, Options, Pod, Site, brief, container, containers_run, processes_naming},
    wait_for,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, transport::Channel};

const SOON: Duration = Duration::from_mins(2);

fn cut_off(limits: &str, tables: &str) -> Options {
    Options {
        limits: limits.to_owned(),
        tables: tables.to_owned(),
        ..Options::cut_off()
    }
}

fn shell(uid: &str, script: &str) -> Pod {
    Pod::new(
        uid,
        vec![container("main", &["/bin/sh", "-c", script], &[])],
    )
}

/// Waits until the pod runs; its shim has no link.
async fn runs(site: &Site, pod: &Pod, client: &AgentClient<Channel>) -> anyhow::Result<()> {
    let seen = pod
        .wait_for_state(client, "it runs", 2 * SOON, containers_run)
        .await;
    seen.map(drop).with_context(|| site.log())
}

const FOREVER: &str = "trap 'exit 3' TERM; while :; do sleep 0.05; done";

async fn route(client: &AgentClient<Channel>) -> anyhow::Result<String> {
    let info = client
        .clone()
        .get_info(pb::GetInfoRequest::default())
        .await?;
    Ok(info.into_inner().shim_route)
}

/// Waits until the agent knows that shims cannot dial it.
async fn isolated(site: &Site, client: &AgentClient<Channel>) -> anyhow::Result<()> {
    let known = wait_for("the agent knows it", SOON, async || {
        let route = route(client).await?;
        ensure!(route.contains("a job step on demand"), "{route}");
        Ok(())
    });
    known.await.with_context(|| site.log())
}

/// The job steps that name the pod's job directory.
fn steps(site: &Site, uid: &str) -> Vec<String> {
    let all = processes_naming(&site.jobdir(uid)).into_iter();
    let named = all.map(|(_, argv)| argv);
    named.filter(|argv| argv.contains(" connect ")).collect()
}

async fn steps_are(site: &Site, uid: &str, count: usize) -> anyhow::Result<()> {
    wait_for("the job steps", SOON, async || {
        let found = steps(site, uid);
        ensure!(found.len() == count, "{found:?}");
        Ok(())
    })
    .await
    .with_context(|| site.log())
}

async fn echoes(pod: &Pod, client: &AgentClient<Channel>) -> anyhow::Result<()> {
    let (output, code) = pod
        .exec(client, "main", &["cat"], b"through the step")
        .await?;
    ensure!((&*output, code) == (b"through the step", 0), "{output:?}");
    Ok(())
}

#[tokio::test]
async fn a_step_carries_the_link_on_demand_and_ends_when_it_is_idle() -> anyhow::Result<()> {
    let options = cut_off("srun_idle = \"500ms\"", "");
    let (site, agent, client) = Site::start(options).await?;
    let pod = shell("carried", FOREVER);
    pod.ensure(&client).await?;
    runs(&site, &pod, &client).await?;
    isolated(&site, &client).await?;
    ensure!(steps(&site, "carried").is_empty(), "nobody needs the link");
    echoes(&pod, &client).await.with_context(|| site.log())?;
    // A stream in use keeps its step far longer than the idle time.
    let args = [
        "exec",
        "carried",
        "--",
        "sh",
        "-c",
        "echo in; exec sleep 1000",
    ];
    let mut open = Background::start(site.knocctl(args)?)?;
    open.expect("in").await?;
    let begun = std::time::Instant::now();
    wait_for("three idle times", SOON, async || {
        let passed = begun.elapsed();
        ensure!(passed > Duration::from_millis(1500), "{passed:?}");
        Ok(())
    })
    .await?;
    ensure!(
        steps(&site, "carried").len() == 1,
        "{:?}",
        steps(&site, "carried")
    );
    open.kill().await?;
    steps_are(&site, "carried", 0).await?;
    // The agent that follows remembers it, and shims need not report it again.
    agent.terminate().await?;
    let _agent = site.agent(&[]).await?;
    isolated(&site, &client).await?;
    let finding = site.knocctl(["doctor"])?.output().await?.text();
    ensure!(
        finding.contains("compute nodes cannot reach the agent"),
        "{finding}"
    );
    let ready = wait_for("exec after the restart", SOON, async || {
        echoes(&pod, &client).await
    });
    ready.await.with_context(|| site.log())?;
    Ok(())
}

#[tokio::test]
async fn a_deletion_over_a_carried_link_has_its_grace_and_its_reason() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(cut_off("", "")).await?;
    let pod = shell("graceful", FOREVER);
    pod.ensure(&client).await?;
    runs(&site, &pod, &client).await?;
    isolated(&site, &client).await?;
    pod.delete(&client, 20).await?;
    let outcome = pod
        .finished(&client, SOON)
        .await
        .with_context(|| site.log())?;
    ensure!(outcome.reason == "Deleted", "{outcome:?}");
    let ended = pod.terminated(&client, "main").await?;
    ensure!(ended.exit_code == 3, "{ended:?}");
    let told = std::fs::read_to_string(site.path("agent.log"))?;
    ensure!(!told.contains("stop by a signal"), "{}", site.log());
    steps_are(&site, "graceful", 0).await
}

#[tokio::test]
async fn the_number_of_steps_is_bounded_and_an_idle_one_gives_way() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(cut_off("srun_links = 1", "")).await?;
    let (first, second) = (shell("first", FOREVER), shell("second", FOREVER));
    for pod in [&first, &second] {
        pod.ensure(&client).await?;
        runs(&site, pod, &client).await?;
    }
    isolated(&site, &client).await?;
    let args = [
        "exec",
        "first",
        "--",
        "sh",
        "-c",
        "echo in; exec sleep 1000",
    ];
    let mut open = Background::start(site.knocctl(args)?)?;
    open.expect("in").await.with_context(|| site.log())?;
    let error = echoes(&second, &client)
        .await
        .err()
        .context("a second step")?;
    let status = error.downcast_ref::<Status>().context("a status")?;
    ensure!(
        ErrorReason::of(status) == Some(ErrorReason::Overloaded),
        "{status}"
    );
    ensure!(status.message().contains("limits.srun_links"), "{status}");
    open.kill().await?;
    let free = wait_for("the place is free", SOON, async || {
        echoes(&second, &client).await
    });
    free.await.with_context(|| site.log())?;
    steps_are(&site, "first", 0).await?;
    steps_are(&site, "second", 1).await
}

#[tokio::test]
async fn values_in_memory_reach_a_pod_whose_shim_cannot_dial() -> anyhow::Result<()> {
    let options = cut_off("", "[values]\nat_rest = \"none\"");
    let (site, _agent, client) = Site::start(options).await?;
    let pod = shell("memory", "exit $CODE").env("main", &[("CODE".into(), "4".into())]);
    pod.ensure(&client).await?;
    pod.finished(&client, 2 * SOON)
        .await
        .with_context(|| site.log())?;
    let ended = pod.terminated(&client, "main").await?;
    let seen = pod.state(&client).await?;
    ensure!(ended.exit_code == 4, "{ended:?} {}", brief(&seen));
    Ok(())
}

#[tokio::test]
async fn without_steps_the_error_says_what_is_missing() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::without_link()).await?;
    let pod = shell("alone", FOREVER);
    pod.ensure(&client).await?;
    runs(&site, &pod, &client).await?;
    wait_for("the error names the setting", SOON, async || {
        let error = echoes(&pod, &client).await.err().context("no error")?;
        let text = format!("{error:#}");
        ensure!(text.contains("limits.srun_links = 0"), "{text}");
        Ok(())
    })
    .await
    .with_context(|| site.log())
}

/// A kubelet may take a connection that a shim announced before its link was lost.
#[tokio::test]
async fn taking_a_connection_of_a_pod_without_a_link_starts_no_step() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(cut_off("", "")).await?;
    let pod = shell("announced", FOREVER);
    pod.ensure(&client).await?;
    runs(&site, &pod, &client).await?;
    isolated(&site, &client).await?;
    // Over TLS only a kubelet that leads the node may take its connections.
    let mut client = site.socket_client()?;
    let (controls, sent) = mpsc::channel(1);
    let caller = pb::EgressCaller {
        cluster_id: CLUSTER.to_owned(),
        ..pb::EgressCaller::default()
    };
    controls
        .send(EgressControl {
            control: Some(Control::Network(pb::EgressNetwork::default())),
            caller: Some(caller),
        })
        .await?;
    let _attempts = client.watch_egress(ReceiverStream::new(sent)).await?;
    let (input, inputs) = mpsc::channel(1);
    let start = pb::EgressStart {
        uid: "announced".to_owned(),
        id: 1,
        service: "default/kubernetes".to_owned(),
        port: 443,
    };
    input
        .send(EgressInput {
            input: Some(Input::Start(start)),
        })
        .await?;
    let taken = client.egress_stream(ReceiverStream::new(inputs)).await;
    let status = taken.err().context("the connection was taken")?;
    ensure!(
        ErrorReason::of(&status) == Some(ErrorReason::ShimUnreachable),
        "{status:?}"
    );
    ensure!(
        !status.message().contains("job step could"),
        "a step was tried: {status:?}"
    );
    let found = steps(&site, "announced");
    ensure!(found.is_empty(), "{found:?}");
    Ok(())
}
