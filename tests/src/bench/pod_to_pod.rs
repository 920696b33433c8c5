//! Bytes from one pod to another one at its own address (ADR 0123), each on a compute node: a program writes to a socket, the two shims carry
//! packets over TLS, and a program reads from a socket.
//!
//! There are two floors, both measured in each round, and both with a relay in place of each shim, on the same nodes:
//!
//! - as for the other streams, the client of the relays has TLS, so two relays are two connections over TLS;
//! - stricter, the client has none, so that the only connection over TLS is the one between the relays. There, as between shims, each byte
//!   is encrypted once.

use std::{net::SocketAddr, time::Duration};

use k8s_openapi::api::core::v1::Pod;
use tokio::process::Child;

use super::{
    bed::{Bed, FOLDER},
    egress::{DIALER, inside, timed},
    machine::{Clock, Spent},
    relay::{Chain, FIRST, Location, SECOND},
    stats::Series,
    streams::{SHARE, Sizes, Stream, rate},
};
use crate::{PodBuilder, own_addresses, wait_for};

/// The name of the stream, and that of its row beside the stricter floor. The first is part of the second.
pub(super) const NAME: &str = "pod to pod on two nodes";
const STRICT: &str = "pod to pod on two nodes, relays with TLS only between them";
/// The time limit for one step.
const STEP: Duration = Duration::from_mins(5);
/// Where the receiver listens in its pod, and in the floor on the compute node.
const PORT: u16 = 19_400;
const RECEIVER: &str = "receiver";
const SENDER: &str = "sender";
/// The partition whose only node is [`FIRST`].
const PARTITION: &str = "gpu";
/// The nodes other than [`SECOND`].
const OTHERS: &str = "c1,c3";

/// Measures it with a kubelet that gives pods addresses, which is started again without them afterwards. Returns a row for each floor.
pub(super) async fn measure(bed: &Bed, sizes: Sizes) -> anyhow::Result<[Stream; 2]> {
    own_addresses::begin(&bed.world).await?;
    let measured = with_addresses(bed, sizes).await;
    own_addresses::end(&bed.world).await?;
    measured
}

async fn with_addresses(bed: &Bed, sizes: Sizes) -> anyhow::Result<[Stream; 2]> {
    let world = &bed.world;
    let (program, port) = (format!("/{DIALER}"), PORT.to_string());
    let receiver = pod(RECEIVER)
        .annotation("knoc.io/partition", PARTITION)
        .command([program.as_str(), "sink", &port]);
    let receiver = world.running(&receiver).await?;
    let there = format!("{}:{PORT}", address(bed, RECEIVER).await?);
    let sender = pod(SENDER).command(["sleep", "3600"]);
    let sender = world
        .away_from(OTHERS, async || world.running(&sender).await)
        .await?;
    address(bed, SENDER).await?;
    for (uid, node) in [(&receiver, FIRST), (&sender, SECOND)] {
        let runs = world.compute_node(uid).await?;
        anyhow::ensure!(runs == node, "a pod is on {runs} and not on {node}");
    }
    wait_for("the receiver", STEP, async || {
        inside(bed, &sender, ["send", &there, "1"]).await
    })
    .await?;
    let streams = alternate(bed, sizes, &sender, &there).await?;
    for name in [SENDER, RECEIVER] {
        world.delete(name, Some(0)).await?;
    }
    for name in [SENDER, RECEIVER] {
        world.wait_gone(name, STEP).await?;
    }
    Ok(streams)
}

fn pod(name: &str) -> PodBuilder {
    PodBuilder::new(name)
        .annotation("knoc.io/network", "private")
        .image(&Bed::image_path())
        // What the kernel and the shim hold of the stream counts as the pod's memory.
        .memory("1Gi")
}

