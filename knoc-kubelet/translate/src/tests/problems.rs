//! What is wrong with a pod is told as a whole, and by name.

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
