//! Streams: the bytes of a log, an exec, a port-forward and a copy, and the same bytes through bare TLS relays.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use knoc_proto::link::pinned::KeyPair;
use knoc_proto::pb;
use tempfile::TempDir;
use tokio::process::Child;

use super::bed::Bed;
use super::{exec, kubernetes, relay};
use crate::site::free_port;
use crate::{PodBuilder, Run, wait_for};

/// Of a pod that writes the bytes.
const WRITTEN: Duration = Duration::from_mins(5);

/// Where the pod serves bytes; nobody else of the node does.
const PORT: u16 = 19_099;

/// One stream, each series in megabytes a second.
#[derive(Debug, Default)]
pub(super) struct Stream {
    pub(super) name: &'static str,
    /// TLS connections that a byte passes.
    pub(super) hops: usize,
    pub(super) bytes: u64,
    /// What the rate must be of the floor's, where a bound stands.
    pub(super) share: Option<f64>,
    pub(super) knoc: super::Series,
    pub(super) floor: super::Series,
}

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    /// Of each stream but the large ones, which are measured once.
    pub(super) rounds: usize,
    /// Of each stream, in whole lines of 80.
    pub(super) bytes: u64,
    /// Of the large log and the copies.
    pub(super) large: u64,
}

/// Which way the bytes come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// `kubectl logs`' own: API server, kubelet, agent.
    LogsByKubernetes,
    /// `kubectl exec`'s own: API server, kubelet, agent, shim.
    ExecByKubernetes,
    /// `kubectl port-forward`'s own: the same.
    ForwardByKubernetes,
    /// `kubectl cp` from the pod: the same.
    CopyDown,
    /// And to it.
    CopyUp,
    /// `ReadLogs` of the agent.
    LogsByAgent,
    /// `Exec` of the agent, relayed from the shim.
    ExecByAgent,
}

/// Of the floor, through the API server (issue and design).
const SHARE: Option<f64> = Some(0.7);

const STREAMS: [(&str, usize, Way, Option<f64>); 5] = [
    (
        "log through the API server",
        3,
        Way::LogsByKubernetes,
        SHARE,
    ),
    (
        "exec through the API server",
        4,
        Way::ExecByKubernetes,
        SHARE,
    ),
    (
        "port-forward through the API server",
        4,
        Way::ForwardByKubernetes,
        SHARE,
    ),
    ("log through the agent", 1, Way::LogsByAgent, None),
    ("exec through the agent", 2, Way::ExecByAgent, None),
];

const LARGE: [(&str, usize, Way, Option<f64>); 3] = [
    (
        "large log through the API server",
        3,
        Way::LogsByKubernetes,
        SHARE,
    ),
    ("kubectl cp from the pod", 4, Way::CopyDown, SHARE),
    ("kubectl cp to the pod", 4, Way::CopyUp, SHARE),
];

/// Alternates each stream with its floor.
pub(super) async fn measure(bed: &Bed, sizes: Sizes) -> anyhow::Result<Vec<Stream>> {
    let uid = talker(bed, sizes).await?;
    let mut streams = Vec::new();
    let small = STREAMS.map(|stream| (stream, sizes.bytes, sizes.rounds));
    let large = LARGE.map(|stream| (stream, sizes.large, 1));
    for ((name, hops, way, share), bytes, rounds) in small.into_iter().chain(large) {
        let mut stream = Stream {
            name,
            hops,
            bytes,
            share,
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

/// A pod that has written the large log and a large file, and serves bytes on its port. Answers its UID.
async fn talker(bed: &Bed, sizes: Sizes) -> anyhow::Result<String> {
    let Sizes { bytes, large, .. } = sizes;
    // Lines of 80 bytes, and whole ones only: what has no end is held back until it has one.
    let line = "x".repeat(79);
    let script = format!(
        "nc -ll -p {PORT} -e head -c {bytes} /dev/zero & head -c {large} /dev/zero >/data/down; \
         yes {line} | head -c {large}; wait"
    );
    let pod = PodBuilder::new("stream")
        .image(&Bed::image_path())
        .memory("512Mi")
        .set(
            "volumeMounts",
            serde_json::json!([{"name": "data", "mountPath": "/data"}]),
        )
        .spec(
            "volumes",
            serde_json::json!([{"name": "data", "emptyDir": {}}]),
        )
        .sh(&script);
    let uid = bed.world.create(&pod).await?;
    bed.world.wait_phase("stream", "Running", WRITTEN).await?;
    let whole = || exec::run(bed, &uid, "main", &["true"]);
    wait_for("exec works", WRITTEN, async || {
        whole().await.map_err(|error| format!("{error:#}"))
    })
    .await?;
    wait_for("the log is whole", WRITTEN, async || {
        match logs(bed, &uid, large).await {
            Ok(read) if read == large => Ok(()),
            Ok(read) => Err(format!("{read} of {large} bytes")),
            Err(error) => Err(format!("{error:#}")),
        }
    })
    .await?;
    Ok(uid)
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
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("file");
        if way == Way::CopyUp {
            std::fs::File::create(&file)?.set_len(bytes)?;
        }
        let path = file.display().to_string();
        for _ in 0..rounds {
            let began = Instant::now();
            let read = match way {
                Way::LogsByKubernetes => kubernetes::logs(bed, "stream", bytes).await?,
                Way::ExecByKubernetes => {
                    let count = bytes.to_string();
                    kubernetes::exec(bed, "stream", &["head", "-c", &count, "/dev/zero"]).await?
                }
                Way::ForwardByKubernetes => kubernetes::forward(bed, "stream", PORT).await?,
                Way::CopyDown => kubernetes::copy(bed, "stream:/data/down", &path, &file).await?,
                Way::CopyUp => kubernetes::copy(bed, &path, "stream:/data/up", &file).await?,
                Way::LogsByAgent => logs(bed, uid, bytes).await?,
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

/// Reads so many bytes of the log from the agent.
async fn logs(bed: &Bed, uid: &str, bytes: u64) -> anyhow::Result<u64> {
    let request = pb::ReadLogsRequest {
        uid: uid.to_owned(),
        container: "main".to_owned(),
        tail_lines: -1,
        limit_bytes: i64::try_from(bytes)?,
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
