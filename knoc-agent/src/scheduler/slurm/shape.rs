//! PURE: computes what a pod requests from Slurm, in Slurm's units, from the pod's spec and the
//! site's settings.

use std::collections::BTreeMap;

use knoc_contract::requeue::may_run_again;
use knoc_proto::pb;

use super::{Settings, flags};
use crate::scheduler::SubmitError;

const MIB: i64 = 1 << 20;
/// Below this time limit `--signal` is not used, because it may come [`SIGNAL_EARLY_SECONDS`] too
/// early; Slurm's own TERM at the limit must be enough.
const SIGNAL_FLOOR_SECONDS: i64 = 300;
/// Slurm checks once a minute which jobs to warn.
const SIGNAL_EARLY_SECONDS: i64 = 60;
/// Time for the final report, in addition to the pod's grace period.
const SIGNAL_SLACK_SECONDS: i64 = 15;

/// The limits of a partition that matter here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct PartitionLimits {
    pub(super) name: String,
    pub(super) is_default: bool,
    pub(super) default_minutes: Option<i64>,
    pub(super) max_minutes: Option<i64>,
    /// The largest `TmpDisk` of its nodes.
    pub(super) tmp_mib: i64,
}

/// The resources of one job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) nodes: i64,
    pub(super) ntasks: i64,
    pub(super) cpus_per_task: i64,
    /// Memory per node; `None` means the partition's default.
    pub(super) memory_mib: Option<i64>,
    pub(super) tmp_mib: Option<i64>,
    /// `None` means unlimited.
    pub(super) time_minutes: Option<i64>,
    /// How many seconds before the time limit the shim gets USR2; if `None`, the only signal is
    /// Slurm's own TERM at the limit.
    pub(super) signal_seconds: Option<i64>,
    pub(super) gres: Vec<String>,
    pub(super) requeue: bool,
    /// What the pod asks for and the job does not request, one sentence each.
    pub(super) notes: Vec<String>,
}

impl Shape {
    /// The resources of the job of `spec` at this site.
    pub(super) fn of(
        spec: &pb::PodSpec,
        site: &Settings,
        partitions: &[PartitionLimits],
    ) -> Result<Self, SubmitError> {
        let job = spec.job.clone().unwrap_or_default();
        let nodes = i64::from(job.nodes.max(1));
        let ntasks = i64::from(job.ntasks).max(nodes);
        let cpu_millis = positive(job.cpu_millis).unwrap_or_else(|| total(spec, cpu));
        let memory = positive(job.memory_bytes).unwrap_or_else(|| total(spec, memory));
        let tmp = positive(job.ephemeral_storage_bytes).unwrap_or_else(|| total(spec, ephemeral));
        let time_minutes = time_limit(spec, &job, site, partitions);
        let (tmp_mib, note) = match positive(tmp) {
            Some(bytes) => local_disk(ceil(bytes, MIB), &job, site, partitions)?,
            None => (None, None),
        };
        Ok(Self {
            nodes,
            ntasks,
            cpus_per_task: ceil(ceil(cpu_millis, 1000).max(1), ntasks),
            memory_mib: positive(memory)
                .map(|bytes| ceil(ceil(bytes, MIB), nodes) + site.shim_memory_mib),
            tmp_mib,
            time_minutes,
            signal_seconds: signal(spec.termination_grace_period_seconds, time_minutes),
            gres: gres(spec, &job, site, nodes)?,
            requeue: may_run_again(spec),
            notes: note.into_iter().collect(),
        })
    }
}

/// `a / b`, rounded up; both are positive.
fn ceil(a: i64, b: i64) -> i64 {
    a / b + i64::from(a % b != 0)
}

fn positive(n: i64) -> Option<i64> {
    (n > 0).then_some(n)
}

fn request(container: &pb::Container) -> pb::Resources {
    container.requests.clone().unwrap_or_default()
}

fn limit(container: &pb::Container) -> pb::Resources {
    container.limits.clone().unwrap_or_default()
}

fn cpu(container: &pb::Container) -> i64 {
    positive(request(container).cpu_millis).unwrap_or_else(|| limit(container).cpu_millis)
}

fn memory(container: &pb::Container) -> i64 {
    positive(limit(container).memory_bytes).unwrap_or_else(|| request(container).memory_bytes)
}

fn ephemeral(container: &pb::Container) -> i64 {
    let asked = request(container).ephemeral_storage_bytes;
    positive(asked).unwrap_or_else(|| limit(container).ephemeral_storage_bytes)
}

