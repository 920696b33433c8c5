//! Real handshakes on loopback. The server answers every request with `Unimplemented` and the identity of its client,
//! which shows that HTTP/2 works over the link.
use std::{fs, net::SocketAddr, path::Path};

use futures::StreamExt as _;
use jiff::Timestamp;
use knoc_proto::{
    error::chain,
    pb::{GetInfoRequest, agent_client::AgentClient},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    task::JoinSet,
};
use tonic::{
    Code, Request, Status,
    service::{InterceptorLayer, Routes},
    transport::Channel,
};

use super::*;
use crate::pki::{Ca, CertifiedKey, Validity};

mod flood;

pub(crate) fn agent() -> Identity {
    Identity::Agent {
        site: "site".into(),
    }
}

pub(crate) fn kubelet() -> Identity {
    Identity::Kubelet { name: "k".into() }
}

pub(crate) fn with(ca: &Ca, pair: &CertifiedKey) -> Credentials {
    Credentials::from_pem(ca.cert_pem(), &pair.cert_pem, &pair.key_pem).unwrap()
}

pub(crate) fn issued(ca: &Ca, identity: &Identity) -> Credentials {
    with(ca, &ca.issue(identity, &[]).unwrap())
}

#[expect(clippy::needless_pass_by_value, reason = "the form of an interceptor")]
fn who(request: Request<()>) -> Result<Request<()>, Status> {
    Err(Status::unimplemented(
        request.extensions().get::<Peer>().unwrap().to_string(),
    ))
}

/// Serves until the returned set is dropped.
pub(crate) fn serve(incoming: Incoming) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut server = server().layer(InterceptorLayer::new(who));
        server
            .add_routes(Routes::default())
            .serve_with_incoming(incoming)
            .await
            .unwrap();
    });
    tasks
}

async fn bound(credentials: Credentials) -> (JoinSet<()>, Carrier) {
    let incoming = listen::tcp(([127, 0, 0, 1], 0).into(), credentials)
        .await
        .unwrap();
    let carrier = Carrier::Tcp(incoming.local_addr().unwrap().to_string());
    (serve(incoming), carrier)
}

pub(crate) async fn ask(channel: Channel) -> Status {
    AgentClient::new(channel)
        .get_info(GetInfoRequest::default())
        .await
        .unwrap_err()
}

/// Sends one request over a new link. If the far side rejects our certificate, a TLS 1.3 client learns that only by its
/// first read.
async fn ask_new(carrier: &Carrier, credentials: Credentials, expect: ExpectPeer) -> Status {
    ask(dial(carrier.clone(), Some(credentials), expect).unwrap()).await
}

#[tokio::test]
async fn a_kubelet_reaches_the_agent_which_knows_its_identity() {
    let ca = Ca::generate("ca").unwrap();
    let (_server, carrier) = bound(issued(&ca, &agent())).await;
    let status = ask_new(
        &carrier,
        issued(&ca, &kubelet()),
        ExpectPeer::Exactly(agent()),
    )
    .await;
    assert_eq!(status.code(), Code::Unimplemented, "{status:?}");
    assert!(
        status
            .message()
            .starts_with("spiffe://knoc/kubelet/k at 127."),
        "{status:?}"
    );
}

#[tokio::test]
async fn an_agent_of_another_ca_is_refused_and_named() {
    let (ours, theirs) = (
        Ca::generate("ours").unwrap(),
        Ca::generate("theirs").unwrap(),
    );
    let (_server, carrier) = bound(issued(&theirs, &agent())).await;
    let status = ask_new(&carrier, issued(&ours, &kubelet()), ExpectPeer::AnyAgent).await;
    assert_eq!(status.code(), Code::Unavailable);
    let message = chain(&status);
    assert!(
        message.contains("it calls itself spiffe://knoc/agent/site"),
        "{message}"
    );
    assert!(
        message.contains("not of the CA that is trusted here"),
        "{message}"
    );
}

#[tokio::test]
async fn a_kubelet_of_another_ca_is_refused() {
    let (ours, theirs) = (
        Ca::generate("ours").unwrap(),
        Ca::generate("theirs").unwrap(),
    );
    let (_server, carrier) = bound(issued(&ours, &agent())).await;
    let stranger = theirs.issue(&kubelet(), &[]).unwrap();
    let status = ask_new(&carrier, with(&ours, &stranger), ExpectPeer::AnyAgent).await;
    assert_ne!(status.code(), Code::Unimplemented, "{status:?}");
    let message = chain(&status);
    assert!(
        message.contains("alert") && message.contains("CA"),
        "{message}"
    );
}

