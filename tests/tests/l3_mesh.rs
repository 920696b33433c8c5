//! Pods that reach each other at addresses of their own, on the real stack. The kubelet gets another policy for it, and the agent another
//! list, so all of it is one test; `sweep.sh` removes what an interrupted run leaves.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::ensure;
use k8s_openapi::api::{
    core::v1::{Pod, Service},
    discovery::v1::EndpointSlice,
    networking::v1::NetworkPolicy,
};
use knoc_tests::{Output, PodBuilder, World, endpoint, own_addresses, wait_for, web, world::SOON};
use kube::{
    Api,
    api::{DeleteParams, ListParams, PostParams},
};
use serde_json::json;

/// The time for a script of the test bed.
const SCRIPT: Duration = Duration::from_mins(5);
/// How long the site's list may take to hold: it is read every ten seconds, and then tunnels are dialled.
const POLICY: Duration = Duration::from_mins(3);
const SITE_FILE: &str = "/home/hpcuser/.config/knoc/agent.toml";
/// The size of the large file.
const LARGE: u32 = 64 << 20;

/// Sets the site's list of pairs of namespaces, which the agent reads while it runs.
async fn pod_traffic(world: &World, pairs: &str) -> anyhow::Result<()> {
    let script = format!(
        "f={SITE_FILE}; sed -i '/^pod_traffic *=/d' $f; \
         if [ -n '{pairs}' ]; then sed -i '/^\\[policy\\]/a pod_traffic = [\"{pairs}\"]' $f; fi"
    );
    let run = world.on("login", ["sh", "-ec", &script]);
    run.ok().await.map(drop)
}

/// A pod in a network of its own that waits.
fn waiting(name: &str) -> PodBuilder {
    let resources = json!({"requests": {"cpu": "100m"}, "limits": {"memory": "128Mi"}});
    PodBuilder::new(name)
        .annotation("knoc.io/network", "private")
        .set("resources", resources)
        .command(["sleep", "3600"])
}

