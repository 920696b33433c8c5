//! PURE: translates a Pod to `pb::PodSpec` (the shape), and a Pod with [`Resolved`] to `pb::PodValues` (the values).
//!
//! The shape contains no secret and needs nothing but the pod; `EnsurePod` fixes it. The values need the objects that
//! the kubelet fetched. `knocctl run -f` uses both, with nothing resolved. [`verdict`] decides how each field is
//! handled. The translation reads a pod through the types of `carried`, which do not compile if they and the verdicts
//! disagree. Problems that no table can express (text in place of a number, a volume of an unknown kind) are found
//! here, and all of them are returned.

#![forbid(unsafe_code)]

mod carried;
mod claims;
mod container;
mod env;
mod ephemeral;
mod files;
mod grace;
mod image_root;
mod job;
mod keyring;
mod keys;
mod mpi;
mod network;
mod options;
mod probe;
pub mod quantity;
mod size;
mod trust;
pub mod verdict;
mod volume;

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{self as core, ConfigMap, Pod, Secret};
use knoc_proto::{
    names, pb,
    pod::{Ranks, option_problems},
};

use carried::{Container, DnsConfig, DnsOption, HostAlias, PodSpec};
use size::Size;
use volume::Source;

pub use claims::{FoundClaim, Unbound, bind_claims};
pub use env::service_variables;
pub use grace::Grace;
pub use job::requested;
pub use keyring::{BadSecret, PullCredentials, pull_credentials, pull_secrets};
pub use keys::{Keys, keys};
pub use size::TOO_MUCH;
pub use trust::TrustBundleKey;

/// The annotation in which the kubelet publishes the id of the pod's job.
pub const JOB_ID: &str = "knoc.io/job-id";
/// Annotations that are not sent, because one repeats the whole pod and the agent knows the other.
const NOT_SENT: [&str; 2] = ["kubectl.kubernetes.io/last-applied-configuration", JOB_ID];

/// The objects to which the pod refers, as far as they were found.
#[derive(Clone, Debug, Default)]
pub struct Resolved {
    /// The `ConfigMaps` of the pod's namespace, by name.
    pub config_maps: BTreeMap<String, ConfigMap>,
    /// The Secrets of the pod's namespace, by name.
    pub secrets: BTreeMap<String, Secret>,
    /// The service account tokens, by their request.
    pub tokens: BTreeMap<TokenRequestKey, Token>,
    /// The certificates of the trust anchors, in PEM, by what selects them; absent if there are none.
    pub trust_bundles: BTreeMap<TrustBundleKey, String>,
    /// The variables of Services (see [`service_variables`]).
    pub services: Vec<(String, String)>,
    /// The allocatable resources of the node, which are the limits of a container that sets none.
    pub allocatable: pb::Resources,
}

/// A request for a service account token (the `TokenRequest` API).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TokenRequestKey {
    /// The audience; empty: the API server's own.
    pub audience: String,
    /// The requested lifetime in seconds.
    pub expiration: i64,
}

/// A service account token that was issued.
#[derive(Clone)]
pub struct Token {
    /// The token. Secret.
    pub token: String,
    /// The time at which it expires.
    pub expires: Timestamp,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token")
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

/// The objects to which a pod refers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The names of the `ConfigMaps`.
    pub config_maps: Vec<String>,
    /// The names of the Secrets.
    pub secrets: Vec<String>,
    /// The requests for tokens.
    pub tokens: Vec<TokenRequestKey>,
    /// What selects trust anchors.
    pub trust_bundles: Vec<TrustBundleKey>,
    /// The names of the claims. They belong to the pod's shape ([`bind_claims`]), and the values do not need them.
    pub claims: Vec<String>,
}

/// Required objects that do not exist (yet), with one message for each. Problems of volumes are reported first, as by
/// any kubelet: it looks at containers only after the volumes are mounted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// Volumes cannot be set up.
    #[error("{}", .0.join("; "))]
    Mounts(Vec<String>),
    /// Variables of containers cannot be set.
    #[error("{}", .0.join("; "))]
    Variables(Vec<String>),
}

