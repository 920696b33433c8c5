//! The pod as it came over the wire, checked once: what follows may rely on it.
//!
//! Pure. [`PodSpec`] and [`PodValues`] wrap the generated messages and prove that every name, path and reference in
//! them is sound; they are read by [`std::ops::Deref`]. All that is wrong is said in one message.
use std::{collections::HashSet, fmt, ops::Deref, path::Path, time::Duration};

use crate::{
    ids::{ContainerName, PodUid},
    names::{self, BadName},
    paths, pb,
    text::quote,
};

/// The folder of a container that holds KNoC's launcher and its socket.
pub const KNOC_FOLDER: &str = "/.knoc";

/// How many bytes of a bad name are shown.
const SHOWN: usize = 80;

/// All that is wrong with a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidPod {
    /// One sentence each, in the order of the fields.
    pub problems: Vec<String>,
}

impl fmt::Display for InvalidPod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid pod: {}", self.problems.join("; "))
    }
}

impl std::error::Error for InvalidPod {}

/// A pod's shape that passed all checks.
#[derive(Debug, Clone, PartialEq)]
pub struct PodSpec {
    uid: PodUid,
    spec: pb::PodSpec,
}

impl PodSpec {
    /// The key of the pod.
    #[must_use]
    pub fn uid(&self) -> &PodUid {
        &self.uid
    }

    /// A shape that an agent accepted earlier and wrote down. It passed the checks of the version that accepted it, which
    /// may have been fewer than today's; the pod `uid` may be running, so its shape is not judged a second time.
    #[must_use]
    pub fn accepted_before(uid: PodUid, spec: pb::PodSpec) -> Self {
        Self { uid, spec }
    }

    /// How long the containers may take to end after they were told to.
    #[must_use]
    pub fn grace(&self) -> Duration {
        seconds(self.spec.termination_grace_period_seconds)
    }

    /// How long the pod may run, if that is limited.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        Some(seconds(self.spec.active_deadline_seconds)).filter(|deadline| !deadline.is_zero())
    }

    /// `metadata.generation`, at least 1.
    #[must_use]
    pub fn generation(&self) -> i64 {
        self.spec.generation.max(1)
    }

    /// Init containers and containers, in the order they start.
    pub fn all_containers(&self) -> impl Iterator<Item = &pb::Container> {
        self.spec
            .init_containers
            .iter()
            .chain(&self.spec.containers)
    }

    /// The container of this name, of either kind.
    #[must_use]
    pub fn container(&self, name: &str) -> Option<&pb::Container> {
        self.all_containers()
            .find(|container| container.name == name)
    }

    /// The message again.
    #[must_use]
    pub fn into_inner(self) -> pb::PodSpec {
        self.spec
    }
}

/// Seconds of a message; a negative number counts as none.
fn seconds(seconds: i64) -> Duration {
    Duration::from_secs(seconds.try_into().unwrap_or(0))
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
        match uid {
            Ok(uid) if problems.is_empty() => Ok(Self { uid, spec }),
            Ok(_) | Err(()) => Err(InvalidPod { problems }),
        }
    }
}

/// Notes what is wrong with a name.
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
    // A map of a message has no order, the problems have.
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
                "the volume {name:?} has no source this version knows"
            )),
            Some(pb::volume::Source::HostPath(host)) => {
                if let Err(error) = paths::in_container(&host.path) {
                    problems.push(format!("the host path {:?} {error}", host.path));
                }
            }
            Some(_) => {}
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
            "container {name:?}: the image {:?} is no name",
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
        if !path.is_empty()
            && let Err(error) = paths::in_container(path)
        {
            problems.push(format!("container {name:?}: {field} {path:?} {error}"));
        }
    }
    for argument in container.command.iter().chain(&container.args) {
        if argument.contains('\0') {
            problems.push(format!("container {name:?}: an argument holds a NUL byte"));
        }
    }
    check_mounts(spec, container, problems);
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
            Ok(place) if Path::new(&place).starts_with(KNOC_FOLDER) => problems.push(format!(
                "container {name:?}: mountPath {path:?} lies in {KNOC_FOLDER}, which KNoC needs itself; mount the volume elsewhere"
            )),
            // As the API server compares them; where two differ only in form, the later mount covers the earlier.
            Ok(_) if !places.insert(path) => problems.push(format!(
                "container {name:?} mounts twice at mountPath {path:?}"
            )),
            Ok(_) => {}
        }
        if !sub_path.is_empty()
            && let Err(error) = paths::in_volume(sub_path)
        {
            problems.push(format!("container {name:?}: subPath {sub_path:?} {error}"));
        }
    }
}

/// A pod's values that passed all checks against its shape. The default has no value at all, which suits every shape.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PodValues(pb::PodValues);

impl PodValues {
    /// Checks `values` against the shape they belong to, and cleans the paths of their files.
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
        for volume in &mut values.files {
            let is_files = spec.volumes.iter().any(|known| {
                known.name == volume.volume
                    && matches!(known.source, Some(pb::volume::Source::Files(_)))
            });
            if !is_files {
                problems.push(format!(
                    "files of {:?}, which is no volume of files",
                    volume.volume
                ));
            }
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
                        "volume {:?}: bad mode {:o}",
                        volume.volume, file.mode
                    ));
                }
            }
        }
        if problems.is_empty() {
            Ok(Self(values))
        } else {
            Err(InvalidPod { problems })
        }
    }

    /// The message again.
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

/// Never shows a value: it may be a secret.
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
                    "container {container:?}: {name} asks for an unknown field"
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
            "container {container:?}: the value of {name} holds a NUL byte"
        ));
    }
}

fn has_control(text: &str) -> bool {
    text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests;
