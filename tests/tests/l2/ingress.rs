//! Level 2: a real nginx between an agent that dials out and its kubelet. One that passes TLS through carries the link; one that
//! terminates TLS cannot, and everybody who looks is told so.

use std::{net::SocketAddr, time::Duration};

use anyhow::ensure;
use knoc_tests::{
    nginx::{Nginx, SUBJECT, certificate},
    site::{Kubelet, NODE, Options, Site, spare_address},
    wait_for, web,
};

use super::dial_out::{accepting, as_env, connected, dialling, logged, program};

const SOON: Duration = Duration::from_mins(2);

/// The name by which the nginx below knows the kubelet.
const NAME: &str = "knoc.example.org";

/// An nginx at `front` that leads what asks for [`NAME`] to the kubelet, as it is, and everything else to `other`.
fn by_name(front: SocketAddr, kubelet: SocketAddr, other: SocketAddr) -> String {
    format!(
        "map $ssl_preread_server_name $to {{ {NAME} {kubelet}; default {other}; }}\n\
         server {{ listen {front}; ssl_preread on; proxy_pass $to; }}"
    )
}

/// A server of nginx at `front` that terminates TLS and leads requests to the kubelet, over a TLS connection of its own. `how`
/// is what `listen` says besides, and `versions` are those of TLS.
fn terminating(
    front: SocketAddr,
    (how, versions): (&str, &str),
    certificate: &str,
    kubelet: SocketAddr,
) -> String {
    format!(
        "server {{ listen {front} {how}; ssl_protocols {versions}; {certificate}\n\
         location / {{ proxy_pass https://{kubelet}; }} }}\n"
    )
}

#[tokio::test]
async fn pods_run_through_an_nginx_that_passes_tls_through_by_name() -> anyhow::Result<()> {
    let (front, address, nowhere) = (spare_address()?, spare_address()?, spare_address()?);
    let site = dialling(&front.to_string(), &format!("server_name = \"{NAME}\""))?;
    let servers = by_name(front, address, nowhere);
    let nginx = Nginx::start(&site, "", &servers, front).await?;
    let _agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let _running = kubelet.start(&site, &as_env(&accepting(address))).await?;
    connected(&kubelet).await?;
    kubelet.create_pod("first", program("exit 0"))?;
    kubelet.phase("first", "Succeeded", SOON).await?;
    let uid = kubelet.create_pod("long", program("sleep 600"))?;
    kubelet.phase("long", "Running", SOON).await?;
    // As when the pod of an Ingress is replaced: the link comes back, and no pod notices.
    nginx.kill().await?;
    logged(&site, "kubelet.log", &["lost the link to the agent"]).await?;
    let _nginx = Nginx::start(&site, "", &servers, front).await?;
    kubelet.create_pod("last", program("exit 3"))?;
    kubelet.phase("last", "Failed", SOON * 2).await?;
    kubelet.phase("long", "Running", SOON).await?;
    ensure!(site.claims(&uid)? == 1, "{} claims", site.claims(&uid)?);
    Ok(())
}

/// What the router of an Ingress knows no name for goes to its web server, which terminates TLS. That is an agent whose address is
/// an IP address, and a host whose Ingress was not told to pass TLS through.
#[tokio::test]
async fn an_agent_that_sends_no_name_is_told_and_runs_pods_once_it_does() -> anyhow::Result<()> {
    let (front, address, web) = (spare_address()?, spare_address()?, spare_address()?);
    let site = dialling(&front.to_string(), "")?;
    let settings = certificate(&site)?;
    let http = terminating(web, ("ssl", "TLSv1.2 TLSv1.3"), &settings, address);
    let servers = by_name(front, address, web);
    let _nginx = Nginx::start(&site, &http, &servers, front).await?;
    let agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let _running = kubelet.process(&site, &as_env(&accepting(address)))?;
    let target = front.to_string();
    logged(&site, "agent.log", &[&target, "terminates TLS"]).await?;
    agent.terminate().await?;
    site.put_tables(&format!(
        "[[dial_out]]\naddress = \"{front}\"\nserver_name = \"{NAME}\""
    ))?;
    let _agent = site.agent(&[]).await?;
    connected(&kubelet).await?;
    kubelet.create_pod("pod", program("exit 0"))?;
    kubelet.phase("pod", "Succeeded", SOON).await?;
    Ok(())
}