/// The values, and the names that were skipped because they are not valid variable names.
#[derive(Clone, Debug, Default)]
pub struct Values {
    /// The values; the caller sets their revision.
    pub values: pb::PodValues,
    /// The skipped names, for the Event `InvalidEnvironmentVariableNames`.
    pub skipped: Vec<String>,
    /// The ephemeral containers that lack something. They do not hold up the pod, which runs without them.
    pub lacking: Vec<Lacking>,
}

/// What the variables of an ephemeral container lack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lacking {
    /// The name of the container.
    pub container: String,
    /// One message for each missing object or key.
    pub messages: Vec<String>,
}

/// Translates the shape of the pod, or returns everything that is wrong with it. The volumes of claims have no source until
/// [`bind_claims`] has given them one.
pub fn shape(pod: &Pod) -> Result<pb::PodSpec, Vec<String>> {
    let mut problems = Vec::new();
    let Some(spec) = pod.spec.as_ref().map(PodSpec::from) else {
        return Err(vec!["the pod has no spec".to_owned()]);
    };
    let meta = &pod.metadata;
    let name = meta.name.clone().unwrap_or_default();
    let containers = container::of_pod(pod, spec, &mut problems);
    let volumes = volumes(spec, &mut problems);
    let whole = job::Whole::of(spec, &mut problems);
    let both = (&*containers.init, &*containers.regular);
    let job = job::request(pod, both, &whole, &mut problems);
    let network = network::mode(pod, spec, &mut problems);
    let ranks = Ranks {
        job: Some(&job),
        containers: &containers.regular,
        volumes: &volumes,
        shares_processes: *spec.share_process_namespace == Some(true),
        network,
    };
    problems.extend(option_problems(&job));
    problems.extend(ranks.problems());
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(pb::PodSpec {
        uid: meta.uid.clone().unwrap_or_default(),
        namespace: meta.namespace.as_deref().unwrap_or("default").to_owned(),
        generation: meta.generation.unwrap_or(1),
        init_containers: containers.init,
        containers: containers.regular,
        ephemeral_containers: containers.ephemeral,
        share_process_namespace: *spec.share_process_namespace == Some(true),
        restart_policy: restart_policy(spec).into(),
        termination_grace_period_seconds: Grace::of_field(*spec.termination_grace_period_seconds)
            .in_seconds(),
        active_deadline_seconds: spec.active_deadline_seconds.unwrap_or(0),
        hostname: hostname(spec, &name),
        subdomain: subdomain(spec),
        // Set by the kubelet from its configuration, as `pod_range` is.
        cluster_domain: String::new(),
        set_hostname_as_fqdn: *spec.set_hostname_as_fqdn == Some(true),
        resolver: resolver(spec),
        network: network.into(),
        pod_range: String::new(),
        node_hostname: *spec.host_network == Some(true),
        name,
        volumes,
        job: Some(job),
        node_name: spec.node_name.clone().unwrap_or_default(),
        service_account: spec.service_account_name.clone().unwrap_or_default(),
        labels: meta.labels.clone().into_iter().flatten().collect(),
        annotations: sent_annotations(pod).collect(),
        host_aliases: host_aliases(spec),
        image_pull_secrets: keyring::names(spec),
        requests: whole.requests,
        limits: whole.limits,
        overhead: whole.overhead,
    })
}

fn volumes(spec: PodSpec<'_>, problems: &mut Vec<String>) -> Vec<pb::Volume> {
    let volumes = spec.volumes.iter().flatten();
    let volumes = volumes.filter_map(|volume| volume::shape(volume, problems));
    volumes.collect()
}

fn sent_annotations(pod: &Pod) -> impl Iterator<Item = (String, String)> {
    let all = pod.metadata.annotations.clone().into_iter().flatten();
    all.filter(|(name, _)| !NOT_SENT.contains(&name.as_str()))
}

