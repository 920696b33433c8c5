//! PURE: the bounds of a pod of several ranks, and what such a pod cannot have. The kubelet rejects it by these rules
//! before it asks an agent, and the agent checks what it receives by the same rules.

use crate::pb::{self, NetworkMode, volume::Source};

/// The most ranks of a pod. The shim holds one connection for each.
pub const MAX_RANKS: i32 = 1024;

/// The parts of a pod that decide whether it can have several ranks.
#[derive(Debug, Clone, Copy)]
pub struct Ranks<'a> {
    /// What the pod requests of Slurm.
    pub job: Option<&'a pb::JobRequest>,
    /// The containers, without init containers.
    pub containers: &'a [pb::Container],
    /// The volumes of the pod.
    pub volumes: &'a [pb::Volume],
    /// `shareProcessNamespace`.
    pub shares_processes: bool,
    /// The network that the pod asks for.
    pub network: NetworkMode,
}

impl<'a> Ranks<'a> {
    /// The parts of this pod.
    #[must_use]
    pub fn of(spec: &'a pb::PodSpec) -> Self {
        Self {
            job: spec.job.as_ref(),
            containers: &spec.containers,
            volumes: &spec.volumes,
            shares_processes: spec.share_process_namespace,
            network: spec.network(),
        }
    }

    /// Everything that is wrong with the ranks of the pod.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let Some(job) = self.job else {
            return Vec::new();
        };
        if job.mpi.is_none() {
            let several = job.nodes > 1;
            let text = format!(
                "knoc.io/nodes is {}, but the pod does not say how ranks are started (knoc.io/mpi)",
                job.nodes
            );
            return several.then_some(text).into_iter().collect();
        }
        let mut problems = numbers(job);
        if self.shares_processes {
            problems.push(
                "spec.shareProcessNamespace: the ranks of a pod (knoc.io/mpi) share processes only with those on the same node; \
                 leave it out"
                    .to_owned(),
            );
        }
        if self.network == NetworkMode::Private {
            problems.push(
                "knoc.io/network: the ranks of a pod (knoc.io/mpi) are in the network of their nodes; leave `private` out"
                    .to_owned(),
            );
        }
        match self.containers {
            [container] => self.check_container(container, &mut problems),
            several => problems.push(format!(
                "spec.containers: a pod of ranks (knoc.io/mpi) has one container, and this one has {}; sidecars \
                 (initContainers with restartPolicy: Always) may run beside it",
                several.len()
            )),
        }
        problems
    }

    fn check_container(&self, container: &pb::Container, problems: &mut Vec<String>) {
        let name = &container.name;
        let lacks = [
            ("stdin", container.stdin, "ranks have no standard input"),
            ("tty", container.tty, "ranks have no terminal"),
            (
                "probes",
                container.startup_probe.is_some()
                    || container.liveness_probe.is_some()
                    || container.readiness_probe.is_some(),
                "ranks are not probed yet",
            ),
            (
                "env",
                container.env_files,
                "variables from files (fileKeyRef) are read from an emptyDir, which is a folder of one node",
            ),
            (
                "lifecycle",
                container.post_start.is_some() || container.pre_stop.is_some(),
                "ranks have no hooks yet",
            ),
        ];
        let lacking = lacks.into_iter().filter(|(_, asked, _)| *asked);
        problems.extend(lacking.map(|(field, _, why)| {
            format!(
                "container {name:?}: {field}: {why}; leave it out of a pod of ranks (knoc.io/mpi)"
            )
        }));
        let is_empty_dir = |mount: &&pb::Mount| {
            let mut volumes = self.volumes.iter();
            volumes.any(|volume| {
                volume.name == mount.volume && matches!(volume.source, Some(Source::EmptyDir(_)))
            })
        };
        problems.extend(container.mounts.iter().filter(is_empty_dir).map(|mount| {
            format!(
                "container {name:?}: volumeMounts: {:?} is an emptyDir, which is a folder of one node, and ranks (knoc.io/mpi) \
                 run on several; use a volume of a file system that the nodes share. The ranks on one node share /dev/shm",
                mount.volume
            )
        }));
    }
}

