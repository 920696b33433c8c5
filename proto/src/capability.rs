//! PURE: the capabilities that an agent needs to run a pod as its spec says. An older agent ignores fields that are newer
//! than itself, so the kubelet checks that the agent announces these names before it sends a pod that uses the fields.

use crate::pb;

/// The agent expands `subPathExpr`.
pub const SUB_PATH_EXPR: &str = "sub-path-expr";
/// The agent gives pods a domain: `subdomain` and `setHostnameAsFQDN`.
pub const POD_DOMAIN: &str = "pod-domain";
/// The agent's shims write `/etc/resolv.conf`: `dnsConfig` and `dnsPolicy: None`.
pub const RESOLVER: &str = "resolver";
/// The agent checks `runAsNonRoot`.
pub const RUN_AS_NON_ROOT: &str = "run-as-non-root";
/// The agent applies the site's policy to `privileged`.
pub const PRIVILEGED: &str = "privileged";

/// The agent applies the site's policy to host ports, and its shims forward them.
pub const HOST_PORTS: &str = "host-ports";
/// The agent's shims forward datagrams from host ports, too.
pub const UDP_HOST_PORTS: &str = "udp-host-ports";
/// The agent's shims give pods a network of their own.
pub const PRIVATE_NETWORK: &str = "private-network";
/// The agent pulls images with the credentials that come with a pod.
pub const PULL_CREDENTIALS: &str = "pull-credentials";
/// The agent's shims run probes.
pub const PROBES: &str = "probes";
/// The agent's shims run the hooks of containers.
pub const HOOKS: &str = "hooks";
/// The agent's shims know sidecars: init containers that run beside the others.
pub const SIDECARS: &str = "sidecars";
/// The agent's shims know restart policies of containers, and their rules.
pub const RESTART_RULES: &str = "restart-rules";
/// The agent's shims know rules that restart all containers of a pod.
pub const RESTART_ALL: &str = "restart-all-containers";

/// The agent adds ephemeral containers to running pods.
pub const EPHEMERAL: &str = "ephemeral-containers";
/// The agent adds ephemeral containers also if they come later than the generation of the pod that has them. No pod needs
/// it: without it, the kubelet sends that generation only once nothing is missing.
pub const LATE_EPHEMERAL: &str = "late-ephemeral-containers";

/// The agent's shims let containers share their processes.
pub const SHARED_PROCESSES: &str = "share-process-namespace";

/// The agent's shims send the `stopSignal` of a container.
pub const STOP_SIGNAL: &str = "container-stop-signal";

/// The agent mounts host paths, by their `type`.
pub const HOST_PATHS: &str = "host-paths";

/// The agent maps NFS exports and volumes of CSI drivers to host paths.
pub const MAPPED_VOLUMES: &str = "mapped-volumes";

/// The agent mounts images as volumes.
pub const IMAGE_VOLUMES: &str = "image-volumes";

/// The agent gives pods addresses of their own.
pub const POD_ADDRESSES: &str = "pod-addresses";

/// The agent's shims read variables from files that containers write (`fileKeyRef`).
pub const ENV_FILES: &str = "env-files";

/// The agent runs pods of several ranks, which may be on several nodes.
pub const MPI: &str = "mpi";

/// The programs of this agent's pods see themselves as the user and the group that the pod asks for, where the node can do it. No pod
/// needs it: without it they run as the HPC user, and the kubelet says so.
pub const USER_IDS: &str = "user-ids";

/// All capabilities that a pod can need.
pub const OF_PODS: [&str; 23] = [
    SUB_PATH_EXPR,
    POD_DOMAIN,
    RESOLVER,
    RUN_AS_NON_ROOT,
    PRIVILEGED,
    HOST_PORTS,
    UDP_HOST_PORTS,
    PRIVATE_NETWORK,
    PULL_CREDENTIALS,
    PROBES,
    HOOKS,
    SIDECARS,
    RESTART_RULES,
    RESTART_ALL,
    EPHEMERAL,
    SHARED_PROCESSES,
    STOP_SIGNAL,
    HOST_PATHS,
    MAPPED_VOLUMES,
    IMAGE_VOLUMES,
    POD_ADDRESSES,
    ENV_FILES,
    MPI,
];

