//! Level 2: host ports, and pods that ask for a network which this site does not have: without a container runtime, all pods
//! are in the node's network.

use std::{net::TcpListener, time::Duration};

use anyhow::ensure;
use knoc_proto::pb::{self, OutcomeKind};
use knoc_tests::{
    endpoint,
    ports::free_port,
    site::{Options, Pod, Site, container},
    wait_for,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const SOON: Duration = Duration::from_mins(2);

/// Answers each connection, after its end, with what it said.
const SERVER: &str = r#"
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("up", flush=True)
while True:
    with server.accept()[0] as peer:
        total = b""
        while data := peer.recv(65536): total += data
        peer.sendall(total)
"#;

fn policy(ports: &str) -> Options {
    Options {
        tables: format!("[policy]\nhost_ports = [{ports}]"),
        ..Options::default()
    }
}

/// A server, with a port of the node that leads to it.
fn server(uid: &str, host_port: u16) -> anyhow::Result<Pod> {
    let port = free_port()?;
    let mut main = container("main", &["python3", "-c", SERVER, &port.to_string()], &[]);
    main.host_ports = vec![pb::HostPort {
        host_port: host_port.into(),
        container_port: port.into(),
        host_ip: "127.0.0.1".to_owned(),
        udp: false,
    }];
    Ok(Pod::new(uid, vec![main]))
}

async fn exchange(port: u16, question: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let (mut reader, mut writer) = stream.split();
    let send = async {
        writer.write_all(question).await?;
        writer.shutdown().await
    };
    let mut answer = Vec::new();
    tokio::try_join!(send, reader.read_to_end(&mut answer))?;
    Ok(answer)
}

#[tokio::test]
async fn a_host_port_leads_to_the_pod_and_ends_with_it() -> anyhow::Result<()> {
    let port = free_port()?;
    let (_site, _agent, client) = Site::start(policy(&format!("\"{port}\""))).await?;
    let pod = server("web", port)?;
    pod.ensure(&client).await?;
    let question = vec![7; 3 << 20];
    wait_for("an answer", SOON, async || {
        let answer = exchange(port, &question).await?;
        ensure!(answer == question, "{} bytes", answer.len());
        Ok(())
    })
    .await?;
    pod.remove(&client).await?;
    wait_for("nobody listens", SOON, async || {
        endpoint::refuses(("127.0.0.1", port)).await
    })
    .await
}

#[tokio::test]
async fn a_host_port_that_the_site_does_not_list_is_rejected_and_one_that_is_taken_fails()
-> anyhow::Result<()> {
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port();
    let (_site, _agent, client) = Site::start(policy(&format!("\"{port}\""))).await?;
    let other = if port > 2000 { port - 1 } else { port + 1 };
    let unlisted = server("unlisted", other)?;
    let rejected = client.clone().ensure_pod(unlisted.request.clone()).await;
    let why = rejected.err().map(|status| status.message().to_owned());
    let why = why.unwrap_or_default();
    let expected = format!("hostPort {other} is not among policy.host_ports");
    ensure!(
        why.contains(&expected) && why.contains("containers[main]"),
        "{why}"
    );
    let pod = server("taken", port)?;
    pod.ensure(&client).await?;
    let outcome = pod.finished(&client, SOON).await?;
    ensure!(outcome.kind() == OutcomeKind::Failed, "{outcome:?}");
    let expected = format!("hostPort {port} cannot be used on the compute node");
    ensure!(outcome.message.contains(&expected), "{outcome:?}");
    drop(taken);
    Ok(())
}

/// All pods of this site are in the node's network.
#[tokio::test]
async fn datagrams_from_a_host_port_need_a_network_of_the_pods_own() -> anyhow::Result<()> {
    let port = free_port()?;
    let (_site, _agent, client) = Site::start(policy(&format!("\"{port}\""))).await?;
    let mut pod = server("datagrams", port)?;
    for container in pod
        .request
        .spec
        .iter_mut()
        .flat_map(|spec| &mut spec.containers)
    {
        for port in &mut container.host_ports {
            port.udp = true;
        }
    }
    pod.ensure(&client).await?;
    let outcome = pod.finished(&client, SOON).await?;
    ensure!(outcome.kind() == OutcomeKind::Failed, "{outcome:?}");
    let expected = format!("hostPort {port}: datagrams are forwarded");
    ensure!(outcome.message.contains(&expected), "{outcome:?}");
    Ok(())
}

#[tokio::test]
async fn a_network_of_its_own_that_the_node_cannot_give_fails_the_pod_and_says_why()
-> anyhow::Result<()> {
    let (_site, _agent, client) = Site::start(Options::default()).await?;
    let mut pod = Pod::new("private", vec![container("main", &["true"], &[])]);
    if let Some(spec) = &mut pod.request.spec {
        spec.set_network(pb::NetworkMode::Private);
    }
    pod.ensure(&client).await?;
    let outcome = pod.finished(&client, SOON).await?;
    ensure!(outcome.kind() == OutcomeKind::Failed, "{outcome:?}");
    let text = "the pod is to have a network of its own (`private`): the container runtime of this site cannot";
    ensure!(outcome.message.contains(text), "{outcome:?}");
    // A pod that does not ask is in the node's network.
    let pod = Pod::new("auto", vec![container("main", &["sleep", "600"], &[])]);
    pod.ensure(&client).await?;
    let observed = pod.running(&client, SOON).await?;
    let network = observed.network.unwrap_or_default();
    ensure!(network.mode() == pb::NetworkMode::Host, "{network:?}");
    ensure!(network.reason.is_empty(), "{network:?}");
    pod.remove(&client).await
}