#[tokio::test]
async fn another_site_and_another_role_are_refused_by_name() {
    let ca = Ca::generate("ca").unwrap();
    let (_server, carrier) = bound(issued(&ca, &agent())).await;
    let other = Identity::Agent {
        site: "other".into(),
    };
    let status = ask_new(
        &carrier,
        issued(&ca, &kubelet()),
        ExpectPeer::Exactly(other),
    )
    .await;
    let message = chain(&status);
    let wanted = "the peer is spiffe://knoc/agent/site, not the expected spiffe://knoc/agent/other";
    assert!(message.contains(wanted), "{message}");
    // An agent's certificate is not accepted from a near side.
    let status = ask_new(&carrier, issued(&ca, &agent()), ExpectPeer::AnyAgent).await;
    assert_ne!(status.code(), Code::Unimplemented, "{status:?}");
}

#[tokio::test]
async fn expired_certificates_are_refused_on_both_sides() {
    let ca = Ca::generate("ca").unwrap();
    let now = Timestamp::now();
    let past = Validity::starting(now - Duration::from_hours(48), Duration::from_hours(24));
    let expired = |identity| with(&ca, &ca.issue_for(&identity, &[], past).unwrap());
    let (_server, carrier) = bound(expired(agent())).await;
    let status = ask_new(&carrier, issued(&ca, &kubelet()), ExpectPeer::AnyAgent).await;
    assert!(chain(&status).contains("expired"), "{}", chain(&status));
    let (_server, carrier) = bound(issued(&ca, &agent())).await;
    let status = ask_new(&carrier, expired(kubelet()), ExpectPeer::AnyAgent).await;
    assert_ne!(status.code(), Code::Unimplemented, "{status:?}");
    assert!(chain(&status).contains("xpired"), "{}", chain(&status));
}

#[tokio::test]
async fn a_client_without_a_certificate_is_rejected() {
    let ca = Ca::generate("ca").unwrap();
    let (_server, carrier) = bound(issued(&ca, &agent())).await;
    let Carrier::Tcp(address) = carrier else {
        unreachable!()
    };
    let mut roots = rustls::RootCertStore::empty();
    let pem = ca.cert_pem().as_bytes();
    roots
        .add(rustls_pki_types::pem::PemObject::from_pem_slice(pem).unwrap())
        .unwrap();
    let mut config = rustls::ClientConfig::builder_with_provider(verifier::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(pinned::any_key())
        .with_no_client_auth();
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let stream = tokio::net::TcpStream::connect(&address).await.unwrap();
    let name = rustls_pki_types::ServerName::try_from("agent").unwrap();
    let error = match connector.connect(name, stream).await {
        Err(error) => error,
        Ok(mut stream) => stream.read_u8().await.unwrap_err(),
    };
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
}

#[tokio::test]
async fn refused_peers_do_not_disturb_others() {
    let ca = Ca::generate("ca").unwrap();
    let (_server, carrier) = bound(issued(&ca, &agent())).await;
    let Carrier::Tcp(address) = &carrier else {
        unreachable!()
    };
    // One client sends nothing, another does not speak TLS.
    let _silent = tokio::net::TcpStream::connect(address).await.unwrap();
    let mut rude = tokio::net::TcpStream::connect(address).await.unwrap();
    rude.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let status = ask_new(&carrier, issued(&ca, &kubelet()), ExpectPeer::AnyAgent).await;
    assert_eq!(status.code(), Code::Unimplemented, "{status:?}");
}

#[tokio::test]
async fn a_channel_reconnects_after_a_restart_of_the_server() {
    let ca = Ca::generate("ca").unwrap();
    let (server, carrier) = bound(issued(&ca, &agent())).await;
    let Carrier::Tcp(address) = &carrier else {
        unreachable!()
    };
    let address: SocketAddr = address.parse().unwrap();
    let credentials = Some(issued(&ca, &kubelet()));
    let channel = dial(carrier.clone(), credentials, ExpectPeer::AnyAgent).unwrap();
    assert_eq!(ask(channel.clone()).await.code(), Code::Unimplemented);
    drop(server);
    // tonic serves each connection in a task of its own; the channel must find the new server on the port.
    let incoming = listen::tcp(address, issued(&ca, &agent())).await;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    let mut incoming = incoming.ok();
    while incoming.is_none() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the port stays taken"
        );
        tokio::task::yield_now().await;
        incoming = listen::tcp(address, issued(&ca, &agent())).await.ok();
    }
    let _server = serve(incoming.unwrap());
    loop {
        let status = ask(channel.clone()).await;
        if status.code() == Code::Unimplemented {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "last: {status:?}");
    }
}

