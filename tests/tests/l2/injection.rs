//! Level 2: text from a peer or a pod never becomes a log line of its own and never moves a cursor.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use knoc_proto::text::is_unshown;
use knoc_tests::{
    site::{Kubelet, Options, Pod, Site, container},
    wait_for,
};
use rcgen::{CertificateParams, DnType, KeyPair, SanType};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

const SOON: Duration = Duration::from_mins(2);

/// Text that begins a line like one of ours, and clears a terminal.
const FORGED: &str = "\n2026-11-28T00:00:00.000000Z  INFO knoc: forged\r\u{1b}[2J";

/// Checks that the log contains the expected text, and no line that the peer forged.
fn harmless(log: &str, expected: &str) -> anyhow::Result<()> {
    ensure!(log.contains(expected), "the peer is not in the log: {log}");
    for line in log.lines() {
        ensure!(!line.contains(is_unshown), "a raw character: {line:?}");
        ensure!(!line.starts_with("2026-11-28T00:00:00"), "forged: {line:?}");
    }
    Ok(())
}

/// Connects to a server with a certificate of an unknown CA that contains such names, and sends a request.
async fn call(site: &Site, address: SocketAddr) -> anyhow::Result<()> {
    let mut roots = RootCertStore::empty();
    let ca = std::fs::read(site.path("ca.crt"))?;
    roots.add(CertificateDer::from_pem_slice(&ca)?)?;
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, format!("nobody{FORGED}"));
    let uri = format!("spiffe://knoc/ctl/nobody{FORGED}");
    params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate.der().clone()], key)?;
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost")?;
    let mut stream = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await?;
    // It is rejected by an alert or by an answer.
    let asked = stream.write_all(b"GET /pods HTTP/1.1\r\nhost: k\r\nconnection: close\r\n\r\n");
    drop(asked.await);
    let mut answer = Vec::new();
    let read = tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await;
    drop(read.context("no answer")?);
    Ok(())
}

#[tokio::test]
async fn a_certificate_cannot_forge_a_line_of_a_log() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let serving = |name: &str| site.path(name).display().to_string();
    let (cert, key) = (serving("agent.crt"), serving("agent.key"));
    for format in ["text", "json"] {
        let env = [
            ("KNOC_SERVER_CERT", cert.as_str()),
            ("KNOC_SERVER_KEY", key.as_str()),
            ("KNOC_LOG_FORMAT", format),
        ];
        let _kubelet = kubelet.start(&site, &env).await?;
        // The agent names an identity only if it is valid.
        for (address, log, expected) in [
            (kubelet.address(), "kubelet.log", "forged"),
            (site.address(), "agent.log", "connection refused"),
        ] {
            // The Node is still Ready when the second kubelet starts, so that kubelet may not listen yet.
            wait_for(log, SOON, async || call(&site, address).await).await?;
            wait_for("the refusal in the log", SOON, async || {
                let log = std::fs::read_to_string(site.path(log))?;
                harmless(&log, expected)
            })
            .await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn control_characters_from_a_pod_are_escaped_by_knocctl() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let script = "printf 'a\\n2026-11-28T00:00:00 forged\\r\\033[2J\\302\\233'; exit 3";
    let mut main = container("main", &["/bin/sh", "-c", script], &[]);
    main.termination_message_fallback_to_logs = true;
    let pod = Pod::new("nasty", vec![main]);
    pod.ensure(&client).await?;
    pod.finished(&client, SOON).await?;
    let ended = pod.terminated(&client, "main").await?;
    ensure!(ended.message.contains('\u{1b}'), "not said: {ended:?}");
    for command in [
        ["describe", "nasty", "-o", "table"],
        ["describe", "nasty", "-o", "json"],
        ["describe", "nasty", "-o", "yaml"],
        ["pods", "-o", "wide", "-n=default"],
    ] {
        let shown = site.knocctl(command)?.ok().await?;
        let text = String::from_utf8(shown.stdout.clone())?;
        ensure!(
            !text.contains(|c| is_unshown(c) && c != '\n'),
            "{command:?}: {text:?}"
        );
        ensure!(
            !text
                .lines()
                .any(|line| line.starts_with("2026-11-28T00:00:00 forged")),
            "{command:?}: {text}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_of_the_longest_names_runs() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let (name, container_name) = ("p".repeat(253), "c".repeat(63));
    let variable = "V".repeat(1000);
    let main = container(&container_name, &["/bin/sh", "-c", "env"], &[]);
    let mut pod = Pod::new(&"u".repeat(64), vec![main])
        .env(&container_name, &[(variable.clone(), "value".to_owned())]);
    if let Some(spec) = &mut pod.request.spec {
        spec.name.clone_from(&name);
        spec.namespace = "n".repeat(63);
        spec.hostname = String::new();
    }
    pod.ensure(&client).await?;
    pod.succeeded(&client, SOON).await?;
    let shown = site.knocctl(["describe", pod.uid()])?.ok().await?;
    ensure!(shown.text().contains(&name), "{shown}");
    let log = site.knocctl(["logs", pod.uid()])?.ok().await?.text();
    let expected = [
        format!("{variable}=value"),
        format!("HOSTNAME={}", "p".repeat(63)),
    ];
    for line in expected {
        ensure!(log.lines().any(|one| one == line), "no {line} in {log}");
    }
    site.knocctl(["delete", pod.uid()])?.ok().await?;
    Ok(())
}
