use serde_json::json;

use super::{
    super::table::tests::{slice_of, table, web},
    *,
};

fn allow(patterns: &[&str]) -> AllowList {
    AllowList::parse(patterns).unwrap()
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn ranges() -> Vec<Range> {
    vec!["10.96.0.0/12".parse().unwrap()]
}

fn tcp(
    table: &Table,
    list: &[&str],
    nodes: &[&str],
    to: &str,
    uid: &str,
    random: u64,
) -> Result<Dial, Refusal> {
    let around = Surroundings {
        service_ranges: ranges(),
        nodes: nodes.iter().map(|text| text.parse().unwrap()).collect(),
    };
    decide(
        table,
        &allow(list),
        &around,
        (at(to), EgressProtocol::Tcp),
        (uid, random),
    )
}

fn three() -> serde_json::Value {
    json!([{"addresses": ["10.1.0.1"]}, {"addresses": ["10.1.0.2"]}, {"addresses": ["10.1.0.3"]}])
}

#[test]
fn only_services_of_the_list_are_dialled_and_the_refusal_names_the_list() {
    let table = table(&[web()], &[slice_of("one", "web", &three())]);
    let dial = tcp(&table, &["a/web"], &[], "10.96.0.5:80", "u", 4).unwrap();
    assert_eq!(dial.service.to_string(), "a/web");
    assert_eq!((dial.port, dial.endpoint), (80, at("10.1.0.2:8080")));
    let refused = tcp(&table, &["b/*"], &[], "10.96.0.5:80", "u", 0).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("Service a/web (port 80)") && text.contains("egress.allow"),
        "{text}"
    );
    let unknown = tcp(&table, &["*/*"], &[], "10.96.0.6:80", "u", 0).unwrap_err();
    assert_eq!(
        unknown.to_string(),
        "no Service of the cluster has 10.96.0.6:80 (TCP)"
    );
    let endpoint = tcp(&table, &["*/*"], &[], "10.1.0.3:8080", "u", 0).unwrap();
    assert_eq!(endpoint.endpoint, at("10.1.0.3:8080"));
    tcp(&table, &["*/*"], &[], "10.1.0.3:10250", "u", 0).unwrap_err();
}

#[test]
fn every_endpoint_is_chosen_unless_the_service_has_affinity() {
    let mut sticky = web();
    let table_of =
        |service: serde_json::Value| table(&[service], &[slice_of("one", "web", &three())]);
    let loose = table_of(web());
    sticky["spec"]["sessionAffinity"] = json!("ClientIP");
    let sticky = table_of(sticky);
    let chosen = |table: &Table, uid: &str, random| {
        tcp(table, &["*/*"], &[], "10.96.0.5:80", uid, random)
            .unwrap()
            .endpoint
    };
    let all: HashSet<_> = (0..9).map(|random| chosen(&loose, "u", random)).collect();
    assert_eq!(all.len(), 3);
    let one: HashSet<_> = (0..9).map(|random| chosen(&sticky, "u", random)).collect();
    assert_eq!(one.len(), 1);
    let pods: HashSet<_> = (0..50)
        .map(|pod| chosen(&sticky, &format!("pod{pod}"), 0))
        .collect();
    assert_eq!(pods.len(), 3, "the pods are spread");
}

#[test]
fn an_endpoint_that_goes_moves_only_the_pods_that_it_had() {
    let mut service = web();
    service["spec"]["sessionAffinity"] = json!("ClientIP");
    let before = table(&[service.clone()], &[slice_of("one", "web", &three())]);
    let two = json!([{"addresses": ["10.1.0.1"]}, {"addresses": ["10.1.0.3"]}]);
    let after = table(&[service], &[slice_of("one", "web", &two)]);
    for pod in 0..50 {
        let uid = format!("pod{pod}");
        let chosen = |table: &Table| {
            tcp(table, &["*/*"], &[], "10.96.0.5:80", &uid, 0)
                .unwrap()
                .endpoint
        };
        let was = chosen(&before);
        assert!(was == at("10.1.0.2:8080") || chosen(&after) == was, "{uid}");
    }
}

