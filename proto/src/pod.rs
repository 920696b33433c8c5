//! PURE: a pod received in a message, checked once, so that later code may rely on it.
//!
//! [`PodSpec`] and [`PodValues`] wrap the generated messages and prove that every name, path and reference in them is
//! valid; [`std::ops::Deref`] gives read access. One error reports everything that is wrong.
use std::{collections::HashSet, fmt, ops::Deref, path::Path, time::Duration};

use crate::{
    ids::{ContainerName, PodUid},
    names::{self, BadName},
    paths, pb,
    text::quote,
};

mod devices;
mod ephemeral;
mod mpi;
mod network;
mod options;
mod probe;
mod restart;
mod stop;
mod volume;

pub use devices::{AMD, NVIDIA, device_problem, requests};
pub use ephemeral::MAX_EPHEMERAL;
pub use mpi::{MAX_RANKS, Ranks};
pub use network::{Hostname, MAX_HOSTNAME};
pub use options::{MAX_OPTION, option_problems};
pub use restart::RESTARTING_ALL;
pub use stop::REAL_TIME;

/// The folder in a container that holds KNoC's launcher and its socket.
pub const KNOC_FOLDER: &str = "/.knoc";

/// How many bytes of an invalid name an error shows.
const SHOWN: usize = 80;

/// Everything that is wrong with a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidPod {
    /// One message for each problem, in the order of the fields.
    pub problems: Vec<String>,
}

impl fmt::Display for InvalidPod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid pod: {}", self.problems.join("; "))
    }
}

impl std::error::Error for InvalidPod {}

impl InvalidPod {
    /// Whether the shape `accepted`, which an earlier version has accepted, has all these problems too.
    #[must_use]
    pub fn is_known_of(&self, accepted: pb::PodSpec) -> bool {
        let known = PodSpec::try_from(accepted).map_or_else(|error| error.problems, |_| Vec::new());
        self.problems.iter().all(|problem| known.contains(problem))
    }
}

/// The shape of a pod, which has passed all checks.
#[derive(Debug, Clone, PartialEq)]
pub struct PodSpec {
    uid: PodUid,
    spec: pb::PodSpec,
}

impl PodSpec {
    /// The uid of the pod, its key.
    #[must_use]
    pub fn uid(&self) -> &PodUid {
        &self.uid
    }

    /// Wraps a shape that an agent accepted and stored earlier. It passed the checks of the version that accepted it,
    /// which may have been fewer than today's. The pod may be running, so its shape is not checked again.
    #[must_use]
    pub fn accepted_before(uid: PodUid, spec: pb::PodSpec) -> Self {
        Self { uid, spec }
    }

    /// The grace period: how long the containers may take to end after they were told to
    /// (`terminationGracePeriodSeconds`).
    #[must_use]
    pub fn grace(&self) -> Duration {
        seconds(self.spec.termination_grace_period_seconds)
    }

    /// How long the pod may run, if that is limited (`activeDeadlineSeconds`).
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        Some(seconds(self.spec.active_deadline_seconds)).filter(|deadline| !deadline.is_zero())
    }

    /// `metadata.generation` of the pod, at least 1.
    #[must_use]
    pub fn generation(&self) -> i64 {
        self.spec.generation.max(1)
    }

    /// The init containers and then the containers, in the order in which they start.
    pub fn all_containers(&self) -> impl Iterator<Item = &pb::Container> {
        self.spec
            .init_containers
            .iter()
            .chain(&self.spec.containers)
    }

    /// The init container or container of this name.
    #[must_use]
    pub fn container(&self, name: &str) -> Option<&pb::Container> {
        self.all_containers()
            .find(|container| container.name == name)
    }

    /// Returns the message.
    #[must_use]
    pub fn into_inner(self) -> pb::PodSpec {
        self.spec
    }
}

/// The longest grace period or deadline. A century is longer than any job and can be added to any present time; the largest
/// number that the API server accepts cannot.
pub const LONGEST: Duration = Duration::from_hours(100 * 365 * 24);

/// The duration of seconds in a message, at most [`LONGEST`]. `None` if they are negative.
#[must_use]
pub fn duration(seconds: i64) -> Option<Duration> {
    let seconds = u64::try_from(seconds).ok()?;
    Some(Duration::from_secs(seconds).min(LONGEST))
}