/// A web server on all addresses of its pod, on a node of another partition.
fn server(name: &str) -> PodBuilder {
    let serve = format!(
        "echo {name} >/www/name && echo $POD_IP >/www/address && head -c {LARGE} /dev/urandom >/www/large && \
         mkdir /www/cgi-bin && printf '#!/bin/sh\\necho Content-Type: text/plain; echo; echo $REMOTE_ADDR\\n' >/www/cgi-bin/caller && \
         chmod +x /www/cgi-bin/caller && httpd -p 127.0.0.1:81 -h /www && exec httpd -f -p 80 -h /www"
    );
    let address =
        json!([{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]);
    waiting(name)
        .annotation("knoc.io/partition", "gpu")
        .set("env", address)
        .empty_dir("/www")
        .sh(&serve)
}

/// The address in the pod's status, once it has one.
async fn address(world: &World, name: &str) -> anyhow::Result<Ipv4Addr> {
    let known = |pod: &Pod| {
        let status = pod.status.as_ref()?;
        let address: Ipv4Addr = status.pod_ip.as_ref()?.parse().ok()?;
        let same = status.host_ip.as_deref() == status.pod_ip.as_deref();
        (!same).then_some(address)
    };
    world
        .wait_for_state(name, "it has an address of its own", SOON, known)
        .await
}

async fn inside(world: &World, uid: &str, script: &str) -> anyhow::Result<Output> {
    world.exec(uid, "main", ["sh", "-c", script]).output().await
}

/// Waits until the pod gets this page from the other one.
async fn gets(world: &World, uid: &str, from: Ipv4Addr, page: &str) -> anyhow::Result<String> {
    wait_for("an answer of the other pod", SOON * 2, async || {
        let script = format!("wget -T 5 -qO- http://{from}/{page}");
        let answer = inside(world, uid, &script).await?;
        ensure!(answer.code == 0, "{answer}");
        Ok(answer.text())
    })
    .await
}

#[tokio::test]
async fn pods_reach_each_other_at_addresses_of_their_own() -> anyhow::Result<()> {
    let world = World::new("mesh").await?;
    let checked = async {
        own_addresses::begin(&world).await?;
        check(&world).await
    };
    let checked = checked.await;
    let policy = pod_traffic(&world, "").await;
    let ended = own_addresses::end(&world).await;
    checked?;
    policy?;
    ended?;
    world.finish().await
}

/// A pod in the network of its node has the node's address.
async fn in_the_nodes_network(world: &World) -> anyhow::Result<()> {
    let pod = PodBuilder::new("host")
        .spec("hostNetwork", json!(true))
        .command(["sleep", "3600"]);
    world.running(&pod).await?;
    let the_nodes = |pod: &Pod| {
        let status = pod.status.as_ref()?;
        (status.pod_ip.is_some() && status.pod_ip == status.host_ip).then_some(())
    };
    world
        .wait_for_state("host", "it has the node's address", SOON, the_nodes)
        .await?;
    world.delete("host", Some(0)).await?;
    world.wait_gone("host", SOON).await
}

async fn check(world: &World) -> anyhow::Result<()> {
    in_the_nodes_network(world).await?;
    let served = world.running(&server("server")).await?;
    // The partition of the server has one node; Slurm is to choose another one for the client.
    let first = world.compute_node(&served).await?;
    let pod = waiting("client");
    let client = world
        .away_from(&first, async || world.running(&pod).await)
        .await?;
    let there = address(world, "server").await?;
    let here = address(world, "client").await?;
    ensure!(there != here, "{there}");
    // What a program that asks its connection to a Service for its own address tells others.
    let route = inside(world, &client, "ip route get $KUBERNETES_SERVICE_HOST").await?;
    ensure!(route.text().contains(&format!("src {here}")), "{route}");
    let nodes = (
        world.compute_node(&served).await?,
        world.compute_node(&client).await?,
    );
    ensure!(nodes.0 != nodes.1, "both are on {}", nodes.0);
    connections(world, (&served, there), (&client, here)).await?;
    // Neither the pod nor a Service names a port, so there is only the one that the API server takes then.
    answers(SocketAddr::from((there, 80))).await?;
    endpoint::refuses((there, 79)).await?;
    endpoints(world, &client, there).await?;
    from_the_cluster(world, there).await?;
    namespaces(world, there).await?;
    restarted_agent(world, &client, there).await?;
    // A pod that is gone does not leave its clients waiting.
    world.delete("server", Some(1)).await?;
    world.wait_gone("server", SOON).await?;
    refuses(there).await?;
    wait_for("a refusal", SOON, async || {
        let began = std::time::Instant::now();
        let script = format!("wget -T 30 -qO- http://{there}/name");
        let answer = inside(world, &client, &script).await?;
        ensure!(answer.code != 0, "{answer}");
        ensure!(is_unreachable(&answer), "{answer}");
        ensure!(
            began.elapsed() < Duration::from_secs(15),
            "{:?}",
            began.elapsed()
        );
        Ok(())
    })
    .await
}

async fn connections(
    world: &World,
    (server, there): (&str, Ipv4Addr),
    (client, here): (&str, Ipv4Addr),
) -> anyhow::Result<()> {
    ensure!(gets(world, client, there, "name").await?.trim() == "server");
    // Programs and the pod's own name lead to the same address.
    ensure!(gets(world, client, there, "address").await?.trim() == there.to_string());
    let named = inside(world, server, "hostname -i").await?;
    ensure!(named.text().trim() == there.to_string(), "{named}");
    let sums = [
        inside(world, server, "md5sum </www/large").await?.text(),
        inside(
            world,
            client,
            &format!("wget -qO- http://{there}/large | md5sum"),
        )
        .await?
        .text(),
    ];
    ensure!(sums[0] == sums[1] && !sums[0].is_empty(), "{sums:?}");
    // A port on which nobody listens refuses, and so does one of the loopback interface.
    for port in [79, 81] {
        let refused = inside(
            world,
            client,
            &format!("wget -T 60 -qO- http://{there}:{port}/"),
        )
        .await?;
        ensure!(refused.stderr.contains("refused"), "{port}: {refused}");
    }
    other_networks(world, client, here).await?;
    // The server sees who has called.
    let caller = gets(world, client, there, "cgi-bin/caller").await?;
    ensure!(caller.contains(&here.to_string()), "{caller}");
    Ok(())
}

/// A program that asks the kernel for its address learns the one that other pods reach, and it leads to other networks, too.
async fn other_networks(world: &World, pod: &str, own: Ipv4Addr) -> anyhow::Result<()> {
    let asked = inside(world, pod, "ip route get 8.8.8.8").await?;
    ensure!(asked.text().contains(&format!("src {own}")), "{asked}");
    let registry = PodBuilder::image_name();
    let registry = registry.split('/').next().unwrap_or_default();
    let reached = inside(world, pod, &format!("wget -qO- http://{registry}/v2/")).await?;
    ensure!(reached.text() == "{}", "{reached}");
    Ok(())
}

/// Kubernetes' own controllers publish the pod's address for a headless Service, from which cluster DNS has its names. A Service with
/// an address leads to it, too.
async fn endpoints(world: &World, client: &str, there: Ipv4Addr) -> anyhow::Result<()> {
    let label = world.kubectl(["label", "pod", "server", "app=web"]);
    label.ok().await?;
    let services: Api<Service> = world.api();
    let object = json!({"metadata": {"name": "web"}, "spec": {"clusterIP": "None", "selector": {"app": "web"}, "ports": [{"port": 80}]}});
    let service = serde_json::from_value(object)?;
    services.create(&PostParams::default(), &service).await?;
    let slices: Api<EndpointSlice> = world.api();
    let of = ListParams::default().labels("kubernetes.io/service-name=web");
    wait_for("the pod among the endpoints", SOON, async || {
        let found = slices.list(&of).await?.items;
        let endpoints = found
            .iter()
            .flat_map(|slice| slice.endpoints.iter().flatten());
        let mut all = endpoints.flat_map(|endpoint| &endpoint.addresses);
        ensure!(all.any(|one| *one == there.to_string()), "{found:?}");
        Ok(())
    })
    .await?;
    let object = json!({"metadata": {"name": "front"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}});
    let service = serde_json::from_value(object)?;
    let created = services.create(&PostParams::default(), &service).await?;
    let address = created.spec.and_then(|spec| spec.cluster_ip);
    let address: Ipv4Addr = address.unwrap_or_default().parse()?;
    ensure!(gets(world, client, address, "name").await? == "server");
    // It is the same pod that calls.
    let caller = gets(world, client, address, "cgi-bin/caller").await?;
    let own = self::address(world, "client").await?;
    ensure!(caller.contains(&own.to_string()), "{caller}");
    Ok(())
}

/// Clients in the cluster reach the pod at its own address, on the port to which Services lead, until a NetworkPolicy selects the pod.
async fn from_the_cluster(world: &World, there: Ipv4Addr) -> anyhow::Result<()> {
    let at = SocketAddr::from((there, 80));
    answers(at).await?;
    let large = web::page(at, "/large").await?;
    ensure!(large.len() == usize::try_from(LARGE)?, "{}", large.len());
    let namespace = &world.namespace;
    for of in ["pods/server:80", "services/front:80"] {
        let path = format!("/api/v1/namespaces/{namespace}/{of}/proxy/name");
        let answer = world.kubectl(["get", "--raw", &path]).ok().await?;
        ensure!(answer.text().trim() == "server", "{of}: {answer}");
    }
    endpoint::refuses((there, 79)).await?;
    let policies: Api<NetworkPolicy> = world.api();
    let policy = json!({"metadata": {"name": "deny"}, "spec": {"podSelector": {"matchLabels": {"app": "web"}}}});
    let policy = serde_json::from_value(policy)?;
    policies.create(&PostParams::default(), &policy).await?;
    refuses(there).await?;
    wait_for("the Event", SOON, async || {
        let events = world.events("server").await?;
        let told = events.iter().any(|event| {
            event.starts_with("PodListenerRefused: ") && event.contains("NetworkPolicy deny")
        });
        ensure!(told, "{events:?}");
        Ok(())
    })
    .await?;
    policies.delete("deny", &DeleteParams::default()).await?;
    answers(at).await
}

/// Waits until the server answers this host, as a client in the cluster.
async fn answers(at: SocketAddr) -> anyhow::Result<()> {
    wait_for("an answer at the pod's address", SOON, async || {
        let name = web::name(at).await?;
        ensure!(name == "server", "{name:?}");
        Ok(())
    })
    .await
}

/// Waits until nothing listens for the server any more, so that clients are refused at once.
async fn refuses(there: Ipv4Addr) -> anyhow::Result<()> {
    wait_for("a refusal", SOON, async || {
        endpoint::refuses((there, 80)).await
    })
    .await
}

/// Between namespaces the site decides.
async fn namespaces(world: &World, there: Ipv4Addr) -> anyhow::Result<()> {
    let other = World::new("mesh-other").await?;
    let stranger = other.running(&waiting("stranger")).await?;
    address(&other, "stranger").await?;
    let script = format!("wget -T 30 -qO- http://{there}/name");
    let denied = wait_for("an answer about the other namespace", SOON, async || {
        let denied = inside(&other, &stranger, &script).await?;
        ensure!(denied.code == 0 || is_unreachable(&denied), "{denied}");
        Ok(denied)
    })
    .await?;
    ensure!(denied.code != 0, "{denied}");
    pod_traffic(&other, "t-mesh-other-*:t-mesh-*").await?;
    wait_for("an answer from the other namespace", POLICY, async || {
        let answer = inside(&other, &stranger, &script).await?;
        ensure!(answer.text() == "server", "{answer}");
        Ok(())
    })
    .await?;
    pod_traffic(&other, "").await?;
    wait_for("no answer any more", POLICY, async || {
        let answer = inside(&other, &stranger, &script).await?;
        ensure!(answer.code != 0 && is_unreachable(&answer), "{answer}");
        Ok(())
    })
    .await?;
    ensure!(world.namespace != other.namespace, "{}", world.namespace);
    other.finish().await
}

fn is_unreachable(answer: &Output) -> bool {
    let texts = ["unreachable", "No route to host"];
    texts.iter().any(|text| answer.stderr.contains(text))
}

/// Pods keep their addresses, and reach each other while there is no agent.
async fn restarted_agent(world: &World, client: &str, there: Ipv4Addr) -> anyhow::Result<()> {
    // Exec needs the agent: the client tries by itself meanwhile.
    let script = format!(
        "rm -f /tmp/end /tmp/failed; (until [ -e /tmp/end ]; do wget -T 60 -qO /dev/null http://{there}/name || echo x >>/tmp/failed; done) \
         >/dev/null 2>&1 </dev/null &"
    );
    inside(world, client, &script).await?;
    world.service("agent.sh", "kill").ok().await?;
    world
        .service("agent.sh", "up")
        .deadline(SCRIPT)
        .ok()
        .await?;
    ensure!(gets(world, client, there, "name").await? == "server");
    let failed = inside(world, client, "touch /tmp/end; cat /tmp/failed").await?;
    ensure!(failed.text().is_empty(), "{failed}");
    ensure!(address(world, "server").await? == there);
    Ok(())
}
