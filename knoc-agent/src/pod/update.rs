//! PURE: what a newer generation of a pod's shape may change.

use knoc_proto::{pb, pod::PodSpec};

/// The shape that `new` makes of `old`: ephemeral containers are never removed, although an older
/// kubelet does not send them.
pub(super) fn merged(old: &pb::PodSpec, new: PodSpec) -> PodSpec {
    let uid = new.uid().clone();
    let mut new = new.into_inner();
    let sent = std::mem::take(&mut new.ephemeral_containers);
    let mut all = old.ephemeral_containers.clone();
    let known = |name: &str| old.ephemeral_containers.iter().any(|one| one.name == name);
    all.extend(sent.into_iter().filter(|one| !known(&one.name)));
    new.ephemeral_containers = all;
    // Its shim may have an address of that range.
    new.pod_range.clone_from(&old.pod_range);
    PodSpec::accepted_before(uid, new)
}

/// Whether a container has another image in `new` than in `old`.
pub(super) fn changes_images(old: &pb::PodSpec, new: &pb::PodSpec) -> bool {
    let images = |spec: &pb::PodSpec| -> Vec<String> {
        let all = spec.init_containers.iter().chain(&spec.containers);
        all.map(|container| container.image.clone()).collect()
    };
    images(old) != images(new)
}

/// Whether `new` may replace `old`. Labels, annotations and images may change, `activeDeadlineSeconds`
/// may be lowered, and ephemeral containers may be added.
pub(super) fn allowed(old: &pb::PodSpec, new: &pb::PodSpec) -> Result<(), String> {
    let deadline_falls = new.active_deadline_seconds > 0
        && (old.active_deadline_seconds == 0
            || new.active_deadline_seconds <= old.active_deadline_seconds);
    if new.active_deadline_seconds != old.active_deadline_seconds && !deadline_falls {
        return Err("activeDeadlineSeconds may only be lowered".to_owned());
    }
    for known in &old.ephemeral_containers {
        let mut sent = new.ephemeral_containers.iter();
        if sent.any(|one| one.name == known.name && !same_container(one, known)) {
            return Err(format!(
                "the ephemeral container {:?} exists, and cannot change",
                known.name
            ));
        }
    }
    let comparable = |spec: &pb::PodSpec| {
        let mut spec = pb::PodSpec {
            generation: 0,
            active_deadline_seconds: 0,
            ephemeral_containers: Vec::new(),
            ..spec.clone()
        };
        let containers = spec.init_containers.iter_mut().chain(&mut spec.containers);
        containers.for_each(|container| container.image.clear());
        spec
    };
    if same(&comparable(old), &comparable(new)) {
        Ok(())
    } else {
        Err(format!(
            "pod {} exists: only labels, annotations, images and a lower activeDeadlineSeconds may change, and ephemeral containers may be added",
            old.uid
        ))
    }
}

/// Whether they are the same request. These make no difference: labels and annotations, which change
/// without a newer generation; a field that older kubelets did not send although they accepted its
/// pods, and that cannot change in Kubernetes; and what comes from the kubelet's configuration, which
/// may change while a pod runs.
pub(super) fn same(old: &pb::PodSpec, new: &pb::PodSpec) -> bool {
    let comparable = |spec: &pb::PodSpec| {
        let mut spec = spec.clone();
        let containers = spec.init_containers.iter_mut().chain(&mut spec.containers);
        containers.for_each(forget_additions);
        spec.labels.clear();
        spec.annotations.clear();
        spec.cluster_domain.clear();
        spec.resolver = None;
        spec.pod_range.clear();
        spec.node_hostname = false;
        // An older kubelet does not send them.
        spec.ephemeral_containers.clear();
        spec
    };
    old == new || comparable(old) == comparable(new)
}

/// Whether `new` has an ephemeral container that `old` lacks.
pub(super) fn adds(old: &pb::PodSpec, new: &pb::PodSpec) -> bool {
    let known = |name: &str| old.ephemeral_containers.iter().any(|one| one.name == name);
    new.ephemeral_containers.iter().any(|one| !known(&one.name))
}

/// Clears what older kubelets did not send.
fn forget_additions(container: &mut pb::Container) {
    container.run_as_user = None;
    container.run_as_group = None;
    container.run_as_non_root = false;
}