/// Each server of nginx terminates TLS in another way. No certificate of the agent gets through any of them, whatever they do with
/// what they decrypt, so there is no link; agent, doctor and node say why.
#[tokio::test]
async fn an_nginx_that_terminates_tls_is_named_by_agent_doctor_and_node() -> anyhow::Result<()> {
    let address = spare_address()?;
    let both = "TLSv1.2 TLSv1.3";
    let ways = [
        (("ssl", "TLSv1.2"), "the peer does not speak TLS 1.3"),
        (("ssl", both), "the peer offers no HTTP/2"),
        (("ssl http2", both), SUBJECT),
    ];
    let mut fronts = Vec::new();
    for words in ways.map(|(_, words)| words).into_iter().chain([SUBJECT]) {
        fronts.push((spare_address()?, words));
    }
    let entry = |(front, _): &(SocketAddr, &str)| format!("[[dial_out]]\naddress = \"{front}\"\n");
    let site = Site::new(Options {
        tables: fronts.iter().map(entry).collect::<Vec<_>>().concat(),
        ..Options::default()
    })?;
    let settings = certificate(&site)?;
    // The way of such an Ingress to the kubelet, for requests of anybody.
    let plain = spare_address()?;
    let mut http =
        format!("server {{ listen {plain}; location / {{ proxy_pass https://{address}; }} }}\n");
    for ((how, _), (front, _)) in ways.iter().zip(&fronts) {
        http += &terminating(*front, *how, &settings, address);
    }
    // A load balancer that does not look into HTTP.
    let (last, _) = fronts[ways.len()];
    let stream = format!(
        "server {{ listen {last} ssl; ssl_protocols {both}; {settings} proxy_ssl on; proxy_pass {address}; }}"
    );
    let _nginx = Nginx::start(&site, &http, &stream, last).await?;
    let _agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let _running = kubelet.process(&site, &as_env(&accepting(address)))?;
    for (front, words) in &fronts {
        let target = front.to_string();
        logged(&site, "agent.log", &[&target, words, "terminates TLS"]).await?;
    }
    named_by_doctor(&site, &fronts).await?;
    named_by_the_node(&kubelet, plain).await
}

async fn named_by_doctor(site: &Site, fronts: &[(SocketAddr, &str)]) -> anyhow::Result<()> {
    // On a busy machine an attempt may have failed for another reason in between.
    wait_for("doctor names each", SOON, async || {
        let report = site.knocctl(["doctor"])?.output().await?.text();
        for (front, words) in fronts {
            let check = format!("✗ link: dial out to {front}:");
            let line = report.lines().find(|line| line.starts_with(&check));
            ensure!(
                line.is_some_and(|line| line.contains(words) && line.contains("terminates TLS")),
                "{check} {words}: {report}"
            );
        }
        ensure!(
            report.contains("an Ingress has to pass TLS through"),
            "{report}"
        );
        Ok(())
    })
    .await
}

/// Nobody reaches the kubelet with a certificate, and it says who has tried.
async fn named_by_the_node(kubelet: &Kubelet, plain: SocketAddr) -> anyhow::Result<()> {
    wait_for("the node names the Ingress", SOON, async || {
        let (status, _) = web::fetch(plain, "", "/").await?;
        ensure!(status.contains(" 502 "), "{status}");
        let node = kubelet.api.get("v1", "nodes", "", NODE)?;
        let text = node["status"]["conditions"].to_string();
        // Whether it names the version of TLS or the missing certificate depends on the web server.
        let said = ["no agent has dialled in", "terminates TLS"];
        ensure!(said.iter().all(|words| text.contains(words)), "{text}");
        Ok(())
    })
    .await
}