fn write(folder: &Path, pair: &CertifiedKey) {
    for (name, text) in [("crt", &pair.cert_pem), ("key", &pair.key_pem)] {
        let temporary = folder.join("new");
        #[expect(
            clippy::disallowed_methods,
            reason = "a test's own folder; renamed in place"
        )]
        fs::write(&temporary, text).unwrap();
        fs::rename(temporary, folder.join(name)).unwrap();
    }
}

#[tokio::test]
async fn changed_files_are_used_from_the_next_handshake_on() {
    let ca = Ca::generate("ca").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name| folder.path().join(name);
    #[expect(clippy::disallowed_methods, reason = "a test's own folder")]
    fs::write(path("ca"), ca.cert_pem()).unwrap();
    write(folder.path(), &ca.issue(&kubelet(), &[]).unwrap());
    let credentials = Credentials::from_files(path("ca"), path("crt"), path("key")).unwrap();
    let (_server, carrier) = bound(issued(&ca, &agent())).await;
    let says = async |name: &str| {
        let status = ask_new(&carrier, credentials.clone(), ExpectPeer::AnyAgent).await;
        assert!(
            status.message().contains(&format!("/{name} at")),
            "{status:?}"
        );
    };
    says("k").await;
    write(
        folder.path(),
        &ca.issue(&Identity::Ctl { name: "ann".into() }, &[])
            .unwrap(),
    );
    says("ann").await;
    assert_eq!(credentials.info().identity.unwrap().name(), "ann");
    // An invalid file does not break the link.
    let rubbish = CertifiedKey {
        cert_pem: "x".into(),
        key_pem: "y".into(),
    };
    write(folder.path(), &rubbish);
    says("ann").await;
}

#[test]
fn a_key_of_another_certificate_is_refused() {
    let ca = Ca::generate("ca").unwrap();
    let (a, b) = (
        ca.issue(&agent(), &[]).unwrap(),
        ca.issue(&agent(), &[]).unwrap(),
    );
    let error = Credentials::from_pem(ca.cert_pem(), &a.cert_pem, &b.key_pem).unwrap_err();
    assert!(chain(&error).contains("keys"), "{}", chain(&error));
}

#[tokio::test]
async fn a_unix_socket_knows_its_peer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run/agent.sock");
    let incoming = listen::unix(&path).unwrap();
    let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(path.parent().unwrap()).unwrap());
    assert_eq!(mode & 0o777, 0o700);
    let error = listen::unix(&path).unwrap_err();
    assert!(matches!(error, LinkError::InUse { .. }), "{error}");
    let server = serve(incoming);
    let channel = dial(Carrier::Unix(path.clone()), None, ExpectPeer::AnyAgent).unwrap();
    let status = ask(channel).await;
    let us = format!("uid {}, pid {}", own_uid(), std::process::id());
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unimplemented, us.as_str())
    );
    drop(server);
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_an_open_folder_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    let mode = |mode| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(folder.path(), mode).unwrap();
    };
    mode(0o700);
    // A socket that was bound and closed, but not removed, as a killed agent leaves it.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    drop(listen::unix(&path).unwrap());
    assert!(!path.exists(), "removed with its listener");
    mode(0o755);
    let error = listen::unix(&path).unwrap_err().to_string();
    assert!(error.contains("mode 0755"), "{error}");
}

#[test]
fn credentials_are_required_over_tcp_and_rejected_over_a_unix_socket() {
    let ca = Ca::generate("ca").unwrap();
    let unix = Carrier::Unix("/x".into());
    let error = dial(unix, Some(issued(&ca, &kubelet())), ExpectPeer::AnyAgent).unwrap_err();
    assert!(
        matches!(error, LinkError::NeedlessCredentials { .. }),
        "{error}"
    );
    let error = dial(Carrier::Tcp("a:1".into()), None, ExpectPeer::AnyAgent).unwrap_err();
    assert!(matches!(error, LinkError::NoCredentials { .. }), "{error}");
}

/// TLS runs over a unix socket, too. A kubelet reaches an agent in this way through a command that relays to a socket.
#[tokio::test]
async fn tls_runs_over_any_carrier() {
    let ca = Ca::generate("ca").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run/kubelets.sock");
    let listener = carrier::unix::Listener::bind(&path).unwrap();
    let _server = serve(listen::over_tls(listener, issued(&ca, &agent())));
    let carrier = Carrier::Unix(path.clone());
    let asked = async |credentials: Credentials| {
        let dialler = carrier::unix::Dialler { path: &path };
        let expect = ExpectPeer::Exactly(agent());
        let connection = connect::over_tls(&dialler, &carrier, &credentials, &expect, None).await;
        ask(near_side(connection.unwrap())).await
    };
    let status = asked(issued(&ca, &kubelet())).await;
    let known = "spiffe://knoc/kubelet/k at this host";
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unimplemented, known)
    );
    let other = Ca::generate("other").unwrap().issue(&kubelet(), &[]);
    let status = asked(with(&ca, &other.unwrap())).await;
    assert_ne!(status.code(), Code::Unimplemented, "{status:?}");
}

