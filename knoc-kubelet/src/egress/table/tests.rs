use serde_json::json;

use super::*;

/// A table from Services and slices as JSON.
pub(in crate::egress) fn table(
    services: &[serde_json::Value],
    slices: &[serde_json::Value],
) -> Table {
    let parse =
        |value: &serde_json::Value| serde_json::from_value::<KubeService>(value.clone()).unwrap();
    let services: Vec<_> = services.iter().map(parse).collect();
    let mut table = Table::default();
    table.set_services(services.iter());
    let slices = slices.iter().map(|value| read(value).unwrap());
    table.set_slices(slices.collect());
    table
}

fn read(value: &serde_json::Value) -> Option<(Name, Slice)> {
    slice(&serde_json::from_value(value.clone()).unwrap())
}

pub(in crate::egress) fn web() -> serde_json::Value {
    json!({"metadata": {"namespace": "a", "name": "web"}, "spec": {"clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5", "fd00::5"],
        "ports": [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]}})
}

/// A slice of a Service in the namespace `a`.
pub(in crate::egress) fn slice_of(
    name: &str,
    service: &str,
    endpoints: &serde_json::Value,
) -> serde_json::Value {
    json!({"metadata": {"namespace": "a", "name": name, "labels": {OF_SERVICE: service}}, "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 5353, "protocol": "UDP"}],
        "endpoints": endpoints})
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn found(table: &Table, to: &str) -> Vec<String> {
    let targets = table.targets(at(to), EgressProtocol::Tcp);
    let endpoints = targets.iter().flat_map(|target| &target.endpoints);
    endpoints.map(ToString::to_string).collect()
}

#[test]
fn an_address_of_a_service_leads_to_its_ready_endpoints() {
    let endpoints = json!([{"addresses": ["10.1.0.1"]}, {"addresses": ["10.1.0.2"], "conditions": {"ready": true}},
        {"addresses": ["10.1.0.3"], "conditions": {"ready": false}},
        {"addresses": ["10.1.0.4"], "conditions": {"ready": false, "serving": true, "terminating": true}}]);
    let more = json!([{"addresses": ["10.1.0.9"]}, {"addresses": ["10.1.0.1"]}]);
    let table = table(
        &[web()],
        &[
            slice_of("one", "web", &endpoints),
            slice_of("two", "web", &more),
        ],
    );
    let expected = ["10.1.0.1:8080", "10.1.0.2:8080", "10.1.0.9:8080"];
    assert_eq!(found(&table, "10.96.0.5:80"), expected);
    assert!(
        table
            .targets(at("10.96.0.5:81"), EgressProtocol::Tcp)
            .is_empty()
    );
    assert!(
        table
            .targets(at("10.96.0.5:53"), EgressProtocol::Tcp)
            .is_empty()
    );
    let udp = table.targets(at("10.96.0.5:53"), EgressProtocol::Udp);
    assert_eq!(udp[0].endpoints[0], at("10.1.0.1:5353"));
    assert!(
        table
            .targets(at("10.96.0.6:80"), EgressProtocol::Tcp)
            .is_empty()
    );
}

/// The controller writes a slice of each family for a Service that has both, with the same pods.
#[test]
fn endpoints_have_the_family_of_the_address_that_was_dialled() {
    let mut of_ipv6 = slice_of("six", "web", &json!([{"addresses": ["fd01::1"]}]));
    of_ipv6["addressType"] = json!("IPv6");
    let of_ipv4 = slice_of("four", "web", &json!([{"addresses": ["10.1.0.1"]}]));
    let both = table(&[web()], &[of_ipv4, of_ipv6.clone()]);
    assert_eq!(found(&both, "10.96.0.5:80"), ["10.1.0.1:8080"]);
    assert_eq!(found(&both, "[fd00::5]:80"), ["[fd01::1]:8080"]);
    let one = table(&[web()], &[of_ipv6]);
    assert!(found(&one, "10.96.0.5:80").is_empty());
}

#[test]
fn the_ipv4_address_of_a_service_is_taken_in_whichever_order_they_are() {
    let service = json!({"metadata": {"namespace": "a", "name": "dual"}, "spec": {"clusterIP": "fd00::5",
        "clusterIPs": ["fd00::5", "10.96.0.5"], "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}]}});
    let table = table(&[service], &[]);
    let address = |suits: fn(IpAddr) -> bool| {
        let found = table.address(&Name::new("a", "dual"), "dns", suits);
        found.map(|(address, port)| (address.to_string(), port))
    };
    assert_eq!(address(|_| true), Some(("10.96.0.5".to_owned(), 53)));
    assert_eq!(
        address(|address| address.is_ipv6()),
        Some(("fd00::5".to_owned(), 53))
    );
    assert_eq!(address(|_| false), None);
}

#[test]
fn endpoints_that_leave_serve_until_others_are_ready() {
    let leaving = json!([{"addresses": ["10.1.0.4"], "conditions": {"ready": false, "terminating": true}},
        {"addresses": ["10.1.0.5"], "conditions": {"ready": false, "serving": false, "terminating": true}}]);
    let mut table = table(&[web()], &[slice_of("one", "web", &leaving)]);
    assert_eq!(found(&table, "10.96.0.5:80"), ["10.1.0.4:8080"]);
    let (name, ready) = read(&slice_of(
        "two",
        "web",
        &json!([{"addresses": ["10.1.0.6"]}]),
    ))
    .unwrap();
    table.set_slice(name.clone(), ready);
    assert_eq!(found(&table, "10.96.0.5:80"), ["10.1.0.6:8080"]);
    table.remove_slice(&name);
    assert_eq!(found(&table, "10.96.0.5:80"), ["10.1.0.4:8080"]);
}

#[test]
fn the_address_of_an_endpoint_belongs_to_all_its_services() {
    let headless = json!({"metadata": {"namespace": "a", "name": "db"}, "spec": {"clusterIP": "None", "ports": [{"port": 80}]}});
    let endpoints = || json!([{"addresses": ["10.1.0.1"]}]);
    let slices = [
        slice_of("one", "db", &endpoints()),
        slice_of("two", "web", &endpoints()),
    ];
    let table = table(&[web(), headless], &slices);
    let targets = table.targets(at("10.1.0.1:8080"), EgressProtocol::Tcp);
    let names: Vec<_> = targets
        .iter()
        .map(|target| target.service.to_string())
        .collect();
    assert_eq!(names, ["a/db", "a/web"]);
    assert_eq!(targets[0].endpoints, [at("10.1.0.1:8080")]);
    assert!(
        table
            .targets(at("10.1.0.1:22"), EgressProtocol::Tcp)
            .is_empty()
    );
    let all = |headless| table.ports(headless, |_| true);
    assert_eq!(all(false).tcp, BTreeSet::from([80]));
    assert_eq!(all(true).tcp, BTreeSet::from([80, 8080]));
    assert_eq!(all(true).udp, BTreeSet::from([53, 5353]));
    assert_eq!(table.ports(true, |_| false), Ports::default());
}

#[test]
fn what_is_no_address_of_the_cluster_is_left_out() {
    let external = json!({"metadata": {"namespace": "a", "name": "out"},
        "spec": {"type": "ExternalName", "externalName": "example.org", "clusterIP": "10.96.0.7", "ports": [{"port": 80}]}});
    let odd = json!({"metadata": {"namespace": "a", "name": "odd"},
        "spec": {"clusterIP": "10.96.0.8", "ports": [{"port": 0}, {"port": 70000}, {"port": 9, "protocol": "SCTP"}]}});
    let table = table(&[external, odd], &[]);
    assert!(
        table
            .targets(at("10.96.0.7:80"), EgressProtocol::Tcp)
            .is_empty()
    );
    assert_eq!(table.ports(true, |_| true), Ports::default());
    let names = json!({"metadata": {"namespace": "a", "name": "n", "labels": {OF_SERVICE: "web"}}, "addressType": "FQDN",
        "endpoints": [{"addresses": ["example.org"]}]});
    let (_, slice) = read(&names).unwrap();
    assert!(slice.endpoints.is_empty());
    let of_nobody = json!({"metadata": {"namespace": "a", "name": "n"}, "addressType": "IPv4", "endpoints": []});
    assert_eq!(read(&of_nobody), None);
}

#[test]
fn the_number_of_endpoints_is_bounded() {
    let endpoint = Endpoint {
        address: "10.1.0.1".parse().unwrap(),
        ready: true,
        leaving: false,
    };
    let slice = Slice {
        service: Name::new("a", "web"),
        ports: Vec::new(),
        endpoints: vec![endpoint; MOST_ENDPOINTS / 4],
    };
    let mut table = Table::default();
    let name = |number: usize| Name::new("a", &number.to_string());
    let has = |table: &Table, number: usize| table.slices.contains_key(&name(number));
    for number in 0..4 {
        table.set_slice(name(number), slice.clone());
    }
    table.set_slice(name(3), slice.clone());
    assert!(has(&table, 3), "it replaces itself");
    assert_eq!(table.left_out(), None);
    table.set_slice(name(4), slice.clone());
    assert!(!has(&table, 4));
    let told = table.left_out().unwrap();
    assert!(told.contains(&MOST_ENDPOINTS.to_string()), "{told}");
    table.remove_slice(&name(0));
    table.set_slice(name(4), slice.clone());
    assert!(has(&table, 4) && table.left_out().is_some());
    // All of them are read again.
    let all = |count: usize| {
        (0..count)
            .map(|number| (name(number), slice.clone()))
            .collect()
    };
    table.set_slices(all(4));
    assert_eq!(table.left_out(), None);
    table.set_slices(all(5));
    assert!(table.left_out().is_some() && !has(&table, 4));
}

#[test]
fn five_thousand_services_are_found_by_their_addresses() {
    let services = (0..5000_u32).map(|number| {
        let address = std::net::Ipv4Addr::from(0x0a60_0000 + number).to_string();
        json!({"metadata": {"namespace": "a", "name": format!("s{number}")},
            "spec": {"clusterIP": address, "ports": [{"port": 1 + number}]}})
    });
    let table = table(&services.collect::<Vec<_>>(), &[]);
    let target = &table.targets(at("10.96.4.1:1026"), EgressProtocol::Tcp)[0];
    assert_eq!(target.service.to_string(), "a/s1025");
    assert_eq!(table.ports(false, |_| true).tcp.len(), 5000);
}

#[test]
fn the_address_of_an_endpoint_that_has_gone_leads_nowhere() {
    let endpoints = |addresses: &[&str]| {
        let all = addresses
            .iter()
            .map(|address| json!({"addresses": [address]}));
        slice_of("one", "web", &all.collect::<Vec<_>>().into())
    };
    let mut table = table(&[web()], &[endpoints(&["10.1.0.1", "10.1.0.2"])]);
    assert_eq!(found(&table, "10.1.0.2:8080"), ["10.1.0.2:8080"]);
    // Another pod may have the address by now.
    let (name, slice) = read(&endpoints(&["10.1.0.1"])).unwrap();
    table.set_slice(name, slice);
    assert!(found(&table, "10.1.0.2:8080").is_empty());
    // After a new list.
    table.set_slices(vec![read(&endpoints(&["10.1.0.3"])).unwrap()]);
    assert!(found(&table, "10.1.0.1:8080").is_empty());
    assert_eq!(found(&table, "10.1.0.3:8080"), ["10.1.0.3:8080"]);
}
