//! Cluster DNS as clusters have it, on the real stack: CoreDNS resolves a headless Service and the pods of a StatefulSet, which have addresses
//! of their own, and 10,000 questions a minute of one pod do not hurt its link. CoreDNS is the cluster's, and the kubelet gets another
//! policy for it, so all of it is one test, to be run alone.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::{apps::v1::StatefulSet, core::v1::Service};
use knoc_tests::{
    Output, PodBuilder, World, cluster::resolver_reaches_pods, image, own_addresses, wait_for,
    world::SOON,
};
use kube::api::PostParams;
use serde_json::json;

/// The time to compile CoreDNS, once.
const BUILT: Duration = Duration::from_mins(10);
/// The address of its Service (tests/testbed/kube/coredns/objects.yaml).
const DNS: &str = "10.96.0.10";
/// The pods of the StatefulSet.
const REPLICAS: usize = 2;

/// How many programs ask at the same time, and how often each.
const ASKERS: usize = 4;
const QUESTIONS: usize = 750;
/// How long all of them may take on a busy machine. At 10,000 a minute it is 18 s.
const FLOOD: Duration = Duration::from_secs(45);
/// How much slower a command may answer meanwhile: the test, the stack and the programs that ask share two cores.
const SLOWER: u32 = 10;
const ANYWAY: Duration = Duration::from_secs(3);
/// How much the shim's memory may grow, in KiB: it keeps 256 KiB of answers.
const GROWTH: u64 = 8 << 10;

#[tokio::test]
async fn names_of_a_stateful_set_resolve_and_many_questions_leave_the_link_usable()
-> anyhow::Result<()> {
    let world = World::new("dns").await?;
    let folder = format!("/scratch/{}", world.namespace);
    image::build(&world, &folder).await?;
    // Of a run that was interrupted.
    coredns(&world, "down").await?;
    let checked = async {
        coredns(&world, "up").await?;
        own_addresses::begin(&world).await?;
        check(&world, &folder).await
    };
    let checked = checked.await;
    // All of it, whatever has failed.
    let ended = own_addresses::end(&world).await;
    let down = coredns(&world, "down").await;
    checked?;
    ended?;
    down?;
    world.on("login", ["rm", "-rf", &folder]).ok().await?;
    world.finish().await
}

async fn coredns(world: &World, action: &str) -> anyhow::Result<()> {
    let run = world.service("kube/coredns.sh", action).deadline(BUILT);
    run.ok().await.map(drop)
}

async fn check(world: &World, folder: &str) -> anyhow::Result<()> {
    stateful(world).await?;
    resolver_reaches_pods(world, DNS).await?;
    let client = PodBuilder::new("client")
        .annotation("knoc.io/network", "private")
        .image(&image::path(folder))
        .command(["sleep", "3600"]);
    let client = world.running(&client).await?;
    names(world, &client).await?;
    flood(world, &client).await?;
    // The answers are as right as before.
    names(world, &client).await
}

/// A StatefulSet of web servers that tell their names, and the headless Service that gives them some.
async fn stateful(world: &World) -> anyhow::Result<()> {
    let small = json!({"requests": {"cpu": "100m"}, "limits": {"memory": "64Mi"}});
    let pod = PodBuilder::new("web")
        .annotation("knoc.io/network", "private")
        .label("app", "web")
        .restart("Always")
        .set("resources", small)
        .sh("mkdir -p /tmp/www && hostname >/tmp/www/name && exec httpd -f -p 80 -h /tmp/www");
    let pod = pod.manifest();
    let labels = json!({"app": "web"});
    let service = json!({"metadata": {"name": "web"}, "spec": {
        "clusterIP": "None", "selector": labels, "ports": [{"name": "http", "port": 80}],
    }});
    let service: Service = serde_json::from_value(service)?;
    let set = json!({"metadata": {"name": "web"}, "spec": {
        "serviceName": "web", "replicas": REPLICAS, "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": labels},
        "template": {"metadata": pod["metadata"], "spec": pod["spec"]},
    }});
    let set: StatefulSet = serde_json::from_value(set)?;
    let how = PostParams::default();
    world.api::<Service>().create(&how, &service).await?;
    world.api::<StatefulSet>().create(&how, &set).await?;
    Ok(())
}

async fn inside(world: &World, uid: &str, script: &str) -> anyhow::Result<Output> {
    world.exec(uid, "main", ["sh", "-c", script]).output().await
}

