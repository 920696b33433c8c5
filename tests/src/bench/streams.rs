//! Streams: the bytes of a log, an exec, a port-forward and a copy, and the same bytes through bare TLS relays.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use knoc_proto::pb;

use super::bed::{Bed, FOLDER};
use super::machine::{Clock, Spent};
use super::relay::{Chain, Place};
use super::{exec, kubernetes};
use crate::{PodBuilder, wait_for};

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
    /// Processor time of all rounds: through KNoC, and by the relays.
    pub(super) spent: (Spent, Spent),
}

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    /// Of each stream, and of the large ones.
    pub(super) rounds: (usize, usize),
    /// Of each stream, in whole lines of 80.
    pub(super) bytes: u64,
    /// Of the large log and the copies.
    pub(super) large: u64,
}

/// Which way the bytes come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// `kubectl logs`' own: API server, kubelet, agent, shim.
    LogsByKubernetes,
    /// `kubectl exec`'s own: the same.
    ExecByKubernetes,
    /// `kubectl port-forward`'s own: the same.
    ForwardByKubernetes,
    /// `kubectl cp` from the pod: the same.
    CopyDown,
    /// And to it.
    CopyUp,
    /// The same without what kubectl itself costs.
    CopyUpByLibrary,
    /// `ReadLogs` of the agent, relayed from the shim.
    LogsByAgent,
    /// `Exec` of the agent, relayed from the shim.
    ExecByAgent,
}

/// Of the floor, through the API server (issue and design).
const SHARE: Option<f64> = Some(0.7);

/// The parts of KNoC and Kubernetes that a byte passes, from the pod on; one TLS connection leaves each.
const ALL: &[Place] = &[Place::Compute, Place::Login, Place::Host, Place::Host];
const TO_AGENT: &[Place] = &[Place::Compute, Place::Login];

/// One stream to be measured.
struct Kind {
    name: &'static str,
    way: Way,
    places: &'static [Place],
    share: Option<f64>,
    large: bool,
}

const fn kind(name: &'static str, way: Way, large: bool) -> Kind {
    let (places, share) = match way {
        Way::LogsByAgent | Way::ExecByAgent => (TO_AGENT, None),
        Way::LogsByKubernetes
        | Way::ExecByKubernetes
        | Way::ForwardByKubernetes
        | Way::CopyDown
        | Way::CopyUp
        | Way::CopyUpByLibrary => (ALL, SHARE),
    };
    Kind {
        name,
        way,
        places,
        share,
        large,
    }
}

const STREAMS: [Kind; 9] = [
    kind("log through the API server", Way::LogsByKubernetes, false),
    kind("exec through the API server", Way::ExecByKubernetes, false),
    kind(
        "port-forward through the API server",
        Way::ForwardByKubernetes,
        false,
    ),
    kind("log through the agent", Way::LogsByAgent, false),
    kind("exec through the agent", Way::ExecByAgent, false),
    kind(
        "large log through the API server",
        Way::LogsByKubernetes,
        true,
    ),
    kind("kubectl cp from the pod", Way::CopyDown, true),
    kind("kubectl cp to the pod", Way::CopyUp, true),
    kind("the same copy by a library", Way::CopyUpByLibrary, true),
];

/// Alternates each stream that has the words in its name with its floor.
pub(super) async fn measure(bed: &Bed, sizes: Sizes, words: &str) -> anyhow::Result<Vec<Stream>> {
    let kinds: Vec<_> = STREAMS
        .iter()
        .filter(|kind| kind.name.contains(words))
        .collect();
    anyhow::ensure!(!kinds.is_empty(), "no stream has {words:?} in its name");
    let uid = talker(bed, sizes).await?;
    let mut streams = Vec::new();
    for kind in kinds {
        let (bytes, rounds) = if kind.large {
            (sizes.large, sizes.rounds.1)
        } else {
            (sizes.bytes, sizes.rounds.0)
        };
        let mut stream = Stream {
            name: kind.name,
            hops: kind.places.len(),
            bytes,
            share: kind.share,
            ..Stream::default()
        };
        stream
            .alternate(bed, &uid, kind, rounds)
            .await
            .context(kind.name)?;
        streams.push(stream);
    }
    bed.world.delete("stream", Some(0)).await?;
    bed.world.wait_gone("stream", WRITTEN).await?;
    Ok(streams)
}

