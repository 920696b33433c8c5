//! The address of a pod, by the policy.

use super::*;

#[test]
fn a_pod_has_the_nodes_address_only_if_the_policy_says_so() {
    let mut observed = observed(PodPhase::Running, vec![container("a", running())]);
    observed.host_ip = "10.0.0.7".to_owned();
    let pod = pod("Never", false, &json!({"phase": "Pending"}));
    let of = |pod_ip: PodIp, observed: Option<&pb::PodObserved>| {
        let input = Input {
            pod: &pod,
            observed,
            hold: None,
            rejection: None,
            lacking: &[],
            refused: &[],
            unreachable: false,
            pod_ip,
            judged: pod.metadata.generation,
            now: at(1000),
        };
        let status = status(&input).unwrap();
        let all = status.pod_ips.unwrap_or_default();
        (
            status.pod_ip,
            all.into_iter().map(|one| one.ip).collect::<Vec<_>>(),
        )
    };
    let node = "10.0.0.7".to_owned();
    let both = (Some(node.clone()), vec![node]);
    assert_eq!(of(PodIp::Node, Some(&observed)), both);
    assert_eq!(of(PodIp::None, Some(&observed)), (None, Vec::new()));
    // It is not known yet where the pod runs.
    assert_eq!(of(PodIp::Node, None), (None, Vec::new()));
    assert_eq!(of(PodIp::Own, None), (None, Vec::new()));
    // In the node's network a pod listens on the node's address.
    let network = |mode: pb::NetworkMode, address: &str| {
        Some(pb::PodNetwork {
            mode: mode.into(),
            address: address.to_owned(),
            ..pb::PodNetwork::default()
        })
    };
    observed.network = network(pb::NetworkMode::Host, "");
    assert_eq!(of(PodIp::Own, Some(&observed)), both);
    observed.network = network(pb::NetworkMode::Private, "");
    assert_eq!(of(PodIp::Own, Some(&observed)), (None, Vec::new()));
    observed.network = network(pb::NetworkMode::Private, "10.200.0.7");
    let own = "10.200.0.7".to_owned();
    let own = (Some(own.clone()), vec![own]);
    assert_eq!(of(PodIp::Own, Some(&observed)), own);
    assert_eq!(of(PodIp::None, Some(&observed)), (None, Vec::new()));
    observed.network = network(pb::NetworkMode::Private, "not an address");
    assert_eq!(of(PodIp::Own, Some(&observed)), (None, Vec::new()));
}

#[test]
fn a_pods_own_address_stays_while_it_is_not_known() {
    let address = |pod: &Pod| {
        let input = Input {
            pod,
            observed: None,
            hold: None,
            rejection: None,
            lacking: &[],
            refused: &[],
            unreachable: true,
            pod_ip: PodIp::Own,
            judged: pod.metadata.generation,
            now: at(1000),
        };
        status(&input).unwrap().pod_ip
    };
    let with = |pod_ip: &str| {
        let status = json!({"phase": "Running", "hostIP": "10.0.0.7", "podIP": pod_ip});
        pod("Never", false, &status)
    };
    assert_eq!(address(&with("10.200.0.7")).as_deref(), Some("10.200.0.7"));
    // That of the node is from an earlier policy.
    assert_eq!(address(&with("10.0.0.7")), None);
}