#[test]
fn addresses_of_nodes_need_the_services_name_and_others_are_never_dialled() {
    let at_node = |address: &str| {
        let endpoints = json!([{"addresses": [address]}]);
        table(&[web()], &[slice_of("one", "web", &endpoints)])
    };
    let nodes = ["10.2.0.1", "fd00::7"];
    let try_it = |list: &str, address: &str| {
        let is_ipv4 = address.contains('.');
        let to = if is_ipv4 {
            "10.96.0.5:80"
        } else {
            "[fd00::5]:80"
        };
        tcp(&at_node(address), &[list], &nodes, to, "u", 0)
    };
    try_it("a/web", "10.2.0.1").unwrap();
    let refused = try_it("a/*", "10.2.0.1").unwrap_err().to_string();
    assert!(
        refused.contains("addresses of nodes") && refused.contains("without `*`"),
        "{refused}"
    );
    try_it("a/*", "::ffff:10.2.0.1").unwrap_err();
    try_it("a/web", "fd00::7").unwrap();
    try_it("a/*", "fd00::7").unwrap_err();
    for never in [
        "127.0.0.1",
        "::1",
        "169.254.169.254",
        "fe80::1",
        "0.0.0.0",
        "::ffff:127.0.0.1",
        "224.0.0.1",
    ] {
        let refused = try_it("a/web", never).unwrap_err();
        assert!(
            matches!(refused, Refusal::Never { .. }),
            "{never}: {refused}"
        );
    }
}

#[test]
fn an_endpoint_that_is_the_address_of_another_service_is_never_dialled() {
    let other = json!({"metadata": {"namespace": "b", "name": "vault"},
        "spec": {"clusterIP": "10.96.0.7", "ports": [{"port": 8080}]}});
    let try_it = |list: &str, endpoints: &serde_json::Value, to: &str| {
        let slices = [slice_of("one", "web", endpoints)];
        tcp(
            &table(&[web(), other.clone()], &slices),
            &[list],
            &[],
            to,
            "u",
            0,
        )
    };
    for (list, address) in [
        ("a/*", "10.96.0.7"),
        ("a/web", "10.96.0.7"),
        // No Service has it yet.
        ("a/web", "10.111.255.255"),
        ("a/web", "::ffff:10.96.0.7"),
    ] {
        let endpoints = json!([{"addresses": [address]}]);
        let refused = try_it(list, &endpoints, "10.96.0.5:80").unwrap_err();
        assert!(
            matches!(
                refused,
                Refusal::Never {
                    what: "addresses of Services",
                    ..
                }
            ),
            "{list} {address}: {refused}"
        );
    }
    // Nor by that address itself, and the endpoints beside it are.
    let both = json!([{"addresses": ["10.96.0.9"]}, {"addresses": ["10.1.0.1"]}]);
    try_it("*/*", &both, "10.96.0.9:8080").unwrap_err();
    for _ in 0..4 {
        let dial = try_it("a/*", &both, "10.96.0.5:80").unwrap();
        assert_eq!(dial.endpoint, at("10.1.0.1:8080"));
    }
}

#[test]
fn the_api_server_is_dialled_wherever_it_is() {
    let api = json!({"metadata": {"namespace": "default", "name": "kubernetes"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "https", "port": 443}]}});
    let slice = json!({"metadata": {"namespace": "default", "name": "kubernetes",
        "labels": {"kubernetes.io/service-name": "kubernetes"}}, "addressType": "IPv4",
        "ports": [{"name": "https", "port": 6443, "protocol": "TCP"}], "endpoints": [{"addresses": ["10.2.0.1"]}]});
    let table = table(&[api], &[slice]);
    let dial = tcp(&table, &["*/*"], &["10.2.0.1"], "10.96.0.1:443", "u", 0).unwrap();
    assert_eq!(dial.endpoint, at("10.2.0.1:6443"));
}

