use std::sync::Arc;

use k8s_openapi::api::networking::v1::NetworkPolicy;
use knoc_proto::pb::{NetworkMode, PodPhase};
use serde_json::{Value, json};

use super::*;

/// A running pod of `team` with this UID and address, whose containers declare these ports.
fn pod(uid: &str, address: &str, ports: &Value) -> PodView {
    let object = json!({
        "metadata": {"namespace": "team", "name": uid, "uid": uid, "labels": {"app": "web"}},
        "spec": {
            "containers": [{"name": "main", "ports": ports}],
            "initContainers": [{"name": "once", "ports": [{"containerPort": 1}]}],
        },
        "status": {"phase": "Running"},
    });
    PodView {
        uid: uid.parse().unwrap(),
        pod: Arc::new(serde_json::from_value(object).unwrap()),
        observed: Some(Arc::new(observed(
            PodPhase::Running,
            NetworkMode::Private,
            address,
        ))),
    }
}

fn observed(phase: PodPhase, mode: NetworkMode, address: &str) -> pb::PodObserved {
    let network = pb::PodNetwork {
        mode: mode.into(),
        address: address.to_owned(),
        ..pb::PodNetwork::default()
    };
    pb::PodObserved {
        phase: phase.into(),
        network: Some(network),
        ..pb::PodObserved::default()
    }
}

/// The listeners for these pods, and what is refused.
fn planned(pods: &[PodView], policies: &Policies) -> (Vec<String>, Vec<String>) {
    with(pods, &[], policies)
}

fn with(pods: &[PodView], services: &[Service], policies: &Policies) -> (Vec<String>, Vec<String>) {
    let range: PodRange = "10.200.0.0/16".parse().unwrap();
    let is_own = |address| range.contains(address);
    let wanted = wanted(pods, services.iter(), is_own, policies);
    let listeners = wanted.listeners.iter();
    let listeners = listeners
        .map(|(key, one)| format!("{} {} {}", key.uid, key.number, one.at))
        .collect();
    let refused = wanted.refused.iter();
    let refused = refused.map(|(uid, why)| format!("{uid}: {why}")).collect();
    (listeners, refused)
}

fn listeners(pods: &[PodView]) -> Vec<String> {
    let (listeners, refused) = planned(pods, &Policies::default());
    assert!(refused.is_empty(), "{refused:?}");
    listeners
}

fn policy(spec: &Value) -> Policies {
    let object = json!({"metadata": {"namespace": "team", "name": "deny"}, "spec": spec});
    let object: NetworkPolicy = serde_json::from_value(object).unwrap();
    let mut policies = Policies::default();
    policies.set(&object);
    policies
}

#[test]
fn the_tcp_ports_that_containers_declare_are_listened_on() {
    let ports = json!([{"containerPort": 80}, {"containerPort": 53, "protocol": "UDP"}, {"containerPort": 80, "protocol": "TCP"},
        {"containerPort": 0}]);
    let mut one = pod("a", "10.200.0.2", &ports);
    assert_eq!(
        listeners(std::slice::from_ref(&one)),
        ["a 80 10.200.0.2:80"]
    );
    let mut object = (*one.pod).clone();
    let sidecar =
        json!([{"name": "side", "restartPolicy": "Always", "ports": [{"containerPort": 8080}]}]);
    object.spec.as_mut().unwrap().init_containers = serde_json::from_value(sidecar).unwrap();
    one.pod = Arc::new(object);
    assert_eq!(
        listeners(&[one]),
        ["a 80 10.200.0.2:80", "a 8080 10.200.0.2:8080"]
    );
}

/// The API server takes port 80 if the pod declares none. Nobody asked for it, so nobody is told if it cannot be had.
#[test]
fn a_pod_that_names_no_port_has_the_one_that_clients_take() {
    let none = [pod("a", "10.200.0.2", &json!([]))];
    assert_eq!(listeners(&none), ["a 80 10.200.0.2:80"]);
    let deny = policy(&json!({"podSelector": {}}));
    assert_eq!(planned(&none, &deny), (Vec::new(), Vec::new()));
}

/// A port needs no declaration to be the target of a Service.
#[test]
fn the_ports_to_which_services_lead_are_listened_on() {
    let service = |selector: &str, ports: &Value| -> Service {
        let object = json!({"metadata": {"namespace": "team", "name": selector},
            "spec": {"clusterIP": "None", "selector": {"app": selector}, "ports": ports}});
        serde_json::from_value(object).unwrap()
    };
    let services = [
        service(
            "web",
            &json!([{"port": 80, "targetPort": 8080}, {"port": 443, "targetPort": "https"}, {"port": 53, "protocol": "UDP"},
            {"port": 1, "targetPort": "nobody"}, {"port": 9000}]),
        ),
        service("db", &json!([{"port": 5432}])),
    ];
    let ports = json!([{"name": "https", "containerPort": 9443}]);
    let (open, refused) = with(
        &[pod("a", "10.200.0.2", &ports)],
        &services,
        &Policies::default(),
    );
    assert!(refused.is_empty(), "{refused:?}");
    let numbers: Vec<_> = open
        .iter()
        .filter_map(|one| one.rsplit_once(':'))
        .map(|(_, port)| port)
        .collect();
    assert_eq!(numbers, ["8080", "9000", "9443"]);
    let (open, _) = with(
        &[pod("a", "10.200.0.2", &json!([]))],
        &services[1..],
        &Policies::default(),
    );
    assert_eq!(
        open,
        ["a 80 10.200.0.2:80"],
        "the one that clients take by themselves"
    );
}

