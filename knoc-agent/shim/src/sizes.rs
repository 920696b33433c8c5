//! Task: measures what the pod may take only so much of, and ends the pod if it takes more, as a kubelet evicts it: the
//! `emptyDir` volumes that have a size limit, and what containers with a limit of `ephemeral-storage` write to the node's disk.
//!
//! What has more files than can be counted in [`DEADLINE`] is counted less often, and its limit is enforced only if those that
//! were counted exceed it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use knoc_contract::tree_size;
use knoc_proto::pb::{self, EndedBy};
use tokio::sync::mpsc;

use super::{pod::Pod, role::SlotId, supervisor::Command, volumes};

/// Between two measurements; a kubelet's is the same.
const PERIOD: Duration = Duration::from_secs(10);
/// How long one measurement may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// The pause after a measurement is at least this many times as long as the measurement took.
const REST: u32 = 20;
/// The grace period of an eviction, as in a kubelet.
const GRACE: Duration = Duration::from_secs(1);

/// What may take so many bytes at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bound {
    who: Who,
    /// The folder of the volume, or that of the pod on disk.
    path: PathBuf,
    bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Who {
    Volume(String),
    /// All containers, with the volumes on disk.
    Pod {
        /// The folders of the volumes in memory. On a node without a file system in memory they lie beside the others.
        in_memory: Vec<String>,
    },
    Container {
        name: String,
        id: SlotId,
    },
}

/// What is measured, in a kubelet's order.
pub(super) fn bounds(pod: &Pod) -> Vec<Bound> {
    let volumes = pod.volumes.limits().into_iter().map(|limit| Bound {
        who: Who::Volume(limit.volume),
        path: limit.path,
        bytes: limit.bytes,
    });
    let on_disk = of_containers(pod.spec(), pod.scratch.disk_folder());
    volumes.chain(on_disk).collect()
}

/// PURE: the bounds by the containers' limits of `ephemeral-storage`. The limit of one container that is not below that of the pod
/// cannot be exceeded alone.
fn of_containers(spec: &pb::PodSpec, disk: &Path) -> Vec<Bound> {
    let bound = |who, bytes| Bound {
        who,
        path: disk.to_owned(),
        bytes,
    };
    let whole = together(spec);
    if whole == 0 {
        return Vec::new();
    }
    let all = spec.volumes.iter().enumerate();
    let in_memory = all
        .filter(|(_, volume)| volumes::is_in_memory(volume))
        .map(|(index, _)| volumes::folder_name(index))
        .collect();
    let mut bounds = vec![bound(Who::Pod { in_memory }, whole)];
    for (index, container) in spec.containers.iter().enumerate() {
        let own = limit(container);
        if own > 0 && own < whole {
            let id = SlotId::after(spec.init_containers.len() + index);
            let name = container.name.clone();
            bounds.push(bound(Who::Container { name, id }, own));
        }
    }
    bounds
}

/// What the container may write; 0: as much as it wants.
fn limit(container: &pb::Container) -> u64 {
    on_disk(container.limits.as_ref())
}

fn on_disk(resources: Option<&pb::Resources>) -> u64 {
    let bytes = resources.map_or(0, |list| list.ephemeral_storage_bytes);
    u64::try_from(bytes).unwrap_or_default()
}

/// What all containers together may write, by the rule of `PodLimits` of Kubernetes; 0: as much as they want.
fn together(spec: &pb::PodSpec) -> u64 {
    let (mut sidecars, mut most) = (0_u64, 0_u64);
    for container in &spec.init_containers {
        let needs = sidecars.saturating_add(limit(container));
        most = most.max(needs);
        if container.is_sidecar() {
            sidecars = needs;
        }
    }
    let all = spec.containers.iter().map(limit);
    match most.max(all.fold(sidecars, u64::saturating_add)) {
        0 => 0,
        bytes => bytes.saturating_add(on_disk(spec.overhead.as_ref())),
    }
}

/// Measures until a limit is exceeded; ends with the supervisor.
pub(super) async fn watch(bounds: Vec<Bound>, commands: mpsc::Sender<Command>) {
    if bounds.is_empty() {
        return;
    }
    let mut warned = false;
    let mut pause = PERIOD;
    loop {
        tokio::select! {
            biased;
            () = commands.closed() => return,
            () = tokio::time::sleep(pause) => {}
        }
        let began = Instant::now();
        for bound in &bounds {
            match measure(bound.clone()).await {
                Ok(bytes) if bytes > bound.bytes => return evict(bound, &commands).await,
                Err(error) if !warned => {
                    warned = true;
                    tracing::warn!(what = ?bound.who, "its size could not be measured: {error}");
                }
                Ok(_) | Err(_) => {}
            }
        }
        pause = PERIOD.max(began.elapsed().saturating_mul(REST));
    }
}