/// A pod that has written the large log and files of both sizes, and serves the small one on its port; the same files
/// lie where the floor's programs find them. Answers its UID.
async fn talker(bed: &Bed, sizes: Sizes) -> anyhow::Result<String> {
    let Sizes { bytes, large, .. } = sizes;
    let files = format!("head -c {bytes} /dev/zero >small; head -c {large} /dev/zero >large");
    bed.shell(
        "login",
        &format!("mkdir -p {FOLDER}/up && cd {FOLDER} && {files}"),
    )
    .ok()
    .await?;
    // Lines of 80 bytes, and whole ones only: what has no end is held back until it has one.
    let line = "x".repeat(79);
    let script = format!(
        "cd /data; mkdir lib; {files}; nc -ll -p {PORT} -e cat /data/small & yes {line} | head -c {large}; wait"
    );
    let pod = PodBuilder::new("stream")
        .image(&Bed::image_path())
        // Or it is the node's disk that is measured: what the pod has written counts as its memory.
        .memory("4Gi")
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
        kind: &Kind,
        rounds: usize,
    ) -> anyhow::Result<()> {
        let bytes = self.bytes;
        let folder = tempfile::tempdir()?;
        // Sent by a copy to the pod, and taken from a copy of the pod's.
        std::fs::File::create(folder.path().join("large"))?.set_len(bytes)?;
        let local = folder.path().display().to_string();
        let floor = Floor::start(bed, kind, &local).await?;
        for _ in 0..rounds {
            let before = Clock::read();
            let began = Instant::now();
            let read = through_knoc(bed, uid, kind.way, bytes, &local).await?;
            self.knoc.push(rate(bytes, began.elapsed()));
            Clock::read().add_since(&before, &mut self.spent.0);
            let read = match read {
                Moved::Counted(read) => read,
                Moved::Lies(path) => kubernetes::size(bed, "stream", path).await?,
            };
            anyhow::ensure!(read == bytes, "{read} of {bytes} bytes");
            let between = Clock::read();
            let began = Instant::now();
            let read = floor.run().await.context("the relays")?;
            self.floor.push(rate(bytes, began.elapsed()));
            Clock::read().add_since(&between, &mut self.spent.1);
            anyhow::ensure!(read >= bytes, "the relays: {read} of {bytes} bytes");
        }
        Ok(())
    }
}

/// What arrived.
enum Moved {
    /// So many bytes.
    Counted(u64),
    /// What lies there in the pod.
    Lies(&'static str),
}

/// Moves the bytes once.
async fn through_knoc(
    bed: &Bed,
    uid: &str,
    way: Way,
    bytes: u64,
    local: &str,
) -> anyhow::Result<Moved> {
    let cat = ["cat", "/data/small"];
    let large = format!("{local}/large");
    let counted = match way {
        Way::LogsByKubernetes => kubernetes::logs(bed, "stream", bytes).await?,
        Way::ExecByKubernetes => kubernetes::exec_bytes(bed, "stream", &cat).await?,
        Way::ForwardByKubernetes => kubernetes::forward(bed, "stream", PORT).await?,
        Way::CopyDown => {
            kubernetes::copy(bed, "stream:/data/large", &large).await?;
            tokio::fs::metadata(&large).await?.len()
        }
        Way::CopyUp => {
            kubernetes::copy(bed, &large, "stream:/data/up").await?;
            return Ok(Moved::Lies("/data/up"));
        }
        Way::CopyUpByLibrary => {
            kubernetes::copy_up(bed, "stream", local, "/data/lib").await?;
            return Ok(Moved::Lies("/data/lib/large"));
        }
        Way::LogsByAgent => logs(bed, uid, bytes).await?,
        Way::ExecByAgent => exec::run(bed, uid, "main", &cat).await?.0,
    };
    Ok(Moved::Counted(counted))
}

/// The same bytes by bare relays, from where KNoC has them: those of a log lie in a file, those of an exec and of a copy
/// are made and taken by the programs that make and take them in the pod and at the client, those of a forwarded port
/// come from the pod's own listener.
struct Floor {
    chain: Chain,
    /// At our end; without it the bytes are counted.
    program: Option<Vec<String>>,
}

impl Floor {
    async fn start(bed: &Bed, kind: &Kind, local: &str) -> anyhow::Result<Self> {
        let file = if kind.large { "large" } else { "small" };
        let (far, near) = match kind.way {
            Way::LogsByKubernetes | Way::LogsByAgent => (format!("file={FOLDER}/{file}"), None),
            Way::ExecByKubernetes | Way::ExecByAgent => {
                (format!("program=cat {FOLDER}/small"), None)
            }
            Way::ForwardByKubernetes => (format!("listener=127.0.0.1:{PORT}"), None),
            Way::CopyDown => (
                format!("program=tar -cf - -C {FOLDER} large"),
                Some(format!("tar -xf - -C {local}")),
            ),
            Way::CopyUp | Way::CopyUpByLibrary => (
                format!("program=tar -xf - -C {FOLDER}/up"),
                Some(format!("tar -cf - -C {local} large")),
            ),
        };
        let program = near.map(|words| words.split(' ').map(str::to_owned).collect());
        let chain = Chain::start(bed, kind.places, far).await?;
        Ok(Self { chain, program })
    }

    /// Answers how many bytes passed; a tar is somewhat more than what it holds.
    async fn run(&self) -> anyhow::Result<u64> {
        match &self.program {
            None => self.chain.read().await,
            Some(words) => {
                let (came, went) = self.chain.run(words).await?;
                Ok(came.max(went))
            }
        }
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
