//! PURE: Pod → `pb::PodSpec` (the shape) and Pod + [`Resolved`] → `pb::PodValues` (the values).
//!
//! The shape holds no secret and needs nothing but the pod; it is what `EnsurePod` freezes. The values
//! need what the kubelet fetched. `knocctl run -f` uses both, with nothing resolved.
//! What the verdict table refuses never comes here; what is left to refuse (numbers that are none) is
//! returned in full.

#![forbid(unsafe_code)]

mod env;
mod files;
mod job;
pub mod quantity;
pub mod verdict;

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{self as core, ConfigMap, Pod, Secret},
    apimachinery::pkg::api::resource::Quantity,
};
use knoc_proto::{names, paths, pb};

pub use env::service_variables;
pub use job::over_containers;

/// Annotations that are never sent: they repeat the whole pod.
const NOT_SENT: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// The ordinary grace of Kubernetes.
const DEFAULT_GRACE: i64 = 30;

/// What the pod refers to, as far as it was found.
#[derive(Clone, Debug, Default)]
pub struct Resolved {
    /// By name, of the pod's namespace.
    pub config_maps: BTreeMap<String, ConfigMap>,
    /// By name, of the pod's namespace.
    pub secrets: BTreeMap<String, Secret>,
    /// Service account tokens by what was asked.
    pub tokens: BTreeMap<TokenAsk, Token>,
    /// Service variables (see [`service_variables`]).
    pub services: Vec<(String, String)>,
    /// The node's allocatable: the limit of a container that sets none.
    pub allocatable: pb::Resources,
}

/// What is asked of the `TokenRequest` API.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TokenAsk {
    /// Empty: the API server's own.
    pub audience: String,
    /// Seconds.
    pub expiration: i64,
}

/// A service account token.
#[derive(Clone)]
pub struct Token {
    /// The secret itself.
    pub token: String,
    /// When it expires.
    pub expires: Timestamp,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token")
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

/// What a pod refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Names of `ConfigMaps`.
    pub config_maps: Vec<String>,
    /// Names of Secrets.
    pub secrets: Vec<String>,
    /// Tokens.
    pub tokens: Vec<TokenAsk>,
}

/// Something required is not there (yet), a sentence each. Volumes come first, as on any node: a container is not looked
/// at before they are there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// Of volumes.
    #[error("{}", .0.join("; "))]
    Mounts(Vec<String>),
    /// Of containers' variables.
    #[error("{}", .0.join("; "))]
    Variables(Vec<String>),
}

/// The values, and names that were skipped because they are no variable names.
#[derive(Clone, Debug, Default)]
pub struct Values {
    /// The bundle; its revision is set by the caller.
    pub values: pb::PodValues,
    /// For the Event `InvalidEnvironmentVariableNames`.
    pub skipped: Vec<String>,
}

/// The shape of the pod, or all reasons why it has none.
pub fn shape(pod: &Pod) -> Result<pb::PodSpec, Vec<String>> {
    let mut problems = Vec::new();
    let Some(spec) = &pod.spec else {
        return Err(vec!["the pod has no spec".to_owned()]);
    };
    let meta = &pod.metadata;
    let name = meta.name.clone().unwrap_or_default();
    let mut containers = |list: &[core::Container]| -> Vec<pb::Container> {
        list.iter()
            .map(|container| shape_container(spec, container, &mut problems))
            .collect()
    };
    let init_containers = containers(spec.init_containers.as_deref().unwrap_or_default());
    let regular = containers(&spec.containers);
    let volumes = spec.volumes.as_deref().unwrap_or_default();
    let volumes = volumes
        .iter()
        .map(|volume| shape_volume(volume, &mut problems))
        .collect();
    let job = job::request(pod, &init_containers, &regular, &mut problems);
    if !problems.is_empty() {
        return Err(problems);
    }
    let mut annotations = meta.annotations.clone().unwrap_or_default();
    annotations.remove(NOT_SENT);
    Ok(pb::PodSpec {
        uid: meta.uid.clone().unwrap_or_default(),
        namespace: meta
            .namespace
            .clone()
            .unwrap_or_else(|| "default".to_owned()),
        generation: meta.generation.unwrap_or(1),
        init_containers,
        containers: regular,
        restart_policy: restart_policy(spec).into(),
        termination_grace_period_seconds: spec
            .termination_grace_period_seconds
            .unwrap_or(DEFAULT_GRACE),
        active_deadline_seconds: spec.active_deadline_seconds.unwrap_or(0),
        hostname: hostname(spec, &name),
        name,
        volumes,
        job: Some(job),
        node_name: spec.node_name.clone().unwrap_or_default(),
        service_account: spec.service_account_name.clone().unwrap_or_default(),
        labels: meta
            .labels
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect(),
        annotations: annotations.into_iter().collect(),
        host_aliases: spec
            .host_aliases
            .iter()
            .flatten()
            .map(shape_alias)
            .collect(),
    })
}

