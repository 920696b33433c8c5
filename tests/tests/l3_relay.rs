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
use knoc_tests::{Forward, PodBuilder, World, stays, wait_for, world::SOON};
use kube::{
    Api,
    api::{DeleteParams, ListParams, PostParams},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

/// The size of the page of the web server.
const SIZE: usize = 1 << 20;
/// The size of the large download.
const HUGE: u64 = 1 << 30;
/// How long a pod must stay without an endpoint.
const QUEUED: Duration = Duration::from_secs(3);

/// A web server on port 80 of a network of the pod's own, which is ready once it answers.
fn web(name: &str) -> PodBuilder {
    let serve = format!(
        "mkdir /www && echo {name} >/www/name && head -c {SIZE} /dev/zero >/www/large && exec httpd -f -p 80 -h /www"
    );
    let ready = json!({"httpGet": {"path": "/name", "port": 80}, "periodSeconds": 1});
    PodBuilder::new(name)
        .label("app", "web")
        .annotation("knoc.io/network", "private")
        .sh(&serve)
        .set(
            "resources",
            json!({"requests": {"cpu": "100m"}, "limits": {"memory": "256Mi"}}),
        )
        .set("ports", json!([{"name": "http", "containerPort": 80}]))
        .set("readinessProbe", ready)
}

async fn service(world: &World, spec: Value) -> anyhow::Result<()> {
    let services: Api<Service> = world.api();
    let object = json!({"metadata": {"name": "web"}, "spec": spec});
    let service = serde_json::from_value(object)?;
    services.create(&PostParams::default(), &service).await?;
    Ok(())
}

fn to_web() -> Value {
    json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]})
}

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

async fn fetch(address: SocketAddr, path: &str) -> anyhow::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.0\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await?;
    let head = all.windows(4).position(|four| four == b"\r\n\r\n");
    Ok(all.split_off(head.context("no head of an answer")? + 4))
}

async fn refuses(world: &World, address: SocketAddr) -> anyhow::Result<()> {
    wait_for("a refusal", SOON, async || {
        let slices = slices(world).await?;
        ensure!(slices.is_empty(), "{slices:?}");
        let error = TcpStream::connect(address).await.err();
        let kind = error.context("it accepts")?.kind();
        ensure!(kind == std::io::ErrorKind::ConnectionRefused, "{kind}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_service_leads_to_web_servers_in_jobs() -> anyhow::Result<()> {
    let world = World::new("relay").await?;
    service(&world, to_web()).await?;
    world.running(&web("one")).await?;
    world.running(&web("two")).await?;
    let addresses = ready(&world, 2).await?;
    let mut names = BTreeSet::new();
    for address in &addresses {
        let name = String::from_utf8(fetch(*address, "/name").await?)?;
        names.insert(name.trim().to_owned());
    }
    ensure!(
        names == BTreeSet::from(["one", "two"].map(str::to_owned)),
        "{names:?}"
    );
    // 200 at once to one of them, each with a page that is complete.
    let address = *addresses.first().context("no address")?;
    let mut fetches = JoinSet::new();
    for _ in 0..200 {
        fetches.spawn(async move { fetch(address, "/large").await });
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
    let mut spec = to_web();
    spec["ports"] = json!([{"name": "bulk", "port": 8081}]);
    service(&world, spec).await?;
    let serve = format!(
        "mkdir /www && echo bulk >/www/name && httpd -p 80 -h /www && exec nc -ll -p 8081 -e head -c {HUGE} /dev/zero"
    );
    world.running(&web("bulk").sh(&serve)).await?;
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
    service(&world, to_web()).await?;
    ready(&world, 1).await?;
    let forward = Forward::start(world.kubectl(["port-forward", "service/web", ":80"])).await?;
    let answer = forward.exchange(b"GET /name HTTP/1.0\r\n\r\n").await?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    ensure!(answer.trim_end().ends_with("bulk"), "{answer:?}");
    world.finish().await
}

#[tokio::test]
async fn a_pod_in_the_queue_is_published_once_its_job_runs() -> anyhow::Result<()> {
    let world = World::new("relay-queued").await?;
    let mut spec = to_web();
    spec["publishNotReadyAddresses"] = json!(true);
    service(&world, spec).await?;
    let hold = ["sbatch", "--parsable", "--hold", "--wrap", "true"];
    let gate = world.on("login", hold).ok().await?.text();
    let pod = web("queued").annotation("knoc.io/dependency", &format!("afterany:{gate}"));
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
    wait_for("the page", SOON, async || fetch(address, "/name").await).await?;
    world.finish().await
}

#[tokio::test]
async fn a_network_policy_ends_the_relay_and_its_removal_begins_it_again() -> anyhow::Result<()> {
    let world = World::new("relay-policy").await?;
    service(&world, to_web()).await?;
    world.running(&web("one")).await?;
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
    fetch(again, "/name").await?;
    world.finish().await
}

#[tokio::test]
async fn what_cannot_be_relayed_is_an_event() -> anyhow::Result<()> {
    let world = World::new("relay-refused").await?;
    let mut headless = to_web();
    headless["clusterIP"] = json!("None");
    service(&world, headless).await?;
    world.running(&web("one")).await?;
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
