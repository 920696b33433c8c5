//! What stands for the cluster's own services on the bed, which has no other node: Services whose endpoint is this host, and cluster DNS.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
};
use serde_json::json;
use tokio::{net::UdpSocket, sync::watch, task::JoinSet};

use crate::{PodBuilder, World, wait_for, world::SOON};

/// This host on the network of the login node.
const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The Service of cluster DNS.
const DNS: (&str, &str) = ("kube-system", "kube-dns");

/// Names in lower case, and their addresses.
type Names = Vec<(String, Ipv4Addr)>;

/// Creates a Service without a selector, with an endpoint at this host: protocol, port, and port of this host. Returns its address.
pub async fn host_service(
    world: &World,
    namespace: &str,
    name: &str,
    (protocol, number, target): (&str, u16, u16),
) -> anyhow::Result<String> {
    // Of a run that was interrupted.
    withdraw(world, namespace, name).await;
    let services: Api<Service> = world.api_in(namespace);
    let object = json!({"metadata": {"name": name}, "spec": {"ports": [{"name": "main", "port": number, "protocol": protocol}]}});
    let created = services
        .create(&PostParams::default(), &serde_json::from_value(object)?)
        .await?;
    let slices: Api<EndpointSlice> = world.api_in(namespace);
    let slice = json!({"metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}}, "addressType": "IPv4",
        "ports": [{"name": "main", "port": target, "protocol": protocol}],
        "endpoints": [{"addresses": [HOST.to_string()], "conditions": {"ready": true}}]});
    slices
        .create(&PostParams::default(), &serde_json::from_value(slice)?)
        .await?;
    created
        .spec
        .and_then(|spec| spec.cluster_ip)
        .context("no address")
}

/// Deletes what is there of the Service.
async fn withdraw(world: &World, namespace: &str, name: &str) {
    let services: Api<Service> = world.api_in(namespace);
    let slices: Api<EndpointSlice> = world.api_in(namespace);
    services.delete(name, &DeleteParams::default()).await.ok();
    slices.delete(name, &DeleteParams::default()).await.ok();
}

/// Waits until pods are given the resolver with this address: a pod has the one that was known when it was staged.
pub async fn resolver_reaches_pods(world: &World, address: &str) -> anyhow::Result<()> {
    let mut number = 0;
    wait_for("a pod with the cluster's resolver", SOON * 2, async || {
        number += 1;
        let name = format!("resolver{number}");
        let pod = PodBuilder::new(&name)
            .annotation("knoc.io/network", "private")
            .command(["cat", "/etc/resolv.conf"]);
        world.run(&pod, "Succeeded").await?;
        let file = world.logs(&name, "main").await?;
        ensure!(file.contains(&format!("nameserver {address}\n")), "{file}");
        Ok(())
    })
    .await
}

/// The DNS server behind `kube-system/kube-dns`, until it is withdrawn. The cluster has one, so one test at a time.
#[derive(Debug)]
pub struct ClusterDns {
    /// The address of its Service.
    pub address: String,
    names: watch::Sender<Names>,
    asked: Arc<AtomicUsize>,
    /// The task that answers, which ends when this is dropped.
    _server: JoinSet<()>,
}

impl ClusterDns {
    /// Starts a server that knows no name yet.
    pub async fn start(world: &World) -> anyhow::Result<Self> {
        let socket = UdpSocket::bind((HOST, 0)).await?;
        let port = socket.local_addr()?.port();
        let (names, known) = watch::channel(Names::new());
        let asked = Arc::new(AtomicUsize::new(0));
        let mut server = JoinSet::new();
        server.spawn(serve(socket, known, Arc::clone(&asked)));
        let (namespace, name) = DNS;
        let address = host_service(world, namespace, name, ("UDP", 53, port)).await?;
        Ok(Self {
            address,
            names,
            asked,
            _server: server,
        })
    }

    /// Gives the name this address.
    pub fn add(&self, name: &str, address: Ipv4Addr) {
        self.names
            .send_modify(|names| names.push((name.to_lowercase(), address)));
    }

    /// Waits until pods are given this server.
    pub async fn reaches_pods(&self, world: &World) -> anyhow::Result<()> {
        resolver_reaches_pods(world, &self.address).await
    }

    /// How many questions were asked so far.
    #[must_use]
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    /// Deletes the Service, and ends the server.
    pub async fn withdraw(self, world: &World) {
        let (namespace, name) = DNS;
        withdraw(world, namespace, name).await;
        drop(self);
    }
}

/// Task: answers questions, and counts them.
async fn serve(socket: UdpSocket, names: watch::Receiver<Names>, asked: Arc<AtomicUsize>) {
    let mut buffer = [0; 2048];
    while let Ok((count, from)) = socket.recv_from(&mut buffer).await {
        asked.fetch_add(1, Ordering::Relaxed);
        let question = buffer.get(..count).unwrap_or_default();
        let reply = answer(question, &names.borrow());
        if let Some(reply) = reply {
            drop(socket.send_to(&reply, from).await);
        }
    }
}

/// PURE: the answer to a question about a name that has one of these addresses, or has none.
fn answer(question: &[u8], names: &[(String, Ipv4Addr)]) -> Option<Vec<u8>> {
    let (mut at, mut labels) = (12, Vec::new());
    loop {
        let length = usize::from(*question.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(question.get(at..at + length)?).to_lowercase());
        at += length;
    }
    let kind = question.get(at..at + 2)?;
    let name = labels.join(".");
    let found = names.iter().find(|(known, _)| *known == name);
    let address = found.filter(|_| kind == [0, 1]);
    let code = if found.is_some() { 0x80 } else { 0x83 };
    let mut answer = question.get(..2)?.to_vec();
    answer.extend([0x81, code, 0, 1, 0, u8::from(address.is_some()), 0, 0, 0, 0]);
    answer.extend(question.get(12..at + 4)?);
    if let Some((_, address)) = address {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}
