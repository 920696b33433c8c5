//! What pods open to the cluster: how soon they have the first byte, how fast they send, how fast names are resolved, and what a
//! thousand idle connections cost. The floor is the same program on the compute node over plain relays, one process in place of
//! shim, agent and kubelet each.

mod servers;

use std::{net::SocketAddr, time::Duration};

use anyhow::Context as _;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::ListParams;
use tokio::{process::Child, task::JoinSet};

use super::{
    bed::{Bed, FOLDER},
    load::{self, Memory},
    machine::{Clock, Spent, anonymous},
    stats::Series,
    streams,
};
use crate::{Background, PodBuilder, Run, wait_for};

/// The time limit for one step.
const STEP: Duration = Duration::from_mins(5);
/// The first port of the floor's relays.
const PORT: u16 = 19_300;
/// How long idle connections are watched.
pub(super) const WATCHED: Duration = Duration::from_secs(30);
/// How many connections each pod holds: from 960 of a node on, a pod gets no more than 32. Other pods of the bed may have a few.
const HELD: [u32; 4] = [470, 470, 30, 30];
/// The program that dials, in the image and on the nodes.
pub(super) const DIALER: &str = "knoc-dialer";

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) connections: u32,
    pub(super) questions: u32,
    pub(super) rounds: usize,
    pub(super) bytes: u64,
}

/// The results.
#[derive(Debug, Default)]
pub(super) struct Egress {
    /// Connect and first byte from a pod to the API server, in milliseconds, and over plain relays.
    pub(super) first: Series,
    pub(super) first_floor: Series,
    /// Megabytes a second.
    pub(super) rate: Series,
    pub(super) rate_floor: Series,
    /// Questions about a name each, and about one name.
    pub(super) new_names: Series,
    pub(super) same_name: Series,
    pub(super) idle: Idle,
}

/// A thousand idle connections.
#[derive(Debug, Default)]
pub(super) struct Idle {
    pub(super) connections: u32,
    /// Resident memory of agent and kubelet before and with them.
    pub(super) before: Memory,
    pub(super) with: Memory,
    /// Anonymous memory of the largest shim before and with them, in KiB.
    pub(super) shim: (u64, u64),
    /// Processor time in [`WATCHED`].
    pub(super) spent: Spent,
}

/// Measures everything.
pub(super) async fn measure(bed: &Bed, sizes: Sizes) -> anyhow::Result<Egress> {
    let mut tasks = JoinSet::new();
    let ports = servers::start(&mut tasks).await?;
    let address = servers::publish(bed, ports).await?;
    let measured = with_service(bed, sizes, &address, ports).await;
    servers::withdraw(bed).await?;
    measured
}

async fn with_service(
    bed: &Bed,
    sizes: Sizes,
    address: &str,
    ports: servers::Ports,
) -> anyhow::Result<Egress> {
    let uid = bed.world.running(&pod("egress")).await?;
    let mut figures = Egress::default();
    let server = format!("{address}:53");
    // The shim may learn of the ports of the Service after the pod has started.
    wait_for("the cluster's DNS", STEP, async || {
        let ask = inside(bed, &uid, ["names", &server, "ready.bench", "1"]);
        ask.await.map(drop)
    })
    .await?;
    first_bytes(bed, &uid, sizes, &mut figures).await?;
    rates(bed, &uid, (sizes, address, ports), &mut figures).await?;
    let count = sizes.questions.to_string();
    let dns = format!("{address}:53");
    for (name, series) in [
        ("n%.bench", &mut figures.new_names),
        ("same.bench", &mut figures.same_name),
    ] {
        for took in inside(bed, &uid, ["names", &dns, name, &count]).await? {
            series.push(took);
        }
    }
    bed.world.delete("egress", Some(0)).await?;
    bed.world.wait_gone("egress", STEP).await?;
    figures.idle = idle(bed, address).await?;
    Ok(figures)
}

fn pod(name: &str) -> PodBuilder {
    PodBuilder::new(name)
        .annotation("knoc.io/network", "private")
        .image(&Bed::image_path())
        .command(["sleep", "3600"])
}

/// Runs the dialer in the pod; returns what it printed, in milliseconds.
pub(super) async fn inside<const N: usize>(
    bed: &Bed,
    uid: &str,
    words: [&str; N],
) -> anyhow::Result<Vec<f64>> {
    let program = format!("/{DIALER}");
    let run = bed.world.exec(uid, "main", [program.as_str()]).args(words);
    times(&run.deadline(STEP).ok().await?.text())
}

/// The same on the compute node.
async fn beside(bed: &Bed, words: &str) -> anyhow::Result<Vec<f64>> {
    timed(bed, "c1", &format!("{FOLDER}/{DIALER} {words}")).await
}

/// Runs a command on a node that prints as the dialer does.
pub(super) async fn timed(bed: &Bed, node: &str, command: &str) -> anyhow::Result<Vec<f64>> {
    times(&bed.shell(node, command).deadline(STEP).ok().await?.text())
}

fn times(text: &str) -> anyhow::Result<Vec<f64>> {
    let one = |line: &str| {
        let micros: f64 = line.trim().parse().with_context(|| line.to_owned())?;
        Ok(micros / 1000.0)
    };
    text.lines().map(one).collect()
}