fn numbers(job: &pb::JobRequest) -> Vec<String> {
    let mut problems = Vec::new();
    let per_node = job.mpi.as_ref().map_or(0, |mpi| mpi.ranks_per_node);
    if !(1..=MAX_RANKS).contains(&job.ntasks) {
        problems.push(format!(
            "knoc.io/ntasks: a pod has from 1 to {MAX_RANKS} ranks, and this one asks for {}",
            job.ntasks
        ));
    }
    if !(1..=job.ntasks.max(1)).contains(&job.nodes) {
        problems.push(format!(
            "knoc.io/nodes: {} nodes for {} ranks (knoc.io/ntasks); each node has a rank at least",
            job.nodes, job.ntasks
        ));
    }
    if !(0..=MAX_RANKS).contains(&per_node) {
        problems.push(format!(
            "slurm-job.knoc.io/mpi-flags: {per_node} ranks on each node; from 1 to {MAX_RANKS} are possible"
        ));
    } else if per_node > 0 && i64::from(per_node) * i64::from(job.nodes) < i64::from(job.ntasks) {
        problems.push(format!(
            "knoc.io/ntasks: {} ranks do not fit on {} nodes (knoc.io/nodes) with {per_node} on each (mpi-flags)",
            job.ntasks, job.nodes
        ));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(nodes: i32, ntasks: i32, ranks_per_node: i32) -> pb::PodSpec {
        pb::PodSpec {
            containers: vec![pb::Container {
                name: "main".to_owned(),
                ..pb::Container::default()
            }],
            job: Some(pb::JobRequest {
                nodes,
                ntasks,
                mpi: Some(pb::Mpi {
                    ranks_per_node,
                    ..pb::Mpi::default()
                }),
                ..pb::JobRequest::default()
            }),
            ..pb::PodSpec::default()
        }
    }

    #[test]
    fn numbers_of_ranks_have_bounds() {
        for (nodes, ntasks, per_node, good) in [
            (1, 1, 0, true),
            (2, 4, 2, true),
            (2, 3, 2, true),
            (1, MAX_RANKS, 0, true),
            (1, MAX_RANKS + 1, 0, false),
            (1, 0, 0, false),
            (0, 1, 0, false),
            (3, 2, 0, false),
            (2, 5, 2, false),
            (1, 1, -1, false),
            (i32::MAX, i32::MAX, i32::MAX, false),
        ] {
            let spec = spec(nodes, ntasks, per_node);
            let problems = Ranks::of(&spec).problems();
            assert_eq!(problems.is_empty(), good, "{nodes} {ntasks}: {problems:?}");
        }
    }

    #[test]
    fn what_ranks_cannot_have_is_named_all_at_once() {
        let mut spec = spec(2, 2, 0);
        spec.share_process_namespace = true;
        spec.set_network(NetworkMode::Private);
        let container = &mut spec.containers[0];
        container.stdin = true;
        container.tty = true;
        container.liveness_probe = Some(pb::Probe::default());
        container.pre_stop = Some(pb::Hook::default());
        container.mounts = vec![pb::Mount {
            volume: "work".to_owned(),
            ..pb::Mount::default()
        }];
        spec.volumes = vec![pb::Volume {
            name: "work".to_owned(),
            source: Some(Source::EmptyDir(pb::EmptyDir::default())),
        }];
        let problems = Ranks::of(&spec).problems().join("\n");
        for named in [
            "shareProcessNamespace",
            "knoc.io/network",
            "stdin",
            "tty",
            "probes",
            "lifecycle",
            "\"work\" is an emptyDir",
        ] {
            assert!(problems.contains(named), "{named}: {problems}");
        }
        spec.containers.push(pb::Container::default());
        let problems = Ranks::of(&spec).problems().join("\n");
        assert!(problems.contains("has one container"), "{problems}");
    }

    #[test]
    fn several_nodes_need_ranks_and_other_pods_are_not_judged() {
        let mut spec = spec(2, 2, 0);
        if let Some(job) = &mut spec.job {
            job.mpi = None;
        }
        assert_eq!(Ranks::of(&spec).problems().len(), 1);
        if let Some(job) = &mut spec.job {
            job.nodes = 0;
        }
        spec.containers[0].tty = true;
        assert!(Ranks::of(&spec).problems().is_empty());
        spec.job = None;
        assert!(Ranks::of(&spec).problems().is_empty());
    }
}