/// As [`duration`]; a negative number becomes zero.
fn seconds(seconds: i64) -> Duration {
    duration(seconds).unwrap_or_default()
}

impl Deref for PodSpec {
    type Target = pb::PodSpec;

    fn deref(&self) -> &pb::PodSpec {
        &self.spec
    }
}

impl TryFrom<pb::PodSpec> for PodSpec {
    type Error = InvalidPod;

    fn try_from(spec: pb::PodSpec) -> Result<Self, InvalidPod> {
        let mut problems = Vec::new();
        let uid = PodUid::try_from(spec.uid.as_str()).map_err(|e| problems.push(e.to_string()));
        check_names(&spec, &mut problems);
        network::check_network(&spec, &mut problems);
        check_numbers(&spec, &mut problems);
        check_volumes(&spec, &mut problems);
        if spec.containers.is_empty() {
            problems.push("the pod has no container".to_owned());
        }
        let mut names = HashSet::new();
        for container in spec.init_containers.iter().chain(&spec.containers) {
            if !names.insert(container.name.as_str()) {
                problems.push(format!("two containers are named {:?}", container.name));
            }
            check_container(&spec, container, &mut problems);
        }
        ephemeral::check(&spec, &mut problems);
        problems.extend(spec.job.iter().flat_map(option_problems));
        problems.extend(Ranks::of(&spec).problems());
        match uid {
            Ok(uid) if problems.is_empty() => Ok(Self { uid, spec }),
            Ok(_) | Err(()) => Err(InvalidPod { problems }),
        }
    }
}

/// Records the problem with a name, if there is one.
fn check(what: &str, name: &str, checked: Result<(), BadName>, problems: &mut Vec<String>) {
    if let Err(why) = checked {
        problems.push(format!("the {what} {}: {why}", quote(name, SHOWN)));
    }
}

fn check_names(spec: &pb::PodSpec, problems: &mut Vec<String>) {
    let (name, namespace) = (&spec.name, &spec.namespace);
    check("name", name, names::dns_subdomain(name), problems);
    check(
        "namespace",
        namespace,
        names::dns_label(namespace),
        problems,
    );
    for (what, value, rule) in [
        (
            "hostname",
            &spec.hostname,
            names::is_host_name as fn(&str) -> Result<(), BadName>,
        ),
        ("subdomain", &spec.subdomain, names::dns_label),
        ("cluster domain", &spec.cluster_domain, names::dns_subdomain),
        ("node name", &spec.node_name, names::dns_subdomain),
        (
            "service account",
            &spec.service_account,
            names::dns_subdomain,
        ),
    ] {
        if !value.is_empty() {
            check(what, value, rule(value), problems);
        }
    }
    // The map of a message has no order, but the problems must have one.
    let mut labels: Vec<_> = spec.labels.iter().collect();
    labels.sort();
    for (key, value) in labels {
        check("label key", key, names::qualified_name(key), problems);
        check("label value", value, names::label_value(value), problems);
    }
    let mut annotations: Vec<_> = spec.annotations.keys().collect();
    annotations.sort();
    for key in annotations {
        check("annotation key", key, names::annotation_key(key), problems);
    }
    for alias in &spec.host_aliases {
        check(
            "host alias",
            &alias.ip,
            names::ip_address(&alias.ip),
            problems,
        );
        for name in &alias.hostnames {
            check("host alias", name, names::dns_subdomain(name), problems);
        }
    }
}

fn check_numbers(spec: &pb::PodSpec, problems: &mut Vec<String>) {
    for (what, value) in [
        (
            "terminationGracePeriodSeconds",
            spec.termination_grace_period_seconds,
        ),
        ("activeDeadlineSeconds", spec.active_deadline_seconds),
        ("generation", spec.generation),
    ] {
        if value < 0 {
            problems.push(format!("{what} is negative ({value})"));
        }
    }
}

/// Checks the files of a volume, and replaces their paths by those that were checked.
fn check_files(volume: &mut pb::VolumeFiles, problems: &mut Vec<String>) {
    let mut known = HashSet::new();
    for file in &mut volume.files {
        match paths::of_file(&file.path) {
            Err(error) => problems.push(format!(
                "volume {:?}: the file path {:?} {error}",
                volume.volume, file.path
            )),
            Ok(path) => {
                if !known.insert(path.clone()) {
                    problems.push(format!(
                        "volume {:?} has {:?} twice",
                        volume.volume, file.path
                    ));
                }
                file.path = path;
            }
        }
        if file.mode > 0o7777 {
            problems.push(format!(
                "volume {:?}: invalid mode {:o}",
                volume.volume, file.mode
            ));
        }
    }
}

