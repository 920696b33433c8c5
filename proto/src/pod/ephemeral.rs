//! PURE: ephemeral containers, which are added to a pod that exists.

use super::{InvalidPod, PodSpec, check_container};
use crate::pb;

/// The most ephemeral containers of one pod. They are never removed from it.
pub const MAX_EPHEMERAL: usize = 64;

impl PodSpec {
    /// The ephemeral container of this name.
    #[must_use]
    pub fn ephemeral_container(&self, name: &str) -> Option<&pb::Container> {
        let mut all = self.ephemeral_containers.iter();
        all.find(|container| container.name == name)
    }

    /// Checks an ephemeral container that is to be added to a pod of this shape.
    pub fn check_ephemeral(&self, container: &pb::Container) -> Result<(), InvalidPod> {
        let with_it = pb::PodSpec {
            ephemeral_containers: vec![container.clone()],
            ..(**self).clone()
        };
        let mut problems = Vec::new();
        check(&with_it, &mut problems);
        if problems.is_empty() {
            Ok(())
        } else {
            Err(InvalidPod { problems })
        }
    }
}

/// Records what is wrong with the ephemeral containers of a pod.
pub(super) fn check(spec: &pb::PodSpec, problems: &mut Vec<String>) {
    let own = || spec.init_containers.iter().chain(&spec.containers);
    let count = spec.ephemeral_containers.len();
    if count > MAX_EPHEMERAL {
        problems.push(format!(
            "the pod has {count} ephemeral containers; {MAX_EPHEMERAL} are possible"
        ));
    }
    for container in own().filter(|container| !container.target.is_empty()) {
        problems.push(format!(
            "container {:?}: only an ephemeral container has a targetContainerName",
            container.name
        ));
    }
    for (index, container) in spec.ephemeral_containers.iter().enumerate() {
        let name = &container.name;
        let before = spec.ephemeral_containers.iter().take(index);
        if own().chain(before).any(|other| other.name == *name) {
            problems.push(format!("two containers are named {name:?}"));
        }
        let target = &container.target;
        if !target.is_empty() && own().all(|other| other.name != *target) {
            problems.push(format!(
                "container {name:?}: the targetContainerName {target:?} is not a container of the pod"
            ));
        }
        check_container(spec, container, problems);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(name: &str, target: &str) -> pb::Container {
        pb::Container {
            name: name.to_owned(),
            image: "busybox".to_owned(),
            target: target.to_owned(),
            ..pb::Container::default()
        }
    }

    fn problems(main: pb::Container, ephemeral: Vec<pb::Container>) -> String {
        let spec = pb::PodSpec {
            uid: "u".to_owned(),
            namespace: "n".to_owned(),
            name: "p".to_owned(),
            containers: vec![main],
            ephemeral_containers: ephemeral,
            ..pb::PodSpec::default()
        };
        match PodSpec::try_from(spec) {
            Ok(_) => String::new(),
            Err(invalid) => invalid.problems.join("; "),
        }
    }

    #[test]
    fn an_ephemeral_container_has_a_name_of_its_own_and_a_target_in_the_pod() {
        let with = |ephemeral| problems(container("main", ""), ephemeral);
        assert_eq!(with(vec![container("a", "main"), container("b", "")]), "");
        for (ephemeral, problem) in [
            (
                vec![container("main", "")],
                "two containers are named \"main\"",
            ),
            (
                vec![container("a", ""), container("a", "")],
                "two containers are named \"a\"",
            ),
            (
                vec![container("a", "a")],
                "container \"a\": the targetContainerName \"a\" is not a container of the pod",
            ),
        ] {
            assert_eq!(with(ephemeral), problem);
        }
        let many = (0..=MAX_EPHEMERAL).map(|number| container(&format!("c{number}"), ""));
        assert!(with(many.collect()).starts_with("the pod has 65 ephemeral containers"));
        let target = problems(container("main", "main"), Vec::new());
        assert!(target.contains("only an ephemeral container"), "{target}");
    }

    #[test]
    fn a_container_is_checked_before_it_is_added() {
        let spec = pb::PodSpec {
            uid: "u".to_owned(),
            namespace: "n".to_owned(),
            name: "p".to_owned(),
            containers: vec![container("main", "")],
            ..pb::PodSpec::default()
        };
        let spec = PodSpec::try_from(spec).unwrap();
        spec.check_ephemeral(&container("debug", "main")).unwrap();
        for bad in [
            container("main", ""),
            container("Debug", ""),
            container("debug", "other"),
            pb::Container {
                working_dir: "../x".to_owned(),
                ..container("debug", "")
            },
        ] {
            spec.check_ephemeral(&bad).unwrap_err();
        }
    }
}
