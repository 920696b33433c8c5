//! Bytes from one pod to another at its own address (ADR 0123): a program writes to a socket, the two shims carry packets over TLS, and a
//! program reads from a socket. In the floor a relay is in place of each shim, with TLS between the two, and the same programs are on the
//! compute node. Both pods are on that node, too.

use std::{net::SocketAddr, time::Duration};

use k8s_openapi::api::core::v1::Pod;
use tokio::process::Child;

use super::{
    bed::{Bed, FOLDER},
    egress::{DIALER, beside, inside},
    machine::Clock,
    relay::{Chain, Location},
    streams::{SHARE, Sizes, Stream, rate},
};
use crate::{PodBuilder, own_addresses, wait_for};

/// The name of the stream.
pub(super) const NAME: &str = "pod to pod";
/// The time limit for one step.
const STEP: Duration = Duration::from_mins(5);
/// Where the receiver listens in its pod, and in the floor on the compute node.
const PORT: u16 = 19_400;
const RECEIVER: &str = "receiver";
const SENDER: &str = "sender";
/// The partition whose only node is the one on which relays run.
const PARTITION: &str = "gpu";

/// Measures it with a kubelet that gives pods addresses, which is started again without them afterwards.
pub(super) async fn measure(bed: &Bed, sizes: Sizes) -> anyhow::Result<Stream> {
    own_addresses::begin(&bed.world).await?;
    let measured = with_addresses(bed, sizes).await;
    own_addresses::end(&bed.world).await?;
    measured
}

async fn with_addresses(bed: &Bed, sizes: Sizes) -> anyhow::Result<Stream> {
    let (program, port) = (format!("/{DIALER}"), PORT.to_string());
    let receiver = pod(RECEIVER).command([program.as_str(), "sink", &port]);
    bed.world.running(&receiver).await?;
    let there = format!("{}:{PORT}", address(bed, RECEIVER).await?);
    let sender = pod(SENDER).command(["sleep", "3600"]);
    let sender = bed.world.running(&sender).await?;
    address(bed, SENDER).await?;
    wait_for("the receiver", STEP, async || {
        inside(bed, &sender, ["send", &there, "1"]).await
    })
    .await?;
    let stream = alternate(bed, sizes, &sender, &there).await?;
    for name in [SENDER, RECEIVER] {
        bed.world.delete(name, Some(0)).await?;
    }
    for name in [SENDER, RECEIVER] {
        bed.world.wait_gone(name, STEP).await?;
    }
    Ok(stream)
}

fn pod(name: &str) -> PodBuilder {
    PodBuilder::new(name)
        .annotation("knoc.io/network", "private")
        .annotation("knoc.io/partition", PARTITION)
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

/// The program itself measures from its connection until the receiver has read everything.
async fn alternate(bed: &Bed, sizes: Sizes, sender: &str, there: &str) -> anyhow::Result<Stream> {
    let mut stream = Stream {
        name: NAME,
        hops: 2,
        bytes: sizes.large,
        share: SHARE,
        ..Stream::default()
    };
    let bytes = stream.bytes.to_string();
    let of = |took: f64| rate(sizes.large, Duration::from_secs_f64(took / 1000.0));
    let floor = Floor::start(bed).await?;
    let beside_pods = format!("send {} {bytes}", floor.near);
    for _ in 0..sizes.rounds.1 {
        let before = Clock::read();
        for took in inside(bed, sender, ["send", there, &bytes]).await? {
            stream.knoc.push(of(took));
        }
        Clock::read().add_since(&before, &mut stream.spent.0);
        let between = Clock::read();
        for took in beside(bed, &beside_pods).await? {
            stream.floor.push(of(took));
        }
        Clock::read().add_since(&between, &mut stream.spent.1);
    }
    Ok(stream)
}

/// Two relays and a receiver on the compute node.
struct Floor {
    _receiver: Child,
    _chain: Chain,
    /// Where the first relay listens.
    near: SocketAddr,
}

impl Floor {
    async fn start(bed: &Bed) -> anyhow::Result<Self> {
        let (program, port) = (format!("{FOLDER}/{DIALER}"), PORT.to_string());
        let receiver = bed.world.on_as_root("c1", [program.as_str()]);
        let receiver = receiver.args(["sink", &port]);
        let receiver = receiver.spawn(&bed.here(FOLDER).join("dialer.log"))?;
        // A relay ends if it does not reach the next one, so each is there before one dials it.
        let server = format!("127.0.0.1:{PORT}");
        reached(bed, &server).await?;
        let role = format!("server={server}");
        let mut chain = Chain::start(bed, &[Location::Compute], role).await?;
        let near = chain.without_tls(bed)?;
        reached(bed, &near.to_string()).await?;
        Ok(Self {
            _receiver: receiver,
            _chain: chain,
            near,
        })
    }
}

/// Waits until a byte that is sent to the address on the compute node comes to its receiver.
async fn reached(bed: &Bed, address: &str) -> anyhow::Result<()> {
    let once = format!("send {address} 1");
    wait_for("the floor's way", STEP, async || beside(bed, &once).await)
        .await
        .map(drop)
}