/// Relays on compute node, login node and this host. Returns the processes, and the port on the compute node.
fn relays(bed: &Bed, to: SocketAddr, first: u16) -> anyhow::Result<(Vec<Child>, u16)> {
    let log = bed.here(FOLDER).join("dialer.log");
    let mut processes = Vec::new();
    let mut to = to.to_string();
    for (place, port) in [
        (Place::Host, first),
        (Place::Login, first + 1),
        (Place::Compute, first + 2),
    ] {
        let there = format!("{FOLDER}/{DIALER}");
        let run = match place {
            Place::Host => Run::new(bed.here(FOLDER).join(DIALER)),
            Place::Login => bed.world.on_as_root("login", [there.as_str()]),
            Place::Compute => bed.world.on_as_root("c1", [there.as_str()]),
        };
        let run = run.args(["relay", &port.to_string(), &to]);
        processes.push(run.spawn(&log)?);
        to = format!("{}:{port}", place.address());
    }
    Ok((processes, first + 2))
}

/// Where a relay runs.
#[derive(Clone, Copy)]
enum Place {
    Host,
    Login,
    Compute,
}

impl Place {
    /// The address at which the next relay reaches it.
    fn address(self) -> &'static str {
        match self {
            Self::Host => "10.77.0.1",
            Self::Login => "10.78.0.3",
            Self::Compute => "127.0.0.1",
        }
    }
}

/// Where the API server listens, as the kubelet dials it.
async fn api_server(bed: &Bed) -> anyhow::Result<SocketAddr> {
    let slices = bed.world.api_in::<EndpointSlice>("default");
    // Its name is the cluster's matter: the test bed publishes one of its own.
    let of_service = ListParams::default().labels("kubernetes.io/service-name=kubernetes");
    let listed = slices.list(&of_service).await?;
    let slice = listed.items.first().context("no slice of kubernetes")?;
    let endpoint = slice.endpoints.iter().flatten().next();
    let address = endpoint.and_then(|endpoint| endpoint.addresses.first());
    let port = slice.ports.iter().flatten().next().and_then(|one| one.port);
    let (address, port) = address.zip(port).context("the API server's endpoint")?;
    Ok(SocketAddr::new(address.parse()?, u16::try_from(port)?))
}

async fn first_bytes(
    bed: &Bed,
    uid: &str,
    sizes: Sizes,
    figures: &mut Egress,
) -> anyhow::Result<()> {
    let service = bed.world.exec(
        uid,
        "main",
        [
            "sh",
            "-c",
            "echo $KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT",
        ],
    );
    let service = service.ok().await?.text();
    let (_relays, port) = relays(bed, api_server(bed).await?, PORT)?;
    let floor = format!("127.0.0.1:{port}");
    let once = format!("first {floor} 1");
    wait_for("the relays", STEP, async || beside(bed, &once).await).await?;
    let count = (sizes.connections / u32::try_from(sizes.rounds)?)
        .max(1)
        .to_string();
    for _ in 0..sizes.rounds {
        for took in inside(bed, uid, ["first", service.trim(), &count]).await? {
            figures.first.push(took);
        }
        for took in beside(bed, &format!("first {floor} {count}")).await? {
            figures.first_floor.push(took);
        }
    }
    Ok(())
}

async fn rates(
    bed: &Bed,
    uid: &str,
    (sizes, address, ports): (Sizes, &str, servers::Ports),
    figures: &mut Egress,
) -> anyhow::Result<()> {
    let sink = SocketAddr::new(servers::HOST.into(), ports.sink);
    let (_relays, port) = relays(bed, sink, PORT + 10)?;
    let (service, bytes) = (format!("{address}:53"), sizes.bytes.to_string());
    let floor = format!("127.0.0.1:{port}");
    let once = format!("send {floor} 1");
    wait_for("the relays", STEP, async || beside(bed, &once).await).await?;
    let rate = |took: f64| streams::rate(sizes.bytes, Duration::from_secs_f64(took / 1000.0));
    for _ in 0..sizes.rounds {
        for took in inside(bed, uid, ["send", &service, &bytes]).await? {
            figures.rate.push(rate(took));
        }
        for took in beside(bed, &format!("send {floor} {bytes}")).await? {
            figures.rate_floor.push(rate(took));
        }
    }
    Ok(())
}

/// Holds connections in several pods, and watches what they cost.
async fn idle(bed: &Bed, address: &str) -> anyhow::Result<Idle> {
    let mut uids = Vec::new();
    for at in 0..HELD.len() {
        uids.push(bed.world.running(&pod(&format!("idle{at}"))).await?);
    }
    let service = format!("{address}:5300");
    let mut figures = Idle {
        before: load::memory(),
        shim: (largest_shim(), 0),
        ..Idle::default()
    };
    let mut held = Vec::new();
    for (uid, count) in uids.iter().zip(HELD) {
        let program = format!("/{DIALER}");
        let dialer = bed.world.exec(uid, "main", [program.as_str()]);
        let dialer = dialer.args(["hold", &service, &count.to_string()]);
        let mut dialer = Background::start(dialer)?;
        dialer.expect(&format!("held {count}")).await?;
        held.push(dialer);
        figures.connections += count;
    }
    let before = Clock::read();
    // This sleep is the measured time and not a wait for a state.
    tokio::time::sleep(WATCHED).await;
    Clock::read().add_since(&before, &mut figures.spent);
    figures.with = load::memory();
    figures.shim.1 = largest_shim();
    drop(held);
    for at in 0..HELD.len() {
        bed.world.delete(&format!("idle{at}"), Some(0)).await?;
    }
    for at in 0..HELD.len() {
        bed.world.wait_gone(&format!("idle{at}"), STEP).await?;
    }
    Ok(figures)
}

fn largest_shim() -> u64 {
    anonymous("knoc-agent", "shim")
        .into_iter()
        .max()
        .unwrap_or(0)
}