/// The values of the pod, or all that is missing.
pub fn values(pod: &Pod, resolved: &Resolved) -> Result<Values, Missing> {
    let mut missing = Vec::new();
    let mut values = Values::default();
    let Some(spec) = &pod.spec else {
        return Ok(values);
    };
    for container in spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
    {
        let vars = env::variables(pod, container, resolved, &mut values.skipped, &mut missing);
        values.values.env.push(pb::ContainerEnv {
            container: container.name.clone(),
            vars,
        });
    }
    let mut mounts = Vec::new();
    for volume in spec.volumes.iter().flatten() {
        let mut missing = Vec::new();
        let files = files::files(pod, volume, resolved, &mut missing);
        let failed = |why| {
            format!(
                "MountVolume.SetUp failed for volume \"{}\" : {why}",
                volume.name
            )
        };
        mounts.extend(missing.into_iter().map(failed));
        if let Some(files) = files {
            values.values.files.push(pb::VolumeFiles {
                volume: volume.name.clone(),
                files,
            });
        }
    }
    let expiries = resolved
        .tokens
        .values()
        .map(|token| token.expires.as_second());
    values.values.not_after = expiries.min().unwrap_or(0);
    missing.dedup();
    match (mounts.is_empty(), missing.is_empty()) {
        (false, _) => Err(Missing::Mounts(mounts)),
        (true, false) => Err(Missing::Variables(missing)),
        (true, true) => Ok(values),
    }
}

/// What the pod refers to: names of `ConfigMaps` and Secrets, tokens.
#[must_use]
pub fn needs(pod: &Pod) -> Needs {
    let mut needs = Needs::default();
    let Some(spec) = &pod.spec else { return needs };
    for container in spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
    {
        env::needs(container, &mut needs);
    }
    for volume in spec.volumes.iter().flatten() {
        files::needs(volume, &mut needs);
    }
    needs.config_maps.sort();
    needs.config_maps.dedup();
    needs.secrets.sort();
    needs.secrets.dedup();
    needs.tokens.sort();
    needs.tokens.dedup();
    needs
}

fn restart_policy(spec: &core::PodSpec) -> pb::RestartPolicy {
    match spec.restart_policy.as_deref() {
        Some("Never") => pb::RestartPolicy::Never,
        Some("OnFailure") => pb::RestartPolicy::OnFailure,
        _ => pb::RestartPolicy::Always,
    }
}

fn hostname(spec: &core::PodSpec, name: &str) -> String {
    match spec.hostname.as_deref() {
        None | Some("") => names::host_name(name).to_owned(),
        Some(hostname) => hostname.to_owned(),
    }
}

fn shape_alias(alias: &core::HostAlias) -> pb::HostAlias {
    pb::HostAlias {
        ip: alias.ip.clone(),
        hostnames: alias.hostnames.clone().unwrap_or_default(),
    }
}

