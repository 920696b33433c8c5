//! Streams: the bytes of a log, an exec, a port-forward, a Service, a copy and between pods, and the same bytes through bare TLS relays.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use knoc_proto::pb;

use super::bed::{Bed, FOLDER};
use super::machine::{Clock, Spent};
use super::relay::{Chain, Location};
use super::{exec, kubernetes, relayed};
use crate::{PodBuilder, wait_for};

/// The time limit for the pod that writes the bytes.
const WRITTEN: Duration = Duration::from_mins(5);

/// The nodes other than that of [`Location::Compute`].
const OTHERS: &str = "c2,c3";

/// The ports at which the pod serves the small and the large file. No other process of the node uses them.
const PORT: u16 = 19_099;
const LARGE_PORT: u16 = 19_098;

/// One stream, each series in megabytes a second.
#[derive(Debug, Default)]
pub(super) struct Stream {
    pub(super) name: &'static str,
    /// The number of relays that a byte passes in the floor.
    pub(super) hops: usize,
    pub(super) bytes: u64,
    /// The target: the rate as a share of the floor's, if there is a target.
    pub(super) share: Option<f64>,
    pub(super) knoc: super::Series,
    pub(super) floor: super::Series,
    /// The processor time of all rounds: through KNoC, and through the relays.
    pub(super) spent: (Spent, Spent),
}

/// The number of rounds and the sizes of the streams.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    /// The rounds of each stream, and those of the large ones.
    pub(super) rounds: (usize, usize),
    /// The size of each stream, in whole lines of 80 bytes.
    pub(super) bytes: u64,
    /// The size of the large log, of the download and of the copies.
    pub(super) large: u64,
}

/// How the bytes are transferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The log as `kubectl logs` reads it: through API server, kubelet, agent and shim.
    LogsByKubernetes,
    /// A command's output as `kubectl exec` reads it, through the same parts.
    ExecByKubernetes,
    /// A connection as `kubectl port-forward` makes it, through the same parts.
    ForwardByKubernetes,
    /// A connection to a Service that leads to the pod: through kubelet, agent and shim.
    Relayed,
    /// `kubectl cp` from the pod, through the same parts.
    CopyDown,
    /// `kubectl cp` to the pod, through the same parts.
    CopyUp,
    /// The same copy without the cost of kubectl itself.
    CopyUpByLibrary,
    /// `ReadLogs` of the agent, relayed from the shim.
    LogsByAgent,
    /// `Exec` of the agent, relayed from the shim.
    ExecByAgent,
}

/// The target for streams through the API server and between pods, as a share of the floor.
pub(super) const SHARE: Option<f64> = Some(0.7);

/// The parts of KNoC and Kubernetes that a byte passes, beginning at the pod. Each sends it over a TLS connection.
pub(super) const ALL: &[Location] = &[
    Location::Compute,
    Location::Login,
    Location::Host,
    Location::Host,
];
const TO_AGENT: &[Location] = &[Location::Compute, Location::Login];
/// Shim, agent and kubelet, whose client has no TLS. The client of the relays has.
const TO_KUBELET: &[Location] = &[Location::Compute, Location::Login, Location::Host];

/// One stream to be measured.
struct Kind {
    name: &'static str,
    way: Way,
    locations: &'static [Location],
    share: Option<f64>,
    large: bool,
}

const fn kind(name: &'static str, way: Way, large: bool) -> Kind {
    let (locations, share) = match way {
        Way::LogsByAgent | Way::ExecByAgent => (TO_AGENT, None),
        Way::Relayed => (TO_KUBELET, SHARE),
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
        locations,
        share,
        large,
    }
}