/// The shim is the far side and dials, the agent is the near side and listens; each knows the other's key.
#[tokio::test]
async fn over_a_pinned_link_the_server_dials() {
    let (agent, shim) = (
        pinned::KeyPair::generate("a").unwrap(),
        pinned::KeyPair::generate("s").unwrap(),
    );
    let mut incoming = pinned::listen(([127, 0, 0, 1], 0).into(), agent.clone())
        .await
        .unwrap();
    let address = incoming.local_addr().unwrap().to_string();
    let (dialled, accepted) =
        tokio::join!(pinned::dial(&address, &shim, agent.spki()), incoming.next());
    let near = accepted.unwrap().unwrap();
    let Peer::Pinned { spki, .. } = near.peer() else {
        panic!("{:?}", near.peer());
    };
    assert_eq!(**spki, *shim.spki());
    let mut tasks = JoinSet::new();
    let far = far_side(dialled.unwrap());
    tasks.spawn(async move {
        let mut server = server().layer(InterceptorLayer::new(who));
        server
            .add_routes(Routes::default())
            .serve_with_incoming(far)
            .await
            .unwrap();
    });
    let channel = near_side(near);
    let status = ask(channel.clone()).await;
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unimplemented, "the pinned peer")
    );
    // The far side's server ends with the connection, and not earlier.
    drop(channel);
    tokio::time::timeout(Duration::from_secs(10), tasks.join_next())
        .await
        .unwrap();
}

#[tokio::test]
async fn requests_of_a_near_side_fail_with_the_end_of_the_link() {
    let (near, far) = tokio::io::duplex(1024);
    drop(far);
    let peer = Peer::Unix { uid: 0, pid: None };
    let channel = near_side(Connection::new(near, peer));
    let first = ask(channel.clone()).await;
    assert_ne!(first.code(), Code::Unimplemented);
    let status = ask(channel).await;
    assert!(
        chain(&status).contains("the link has ended"),
        "{}",
        chain(&status)
    );
}

#[tokio::test]
async fn a_key_that_is_not_the_pinned_one_is_rejected() {
    let [agent, shim, thief] = ["a", "s", "t"].map(|name| pinned::KeyPair::generate(name).unwrap());
    let mut incoming = pinned::listen(([127, 0, 0, 1], 0).into(), agent)
        .await
        .unwrap();
    let address = incoming.local_addr().unwrap().to_string();
    let error = tokio::select! {
        result = pinned::dial(&address, &shim, thief.spki()) => result.unwrap_err(),
        _ = incoming.next() => panic!("accepted"),
    };
    assert!(
        chain(&error).contains(&format!("not the pinned key {}", thief.spki())),
        "{}",
        chain(&error)
    );
}

#[tokio::test]
async fn a_listener_may_have_smaller_bounds_than_its_process() {
    let pair = pinned::KeyPair::generate("x").unwrap();
    // Three of the silent ones may be of one source.
    let bounds = admission::Bounds {
        silent: 4,
        handshakes: 4,
        finished: 4,
    };
    let listening = pinned::listen_within(([127, 0, 0, 1], 0).into(), pair, bounds);
    let mut incoming = listening.await.unwrap();
    let target = incoming.local_addr().unwrap();
    let mut server = JoinSet::new();
    server.spawn(async move { while incoming.next().await.is_some() {} });
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(tokio::net::TcpStream::connect(target).await.unwrap());
    }
    // Sooner than one is closed that only stays silent.
    let oldest = tokio::time::timeout(Duration::from_secs(4), silent[0].read_u8()).await;
    assert!(oldest.unwrap().is_err(), "it is closed for the newest one");
}

#[test]
fn a_pinned_pair_is_read_back_from_its_files() {
    let pair = pinned::KeyPair::generate("x").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let kept = CertifiedKey {
        cert_pem: pair.cert_pem().into(),
        key_pem: pair.key_pem().into(),
    };
    write(folder.path(), &kept);
    let (crt, key) = (folder.path().join("crt"), folder.path().join("key"));
    assert_eq!(
        pinned::KeyPair::from_files(&crt, &key).unwrap().spki(),
        pair.spki()
    );
}
