//! Deletion on the real stack: of a queued pod, of a running pod, and by force.

use std::time::{Duration, Instant};

use anyhow::ensure;
use k8s_openapi::api::core::v1::Pod;
use knoc_tests::{
    PodBuilder, World,
    world::{SOON, exit_code},
};

/// Tells the test that it ignores TERM from now on.
const STUBBORN: &str = "trap '' TERM; echo ready; while :; do sleep 1; done";

#[tokio::test]
async fn a_queued_pod_says_why_it_waits_and_is_cancelled_when_deleted() -> anyhow::Result<()> {
    let world = World::new("queued").await?;
    let first = world
        .create(&PodBuilder::new("first").sh("sleep 600"))
        .await?;
    let job = world.wait_job(&first).await?;
    let second =
        PodBuilder::new("second").annotation("knoc.io/dependency", &format!("afterany:{job}"));
    let uid = world.create(&second).await?;
    world
        .wait_for_state("second", "Pending, with the reason of Slurm", SOON, |pod| {
            serde_json::to_string(&pod.status)
                .ok()
                .filter(|status| status.contains("Dependency"))
        })
        .await?;
    world.delete("second", None).await?;
    world.wait_gone("second", SOON).await?;
    world.wait_no_job(&uid, SOON).await?;
    // sacct never shows a job that was never eligible.
    let name = format!("knoc-{uid}");
    let known = ["squeue", "-h", "-t", "all", "-o", "%T", "--name", &name];
    let states = world.on("login", known).ok().await?.text();
    ensure!(states == "CANCELLED", "{states}");
    world.delete("first", Some(1)).await?;
    world.wait_gone("first", SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn a_running_pod_has_its_grace_and_is_gone_only_after_its_job() -> anyhow::Result<()> {
    /// How long its program takes to stop.
    const STOPS: Duration = Duration::from_secs(1);
    let world = World::new("running").await?;
    let script = "trap 'echo stopping; sleep 1; echo stopped; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let pod = PodBuilder::new("graceful").sh(script);
    let uid = world.create(&pod).await?;
    world.wait_phase("graceful", "Running", SOON).await?;
    // The trap must be set before the signal arrives.
    world.wait_log("graceful", "main", "ready").await?;
    let began = Instant::now();
    // Longer than this test waits: a pod whose program has ended does not use it up.
    world.delete("graceful", Some(600)).await?;
    let code = knoc_tests::wait_for("its exit code, or its end", SOON, async || {
        match world.api::<Pod>().get_opt("graceful").await? {
            // The object may be gone before we look.
            None => Ok(None),
            Some(pod) => match exit_code(&pod, "main") {
                None => Err(anyhow::anyhow!("{:?}", pod.status)),
                code => Ok(code),
            },
        }
    })
    .await?;
    ensure!(code.is_none_or(|code| code == 5), "{code:?}");
    world.wait_gone("graceful", SOON).await?;
    let took = began.elapsed();
    ensure!(took >= STOPS, "gone after {took:?}, before its program");
    world.wait_no_job(&uid, SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn a_pod_that_ignores_term_is_killed_after_its_grace() -> anyhow::Result<()> {
    let world = World::new("stubborn").await?;
    let uid = world
        .running(&PodBuilder::new("stubborn").sh(STUBBORN))
        .await?;
    world.wait_log("stubborn", "main", "ready").await?;
    world.delete("stubborn", Some(2)).await?;
    world.wait_gone("stubborn", SOON).await?;
    world.wait_no_job(&uid, SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn a_pod_deleted_by_force_leaves_no_job() -> anyhow::Result<()> {
    let world = World::new("forced").await?;
    let uid = world
        .running(&PodBuilder::new("forced").sh(STUBBORN))
        .await?;
    world.wait_log("forced", "main", "ready").await?;
    world
        .kubectl([
            "delete",
            "pod",
            "forced",
            "--force",
            "--grace-period=0",
            "--wait=false",
        ])
        .ok()
        .await?;
    world.wait_gone("forced", SOON).await?;
    world.wait_no_job(&uid, SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn a_new_pod_of_the_same_name_is_another_pod() -> anyhow::Result<()> {
    let world = World::new("again").await?;
    let first = world
        .running(&PodBuilder::new("twin").sh("sleep 600"))
        .await?;
    world.delete("twin", Some(0)).await?;
    world.wait_gone("twin", SOON).await?;
    world
        .run(&PodBuilder::new("twin").sh("echo second"), "Succeeded")
        .await?;
    ensure!(world.logs("twin", "main").await? == "second\n");
    world.wait_no_job(&first, SOON).await?;
    world.finish().await
}