fn shape_container(
    spec: &core::PodSpec,
    container: &core::Container,
    problems: &mut Vec<String>,
) -> pb::Container {
    let resources = container.resources.clone().unwrap_or_default();
    let list = |list: Option<BTreeMap<String, Quantity>>, problems: &mut Vec<String>| {
        shape_resources(&container.name, &list.unwrap_or_default(), problems)
    };
    let limits = list(resources.limits, problems);
    let requests = list(resources.requests, problems);
    let image = container.image.clone().unwrap_or_default();
    if image.is_empty() {
        problems.push(format!(
            "spec.containers[{}].image is missing",
            container.name
        ));
    }
    pb::Container {
        name: container.name.clone(),
        pull_policy: pull_policy(container.image_pull_policy.as_deref(), &image).into(),
        image,
        command: container.command.clone().unwrap_or_default(),
        args: container.args.clone().unwrap_or_default(),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        mounts: container
            .volume_mounts
            .iter()
            .flatten()
            .map(shape_mount)
            .collect(),
        requests: Some(requests),
        limits: Some(limits),
        tty: container.tty == Some(true),
        stdin: container.stdin == Some(true),
        stdin_once: container.stdin_once == Some(true),
        termination_message_path: container
            .termination_message_path
            .as_deref()
            .filter(|path| !path.is_empty())
            .map_or_else(|| "/dev/termination-log".to_owned(), in_container),
        termination_message_fallback_to_logs: container.termination_message_policy.as_deref()
            == Some("FallbackToLogsOnError"),
        read_only_root: container
            .security_context
            .as_ref()
            .is_some_and(|context| context.read_only_root_filesystem == Some(true)),
        fakeroot: false,
        run_as_user: run_as_user(spec, container),
    }
}

/// A container's own word comes before the pod's.
fn run_as_user(spec: &core::PodSpec, container: &core::Container) -> Option<i64> {
    let own = container.security_context.as_ref();
    let of_pod = spec.security_context.as_ref();
    own.and_then(|context| context.run_as_user)
        .or_else(|| of_pod.and_then(|context| context.run_as_user))
}

fn shape_mount(mount: &core::VolumeMount) -> pb::Mount {
    let sub_path = mount.sub_path.clone().unwrap_or_default();
    pb::Mount {
        volume: mount.name.clone(),
        path: in_container(&mount.mount_path),
        read_only: mount.read_only == Some(true),
        // Agents of older versions take clean paths only. What is wrong with another the agent says.
        sub_path: match paths::in_volume(&sub_path) {
            Ok(clean) if clean == "." => String::new(),
            Ok(clean) => clean,
            Err(_) => sub_path,
        },
    }
}

/// As a kubelet does it: a relative path begins at the container's root. Otherwise it stays as it was written: the
/// shape of a pod that runs must not change with the kubelet's version.
fn in_container(path: &str) -> String {
    if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    }
}

/// As the API server fills it in: `Always` for `:latest` or no tag.
fn pull_policy(policy: Option<&str>, image: &str) -> pb::PullPolicy {
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

fn shape_resources(
    container: &str,
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
                problems.push(format!(
                    "spec.containers[{container}].resources[{name}]: {error}"
                ));
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

fn shape_volume(volume: &core::Volume, problems: &mut Vec<String>) -> pb::Volume {
    let source = if let Some(empty) = &volume.empty_dir {
        let size = empty.size_limit.as_ref().map_or(Ok(0), quantity::units);
        let size_limit_bytes = size.unwrap_or_else(|error| {
            problems.push(format!(
                "spec.volumes[{}].emptyDir.sizeLimit: {error}",
                volume.name
            ));
            0
        });
        let memory = empty.medium.as_deref() == Some("Memory");
        Some(pb::volume::Source::EmptyDir(pb::EmptyDir {
            memory,
            size_limit_bytes,
        }))
    } else if files::is_files(volume) {
        Some(pb::volume::Source::Files(pb::FilesVolume {}))
    } else {
        // As the API server fills it in.
        Some(pb::volume::Source::EmptyDir(pb::EmptyDir::default()))
    };
    pb::Volume {
        name: volume.name.clone(),
        source,
    }
}

#[cfg(test)]
mod tests;