/// The capabilities that this pod needs.
#[must_use]
pub fn needed(spec: &pb::PodSpec) -> Vec<&'static str> {
    let containers = || spec.init_containers.iter().chain(&spec.containers);
    let expanded = |container: &pb::Container| {
        let mut mounts = container.mounts.iter();
        mounts.any(|mount| !mount.sub_path_expr.is_empty())
    };
    let any = |test: fn(&pb::Container) -> bool| containers().any(test);
    let asked = [
        (SUB_PATH_EXPR, containers().any(expanded)),
        (
            POD_DOMAIN,
            !spec.subdomain.is_empty() || spec.set_hostname_as_fqdn,
        ),
        // Agents that do not know `cluster_first` have no way to the cluster's DNS, and pods use the resolvers of their node.
        (
            RESOLVER,
            (spec.resolver.as_ref()).is_some_and(pb::Resolver::has_own_settings),
        ),
        (RUN_AS_NON_ROOT, any(|one| one.run_as_non_root)),
        (PRIVILEGED, any(|one| one.privileged)),
        (HOST_PORTS, any(|one| !one.host_ports.is_empty())),
        (
            UDP_HOST_PORTS,
            any(|one| one.host_ports.iter().any(|port| port.udp)),
        ),
        (PRIVATE_NETWORK, spec.network() == pb::NetworkMode::Private),
        (PULL_CREDENTIALS, !spec.image_pull_secrets.is_empty()),
        (PROBES, any(has_probe)),
        (HOOKS, any(has_hook)),
        (
            SIDECARS,
            spec.init_containers.iter().any(pb::Container::is_sidecar),
        ),
        (RESTART_RULES, has_restart_rule(spec)),
        (
            RESTART_ALL,
            any(|one| one.restart_rules.iter().any(|rule| rule.restart_all)),
        ),
        (EPHEMERAL, !spec.ephemeral_containers.is_empty()),
        (SHARED_PROCESSES, spec.share_process_namespace),
        (STOP_SIGNAL, any(|one| !one.stop_signal.is_empty())),
        (HOST_PATHS, spec.volumes.iter().any(is_host_path)),
        (MAPPED_VOLUMES, spec.volumes.iter().any(is_mapped)),
        (IMAGE_VOLUMES, spec.volumes.iter().any(is_image)),
        (POD_ADDRESSES, !spec.pod_range.is_empty()),
        (
            ENV_FILES,
            containers()
                .chain(&spec.ephemeral_containers)
                .any(|container| container.env_files),
        ),
        (MPI, spec.job.as_ref().is_some_and(|job| job.mpi.is_some())),
    ];
    let needed = asked.into_iter().filter(|(_, asked)| *asked);
    needed.map(|(name, _)| name).collect()
}

fn has_probe(container: &pb::Container) -> bool {
    let (startup, liveness) = (&container.startup_probe, &container.liveness_probe);
    startup.is_some() || liveness.is_some() || container.readiness_probe.is_some()
}

/// Whether a container has a restart policy of its own, or rules. That of a sidecar is what makes it one.
fn has_restart_rule(spec: &pb::PodSpec) -> bool {
    let own = |container: &pb::Container| {
        container.restart_policy() != pb::RestartPolicy::Unspecified
            || !container.restart_rules.is_empty()
    };
    let init = spec.init_containers.iter();
    init.filter(|one| !one.is_sidecar() || !one.restart_rules.is_empty())
        .chain(&spec.containers)
        .any(own)
}

fn is_host_path(volume: &pb::Volume) -> bool {
    matches!(volume.source, Some(pb::volume::Source::HostPath(_)))
}

fn is_image(volume: &pb::Volume) -> bool {
    matches!(volume.source, Some(pb::volume::Source::Image(_)))
}

fn is_mapped(volume: &pb::Volume) -> bool {
    use pb::volume::Source;
    matches!(volume.source, Some(Source::Nfs(_) | Source::Csi(_)))
}

