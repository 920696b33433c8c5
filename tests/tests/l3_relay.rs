//! Services that lead to pods on the real stack, without kube-proxy, which l3_proxy has: the test reads EndpointSlices and dials what they
//! name, from this host, which is the kubelet's.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::{
    core::v1::Service, discovery::v1::EndpointSlice, networking::v1::NetworkPolicy,
};
use knoc_tests::{Forward, World, endpoint, stays, wait_for, web, world::SOON};
use kube::{
    Api,
    api::{DeleteParams, ListParams, PostParams},
};
use serde_json::json;
use tokio::{io::AsyncReadExt as _, net::TcpStream, task::JoinSet};

/// The size of the page of the web server.
const SIZE: usize = 1 << 20;
/// The size of the large download.
const HUGE: u64 = 1 << 30;
/// How long a pod must stay without an endpoint.
const QUEUED: Duration = Duration::from_secs(3);

async fn slices(world: &World) -> anyhow::Result<Vec<EndpointSlice>> {
    let of = ListParams::default().labels("endpointslice.kubernetes.io/managed-by=relay.knoc.io");
    Ok(world.api::<EndpointSlice>().list(&of).await?.items)
}

/// Waits until so many endpoints are ready; returns their addresses.
async fn ready(world: &World, count: usize) -> anyhow::Result<BTreeSet<SocketAddr>> {
    wait_for("ready endpoints", SOON, async || {
        let slices = slices(world).await?;
        let found: BTreeSet<SocketAddr> = slices.iter().filter_map(address).collect();
        ensure!(found.len() == count, "{slices:?}");
        Ok(found)
    })
    .await
}

/// The address of the slice's endpoint, if that is ready.
fn address(slice: &EndpointSlice) -> Option<SocketAddr> {
    let endpoint = slice.endpoints.iter().flatten().next()?;
    let ready = endpoint.conditions.as_ref()?.ready?;
    let port = slice.ports.iter().flatten().next()?.port?;
    let address = endpoint.addresses.first()?.parse().ok()?;
    ready.then_some(SocketAddr::new(address, u16::try_from(port).ok()?))
}

async fn refuses(world: &World, address: SocketAddr) -> anyhow::Result<()> {
    wait_for("a refusal", SOON, async || {
        let slices = slices(world).await?;
        ensure!(slices.is_empty(), "{slices:?}");
        endpoint::refuses(address).await
    })
    .await
}

#[tokio::test]
async fn a_service_leads_to_web_servers_in_jobs() -> anyhow::Result<()> {
    let world = World::new("relay").await?;
    web::service(&world, web::to_pods()).await?;
    world.running(&web::pod("one", SIZE)).await?;
    world.running(&web::pod("two", SIZE)).await?;
    let addresses = ready(&world, 2).await?;
    let mut names = BTreeSet::new();
    for address in &addresses {
        names.insert(web::name(*address).await?);
    }
    ensure!(
        names == BTreeSet::from(["one", "two"].map(str::to_owned)),
        "{names:?}"
    );
    // 200 at once to one of them, each with a page that is complete.
    let address = *addresses.first().context("no address")?;
    let mut fetches = JoinSet::new();
    for _ in 0..200 {
        fetches.spawn(async move { web::page(address, "/large").await });
    }
    while let Some(fetched) = fetches.join_next().await {
        ensure!(fetched??.len() == SIZE, "a page was cut");
    }
    // Kubernetes' own controllers publish nothing beside it, because the pods have no addresses.
    let of = ListParams::default().labels("kubernetes.io/service-name=web");
    let all = world.api::<EndpointSlice>().list(&of).await?.items;
    let endpoints = all
        .iter()
        .flat_map(|slice| slice.endpoints.iter().flatten());
    ensure!(endpoints.count() == 2, "{all:?}");
    for name in ["one", "two"] {
        world.delete(name, None).await?;
        world.wait_gone(name, SOON).await?;
    }
    refuses(&world, address).await?;
    world.finish().await
}