fn check_volumes(spec: &pb::PodSpec, problems: &mut Vec<String>) {
    let mut names = HashSet::new();
    for volume in &spec.volumes {
        let name = &volume.name;
        if let Err(error) = ContainerName::try_from(name.as_str()) {
            problems.push(error.to_string().replace("container name", "volume name"));
        }
        if !names.insert(name.as_str()) {
            problems.push(format!("two volumes are named {name:?}"));
        }
        match &volume.source {
            None => problems.push(format!(
                "the volume {name:?} has no source that this version supports"
            )),
            Some(source) => volume::check(source, problems),
        }
    }
}

fn check_container(spec: &pb::PodSpec, container: &pb::Container, problems: &mut Vec<String>) {
    let name = &container.name;
    if let Err(error) = ContainerName::try_from(name.as_str()) {
        problems.push(error.to_string());
    }
    if container.image.is_empty() || has_control(&container.image) {
        problems.push(format!(
            "container {name:?}: the image {:?} is not a valid reference",
            container.image
        ));
    }
    for (field, path) in [
        ("workingDir", &container.working_dir),
        (
            "terminationMessagePath",
            &container.termination_message_path,
        ),
    ] {
        match paths::in_container(path) {
            _ if path.is_empty() => {}
            Err(error) => problems.push(format!("container {name:?}: {field} {path:?} {error}")),
            Ok(place) if is_ours(&place) => problems.push(format!(
                "container {name:?}: {field} {path:?} lies in {KNOC_FOLDER}, which KNoC needs itself; name another path"
            )),
            Ok(_) => {}
        }
    }
    for argument in container.command.iter().chain(&container.args) {
        if argument.contains('\0') {
            problems.push(format!(
                "container {name:?}: an argument contains a NUL byte"
            ));
        }
    }
    check_mounts(spec, container, problems);
    volume::check_folders(spec, container, problems);
    probe::check(container, problems);
    restart::check(container, problems);
    stop::check(container, problems);
}

/// Whether a path in a container lies in the folder that KNoC needs itself.
fn is_ours(path: &str) -> bool {
    Path::new(path).starts_with(KNOC_FOLDER)
}

fn check_mounts(spec: &pb::PodSpec, container: &pb::Container, problems: &mut Vec<String>) {
    let name = &container.name;
    let known = |volume: &str| spec.volumes.iter().any(|known| known.name == volume);
    let mut places = HashSet::new();
    for mount in &container.mounts {
        let (volume, path, sub_path) = (&mount.volume, &mount.path, &mount.sub_path);
        if !known(volume) {
            problems.push(format!(
                "container {name:?} mounts the unknown volume {volume:?}"
            ));
        }
        match paths::in_container(path) {
            Err(error) => {
                problems.push(format!("container {name:?}: mountPath {path:?} {error}"));
            }
            Ok(_) if path.contains(':') => problems.push(format!(
                "container {name:?}: mountPath {path:?} must not contain ':'"
            )),
            Ok(place) if place == "/" => problems.push(format!(
                "container {name:?}: mountPath {path:?} is the container's root, where nothing can be mounted"
            )),
            Ok(place) if is_ours(&place) => problems.push(format!(
                "container {name:?}: mountPath {path:?} lies in {KNOC_FOLDER}, which KNoC needs itself; mount the volume elsewhere"
            )),
            // Compared literally, as by the API server; if two paths differ only in form, the later mount covers the
            // earlier one.
            Ok(_) if !places.insert(path) => problems.push(format!(
                "container {name:?} mounts twice at mountPath {path:?}"
            )),
            Ok(place) => problems.extend(
                device_problem(container, &place)
                    .map(|why| format!("container {name:?}: mountPath {path:?} {why}")),
            ),
        }
        if !sub_path.is_empty()
            && let Err(error) = paths::in_volume(sub_path)
        {
            problems.push(format!("container {name:?}: subPath {sub_path:?} {error}"));
        }
        let template = &mount.sub_path_expr;
        if !template.is_empty() && !sub_path.is_empty() {
            problems.push(format!(
                "container {name:?}: mountPath {path:?} has both a subPath and a subPathExpr"
            ));
        }
        if has_control(template) {
            problems.push(format!(
                "container {name:?}: subPathExpr {template:?} must not contain control characters"
            ));
        }
    }
}

