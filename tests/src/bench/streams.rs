//! Streams: the bytes of a log and of an exec, and the same bytes through bare TLS relays.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::AsyncReadExt as _;
use k8s_openapi::api::core::v1::Pod;
use knoc_proto::link::pinned::KeyPair;
use knoc_proto::pb;
use kube::api::{Api, LogParams};
use tempfile::TempDir;
use tokio::process::Child;

use super::bed::Bed;
use super::{exec, relay};
use crate::site::free_port;
use crate::{PodBuilder, Run, wait_for};

/// Of a pod that writes the bytes.
const WRITTEN: Duration = Duration::from_mins(3);

/// One stream, each series in megabytes a second.
#[derive(Debug, Default)]
pub(super) struct Stream {
    pub(super) name: &'static str,
    /// TLS connections that a byte passes.
    pub(super) hops: usize,
    pub(super) bytes: u64,
    pub(super) knoc: super::Series,
    pub(super) floor: super::Series,
}

/// Which way the bytes come.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// `kubectl logs`' own: API server, kubelet, agent.
    LogsByKubernetes,
    /// `ReadLogs` of the agent.
    LogsByAgent,
    /// `Exec` of the agent, relayed from the shim.
    ExecByAgent,
}

/// Alternates each stream with its floor.
pub(super) async fn measure(bed: &Bed, rounds: usize, bytes: u64) -> anyhow::Result<Vec<Stream>> {
    // Lines of 80 bytes, and whole ones only: what has no end is held back until it has one.
    let line = "x".repeat(79);
    let script = format!("yes {line} | head -c {bytes}");
    let pod = PodBuilder::new("stream")
        .image(&Bed::image_path())
        .sh(&format!("{script}; sleep 3600"));
    let uid = bed.world.create(&pod).await?;
    bed.world.wait_phase("stream", "Running", WRITTEN).await?;
    let whole = || exec::run(bed, &uid, "main", &["true"]);
    wait_for("exec works", WRITTEN, async || {
        whole().await.map_err(|error| format!("{error:#}"))
    })
    .await?;
    wait_for("the log is whole", WRITTEN, async || {
        match logs(bed, &uid).await {
            Ok(read) if read == bytes => Ok(()),
            Ok(read) => Err(format!("{read} of {bytes} bytes")),
            Err(error) => Err(format!("{error:#}")),
        }
    })
    .await?;
    let mut streams = Vec::new();
    for (name, hops, way) in [
        ("log through the API server", 3, Way::LogsByKubernetes),
        ("log through the agent", 1, Way::LogsByAgent),
        ("exec through the agent", 2, Way::ExecByAgent),
    ] {
        let mut stream = Stream {
            name,
            hops,
            bytes,
            ..Stream::default()
        };
        stream
            .alternate(bed, &uid, way, rounds)
            .await
            .context(name)?;
        streams.push(stream);
    }
    bed.world.delete("stream", Some(0)).await?;
    bed.world.wait_gone("stream", WRITTEN).await?;
    Ok(streams)
}

impl Stream {
    async fn alternate(
        &mut self,
        bed: &Bed,
        uid: &str,
        way: Way,
        rounds: usize,
    ) -> anyhow::Result<()> {
        let bytes = self.bytes;
        let relays = Relays::start(self.hops, bytes).await?;
        for _ in 0..rounds {
            let began = Instant::now();
            let read = match way {
                Way::LogsByKubernetes => logs_by_kubernetes(bed).await?,
                Way::LogsByAgent => logs(bed, uid).await?,
                Way::ExecByAgent => {
                    let count = bytes.to_string();
                    exec::run(bed, uid, "main", &["head", "-c", &count, "/dev/zero"])
                        .await?
                        .0
                }
            };
            anyhow::ensure!(read == bytes, "{read} of {bytes} bytes");
            self.knoc.push(rate(bytes, began.elapsed()));
            let began = Instant::now();
            let read = relay::read(relays.last, &relays.pair)
                .await
                .context("the relays")?;
            anyhow::ensure!(read == bytes, "the relays: {read} of {bytes} bytes");
            self.floor.push(rate(bytes, began.elapsed()));
        }
        Ok(())
    }
}

async fn logs_by_kubernetes(bed: &Bed) -> anyhow::Result<u64> {
    let pods: Api<Pod> = bed.world.api();
    let mut stream = pods.log_stream("stream", &LogParams::default()).await?;
    let mut buffer = vec![0; 64 << 10];
    let mut bytes = 0;
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(bytes),
            read => bytes += u64::try_from(read)?,
        }
    }
}

async fn logs(bed: &Bed, uid: &str) -> anyhow::Result<u64> {
    let request = pb::ReadLogsRequest {
        uid: uid.to_owned(),
        container: "main".to_owned(),
        tail_lines: -1,
        ..pb::ReadLogsRequest::default()
    };
    let mut chunks = bed.agent.clone().read_logs(request).await?.into_inner();
    let mut bytes = 0;
    while let Some(chunk) = chunks.message().await? {
        bytes += u64::try_from(chunk.data.len())?;
    }
    Ok(bytes)
}

/// Megabytes a second.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
fn rate(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / 1e6 / took.as_secs_f64()
}

/// A source and the relays before it, a process each.
struct Relays {
    _processes: Vec<Child>,
    _keys: TempDir,
    pair: KeyPair,
    last: u16,
}

impl Relays {
    async fn start(hops: usize, bytes: u64) -> anyhow::Result<Self> {
        let keys = tempfile::tempdir()?;
        let pair = KeyPair::generate("bench")?;
        crate::site::write(&keys.path().join("pair.crt"), pair.cert_pem())?;
        crate::site::write(&keys.path().join("pair.key"), pair.key_pem())?;
        let mut processes = Vec::new();
        let mut role = format!("source={bytes}");
        let mut last = 0;
        for _ in 0..hops {
            last = free_port()?;
            let relay =
                Run::new(std::env::current_exe()?).args(["relay", &last.to_string(), &role]);
            processes.push(relay.arg(keys.path()).spawn(&keys.path().join("log"))?);
            role = format!("relay={last}");
            wait_for("a relay listens", WRITTEN, async || {
                tokio::net::TcpStream::connect(("127.0.0.1", last))
                    .await
                    .map(drop)
            })
            .await?;
        }
        Ok(Self {
            _processes: processes,
            _keys: keys,
            pair,
            last,
        })
    }
}
