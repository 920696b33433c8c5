//! What is wrong with a pod is told as a whole, and by name; and what is said to be required is used if it is there.

use super::*;

#[test]
fn all_bad_numbers_are_named() {
    let mut pod = pod();
    pod.metadata.annotations = Some(
        [
            ("knoc.io/time", "soon"),
            ("knoc.io/ntasks", "0"),
            ("slurm.hpk.io/flags", "'"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into(),
    );
    let problems = shape(&pod).unwrap_err();
    assert_eq!(problems.len(), 3, "{problems:?}");
}

#[test]
fn a_problem_of_a_container_names_the_list_that_it_is_in() {
    let mut pod = pod();
    let spec = pod.spec.as_mut().unwrap();
    let port = json!([{"containerPort": 53, "hostPort": 53, "protocol": "SCTP"}]);
    let ports: Option<Vec<core::ContainerPort>> = serde_json::from_value(port).unwrap();
    spec.init_containers.as_mut().unwrap()[0].ports = ports.clone();
    spec.containers[1].ports = ports;
    spec.containers[1].image = None;
    let problems = shape(&pod).unwrap_err();
    let starts = [
        "spec.initContainers[init].ports: hostPort 53",
        "spec.containers[side].image is missing",
        "spec.containers[side].ports: hostPort 53",
    ];
    assert_eq!(problems.len(), starts.len(), "{problems:?}");
    for (problem, start) in problems.iter().zip(starts) {
        assert!(problem.starts_with(start), "{problem}");
    }
}

#[test]
fn what_is_said_not_to_be_optional_is_used_if_it_is_there() {
    let mut pod = pod();
    let spec = pod.spec.as_mut().unwrap();
    let env = json!([
        {"name": "C", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "k", "optional": false}}},
        {"name": "S", "valueFrom": {"secretKeyRef": {"name": "sec", "key": "k", "optional": false}}},
    ]);
    spec.containers[0].env = serde_json::from_value(env).unwrap();
    let from = json!([{"configMapRef": {"name": "cm", "optional": false}}, {"secretRef": {"name": "sec", "optional": false}}]);
    spec.containers[0].env_from = serde_json::from_value(from).unwrap();
    let volumes = json!([
        {"name": "c", "configMap": {"name": "cm", "optional": false}},
        {"name": "s", "secret": {"secretName": "sec", "optional": false}},
        {"name": "p", "projected": {"sources": [
            {"configMap": {"name": "cm", "optional": false}}, {"secret": {"name": "sec", "optional": false}},
        ]}},
    ]);
    spec.volumes = serde_json::from_value(volumes).unwrap();
    let mut resolved = resolved();
    let map = serde_json::from_value(json!({"data": {"k": "v"}})).unwrap();
    resolved.config_maps.insert("cm".to_owned(), map);
    let secret = serde_json::from_value(json!({"data": {"s": "cw==", "k": "cw=="}})).unwrap();
    resolved.secrets.insert("sec".to_owned(), secret);
    let values = values(&pod, &resolved).unwrap().values;
    let files = values.files.iter();
    let count = |volume: &pb::VolumeFiles| (volume.volume.clone(), volume.files.len());
    let counts: Vec<_> = files.map(count).collect();
    let of = |name: &str, count: usize| (name.to_owned(), count);
    assert_eq!(counts, [of("c", 1), of("s", 2), of("p", 2)]);
    // Without the objects, each of them is missed.
    resolved.config_maps.clear();
    resolved.secrets.clear();
    assert!(matches!(super::values(&pod, &resolved), Err(Missing::Mounts(all)) if all.len() == 4));
}

fn pod_of(container: &Value, volume: &Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "ns", "uid": "u-1"},
        "spec": {"containers": [container], "volumes": [volume]},
    }))
    .unwrap()
}

/// The values of a pod with this container and this volume, and a `ConfigMap` and a Secret that have a key of a megabyte.
fn large(container: &Value, volume: &Value) -> Result<Values, Missing> {
    let (mut container, mut volume) = (container.clone(), volume.clone());
    container["name"] = json!("main");
    volume["name"] = json!("v");
    let pod = pod_of(&container, &volume);
    let mut resolved = resolved();
    let text = "x".repeat(1 << 20);
    let map = core::ConfigMap {
        data: Some([("k".to_owned(), text.clone())].into()),
        ..core::ConfigMap::default()
    };
    let bytes = k8s_openapi::ByteString(text.into_bytes());
    let secret = core::Secret {
        data: Some([("k".to_owned(), bytes)].into()),
        ..core::Secret::default()
    };
    resolved.config_maps.insert("cm".to_owned(), map);
    resolved.secrets.insert("sec".to_owned(), secret);
    values(&pod, &resolved)
}

#[test]
fn a_key_that_is_asked_for_many_times_is_sent_only_if_a_message_has_room() {
    let files = |count: usize| {
        let items: Vec<_> = (0..count)
            .map(|n| json!({"key": "k", "path": format!("{n}")}))
            .collect();
        json!({"configMap": {"name": "cm", "items": items}})
    };
    let none = json!({"emptyDir": {}});
    let few = large(&json!({}), &files(19)).unwrap().values.files;
    assert_eq!(few[0].files.len(), 19);
    let variables = |source: &str, count: usize| {
        let name = if source == "secretKeyRef" {
            "sec"
        } else {
            "cm"
        };
        let one = |n: usize| json!({"name": format!("V{n}"), "valueFrom": {source: {"name": name, "key": "k"}}});
        json!({"env": (0..count).map(one).collect::<Vec<_>>()})
    };
    let from = vec![json!({"secretRef": {"name": "sec"}}); 5000];
    let sources = vec![json!({"secret": {"name": "sec"}}); 5000];
    for (container, volume) in [
        (json!({}), files(5000)),
        (variables("secretKeyRef", 5000), none.clone()),
        (variables("configMapKeyRef", 5000), none.clone()),
        (json!({"envFrom": from}), none),
        (json!({}), json!({"projected": {"sources": sources}})),
        // Together it is too much as well.
        (variables("configMapKeyRef", 10), files(10)),
    ] {
        let Err(Missing::Mounts(why)) = large(&container, &volume) else {
            panic!("all of it was sent");
        };
        assert_eq!(why, [size::TOO_MUCH]);
    }
}

#[test]
fn the_variables_of_very_many_services_are_not_sent_for_every_container() {
    let mut resolved = resolved();
    let service = |n: usize| (format!("S{n}_SERVICE_HOST"), "10.0.0.1".to_owned());
    resolved.services = (0..100_000).map(service).collect();
    let mut pod = pod();
    let spec = pod.spec.as_mut().unwrap();
    let names = (0..20).map(|n| format!("c{n}"));
    let side = spec.containers[1].clone();
    let side = |name| core::Container {
        name,
        ..side.clone()
    };
    spec.containers.extend(names.map(side));
    let Err(Missing::Mounts(why)) = values(&pod, &resolved) else {
        panic!("all were sent");
    };
    assert!(why[0].contains("enableServiceLinks"), "{why:?}");
}
