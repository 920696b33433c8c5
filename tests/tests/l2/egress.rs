//! Level 2: what pods reach of a cluster through the real kubelet, agent and shim. The API server is the fake one, and the
//! test has the endpoints. Without a container runtime pods are in the node's network, in which the API server alone is
//! reached.

use std::{io, time::Duration};

use anyhow::{Context as _, ensure};
use knoc_tests::{
    endpoint,
    ports::free_port,
    site::{Daemon, Kubelet, Options, Site},
    wait_for,
};
use rustix::net::sockopt::set_socket_linger;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    task::JoinSet,
};

pub(crate) const SOON: Duration = Duration::from_mins(4);

/// Connects to the API server as often as it is told: sends, ends its direction, and says what came back.
const CLIENT: &str = r#"
import os, socket, sys, time
target = (os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"]))
for number in range(int(sys.argv[1])):
    total, began = b"", time.monotonic()
    try:
        with socket.create_connection(target) as peer:
            peer.sendall(b"x" * 300000)
            peer.shutdown(socket.SHUT_WR)
            while data := peer.recv(65536): total += data
        print(number, "got", len(total), total[-5:], flush=True)
    except OSError as error:
        print(number, "reset after", len(total), "at once" if time.monotonic() - began < 8 else "late", flush=True)
print("end", flush=True)
"#;

/// A server that answers each connection, after its end, with what it said and ` end`.
async fn echo() -> anyhow::Result<(u16, JoinSet<()>)> {
    endpoint::serve(|mut peer: TcpStream| async move {
        let mut all = Vec::new();
        peer.read_to_end(&mut all).await?;
        all.extend_from_slice(b" end");
        peer.write_all(&all).await
    })
    .await
}

/// The Service `default/kubernetes` with this port.
pub(crate) fn service(port: u16) -> serde_json::Value {
    json!({"metadata": {"name": "kubernetes"}, "spec": {"type": "ClusterIP", "clusterIP": "10.96.0.1",
        "clusterIPs": ["10.96.0.1"], "ports": [{"name": "https", "port": port, "protocol": "TCP"}]}})
}

/// The EndpointSlice of the Service `default/kubernetes`, which leads to this port of this host.
pub(crate) fn slice(port: u16) -> serde_json::Value {
    json!({"metadata": {"name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": "IPv4", "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["127.0.0.1"], "conditions": {"ready": true}}]})
}

/// A cluster with the Service `default/kubernetes`, whose endpoint is that port of this host.
async fn cluster(site: &Site, port: u16) -> anyhow::Result<Kubelet> {
    let kubelet = Kubelet::prepare(site).await?;
    let api = &kubelet.api;
    api.create("v1", "services", "default", service(443))?;
    let ranges = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}});
    api.create("networking.k8s.io/v1", "servicecidrs", "", ranges)?;
    if port > 0 {
        let slice = slice(port);
        api.create("discovery.k8s.io/v1", "endpointslices", "default", slice)?;
    }
    Ok(kubelet)
}

fn client(kubelet: &Kubelet, name: &str, connections: u32) -> anyhow::Result<String> {
    let main = json!({"name": "main", "image": "none", "command": ["python3", "-c", CLIENT, connections.to_string()]});
    kubelet.create_pod(name, json!({"containers": [main]}))
}

/// The log of the pod, once it is so.
async fn log_when(
    site: &Site,
    uid: &str,
    what: &str,
    is_so: impl Fn(&str) -> bool,
) -> anyhow::Result<String> {
    wait_for(what, SOON, async || {
        let run = site.knocctl(["logs", uid]);
        let run = run.map_err(|error| error.to_string())?;
        let output = run.output().await;
        let log = output.map_err(|error| format!("{error:#}"))?.text();
        if is_so(&log) { Ok(log) } else { Err(log) }
    })
    .await
}

/// The log of the pod, once its client has ended.
pub(crate) async fn log(site: &Site, uid: &str) -> anyhow::Result<String> {
    let is_end = |log: &str| log.contains("end\n") || log.ends_with("end");
    log_when(site, uid, "the end of the client", is_end).await
}

/// Waits until the log of the pod has this text.
pub(crate) async fn logged(site: &Site, uid: &str, text: &str) -> anyhow::Result<()> {
    let has = |log: &str| log.contains(text);
    log_when(site, uid, text, has).await.map(drop)
}

/// The messages of the pod's Events about connections that were refused.
pub(crate) async fn refusals(kubelet: &Kubelet) -> anyhow::Result<Vec<String>> {
    told(kubelet, "EgressRefused").await
}

/// The messages of the Events with this reason, once there is one.
pub(crate) async fn told(kubelet: &Kubelet, reason: &str) -> anyhow::Result<Vec<String>> {
    wait_for(reason, SOON, async || {
        let messages = told_by_now(kubelet, reason);
        if messages.is_empty() {
            Err(format!("{:?}", kubelet.api.list("v1", "events", "default")))
        } else {
            Ok(messages)
        }
    })
    .await
}

/// The messages of the Events with this reason.
pub(crate) fn told_by_now(kubelet: &Kubelet, reason: &str) -> Vec<String> {
    let events = kubelet.api.list("v1", "events", "default");
    let wanted = events.iter().filter(|event| event["reason"] == reason);
    wanted.map(|event| event["message"].to_string()).collect()
}

/// Waits until the kubelet's own metrics have these lines.
async fn counted(site: &Site, kubelet: &Kubelet, lines: &[String]) -> anyhow::Result<()> {
    let client = kubelet.client(site)?;
    wait_for("the metrics", SOON, async || {
        let request = http::Request::get("/metrics").body(Vec::new())?;
        let text = client.request_text(request).await?;
        let missing = lines
            .iter()
            .find(|line| !text.lines().any(|one| one == **line));
        ensure!(missing.is_none(), "{missing:?} is not in {text}");
        Ok(())
    })
    .await
}

/// A site, a cluster and a kubelet with these settings.
pub(crate) async fn start(
    tables: &str,
    port: u16,
    env: &[(&str, &str)],
) -> anyhow::Result<(Site, Kubelet, [Daemon; 2])> {
    let options = Options {
        tables: tables.to_owned(),
        ..Options::default()
    };
    let (site, agent, _) = Site::start(options).await?;
    let kubelet = cluster(&site, port).await?;
    let process = kubelet.start(&site, env).await?;
    Ok((site, kubelet, [agent, process]))
}

#[tokio::test]
async fn a_pod_reaches_the_api_server_through_kubelet_agent_and_shim() -> anyhow::Result<()> {
    let (port, _echo) = echo().await?;
    let (site, kubelet, _running) = start("", port, &[]).await?;
    let uid = client(&kubelet, "client", 3)?;
    let log = log(&site, &uid).await?;
    for number in 0..3 {
        let expected = format!("{number} got 300004 b'x end'");
        ensure!(log.contains(&expected), "{log}");
    }
    let lines = [
        "knoc_connections_total{direction=\"egress\"} 3",
        "knoc_connections_open{direction=\"egress\"} 0",
        "knoc_connection_bytes_total{direction=\"egress\",to=\"cluster\"} 900000",
        "knoc_connection_bytes_total{direction=\"egress\",to=\"pod\"} 900012",
    ];
    counted(&site, &kubelet, &lines.map(str::to_owned)).await
}

/// Checks that so many connections were reset, and that this does not wait for the time after which nobody takes them: a busy machine may
/// delay some, but not all.
fn all_reset(log: &str, count: usize) -> anyhow::Result<()> {
    ensure!(log.matches("reset after 0 ").count() == count, "{log}");
    ensure!(log.contains("reset after 0 at once"), "{log}");
    Ok(())
}

/// The line that counts connections of pods that were refused for this reason.
fn refused_line(reason: &str, count: u32) -> String {
    let labels = format!("direction=\"egress\",reason=\"{reason}\"");
    format!("knoc_connections_refused_total{{{labels}}} {count}")
}

#[tokio::test]
async fn a_service_that_the_cluster_does_not_list_is_refused_with_one_event() -> anyhow::Result<()>
{
    let (port, _echo) = echo().await?;
    let list = [("KNOC_EGRESS_ALLOW", "kube-system/kube-dns")];
    let (site, kubelet, _running) = start("", port, &list).await?;
    let uid = client(&kubelet, "client", 3)?;
    let log = log(&site, &uid).await?;
    all_reset(&log, 3)?;
    let refused = refusals(&kubelet).await?;
    ensure!(refused.len() == 1, "{refused:?}");
    let expected = ["default/kubernetes (port 443)", "`egress.allow`"];
    ensure!(
        expected.iter().all(|text| refused[0].contains(text)),
        "{refused:?}"
    );
    counted(&site, &kubelet, &[refused_line("not_listed", 3)]).await
}

#[tokio::test]
async fn a_service_that_the_site_does_not_list_is_refused_with_one_event() -> anyhow::Result<()> {
    let (port, _echo) = echo().await?;
    let (site, kubelet, _running) =
        start("[policy]\negress = [\"kube-system/*\"]", port, &[]).await?;
    let uid = client(&kubelet, "client", 3)?;
    let log = log(&site, &uid).await?;
    all_reset(&log, 3)?;
    let refused = refusals(&kubelet).await?;
    ensure!(refused.len() == 1, "{refused:?}");
    ensure!(
        refused[0].contains("is not among policy.egress of the site file"),
        "{refused:?}"
    );
    counted(&site, &kubelet, &[refused_line("policy", 3)]).await
}

#[tokio::test]
async fn a_service_without_endpoints_is_refused_and_the_event_says_so() -> anyhow::Result<()> {
    let (site, kubelet, _running) = start("", 0, &[]).await?;
    let uid = client(&kubelet, "client", 3)?;
    let log = log(&site, &uid).await?;
    all_reset(&log, 3)?;
    let refused = refusals(&kubelet).await?;
    ensure!(
        refused[0].contains("has no endpoint that is ready for port 443"),
        "{refused:?}"
    );
    Ok(())
}

#[tokio::test]
async fn an_endpoint_that_does_not_answer_is_one_event() -> anyhow::Result<()> {
    // Nobody listens at the port any more.
    let (port, echo) = echo().await?;
    drop(echo);
    let (site, kubelet, _running) = start("", port, &[]).await?;
    let uid = client(&kubelet, "client", 3)?;
    let log = log(&site, &uid).await?;
    ensure!(log.matches("reset after 0").count() == 3, "{log}");
    let failed = told(&kubelet, "EgressFailed").await?;
    ensure!(failed.len() == 1, "{failed:?}");
    let expected = ["default/kubernetes (port 443)", "refused"];
    ensure!(
        expected.iter().all(|text| failed[0].contains(text)),
        "{failed:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_kubelet_without_its_permissions_says_so_and_no_pod_waits() -> anyhow::Result<()> {
    let (port, _echo) = echo().await?;
    let (site, _agent, _) = Site::start(Options::default()).await?;
    let kubelet = cluster(&site, port).await?;
    kubelet.api.deny_list("endpointslices", true);
    let _process = kubelet.start(&site, &[]).await?;
    let told = told(&kubelet, "EgressUnavailable").await?;
    ensure!(
        told.len() == 1 && told[0].contains("list and watch endpointslices"),
        "{told:?}"
    );
    let main = json!({"name": "main", "image": "none", "command": ["true"]});
    kubelet.create_pod("alone", json!({"containers": [main]}))?;
    kubelet.phase("alone", "Succeeded", SOON).await?;
    let kubelets = std::fs::read_to_string(site.path("kubelet.log"))?;
    ensure!(
        !kubelets.contains("could not be described to the agent in time"),
        "{kubelets}"
    );
    let again = told_by_now(&kubelet, "EgressUnavailable");
    ensure!(again.len() == 1, "{again:?}");
    // Once it may, pods reach the cluster.
    kubelet.api.deny_list("endpointslices", false);
    wait_for("the network is described", SOON, async || {
        let kubelets =
            std::fs::read_to_string(site.path("kubelet.log")).map_err(|error| error.to_string())?;
        if kubelets.contains("pods can reach the cluster") {
            Ok(())
        } else {
            Err(kubelets)
        }
    })
    .await?;
    let uid = client(&kubelet, "client", 1)?;
    let log = log(&site, &uid).await?;
    ensure!(log.matches("got 300004").count() == 1, "{log}");
    Ok(())
}

#[tokio::test]
async fn a_cluster_that_does_not_say_the_ranges_of_services_is_one_event() -> anyhow::Result<()> {
    let (site, _agent, _) = Site::start(Options::default()).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let _process = kubelet.start(&site, &[]).await?;
    let told = told(&kubelet, "EgressUnavailable").await?;
    ensure!(
        told.len() == 1 && told[0].contains("`egress.serviceRanges`"),
        "{told:?}"
    );
    let main = json!({"name": "main", "image": "none", "command": ["true"]});
    kubelet.create_pod("alone", json!({"containers": [main]}))?;
    kubelet.phase("alone", "Succeeded", SOON).await?;
    let again = told_by_now(&kubelet, "EgressUnavailable");
    ensure!(again.len() == 1, "{again:?}");
    Ok(())
}

#[tokio::test]
async fn a_kubelet_that_starts_again_serves_new_connections() -> anyhow::Result<()> {
    let (port, _echo) = echo().await?;
    let (site, kubelet, [_agent, process]) = start("", port, &[]).await?;
    let uid = client(&kubelet, "before", 1)?;
    log(&site, &uid).await?;
    drop(process);
    let _process = kubelet.start(&site, &[]).await?;
    let uid = client(&kubelet, "after", 2)?;
    let log = log(&site, &uid).await?;
    ensure!(log.matches("got 300004").count() == 2, "{log}");
    Ok(())
}

#[tokio::test]
async fn a_connection_that_the_endpoint_does_not_accept_is_reset_at_once() -> anyhow::Result<()> {
    // Not one that was just closed: the kernel may give it to another test.
    let (site, kubelet, _running) = start("", free_port()?, &[]).await?;
    let uid = client(&kubelet, "client", 3)?;
    let log = log(&site, &uid).await?;
    all_reset(&log, 3)?;
    let events = kubelet.api.list("v1", "events", "default");
    ensure!(
        events
            .iter()
            .all(|event| event["reason"] != "EgressRefused"),
        "nobody has refused it: {events:?}"
    );
    Ok(())
}

/// Breaks one connection off after the first bytes of the other side, and reads the other one until that side breaks it off.
const BREAKER: &str = r#"
import os, socket, struct
target = (os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"]))
with socket.create_connection(target) as peer:
    peer.sendall(b"w")
    peer.recv(10)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
try:
    with socket.create_connection(target) as peer:
        peer.sendall(b"r")
        while peer.recv(10): pass
    print("complete", flush=True)
except OSError as error:
    print("broken", flush=True)
print("end", flush=True)
"#;

/// A server that answers `part`, and then resets a connection on which it was sent `r`. The channel has the end of each other
/// connection.
async fn breaker() -> anyhow::Result<(u16, JoinSet<()>, mpsc::Receiver<io::Result<usize>>)> {
    let (ended, ends) = mpsc::channel(4);
    let (port, tasks) = endpoint::serve(move |mut peer: TcpStream| {
        let ended = ended.clone();
        async move {
            let mut first = [0];
            peer.read_exact(&mut first).await?;
            // The kubelet itself connects too, and looks for a certificate.
            if !b"rw".contains(&first[0]) {
                return Ok(());
            }
            peer.write_all(b"part").await?;
            if first == *b"r" {
                // Without this option the peer would see the end of the stream instead of a reset.
                set_socket_linger(&peer, Some(Duration::ZERO)).ok();
                return Ok(());
            }
            let end = peer.read_to_end(&mut Vec::new()).await;
            ended.send(end).await.ok();
            Ok(())
        }
    })
    .await?;
    Ok((port, tasks, ends))
}

#[tokio::test]
async fn a_connection_that_one_side_breaks_off_is_not_complete_for_the_other() -> anyhow::Result<()>
{
    let (port, _breaker, mut ends) = breaker().await?;
    let (site, kubelet, _running) = start("", port, &[]).await?;
    let main = json!({"name": "main", "image": "none", "command": ["python3", "-c", BREAKER]});
    let uid = kubelet.create_pod("client", json!({"containers": [main]}))?;
    let end = tokio::time::timeout(SOON, ends.recv()).await?;
    let end = end.context("no connection")?.map_err(|error| error.kind());
    ensure!(end == Err(io::ErrorKind::ConnectionReset), "{end:?}");
    let log = log(&site, &uid).await?;
    ensure!(log.starts_with("broken"), "{log}");
    Ok(())
}

#[tokio::test]
async fn a_kubelet_that_turns_it_off_takes_the_network_back() -> anyhow::Result<()> {
    let (port, _echo) = echo().await?;
    let (site, kubelet, [_agent, process]) = start("", port, &[]).await?;
    let uid = client(&kubelet, "before", 1)?;
    log(&site, &uid).await?;
    drop(process);
    let _process = kubelet
        .start(&site, &[("KNOC_EGRESS_ALLOW", "off")])
        .await?;
    let mut number = 0;
    wait_for("pods without a way to the API server", SOON, async || {
        number += 1;
        let script = "echo $KUBERNETES_SERVICE_HOST; echo end";
        let main = json!({"name": "main", "image": "none", "command": ["sh", "-c", script]});
        let pod = kubelet.create_pod(&format!("after{number}"), json!({"containers": [main]}));
        let uid = pod.map_err(|error| format!("{error:#}"))?;
        let log = log(&site, &uid)
            .await
            .map_err(|error| format!("{error:#}"))?;
        if log.starts_with("10.96.0.1\n") {
            Ok(())
        } else {
            Err(log)
        }
    })
    .await?;
    Ok(())
}
