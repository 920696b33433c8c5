//! Level 2: one address keeps 5,000 silent connections to a port open, and other clients are served: within a second at another
//! address, within three seconds at the same address.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use knoc_link::{Credentials, ExpectPeer, pinned};
use knoc_proto::pb;
use knoc_tests::{
    flood::{ATTACKER, Flood},
    relay::Relay,
    site::{Kubelet, Options, Site},
    wait_for,
};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tokio::{net::TcpStream, sync::Mutex};
use tonic::transport::Channel;

const CONNECTIONS: usize = 5000;

/// The time limits, one per client address.
const GOALS: [(Ipv4Addr, Duration); 2] = [
    (Ipv4Addr::LOCALHOST, Duration::from_secs(1)),
    (ATTACKER, Duration::from_secs(3)),
];

/// Only one flood runs at a time, because floods would influence each other's times.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// The number of attempts to get an answer within the limit. Tests run in parallel on machines with few processors, so one answer may
/// be delayed; a blocked port never answers in time, however often it is tried.
const TRIES: usize = 30;

/// Sends a request from each address, through a relay at that address.
async fn within_the_goals(
    target: SocketAddr,
    mut ask: impl AsyncFnMut(SocketAddr) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for (source, goal) in GOALS {
        let mut relay = Relay::start_from(source).await?;
        relay.lead_to(target);
        let mut tries = Vec::new();
        let mut met = false;
        while !met {
            ensure!(
                tries.len() < TRIES,
                "from {source}, goal {goal:?}: {tries:#?}"
            );
            let began = Instant::now();
            let asked = tokio::time::timeout(goal * 2, ask(relay.address())).await;
            let took = began.elapsed();
            met = matches!(asked, Ok(Ok(()))) && took < goal;
            tries.push(format!("{asked:?} after {took:?}"));
        }
    }
    Ok(())
}

fn credentials(site: &Site, name: &str) -> anyhow::Result<Credentials> {
    let [ca, cert, key] = [
        "ca.crt".to_owned(),
        format!("{name}.crt"),
        format!("{name}.key"),
    ]
    .map(|file| site.path(&file));
    Ok(Credentials::from_files(ca, cert, key)?)
}

/// Opens a new link to the agent and sends a request over it.
async fn ask_agent(address: SocketAddr, credentials: Credentials) -> anyhow::Result<()> {
    let carrier = knoc_link::Carrier::Tcp(address.to_string());
    let channel = knoc_link::dial(carrier, Some(credentials), ExpectPeer::AnyAgent)?;
    let mut client = pb::agent_client::AgentClient::<Channel>::new(channel);
    client.get_info(pb::GetInfoRequest::default()).await?;
    Ok(())
}

#[tokio::test]
async fn silent_connections_close_no_port_of_the_agent() -> anyhow::Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let flood = Flood::start(site.address(), CONNECTIONS).await?;
    within_the_goals(site.address(), async |address| {
        ask_agent(address, credentials(&site, "kubelet")?).await
    })
    .await
    .context("the port for kubelets")?;
    drop(flood);
    // The log reports it in a few lines.
    let log = std::fs::read_to_string(site.path("agent.log"))?;
    let about = log.lines().filter(|line| line.contains("127.0.0.2"));
    let lines = about.count();
    ensure!((1..50).contains(&lines), "{lines} lines about the attacker");

    let endpoint = std::fs::read_to_string(site.path("state/endpoint.json"))?;
    let endpoint: serde_json::Value = serde_json::from_str(&endpoint)?;
    let spki = endpoint["spki"].as_str().context("no spki")?;
    let pair = pinned::KeyPair::generate("shim")?;
    let _flood = Flood::start(site.shim_address(), CONNECTIONS).await?;
    within_the_goals(site.shim_address(), async |address| {
        pinned::dial(&address.to_string(), &pair, spki).await?;
        Ok(())
    })
    .await
    .context("the port for shims")
}

