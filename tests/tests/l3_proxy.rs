//! Services and an Ingress that lead to web servers in jobs, as clients in the cluster use them: through a real kube-proxy on a node of its
//! own (`kube/proxy.sh` of the bed), and a real nginx with the servers of an Ingress on that node (`kube/ingress.sh`).

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::networking::v1::Ingress;
use knoc_tests::{Output, World, endpoint, wait_for, web, world::SOON};
use kube::{Api, api::PostParams};
use serde_json::json;
use tokio::{sync::Mutex, task::JoinSet};

/// The node of kube-proxy, as this host reaches it.
const NODE: Ipv4Addr = Ipv4Addr::new(10, 75, 0, 2);
/// The host of the Ingress.
const HOST: &str = "web.example.org";
/// The size of the large page.
const SIZE: usize = 256 << 10;
/// A client that has waited for so long has waited in vain.
const PATIENCE: Duration = Duration::from_mins(1);
/// curl's exit code if the connection was refused.
const REFUSED: i32 = 7;
/// curl's exit code if it has waited in vain.
const IN_VAIN: i32 = 28;

/// How many tests use kube-proxy now.
static USERS: Mutex<usize> = Mutex::const_new(0);

/// Starts kube-proxy for the first test.
async fn begin(world: &World) -> anyhow::Result<()> {
    let mut users = USERS.lock().await;
    if *users == 0 {
        world.service("kube/proxy.sh", "up").ok().await?;
    }
    *users += 1;
    Ok(())
}

/// Stops kube-proxy after the last test. A test that fails leaves it for inspection, with the namespace.
async fn end(world: &World) -> anyhow::Result<()> {
    let mut users = USERS.lock().await;
    *users -= 1;
    if *users == 0 {
        world.service("kube/proxy.sh", "down").ok().await?;
    }
    Ok(())
}

/// Creates the Service of these pods; returns its ClusterIP, and its port of each node if it is of the type NodePort.
async fn service(world: &World, kind: &str) -> anyhow::Result<(String, Option<u16>)> {
    let mut spec = web::to_pods();
    spec["type"] = json!(kind);
    let spec = web::service(world, spec).await?.spec.context("no spec")?;
    let ports = spec.ports.unwrap_or_default();
    let port = ports.iter().find_map(|port| port.node_port);
    let port = port.map(u16::try_from).transpose()?;
    Ok((spec.cluster_ip.context("no address")?, port))
}

/// What a client on that node gets from this address.
async fn ask(world: &World, address: &str) -> anyhow::Result<Output> {
    let (limit, url) = (
        PATIENCE.as_secs().to_string(),
        format!("http://{address}/name"),
    );
    let curl: [&str; 7] = ["curl", "--noproxy", "*", "-sS", "--max-time", &limit, &url];
    let client = world.service("kube/proxy.sh", "exec").args(curl);
    client.output().await
}

/// Asks until curl ends with this exit code. Whatever else it gets meanwhile, it may not wait in vain.
async fn until(world: &World, address: &str, code: i32) -> anyhow::Result<String> {
    let what = format!("{address}: exit code {code} of curl");
    let answer = wait_for(&what, SOON, async || {
        let answer = ask(world, address).await?;
        ensure!(answer.code == code || answer.code == IN_VAIN, "{answer}");
        anyhow::Ok(answer)
    })
    .await?;
    ensure!(answer.code == code, "waited in vain: {answer}");
    Ok(answer.text())
}

/// Waits until the address refuses connections.
async fn refuses(address: SocketAddr) -> anyhow::Result<()> {
    wait_for("a refusal", SOON, async || endpoint::refuses(address).await).await
}

