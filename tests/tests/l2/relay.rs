//! Level 2: what the cluster opens to pods through the real kubelet, agent and shim. The API server is the fake one, and the test is
//! the cluster: it reads EndpointSlices, as kube-proxy does, and dials what they name.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use anyhow::{Context as _, ensure};
use knoc_tests::{
    endpoint,
    ports::{free_port, free_range},
    site::{Daemon, Kubelet, NODE, Options, Site},
    wait_for,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

const SOON: Duration = Duration::from_mins(2);
const SLICES: (&str, &str) = ("discovery.k8s.io/v1", "endpointslices");

/// Answers each connection, after the end of its input, with that and `-end`.
const SERVER: &str = r#"
import socket, sys, threading
server = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=512)
def serve(peer):
    with peer:
        total = b""
        while data := peer.recv(65536): total += data
        peer.sendall(total + b"-end")
while True: threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"#;

/// A site and a kubelet that relays.
async fn start() -> anyhow::Result<(Site, Kubelet, [Daemon; 2])> {
    let (site, agent, _) = Site::start(Options::default()).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let process = relaying(&site, &kubelet).await?;
    Ok((site, kubelet, [agent, process]))
}

async fn relaying(site: &Site, kubelet: &Kubelet) -> anyhow::Result<Daemon> {
    let ports = free_range(40)?;
    let ports = format!("{}-{}", ports.start(), ports.end());
    let env = [
        ("KNOC_RELAY_ALLOW", "default/*"),
        ("KNOC_RELAY_PORTS", &*ports),
    ];
    kubelet.start(site, &env).await
}

/// A pod with the label `app: web` that declares a port, and whose server listens on one.
fn pod(kubelet: &Kubelet, name: &str, declares: u16, listens: u16) -> anyhow::Result<()> {
    let main = json!({"name": "main", "image": "none", "command": ["python3", "-c", SERVER, listens.to_string()],
        "ports": [{"name": "http", "containerPort": declares}]});
    let spec = json!({"nodeName": NODE, "restartPolicy": "Never", "terminationGracePeriodSeconds": 5,
        "enableServiceLinks": false, "serviceAccountName": "default", "dnsPolicy": "ClusterFirst",
        "schedulerName": "default-scheduler", "containers": [main]});
    let pod = json!({"metadata": {"name": name, "labels": {"app": "web"}}, "spec": spec,
        "status": {"phase": "Pending", "qosClass": "BestEffort"}});
    kubelet.api.create("v1", "pods", "default", pod).map(drop)
}

fn web(kubelet: &Kubelet, name: &str) -> anyhow::Result<()> {
    let port = free_port()?;
    pod(kubelet, name, port, port)
}

