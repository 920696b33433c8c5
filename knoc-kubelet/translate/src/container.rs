//! PURE: the shapes of a pod's containers.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{self as core, Pod},
    apimachinery::pkg::api::resource::Quantity,
};
use knoc_proto::{paths, pb};

use super::{
    carried::{
        Container, EnvVar, EnvVarSource, ExitCodes, PodSecurityContext, PodSpec,
        ResourceRequirements, RestartRule, SecurityContext, VolumeMount,
    },
    ephemeral, image_root, network, probe, quantity,
};

/// The containers of a pod, in the order of its spec.
pub(super) struct Containers {
    pub(super) init: Vec<pb::Container>,
    pub(super) regular: Vec<pb::Container>,
    pub(super) ephemeral: Vec<pb::Container>,
}

/// Translates all containers of the pod.
pub(super) fn of_pod(pod: &Pod, spec: PodSpec<'_>, problems: &mut Vec<String>) -> Containers {
    let mut shape = |list: &str, container: &core::Container| {
        let mut relative = Vec::new();
        let shape = shape_container(spec, container.into(), &mut relative);
        let name = &container.name;
        let absolute = relative.into_iter();
        problems.extend(absolute.map(|problem| format!("spec.{list}[{name}].{problem}")));
        shape
    };
    let init = spec.init_containers.iter().flatten();
    let mut containers = Containers {
        init: init.map(|one| shape("initContainers", one)).collect(),
        regular: (spec.containers.iter())
            .map(|one| shape("containers", one))
            .collect(),
        ephemeral: Vec::new(),
    };
    for one in ephemeral::containers(spec) {
        containers.ephemeral.push(pb::Container {
            target: one.target,
            ..shape("ephemeralContainers", &one.container)
        });
    }
    let mut problem = Vec::new();
    for list in [
        &mut containers.init,
        &mut containers.regular,
        &mut containers.ephemeral,
    ] {
        // The annotation is wrong for each list alike, and is reported once.
        problem.clear();
        image_root::apply(pod, list, &mut problem);
    }
    problems.extend(problem);
    containers
}

/// Translates one container. The problems begin with a path inside of the container.
fn shape_container(
    spec: PodSpec<'_>,
    container: Container<'_>,
    problems: &mut Vec<String>,
) -> pb::Container {
    let (requests, limits) = requests_and_limits(container, problems);
    let security = container
        .security_context
        .as_ref()
        .map(SecurityContext::from);
    let image = container.image.clone().unwrap_or_default();
    if image.is_empty() {
        problems.push("image is missing".to_owned());
    }
    let probes = probe::shape(container, problems);
    let mounts = container.volume_mounts.iter().flatten();
    pb::Container {
        name: container.name.clone(),
        pull_policy: pull_policy(container.image_pull_policy.as_deref(), &image).into(),
        image,
        command: container.command.clone().unwrap_or_default(),
        args: container.args.clone().unwrap_or_default(),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        mounts: mounts.map(|mount| shape_mount(mount.into())).collect(),
        requests: Some(requests),
        limits: Some(limits),
        tty: *container.tty == Some(true),
        stdin: *container.stdin == Some(true),
        stdin_once: *container.stdin_once == Some(true),
        termination_message_path: container
            .termination_message_path
            .as_deref()
            .filter(|path| !path.is_empty())
            .map_or_else(|| "/dev/termination-log".to_owned(), in_container),
        termination_message_fallback_to_logs: container.termination_message_policy.as_deref()
            == Some("FallbackToLogsOnError"),
        read_only_root: security
            .is_some_and(|context| *context.read_only_root_filesystem == Some(true)),
        fakeroot: false,
        run_as_user: run_as_user(spec, security),
        run_as_group: run_as_group(spec, security),
        startup_probe: probes.startup,
        liveness_probe: probes.liveness,
        readiness_probe: probes.readiness,
        post_start: probes.post_start,
        pre_stop: probes.pre_stop,
        host_ports: network::host_ports(spec, container, problems),
        stop_signal: probes.stop_signal,
        run_as_non_root: run_as_non_root(spec, security),
        privileged: security.is_some_and(|context| *context.privileged == Some(true)),
        restart_policy: own_restart_policy(container).into(),
        restart_rules: restart_rules(container),
        env_files: has_files(container),
        // Of an ephemeral container, the caller sets it.
        target: String::new(),
    }
}

/// What the container requests, and its limits.
fn requests_and_limits(
    container: Container<'_>,
    problems: &mut Vec<String>,
) -> (pb::Resources, pb::Resources) {
    let resources = container.resources.as_ref().map(ResourceRequirements::from);
    let mut list = |list: Option<&Option<BTreeMap<String, Quantity>>>| match list {
        Some(Some(list)) => shape_resources(list, problems),
        Some(None) | None => pb::Resources::default(),
    };
    let limits = list(resources.map(|resources| resources.limits));
    let requests = list(resources.map(|resources| resources.requests));
    (requests, limits)
}

