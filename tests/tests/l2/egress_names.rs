//! Level 2: an API server whose certificate does not name what pods are told to use. The kubelet says so before anybody reads the error
//! of a client in a pod.

use std::sync::Arc;

use anyhow::ensure;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use knoc_link::verifier::provider;
use knoc_tests::{
    endpoint,
    site::{Kubelet, NODE},
    wait_for,
};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use rcgen::{CertificateParams, KeyPair};
use rustls::ServerConfig;
use rustls_pki_types::PrivateKeyDer;
use tokio::{net::TcpStream, task::JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::egress::{SOON, slice, start, told, told_by_now};

/// The type of the node's condition, and the reason of its Event.
const MISMATCH: &str = "ApiServerCertificateMismatch";

/// A server whose certificate has these names.
async fn server(names: &[&str]) -> anyhow::Result<(u16, JoinSet<()>)> {
    let key = KeyPair::generate()?;
    let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
    let certificate = CertificateParams::new(names)?.self_signed(&key)?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    endpoint::serve(move |stream: TcpStream| {
        let acceptor = acceptor.clone();
        // A client that rejects the certificate ends the handshake.
        async move { acceptor.accept(stream).await.map(drop) }
    })
    .await
}

/// Waits until the condition of the node has this status, and returns its message.
async fn condition(kubelet: &Kubelet, status: &str) -> anyhow::Result<String> {
    wait_for(&format!("{MISMATCH}={status}"), SOON, async || {
        let node = kubelet.api.get("v1", "nodes", "", NODE);
        let node = node.map_err(|error| error.to_string())?;
        let conditions = node["status"]["conditions"].as_array().cloned();
        let mut conditions = conditions.unwrap_or_default().into_iter();
        let ours = conditions.find(|condition| condition["type"] == MISMATCH);
        match ours {
            Some(ours) if ours["status"] == status => Ok(ours["message"].to_string()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

#[tokio::test]
async fn a_certificate_that_does_not_name_the_service_is_told_before_a_pod_fails()
-> anyhow::Result<()> {
    let (port, _lacking) = server(&["localhost", "10.0.0.5"]).await?;
    let (_site, kubelet, _running) = start("", port, &[]).await?;
    let events = told(&kubelet, MISMATCH).await?;
    ensure!(events.len() == 1, "{events:?}");
    let message = condition(&kubelet, "True").await?;
    for text in [&events[0], &message] {
        for part in [
            "10.96.0.1",
            "kubernetes.default.svc",
            "It names localhost, 10.0.0.5",
            "certSANs",
        ] {
            ensure!(text.contains(part), "{part} is not in {text}");
        }
    }
    // An API server with the names takes its place.
    let (port, _complete) = server(&["10.96.0.1", "kubernetes.default.svc"]).await?;
    let client = kube::Client::try_from(kube::Config::new(kubelet.api.url().parse()?))?;
    let slices: Api<EndpointSlice> = Api::namespaced(client, "default");
    let moved = Patch::Merge(slice(port));
    slices
        .patch("kubernetes", &PatchParams::default(), &moved)
        .await?;
    condition(&kubelet, "False").await?;
    let events = told_by_now(&kubelet, MISMATCH);
    ensure!(events.len() == 1, "{events:?}");
    Ok(())
}

#[tokio::test]
async fn a_certificate_that_lacks_the_address_alone_leaves_pods_the_name() -> anyhow::Result<()> {
    let (port, _lacking) = server(&["kubernetes.default.svc"]).await?;
    let (_site, kubelet, _running) = start("", port, &[]).await?;
    let message = condition(&kubelet, "True").await?;
    ensure!(
        message.contains("set KUBERNETES_SERVICE_HOST to kubernetes.default.svc"),
        "{message}"
    );
    ensure!(!message.contains("the node's network"), "{message}");
    Ok(())
}
