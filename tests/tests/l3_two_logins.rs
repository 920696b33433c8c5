//! Profile `two-logins`: the agent moves between two login nodes that share its state directory, and the kubelet, which knows the
//! addresses of both, follows it. The tests run alone, because they move the agent that all tests share.

use std::time::Duration;

use anyhow::ensure;
use knoc_tests::{Background, PodBuilder, World, wait_for, world::SOON};

/// A heartbeat of an agent that has lost power counts for a minute (`knoc-agent/src/lease.rs`), and the kubelet pauses between its
/// attempts.
const FENCED: Duration = Duration::from_mins(5);

/// How many lines the pod writes; more than fit into a test.
const COUNT: &str =
    "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); echo line $i; sleep 0.1; done; sleep 600";

/// Stops the agent or starts it on that login node.
async fn agent(world: &World, action: &str, node: &str) -> anyhow::Result<()> {
    let run = world.service("agent.sh", action);
    let run = run.env("KNOC_AGENT_NODE", node);
    run.ok().await?;
    Ok(())
}

/// Waits until a command runs in the pod; returns how long that took.
async fn answers(world: &World, limit: Duration) -> anyhow::Result<()> {
    wait_for("the pod answers", limit, async || {
        let exec = ["exec", "talker", "--", "echo", "here"];
        let answer = world.kubectl(exec).ok().await?;
        ensure!(answer.text() == "here", "{answer}");
        Ok(())
    })
    .await
}

/// Checks that a follower has every line once, in order; returns how many.
fn lines(shown: &str) -> anyhow::Result<usize> {
    let mut last = 0;
    for line in shown.lines() {
        ensure!(line == format!("line {}", last + 1), "{line} after {last}");
        last += 1;
    }
    Ok(last)
}

/// Waits until the follower has a line that was written after this moment.
async fn follows_on(log: &Background) -> anyhow::Result<()> {
    let before = lines(&log.shown())?;
    wait_for("the log goes on", FENCED, async || {
        let now = lines(&log.shown())?;
        ensure!(now > before + 20, "{now} lines, {before} before");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_kubelet_follows_the_agent_to_the_other_login_node() -> anyhow::Result<()> {
    let world = World::new("two-logins").await?;
    let uid = world.running(&PodBuilder::new("talker").sh(COUNT)).await?;
    let mut log = Background::start(world.kubectl(["logs", "-f", "talker"]))?;
    log.expect("line 5\n").await?;
    let moved = async {
        // An orderly end, as in an upgrade or when a site moves services.
        agent(&world, "down", "login2").await?;
        agent(&world, "up", "login").await?;
        answers(&world, SOON).await?;
        follows_on(&log).await?;
        agent(&world, "down", "login").await?;
        agent(&world, "up", "login2").await?;
        answers(&world, SOON).await?;
        follows_on(&log).await?;
        // The login node with the agent loses power; the next agent waits until the lease is stale.
        world.power("node-down", "login2").ok().await?;
        let began = tokio::time::Instant::now();
        wait_for("the agent starts on the other node", FENCED, async || {
            agent(&world, "up", "login").await
        })
        .await?;
        answers(&world, FENCED).await?;
        follows_on(&log).await?;
        eprintln!("after {:?} the pod answered again", began.elapsed());
        world.one_job(&uid, "RUNNING").await
    };
    let moved = moved.await;
    world.power("node-up", "login2").ok().await?;
    agent(&world, "down", "login").await?;
    agent(&world, "up", "login2").await?;
    moved?;
    answers(&world, SOON).await?;
    world.finish().await
}