fn has_hook(container: &pb::Container) -> bool {
    container.post_start.is_some() || container.pre_stop.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_needs_what_its_fields_ask_for() {
        let container = pb::Container::default();
        let mut spec = pb::PodSpec {
            init_containers: vec![container.clone()],
            containers: vec![container],
            ..pb::PodSpec::default()
        };
        assert!(needed(&spec).is_empty());
        spec.resolver = Some(pb::Resolver {
            cluster_first: true,
            ..pb::Resolver::default()
        });
        assert!(needed(&spec).is_empty());
        spec.containers[0].mounts = vec![pb::Mount {
            sub_path_expr: "$(A)".to_owned(),
            ..pb::Mount::default()
        }];
        assert_eq!(needed(&spec), [SUB_PATH_EXPR]);
        spec.subdomain = "web".to_owned();
        spec.containers[0].host_ports = vec![pb::HostPort {
            udp: true,
            ..pb::HostPort::default()
        }];
        spec.set_network(pb::NetworkMode::Private);
        spec.resolver = Some(pb::Resolver {
            only_own: true,
            ..pb::Resolver::default()
        });
        spec.init_containers[0].run_as_non_root = true;
        spec.init_containers[0].privileged = true;
        spec.image_pull_secrets = vec!["s".to_owned()];
        spec.containers[0].readiness_probe = Some(pb::Probe::default());
        spec.containers[0].pre_stop = Some(pb::Hook::default());
        spec.init_containers[0].restart_policy = pb::RestartPolicy::Always.into();
        spec.containers[0].restart_policy = pb::RestartPolicy::Never.into();
        spec.containers[0].restart_rules = vec![pb::RestartRule {
            restart_all: true,
            ..pb::RestartRule::default()
        }];
        spec.ephemeral_containers = vec![pb::Container::default()];
        spec.share_process_namespace = true;
        spec.containers[0].stop_signal = "SIGINT".to_owned();
        spec.containers[0].env_files = true;
        let sources = [
            pb::volume::Source::HostPath(pb::HostPath::default()),
            pb::volume::Source::Nfs(pb::NfsVolume::default()),
            pb::volume::Source::Image(pb::ImageVolume::default()),
        ];
        let volume = |source| pb::Volume {
            name: "v".to_owned(),
            source: Some(source),
        };
        spec.volumes = sources.map(volume).into();
        spec.pod_range = "10.200.0.0/16".to_owned();
        spec.job = Some(pb::JobRequest {
            mpi: Some(pb::Mpi::default()),
            ..pb::JobRequest::default()
        });
        assert_eq!(needed(&spec), OF_PODS);
    }

    #[test]
    fn each_field_alone_is_enough() {
        let of = |change: fn(&mut pb::PodSpec, &mut pb::Container)| {
            let (mut spec, mut container) = <(pb::PodSpec, pb::Container)>::default();
            change(&mut spec, &mut container);
            spec.containers.push(container);
            needed(&spec)
        };
        assert_eq!(of(|spec, _| spec.set_hostname_as_fqdn = true), [POD_DOMAIN]);
        assert_eq!(
            of(|_, main| main.startup_probe = Some(pb::Probe::default())),
            [PROBES]
        );
        assert_eq!(
            of(|_, main| main.liveness_probe = Some(pb::Probe::default())),
            [PROBES]
        );
        assert_eq!(
            of(|_, main| main.readiness_probe = Some(pb::Probe::default())),
            [PROBES]
        );
        assert_eq!(
            of(|_, main| main.post_start = Some(pb::Hook::default())),
            [HOOKS]
        );
        assert_eq!(
            of(|_, main| main.pre_stop = Some(pb::Hook::default())),
            [HOOKS]
        );
        assert_eq!(
            of(|_, main| main.restart_rules = vec![pb::RestartRule::default()]),
            [RESTART_RULES]
        );
        assert_eq!(
            of(|_, main| main.host_ports = vec![pb::HostPort::default()]),
            [HOST_PORTS]
        );
        let sidecar = pb::Container {
            restart_policy: pb::RestartPolicy::Always.into(),
            ..pb::Container::default()
        };
        let spec = pb::PodSpec {
            init_containers: vec![sidecar],
            ..pb::PodSpec::default()
        };
        assert_eq!(needed(&spec), [SIDECARS]);
    }
}