/// The addresses of the name, sorted. An error contains what nslookup has said.
async fn resolve(world: &World, client: &str, name: &str) -> anyhow::Result<Vec<String>> {
    let said = inside(world, client, &format!("nslookup -type=a {name} 2>&1")).await?;
    ensure!(said.code == 0, "{said}");
    let text = said.text();
    let addresses = text
        .lines()
        .filter_map(|line| line.strip_prefix("Address:"));
    // That of the server has a port.
    let addresses = addresses.map(str::trim).filter(|one| !one.contains(':'));
    let mut addresses: Vec<String> = addresses.map(str::to_owned).collect();
    addresses.sort_unstable();
    ensure!(!addresses.is_empty(), "{said}");
    Ok(addresses)
}

/// Each pod of the StatefulSet has its name, the Service has the addresses of all of them, and nobody else has a name.
async fn names(world: &World, client: &str) -> anyhow::Result<()> {
    let service = format!("web.{}.svc.cluster.local", world.namespace);
    let mut all = Vec::new();
    for number in 0..REPLICAS {
        let pod = format!("web-{number}");
        let name = format!("{pod}.{service}");
        let address = wait_for(&name, SOON * 2, async || {
            let found = resolve(world, client, &name).await?;
            let [address] = found.as_slice() else {
                anyhow::bail!("{found:?}");
            };
            let ask = format!("wget -T 10 -qO- http://{address}/name");
            let answer = inside(world, client, &ask).await?;
            ensure!(answer.text() == pod, "{address}: {answer}");
            Ok(address.clone())
        })
        .await?;
        let status = world.pod(&pod).await?.status;
        let own = status.and_then(|status| status.pod_ip);
        ensure!(own.as_ref() == Some(&address), "{pod}: {own:?}, {address}");
        all.push(address);
    }
    all.sort_unstable();
    // What was known before the last pod was ready may be kept for a while.
    wait_for("the addresses of the Service", SOON * 2, async || {
        let found = resolve(world, client, &service).await?;
        ensure!(found == all, "{found:?}, not {all:?}");
        Ok(())
    })
    .await?;
    let missing = resolve(world, client, &format!("web-{REPLICAS}.{service}")).await;
    ensure!(missing.is_err(), "{missing:?}");
    Ok(())
}

/// How long a command in the pod takes to answer.
async fn answers(world: &World, uid: &str) -> anyhow::Result<Duration> {
    let began = Instant::now();
    world.exec(uid, "main", ["true"]).ok().await?;
    Ok(began.elapsed())
}

fn median(mut times: Vec<Duration>) -> anyhow::Result<Duration> {
    times.sort_unstable();
    times.get(times.len() / 2).copied().context("no time")
}

/// The memory of the pod's shim, in KiB.
async fn memory(world: &World, uid: &str) -> anyhow::Result<u64> {
    let node = world.compute_node(uid).await?;
    let shim = format!("knoc-agent shim .*{uid}");
    let pid = world.on(&node, ["pgrep", "-f", &shim]).ok().await?.text();
    let pid = pid.lines().next().context("no shim")?;
    let file = format!("/proc/{pid}/status");
    let status = world.on(&node, ["cat", &file]).ok().await?.text();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context(status.clone())?.parse()?)
}

/// Several programs ask for names that nobody has asked for before, so that each question goes to the cluster.
async fn flood(world: &World, client: &str) -> anyhow::Result<()> {
    let mut idle = Vec::new();
    for _ in 0..5 {
        idle.push(answers(world, client).await?);
    }
    let idle = median(idle)?;
    let before = memory(world, client).await?;
    let script = format!(
        "p=; for i in $(seq {ASKERS}); do \
         /knoc-dialer names {DNS}:53 n$i-%.{}.svc.cluster.local {QUESTIONS} >/dev/null & p=\"$p $!\"; done; \
         for i in $p; do wait $i || exit 1; done",
        world.namespace
    );
    let over = AtomicBool::new(false);
    let asking = async {
        let began = Instant::now();
        let run = world.exec(client, "main", ["sh", "-c", &script]);
        let asked = run.deadline(FLOOD).ok().await;
        over.store(true, Ordering::Relaxed);
        asked.map(|_| began.elapsed())
    };
    let looking = async {
        let mut times = Vec::new();
        while !over.load(Ordering::Relaxed) {
            times.push(answers(world, client).await?);
        }
        anyhow::Ok(times)
    };
    let (took, meanwhile) = tokio::join!(asking, looking);
    let (took, meanwhile) = (took?, median(meanwhile?)?);
    let after = memory(world, client).await?;
    let questions = ASKERS * QUESTIONS;
    let seen = format!(
        "{questions} questions in {took:?}; a command took {meanwhile:?}, and {idle:?} before; the shim had {before} KiB, then {after} KiB"
    );
    ensure!(meanwhile <= idle * SLOWER + ANYWAY, seen);
    ensure!(after <= before + GROWTH, seen);
    Ok(())
}
