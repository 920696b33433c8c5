//! Programs that belong to a cluster, unmodified, in Slurm jobs: leader election by client-go with the pod's own token, and Redis, as
//! a server in the cluster that a pod reaches, and in a pod that the cluster reaches. The bed has no other node: the server in the
//! cluster is a process of this host behind a Service, and the test dials what the kubelet publishes for the pod.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{Namespace, Service},
    discovery::v1::EndpointSlice,
};
use knoc_tests::{PodBuilder, Run, World, wait_for, world::SOON};
use kube::{
    Api,
    api::{DeleteParams, ListParams, PostParams},
};
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};

/// The image with the program that stands for election, as the nodes see it.
const ELECTION: &str = "/images/election";
/// The name of the Lease, and of the Role that gives pods the right to it.
const LEASE: &str = "election";
/// A leader that was lost is followed by another one after 15 s.
const ELECTED: Duration = Duration::from_mins(4);

/// Redis, for nodes and this host (tests/testbed/redis.sh).
const REDIS: &str = "/images/redis";
/// The time to make the image of Redis.
const MADE: Duration = Duration::from_mins(8);
/// The Service that both lists of the bed have.
const SERVICE: (&str, &str) = ("knoc-redis", "redis");
/// The server of this host.
const SERVER: (&str, u16) = ("10.77.0.1", 6379);

/// Puts the program into a copy of the image of busybox.
async fn election_image() -> anyhow::Result<()> {
    let variable =
        |name: &str| std::env::var(name).with_context(|| format!("{name} is not set: make up"));
    let images = PathBuf::from(variable("HPC_PREFIX")?).join("shared/images");
    let program = PathBuf::from(variable("KNOC_BED")?).join("interop/go-client");
    let script = format!(
        "set -e; cd {images}; rm -rf election.new; cp -a busybox election.new; cp {program} election.new/election; \
         cmp -s {program} election/election || {{ rm -rf election; mv election.new election; }}; rm -rf election.new",
        images = images.display(),
        program = program.display()
    );
    Run::new("sh").args(["-c", &script]).ok().await.map(drop)
}

/// A pod that stands for election.
fn candidate(world: &World, name: &str, network: &str) -> PodBuilder {
    PodBuilder::new(name)
        .annotation("knoc.io/network", network)
        .spec("automountServiceAccountToken", json!(true))
        .image(ELECTION)
        .memory("256Mi")
        .command(["/election", "elect", &world.namespace, LEASE, name])
}

async fn may_elect(world: &World) -> anyhow::Result<()> {
    let rights = [
        "--verb=get,create,update",
        "--resource=leases.coordination.k8s.io",
    ];
    let role = world.kubectl(["create", "role", LEASE]).args(rights);
    role.ok().await?;
    let account = format!("--serviceaccount={}:default", world.namespace);
    let binding = ["create", "rolebinding", LEASE, "--role=election", &account];
    world.kubectl(binding).ok().await.map(drop)
}

async fn says(world: &World, pod: &str, text: &str) -> anyhow::Result<()> {
    wait_for(&format!("{pod} says {text:?}"), ELECTED, async || {
        let log = world.logs(pod, "main").await?;
        ensure!(log.contains(text), "{log}");
        Ok(())
    })
    .await
}

/// The holder of the Lease, and how often it was renewed.
async fn lease(world: &World) -> anyhow::Result<(String, String)> {
    let lease = world.api::<Lease>().get(LEASE).await?;
    let spec = lease.spec.context("no spec")?;
    let renewed = spec.renew_time.context("never renewed")?;
    Ok((
        spec.holder_identity.unwrap_or_default(),
        format!("{renewed:?}"),
    ))
}

#[tokio::test]
async fn pods_elect_a_leader_and_another_one_follows_it() -> anyhow::Result<()> {
    election_image().await?;
    let world = World::new("election").await?;
    may_elect(&world).await?;
    world.running(&candidate(&world, "one", "private")).await?;
    says(&world, "one", "one leads").await?;
    world.running(&candidate(&world, "two", "private")).await?;
    world.running(&candidate(&world, "three", "host")).await?;
    for other in ["two", "three"] {
        says(&world, other, "the leader is one").await?;
    }
    // It keeps the Lease.
    let (_, first) = lease(&world).await?;
    wait_for("the Lease is renewed", SOON, async || {
        let (holder, now) = lease(&world).await?;
        ensure!(holder == "one" && now != first, "{holder} at {now}");
        Ok(())
    })
    .await?;
    // A leader that ends gives it back.
    world.delete("one", Some(20)).await?;
    let next = wait_for("another leader", ELECTED, async || {
        let (holder, now) = lease(&world).await?;
        ensure!(
            ["two", "three"].contains(&holder.as_str()),
            "{holder:?} at {now}"
        );
        Ok(holder)
    })
    .await?;
    let other = if next == "two" { "three" } else { "two" };
    says(&world, &next, &format!("{next} leads")).await?;
    says(&world, other, &format!("the leader is {next}")).await?;
    // One that is killed loses it after its time.
    world.delete(&next, Some(0)).await?;
    says(&world, other, &format!("{other} leads")).await?;
    world.finish().await
}