fn same_container(one: &pb::Container, other: &pb::Container) -> bool {
    let comparable = |container: &pb::Container| {
        let mut container = container.clone();
        forget_additions(&mut container);
        container
    };
    one == other || comparable(one) == comparable(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_contract_allows() {
        let old = pb::PodSpec {
            uid: "u".into(),
            active_deadline_seconds: 60,
            ..Default::default()
        };
        let with = |change: fn(&mut pb::PodSpec)| {
            let mut new = old.clone();
            new.generation = 2;
            change(&mut new);
            allowed(&old, &new)
        };
        with(|_| ()).unwrap();
        with(|spec| spec.active_deadline_seconds = 30).unwrap();
        with(|spec| drop(spec.labels.insert("a".into(), "b".into()))).unwrap();
        let with_image = |image: &str, args: &[&str]| pb::PodSpec {
            containers: vec![pb::Container {
                image: image.into(),
                args: args.iter().map(|&arg| arg.into()).collect(),
                ..Default::default()
            }],
            ..old.clone()
        };
        let (one, other) = (with_image("a", &[]), with_image("b", &[]));
        allowed(&one, &other).unwrap();
        assert!(changes_images(&one, &other) && !changes_images(&one, &one));
        allowed(&one, &with_image("b", &["x"])).unwrap_err();
        with(|spec| spec.active_deadline_seconds = 90).unwrap_err();
        with(|spec| spec.active_deadline_seconds = 0).unwrap_err();
        with(|spec| spec.hostname = "x".into()).unwrap_err();
        let of = |run_as_user| pb::PodSpec {
            containers: vec![pb::Container {
                run_as_user,
                ..Default::default()
            }],
            ..old.clone()
        };
        allowed(&of(None), &of(Some(1000))).unwrap();
        assert!(same(&of(None), &of(Some(1000))));
        assert!(!same(&of(None), &old));
    }

    #[test]
    fn labels_and_annotations_of_one_generation_are_no_conflict() {
        let old = pb::PodSpec::default();
        let mut new = old.clone();
        let ready = ("tekton.dev/ready".to_owned(), "READY".to_owned());
        new.annotations.extend([ready.clone()]);
        new.labels.extend([ready]);
        assert!(same(&old, &new));
        new.hostname = "x".into();
        assert!(!same(&old, &new));
    }

    #[test]
    fn ephemeral_containers_are_added_and_neither_changed_nor_removed() {
        let with = |names: &[&str], image: &str| pb::PodSpec {
            uid: "u".into(),
            ephemeral_containers: names
                .iter()
                .map(|name| pb::Container {
                    name: (*name).into(),
                    image: image.into(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        };
        let old = with(&["a"], "x");
        allowed(&old, &with(&["a", "b"], "x")).unwrap();
        allowed(&old, &with(&[], "x")).unwrap();
        let error = allowed(&old, &with(&["a"], "y")).unwrap_err();
        assert!(error.contains("\"a\""), "{error}");
        let uid = knoc_proto::ids::PodUid::try_from("u").unwrap();
        let merge = |new| {
            let new = PodSpec::accepted_before(uid.clone(), new);
            let all = merged(&old, new).into_inner().ephemeral_containers;
            let names: Vec<_> = all.into_iter().map(|one| one.name).collect();
            names.join(" ")
        };
        assert_eq!(merge(with(&["b", "a"], "x")), "a b");
        assert!(adds(&old, &with(&["a", "b"], "x")));
        assert!(!adds(&old, &with(&["a"], "x")) && !adds(&old, &with(&[], "x")));
        assert_eq!(merge(with(&[], "x")), "a");
    }

    #[test]
    fn what_an_older_kubelet_left_out_is_no_conflict() {
        let old = pb::PodSpec {
            uid: "u".into(),
            active_deadline_seconds: 60,
            containers: vec![pb::Container::default()],
            ..Default::default()
        };
        let mut new = old.clone();
        new.generation = 2;
        new.active_deadline_seconds = 30;
        new.containers[0].run_as_non_root = true;
        new.containers[0].run_as_group = Some(1);
        new.cluster_domain = "cluster.local".into();
        new.resolver = Some(pb::Resolver::default());
        new.node_hostname = true;
        allowed(&old, &new).unwrap();
        new.containers[0].privileged = true;
        allowed(&old, &new).unwrap_err();
    }
}
