//! Level 3: agent and kubelet die on the real stack, at each boundary of an effect and at random
//! moments under load. Alone, one test after the other: what they kill, all tests share.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures::future::try_join_all;
use knoc_tests::{PodBuilder, World, wait_for};

/// From a restart to the right state.
const RIGHT: Duration = Duration::from_mins(2);

/// Of one of the test bed's scripts.
const SCRIPT: Duration = Duration::from_mins(1);

/// Kills under load; level 2 has the fifty.
const KILLS: usize = 10;

/// Pods of the load.
const LOAD: usize = 20;

/// The exit code of a job that lost its claim.
const SURPLUS: &str = "|66:";

/// Brings the service up with that crash point armed; without one, up as it should be.
async fn start(world: &World, script: &str, point: &str) -> anyhow::Result<()> {
    let run = world.service(script, "up").deadline(SCRIPT);
    if point.is_empty() {
        run.ok().await?;
    } else {
        // It may die before the script has seen it ready.
        run.env("KNOC_CRASH_AT", point).output().await?;
    }
    Ok(())
}

async fn dead(world: &World, script: &str, point: &str) -> anyhow::Result<()> {
    wait_for(&format!("{script} dies at {point}"), RIGHT, async || {
        let running = world.service(script, "running").output().await;
        let running = running.map_err(|error| format!("{error:#}"))?;
        if running.code == 0 {
            Err("it runs".to_owned())
        } else {
            Ok(())
        }
    })
    .await
}

/// The jobs of a pod that did not stand back: one that ran its containers, and no other.
async fn ran_once(world: &World, uid: &str, point: &str) -> anyhow::Result<()> {
    let jobs = world.jobs(uid).await?;
    let ran = jobs.iter().filter(|job| !job.contains(SURPLUS)).count();
    ensure!(ran == 1, "{point}: {jobs:?}");
    Ok(())
}

async fn dies_at(script: &str, point: &str) -> anyhow::Result<()> {
    let world = World::new("crash").await?;
    let deleting = point.contains("delete");
    // A pod that has ended is removed by the API server itself: the kubelet deletes only what still ran.
    let script_of_pod = if deleting {
        "trap 'exit 0' TERM; while :; do sleep 0.1; done"
    } else {
        "echo once; sleep 1; echo end"
    };
    let pod = PodBuilder::new("crash").sh(script_of_pod);
    world.service(script, "kill").ok().await?;
    start(&world, script, if deleting { "" } else { point }).await?;
    let uid = world.create(&pod).await?;
    if deleting {
        world.wait_phase("crash", "Running", RIGHT).await?;
        world.service(script, "kill").ok().await?;
        start(&world, script, point).await?;
        world.delete("crash", None).await?;
    }
    dead(&world, script, point).await?;
    start(&world, script, "").await?;
    if !deleting {
        world.wait_phase("crash", "Succeeded", RIGHT).await?;
        let log = world.logs("crash", "main").await?;
        ensure!(log == "once\nend\n", "{point}: {log:?}");
        world.delete("crash", None).await?;
    }
    world.wait_gone("crash", RIGHT).await?;
    world.wait_no_job(&uid, RIGHT).await?;
    ran_once(&world, &uid, point).await?;
    world.finish().await
}

#[tokio::test]
async fn the_kubelet_dies_at_each_boundary() -> anyhow::Result<()> {
    for effect in ["ensure", "patch", "delete"] {
        for side in ["before", "after"] {
            let point = format!("kubelet.{effect}.{side}");
            dies_at("kubelet.sh", &point).await.context(point)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_agent_dies_at_each_boundary() -> anyhow::Result<()> {
    for effect in ["record", "sbatch", "report"] {
        for side in ["before", "after"] {
            let point = format!("agent.{effect}.{side}");
            dies_at("agent.sh", &point).await.context(point)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn agent_and_kubelet_die_at_random_moments_under_load() -> anyhow::Result<()> {
    let world = World::new("random").await?;
    let pods: Vec<PodBuilder> = (0..LOAD)
        .map(|at| PodBuilder::new(&format!("load-{at}")).sh(&format!("sleep {}; exit 0", at % 7)))
        .collect();
    let uids = try_join_all(pods.iter().map(|pod| world.create(pod))).await?;
    for kill in 0..KILLS {
        let script = if kill % 2 == 0 {
            "agent.sh"
        } else {
            "kubelet.sh"
        };
        let moment = Duration::from_millis(rand::random_range(0..1500));
        tokio::time::sleep(moment).await;
        world.service(script, "kill").ok().await?;
        start(&world, script, "")
            .await
            .with_context(|| format!("kill {kill}"))?;
    }
    for (pod, uid) in pods.iter().zip(&uids) {
        world.wait_phase(pod.name(), "Succeeded", RIGHT).await?;
        ran_once(&world, uid, pod.name()).await?;
        world.delete(pod.name(), None).await?;
    }
    for (pod, uid) in pods.iter().zip(&uids) {
        world.wait_gone(pod.name(), RIGHT).await?;
        world.wait_no_job(uid, RIGHT).await?;
    }
    world.finish().await
}
