//! PURE: what a newer generation of a pod's shape may change.

use knoc_proto::pb;

/// Whether `new` may replace `old`. Labels and annotations may change, and `activeDeadlineSeconds`
/// may be lowered.
pub(super) fn allowed(old: &pb::PodSpec, new: &pb::PodSpec) -> Result<(), String> {
    let deadline_falls = new.active_deadline_seconds > 0
        && (old.active_deadline_seconds == 0
            || new.active_deadline_seconds <= old.active_deadline_seconds);
    if new.active_deadline_seconds != old.active_deadline_seconds && !deadline_falls {
        return Err("activeDeadlineSeconds may only be lowered".to_owned());
    }
    let comparable = |spec: &pb::PodSpec| pb::PodSpec {
        generation: 0,
        active_deadline_seconds: 0,
        labels: std::collections::HashMap::default(),
        annotations: std::collections::HashMap::default(),
        ..spec.clone()
    };
    if same(&comparable(old), &comparable(new)) {
        Ok(())
    } else {
        Err(format!(
            "pod {} exists, and only labels, annotations and a lower activeDeadlineSeconds may change",
            old.uid
        ))
    }
}

/// Whether they are the same request. These make no difference: a field that older kubelets did not
/// send although they accepted its pods, and that cannot change in Kubernetes; and what comes from
/// the kubelet's configuration, which may change while a pod runs.
pub(super) fn same(old: &pb::PodSpec, new: &pb::PodSpec) -> bool {
    let comparable = |spec: &pb::PodSpec| {
        let mut spec = spec.clone();
        let containers = spec.init_containers.iter_mut().chain(&mut spec.containers);
        containers.for_each(|container| {
            container.run_as_user = None;
            container.run_as_non_root = false;
        });
        spec.cluster_domain.clear();
        spec.resolver = None;
        spec
    };
    old == new || comparable(old) == comparable(new)
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
        new.cluster_domain = "cluster.local".into();
        new.resolver = Some(pb::Resolver::default());
        allowed(&old, &new).unwrap();
        new.containers[0].privileged = true;
        allowed(&old, &new).unwrap_err();
    }
}
