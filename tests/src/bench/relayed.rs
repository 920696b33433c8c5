//! A Service that leads to the pod of the streams. The bed has no kube-proxy: the endpoint is dialled, as kube-proxy would.

use std::{net::SocketAddr, time::Duration};

use anyhow::Context as _;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::api::{DeleteParams, ListParams, PostParams};
use serde_json::json;
use tokio::{io::AsyncReadExt as _, net::TcpStream};

use super::bed::Bed;
use crate::wait_for;

/// The label of the pod.
pub(super) const LABEL: (&str, &str) = ("app", "stream");
/// The name of the Service.
const NAME: &str = "stream";
/// The time limit for the kubelet to publish the pod.
const PUBLISHED: Duration = Duration::from_secs(30);
/// How much is read at once.
const CHUNK: usize = 1 << 16;

/// Creates the Service for this port of the pod, and waits until the kubelet has published it.
pub(super) async fn publish(bed: &Bed, port: u16) -> anyhow::Result<()> {
    let object = json!({"metadata": {"name": NAME}, "spec": {"selector": {LABEL.0: LABEL.1}, "ports": [{"port": port}]}});
    let service: Service = serde_json::from_value(object)?;
    let api = bed.world.api::<Service>();
    api.create(&PostParams::default(), &service).await?;
    let published = wait_for("the relayed endpoint", PUBLISHED, async || {
        address(bed).await
    });
    published.await.map(drop)
}

/// Deletes it.
pub(super) async fn withdraw(bed: &Bed) -> anyhow::Result<()> {
    let api = bed.world.api::<Service>();
    api.delete(NAME, &DeleteParams::default()).await?;
    Ok(())
}

/// Where the Service leads.
async fn address(bed: &Bed) -> anyhow::Result<SocketAddr> {
    let of = ListParams::default().labels("endpointslice.kubernetes.io/managed-by=relay.knoc.io");
    let slices = bed.world.api::<EndpointSlice>().list(&of).await?.items;
    let slice = slices.first().context("no EndpointSlice")?;
    let endpoint = slice.endpoints.iter().flatten().next();
    let address = endpoint.and_then(|endpoint| endpoint.addresses.first());
    let port = slice
        .ports
        .iter()
        .flatten()
        .next()
        .and_then(|port| port.port);
    let (address, port) = address.zip(port).context("no endpoint")?;
    Ok(SocketAddr::new(address.parse()?, u16::try_from(port)?))
}

/// Reads all that the pod sends on one connection.
pub(super) async fn read(bed: &Bed) -> anyhow::Result<u64> {
    let mut stream = TcpStream::connect(address(bed).await?).await?;
    let (mut total, mut chunk) = (0, vec![0; CHUNK]);
    loop {
        match stream.read(&mut chunk).await? {
            0 => return Ok(total),
            count => total += u64::try_from(count)?,
        }
    }
}