#[test]
fn a_service_without_endpoints_says_so() {
    let table = table(&[web()], &[]);
    let refused = tcp(&table, &["*/*"], &[], "10.96.0.5:80", "u", 0).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "Service a/web has no endpoint that is ready for port 80"
    );
}

fn dns() -> serde_json::Value {
    json!({"metadata": {"namespace": "kube-system", "name": "kube-dns"}, "spec": {"clusterIP": "10.96.0.10",
        "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53}]}})
}

#[test]
fn the_network_has_the_ranges_the_ports_and_the_addresses_that_pods_need() {
    let table = table(&[web(), dns()], &[]);
    let around = Surroundings {
        service_ranges: ranges(),
        nodes: HashSet::new(),
    };
    let seen = |list: &[&str], dns: Option<&str>| {
        let dns = dns.map(|text| text.parse().unwrap());
        network(&table, &around, &allow(list), &[], (dns, "cluster.local")).unwrap()
    };
    let all = seen(&["*/*"], None);
    knoc_proto::egress::check_network(&all).unwrap();
    assert_eq!((all.tcp_ports, all.udp_ports), (vec![53, 80], vec![53]));
    assert_eq!(
        (&*all.dns, &*all.domain, &*all.api_address),
        ("10.96.0.10", "cluster.local", "")
    );
    assert_eq!(all.dns_service, "kube-system/kube-dns");
    // A Service that is not allowed has its port all the same: the refusal is an Event.
    assert_eq!(seen(&["kube-system/kube-dns"], None).tcp_ports, [53, 80]);
    assert_eq!(seen(&["a/web"], None).dns, "", "pods may not reach it");
    assert_eq!(seen(&["*/*"], Some("10.96.0.99")).dns, "10.96.0.99");
    assert_eq!(
        seen(&["*/*"], Some("8.8.8.8")).dns,
        "10.96.0.10",
        "it is outside of the ranges"
    );
    let configured = Some("10.96.0.10");
    let own = seen(&["kube-system/*"], configured);
    assert_eq!(
        (&*own.dns, &*own.dns_service),
        ("10.96.0.10", "kube-system/kube-dns")
    );
    assert_eq!(seen(&["*/*"], Some("10.96.0.99")).dns_service, "");
    assert_eq!(
        seen(&["a/web"], configured).dns,
        "",
        "pods may not reach it"
    );
    let nowhere = network(
        &table,
        &Surroundings::default(),
        &allow(&["*/*"]),
        &[],
        (None, ""),
    );
    assert_eq!(nowhere, None);
}

#[test]
fn ports_of_allowed_services_come_first() {
    let first = BTreeSet::from([9000, 9001]);
    let all: BTreeSet<u16> = (1..=9001).collect();
    let most = most(&first, &all);
    assert_eq!(most.len(), MAX_PORTS);
    assert!(
        most.is_sorted() && most.ends_with(&[9000, 9001]),
        "{:?}",
        most.last()
    );
}

#[test]
fn a_service_leads_to_pods_of_the_node_at_their_own_addresses_whatever_the_list_says() {
    let table = table(&[web()], &[slice_of("one", "web", &three())]);
    let to = (at("10.96.0.5:80"), EgressProtocol::Tcp);
    let own = |random, own: &[&str]| {
        let own: Vec<IpAddr> = own.iter().map(|text| text.parse().unwrap()).collect();
        own_pod(&table, to, ("u", random), |address| own.contains(&address))
    };
    assert_eq!(own(0, &[]), None);
    assert_eq!(own(5, &["10.1.0.2"]), Some(at("10.1.0.2:8080")));
    let two = ["10.1.0.1", "10.1.0.3"];
    let chosen: HashSet<_> = (0..4).filter_map(|random| own(random, &two)).collect();
    assert_eq!(chosen, [at("10.1.0.1:8080"), at("10.1.0.3:8080")].into());
    let unknown = (at("10.96.0.6:80"), EgressProtocol::Tcp);
    assert_eq!(own_pod(&table, unknown, ("u", 0), |_| true), None);
}
