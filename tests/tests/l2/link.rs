//! Level 2: who may connect to the agent. Rejected connections are logged with the peer and, if known, its identity.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use jiff::{SignedDuration, Timestamp};
use knoc_link::{
    Credentials, Identity,
    pki::{Ca, Validity},
};
use knoc_proto::pb;
use knoc_tests::{
    site::{Kubelet, NODE, Options, Site},
    wait_for,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const SOON: Duration = Duration::from_mins(2);

fn ctl() -> Identity {
    Identity::Ctl {
        name: "test".into(),
    }
}

async fn refused(site: &Site, credentials: Credentials, logged: &str) -> anyhow::Result<()> {
    let mut client = site.client_with(credentials)?;
    let answer = client.get_info(pb::GetInfoRequest::default()).await;
    ensure!(answer.is_err(), "it was let in");
    wait_for("the refusal in the log", SOON, async || {
        let log = site.log();
        if log.contains("127.0.0.1:") && log.contains(logged) {
            Ok(())
        } else {
            Err(log)
        }
    })
    .await
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_refused() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let other = Ca::generate("other")?;
    let pair = other.issue(&ctl(), &[])?;
    // The client trusts the agent, but the agent does not trust the client.
    let ca = std::fs::read_to_string(site.path("ca.crt"))?;
    let credentials = Credentials::from_pem(&ca, &pair.cert_pem, &pair.key_pem)?;
    refused(&site, credentials, "spiffe://knoc/ctl/test").await
}

#[tokio::test]
async fn an_expired_certificate_is_refused() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let now = Timestamp::now();
    let dates = Validity {
        from: now.checked_sub(SignedDuration::from_hours(2))?,
        until: now.checked_sub(SignedDuration::from_hours(1))?,
    };
    let credentials = site.issue(&ctl(), dates)?;
    refused(&site, credentials, "spiffe://knoc/ctl/test").await
}

#[tokio::test]
async fn an_agent_is_no_client() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let identity = Identity::Agent {
        site: "elsewhere".into(),
    };
    let dates = Validity::starting(Timestamp::now(), Duration::from_hours(1));
    let credentials = site.issue(&identity, dates)?;
    refused(&site, credentials, "spiffe://knoc/agent/elsewhere").await
}

#[tokio::test]
async fn connections_without_tls_get_no_answer() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let mut plain = tokio::net::TcpStream::connect(site.address()).await?;
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
    let mut answer = Vec::new();
    let end = tokio::time::timeout(SOON, plain.read_to_end(&mut answer)).await;
    drop(end.context("the connection stays open")?);
    // The server sends at most a TLS alert, and no HTTP/2 frame.
    ensure!(
        answer.first().is_none_or(|first| *first == 0x15),
        "{answer:?}"
    );
    wait_for("the refusal in the log", SOON, async || {
        let log = site.log();
        if log.contains("127.0.0.1:") {
            Ok(())
        } else {
            Err(log)
        }
    })
    .await
}

#[tokio::test]
async fn a_mistake_in_the_site_file_is_named_before_anything_starts() -> anyhow::Result<()> {
    let site = Site::new(Options {
        limits: "sbatch_rat = 3\nstop_slack = '5 bananas'\nimage_concurrency = 0".into(),
        ..Options::default()
    })?;
    let mut agent = site.agent_process(&[])?;
    let status = agent.ended(SOON).await?;
    ensure!(!status.success());
    // Each mistake is reported with its line and the allowed values.
    let log = site.log();
    let line = |name: &str| {
        let text = std::fs::read_to_string(site.path("agent.toml"))?;
        let line = text.lines().position(|line| line.starts_with(name));
        line.map(|line| line + 1).context("the line")
    };
    for (name, expected) in [
        ("sbatch_rat", "expected one of `sbatch_rate`"),
        ("stop_slack", "\"90s\""),
        ("image_concurrency", "must be above 0"),
    ] {
        let place = format!("agent.toml:{}: limits.{name}: ", line(&format!("{name} "))?);
        let said = log.lines().find(|line| line.contains(&place));
        let said = said.with_context(|| format!("{place} is not in {log}"))?;
        ensure!(said.contains(expected), "{expected} is not in {said}");
    }
    Ok(())
}

/// For people who have only kubectl.
#[tokio::test]
async fn the_node_says_on_which_rung_its_link_fails_and_that_it_is_back() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let api = Kubelet::prepare(&site).await?;
    let _kubelet = api.process(&site, &[])?;
    let event = |reason: &str| {
        let events = api.api.list("v1", "events", "default");
        let found = events
            .into_iter()
            .find(|event| event["reason"] == reason && event["involvedObject"]["name"] == NODE);
        found.with_context(|| format!("no Event {reason}"))
    };
    wait_for("the rung is told", SOON, async || {
        let node = api.api.get("v1", "nodes", "", NODE)?;
        let conditions = node["status"]["conditions"].as_array();
        let mut conditions = conditions.into_iter().flatten();
        let link = conditions.find(|condition| condition["type"] == "AgentConnected");
        let said = link.and_then(|link| link["message"].as_str());
        let said = said.unwrap_or_default();
        ensure!(
            said.contains(": port: ") && said.contains("start the agent"),
            "{node}"
        );
        let told = event("AgentUnreachable")?;
        let message = told["message"].as_str().unwrap_or_default();
        ensure!(
            told["type"] == "Warning" && message.starts_with("port: "),
            "{told}"
        );
        Ok(())
    })
    .await?;
    let _agent = site.agent_process(&[])?;
    wait_for("the end is told", SOON, async || {
        let told = event("AgentConnected")?;
        ensure!(told["type"] == "Normal", "{told}");
        Ok(())
    })
    .await
}
