//! Compute nodes cannot reach the agent's port for shims (profile `isolated`): everything works, by job steps on demand.
//! The test runs alone, because it changes the network that all tests share.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use knoc_tests::{
    Background, Forward, PodBuilder, World,
    pod::some_port,
    wait_for,
    world::{SOON, exit_code},
};

/// The agent's port for shims.
const PORT: &str = "10351";

/// How long the agent may take to start on a busy machine.
const SCRIPT: Duration = Duration::from_mins(3);

/// How long a step and what it carries may take.
const MINUTE: Duration = Duration::from_mins(1);

/// Says what it was told and how long it took; its grace period is 40 s.
const POLITE: &str =
    "trap 'sleep 2; echo told; exit 3' TERM; while :; do echo tick; sleep 0.2; done";

/// Starts the agent without what it has found out about the network.
async fn agent_anew(world: &World) -> anyhow::Result<()> {
    world
        .service("agent.sh", "down")
        .deadline(SCRIPT)
        .ok()
        .await?;
    let found = format!("{}/shim-route.json", knoc_tests::world::STATE);
    world.on("login", ["rm", "-f", &found]).ok().await?;
    world
        .service("agent.sh", "up")
        .deadline(SCRIPT)
        .ok()
        .await?;
    Ok(())
}

#[tokio::test]
async fn everything_works_if_compute_nodes_cannot_reach_the_agent() -> anyhow::Result<()> {
    let world = World::new("isolated").await?;
    world.power("close-port", PORT).ok().await?;
    let seen = async {
        agent_anew(&world).await?;
        isolated(&world).await
    };
    let seen = seen.await;
    world.power("open-port", PORT).ok().await?;
    agent_anew(&world).await?;
    seen?;
    world.finish().await
}

async fn isolated(world: &World) -> anyhow::Result<()> {
    let port = some_port();
    let talker = PodBuilder::new("talker").sh(&format!("nc -ll -p {port} -e cat & {POLITE}"));
    let uid = world.running(&talker).await?;
    let mut logs = Background::start(world.kubectl(["logs", "-f", "talker"]))?;
    logs.expect("tick\ntick\n").await?;
    detected(world).await?;
    let steps = world
        .on("login", ["pgrep", "-fc", "knoc-agent connect"])
        .output()
        .await?;
    ensure!(steps.text().trim() == "0", "nobody needs a step: {steps}");
    // exec, with standard input and an exit code.
    let shell = ["exec", "-i", "talker", "--", "sh", "-c", "cat; exit 7"];
    let run = world
        .kubectl(shell)
        .stdin("through a step\n")
        .deadline(MINUTE);
    let answer = run.output().await?;
    ensure!(answer.text() == "through a step\n", "{answer}");
    ensure!(answer.to_string().contains("exit code 7"), "{answer}");
    // cp, with bytes of every value, there and back.
    let folder = tempfile::tempdir()?;
    let (from, back) = (folder.path().join("from"), folder.path().join("back"));
    let bytes: Vec<u8> = (0..=255_u8).cycle().take(3 << 20).collect();
    tokio::fs::write(&from, &bytes).await?;
    let (here, there) = (from.to_string_lossy().into_owned(), "talker:/tmp/copy");
    world
        .kubectl(["cp", &here, there])
        .deadline(MINUTE)
        .ok()
        .await?;
    let here = back.to_string_lossy().into_owned();
    world
        .kubectl(["cp", there, &here])
        .deadline(MINUTE)
        .ok()
        .await?;
    ensure!(
        tokio::fs::read(&back).await? == bytes,
        "cp changed the file"
    );
    // port-forward.
    let forward = world.kubectl(["port-forward", "talker", &format!(":{port}")]);
    let forward = Forward::start(forward).await?;
    ensure!(forward.exchange(b"echo").await? == b"echo");
    drop(forward);
    // The log went on all the time, and tells of the end with its grace.
    world.delete("talker", Some(40)).await?;
    logs.expect("told").await.context("the grace period")?;
    world.wait_gone("talker", MINUTE).await?;
    world.wait_no_job(&uid, SOON).await?;
    // A pod that nobody looks at needs no step.
    let quiet = world
        .run(&PodBuilder::new("quiet").sh("exit 5"), "Failed")
        .await?;
    ensure!(exit_code(&quiet, "main") == Some(5), "{:?}", quiet.status);
    Ok(())
}

/// Waits until doctor says so, and calls it no fault.
async fn detected(world: &World) -> anyhow::Result<()> {
    wait_for("doctor shows that nodes are isolated", MINUTE, async || {
        let findings = knoc_tests::doctor::examine(world.knocctl(["doctor"])).await?;
        let link = findings
            .iter()
            .find(|finding| finding.check == "link: shims");
        let link = link.context("no finding")?;
        let says = link
            .detail
            .contains("a job step on demand carries the link");
        ensure!(link.ok && says, "{link:#?}");
        Ok(())
    })
    .await
}
