//! Compute nodes cannot reach the agent's port for shims (profile `isolated`): everything works, by job steps on demand.
//! The test runs alone, because it changes the network that all tests share.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Event;
use knoc_tests::{PodBuilder, World, one_pod::OnePod, wait_for};
use kube::api::ListParams;

/// The agent's port for shims.
const PORT: &str = "10351";

/// How long a step and what it carries may take.
const MINUTES: Duration = Duration::from_mins(3);

/// Starts the agent without what it has found out about the network.
async fn agent_anew(world: &World) -> anyhow::Result<()> {
    world.service("agent.sh", "down").ok().await?;
    let found = format!("{}/shim-route.json", knoc_tests::world::STATE);
    world.on("login", ["rm", "-f", &found]).ok().await?;
    world.service("agent.sh", "up").ok().await?;
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
    let pod = OnePod::start(world).await?;
    detected(world).await?;
    let steps = world
        .on("login", ["pgrep", "-fc", "knoc-agent connect"])
        .output()
        .await?;
    ensure!(steps.text().trim() == "0", "nobody needs a step: {steps}");
    refused(world).await?;
    pod.streams(world).await?;
    pod.ends(world).await
}

/// Connects to the API server again and again.
const CURIOUS: &str = "while :; do wget -T 30 -O- http://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/ 2>&1; sleep 1; done";

/// A pod's connections to the cluster are reset, and one Event says why; names resolve as on the node.
async fn refused(world: &World) -> anyhow::Result<()> {
    for network in ["private", "host"] {
        let pod = PodBuilder::new(network).annotation("knoc.io/network", network);
        world.running(&pod.sh(CURIOUS)).await?;
        let of = ListParams::default().fields(&format!("involvedObject.name={network}"));
        let message = wait_for("the Event", MINUTES, async || {
            let events = world.api::<Event>().list(&of).await?.items;
            let mut refused = events
                .iter()
                .filter(|event| event.reason.as_deref() == Some("EgressRefused"));
            let first = refused.next().with_context(|| format!("{events:?}"))?;
            ensure!(refused.next().is_none(), "{events:?}");
            first.message.clone().context("no message")
        })
        .await?;
        ensure!(message.contains("do not reach the agent"), "{message}");
        world.delete(network, Some(0)).await?;
        world.wait_gone(network, MINUTES).await?;
    }
    Ok(())
}

/// Waits until doctor says so, and calls it no fault.
async fn detected(world: &World) -> anyhow::Result<()> {
    wait_for(
        "doctor shows that nodes are isolated",
        MINUTES,
        async || {
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
        },
    )
    .await
}