/// Translates the values of the pod, or returns everything that is missing.
pub fn values(pod: &Pod, resolved: &Resolved) -> Result<Values, Missing> {
    let mut missing = Vec::new();
    let mut values = Values::default();
    let Some(spec) = pod.spec.as_ref().map(PodSpec::from) else {
        return Ok(values);
    };
    let mut size = Size::default();
    for container in spec.all_containers() {
        let skipped = &mut values.skipped;
        let vars = env::variables(pod, container, resolved, skipped, &mut missing, &mut size);
        missing.extend(env::bad_sub_paths(container, &vars));
        values.values.env.push(pb::ContainerEnv {
            container: container.name.clone(),
            vars,
        });
    }
    ephemeral_values(pod, spec, resolved, &mut values, &mut size);
    let mut mounts = Vec::new();
    let volumes = spec.volumes.iter().flatten();
    values.values.files = volumes
        .filter_map(|volume| volume_files(pod, volume, resolved, &mut mounts, &mut size))
        .collect();
    if size.is_too_much() {
        return Err(Missing::Mounts(vec![size::TOO_MUCH.to_owned()]));
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

/// The environment of the ephemeral containers, and what it lacks.
fn ephemeral_values(
    pod: &Pod,
    spec: PodSpec<'_>,
    resolved: &Resolved,
    values: &mut Values,
    size: &mut Size,
) {
    for one in ephemeral::containers(spec) {
        let (container, mut messages) = ((&one.container).into(), Vec::new());
        let skipped = &mut values.skipped;
        let vars = env::variables(pod, container, resolved, skipped, &mut messages, size);
        messages.extend(env::bad_sub_paths(container, &vars));
        if !messages.is_empty() {
            values.lacking.push(Lacking {
                container: container.name.clone(),
                messages,
            });
        }
        values.values.ephemeral_env.push(pb::ContainerEnv {
            container: container.name.clone(),
            vars,
        });
    }
}

/// The files of a volume, if it is one of files. What they lack goes to `mounts`.
fn volume_files(
    pod: &Pod,
    volume: &core::Volume,
    resolved: &Resolved,
    mounts: &mut Vec<String>,
    size: &mut Size,
) -> Option<pb::VolumeFiles> {
    let mut missing = Vec::new();
    let files = match volume::source(volume) {
        Ok(
            Source::EmptyDir(_)
            | Source::HostPath(_)
            | Source::Image(_)
            | Source::Nfs(_)
            | Source::Claim(_),
        ) => None,
        Ok(Source::Files(source)) => Some(files::files(pod, source, resolved, &mut missing, size)),
        Err(unknown) => {
            missing.push(unknown.to_string());
            None
        }
    };
    let name = &volume.name;
    let failed = |why| format!("MountVolume.SetUp failed for volume \"{name}\" : {why}");
    mounts.extend(missing.into_iter().map(failed));
    Some(pb::VolumeFiles {
        volume: name.clone(),
        files: files?,
    })
}

/// The objects to which the pod refers: names of `ConfigMaps` and Secrets, and tokens.
#[must_use]
pub fn needs(pod: &Pod) -> Needs {
    let mut needs = Needs::default();
    let Some(spec) = pod.spec.as_ref().map(PodSpec::from) else {
        return needs;
    };
    for container in spec.all_containers() {
        env::needs(container, &mut needs);
    }
    for one in ephemeral::containers(spec) {
        env::needs((&one.container).into(), &mut needs);
    }
    for volume in spec.volumes.iter().flatten() {
        // A pod with a volume of an unknown kind has no shape, so it never starts.
        if let Ok(Source::Files(source)) = volume::source(volume) {
            files::needs(source, &mut needs);
        }
    }
    needs.config_maps.sort();
    needs.config_maps.dedup();
    needs.secrets.sort();
    needs.secrets.dedup();
    needs.tokens.sort();
    needs.tokens.dedup();
    needs.trust_bundles.sort();
    needs.trust_bundles.dedup();
    needs.claims = claims::names(pod);
    needs
}

impl<'a> PodSpec<'a> {
    /// The init containers, then the other containers.
    fn all_containers(self) -> impl Iterator<Item = Container<'a>> {
        let init = self.init_containers.iter().flatten();
        init.chain(self.containers).map(Container::from)
    }

    /// The images of all containers and volumes, as the pod names them.
    fn all_images(self) -> Vec<String> {
        let images = self
            .all_containers()
            .map(|container| container.image.clone());
        let ephemeral = ephemeral::containers(self).into_iter();
        let ephemeral = ephemeral.map(|one| one.container.image);
        let volumes = self.volumes.iter().flatten();
        let volumes = volumes.filter_map(|volume| match volume::source(volume) {
            Ok(Source::Image(image)) => Some(image.reference.clone()),
            _ => None,
        });
        images.chain(ephemeral).chain(volumes).flatten().collect()
    }
}

fn restart_policy(spec: PodSpec<'_>) -> pb::RestartPolicy {
    match spec.restart_policy.as_deref() {
        Some("Never") => pb::RestartPolicy::Never,
        Some("OnFailure") => pb::RestartPolicy::OnFailure,
        _ => pb::RestartPolicy::Always,
    }
}

fn hostname(spec: PodSpec<'_>, name: &str) -> String {
    if let Some(replaced) = hostname_override(spec) {
        return names::host_name(replaced).to_owned();
    }
    match spec.hostname.as_deref() {
        None | Some("") => names::host_name(name).to_owned(),
        Some(hostname) => hostname.to_owned(),
    }
}

fn hostname_override(spec: PodSpec<'_>) -> Option<&str> {
    let replaced = spec.hostname_override.as_deref();
    replaced.filter(|name| !name.is_empty())
}

/// The subdomain; empty if `hostnameOverride` is set, because such a pod has no domain.
fn subdomain(spec: PodSpec<'_>) -> String {
    match hostname_override(spec) {
        Some(_) => String::new(),
        None => spec.subdomain.clone().unwrap_or_default(),
    }
}

/// What the pod changes in `/etc/resolv.conf`. As in a kubelet, a pod in the node's network asks the cluster's DNS only if
/// its policy says so by name. Whether the pod reaches it is known on the compute node.
fn resolver(spec: PodSpec<'_>) -> Option<pb::Resolver> {
    let policy = spec.dns_policy.as_deref();
    let only_own = policy == Some("None");
    let cluster_first = match policy {
        None | Some("" | "ClusterFirst") => *spec.host_network != Some(true),
        Some(policy) => policy == "ClusterFirstWithHostNet",
    };
    let config = spec.dns_config.as_ref().map(DnsConfig::from);
    if config.is_none() && !only_own && !cluster_first {
        return None;
    }
    let list = |list: Option<&Option<Vec<String>>>| list.cloned().flatten().unwrap_or_default();
    let nameservers = list(config.map(|config| config.nameservers));
    let options = config.and_then(|config| config.options.as_ref());
    let options = options.into_iter().flatten().map(DnsOption::from);
    Some(pb::Resolver {
        only_own,
        nameservers: nameservers
            .iter()
            .map(|ip| names::without_leading_zeros(ip))
            .collect(),
        searches: list(config.map(|config| config.searches)),
        options: options
            .map(|option| pb::ResolverOption {
                name: option.name.clone().unwrap_or_default(),
                value: option.value.clone(),
            })
            .collect(),
        cluster_first,
    })
}

fn host_aliases(spec: PodSpec<'_>) -> Vec<pb::HostAlias> {
    let aliases = spec.host_aliases.iter().flatten().map(HostAlias::from);
    let shape = |alias: HostAlias<'_>| pb::HostAlias {
        ip: names::without_leading_zeros(alias.ip),
        hostnames: alias.hostnames.clone().unwrap_or_default(),
    };
    aliases.map(shape).collect()
}

#[cfg(test)]
mod tests;