fn own_restart_policy(container: Container<'_>) -> pb::RestartPolicy {
    match container.restart_policy.as_deref() {
        Some("Always") => pb::RestartPolicy::Always,
        Some("OnFailure") => pb::RestartPolicy::OnFailure,
        Some("Never") => pb::RestartPolicy::Never,
        // The verdicts admit no other.
        Some(_) | None => pb::RestartPolicy::Unspecified,
    }
}

fn restart_rules(container: Container<'_>) -> Vec<pb::RestartRule> {
    let rules = container.restart_policy_rules.iter().flatten();
    let rules = rules.map(RestartRule::from);
    rules
        .filter_map(|rule| {
            let codes = ExitCodes::from(rule.exit_codes.as_ref()?);
            Some(pb::RestartRule {
                not_in: codes.operator == "NotIn",
                exit_codes: codes.values.clone().unwrap_or_default(),
                restart_all: rule.action == "RestartAllContainers",
            })
        })
        .collect()
}

/// The container's setting overrides the pod's.
fn run_as_non_root(spec: PodSpec<'_>, own: Option<SecurityContext<'_>>) -> bool {
    let of_pod = spec.security_context.as_ref().map(PodSecurityContext::from);
    let of_pod = || of_pod.and_then(|context| *context.run_as_non_root);
    own.and_then(|context| *context.run_as_non_root)
        .or_else(of_pod)
        .unwrap_or_default()
}

/// The container's setting overrides the pod's.
fn run_as_user(spec: PodSpec<'_>, own: Option<SecurityContext<'_>>) -> Option<i64> {
    let of_pod = spec.security_context.as_ref().map(PodSecurityContext::from);
    own.and_then(|context| *context.run_as_user)
        .or_else(|| of_pod.and_then(|context| *context.run_as_user))
}

/// The container's setting overrides the pod's. A program has one group inside: without a setting it is that of the pod's files.
fn run_as_group(spec: PodSpec<'_>, own: Option<SecurityContext<'_>>) -> Option<i64> {
    let of_pod = spec.security_context.as_ref().map(PodSecurityContext::from);
    own.and_then(|context| *context.run_as_group)
        .or_else(|| of_pod.and_then(|context| context.run_as_group.or(*context.fs_group)))
}

fn shape_mount(mount: VolumeMount<'_>) -> pb::Mount {
    let sub_path = mount.sub_path.clone().unwrap_or_default();
    pb::Mount {
        volume: mount.name.clone(),
        path: in_container(mount.mount_path),
        read_only: *mount.read_only == Some(true),
        // Older agents accept only clean paths. The agent reports what is wrong with any other path.
        sub_path: match paths::in_volume(&sub_path) {
            Ok(clean) if clean == "." => String::new(),
            Ok(clean) => clean,
            Err(_) => sub_path,
        },
        sub_path_expr: mount.sub_path_expr.clone().unwrap_or_default(),
    }
}

/// Makes a relative path relative to the container's root, as the kubelet does. Any other path stays as written: the
/// shape of a running pod must not change with the kubelet's version.
fn in_container(path: &str) -> String {
    if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    }
}

/// The default of the API server: `Always` for `:latest` or no tag, otherwise `IfNotPresent`.
pub(crate) fn pull_policy(policy: Option<&str>, image: &str) -> pb::PullPolicy {
    match policy {
        Some("Always") => pb::PullPolicy::Always,
        Some("Never") => pb::PullPolicy::Never,
        Some("IfNotPresent") => pb::PullPolicy::IfNotPresent,
        _ => {
            let last = image.rsplit('/').next().unwrap_or_default();
            let latest = !last.contains(':') || last.ends_with(":latest");
            if latest && !image.starts_with('/') && !image.contains('@') {
                pb::PullPolicy::Always
            } else {
                pb::PullPolicy::IfNotPresent
            }
        }
    }
}

/// Whether a variable of the container comes from a file.
fn has_files(container: Container<'_>) -> bool {
    let variables = container.env.iter().flatten().map(EnvVar::from);
    let mut sources = variables.filter_map(|var| var.value_from.as_ref());
    sources.any(|source| EnvVarSource::from(source).file_key_ref.is_some())
}

pub(super) fn shape_resources(
    list: &BTreeMap<String, Quantity>,
    problems: &mut Vec<String>,
) -> pb::Resources {
    let mut resources = pb::Resources::default();
    for (name, value) in list {
        let read = if name == "cpu" {
            quantity::millis(value)
        } else {
            quantity::units(value)
        };
        let amount = match read {
            Ok(amount) => amount,
            Err(error) => {
                problems.push(format!("resources[{name}]: {error}"));
                continue;
            }
        };
        match name.as_str() {
            "cpu" => resources.cpu_millis = amount,
            "memory" => resources.memory_bytes = amount,
            "ephemeral-storage" => resources.ephemeral_storage_bytes = amount,
            other => {
                resources.extended.insert(other.to_owned(), amount);
            }
        }
    }
    resources
}