/// One request to the kubelet API over a connection of its own, whose answer to a client without identity is a 401.
async fn ask_kubelet(address: SocketAddr) -> anyhow::Result<()> {
    let mut config = kube::Config::new(format!("https://{address}").parse()?);
    config.accept_invalid_certs = true;
    let client = kube::Client::try_from(config)?;
    let request = http::Request::get("/healthz").body(Vec::new())?;
    match client.request_text(request).await {
        Ok(text) => anyhow::bail!("answered without identity: {text}"),
        Err(kube::Error::Api(status)) if status.code == 401 => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[tokio::test]
async fn silent_connections_do_not_close_the_kubelets_port() -> anyhow::Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let _process = kubelet.start(&site, &[]).await?;
    let _flood = Flood::start(kubelet.address(), CONNECTIONS).await?;
    within_the_goals(kubelet.address(), ask_kubelet).await
}

/// The CPU time that a process has used, in ticks.
fn ticks(pid: Pid) -> anyhow::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))?;
    let after_name = stat.rsplit_once(')').context("no name")?.1;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

#[tokio::test]
async fn an_agent_without_descriptors_neither_spins_nor_stays_closed() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let agent = site.agent(&[]).await?;
    let pid = agent.pid().context("it has ended")?;
    let pid = Pid::from_raw(i32::try_from(pid)?).context("no pid")?;
    let ask = async || ask_agent(site.address(), credentials(&site, "kubelet")?).await;
    ask().await?;
    // Fewer than it has open, so every `accept` fails.
    let low = |current| Rlimit {
        current: Some(current),
        maximum: rustix::process::getrlimit(Resource::Nofile).maximum,
    };
    let before = prlimit(Some(pid), Resource::Nofile, low(3))?;
    let used = ticks(pid)?;
    let mut waiting = Vec::new();
    for _ in 0..50 {
        waiting.push(TcpStream::connect(site.address()).await?);
    }
    let pause = Duration::from_secs(2);
    let said = tokio::time::timeout(pause, std::future::pending::<()>()).await;
    ensure!(said.is_err(), "two seconds have passed");
    let used = ticks(pid)? - used;
    ensure!(used < 60, "{used} ticks of computing time in {pause:?}");
    prlimit(Some(pid), Resource::Nofile, before)?;
    wait_for("the agent answers again", Duration::from_mins(2), ask).await?;
    let log = std::fs::read_to_string(site.path("agent.log"))?;
    let about = log
        .lines()
        .filter(|line| line.contains("ulimit -n"))
        .count();
    ensure!((1..20).contains(&about), "{about} lines");
    Ok(())
}

/// With few descriptors the limits are lower, and still no client is kept out.
#[tokio::test]
async fn a_low_limit_of_open_files_is_respected() -> anyhow::Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let site = Site::new(Options::default())?;
    let wrapper = site.path("wrapper");
    site.put("wrapper", "#!/bin/sh\nulimit -n 512\nexec \"$@\"\n")?;
    std::fs::set_permissions(
        &wrapper,
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )?;
    let agent = site.wrapped_agent(&wrapper).await?;
    let _flood = Flood::start(site.address(), 2000).await?;
    within_the_goals(site.address(), async |address| {
        ask_agent(address, credentials(&site, "kubelet")?).await
    })
    .await?;
    agent.pid().context("it has ended")?;
    let open = accepted(site.address())?;
    ensure!(open < 200, "{open} connections are accepted");
    Ok(())
}

/// How many connections of this port are accepted. Only root can see the agent's descriptors.
fn accepted(address: SocketAddr) -> anyhow::Result<usize> {
    let port = format!(":{:04X}", address.port());
    let table = std::fs::read_to_string("/proc/net/tcp")?;
    let accepted = table.lines().skip(1).filter(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // Local address, state (01: established) and inode, which one that waits in the backlog does not have.
        let field = |index: usize| fields.get(index).copied().unwrap_or_default();
        field(1).ends_with(&port) && field(3) == "01" && field(9) != "0"
    });
    Ok(accepted.count())
}