/// The values of a pod, which have passed all checks against its shape. The default has no value at all, which suits
/// every shape.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PodValues(pb::PodValues);

impl PodValues {
    /// Checks `values` against the shape that they belong to, and cleans the paths of their files.
    pub fn check(mut values: pb::PodValues, spec: &PodSpec) -> Result<Self, InvalidPod> {
        let mut problems = Vec::new();
        for env in &values.env {
            if spec.container(&env.container).is_none() {
                problems.push(format!(
                    "environment of the unknown container {:?}",
                    env.container
                ));
            }
            for var in &env.vars {
                check_variable(&env.container, var, &mut problems);
            }
        }
        // An ephemeral container may be added later than its environment.
        for env in &values.ephemeral_env {
            for var in &env.vars {
                check_variable(&env.container, var, &mut problems);
            }
        }
        for volume in &mut values.files {
            let is_files = spec.volumes.iter().any(|known| {
                known.name == volume.volume
                    && matches!(known.source, Some(pb::volume::Source::Files(_)))
            });
            if !is_files {
                problems.push(format!(
                    "files of {:?}, which is not a volume with files",
                    volume.volume
                ));
            }
            check_files(volume, &mut problems);
        }
        if problems.is_empty() {
            Ok(Self(values))
        } else {
            Err(InvalidPod { problems })
        }
    }

    /// Returns the message.
    #[must_use]
    pub fn into_inner(self) -> pb::PodValues {
        self.0
    }
}

impl Deref for PodValues {
    type Target = pb::PodValues;

    fn deref(&self) -> &pb::PodValues {
        &self.0
    }
}

/// Checks one variable. An error never shows its value, which may be secret.
fn check_variable(container: &str, var: &pb::EnvVar, problems: &mut Vec<String>) {
    let name = &var.name;
    if let Err(why) = names::environment_variable(name) {
        let name = quote(name, SHOWN);
        problems.push(format!(
            "container {container:?}: the variable {name}: {why}"
        ));
    }
    let nul = match &var.value {
        Some(pb::env_var::Value::Literal(bytes)) => bytes.contains(&0),
        Some(pb::env_var::Value::Template(text)) => text.contains('\0'),
        Some(pb::env_var::Value::Runtime(field)) => {
            let known = pb::RuntimeField::try_from(*field);
            if !known.is_ok_and(|field| field != pb::RuntimeField::Unspecified) {
                problems.push(format!(
                    "container {container:?}: {name} refers to an unknown field"
                ));
            }
            false
        }
        Some(pb::env_var::Value::File(file)) => {
            if let Err(error) = paths::of_file(&file.path) {
                let path = quote(&file.path, SHOWN);
                problems.push(format!(
                    "container {container:?}: {name} comes from the file {path}, which {error}"
                ));
            }
            if let Err(why) = names::environment_variable(&file.key) {
                let key = quote(&file.key, SHOWN);
                problems.push(format!(
                    "container {container:?}: {name} comes from the key {key}: {why}"
                ));
            }
            false
        }
        None => {
            problems.push(format!(
                "container {container:?}: the variable {name:?} has no value"
            ));
            false
        }
    };
    if nul {
        problems.push(format!(
            "container {container:?}: the value of {name} contains a NUL byte"
        ));
    }
}

impl pb::ContainerStatus {
    /// The image with which the container starts next.
    #[must_use]
    pub fn image_of_next_start(&self) -> &str {
        if self.next_image.is_empty() {
            &self.image
        } else {
            &self.next_image
        }
    }
}

/// Why a pod with a container that asks for `privileged` is rejected.
#[must_use]
pub fn no_privileges(container: &str) -> String {
    format!(
        "spec.containers[{container}].securityContext.privileged (`true`): an ordinary user cannot give privileges; leave it \
         out, or have the site run such containers without privileges (`policy.privileged` of its site file)"
    )
}

fn has_control(text: &str) -> bool {
    text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests;
