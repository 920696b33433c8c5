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