/// The Service without a selector, with the server of this host as its endpoint. Returns its address.
async fn publish(world: &World) -> anyhow::Result<String> {
    let (namespace, name) = SERVICE;
    let namespaces: Api<Namespace> = world.cluster_api();
    if namespaces.get_opt(namespace).await?.is_none() {
        let object = serde_json::from_value(json!({"metadata": {"name": namespace}}))?;
        namespaces.create(&PostParams::default(), &object).await?;
    }
    withdraw(world).await;
    let (host, port) = SERVER;
    let ports = json!([{"name": "redis", "port": port, "protocol": "TCP"}]);
    let service = json!({"metadata": {"name": name}, "spec": {"ports": ports}});
    let service: Service = serde_json::from_value(service)?;
    let services: Api<Service> = world.api_in(namespace);
    let created = services.create(&PostParams::default(), &service).await?;
    let slice = json!({"metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}}, "addressType": "IPv4",
        "ports": ports, "endpoints": [{"addresses": [host], "conditions": {"ready": true}}]});
    let slices: Api<EndpointSlice> = world.api_in(namespace);
    let slice = serde_json::from_value(slice)?;
    slices.create(&PostParams::default(), &slice).await?;
    let address = created.spec.and_then(|spec| spec.cluster_ip);
    address.context("the Service has no address")
}

/// Deletes what is there of it.
async fn withdraw(world: &World) {
    let (namespace, name) = SERVICE;
    let services: Api<Service> = world.api_in(namespace);
    let slices: Api<EndpointSlice> = world.api_in(namespace);
    services.delete(name, &DeleteParams::default()).await.ok();
    slices.delete(name, &DeleteParams::default()).await.ok();
}

/// A connection to a Redis server.
struct Redis(BufReader<TcpStream>);

impl Redis {
    async fn connect(address: SocketAddr) -> anyhow::Result<Self> {
        Ok(Self(BufReader::new(TcpStream::connect(address).await?)))
    }

    /// Sends a command and returns the answer: a line, or the text whose length the line says.
    async fn ask(&mut self, command: &[&[u8]]) -> anyhow::Result<String> {
        let mut message = format!("*{}\r\n", command.len()).into_bytes();
        for word in command {
            message.extend(format!("${}\r\n", word.len()).as_bytes());
            message.extend_from_slice(word);
            message.extend(b"\r\n");
        }
        self.0.write_all(&message).await?;
        let mut line = String::new();
        let read = self.0.read_line(&mut line);
        tokio::time::timeout(SOON, read)
            .await
            .context("no answer")??;
        let Some(length) = line.strip_prefix('$') else {
            return Ok(line.trim_end().to_owned());
        };
        let mut text = vec![0; length.trim_end().parse::<usize>()? + 2];
        let read = self.0.read_exact(&mut text);
        tokio::time::timeout(SOON, read)
            .await
            .context("no text")??;
        text.truncate(text.len() - 2);
        Ok(String::from_utf8(text)?)
    }
}

