use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::*;

const GI: i64 = 1 << 30;

/// A node with 4 CPUs and 8 GiB in Slurm, a queue factor of 10, and room for 3 pods.
fn node() -> Allocatable {
    let total = pb::NodeInfo {
        cpu: 4,
        memory_bytes: 8 * GI,
        extended: [("nvidia.com/gpu".to_owned(), 2)].into(),
        ..pb::NodeInfo::default()
    };
    Allocatable::of(Some(&total), 3, 10)
}

fn shape(spec: &Value) -> pb::PodSpec {
    let pod = json!({"metadata": {"name": "p", "uid": "u"}, "spec": spec});
    let pod: Pod = serde_json::from_value(pod).unwrap();
    knoc_translate::shape(&pod).unwrap()
}

fn asks(requests: &Value) -> Amounts {
    requests_of(&json!([{"name": "a", "image": "i", "resources": {"requests": requests}}]))
}

fn requests_of(containers: &Value) -> Amounts {
    requests(&shape(&json!({"containers": containers})))
}

fn uid(name: &str) -> PodUid {
    name.parse().unwrap()
}

fn amounts(list: &[(&str, i64)]) -> Amounts {
    list.iter()
        .map(|(name, amount)| ((*name).to_owned(), *amount))
        .collect()
}

#[test]
fn requests_are_summed_and_the_largest_init_container_counts() {
    let container = |name: &str, requests: Value| json!({"name": name, "image": "i", "resources": {"requests": requests}});
    for (what, init, regular, expected) in [
        (
            "nothing",
            json!([]),
            json!([container("a", json!({}))]),
            amounts(&[]),
        ),
        (
            "two containers",
            json!([]),
            json!([
                container("a", json!({"cpu": "100m", "memory": "1Gi"})),
                container("b", json!({"cpu": "1", "nvidia.com/gpu": "1"})),
            ]),
            amounts(&[("cpu", 1100), ("memory", GI), ("nvidia.com/gpu", 1)]),
        ),
        (
            "a large init container",
            json!([container("i", json!({"cpu": "3", "memory": "1Mi"}))]),
            json!([
                container("a", json!({"cpu": "1", "memory": "1Gi"})),
                container("b", json!({"cpu": "1"}))
            ]),
            amounts(&[("cpu", 3000), ("memory", GI)]),
        ),
        (
            "init containers run one by one",
            json!([
                container("i", json!({"cpu": "1"})),
                container("j", json!({"cpu": "1"}))
            ]),
            json!([container("a", json!({"cpu": "1500m"}))]),
            amounts(&[("cpu", 1500)]),
        ),
    ] {
        let shape = shape(&json!({"initContainers": init, "containers": regular}));
        assert_eq!(requests(&shape), expected, "{what}");
    }
}