#[test]
fn a_pod_without_a_job_or_without_an_address_of_its_own_has_no_listener() {
    let ports = json!([{"containerPort": 80}]);
    for (phase, mode, address, count) in [
        (PodPhase::Running, NetworkMode::Private, "10.200.0.2", 1),
        (PodPhase::Stopping, NetworkMode::Private, "10.200.0.2", 1),
        (PodPhase::Queued, NetworkMode::Private, "10.200.0.2", 0),
        (PodPhase::Finished, NetworkMode::Private, "10.200.0.2", 0),
        (PodPhase::Running, NetworkMode::Host, "10.200.0.2", 0),
        (PodPhase::Running, NetworkMode::Private, "", 0),
        // An agent does not choose at which addresses of its host the kubelet listens.
        (PodPhase::Running, NetworkMode::Private, "127.0.0.1", 0),
        (PodPhase::Running, NetworkMode::Private, "10.201.0.2", 0),
        (PodPhase::Running, NetworkMode::Private, "::1", 0),
    ] {
        let mut one = pod("a", "", &ports);
        one.observed = Some(Arc::new(observed(phase, mode, address)));
        assert_eq!(
            listeners(&[one]).len(),
            count,
            "{phase:?} {mode:?} {address}"
        );
    }
    let mut unknown = pod("a", "10.200.0.2", &ports);
    unknown.observed = None;
    assert!(listeners(&[unknown]).is_empty());
    let mut ended = pod("a", "10.200.0.2", &ports);
    let mut object = (*ended.pod).clone();
    object.status.as_mut().unwrap().phase = Some("Succeeded".to_owned());
    ended.pod = Arc::new(object);
    assert!(listeners(&[ended]).is_empty());
}

#[test]
fn a_pod_that_a_network_policy_selects_is_refused_by_name() {
    let ports = json!([{"containerPort": 80}]);
    let pods = [
        pod("a", "10.200.0.2", &ports),
        pod("b", "10.200.0.3", &json!([])),
    ];
    let all = policy(&json!({"podSelector": {}}));
    let (open, refused) = planned(&pods, &all);
    assert!(open.is_empty(), "{open:?}");
    assert_eq!(refused.len(), 1, "the other one declares no port");
    assert!(refused[0].contains("NetworkPolicy deny"), "{refused:?}");
    // A pod without labels is selected, too.
    let mut bare = pod("a", "10.200.0.2", &ports);
    let mut object = (*bare.pod).clone();
    object.metadata.labels = None;
    bare.pod = Arc::new(object);
    assert_eq!(planned(&[bare], &all).1.len(), 1);
    let others = policy(&json!({"podSelector": {"matchLabels": {"app": "db"}}}));
    assert_eq!(planned(&pods, &others).0.len(), 2);
}

#[test]
fn an_address_belongs_to_the_older_of_two_pods() {
    let ports = json!([{"containerPort": 80}]);
    let created = |uid: &str, time: &str| {
        let mut one = pod(uid, "10.200.0.2", &ports);
        let mut object = (*one.pod).clone();
        object.metadata.creation_timestamp = serde_json::from_value(json!(time)).unwrap();
        one.pod = Arc::new(object);
        one
    };
    let pods = [
        created("a", "2026-02-02T00:00:00Z"),
        created("b", "2026-01-01T00:00:00Z"),
    ];
    assert_eq!(listeners(&pods), ["b 80 10.200.0.2:80"]);
}

#[test]
fn a_pod_gets_so_many_listeners_and_the_node_as_well() {
    let ports = |count: usize| {
        let ports = (1..=count).map(|number| json!({"containerPort": number}));
        Value::from(ports.collect::<Vec<_>>())
    };
    let (open, refused) = planned(&[pod("a", "10.200.0.2", &ports(40))], &Policies::default());
    assert_eq!((open.len(), refused.len()), (OF_POD, 1));
    assert!(
        refused[0].contains("on port 33, and perhaps others"),
        "{refused:?}"
    );
    let pods: Vec<_> = (0..=OF_NODE / 2)
        .map(|number| {
            let address = format!("10.200.{}.{}", number / 256, number % 256);
            pod(&format!("p-{number}"), &address, &ports(2))
        })
        .collect();
    let (open, refused) = planned(&pods, &Policies::default());
    assert_eq!(open.len(), OF_NODE);
    let firsts = open.iter().filter(|one| one.ends_with(":1")).count();
    assert_eq!(firsts, pods.len(), "each pod has its first port");
    assert_eq!(refused.len(), 2);
    assert!(refused[0].contains("have 4096 such ports"), "{refused:?}");
}

#[test]
fn a_listener_that_cannot_be_made_says_what_helps() {
    let at = "10.200.0.2:80".parse().unwrap();
    let range = "10.200.0.0/16".parse().ok();
    for (kind, expected) in [
        (
            io::ErrorKind::AddrNotAvailable,
            "`ip route add local 10.200.0.0/16 dev lo`",
        ),
        (
            io::ErrorKind::PermissionDenied,
            "net.ipv4.ip_unprivileged_port_start of its host to 80 or less",
        ),
        (io::ErrorKind::AddrInUse, "another program"),
        (io::ErrorKind::OutOfMemory, "out of memory"),
    ] {
        let text = failure(at, range, &kind.into());
        assert!(
            text.contains(expected) && text.contains("10.200.0.2:80"),
            "{text}"
        );
    }
}
