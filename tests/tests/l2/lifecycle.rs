//! Level 2: the lifecycle of a pod on the real agent and shim, with the embedded scheduler and no container runtime.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use knoc_proto::{
    pb::{self, agent_client::AgentClient},
    reason::ErrorReason,
};
use knoc_tests::{
    site::{CLUSTER, Options, Pod, Site, brief, container, containers_run, nothing_names},
    wait_for,
};
use tonic::transport::Channel;

const SOON: Duration = Duration::from_mins(2);

fn shell(name: &str, script: &str) -> pb::Container {
    container(name, &["/bin/sh", "-c", script], &[])
}

/// Checks that the request was rejected for that reason; returns the error.
fn refused<T>(
    answer: Result<T, tonic::Status>,
    reason: ErrorReason,
) -> anyhow::Result<tonic::Status> {
    let refused = answer.err().context("it was accepted")?;
    ensure!(ErrorReason::of(&refused) == Some(reason), "{refused}");
    Ok(refused)
}

fn change(pod: &Pod, edit: impl FnOnce(&mut pb::PodSpec)) -> Pod {
    let mut changed = pod.clone();
    if let Some(spec) = &mut changed.request.spec {
        edit(spec);
    }
    changed
}

async fn logs_ready(pod: &Pod, client: &AgentClient<Channel>) -> anyhow::Result<()> {
    wait_for("ready in the log", SOON, async || {
        let log = pod.log(client, "main").await?;
        if log == "ready\n" {
            Ok(())
        } else {
            Err(anyhow::anyhow!("{log:?}"))
        }
    })
    .await
}

#[tokio::test]
async fn exit_codes_and_signals_decide_the_outcome() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    for (uid, script, code, signal, kind) in [
        ("good", "echo fine", 0, 0, pb::OutcomeKind::Succeeded),
        ("bad", "exit 7", 7, 0, pb::OutcomeKind::Failed),
        ("killed", "kill -9 $$$$", 137, 9, pb::OutcomeKind::Failed),
    ] {
        let pod = Pod::new(uid, vec![shell("main", script)]);
        pod.ensure(&client).await?;
        let outcome = pod
            .finished(&client, SOON)
            .await
            .with_context(|| site.log())?;
        ensure!(outcome.kind() == kind, "{uid}: {outcome:?}");
        let ended = pod.terminated(&client, "main").await?;
        ensure!(
            (ended.exit_code, ended.signal) == (code, signal),
            "{uid}: {ended:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn init_containers_come_first_and_in_order() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let notes = site.path("notes");
    let note = |word: &str| shell(word, &format!("echo {word} >>{}", notes.display()));
    let pod = Pod::new("ordered", vec![note("third"), shell("fourth", "true")]);
    let pod = change(&pod, |spec| {
        spec.init_containers = vec![note("first"), note("second")];
    });
    pod.ensure(&client).await?;
    pod.succeeded(&client, SOON)
        .await
        .with_context(|| site.log())?;
    let order = std::fs::read_to_string(&notes)?;
    ensure!(order == "first\nsecond\nthird\n", "{order}");
    Ok(())
}

#[tokio::test]
async fn a_failed_container_is_restarted_with_back_off_until_it_succeeds() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let count = site.path("count");
    let script = format!("echo x >>{0}; [ $(wc -l <{0}) = 3 ]", count.display());
    let pod = Pod::new("again", vec![shell("main", &script)]);
    let pod = change(&pod, |spec| {
        spec.set_restart_policy(pb::RestartPolicy::OnFailure);
    });
    pod.ensure(&client).await?;
    pod.succeeded(&client, SOON)
        .await
        .with_context(|| site.log())?;
    let seen = pod.state(&client).await?;
    ensure!(
        seen.containers[0].restart_count == 2,
        "{:?}",
        seen.containers
    );
    Ok(())
}

/// If compute nodes cannot reach the agent, the files give a pod's status, and a signal ends it with its grace period.
#[tokio::test]
async fn a_pod_whose_link_never_comes_up_has_a_status_and_logs_and_is_deleted() -> anyhow::Result<()>
{
    let (site, _agent, client) = Site::start(Options::without_link()).await?;
    let script = "trap 'sleep 1; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
    let pod = Pod::new("unlinked", vec![shell("main", script)]);
    pod.ensure(&client).await?;
    let without_link = |seen: &pb::PodObserved| containers_run(seen) && !seen.shim_connected;
    pod.wait_for_state(&client, "it runs without a link", 2 * SOON, without_link)
        .await
        .with_context(|| site.log())?;
    logs_ready(&pod, &client)
        .await
        .with_context(|| site.log())?;
    pod.delete(&client, 20).await?;
    let outcome = pod.finished(&client, SOON).await?;
    ensure!(outcome.reason == "Deleted", "{outcome:?}");
    let ended = pod.terminated(&client, "main").await?;
    ensure!(ended.exit_code == 3, "{ended:?}");
    Ok(())
}

