//! Every profile of the test bed (`tests/testbed/profile.sh`): one pod has all that a pod needs, and the firewall lets nothing else
//! through than what the profile says, so that it is really this way that carries the link.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, bail, ensure};
use knoc_tests::{World, one_pod::OnePod, wait_for, world::SOON};
use tokio::{net::TcpStream, time::timeout};

/// How long an open port may take to answer. A firewall drops the answers of a closed one.
const ANSWER: Duration = Duration::from_secs(3);

/// The login node for the host, and the host for the login node.
const LOGIN: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// The login node for compute nodes.
const INSIDE: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 3);

const SSH: u16 = 22;
const KUBELETS: u16 = 10350;
const SHIMS: u16 = 10351;

/// The kubelet's own API, which the login node has no business with.
const KUBELET_API: u16 = 10250;

/// Where the kubelet accepts the agent, and where the proxy is.
const DIAL_IN: u16 = 8443;
const PROXY: u16 = 3128;

#[tokio::test]
async fn one_pod_has_all_that_a_pod_needs_whatever_carries_the_link() -> anyhow::Result<()> {
    let world = World::new("profile").await?;
    let pod = OnePod::start(&world).await?;
    pod.streams(&world).await?;
    pod.ends(&world).await?;
    world.finish().await
}

#[tokio::test]
async fn nothing_passes_but_what_the_profile_says() -> anyhow::Result<()> {
    let world = World::new("firewall").await?;
    world.wait_node_condition("AgentConnected", "True").await?;
    let profile = std::env::var("PROFILE").context("PROFILE is not set: make env")?;
    // From the host to the login node, from there to the host, and from a compute node to the login node.
    let (enters, leaves, shims): (&[u16], &[u16], bool) = match profile.as_str() {
        "direct" => (&[SSH, KUBELETS], &[KUBELET_API], true),
        "isolated" => (&[SSH, KUBELETS], &[KUBELET_API], false),
        "ssh-only" => (&[SSH], &[], true),
        // The agent, and with it the port for shims, is on the other login node.
        "two-logins" => (&[SSH], &[], false),
        "outbound-only" => (&[], &[DIAL_IN], true),
        "proxy-only" => (&[], &[PROXY], true),
        other => bail!("the profile {other} is not described here"),
    };
    for port in [SSH, KUBELETS] {
        is_open(
            &format!("host to {port}"),
            enters.contains(&port),
            async || {
                let connected = timeout(ANSWER, TcpStream::connect((LOGIN, port))).await;
                Ok(matches!(connected, Ok(Ok(_))))
            },
        )
        .await?;
    }
    for port in [KUBELET_API, DIAL_IN, PROXY] {
        is_open(
            &format!("login to {port}"),
            leaves.contains(&port),
            async || reaches(&world, "login", HOST, port).await,
        )
        .await?;
    }
    is_open("compute node to the port for shims", shims, async || {
        reaches(&world, "c1", INSIDE, SHIMS).await
    })
    .await?;
    world.finish().await
}

/// Checks whether a port is open. On a busy machine an open one may not answer at once; a closed one never does.
async fn is_open(
    what: &str,
    expected: bool,
    look: impl AsyncFn() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    if !expected {
        ensure!(!look().await?, "{what}: it is open");
        return Ok(());
    }
    wait_for(what, SOON, async || {
        ensure!(look().await?, "it is closed");
        Ok(())
    })
    .await
}

/// Whether a program on that node reaches that port.
async fn reaches(world: &World, node: &str, host: Ipv4Addr, port: u16) -> anyhow::Result<bool> {
    let seconds = ANSWER.as_secs().to_string();
    let dial = format!("exec 3<>/dev/tcp/{host}/{port}");
    let probe = ["timeout", &seconds, "bash", "-c", &dial];
    // The node may be coming back after another test.
    let run = wait_for("a program runs on the node", SOON, async || {
        match world.on(node, probe).output().await {
            Ok(output) if output.code == 125 => Err(output.to_string()),
            Ok(output) => Ok(output),
            Err(error) => Err(format!("{error:#}")),
        }
    });
    Ok(run.await?.code == 0)
}
