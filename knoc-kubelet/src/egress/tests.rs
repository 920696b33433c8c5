use std::{collections::HashSet, sync::Arc};

use jiff::Timestamp;
use knoc_link::{Carrier, ExpectPeer};
use knoc_proto::egress::AllowList;
use serde_json::{Value, json};

use super::{decide::Surroundings, *};
use crate::{metrics::traffic::Reason, node::PodIp};

/// A cluster whose API server is at that port of this host, and an agent that nobody reaches.
fn connections(port: u16) -> Connections {
    let api = json!({"metadata": {"namespace": "default", "name": "kubernetes"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "https", "port": 443}]}});
    let slice = json!({"metadata": {"namespace": "default", "name": "kubernetes",
        "labels": {"kubernetes.io/service-name": "kubernetes"}}, "addressType": "IPv4",
        "ports": [{"name": "https", "port": port}], "endpoints": [{"addresses": ["127.0.0.1"]}]});
    of(&[api], &[slice])
}

/// A cluster with these Services and slices, and an agent that nobody reaches.
fn of(services: &[Value], slices: &[Value]) -> Connections {
    let around = Surroundings {
        service_ranges: vec!["10.96.0.0/12".parse().unwrap()],
        nodes: HashSet::new(),
    };
    let cluster = Cluster::of(table::tests::table(services, slices), around);
    let nobody = || {
        let carrier = Carrier::Unix("/there/is/no/agent".into());
        knoc_link::dial(carrier, None, ExpectPeer::AnyAgent).unwrap()
    };
    let setup = Setup {
        config: EgressConfig {
            allow: AllowList::parse(&["default/*"]).unwrap(),
            service_ranges: Vec::new(),
            pod_ranges: Vec::new(),
            dns: None,
        },
        domain: String::new(),
        unit: Arc::new(Unit::fixture(PodIp::Own, Some("10.200.0.0/16"))),
        agent: Agent::new(nobody(), nobody(), "cluster"),
        link: channel::Sender::new(Link::never()).subscribe(),
        store: Store::default(),
        events: Events::channel().0,
        node: "n".to_owned(),
        described: Described::default(),
        traffic: Direction::default(),
    };
    Connections::new(setup, cluster)
}

fn attempt(id: u64, port: u32) -> pb::EgressAttempt {
    pb::EgressAttempt {
        uid: "u".to_owned(),
        id,
        protocol: pb::EgressProtocol::Tcp.into(),
        address: "10.96.0.1".to_owned(),
        port,
    }
}