fn service(kubelet: &Kubelet) -> anyhow::Result<()> {
    let service = json!({"metadata": {"name": "web"}, "spec": {"type": "ClusterIP", "clusterIP": "10.96.0.9",
        "selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}]}});
    kubelet
        .api
        .create("v1", "services", "default", service)
        .map(drop)
}

fn slices(kubelet: &Kubelet) -> Vec<Value> {
    kubelet.api.list(SLICES.0, SLICES.1, "default")
}

/// Waits until so many endpoints of the Service are ready; returns their addresses.
async fn ready(kubelet: &Kubelet, count: usize) -> anyhow::Result<BTreeSet<SocketAddr>> {
    wait_for("ready endpoints", SOON, async || {
        let slices = slices(kubelet);
        let ready = slices.iter().filter(|slice| {
            slice["endpoints"][0]["conditions"]
                == json!({"ready": true, "serving": true, "terminating": false})
        });
        let addresses: BTreeSet<SocketAddr> = ready.filter_map(address).collect();
        if addresses.len() == count && slices.len() == count {
            Ok(addresses)
        } else {
            Err(format!("{slices:?}"))
        }
    })
    .await
}

fn address(slice: &Value) -> Option<SocketAddr> {
    let address = slice["endpoints"][0]["addresses"][0].as_str()?;
    let port = u16::try_from(slice["ports"][0]["port"].as_u64()?).ok()?;
    Some(SocketAddr::new(address.parse().ok()?, port))
}

async fn exchange(address: SocketAddr, text: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(text).await?;
    stream.shutdown().await?;
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await?;
    Ok(all)
}

/// Waits until the server of the pod answers: a pod without a probe is ready before it listens.
async fn answers(address: SocketAddr) -> anyhow::Result<()> {
    wait_for("an answer of the pod", SOON, async || {
        match exchange(address, b"x").await {
            Ok(answer) if answer == b"x-end" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

/// A site and a kubelet as [`start`] has them, with a Service and its pod. Returns the address at which the pod answers, too.
async fn start_with_a_pod() -> anyhow::Result<(Site, Kubelet, [Daemon; 2], SocketAddr)> {
    let (site, kubelet, running) = start().await?;
    service(&kubelet)?;
    web(&kubelet, "one")?;
    let addresses = ready(&kubelet, 1).await?;
    let address = *addresses.first().context("no address")?;
    answers(address).await?;
    Ok((site, kubelet, running, address))
}

/// Waits until nothing is published, and the port refuses.
async fn refused(kubelet: &Kubelet, address: SocketAddr) -> anyhow::Result<()> {
    wait_for("no endpoint", SOON, async || {
        let slices = slices(kubelet);
        ensure!(slices.is_empty(), "{slices:?}");
        endpoint::refuses(address).await
    })
    .await
}

/// Waits for Events about what is not relayed; returns their messages.
async fn refusals(kubelet: &Kubelet) -> anyhow::Result<Vec<String>> {
    wait_for("the Event", SOON, async || {
        let events = kubelet.api.list("v1", "events", "default");
        let told = events
            .iter()
            .filter(|event| event["reason"] == "RelayRefused");
        let told: Vec<_> = told.map(|event| event["message"].to_string()).collect();
        if told.is_empty() {
            Err(format!("{events:?}"))
        } else {
            Ok(told)
        }
    })
    .await
}

#[tokio::test]
async fn a_service_leads_to_its_pods_until_they_are_gone() -> anyhow::Result<()> {
    let (_site, kubelet, _running) = start().await?;
    service(&kubelet)?;
    // Of a Service of somebody else: it stays.
    let foreign = json!({"metadata": {"name": "foreign", "labels": {"kubernetes.io/service-name": "other"}},
        "addressType": "IPv4", "ports": [], "endpoints": []});
    kubelet
        .api
        .create(SLICES.0, SLICES.1, "kube-system", foreign)?;
    web(&kubelet, "one")?;
    web(&kubelet, "two")?;
    let addresses = ready(&kubelet, 2).await?;
    for address in &addresses {
        answers(*address).await?;
    }
    // Many at once, each with data in both directions and a half-close.
    let mut connections = JoinSet::new();
    for number in 0..200u8 {
        let address = *addresses
            .iter()
            .nth(usize::from(number % 2))
            .context("two")?;
        connections.spawn(async move {
            let sent = vec![number; 200_000];
            let mut expected = sent.clone();
            expected.extend_from_slice(b"-end");
            ensure!(
                exchange(address, &sent).await? == expected,
                "other bytes came back"
            );
            anyhow::Ok(())
        });
    }
    while let Some(ended) = connections.join_next().await {
        ended??;
    }
    kubelet.api.delete("pods", "default", "one", &json!({}))?;
    kubelet.gone("one", SOON).await?;
    let left = ready(&kubelet, 1).await?;
    ensure!(
        left.is_subset(&addresses),
        "the other pod keeps its port: {left:?}"
    );
    kubelet.api.delete("pods", "default", "two", &json!({}))?;
    kubelet.gone("two", SOON).await?;
    for address in addresses {
        refused(&kubelet, address).await?;
    }
    let foreign = kubelet.api.list(SLICES.0, SLICES.1, "kube-system");
    ensure!(foreign.len() == 1, "{foreign:?}");
    Ok(())
}

/// The most connections to one pod.
const OF_ONE: usize = 224;

#[tokio::test]
async fn clients_that_send_nothing_keep_nobody_out_for_good() -> anyhow::Result<()> {
    let (_site, kubelet, _running, address) = start_with_a_pod().await?;
    let mut silent = Vec::new();
    for _ in 0..OF_ONE {
        silent.push(TcpStream::connect(address).await?);
    }
    // Connections are accepted in the order in which they were made, so this one finds no room.
    let full = exchange(address, b"x").await;
    ensure!(full.is_err(), "{full:?} beside {OF_ONE} connections");
    answers(address).await?;
    let told = refusals(&kubelet).await?;
    let closed = |text: &String| text.contains("was closed for a new one");
    wait_for("an Event about an idle connection", SOON, async || {
        let told = refusals(&kubelet).await?;
        ensure!(told.iter().any(closed), "{told:?}");
        Ok(())
    })
    .await
    .with_context(|| format!("at first {told:?}"))?;
    drop(silent);
    Ok(())
}

#[tokio::test]
async fn a_pod_that_a_network_policy_selects_is_relayed_to_no_more_and_told() -> anyhow::Result<()>
{
    let (_site, kubelet, _running, address) = start_with_a_pod().await?;
    let policy = json!({"metadata": {"name": "deny"}, "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}});
    let policies = ("networking.k8s.io/v1", "networkpolicies");
    kubelet
        .api
        .create(policies.0, policies.1, "default", policy)?;
    refused(&kubelet, address).await?;
    let told = refusals(&kubelet).await?;
    ensure!(
        told.len() == 1 && told[0].contains("NetworkPolicy deny selects the pod"),
        "{told:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_pod_whose_slice_the_api_server_rejects_is_told_once_and_published_later()
-> anyhow::Result<()> {
    let (_site, kubelet, _running) = start().await?;
    kubelet.api.exceed_quota(SLICES.1, true);
    service(&kubelet)?;
    web(&kubelet, "one")?;
    let told = refusals(&kubelet).await?;
    ensure!(
        told.len() == 1
            && told[0].contains("Service default/web")
            && told[0].contains("exceeded quota"),
        "{told:?}"
    );
    kubelet.api.exceed_quota(SLICES.1, false);
    let addresses = ready(&kubelet, 1).await?;
    answers(*addresses.first().context("no address")?).await?;
    let told = refusals(&kubelet).await?;
    ensure!(told.len() == 1, "{told:?}");
    Ok(())
}

#[tokio::test]
async fn a_pod_that_does_not_listen_resets_and_a_kubelet_that_ends_withdraws() -> anyhow::Result<()>
{
    let (site, kubelet, [_agent, process]) = start().await?;
    service(&kubelet)?;
    // It listens on another port than the one that it declares.
    pod(&kubelet, "one", free_port()?, free_port()?)?;
    let addresses = ready(&kubelet, 1).await?;
    let address = *addresses.first().context("no address")?;
    let mut stream = TcpStream::connect(address).await?;
    let error = stream
        .read(&mut [0])
        .await
        .err()
        .context("the connection ended as if all was well")?;
    ensure!(
        error.kind() == std::io::ErrorKind::ConnectionReset,
        "{error}"
    );
    process.terminate().await?;
    let left = slices(&kubelet);
    ensure!(left.is_empty(), "{left:?}");
    // The next one publishes the pod again.
    let _process = relaying(&site, &kubelet).await?;
    ready(&kubelet, 1).await?;
    Ok(())
}
