use std::collections::HashSet;

use rcgen::{CertificateParams, KeyPair};
use rustls::ServerConfig;
use rustls_pki_types::PrivateKeyDer;
use serde_json::json;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_rustls::TlsAcceptor;

use super::{
    super::{decide::Surroundings, table::tests::table},
    *,
};
use crate::node::PodIp;

/// A server whose certificate has these names, and nobody has issued it.
async fn server(names: &[&str]) -> (SocketAddr, JoinSet<()>) {
    let key = KeyPair::generate().unwrap();
    let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
    let certificate = CertificateParams::new(names).unwrap();
    let certificate = certificate.self_signed(&key).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // A client that rejects the certificate ends the handshake.
            acceptor.accept(stream).await.ok();
        }
    });
    (address, tasks)
}

fn by(name: &str) -> ServerName<'static> {
    ServerName::try_from(name.to_owned()).unwrap()
}

fn lack(name: &str, instead: &[&str]) -> Lack {
    Lack {
        endpoint: "10.0.0.5:6443".parse().unwrap(),
        name: by(name),
        instead: instead.iter().map(|one| (*one).to_owned()).collect(),
    }
}

#[tokio::test]
async fn a_certificate_shows_what_it_names_instead() {
    let (endpoint, _server) = server(&["kubernetes", "10.96.0.1"]).await;
    for named in ["10.96.0.1", "kubernetes"] {
        let instead = names_instead(endpoint, by(named)).await.unwrap();
        assert_eq!(instead, None, "{named}");
    }
    for other in ["10.96.0.2", "127.0.0.1", NAME] {
        let instead = names_instead(endpoint, by(other)).await.unwrap().unwrap();
        let instead: Vec<_> = instead.iter().map(|one| plain(one)).collect();
        assert_eq!(instead, ["kubernetes", "10.96.0.1"], "{other}");
    }
}

#[tokio::test]
async fn an_endpoint_that_shows_no_certificate_is_no_finding() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap();
    let closes = async {
        let (stream, _) = listener.accept().await.unwrap();
        drop(stream);
    };
    let (looked, ()) = tokio::join!(names_instead(endpoint, by(NAME)), closes);
    looked.unwrap_err();
}

#[test]
fn what_is_missing_is_said_with_whom_it_concerns_and_what_to_do() {
    assert_eq!(describe(&[]), None);
    let address = lack("10.96.0.1", &["DnsName(\"api.example.org\")"]);
    let text = describe(std::slice::from_ref(&address)).unwrap();
    for part in [
        "at 10.0.0.5:6443 does not name 10.96.0.1, by which pods in a network of their own",
        "apiServer.certSANs",
        "KUBERNETES_SERVICE_HOST",
        "names api.example.org",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let name = lack(NAME, &[]);
    let text = describe(std::slice::from_ref(&name)).unwrap();
    assert!(text.contains("knoc.io/network: private"), "{text}");
    assert!(text.ends_with("It names nothing"), "{text}");
    let both = describe(&[address, name]).unwrap();
    for part in ["10.96.0.1", NAME] {
        assert!(both.contains(part), "{both}");
    }
    assert!(!both.contains("KUBERNETES_SERVICE_HOST"), "{both}");
}

#[test]
fn a_certificate_with_many_names_makes_no_long_message() {
    let names: Vec<_> = (0..100)
        .map(|number| format!("DnsName(\"name-{number}.example.org\")"))
        .collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let text = describe(&[lack("10.96.0.1", &names)]).unwrap();
    assert!(text.ends_with("name-7.example.org, …"), "{text}");
    assert!(text.len() < 1024, "{text}");
}

/// A cluster whose API server is at these endpoints of this host.
fn cluster(ports: &[u16]) -> Cluster {
    let service = json!({"metadata": {"namespace": "default", "name": "kubernetes"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "https", "port": 443}]}});
    let slice = |port: &u16| {
        json!({"metadata": {"namespace": "default", "name": format!("kubernetes-{port}"),
            "labels": {"kubernetes.io/service-name": "kubernetes"}}, "addressType": "IPv4",
            "ports": [{"name": "https", "port": port}], "endpoints": [{"addresses": ["127.0.0.1"]}]})
    };
    let slices: Vec<_> = ports.iter().map(slice).collect();
    let around = Surroundings {
        service_ranges: vec!["10.96.0.0/12".parse().unwrap()],
        nodes: HashSet::new(),
    };
    Cluster::of(table(&[service], &slices), around)
}

#[tokio::test]
async fn the_node_says_once_what_is_missing_until_it_is_there() {
    let (lacking, _lacking) = server(&["localhost"]).await;
    let (complete, _complete) = server(&["10.96.0.1", NAME]).await;
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone_at = gone.local_addr().unwrap();
    drop(gone);
    let (events, mut notes) = Events::channel();
    let mut names = Names {
        cluster: cluster(&[complete.port(), lacking.port()]),
        allow: AllowList::parse(&["default/*"]).unwrap(),
        unit: Arc::new(Unit::fixture(PodIp::None, None)),
        events,
        told: Troubles::default(),
    };
    for _ in 0..2 {
        let server = names.server().unwrap();
        assert!(names.look_at(&server).await);
        let found = names.unit.api_names();
        let ApiNames::Lacking(message) = &found else {
            panic!("one of the two lacks names, and this was found: {found:?}");
        };
        let at = format!("at {lacking} does not name 10.96.0.1");
        assert!(message.contains(&at) && message.contains(NAME), "{message}");
    }
    // Nothing was seen, so it stays.
    names.cluster = cluster(&[gone_at.port()]);
    let server = names.server().unwrap();
    assert!(!names.look_at(&server).await);
    assert!(matches!(names.unit.api_names(), ApiNames::Lacking(_)));
    names.cluster = cluster(&[complete.port()]);
    let server = names.server().unwrap();
    assert!(names.look_at(&server).await);
    assert_eq!(names.unit.api_names(), ApiNames::Named);
    drop(names);
    let note = notes.recv().await.unwrap();
    assert_eq!(note.reason, "ApiServerCertificateMismatch");
    assert_eq!(note.object.kind.as_deref(), Some("Node"));
    assert!(notes.recv().await.is_none(), "it is said once");
}

#[test]
fn nothing_is_looked_at_if_pods_may_not_reach_the_api_server() {
    let server = |list: &[&str]| {
        let allow = AllowList::parse(list).unwrap();
        let cluster = cluster(&[6443]);
        let server = cluster.look(|state| decide::api_server(&state.table, &state.around, &allow));
        server.unwrap()
    };
    assert_eq!(server(&["kube-system/*"]), None);
    let found = server(&["default/kubernetes"]).unwrap();
    assert_eq!(found.address, IpAddr::from([10, 96, 0, 1]));
    assert_eq!(found.endpoints, [SocketAddr::from(([127, 0, 0, 1], 6443))]);
}