/// As on any node, even if the container then exits with 0; over the link, and by a signal if there is no link.
#[tokio::test]
async fn a_running_pod_obeys_a_deadline_that_is_lowered() -> anyhow::Result<()> {
    for options in [Options::default(), Options::without_link()] {
        let (site, _agent, client) = Site::start(options).await?;
        let script = "trap 'echo told; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
        let pod = change(&Pod::new("lowered", vec![shell("main", script)]), |spec| {
            spec.active_deadline_seconds = 3600;
            spec.termination_grace_period_seconds = 20;
        });
        pod.ensure(&client).await?;
        pod.wait_for_state(&client, "it runs", 2 * SOON, containers_run)
            .await
            .with_context(|| site.log())?;
        logs_ready(&pod, &client)
            .await
            .with_context(|| site.log())?;
        let lowered = change(&pod, |spec| {
            spec.generation = 2;
            spec.active_deadline_seconds = 1;
        });
        lowered.ensure(&client).await?;
        let outcome = pod
            .finished(&client, 2 * SOON)
            .await
            .with_context(|| site.log())?;
        ensure!(outcome.reason == "DeadlineExceeded", "{outcome:?}");
        let seen = pod.state(&client).await?;
        ensure!(!seen.deleting, "{}", brief(&seen));
        let ended = pod.terminated(&client, "main").await?;
        ensure!(ended.exit_code == 0, "it had its grace: {ended:?}");
    }
    Ok(())
}

#[tokio::test]
async fn deletion_gives_grace_and_then_kills() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    for (uid, script, grace, code) in [
        (
            "polite",
            "trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done",
            60,
            3,
        ),
        (
            "deaf",
            "trap '' TERM; echo ready; while :; do sleep 0.05; done",
            1,
            137,
        ),
    ] {
        let pod = Pod::new(uid, vec![shell("main", script)]);
        pod.ensure(&client).await?;
        logs_ready(&pod, &client)
            .await
            .with_context(|| site.log())?;
        pod.delete(&client, grace).await?;
        pod.finished(&client, SOON).await?;
        let seen = pod.state(&client).await?;
        ensure!(seen.deleting, "{}", brief(&seen));
        let ended = pod.terminated(&client, "main").await?;
        ensure!(ended.exit_code == code, "{uid}: {ended:?}");
        pod.remove(&client).await?;
        ensure!(!site.jobdir(uid).exists());
    }
    Ok(())
}

#[tokio::test]
async fn a_grace_period_longer_than_any_clock_ends_nobody_else() -> anyhow::Result<()> {
    let (_site, _agent, client) = Site::start(Options::default()).await?;
    let script = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.1; done";
    let pod = Pod::new("patient", vec![shell("main", script)]);
    let pod = change(&pod, |spec| {
        spec.termination_grace_period_seconds = i64::MAX;
    });
    pod.ensure(&client).await?;
    pod.running(&client, SOON).await?;
    logs_ready(&pod, &client).await?;
    pod.delete(&client, i64::MAX).await?;
    pod.finished(&client, SOON).await?;
    ensure!(pod.terminated(&client, "main").await?.exit_code == 0);
    Ok(())
}

#[tokio::test]
async fn a_restarted_agent_finds_what_runs_and_what_ended_meanwhile() -> anyhow::Result<()> {
    let (site, agent, client) = Site::start(Options::default()).await?;
    let short = Pod::gated(&site, "short")?;
    let long = Pod::gated(&site, "long")?;
    for pod in [&short, &long] {
        pod.ensure(&client).await?;
        let runs = |seen: &pb::PodObserved| seen.phase() == pb::PodPhase::Running;
        pod.wait_for_state(&client, "it runs", SOON, runs).await?;
    }
    agent.kill().await?;
    // The job of the short pod ends while there is no agent.
    site.put("go-short", "")?;
    nothing_names(&site.jobdir("short"), None).await?;
    let _agent = site.agent(&[]).await?;
    site.put("go-long", "")?;
    for pod in [&short, &long] {
        pod.succeeded(&client, SOON)
            .await
            .with_context(|| site.log())?;
        ensure!(
            site.runs(pod.uid())? == 1,
            "{} ran more than once",
            pod.uid()
        );
    }
    Ok(())
}