/// The address in the pod's status, once it has one of its own.
async fn address(bed: &Bed, name: &str) -> anyhow::Result<String> {
    let own = |pod: &Pod| {
        let status = pod.status.as_ref()?;
        let address = status.pod_ip.as_ref().filter(|one| !one.is_empty())?;
        (status.host_ip.as_ref() != Some(address)).then(|| address.clone())
    };
    let world = &bed.world;
    world
        .wait_for_state(name, "it has an address of its own", STEP, own)
        .await
}

/// The programs themselves measure, from their connection until the receiver has read everything.
async fn alternate(
    bed: &Bed,
    sizes: Sizes,
    sender: &str,
    there: &str,
) -> anyhow::Result<[Stream; 2]> {
    let row = |name, share| Stream {
        name,
        hops: 2,
        bytes: sizes.large,
        share,
        ..Stream::default()
    };
    let (mut beside, mut strict) = (row(NAME, SHARE), row(STRICT, None));
    let bytes = sizes.large.to_string();
    let floor = Floor::start(bed).await?;
    let (over_tls, without) = (
        floor.chain.sender(sizes.large)?,
        send(&floor.near, sizes.large),
    );
    for _ in 0..sizes.rounds.1 {
        let before = Clock::read();
        let took = inside(bed, sender, ["send", there, &bytes]).await?;
        Clock::read().add_since(&before, &mut beside.spent.0);
        push(&mut beside.knoc, sizes.large, &took);
        for (row, command) in [(&mut beside, &over_tls), (&mut strict, &without)] {
            let floor = (&mut row.floor, &mut row.spent.1);
            through_relays(bed, command, sizes.large, floor).await?;
        }
    }
    strict.knoc = beside.knoc.clone();
    strict.spent.0 = beside.spent.0;
    Ok([beside, strict])
}

async fn through_relays(
    bed: &Bed,
    command: &str,
    bytes: u64,
    (floor, spent): (&mut Series, &mut Spent),
) -> anyhow::Result<()> {
    let before = Clock::read();
    let took = timed(bed, SECOND, command).await?;
    Clock::read().add_since(&before, spent);
    push(floor, bytes, &took);
    Ok(())
}

/// Adds the rates of that many bytes in these times, in milliseconds.
fn push(series: &mut Series, bytes: u64, took: &[f64]) {
    for took in took {
        series.push(rate(bytes, Duration::from_secs_f64(took / 1000.0)));
    }
}

/// The command of a sender without TLS.
fn send(to: &SocketAddr, bytes: u64) -> String {
    format!("{FOLDER}/{DIALER} send {to} {bytes}")
}

/// The relays of both floors, and a receiver on the first node.
struct Floor {
    _receiver: Child,
    /// A relay on each of the nodes.
    chain: Chain,
    /// Where the relay of the second node listens whose clients have no TLS. It uses the chain's relay of the first node.
    near: SocketAddr,
}

impl Floor {
    async fn start(bed: &Bed) -> anyhow::Result<Self> {
        let (program, port) = (format!("{FOLDER}/{DIALER}"), PORT.to_string());
        let receiver = bed.world.on_as_root(FIRST, [program.as_str()]);
        let receiver = receiver.args(["sink", &port]);
        let receiver = receiver.spawn(&bed.here(FOLDER).join("dialer.log"))?;
        // A relay ends if it does not reach the next one, so each is there before one dials it.
        let server = SocketAddr::from(([127, 0, 0, 1], PORT));
        reached(bed, FIRST, &send(&server, 1)).await?;
        let nodes = [Location::Compute, Location::Second];
        let mut chain = Chain::start(bed, &nodes, format!("server={server}")).await?;
        reached(bed, SECOND, &chain.sender(1)?).await?;
        let near = chain.without_tls(bed)?;
        reached(bed, SECOND, &send(&near, 1)).await?;
        Ok(Self {
            _receiver: receiver,
            chain,
            near,
        })
    }
}

/// Waits until what the command sends from that node comes to its receiver.
async fn reached(bed: &Bed, node: &str, command: &str) -> anyhow::Result<()> {
    wait_for("the floor's way", STEP, async || {
        timed(bed, node, command).await
    })
    .await
    .map(drop)
}