/// The most that runs at the same time: all containers together with the sidecars, or an init container together with the
/// sidecars before it.
fn total(spec: &pb::PodSpec, of: impl Fn(&pb::Container) -> i64) -> i64 {
    let (mut sidecars, mut most) = (0_i64, 0_i64);
    for container in &spec.init_containers {
        let needs = sidecars.saturating_add(of(container));
        most = most.max(needs);
        if container.is_sidecar() {
            sidecars = needs;
        }
    }
    let together = spec.containers.iter().map(&of);
    together.fold(sidecars, i64::saturating_add).max(most)
}

fn extended(spec: &pb::PodSpec) -> BTreeMap<String, i64> {
    let mut names: Vec<String> = Vec::new();
    for container in spec.init_containers.iter().chain(&spec.containers) {
        names.extend(request(container).extended.into_keys());
        names.extend(limit(container).extended.into_keys());
    }
    let amount = |container: &pb::Container, name: &str| {
        let (limit, request) = (limit(container).extended, request(container).extended);
        limit
            .get(name)
            .or_else(|| request.get(name))
            .copied()
            .unwrap_or(0)
    };
    let totals = names.into_iter().map(|name| {
        let total = total(spec, |container| amount(container, &name));
        (name, total)
    });
    totals.filter(|(_, total)| *total > 0).collect()
}

/// The value of `--gres`: as the pod gives it, or else from its extended resources.
fn gres(
    spec: &pb::PodSpec,
    job: &pb::JobRequest,
    site: &Settings,
    nodes: i64,
) -> Result<Vec<String>, SubmitError> {
    let mut all = Vec::new();
    for (resource, amount) in extended(spec) {
        let Some(name) = site.gres.get(&resource) else {
            let known: Vec<&str> = site.gres.keys().map(String::as_str).collect();
            let known = known.join(", ");
            return Err(SubmitError::permanent(format!(
                "this site maps no Slurm resource to {resource} (`gres` of its site file maps: {known})"
            )));
        };
        all.push(format!("{name}:{}", ceil(amount, nodes)));
    }
    if flags::prints_help("gres", &job.gres) {
        return Err(SubmitError::permanent(format!(
            "knoc.io/gres {:?} makes sbatch print a help text and submit no job: name a resource, as in `gpu:1`",
            job.gres
        )));
    }
    // If the pod names a gres, that decides the kind and the number of devices; the container's
    // limits decide who uses them.
    if !job.gres.is_empty() {
        return Ok(vec![job.gres.clone()]);
    }
    Ok(all)
}

/// The value of `--tmp`, and what the user should know about it. Slurm knows only the local disk
/// that its administrators configured: most leave TmpDisk at 0, and then sbatch refuses every
/// `--tmp`, whatever disk there is.
fn local_disk(
    asked: i64,
    job: &pb::JobRequest,
    site: &Settings,
    partitions: &[PartitionLimits],
) -> Result<(Option<i64>, Option<String>), SubmitError> {
    let named = partition(job, site);
    let eligible = |known: &&PartitionLimits| match &named {
        Some(list) => list.split(',').any(|name| name == known.name),
        None => known.is_default,
    };
    let Some(largest) = partitions
        .iter()
        .filter(eligible)
        .map(|known| known.tmp_mib)
        .max()
    else {
        // Unknown here: sbatch decides.
        return Ok((Some(asked), None));
    };
    let place = named.map_or_else(
        || "the default partition".to_owned(),
        |name| format!("partition {name}"),
    );
    if largest <= 0 {
        let note = format!(
            "{asked} MiB of ephemeral-storage are not reserved: no node of {place} has TmpDisk in slurm.conf"
        );
        return Ok((None, Some(note)));
    }
    if asked > largest {
        return Err(SubmitError::permanent(format!(
            "{asked} MiB of ephemeral-storage are more than the TmpDisk of any node of {place}, at most {largest} MiB: \
             ask for less, or for another partition"
        )));
    }
    Ok((Some(asked), None))
}

/// The smaller one of the pod's deadline plus grace period and the time that the pod requests, else
/// the site's default, else the partition's default, else the partition's maximum, of several
/// partitions the smallest. A deadline is
/// extended by how early Slurm's warning may come, so that the pod's own deadline comes first.
fn time_limit(
    spec: &pb::PodSpec,
    job: &pb::JobRequest,
    site: &Settings,
    partitions: &[PartitionLimits],
) -> Option<i64> {
    let grace = spec.termination_grace_period_seconds.max(0);
    let warned = SIGNAL_SLACK_SECONDS + SIGNAL_EARLY_SECONDS;
    let deadline = positive(spec.active_deadline_seconds)
        .map(|seconds| ceil(seconds.saturating_add(grace).saturating_add(warned), 60).max(1));
    let asked = positive(job.time_minutes);
    if let Some(minutes) = [deadline, asked].into_iter().flatten().min() {
        return Some(minutes);
    }
    let name = partition(job, site);
    let named = partitions.iter().filter(|p| match &name {
        Some(list) => list.split(',').any(|name| name == p.name),
        None => p.is_default,
    });
    // Of several partitions Slurm takes the one that is free first, so the job has to fit into each.
    let of_partition = || {
        named
            .filter_map(|p| p.default_minutes.or(p.max_minutes))
            .min()
    };
    site.default_time_minutes
        .and_then(positive)
        .or_else(of_partition)
}

