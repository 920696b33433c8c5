//! A web server in a pod, the Service that leads to it, and requests to it.

use std::net::SocketAddr;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Service;
use kube::{Api, api::PostParams};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::{PodBuilder, World, world::SOON};

/// A web server on port 80 of a network of the pod's own, with the pod's name at `/name` and `size` bytes at `/large`. It is ready as long
/// as it has the page `/ready`.
#[must_use]
pub fn pod(name: &str, size: usize) -> PodBuilder {
    let serve = format!(
        "mkdir /www && echo {name} >/www/name && head -c {size} /dev/zero >/www/large && echo yes >/www/ready && exec httpd -f -p 80 -h /www"
    );
    let ready = json!({"httpGet": {"path": "/ready", "port": 80}, "periodSeconds": 1});
    PodBuilder::new(name)
        .label("app", "web")
        .annotation("knoc.io/network", "private")
        .sh(&serve)
        .set(
            "resources",
            json!({"requests": {"cpu": "100m"}, "limits": {"memory": "256Mi"}}),
        )
        .set("ports", json!([{"name": "http", "containerPort": 80}]))
        .set("readinessProbe", ready)
}

/// The spec of a Service that leads to these pods.
#[must_use]
pub fn to_pods() -> Value {
    json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]})
}

/// Creates the Service `web` with this spec.
pub async fn service(world: &World, spec: Value) -> anyhow::Result<Service> {
    let services: Api<Service> = world.api();
    let object = json!({"metadata": {"name": "web"}, "spec": spec});
    let service = serde_json::from_value(object)?;
    Ok(services.create(&PostParams::default(), &service).await?)
}

/// The first line of the answer to a request for a page of this host, and the page. An empty host is not named.
pub async fn fetch(
    address: SocketAddr,
    host: &str,
    path: &str,
) -> anyhow::Result<(String, Vec<u8>)> {
    let host = if host.is_empty() {
        String::new()
    } else {
        format!("Host: {host}\r\n")
    };
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.0\r\n{host}\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await?;
        anyhow::Ok(all)
    };
    let mut all = timeout(SOON, exchange).await.context("waited in vain")??;
    let head = all.windows(4).position(|four| four == b"\r\n\r\n");
    let page = all.split_off(head.context("no head of an answer")? + 4);
    let head = String::from_utf8_lossy(&all).into_owned();
    Ok((head.lines().next().unwrap_or_default().to_owned(), page))
}

/// The page of a server that has no other host.
pub async fn page(address: SocketAddr, path: &str) -> anyhow::Result<Vec<u8>> {
    let (_, page) = fetch(address, "", path).await?;
    Ok(page)
}

/// The name of the pod that serves `/name` there.
pub async fn name(address: SocketAddr) -> anyhow::Result<String> {
    let page = String::from_utf8(page(address, "/name").await?)?;
    Ok(page.trim_end().to_owned())
}
