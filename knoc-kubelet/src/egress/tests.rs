use std::collections::HashSet;

use knoc_link::{Carrier, ExpectPeer};
use knoc_proto::egress::AllowList;
use serde_json::json;

use super::{decide::Surroundings, *};

/// A cluster whose API server is at that port of this host, and an agent that nobody reaches.
fn connections(port: u16) -> Connections {
    let api = json!({"metadata": {"namespace": "default", "name": "kubernetes"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "https", "port": 443}]}});
    let slice = json!({"metadata": {"namespace": "default", "name": "kubernetes",
        "labels": {"kubernetes.io/service-name": "kubernetes"}}, "addressType": "IPv4",
        "ports": [{"name": "https", "port": port}], "endpoints": [{"addresses": ["127.0.0.1"]}]});
    let around = Surroundings {
        service_ranges: vec!["10.96.0.0/12".parse().unwrap()],
        nodes: HashSet::new(),
    };
    let cluster = Cluster::of(table::tests::table(&[api], &[slice]), around);
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
        agent: Agent::new(nobody(), nobody(), "cluster"),
        link: channel::Sender::new(Link::never()).subscribe(),
        store: Store::default(),
        events: Events::channel().0,
        node: "n".to_owned(),
        described: Described::default(),
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
        assert_eq!(refused(&mut told), None, "it is being made");
        let ended = connections.carried.join_next_with_id().await.unwrap();
        connections.ended(ended, &controls);
        assert_eq!(refused(&mut told), Some(id));
        assert!(connections.open.is_empty() && connections.pods.is_empty());
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
}

#[test]
fn two_pods_with_many_connections_leave_room_for_others() {
    has_room(OF_ONE - 1, OF_ONE - 1).unwrap();
    let full = has_room(OF_ONE, OF_ONE).unwrap_err();
    assert!(matches!(full, Refused::ManyOfPod), "{full}");
    let crowded = has_room(CROWDED, SHARE).unwrap_err();
    assert!(matches!(crowded, Refused::Crowded), "{crowded}");
    has_room(OF_ALL - 1, SHARE - 1).unwrap();
    let full = has_room(OF_ALL, 0).unwrap_err();
    assert!(matches!(full, Refused::ManyOfNode), "{full}");
}
