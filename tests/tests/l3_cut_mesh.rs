//! Compute nodes do not reach each other: what pods send to each other at addresses of their own goes through the agent, completely and without
//! an Event. The test runs alone, because it changes the network that all tests share; `sweep.sh` removes what an interrupted run leaves.

use std::net::Ipv4Addr;

use anyhow::ensure;
use k8s_openapi::api::core::v1::Pod;
use knoc_tests::{Output, PodBuilder, World, own_addresses, wait_for, world::SOON};
use serde_json::json;

/// The port of slurmd, on which every compute node listens.
const SLURMD: u16 = 6818;
/// The size of the large file.
const LARGE: u32 = 4 << 20;

/// A pod in a network of its own that waits.
fn waiting(name: &str) -> PodBuilder {
    let resources = json!({"requests": {"cpu": "100m"}, "limits": {"memory": "64Mi"}});
    PodBuilder::new(name)
        .annotation("knoc.io/network", "private")
        .set("resources", resources)
        .command(["sleep", "3600"])
}

/// A web server, on the node of another partition.
fn server() -> PodBuilder {
    let serve = format!(
        "echo server >/www/name && head -c {LARGE} /dev/urandom >/www/large && exec httpd -f -p 80 -h /www"
    );
    waiting("server")
        .annotation("knoc.io/partition", "gpu")
        .empty_dir("/www")
        .sh(&serve)
}

/// A pod and where it is.
struct Place {
    uid: String,
    /// Its compute node, and the address of that.
    node: String,
    host: String,
    /// Its own address.
    address: Ipv4Addr,
}

impl Place {
    async fn of(world: &World, pod: &PodBuilder) -> anyhow::Result<Self> {
        let uid = world.running(pod).await?;
        let known = |pod: &Pod| {
            let status = pod.status.as_ref()?;
            let address: Ipv4Addr = status.pod_ip.as_ref()?.parse().ok()?;
            let host = status.host_ip.clone()?;
            (host != address.to_string()).then_some((address, host))
        };
        let what = "it has an address of its own";
        let (address, host) = world.wait_for_state(pod.name(), what, SOON, known).await?;
        let node = world.compute_node(&uid).await?;
        Ok(Self {
            uid,
            node,
            host,
            address,
        })
    }
}

/// Has a node reject what it would send to that address (`add`), or not any more (`del`).
async fn rule(world: &World, node: &str, action: &str, to: &str) -> anyhow::Result<()> {
    let rule = ["ip", "rule", action, "priority", "13", "to", to, "prohibit"];
    world.on_as_root(node, rule).ok().await.map(drop)
}

#[tokio::test]
async fn pods_whose_nodes_do_not_reach_each_other_do_so_through_the_agent() -> anyhow::Result<()> {
    let world = World::new("cut-mesh").await?;
    let checked = async {
        own_addresses::begin(&world).await?;
        check(&world).await
    };
    let checked = checked.await;
    let ended = own_addresses::end(&world).await;
    checked?;
    ended?;
    world.finish().await
}

async fn check(world: &World) -> anyhow::Result<()> {
    let server = Place::of(world, &server()).await?;
    // Slurm is to choose another node for the client.
    let pod = waiting("client");
    let client = world
        .away_from(&server.node, async || Place::of(world, &pod).await)
        .await?;
    ensure!(server.node != client.node, "both are on {}", server.node);
    let before = reaches_node(world, &client.node, &server.host).await?;
    ensure!(before.code == 0, "{before}");
    let ends = [(&server.node, &client.host), (&client.node, &server.host)];
    let reached = async {
        for (node, to) in ends {
            rule(world, node, "add", to).await?;
        }
        reached(world, &server, &client).await
    };
    let reached = reached.await;
    // Both, whatever has failed.
    let mut restored = Ok(());
    for (node, to) in ends {
        restored = restored.and(rule(world, node, "del", to).await);
    }
    reached.and(restored)
}

/// Whether a program on one node reaches the other one.
async fn reaches_node(world: &World, node: &str, other: &str) -> anyhow::Result<Output> {
    let dial = format!("exec 3<>/dev/tcp/{other}/{SLURMD}");
    let dial = world.on(node, ["timeout", "10", "bash", "-c", &dial]);
    dial.output().await
}

async fn reached(world: &World, server: &Place, client: &Place) -> anyhow::Result<()> {
    let cut = reaches_node(world, &client.node, &server.host).await?;
    ensure!(cut.code != 0, "the nodes still reach each other");
    let there = server.address;
    let inside = async |uid: &str, script: &str| {
        let run = world.exec(uid, "main", ["sh", "-c", script]);
        run.output().await
    };
    let ask = format!("wget -T 5 -qO- http://{there}/name");
    wait_for("an answer through the agent", SOON * 2, async || {
        let answer = inside(&client.uid, &ask).await?;
        ensure!(answer.text() == "server", "{answer}");
        Ok(())
    })
    .await?;
    let sent = inside(&server.uid, "md5sum </www/large").await?.text();
    let fetch = format!("wget -T 20 -qO- http://{there}/large | md5sum");
    let arrived = inside(&client.uid, &fetch).await?.text();
    ensure!(sent == arrived && !sent.is_empty(), "{sent}: {arrived}");
    let events = world.events("client").await?;
    let told = events
        .iter()
        .any(|event| event.starts_with("PodUnreachable"));
    ensure!(!told, "{events:?}");
    Ok(())
}