const STREAMS: [Kind; 10] = [
    kind("log through the API server", Way::LogsByKubernetes, false),
    kind("exec through the API server", Way::ExecByKubernetes, false),
    kind(
        "port-forward through the API server",
        Way::ForwardByKubernetes,
        false,
    ),
    kind("download through a Service", Way::Relayed, true),
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

/// Does a stream's name contain `part`, in which `-` may stand for a space?
pub(super) fn is_named(name: &str, part: &str) -> bool {
    name.replace('-', " ").contains(&part.replace('-', " "))
}

/// Measures each stream of one pod whose name contains `name`, alternating with its floor.
pub(super) async fn measure(bed: &Bed, sizes: Sizes, name: &str) -> anyhow::Result<Vec<Stream>> {
    let kinds = STREAMS.iter().filter(|kind| is_named(kind.name, name));
    let kinds: Vec<_> = kinds.collect();
    if kinds.is_empty() {
        return Ok(Vec::new());
    }
    let uid = talker(bed, sizes).await?;
    let is_relayed = kinds.iter().any(|kind| kind.way == Way::Relayed);
    if is_relayed {
        relayed::publish(bed, LARGE_PORT).await?;
    }
    let mut streams = Vec::new();
    for kind in kinds {
        let (bytes, rounds) = if kind.large {
            (sizes.large, sizes.rounds.1)
        } else {
            (sizes.bytes, sizes.rounds.0)
        };
        let mut stream = Stream {
            name: kind.name,
            hops: kind.locations.len(),
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
    if is_relayed {
        relayed::withdraw(bed).await?;
    }
    bed.world.delete("stream", Some(0)).await?;
    bed.world.wait_gone("stream", WRITTEN).await?;
    Ok(streams)
}

/// Measures the output of a command through the API server, alternating with relays at these locations.
pub(super) async fn exec_beside(
    bed: &Bed,
    sizes: Sizes,
    locations: &'static [Location],
) -> anyhow::Result<Stream> {
    let kind = Kind {
        locations,
        ..kind("exec through the API server", Way::ExecByKubernetes, false)
    };
    let uid = talker(bed, sizes).await?;
    let mut stream = Stream {
        name: kind.name,
        hops: locations.len(),
        bytes: sizes.bytes,
        share: kind.share,
        ..Stream::default()
    };
    stream.alternate(bed, &uid, &kind, sizes.rounds.0).await?;
    bed.world.delete("stream", Some(0)).await?;
    bed.world.wait_gone("stream", WRITTEN).await?;
    Ok(stream)
}

/// Creates a pod that writes the large log and files of both sizes, and serves the small file on its port. The same files
/// are put on the nodes for the floor's programs. Returns the pod's UID.
async fn talker(bed: &Bed, sizes: Sizes) -> anyhow::Result<String> {
    let Sizes { bytes, large, .. } = sizes;
    let files = format!("head -c {bytes} /dev/zero >small; head -c {large} /dev/zero >large");
    bed.shell(
        "login",
        &format!("mkdir -p {FOLDER}/up && cd {FOLDER} && {files}"),
    )
    .ok()
    .await?;
    // The floor of a forwarded port reads the pod's own listener from the node, so the pod is in the node's network.
    // Only whole lines of 80 bytes, because the agent holds an unfinished line back until it ends.
    let line = "x".repeat(79);
    let script = format!(
        "cd /data; mkdir lib; {files}; nc -ll -p {PORT} -e cat /data/small & nc -ll -p {LARGE_PORT} -e cat /data/large & \
         yes {line} | head -c {large}; wait"
    );
    let (label, value) = relayed::LABEL;
    let pod = PodBuilder::new("stream")
        .label(label, value)
        .image(&Bed::image_path())
        // With less memory the node's disk would be measured: the pod's files in the page cache count as its memory.
        .memory("4Gi")
        .empty_dir("/data")
        .spec("hostNetwork", true.into())
        .sh(&script);
    let placed = async || {
        let uid = bed.world.create(&pod).await?;
        bed.world.wait_phase("stream", "Running", WRITTEN).await?;
        anyhow::Ok(uid)
    };
    // The farthest relay is on the first node, whatever still runs there.
    let uid = bed.world.away_from(OTHERS, placed).await?;
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
        // The source of the copy to the pod, and of the floor of the copy from it.
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

/// The result of a transfer.
enum Moved {
    /// The client counted this many bytes.
    Counted(u64),
    /// The bytes are in this file in the pod.
    Lies(&'static str),
}

/// Transfers the bytes once.
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
        Way::Relayed => relayed::read(bed).await?,
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

/// The same bytes through plain relays, from the same sources as through KNoC: a log comes from a file; the bytes of an exec
/// or a copy are produced and consumed by the same programs as in the pod and at the client; a forwarded port leads to
/// the pod's own listener.
struct Floor {
    chain: Chain,
    /// The local program at the near end; if it is missing, the bytes are counted.
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
            Way::Relayed => (format!("listener=127.0.0.1:{LARGE_PORT}"), None),
            Way::CopyDown => (
                format!("program=tar -cf - -C {FOLDER} large"),
                Some(format!("tar -xf - -C {local}")),
            ),
            Way::CopyUp | Way::CopyUpByLibrary => (
                format!("program=tar -xf - -C {FOLDER}/up"),
                Some(format!("tar -cf - -C {local} large")),
            ),
        };
        let program = near.map(|command| command.split(' ').map(str::to_owned).collect());
        let chain = Chain::start(bed, kind.locations, far).await?;
        Ok(Self { chain, program })
    }

    /// Returns the number of bytes transferred. A tar archive is slightly larger than its contents.
    async fn run(&self) -> anyhow::Result<u64> {
        match &self.program {
            None => self.chain.read().await,
            Some(command) => {
                let (came, went) = self.chain.run(command).await?;
                Ok(came.max(went))
            }
        }
    }
}

/// Reads `bytes` bytes of the log from the agent.
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

/// The rate in megabytes per second.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
pub(super) fn rate(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / 1e6 / took.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_chosen_by_a_part_of_its_name_that_is_one_word_of_a_shell() {
        assert!(is_named(
            "port-forward through the API server",
            "port-forward"
        ));
        assert!(is_named("pod to pod", "pod-to-pod"));
        assert!(is_named("pod to pod", ""));
        assert!(!is_named("kubectl cp from the pod", "pod-to-pod"));
    }
}