#[tokio::test]
async fn the_same_pod_again_is_a_no_op_and_another_spec_is_a_conflict() -> anyhow::Result<()> {
    let (site, _agent, mut client) = Site::start(Options::default()).await?;
    let pod = Pod::gated(&site, "same")?;
    let created = client.ensure_pod(pod.request.clone()).await?.into_inner();
    ensure!(created.created);
    ensure!(
        !client
            .ensure_pod(pod.request.clone())
            .await?
            .into_inner()
            .created
    );
    // Somebody annotates the pod, which raises no generation, before it is sent again.
    let annotated = change(&pod, |spec| {
        spec.annotations.insert("note".into(), "new".into());
    });
    client.ensure_pod(annotated.request).await?;
    let other = change(&pod, |spec| {
        spec.generation = 2;
        spec.containers.push(shell("second", "true"));
    });
    let answer = client.ensure_pod(other.request).await;
    refused(answer, ErrorReason::SpecConflict)?;
    let labelled = change(&pod, |spec| {
        spec.generation = 2;
        spec.labels.insert("colour".into(), "blue".into());
    });
    client.ensure_pod(labelled.request).await?;
    let forget = pb::ForgetPodRequest {
        cluster_id: CLUSTER.into(),
        uid: "same".into(),
        ..pb::ForgetPodRequest::default()
    };
    let refused = client
        .forget_pod(forget)
        .await
        .err()
        .context("it was forgotten")?;
    ensure!(
        ErrorReason::of(&refused) == Some(ErrorReason::NotFinished),
        "{refused}"
    );
    site.put("go-same", "")?;
    pod.succeeded(&client, SOON).await?;
    ensure!(site.runs("same")? == 1);
    Ok(())
}

#[tokio::test]
async fn an_older_leader_and_another_cluster_are_refused() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let mut client = site.kubelet_client("a")?;
    let mut pod = Pod::new("led", vec![shell("main", "true")]);
    pod.request.leadership_epoch = 5;
    client.ensure_pod(pod.request.clone()).await?;
    let mut stale = Pod::new("stale", vec![shell("main", "true")]);
    stale.request.leadership_epoch = 4;
    let answer = client.ensure_pod(stale.request.clone()).await;
    refused(answer, ErrorReason::StaleLeader)?;
    stale.request.leadership_epoch = 6;
    stale.request.cluster_id = "another-cluster".into();
    let answer = client.ensure_pod(stale.request).await;
    refused(answer, ErrorReason::ClusterMismatch)?;
    Ok(())
}

/// Each node has its own Lease and epochs.
#[tokio::test]
async fn kubelets_of_two_nodes_share_an_agent() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    for (node, epoch) in [("a", 9), ("b", 3)] {
        let mut client = site.kubelet_client(node)?;
        let pod = Pod::new(node, vec![shell("main", "true")]);
        let mut pod = change(&pod, |spec| spec.node_name = node.into());
        pod.request.leadership_epoch = epoch;
        client.ensure_pod(pod.request.clone()).await?;
        pod.request.leadership_epoch = epoch - 1;
        refused(
            client.ensure_pod(pod.request).await,
            ErrorReason::StaleLeader,
        )?;
        let delete = pb::DeletePodRequest {
            leadership_epoch: epoch - 1,
            cluster_id: CLUSTER.into(),
            uid: node.into(),
            ..pb::DeletePodRequest::default()
        };
        refused(client.delete_pod(delete).await, ErrorReason::StaleLeader)?;
    }
    Ok(())
}

#[tokio::test]
async fn an_invalid_pod_is_refused_with_all_reasons() -> anyhow::Result<()> {
    let (_site, _agent, mut client) = Site::start(Options::default()).await?;
    let mut twice = Pod::new(
        "invalid",
        vec![shell("main", "true"), shell("main", "true")],
    );
    if let Some(spec) = &mut twice.request.spec {
        spec.containers[0].mounts.push(pb::Mount {
            volume: "nowhere".into(),
            path: "relative".into(),
            ..pb::Mount::default()
        });
    }
    let answer = client.ensure_pod(twice.request).await;
    let refused = refused(answer, ErrorReason::InvalidSpec)?;
    for word in ["main", "nowhere", "relative"] {
        ensure!(refused.message().contains(word), "{refused}");
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_leaves_nothing_in_the_home_directory() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    // The agent's home is the folder of the site.
    let names = || -> anyhow::Result<Vec<std::ffi::OsString>> {
        let entries = std::fs::read_dir(site.path("."))?;
        let mut names = entries
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<Result<Vec<_>, _>>()?;
        names.sort();
        Ok(names)
    };
    let before = names()?;
    let pod = Pod::new("guest", vec![shell("main", "exec sleep 600")]);
    pod.ensure(&client).await?;
    pod.running(&client, SOON)
        .await
        .with_context(|| site.log())?;
    pod.exec(&client, "main", &["/bin/true"], b"").await?;
    ensure!(names()? == before, "{:?}", names()?);
    pod.remove(&client).await?;
    ensure!(names()? == before, "{:?}", names()?);
    Ok(())
}