async fn measure(bound: Bound) -> Result<u64, String> {
    let measured = tokio::task::spawn_blocking(move || bound.size(Instant::now() + DEADLINE));
    let measured = measured.await.map_err(|error| error.to_string())?;
    measured.map_err(|error| error.to_string())
}

impl Bound {
    /// What it takes now. Blocks on file work.
    fn size(&self, until: Instant) -> io::Result<u64> {
        let (container, left_out) = match &self.who {
            Who::Volume(_) => return tree_size::size_until(&self.path, self.bytes, until),
            Who::Pod { in_memory } => (None, in_memory.as_slice()),
            Who::Container { id, .. } => (Some(*id), &[][..]),
        };
        let mut bytes = 0_u64;
        for entry in fs::read_dir(&self.path)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if left_out.contains(&name) {
                continue;
            }
            for folder in counted(&name, container) {
                let left = self.bytes.saturating_sub(bytes);
                match tree_size::size_until(&entry.path().join(folder), left, until) {
                    Ok(size) => bytes = bytes.saturating_add(size),
                    Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(error),
                    // An attempt may end meanwhile, and its folders with it.
                    Err(_) => {}
                }
            }
        }
        Ok(bytes)
    }
}

/// PURE: which folders below an entry of the pod's folder on disk count, for this container or for the pod as a whole: what
/// attempts write, whose folders have a letter, the container's id and the attempt in their names, and the pod's volumes.
fn counted(entry: &str, container: Option<SlotId>) -> &'static [&'static str] {
    let (kind, rest) = entry.split_at_checked(1).unwrap_or_default();
    let of = rest.split_once('-').map(|(id, _)| id);
    let own = container.is_none_or(|id| of == Some(&*id.to_string()));
    match kind {
        "v" if container.is_none() => &["."],
        "c" | "p" | "r" if own => &["."],
        // Beside them lies what the image has: the runtime may unpack it, and its volumes are copies, which no kubelet counts.
        "w" if own => &["tmp", "var_tmp"],
        _ => &[],
    }
}

async fn evict(bound: &Bound, commands: &mpsc::Sender<Command>) {
    let stop = Command::Stop {
        grace: GRACE,
        left: None,
        by: EndedBy::Evicted,
        reason: message(bound),
    };
    // If the supervisor has ended there is nothing to evict.
    commands.send(stop).await.ok();
}

/// A kubelet's message.
fn message(bound: &Bound) -> String {
    let bytes = quantity(bound.bytes);
    match &bound.who {
        Who::Volume(volume) => {
            format!("Usage of EmptyDir volume \"{volume}\" exceeds the limit \"{bytes}\". ")
        }
        Who::Pod { .. } => format!(
            "Pod ephemeral local storage usage exceeds the total limit of containers {bytes}. "
        ),
        Who::Container { name, .. } => {
            format!("Container {name} exceeded its local ephemeral storage limit \"{bytes}\". ")
        }
    }
}

