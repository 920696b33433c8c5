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
/// The agent's shims give pods a network of their own.
pub const PRIVATE_NETWORK: &str = "private-network";
/// The agent's shims run probes.
pub const PROBES: &str = "probes";
/// The agent's shims run the hooks of containers.
pub const HOOKS: &str = "hooks";

/// All capabilities that a pod can need.
pub const OF_PODS: [&str; 9] = [
    SUB_PATH_EXPR,
    POD_DOMAIN,
    RESOLVER,
    RUN_AS_NON_ROOT,
    PRIVILEGED,
    HOST_PORTS,
    PRIVATE_NETWORK,
    PROBES,
    HOOKS,
];

/// The capabilities that this pod needs.
#[must_use]
pub fn needed(spec: &pb::PodSpec) -> Vec<&'static str> {
    let containers = || spec.init_containers.iter().chain(&spec.containers);
    let expanded = |container: &pb::Container| {
        let mut mounts = container.mounts.iter();
        mounts.any(|mount| !mount.sub_path_expr.is_empty())
    };
    let asked = [
        (SUB_PATH_EXPR, containers().any(expanded)),
        (
            POD_DOMAIN,
            !spec.subdomain.is_empty() || spec.set_hostname_as_fqdn,
        ),
        (RESOLVER, spec.resolver.is_some()),
        (
            RUN_AS_NON_ROOT,
            containers().any(|container| container.run_as_non_root),
        ),
        (
            PRIVILEGED,
            containers().any(|container| container.privileged),
        ),
        (
            HOST_PORTS,
            containers().any(|container| !container.host_ports.is_empty()),
        ),
        (PRIVATE_NETWORK, spec.network() == pb::NetworkMode::Private),
        (PROBES, containers().any(has_probe)),
        (HOOKS, containers().any(has_hook)),
    ];
    let needed = asked.into_iter().filter(|(_, asked)| *asked);
    needed.map(|(name, _)| name).collect()
}

fn has_probe(container: &pb::Container) -> bool {
    let (startup, liveness) = (&container.startup_probe, &container.liveness_probe);
    startup.is_some() || liveness.is_some() || container.readiness_probe.is_some()
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
        spec.containers[0].mounts = vec![pb::Mount {
            sub_path_expr: "$(A)".to_owned(),
            ..pb::Mount::default()
        }];
        assert_eq!(needed(&spec), [SUB_PATH_EXPR]);
        spec.subdomain = "web".to_owned();
        spec.containers[0].host_ports = vec![pb::HostPort::default()];
        spec.set_network(pb::NetworkMode::Private);
        spec.resolver = Some(pb::Resolver::default());
        spec.init_containers[0].run_as_non_root = true;
        spec.init_containers[0].privileged = true;
        spec.containers[0].readiness_probe = Some(pb::Probe::default());
        spec.containers[0].pre_stop = Some(pb::Hook::default());
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
    }
}