/// The partition that a job names, if any.
pub(super) fn partition(job: &pb::JobRequest, site: &Settings) -> Option<String> {
    let named = Some(job.partition.clone()).filter(|name| !name.is_empty());
    named.or_else(|| site.partition.clone())
}

fn signal(grace: i64, minutes: Option<i64>) -> Option<i64> {
    let limit = minutes?.saturating_mul(60);
    let wanted = grace.max(0).saturating_add(SIGNAL_SLACK_SECONDS).min(65535);
    (limit >= SIGNAL_FLOOR_SECONDS).then(|| wanted.min(limit / 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(cpu_millis: i64, memory_bytes: i64, gpus: i64) -> pb::Container {
        let gpus = (gpus > 0).then(|| ("nvidia.com/gpu".to_owned(), gpus));
        let extended = gpus.into_iter().collect();
        let requests = pb::Resources {
            cpu_millis,
            memory_bytes,
            extended,
            ..Default::default()
        };
        pb::Container {
            requests: Some(requests),
            ..Default::default()
        }
    }

    fn pod(containers: Vec<pb::Container>, job: pb::JobRequest) -> pb::PodSpec {
        let grace = 30;
        pb::PodSpec {
            containers,
            job: Some(job),
            termination_grace_period_seconds: grace,
            ..Default::default()
        }
    }

    fn partitions() -> Vec<PartitionLimits> {
        let limits = |name: &str, default, max| PartitionLimits {
            name: name.to_owned(),
            is_default: name == "main",
            default_minutes: default,
            max_minutes: max,
            tmp_mib: if name == "main" { 0 } else { 2048 },
        };
        vec![
            limits("main", Some(60), Some(10080)),
            limits("long", None, Some(20000)),
        ]
    }

    #[test]
    fn resources_follow_the_pod() {
        let site = Settings::default();
        let mut spec = pod(
            vec![container(1500, MIB + 1, 1), container(100, MIB, 1)],
            pb::JobRequest::default(),
        );
        spec.init_containers = vec![container(3200, MIB, 0)];
        let shape = Shape::of(&spec, &site, &partitions()).unwrap();
        assert_eq!(
            shape.cpus_per_task, 4,
            "the init container's 3.2 is larger than the sum of 1.6"
        );
        assert_eq!(shape.memory_mib, Some(3 + 64));
        assert_eq!(shape.gres, ["gpu:2"]);
        assert_eq!(shape.time_minutes, Some(60));
        assert_eq!(shape.signal_seconds, Some(45));
        assert!(!shape.requeue);
    }

    #[test]
    fn nothing_asked_is_one_cpu_and_the_partitions_memory() {
        let shape = Shape::of(
            &pod(vec![], pb::JobRequest::default()),
            &Settings::default(),
            &[],
        );
        let shape = shape.unwrap();
        assert_eq!(
            (shape.cpus_per_task, shape.memory_mib, shape.tmp_mib),
            (1, None, None)
        );
        assert_eq!((shape.time_minutes, shape.signal_seconds), (None, None));
    }

    #[test]
    fn the_time_limit_is_always_the_nearest_that_is_known() {
        let job = |time_minutes, partition: &str| pb::JobRequest {
            time_minutes,
            partition: partition.to_owned(),
            ..Default::default()
        };
        let cases = [
            (0, 0, "", None, Some(60)),
            (0, 0, "long", None, Some(20000)),
            (0, 0, "long,main", None, Some(60)),
            (0, 0, "long,unknown", None, Some(20000)),
            (0, 0, "nowhere", None, None),
            (0, 0, "", Some(7), Some(7)),
            (0, 90, "", Some(7), Some(90)),
            (61, 90, "", None, Some(3)),
            (86400, 90, "", None, Some(90)),
            (1, 0, "", None, Some(2)),
        ];
        for (deadline, time, partition, default_time_minutes, expected) in cases {
            let mut spec = pod(vec![], job(time, partition));
            spec.active_deadline_seconds = deadline;
            let site = Settings {
                default_time_minutes,
                ..Settings::default()
            };
            let shape = Shape::of(&spec, &site, &partitions()).unwrap();
            assert_eq!(
                shape.time_minutes, expected,
                "{deadline} {time} {partition}"
            );
        }
    }

    #[test]
    fn a_deadline_comes_before_the_warning_of_the_limit_that_is_made_of_it() {
        for (deadline, grace) in [(300, 30), (301, 30), (600, 0), (86_400, 300), (1000, 65)] {
            let mut spec = pod(vec![], pb::JobRequest::default());
            spec.active_deadline_seconds = deadline;
            spec.termination_grace_period_seconds = grace;
            let shape = Shape::of(&spec, &Settings::default(), &partitions()).unwrap();
            let limit = shape.time_minutes.unwrap() * 60;
            let warning = limit - shape.signal_seconds.unwrap() - SIGNAL_EARLY_SECONDS;
            assert!(warning >= deadline, "{deadline} {grace}: {warning}");
        }
    }

    #[test]
    fn several_nodes_share_what_the_pod_asks_for() {
        let job = pb::JobRequest {
            nodes: 2,
            ntasks: 8,
            cpu_millis: 16000,
            memory_bytes: 3 * MIB,
            ..Default::default()
        };
        let shape = Shape::of(
            &pod(vec![container(0, 0, 4)], job),
            &Settings::default(),
            &[],
        )
        .unwrap();
        assert_eq!((shape.nodes, shape.ntasks, shape.cpus_per_task), (2, 8, 2));
        assert_eq!(shape.memory_mib, Some(2 + 64));
        assert_eq!(shape.gres, ["gpu:2"]);
    }

    #[test]
    fn local_disk_is_requested_if_a_node_has_any() {
        let shape = |mib: i64, partition: &str, partitions: &[PartitionLimits]| {
            let job = pb::JobRequest {
                ephemeral_storage_bytes: mib * MIB,
                partition: partition.to_owned(),
                ..Default::default()
            };
            Shape::of(&pod(vec![], job), &Settings::default(), partitions)
        };
        let all = partitions();
        let without = shape(1024, "", &all).unwrap();
        assert_eq!(without.tmp_mib, None);
        assert!(without.notes[0].contains("TmpDisk"), "{:?}", without.notes);
        for partition in ["long", "main,long", "unknown"] {
            let with = shape(1024, partition, &all).unwrap();
            assert_eq!((with.tmp_mib, with.notes.len()), (Some(1024), 0));
        }
        let error = shape(4096, "long", &all).unwrap_err();
        assert!(
            error.message.contains("TmpDisk") && error.message.contains("2048 MiB"),
            "{error}"
        );
        assert_eq!(shape(4096, "", &[]).unwrap().tmp_mib, Some(4096));
    }

    #[test]
    fn a_gres_that_prints_help_is_rejected_by_name() {
        for gres in ["help", "List", "gpu:1,help"] {
            let job = pb::JobRequest {
                gres: gres.to_owned(),
                ..Default::default()
            };
            let error = Shape::of(&pod(vec![], job), &Settings::default(), &[]).unwrap_err();
            assert!(error.message.contains("knoc.io/gres"), "{error}");
        }
    }

    #[test]
    fn gres_that_the_pod_names_takes_the_place_of_its_resources() {
        let job = pb::JobRequest {
            gres: "gpu:a100:1".to_owned(),
            ..Default::default()
        };
        let spec = pod(vec![container(0, 0, 1)], job);
        let shape = Shape::of(&spec, &Settings::default(), &[]).unwrap();
        assert_eq!(shape.gres, ["gpu:a100:1"]);
    }

    #[test]
    fn a_site_maps_further_resources() {
        let mut one = container(0, 0, 0);
        one.limits = Some(pb::Resources {
            extended: [("example.com/fpga".to_owned(), 3)].into(),
            ..Default::default()
        });
        let text = "site = 'x'\n[gres]\n'example.com/fpga' = 'fpga:xilinx'";
        let home = crate::config::Home { home: "/".into() };
        let config = crate::config::Config::parse(text, std::path::Path::new("x"), &home).unwrap();
        let spec = pod(vec![one], pb::JobRequest::default());
        let shape = Shape::of(&spec, &(&config).into(), &[]).unwrap();
        assert_eq!(shape.gres, ["fpga:xilinx:3"]);
    }

    #[test]
    fn a_resource_without_a_mapping_is_rejected_by_name() {
        let mut one = container(0, 0, 0);
        let fpga = BTreeMap::from([("example.com/fpga".to_owned(), 1)]);
        one.limits = Some(pb::Resources {
            extended: fpga.into_iter().collect(),
            ..Default::default()
        });
        let error = Shape::of(
            &pod(vec![one], pb::JobRequest::default()),
            &Settings::default(),
            &[],
        );
        assert!(error.unwrap_err().message.contains("example.com/fpga"));
    }
}
