//! The pod as it came over the wire, checked once: what follows may rely on it.
//!
//! Pure. [`PodSpec`] and [`PodValues`] wrap the generated messages and prove that every name, path and reference in
//! them is sound; they are read by [`std::ops::Deref`]. All that is wrong is said in one message.
use std::{collections::HashSet, fmt, ops::Deref};

use crate::{
    ids::{ContainerName, PodUid},
    paths, pb,
};

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

fn check_names(spec: &pb::PodSpec, problems: &mut Vec<String>) {
    for (what, name) in [("name", &spec.name), ("namespace", &spec.namespace)] {
        if !is_dns_name(name) {
            problems.push(format!("the {what} {name:?} is not a DNS name"));
        }
    }
    if !spec.hostname.is_empty() && !is_dns_name(&spec.hostname) {
        problems.push(format!(
            "the hostname {:?} is not a DNS name",
            spec.hostname
        ));
    }
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
    for alias in &spec.host_aliases {
        if alias.ip.parse::<std::net::IpAddr>().is_err() {
            problems.push(format!(
                "the host alias {:?} is not an IP address",
                alias.ip
            ));
        }
        for name in alias.hostnames.iter().filter(|name| !is_dns_name(name)) {
            problems.push(format!("the host alias {name:?} is not a DNS name"));
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

/// A pod's values that passed all checks against its shape.
#[derive(Debug, Clone, PartialEq)]
pub struct PodValues(pb::PodValues);

impl PodValues {
    /// Checks `values` against the shape they belong to.
    pub fn check(values: pb::PodValues, spec: &PodSpec) -> Result<Self, InvalidPod> {
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
        for volume in &values.files {
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
            for file in &volume.files {
                match paths::of_file(&file.path) {
                    Err(error) => problems.push(format!(
                        "volume {:?}: the file path {:?} {error}",
                        volume.volume, file.path
                    )),
                    Ok(path) => {
                        if !known.insert(path) {
                            problems.push(format!(
                                "volume {:?} has {:?} twice",
                                volume.volume, file.path
                            ));
                        }
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
    if !is_variable_name(name) {
        problems.push(format!(
            "container {container:?}: {name:?} is no name of a variable"
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

/// Printable ASCII without `=`, as Kubernetes 1.34 and later accept it.
#[must_use]
pub fn is_variable_name(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|byte| (b' '..=b'~').contains(&byte) && byte != b'=')
}

fn has_control(text: &str) -> bool {
    text.chars().any(char::is_control)
}

fn is_dns_name(name: &str) -> bool {
    let is_label = |label: &str| {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        (1..=63).contains(&label.len())
            && label.bytes().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

#[cfg(test)]
mod tests;