#[tokio::test]
async fn kube_proxy_leads_to_pods_that_are_ready_and_refuses_at_once_when_none_is()
-> anyhow::Result<()> {
    let world = World::new("proxy").await?;
    begin(&world).await?;
    let (address, port) = service(&world, "NodePort").await?;
    let outside = SocketAddr::from((NODE, port.context("no port of the node")?));
    until(&world, &address, REFUSED).await?;
    refuses(outside).await?;
    world.running(&web::pod("one", SIZE)).await?;
    world.running(&web::pod("two", SIZE)).await?;
    // kube-proxy chooses a pod for each connection.
    let mut names = BTreeSet::new();
    wait_for("both pods answer", SOON, async || {
        names.insert(until(&world, &address, 0).await?);
        ensure!(names.len() == 2, "{names:?}");
        Ok(())
    })
    .await?;
    let (status, page) = web::fetch(outside, "", "/name").await?;
    let page = String::from_utf8(page)?;
    ensure!(
        status.contains(" 200 ") && names.contains(page.trim()),
        "{status}: {page}"
    );
    for name in ["one", "two"] {
        let unready = ["exec", name, "--", "rm", "/www/ready"];
        world.kubectl(unready).ok().await?;
    }
    until(&world, &address, REFUSED).await?;
    refuses(outside).await?;
    let again = ["exec", "one", "--", "sh", "-c", "echo yes >/www/ready"];
    world.kubectl(again).ok().await?;
    let name = until(&world, &address, 0).await?;
    ensure!(name == "one", "{name}");
    world.delete("one", None).await?;
    until(&world, &address, REFUSED).await?;
    refuses(outside).await?;
    world.wait_gone("one", SOON).await?;
    end(&world).await?;
    world.finish().await
}

#[tokio::test]
async fn an_ingress_leads_200_clients_at_once_to_a_web_server_in_a_job() -> anyhow::Result<()> {
    let world = World::new("ingress").await?;
    begin(&world).await?;
    let (address, _) = service(&world, "ClusterIP").await?;
    let backend = json!({"service": {"name": "web", "port": {"name": "http"}}});
    let paths = json!([{"path": "/", "pathType": "Prefix", "backend": backend}]);
    let rules = json!([{"host": HOST, "http": {"paths": paths}}]);
    let object = json!({"metadata": {"name": "web"}, "spec": {"rules": rules}});
    let ingresses: Api<Ingress> = world.api();
    ingresses
        .create(&PostParams::default(), &serde_json::from_value(object)?)
        .await?;
    world.running(&web::pod("one", SIZE)).await?;
    until(&world, &address, 0).await?;
    let up = world.service("kube/ingress.sh", "up").arg(&world.namespace);
    up.ok().await?;
    let front = SocketAddr::from((NODE, 80));
    answers(front, " 200 ", "one").await?;
    let (other, _) = web::fetch(front, "other.example.org", "/name").await?;
    ensure!(other.contains(" 404 "), "{other}");
    let mut fetches = JoinSet::new();
    for _ in 0..200 {
        fetches.spawn(web::fetch(front, HOST, "/large"));
    }
    while let Some(fetched) = fetches.join_next().await {
        let (status, page) = fetched??;
        ensure!(status.contains(" 200 "), "{status}");
        ensure!(page.len() == SIZE, "{} bytes of a page", page.len());
    }
    // nginx is told that nobody is there, and says so. It is not told of the next pod, and finds it.
    world.delete("one", None).await?;
    answers(front, " 502 ", "").await?;
    world.running(&web::pod("next", SIZE)).await?;
    answers(front, " 200 ", "next").await?;
    world.service("kube/ingress.sh", "down").ok().await?;
    end(&world).await?;
    world.finish().await
}

/// Waits until nginx answers with this status and a page with these words. It may never find that a Service does not answer (504).
async fn answers(front: SocketAddr, status: &str, words: &str) -> anyhow::Result<()> {
    let what = format!("status{status}and {words:?}");
    let got = wait_for(&what, SOON, async || {
        let (got, page) = web::fetch(front, HOST, "/name").await?;
        let page = String::from_utf8_lossy(&page).into_owned();
        let expected = got.contains(status) && page.contains(words);
        ensure!(expected || got.contains(" 504 "), "{got}: {page}");
        anyhow::Ok(got)
    })
    .await?;
    ensure!(got.contains(status), "nginx waited in vain: {got}");
    Ok(())
}