#[test]
fn the_pod_as_a_whole_comes_before_its_containers_and_its_overhead_is_added() {
    let containers = json!([{"name": "a", "image": "i",
        "resources": {"requests": {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": "1"}}}]);
    let shape = shape(&json!({
        "containers": containers,
        "resources": {"requests": {"cpu": "3"}, "limits": {"cpu": "4"}},
        "overhead": {"cpu": "250m", "memory": "1Gi"},
    }));
    let expected = amounts(&[("cpu", 3250), ("memory", 2 * GI), ("nvidia.com/gpu", 1)]);
    assert_eq!(requests(&shape), expected);
    let job = shape.job.unwrap();
    assert_eq!((job.cpu_millis, job.memory_bytes), (3250, 2 * GI));
}

#[test]
fn each_resource_is_named_in_the_message_of_kubernetes() {
    for (used, asked, expected) in [
        (json!({}), json!({"cpu": "40"}), None),
        (
            json!({}),
            json!({"cpu": "40001m"}),
            Some("cpu, requested: 40001, used: 0, capacity: 40000"),
        ),
        (json!({"cpu": "39"}), json!({"cpu": "1"}), None),
        (
            json!({"cpu": "39"}),
            json!({"cpu": "1100m"}),
            Some("cpu, requested: 1100, used: 39000, capacity: 40000"),
        ),
        (json!({"cpu": "41"}), json!({}), None),
        (
            json!({"memory": "80Gi"}),
            json!({"memory": "1"}),
            Some("memory, requested: 1, used: 85899345920, capacity: 85899345920"),
        ),
        (
            json!({"nvidia.com/gpu": "19"}),
            json!({"nvidia.com/gpu": "2"}),
            Some("nvidia.com/gpu, requested: 2, used: 19, capacity: 20"),
        ),
        (
            json!({}),
            json!({"example.com/fpga": "1"}),
            Some("example.com/fpga, requested: 1, used: 0, capacity: 0"),
        ),
        (json!({}), json!({"ephemeral-storage": "1Ti"}), None),
        // If several are short, the first in the order of Kubernetes.
        (
            json!({}),
            json!({"memory": "81Gi", "cpu": "41", "a.b/c": "1"}),
            Some("cpu, requested: 41000, used: 0, capacity: 40000"),
        ),
    ] {
        let mut room = Allocations::default();
        room.hold(&uid("before"), asks(&used));
        let said = room.allocate(&uid("new"), asks(&asked), &node());
        let said = said.map_err(|short| short.to_string()).err();
        let expected = expected.map(|text| format!("Node didn't have enough resource: {text}"));
        assert_eq!(said, expected, "{used} then {asked}");
    }
}

#[test]
fn pods_are_counted_before_anything_else() {
    let mut room = Allocations::default();
    for name in ["a", "b", "c"] {
        room.allocate(&uid(name), amounts(&[]), &node()).unwrap();
    }
    let short = room.allocate(&uid("d"), asks(&json!({"cpu": "100"})), &node());
    assert_eq!(
        short.unwrap_err().to_string(),
        "Node didn't have enough resource: pods, requested: 1, used: 3, capacity: 3"
    );
}

#[test]
fn the_site_may_have_fewer_jobs_than_the_node_has_pods() {
    let total = pb::NodeInfo {
        pod_limit: 2,
        ..pb::NodeInfo::default()
    };
    let of = Allocatable::of(Some(&total), 3, 10);
    assert_eq!(
        (of.pods, of.amounts),
        (2, None),
        "not known yet, so not checked"
    );
    assert_eq!(Allocatable::of(None, 3, 10).pods, 3);
}

#[test]
fn an_ended_pod_frees_its_allocation_and_a_rejected_pod_has_none() {
    let mut room = Allocations::default();
    let all = asks(&json!({"cpu": "40"}));
    room.allocate(&uid("a"), all.clone(), &node()).unwrap();
    room.allocate(&uid("b"), all.clone(), &node()).unwrap_err();
    room.release(&uid("b"));
    room.allocate(&uid("b"), asks(&json!({"cpu": "1m"})), &node())
        .unwrap_err();
    room.release(&uid("a"));
    room.release(&uid("a"));
    room.allocate(&uid("b"), all, &node()).unwrap();
}

#[test]
fn the_same_pod_counts_once() {
    let mut room = Allocations::default();
    for _ in 0..3 {
        room.hold(&uid("a"), asks(&json!({"cpu": "20"})));
        room.allocate(&uid("b"), asks(&json!({"cpu": "20"})), &node())
            .unwrap();
    }
}

#[test]
fn accepted_pods_stay_if_the_node_shrinks() {
    let mut room = Allocations::default();
    room.hold(&uid("a"), asks(&json!({"cpu": "100"})));
    let short = room
        .allocate(&uid("b"), asks(&json!({"cpu": "1"})), &node())
        .unwrap_err();
    assert_eq!((short.used, short.capacity), (100_000, 40_000));
    room.allocate(&uid("b"), asks(&json!({"memory": "1Gi"})), &node())
        .unwrap();
}

#[test]
fn huge_sums_return_to_zero() {
    let mut room = Allocations::default();
    let huge = amounts(&[("cpu", i64::MAX)]);
    room.hold(&uid("a"), huge.clone());
    room.hold(&uid("b"), huge);
    room.release(&uid("a"));
    room.release(&uid("b"));
    room.allocate(&uid("c"), asks(&json!({"cpu": "40"})), &node())
        .unwrap();
}

#[test]
fn before_slurm_has_answered_only_pods_are_counted() {
    let mut room = Allocations::default();
    let unknown = Allocatable::of(None, 1, 10);
    room.allocate(&uid("a"), asks(&json!({"cpu": "1000"})), &unknown)
        .unwrap();
    let short = room
        .allocate(&uid("b"), amounts(&[]), &unknown)
        .unwrap_err();
    assert_eq!(short.resource, "pods");
}

#[test]
fn what_somebody_else_put_into_the_capacity_is_counted() {
    let mut room = Allocations::default();
    let licences = |count: &str| asks(&json!({"example.com/licence": count}));
    let short = room
        .allocate(&uid("a"), licences("2"), &node())
        .unwrap_err();
    assert_eq!(
        (short.resource.as_str(), short.capacity),
        ("example.com/licence", 0)
    );
    let node = node().with(amounts(&[("example.com/licence", 5)]));
    room.allocate(&uid("a"), licences("2"), &node).unwrap();
    room.allocate(&uid("b"), licences("2"), &node).unwrap();
    let short = room.allocate(&uid("c"), licences("2"), &node).unwrap_err();
    assert_eq!((short.used, short.capacity), (4, 5));
    room.release(&uid("a"));
    room.allocate(&uid("c"), licences("2"), &node).unwrap();
}