/// PURE: bytes in Kubernetes' binary units, if they are whole.
fn quantity(bytes: u64) -> String {
    let units = [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")];
    let unit = units
        .into_iter()
        .find(|(shift, _)| bytes > 0 && bytes.trailing_zeros() >= *shift);
    unit.map_or_else(
        || bytes.to_string(),
        |(shift, unit)| format!("{}{unit}", bytes >> shift),
    )
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of the test's own")]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_shown_as_it_is_usually_written() {
        for (bytes, text) in [
            (0, "0"),
            (1000, "1000"),
            (1 << 10, "1Ki"),
            (5 << 20, "5Mi"),
            ((1 << 30) + 1, "1073741825"),
            (3 << 40, "3Ti"),
        ] {
            assert_eq!(quantity(bytes), text);
        }
    }

    /// The bound that the watch finds exceeded, in the words of its message.
    async fn exceeded(bounds: Vec<Bound>) -> String {
        let (commands, mut orders) = mpsc::channel(1);
        watch(bounds, commands).await;
        let Some(Command::Stop { by, reason, .. }) = orders.recv().await else {
            unreachable!("it ends the pod");
        };
        assert_eq!(by, EndedBy::Evicted);
        reason
    }

    #[tokio::test(start_paused = true)]
    async fn the_volume_that_exceeds_its_limit_is_named() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        fs::write(folders[1].path().join("file"), vec![1; 2 << 20]).unwrap();
        let bound = |volume: &str, at: usize, bytes| Bound {
            who: Who::Volume(volume.to_owned()),
            path: folders[at].path().to_owned(),
            bytes,
        };
        let bounds = vec![
            bound("empty", 0, 1 << 20),
            bound("roomy", 1, 4 << 20),
            bound("full", 1, 1 << 20),
        ];
        let wanted = "Usage of EmptyDir volume \"full\" exceeds the limit \"1Mi\". ";
        assert_eq!(exceeded(bounds).await, wanted);
    }

    fn container(name: &str, mebibytes: i64, policy: pb::RestartPolicy) -> pb::Container {
        pb::Container {
            name: name.to_owned(),
            restart_policy: policy.into(),
            limits: Some(pb::Resources {
                ephemeral_storage_bytes: mebibytes << 20,
                ..pb::Resources::default()
            }),
            ..pb::Container::default()
        }
    }

    fn regular(name: &str, mebibytes: i64) -> pb::Container {
        container(name, mebibytes, pb::RestartPolicy::Unspecified)
    }

    #[test]
    fn limits_of_ephemeral_storage_hold_for_each_container_and_for_all_together() {
        let of = |init: Vec<pb::Container>, containers: Vec<pb::Container>| {
            let spec = pb::PodSpec {
                init_containers: init,
                containers,
                ..pb::PodSpec::default()
            };
            let bounds = of_containers(&spec, Path::new("/disk"));
            let text = |bound: &Bound| message(bound).trim_end().to_owned();
            bounds.iter().map(text).collect::<Vec<_>>()
        };
        let pod = |limit: &str| {
            format!(
                "Pod ephemeral local storage usage exceeds the total limit of containers {limit}."
            )
        };
        let one = |name: &str, limit: &str| {
            format!("Container {name} exceeded its local ephemeral storage limit \"{limit}\".")
        };
        assert_eq!(of(vec![], vec![regular("a", 0)]), Vec::<String>::new());
        assert_eq!(of(vec![], vec![regular("a", 5)]), [pod("5Mi")]);
        assert_eq!(
            of(
                vec![],
                vec![regular("a", 5), regular("b", 3), regular("c", 0)]
            ),
            [pod("8Mi"), one("a", "5Mi"), one("b", "3Mi")]
        );
        let sidecar = container("s", 2, pb::RestartPolicy::Always);
        assert_eq!(
            of(
                vec![sidecar.clone(), regular("i", 1)],
                vec![regular("a", 5)]
            ),
            [pod("7Mi"), one("a", "5Mi")]
        );
        assert_eq!(
            of(vec![sidecar, regular("i", 9)], vec![regular("a", 5)]),
            [pod("11Mi"), one("a", "5Mi")]
        );
    }

    /// The scheduler has reserved it for the pod, beside what its containers ask for.
    #[test]
    fn the_overhead_of_a_pod_is_added_to_its_limit() {
        let of = |mebibytes: i64| {
            let spec = pb::PodSpec {
                containers: vec![regular("a", mebibytes)],
                overhead: container("", 2, pb::RestartPolicy::Unspecified).limits,
                ..pb::PodSpec::default()
            };
            let bounds = of_containers(&spec, Path::new("/disk"));
            bounds.iter().map(|bound| bound.bytes).collect::<Vec<_>>()
        };
        assert_eq!(of(5), [7 << 20, 5 << 20]);
        assert_eq!(of(0), [0_u64; 0], "there is no limit");
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_container_writes_counts_wherever_it_lies_on_the_disk() {
        let disk = tempfile::tempdir().unwrap();
        let write = |folder: &str, mebibytes: usize| {
            let folder = disk.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("file"), vec![1; mebibytes << 20]).unwrap();
        };
        let spec = |whole: [i64; 2]| pb::PodSpec {
            containers: vec![regular("a", whole[0]), regular("b", whole[1])],
            ..pb::PodSpec::default()
        };
        let bounds = |whole| of_containers(&spec(whole), disk.path());
        // Of another container, of an image that was unpacked, and removed already.
        let not_written = [("w1-0/image", 40), ("w0-2/volume-0", 40), ("trash/x", 40)];
        for (folder, mebibytes) in [("r1-0/upper", 1)].into_iter().chain(not_written) {
            write(folder, mebibytes);
        }
        write("r0-2/upper", 2);
        write("w0-2/var_tmp", 2);
        let until = Instant::now() + Duration::from_mins(1);
        let sizes = bounds([30, 10]).into_iter();
        let sizes: Vec<u64> = sizes
            .map(|bound| bound.size(until).unwrap() >> 20)
            .collect();
        assert_eq!(sizes, [5, 4, 1]);
        let told = exceeded(bounds([3, 10])).await;
        assert!(told.starts_with("Container a exceeded"), "{told}");
        // A volume counts for the pod alone.
        write("v0", 9);
        let told = exceeded(bounds([5, 5])).await;
        assert!(told.ends_with("limit of containers 10Mi. "), "{told}");
        // But not one in memory, which lies on the disk of a node that has no file system in memory.
        let mut in_memory = spec([5, 5]);
        let empty = pb::EmptyDir {
            memory: true,
            ..pb::EmptyDir::default()
        };
        in_memory.volumes.push(pb::Volume {
            source: Some(pb::volume::Source::EmptyDir(empty)),
            ..pb::Volume::default()
        });
        let bounds = of_containers(&in_memory, disk.path());
        assert_eq!(bounds[0].size(until).unwrap() >> 20, 5);
    }
}