#[tokio::test]
async fn a_pod_reaches_redis_in_the_cluster() -> anyhow::Result<()> {
    let world = World::new("redis").await?;
    world.service("redis.sh", "up").deadline(MADE).ok().await?;
    let address = publish(&world).await?;
    let pod = PodBuilder::new("client")
        .annotation("knoc.io/network", "private")
        .image(REDIS)
        .memory("256Mi")
        .command(["sleep", "3600"]);
    let uid = world.running(&pod).await?;
    let inside = async |script: &str| {
        let script = format!("cli() {{ redis-cli -h {address} \"$@\"; }}; {script}");
        let run = world
            .exec(&uid, "main", ["sh", "-c", &script])
            .deadline(ELECTED);
        anyhow::Ok(run.ok().await?.text())
    };
    // The shim may learn of the port after the pod has started.
    wait_for("an answer", ELECTED, async || {
        let answer = inside("cli ping").await?;
        ensure!(answer.trim() == "PONG", "{answer}");
        Ok(())
    })
    .await?;
    let key = world.namespace.clone();
    let counted = inside(&format!(
        "cli del {key}; seq 2000 | sed 's/.*/incr {key}/' | cli | tail -1"
    ))
    .await?;
    ensure!(counted.trim_end().ends_with("2000"), "{counted}");
    let large = inside(&format!(
        "head -c 3000000 /dev/zero | tr '\\0' x | cli -x set {key}; cli get {key} | wc -c"
    ))
    .await?;
    ensure!(large.trim_end().ends_with("3000001"), "{large}");
    // A client that waits has what the cluster sends.
    let queue = format!("{key}-queue");
    let (host, port) = SERVER;
    let server = SocketAddr::new(host.parse()?, port);
    let waits = async { inside(&format!("cli blpop {queue} 60")).await };
    let sends = async {
        let mut redis = Redis::connect(server).await?;
        wait_for("a client that waits", ELECTED, async || {
            let mut redis = Redis::connect(server).await?;
            let clients = redis.ask(&[b"CLIENT", b"LIST"]).await?;
            ensure!(clients.contains("cmd=blpop"), "{clients}");
            Ok(())
        })
        .await?;
        redis.ask(&[b"RPUSH", queue.as_bytes(), b"work"]).await
    };
    let (waited, _) = tokio::try_join!(waits, sends)?;
    ensure!(waited.contains("work"), "{waited}");
    inside(&format!("cli del {key} {queue}")).await?;
    withdraw(&world).await;
    world.service("redis.sh", "down").ok().await?;
    world.finish().await
}

/// Where the Service of the pod leads.
async fn relayed(world: &World) -> anyhow::Result<SocketAddr> {
    let of = ListParams::default().labels("endpointslice.kubernetes.io/managed-by=relay.knoc.io");
    let slices = world.api::<EndpointSlice>().list(&of).await?.items;
    let slice = slices.first().context("no EndpointSlice")?;
    let endpoint = slice.endpoints.iter().flatten().next();
    let address = endpoint.and_then(|one| one.addresses.first());
    let port = slice.ports.iter().flatten().next().and_then(|one| one.port);
    let (address, port) = address.zip(port).context("no endpoint")?;
    Ok(SocketAddr::new(address.parse()?, u16::try_from(port)?))
}

#[tokio::test]
async fn the_cluster_reaches_redis_in_a_pod() -> anyhow::Result<()> {
    let world = World::new("redis-pod").await?;
    world
        .service("redis.sh", "image")
        .deadline(MADE)
        .ok()
        .await?;
    let service = json!({"metadata": {"name": "cache"}, "spec": {"selector": {"app": "cache"}, "ports": [{"port": 6379}]}});
    let service: Service = serde_json::from_value(service)?;
    let services: Api<Service> = world.api();
    services.create(&PostParams::default(), &service).await?;
    let serve = "exec redis-server --protected-mode no --save '' --appendonly no --dir /tmp";
    let pod = PodBuilder::new("cache")
        .label("app", "cache")
        .annotation("knoc.io/network", "private")
        .image(REDIS)
        .memory("256Mi")
        .set("ports", json!([{"containerPort": 6379}]))
        .sh(serve);
    world.running(&pod).await?;
    let address = wait_for("the Service leads to the pod", SOON, async || {
        let address = relayed(&world).await?;
        let answer = Redis::connect(address).await?.ask(&[b"PING"]).await?;
        ensure!(answer == "+PONG", "{answer}");
        Ok(address)
    })
    .await?;
    let mut writer = Redis::connect(address).await?;
    let value = vec![b'x'; 1 << 20];
    let answer = writer.ask(&[b"SET", b"key", &value]).await?;
    ensure!(answer == "+OK", "{answer}");
    let mut clients = Vec::new();
    for _ in 0..50 {
        clients.push(Redis::connect(address).await?);
    }
    for client in &mut clients {
        client.ask(&[b"INCR", b"count"]).await?;
    }
    let count = writer.ask(&[b"GET", b"count"]).await?;
    ensure!(count == "50", "{count}");
    for client in &mut clients {
        let read = client.ask(&[b"GET", b"key"]).await?;
        ensure!(read.as_bytes() == value, "{} bytes", read.len());
    }
    world.finish().await
}