fn refused(controls: &mut mpsc::Receiver<pb::EgressControl>) -> Option<u64> {
    match controls.try_recv().ok()?.control {
        Some(Control::Refusal(refusal)) => Some(refusal.id),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_connection_that_is_not_made_is_refused_and_makes_room() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut connections = connections(listener.local_addr().unwrap().port());
    let (controls, mut told) = mpsc::channel(4);
    let uid = PodUid::try_from("u").unwrap();
    let mut listener = Some(listener);
    for id in 1..4 {
        connections.take(&attempt(id, 443), &controls);
        assert_eq!(connections.open.get(&uid), Some(&1));
        assert_eq!(connections.of_namespace.get(""), Some(&1));
        assert_eq!(refused(&mut told), None, "it is being made");
        let ended = connections.carried.join_next_with_id().await.unwrap();
        connections.ended(ended, &controls);
        assert_eq!(refused(&mut told), Some(id));
        assert!(connections.open.is_empty() && connections.pods.is_empty());
        assert!(connections.of_namespace.is_empty());
        // At first the agent does not give the pod's side, and then the endpoint does not accept either.
        drop(listener.take());
    }
    drop(listener);
    connections.take(&attempt(4, 80), &controls);
    assert_eq!(refused(&mut told), Some(4), "there is no such port");
    connections.open.insert(uid, OF_ONE);
    connections.take(&attempt(5, 443), &controls);
    assert_eq!(refused(&mut told), Some(5), "it has enough");
    assert!(connections.carried.is_empty());
    let refused = connections.setup.traffic.counted().refused;
    let expected = [
        (Reason::Dial, 2),
        (Reason::Limit, 1),
        (Reason::Pod, 1),
        (Reason::Unknown, 1),
    ];
    assert_eq!(refused, expected.into());
}

#[tokio::test]
async fn a_connection_to_a_pod_of_the_node_is_sent_back_and_never_dialled_from_here() {
    let web = json!({"metadata": {"namespace": "default", "name": "web"},
        "spec": {"clusterIP": "10.96.0.5", "ports": [
            {"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]}});
    let slice = json!({"metadata": {"namespace": "default", "name": "web",
        "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}, {"name": "dns", "port": 53, "protocol": "UDP"}],
        "endpoints": [{"addresses": ["10.200.0.7"]}]});
    let mut connections = of(&[web], &[slice]);
    let (controls, mut told) = mpsc::channel(4);
    let to_web = |id, port, protocol: pb::EgressProtocol| pb::EgressAttempt {
        address: "10.96.0.5".to_owned(),
        protocol: protocol.into(),
        ..attempt(id, port)
    };
    // Without an agent that gives addresses, nobody reaches it.
    let tcp = to_web(1, 80, pb::EgressProtocol::Tcp);
    connections.take(&tcp, &controls);
    assert_eq!(refused(&mut told), Some(1));
    let info = pb::AgentInfo {
        capabilities: vec![knoc_proto::capability::POD_ADDRESSES.to_owned()],
        ..pb::AgentInfo::default()
    };
    let up = Link::Up {
        info: Arc::new(info),
        since: Timestamp::now(),
    };
    connections.setup.link = channel::Sender::new(up).subscribe();
    connections.take(&to_web(2, 53, pb::EgressProtocol::Udp), &controls);
    let Some(Control::Redirect(redirect)) = told.try_recv().unwrap().control else {
        panic!("the datagrams are not sent back");
    };
    assert_eq!((redirect.id, redirect.address.as_str()), (2, "10.200.0.7"));
    connections.take(&tcp, &controls);
    let sent_back = pb::EgressRedirect {
        uid: "u".to_owned(),
        id: 1,
        address: "10.200.0.7".to_owned(),
        port: 8080,
    };
    let Some(Control::Redirect(redirect)) = told.try_recv().unwrap().control else {
        panic!("it is not sent back");
    };
    assert_eq!(redirect, sent_back);
    assert!(connections.carried.is_empty());
    let counted = connections.setup.traffic.counted();
    assert_eq!(counted.made, 0, "the kubelet carries none");
    assert_eq!(counted.refused, [(Reason::Endpoint, 1)].into());
}

#[tokio::test]
async fn a_range_of_pods_that_hides_services_is_named() {
    let mut connections = of(&[], &[]);
    assert_eq!(connections.hidden_services(), None);
    let unit = |pod_ip| Arc::new(Unit::fixture(pod_ip, Some("10.96.0.0/16")));
    connections.setup.unit = unit(PodIp::Own);
    let named = connections.hidden_services().unwrap();
    assert!(
        named.contains("10.96.0.0/16") && named.contains("10.96.0.0/12"),
        "{named}"
    );
    connections.setup.unit = unit(PodIp::None);
    assert_eq!(connections.hidden_services(), None);
}

#[test]
fn two_pods_with_many_connections_leave_room_for_others() {
    has_room(OF_ONE - 1, OF_ONE - 1, OF_ONE - 1).unwrap();
    let full = has_room(OF_ONE, OF_ONE, OF_ONE).unwrap_err();
    assert!(matches!(full, Refused::ManyOfPod), "{full}");
    let crowded = has_room(CROWDED, SHARE, SHARE).unwrap_err();
    assert!(matches!(crowded, Refused::Crowded), "{crowded}");
    has_room(OF_ALL - 1, SHARE - 1, SHARE - 1).unwrap();
    let full = has_room(OF_ALL, 0, 0).unwrap_err();
    assert!(matches!(full, Refused::ManyOfNode), "{full}");
}

#[test]
fn the_pods_of_one_namespace_leave_room_for_those_of_others() {
    let most = OF_ALL - LAST;
    has_room(most - 1, 0, most - 1).unwrap();
    let full = has_room(most, 0, most).unwrap_err();
    assert!(matches!(full, Refused::ManyOfNamespace), "{full}");
    has_room(OF_ALL - 1, 0, OF_NAMESPACE - 1).unwrap();
    let full = has_room(OF_ALL - 1, 0, OF_NAMESPACE).unwrap_err();
    assert!(full.to_string().contains("the last 128"), "{full}");
}
