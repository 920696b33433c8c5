//! What pods reach in the benchmarks of egress. The bed has no cluster DNS: this program is behind `kube-system/kube-dns`, which
//! pods may reach by default, with DNS on port 53 (UDP), a sink on port 53 (TCP), and a server that says one byte on port 5300.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Context as _;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, UdpSocket},
    task::JoinSet,
};

use crate::bench::bed::Bed;

/// This host on the network of the login node.
pub(super) const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

const NAMESPACE: &str = "kube-system";
const NAME: &str = "kube-dns";
/// How much is read at once.
const CHUNK: usize = 1 << 16;

/// Where the servers listen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ports {
    dns: u16,
    pub(super) sink: u16,
    greeter: u16,
}

/// Starts the servers.
pub(super) async fn start(tasks: &mut JoinSet<()>) -> anyhow::Result<Ports> {
    let any = SocketAddr::new(HOST.into(), 0);
    let dns = UdpSocket::bind(any).await?;
    let sink = TcpListener::bind(any).await?;
    let greeter = TcpListener::bind(any).await?;
    let ports = Ports {
        dns: dns.local_addr()?.port(),
        sink: sink.local_addr()?.port(),
        greeter: greeter.local_addr()?.port(),
    };
    tasks.spawn(answer(dns));
    tasks.spawn(swallow(sink));
    tasks.spawn(greet(greeter));
    Ok(ports)
}

/// Answers every question with an address, for half a minute.
async fn answer(socket: UdpSocket) {
    let mut buffer = [0; 512];
    while let Ok((count, from)) = socket.recv_from(&mut buffer).await {
        let mut answer = buffer.get(..count).unwrap_or_default().to_vec();
        let flags = [0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0];
        if let Some(header) = answer.get_mut(2..12) {
            header.copy_from_slice(&flags);
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 10, 96, 7, 7]);
            socket.send_to(&answer, from).await.ok();
        }
    }
}

/// Reads each connection to its end.
async fn swallow(listener: TcpListener) {
    let mut peers = JoinSet::new();
    while let Ok((mut peer, _)) = listener.accept().await {
        peers.spawn(async move {
            let mut chunk = vec![0; CHUNK];
            while peer.read(&mut chunk).await.is_ok_and(|count| count > 0) {}
        });
    }
}

/// Says one byte on each connection, and keeps it.
async fn greet(listener: TcpListener) {
    let mut peers = Vec::new();
    while let Ok((mut peer, _)) = listener.accept().await {
        if peer.write_all(b"x").await.is_ok() {
            peers.push(peer);
        }
    }
}

/// Creates the Service and its endpoint; returns its address.
pub(super) async fn publish(bed: &Bed, ports: Ports) -> anyhow::Result<String> {
    // Of a run that was interrupted.
    withdraw(bed).await.ok();
    let services: Api<Service> = bed.world.api_in(NAMESPACE);
    let slices: Api<EndpointSlice> = bed.world.api_in(NAMESPACE);
    let all = [
        ("dns", 53, "UDP", ports.dns),
        ("sink", 53, "TCP", ports.sink),
        ("greeter", 5300, "TCP", ports.greeter),
    ];
    let of_service = all
        .map(|(name, port, protocol, _)| json!({"name": name, "port": port, "protocol": protocol}));
    let of_slice = all
        .map(|(name, _, protocol, port)| json!({"name": name, "port": port, "protocol": protocol}));
    let object = json!({"metadata": {"name": NAME}, "spec": {"ports": of_service}});
    let service = serde_json::from_value(object)?;
    let created = services.create(&PostParams::default(), &service).await?;
    let labels = json!({"kubernetes.io/service-name": NAME});
    let slice = json!({"metadata": {"name": NAME, "labels": labels}, "addressType": "IPv4", "ports": of_slice,
        "endpoints": [{"addresses": [HOST.to_string()], "conditions": {"ready": true}}]});
    let slice = serde_json::from_value(slice)?;
    slices.create(&PostParams::default(), &slice).await?;
    let address = created.spec.and_then(|spec| spec.cluster_ip);
    address.context("the Service has no address")
}

/// Deletes it.
pub(super) async fn withdraw(bed: &Bed) -> anyhow::Result<()> {
    let services: Api<Service> = bed.world.api_in(NAMESPACE);
    let slices: Api<EndpointSlice> = bed.world.api_in(NAMESPACE);
    let service = services.delete(NAME, &DeleteParams::default()).await;
    slices.delete(NAME, &DeleteParams::default()).await.ok();
    service.map(drop).context("deleting the Service")
}