#[tokio::test]
async fn a_gibibyte_arrives_complete_and_kubectl_forwards_to_the_service() -> anyhow::Result<()> {
    let world = World::new("relay-large").await?;
    let mut spec = web::to_pods();
    spec["ports"] = json!([{"name": "bulk", "port": 8081}]);
    web::service(&world, spec).await?;
    let serve = format!(
        "mkdir /www && echo bulk >/www/name && echo yes >/www/ready && httpd -p 80 -h /www && exec nc -ll -p 8081 -e head -c {HUGE} /dev/zero"
    );
    world.running(&web::pod("bulk", SIZE).sh(&serve)).await?;
    let address = *ready(&world, 1).await?.first().context("no address")?;
    // The pod is ready when its web server is, perhaps before this listener.
    let mut stream = wait_for("the first byte", SOON, async || {
        let stream = TcpStream::connect(address).await?;
        let count = stream.peek(&mut [0]).await?;
        ensure!(count == 1, "the connection has ended");
        anyhow::Ok(stream)
    })
    .await?;
    let began = Instant::now();
    let (mut total, mut chunk) = (0_u64, vec![1; 1 << 18]);
    loop {
        match stream.read(&mut chunk).await? {
            0 => break,
            count => {
                let read = chunk.get(..count).context("more than the buffer")?;
                ensure!(read.iter().all(|byte| *byte == 0), "other bytes came");
                total += u64::try_from(count)?;
            }
        }
    }
    ensure!(total == HUGE, "{total} bytes of {HUGE}");
    println!("1 GiB in {:?}", began.elapsed());
    let services: Api<Service> = world.api();
    services.delete("web", &DeleteParams::default()).await?;
    refuses(&world, address).await?;
    web::service(&world, web::to_pods()).await?;
    ready(&world, 1).await?;
    let forward = Forward::start(world.kubectl(["port-forward", "service/web", ":80"])).await?;
    let answer = web::name(forward.address()).await?;
    ensure!(answer == "bulk", "{answer:?}");
    world.finish().await
}

#[tokio::test]
async fn a_pod_in_the_queue_is_published_once_its_job_runs() -> anyhow::Result<()> {
    let world = World::new("relay-queued").await?;
    let mut spec = web::to_pods();
    spec["publishNotReadyAddresses"] = json!(true);
    web::service(&world, spec).await?;
    let hold = ["sbatch", "--parsable", "--hold", "--wrap", "true"];
    let gate = world.on("login", hold).ok().await?.text();
    let pod =
        web::pod("queued", SIZE).annotation("knoc.io/dependency", &format!("afterany:{gate}"));
    let uid = world.create(&pod).await?;
    world.wait_job(&uid).await?;
    stays("no endpoint of a queued pod", QUEUED, async || {
        let slices = slices(&world).await?;
        ensure!(slices.is_empty(), "{slices:?}");
        Ok(())
    })
    .await?;
    let release = world.on("login", ["scontrol", "release", &gate]);
    release.ok().await?;
    let address = *ready(&world, 1).await?.first().context("no address")?;
    wait_for("the page", SOON, async || web::page(address, "/name").await).await?;
    world.finish().await
}

#[tokio::test]
async fn a_network_policy_ends_the_relay_and_its_removal_begins_it_again() -> anyhow::Result<()> {
    let world = World::new("relay-policy").await?;
    web::service(&world, web::to_pods()).await?;
    world.running(&web::pod("one", SIZE)).await?;
    let address = *ready(&world, 1).await?.first().context("no address")?;
    let policies: Api<NetworkPolicy> = world.api();
    let policy = json!({"metadata": {"name": "deny"}, "spec": {"podSelector": {"matchLabels": {"app": "web"}}}});
    let policy = serde_json::from_value(policy)?;
    policies.create(&PostParams::default(), &policy).await?;
    refuses(&world, address).await?;
    wait_for("the Event", SOON, async || {
        let events = world.events("one").await?;
        let told = events.iter().any(|event| {
            event.starts_with("RelayRefused: ") && event.contains("NetworkPolicy deny")
        });
        ensure!(told, "{events:?}");
        Ok(())
    })
    .await?;
    policies.delete("deny", &DeleteParams::default()).await?;
    let again = *ready(&world, 1).await?.first().context("no address")?;
    wait_for("the page", SOON, async || web::page(again, "/name").await).await?;
    world.finish().await
}

#[tokio::test]
async fn what_cannot_be_relayed_is_an_event() -> anyhow::Result<()> {
    let world = World::new("relay-refused").await?;
    let mut headless = web::to_pods();
    headless["clusterIP"] = json!("None");
    web::service(&world, headless).await?;
    world.running(&web::pod("one", SIZE)).await?;
    wait_for("the Event", SOON, async || {
        let events = world.events("one").await?;
        let told = events
            .iter()
            .any(|event| event.starts_with("RelayRefused: ") && event.contains("headless"));
        ensure!(told, "{events:?}");
        Ok(())
    })
    .await?;
    ensure!(slices(&world).await?.is_empty());
    world.finish().await
}
