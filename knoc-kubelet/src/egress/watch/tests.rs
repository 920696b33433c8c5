use std::convert::Infallible;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use knoc_proto::pb::EgressProtocol;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tower_test::mock;

use super::*;

const SOON: Duration = Duration::from_secs(30);

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;
type Requests = mock::Handle<Request<Body>, Answer>;

fn answer(code: u16, json: &Value) -> Answer {
    let body = Full::from(json.to_string()).boxed_unsync();
    Response::builder().status(code).body(body).unwrap()
}

fn listed(items: &[Value]) -> Answer {
    answer(
        200,
        &json!({"metadata": {"resourceVersion": "1"}, "items": items}),
    )
}

fn node(name: &str, address: &str) -> Value {
    json!({"metadata": {"name": name, "resourceVersion": "2"},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]}})
}

fn slice() -> Value {
    json!({"metadata": {"namespace": "a", "name": "one", "resourceVersion": "2",
            "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4",
        "ports": [{"port": 8080}], "endpoints": [{"addresses": ["10.1.0.1"]}]})
}

fn range(text: &str) -> Value {
    json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": [text]}})
}

/// Lists one object of each kind; each watch sends what comes from its channel.
async fn serve(mut requests: Requests, mut watches: HashMap<&str, mpsc::Receiver<Bytes>>) {
    while let Some((request, send)) = requests.next_request().await {
        let path = request.uri().path();
        let kind = path.rsplit('/').next().unwrap_or_default();
        let watch = request
            .uri()
            .query()
            .is_some_and(|all| all.contains("watch=true"));
        send.send_response(match (kind, watch) {
            ("nodes", false) => listed(&[node("one", "10.2.0.1")]),
            ("endpointslices", false) => listed(&[slice()]),
            ("servicecidrs", false) => listed(&[range("10.96.0.0/16")]),
            (kind, true) => {
                let lines = watches.remove(kind).unwrap();
                let lines = ReceiverStream::new(lines).map(|line| Ok(Frame::data(line)));
                Response::new(StreamBody::new(lines).boxed_unsync())
            }
            _ => answer(404, &json!({})),
        });
    }
}

async fn until(cluster: &Cluster, what: &str, is_so: impl Fn(&State) -> bool) {
    let mut changed = cluster.subscribe();
    let waits = async {
        while cluster.look(&is_so) != Some(true) {
            changed.changed().await.unwrap();
        }
    };
    let waited = tokio::time::timeout(SOON, waits).await;
    waited.unwrap_or_else(|_| panic!("not so: {what}"));
}

#[tokio::test]
async fn nodes_and_endpoints_are_followed_as_they_come_and_go() {
    let (service, requests) = mock::pair::<Request<Body>, Answer>();
    let client = Client::new(service, "default");
    let (to_nodes, of_nodes) = mpsc::channel(4);
    let (to_slices, of_slices) = mpsc::channel(4);
    let watches = HashMap::from([("nodes", of_nodes), ("endpointslices", of_slices)]);
    let (cluster, services) = (Cluster::new(), Services::default());
    services.no_services();
    let mut tasks = JoinSet::new();
    tasks.spawn(serve(requests, watches));
    let stop = CancellationToken::new();
    tasks.spawn(cluster.clone().run(client, services, Vec::new(), stop));
    let has = |address: &str| {
        let address: IpAddr = address.parse().unwrap();
        move |state: &State| state.around.nodes.contains(&address)
    };
    let leads = |state: &State| {
        let to = "10.1.0.1:8080".parse().unwrap();
        !state.table.targets(to, EgressProtocol::Tcp).is_empty()
    };
    let range = ["10.96.0.0/16".parse().unwrap()];
    until(&cluster, "the first lists", |state| {
        has("10.2.0.1")(state) && leads(state) && state.around.service_ranges == range
    })
    .await;
    let event = |kind: &str, object: &Value| {
        Bytes::from(format!("{}\n", json!({"type": kind, "object": object})))
    };
    let news = [
        event("ADDED", &node("two", "10.2.0.2")),
        event("MODIFIED", &node("two", "10.2.0.3")),
        event("DELETED", &node("one", "10.2.0.1")),
    ];
    for line in news {
        to_nodes.send(line).await.unwrap();
    }
    until(&cluster, "the nodes", |state| {
        has("10.2.0.3")(state) && state.around.nodes.len() == 1
    })
    .await;
    to_slices.send(event("DELETED", &slice())).await.unwrap();
    until(&cluster, "no endpoint", |state| !leads(state)).await;
}

#[tokio::test(start_paused = true)]
async fn the_ranges_that_were_read_stay_while_the_api_server_does_not_answer() {
    let (service, mut requests) = mock::pair::<Request<Body>, Answer>();
    let client = Client::new(service, "default");
    let cluster = Cluster::new();
    let configured = ["10.99.0.0/16".parse().unwrap()];
    let read = async {
        for answer in [
            answer(500, &json!({})),
            listed(&[range("10.96.0.0/16")]),
            answer(500, &json!({})),
        ] {
            let (_, send) = requests.next_request().await.unwrap();
            send.send_response(answer);
        }
        requests.next_request().await.unwrap();
    };
    tokio::select! {
        () = cluster.ranges(Api::all(client), &configured) => {}
        () = read => {}
    }
    let state = cluster.0.state.read().unwrap();
    assert_eq!(
        state.around.service_ranges,
        ["10.96.0.0/16".parse().unwrap()]
    );
}

#[tokio::test(start_paused = true)]
async fn a_cluster_that_does_not_say_its_ranges_is_a_trouble_until_it_does() {
    let (service, mut requests) = mock::pair::<Request<Body>, Answer>();
    let client = Client::new(service, "default");
    let cluster = Cluster::new();
    let read = async {
        let mut seen = vec![cluster.troubles()];
        for answer in [
            answer(404, &json!({"kind": "Status", "code": 404})),
            listed(&[]),
            listed(&[range("10.96.0.0/16")]),
        ] {
            let (_, send) = requests.next_request().await.unwrap();
            seen.push(cluster.troubles());
            send.send_response(answer);
        }
        requests.next_request().await.unwrap();
        seen.push(cluster.troubles());
        seen
    };
    let seen = tokio::select! {
        () = cluster.ranges(Api::all(client), &[]) => unreachable!(),
        seen = read => seen,
    };
    let told = vec![NO_RANGE.to_owned()];
    // Before the first answer nothing is known, and the last one has a range.
    assert_eq!(seen, [vec![], vec![], told.clone(), told, vec![]]);
    assert!(NO_RANGE.contains("`egress.serviceRanges`"));
}

#[test]
fn addresses_of_nodes_and_ranges_are_read_and_names_left_out() {
    let node = json!({"metadata": {"name": "n"}, "status": {"addresses": [{"type": "InternalIP", "address": "10.2.0.1"},
        {"type": "Hostname", "address": "n"}, {"type": "InternalIP", "address": "::ffff:10.2.0.2"}]}});
    let (name, found) = addresses(&serde_json::from_value(node).unwrap()).unwrap();
    assert_eq!(name, "n");
    assert_eq!(
        found,
        ["10.2.0.1", "10.2.0.2"].map(|text| text.parse::<IpAddr>().unwrap())
    );
    let range = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12", "fd00::/108", "?"]}});
    let range = serde_json::from_value(range).unwrap();
    assert_eq!(
        cidrs(vec![range, ServiceCIDR::default()]),
        ["10.96.0.0/12", "fd00::/108"].map(|text| text.parse::<Range>().unwrap())
    );
}

#[test]
fn what_the_kubelet_may_not_read_is_known_until_it_may() {
    let api = |code: u16| {
        let status = kube::core::Status {
            code,
            ..kube::core::Status::default()
        };
        kube::Error::Api(Box::new(status))
    };
    assert!(is_denied(&watcher::Error::InitialListFailed(api(403))));
    assert!(is_denied(&watcher::Error::WatchStartFailed(api(403))));
    assert!(!is_denied(&watcher::Error::InitialListFailed(api(500))));
    assert!(!is_denied(&watcher::Error::NoResourceVersion));
    let cluster = Cluster::new();
    let changes = cluster.subscribe();
    assert!(!cluster.is_denied() && cluster.troubles().is_empty());
    for _ in 0..2 {
        cluster.set_denied(Part::Slices, true);
        cluster.set_denied(Part::Nodes, true);
    }
    assert!(cluster.is_denied() && changes.has_changed().unwrap());
    let troubles = cluster.troubles();
    assert_eq!(troubles.len(), 2, "{troubles:?}");
    assert!(troubles[0].contains("list and watch endpointslices"));
    cluster.set_denied(Part::Slices, false);
    cluster.set_denied(Part::Nodes, false);
    assert!(!cluster.is_denied() && cluster.troubles().is_empty());
}

#[test]
fn nothing_is_decided_before_everything_was_read() {
    let cluster = Cluster::new();
    for part in [Part::Services, Part::Slices, Part::Nodes] {
        cluster.change(|state| {
            state.read.insert(part);
        });
        assert!(cluster.look(|_| ()).is_none());
    }
    cluster.change(|state| {
        state.read.insert(Part::Ranges);
    });
    assert!(cluster.look(|_| ()).is_some());
}
