//! Agents that dial a kubelet on loopback. Their servers answer as those of the other tests do.
use tokio::{io::AsyncWriteExt as _, net::TcpStream, task::JoinSet};
use tonic::Code;

use super::*;
use crate::{
    Identity, Incoming,
    dial_out::{self, Caller, Target},
    far_side, near_side,
    pki::Ca,
    tests::{agent, ask, issued, kubelet, serve},
};

/// A kubelet that listens.
struct Kubelet {
    dial_in: DialIn,
    address: SocketAddr,
    _task: JoinSet<()>,
}

fn kubelet_with(credentials: Credentials) -> Kubelet {
    let expect = ExpectPeer::Exactly(agent());
    let (dial_in, desk) = prepare(([127, 0, 0, 1], 0).into(), credentials, expect);
    let reception = desk.open().unwrap();
    let address = reception.local_addr().unwrap();
    let mut task = JoinSet::new();
    task.spawn(reception.run(CancellationToken::new()));
    Kubelet {
        dial_in,
        address,
        _task: task,
    }
}

fn target(address: SocketAddr) -> Target {
    Target {
        carrier: Carrier::Tcp(address.to_string()),
        server_name: Some("kubelet.example.org".into()),
        expect: ExpectPeer::AnyKubelet,
    }
}

/// An agent that always has one connection waiting, and serves those that are taken.
fn dialling(address: SocketAddr, credentials: Credentials, caller: Caller) -> JoinSet<()> {
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut servers = JoinSet::new();
        let target = target(address);
        while let Ok(waiting) = dial_out::dial(&target, &credentials, &caller).await {
            let Ok(connection) = waiting.taken().await else {
                break;
            };
            servers.spawn(async move {
                let mut server = serve(Incoming::of(futures::stream::iter([connection])));
                std::future::pending::<()>().await;
                server.abort_all();
            });
        }
    });
    task
}

#[tokio::test]
async fn a_kubelet_calls_an_agent_that_has_dialled_it() {
    let ca = Ca::generate("ca").unwrap();
    let kubelet = kubelet_with(issued(&ca, &kubelet()));
    // Both ask before there is an agent, and each has a connection of its own.
    let (control, bulk) = (kubelet.dial_in.channel(), kubelet.dial_in.channel());
    let caller = Caller::new("a/1", 1, "login1");
    let _agent = dialling(kubelet.address, issued(&ca, &agent()), caller);
    let (first, second) = tokio::join!(ask(control.clone()), ask(bulk));
    let known = format!("spiffe://knoc/kubelet/k at {}", kubelet.address);
    for status in [first, second, ask(control).await] {
        assert_eq!(
            (status.code(), status.message()),
            (Code::Unimplemented, &*known)
        );
    }
}

#[tokio::test]
async fn of_two_agents_of_a_site_the_one_with_the_higher_epoch_serves() {
    let ca = Ca::generate("ca").unwrap();
    let kubelet = kubelet_with(issued(&ca, &kubelet()));
    let credentials = issued(&ca, &agent());
    let dial = async |caller: &Caller| {
        dial_out::dial(&target(kubelet.address), &credentials, caller).await
    };
    let (old, new) = (
        Caller::new("login1/1", 1, "login1"),
        Caller::new("login2/1", 2, "login2"),
    );
    let waiting = dial(&old).await.unwrap();
    let (served, taken) = tokio::join!(take_and_begin(&kubelet.dial_in), waiting.taken());
    let (mut near, mut far) = (served, taken.unwrap());
    assert_eq!(far.read_u8().await.unwrap(), greeting::HTTP2);
    let _waiting = dial(&new).await.unwrap();
    // Both ends of the older agent's connection end.
    near.read_u8().await.unwrap_err();
    drop(near);
    far.read_u8().await.unwrap_err();
    let error = dial(&old).await.unwrap_err();
    let text = error.to_string();
    assert!(
        matches!(error, LinkError::Superseded { epoch: 2, .. }) && text.contains("login2"),
        "{text}"
    );
}

/// The agent judges the kubelet by the certificate that it has seen, so the connection that waits is of no use after a renewal.
#[tokio::test]
async fn a_connection_that_was_opened_before_a_renewal_is_not_taken() {
    let ca = Ca::generate("ca").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let [ca_file, cert, key] = ["ca", "cert", "key"].map(|name| folder.path().join(name));
    let renew = || {
        let pair = ca.issue(&crate::tests::kubelet(), &[]).unwrap();
        std::fs::write(&ca_file, ca.cert_pem()).unwrap();
        std::fs::write(&cert, &pair.cert_pem).unwrap();
        std::fs::write(&key, &pair.key_pem).unwrap();
    };
    renew();
    let kubelet = kubelet_with(Credentials::from_files(&ca_file, &cert, &key).unwrap());
    let credentials = issued(&ca, &agent());
    let caller = Caller::new("a/1", 1, "login1");
    let target = target(kubelet.address);
    let dial = async || {
        dial_out::dial(&target, &credentials, &caller)
            .await
            .unwrap()
    };
    let shown = |peer: &Peer| match peer {
        Peer::Tls { certificate, .. } => certificate.info().spki.clone(),
        Peer::Unix { .. } | Peer::Command | Peer::Pinned { .. } => panic!("{peer}"),
    };
    let old = dial().await;
    let seen = shown(old.peer());
    renew();
    let again = async {
        old.taken().await.unwrap_err();
        dial().await.taken().await.unwrap()
    };
    let (_near, far) = tokio::join!(take_and_begin(&kubelet.dial_in), again);
    assert_ne!(shown(far.peer()), seen);
}

/// Takes a connection and begins HTTP/2 on it.
async fn take_and_begin(dial_in: &DialIn) -> Connection {
    let mut near = dial_in.take().await.unwrap();
    near.write_u8(greeting::HTTP2).await.unwrap();
    near.flush().await.unwrap();
    near
}

#[tokio::test]
async fn a_connection_that_its_agent_has_lost_is_cut_and_the_others_stay() {
    let ca = Ca::generate("ca").unwrap();
    let kubelet = kubelet_with(issued(&ca, &kubelet()));
    let credentials = issued(&ca, &agent());
    let caller = Caller::new("a/1", 1, "login1");
    let target = target(kubelet.address);
    let open = async || {
        let waiting = dial_out::dial(&target, &credentials, &caller)
            .await
            .unwrap();
        let (near, far) = tokio::join!(take_and_begin(&kubelet.dial_in), waiting.taken());
        (near, far.unwrap())
    };
    // The end of the first one's socket never reaches the kubelet: the relay keeps it open.
    let mut half_open = relay(kubelet.address).await;
    let through = Target {
        carrier: Carrier::Tcp(half_open.0.clone()),
        ..target.clone()
    };
    let waiting = dial_out::dial(&through, &credentials, &caller)
        .await
        .unwrap();
    let (mut lost, far) = tokio::join!(take_and_begin(&kubelet.dial_in), waiting.taken());
    drop(far);
    let (mut near, mut far) = open().await;
    lost.read_u8().await.unwrap_err();
    let _third = open().await;
    assert_eq!(far.read_u8().await.unwrap(), greeting::HTTP2);
    far.write_u8(7).await.unwrap();
    far.flush().await.unwrap();
    assert_eq!(near.read_u8().await.unwrap(), 7);
    half_open.1.abort_all();
}

/// Relays one connection towards `to`, and never tells it of the end.
async fn relay(to: SocketAddr) -> (String, JoinSet<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut task = JoinSet::new();
    task.spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = TcpStream::connect(to).await.unwrap();
        let (mut near_read, mut near_write) = near.split();
        let (mut far_read, mut far_write) = far.split();
        let out = async {
            tokio::io::copy(&mut near_read, &mut far_write).await.ok();
            std::future::pending::<()>().await;
        };
        let back = async {
            tokio::io::copy(&mut far_read, &mut near_write).await.ok();
            std::future::pending::<()>().await;
        };
        tokio::join!(out, back);
    });
    (address, task)
}

async fn why_nobody(kubelet: &Kubelet) -> String {
    let error = kubelet.dial_in.take().await.unwrap_err();
    assert!(
        matches!(error, LinkError::NobodyDialledIn { .. }),
        "{error}"
    );
    error.to_string()
}

/// Each of these is what the kubelet sees of an Ingress that terminates TLS, or of an agent that is not expected.
#[tokio::test]
async fn those_who_are_refused_are_named_where_an_agent_is_missed() {
    let ca = Ca::generate("ca").unwrap();
    let cases = [
        ("no certificate of the peer arrived", None),
        ("does not speak TLS", None),
        ("expected is spiffe://knoc/agent/site", Some("another")),
        ("the peer does not trust the CA", Some("site")),
    ];
    let mut asked = JoinSet::new();
    for (at, (words, site)) in cases.into_iter().enumerate() {
        let kubelet = kubelet_with(issued(&ca, &kubelet()));
        let address = kubelet.address;
        match site {
            Some(site) => {
                let identity = Identity::Agent { site: site.into() };
                let ca = if at == 2 {
                    ca_of(&ca)
                } else {
                    Ca::generate("other").unwrap()
                };
                let credentials = issued(&ca, &identity);
                let caller = Caller::new("a/1", 1, "login1");
                let error = dial_out::dial(&target(address), &credentials, &caller).await;
                error.unwrap_err();
            }
            None if at == 0 => ingress_without_certificate(address).await,
            None => {
                let mut io = TcpStream::connect(address).await.unwrap();
                io.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
                drop(io.read_u8().await);
            }
        }
        asked.spawn(async move {
            let text = why_nobody(&kubelet).await;
            assert!(text.contains(words), "{words}: {text}");
        });
    }
    asked.join_all().await;
}

fn ca_of(ca: &Ca) -> Ca {
    Ca::from_pem(ca.cert_pem(), &ca.key_pem()).unwrap()
}

async fn ingress_without_certificate(address: SocketAddr) {
    let config = rustls::ClientConfig::builder_with_provider(crate::verifier::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(crate::pinned::any_key())
        .with_no_client_auth();
    let io = TcpStream::connect(address).await.unwrap();
    let name = rustls_pki_types::ServerName::try_from("x").unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let mut io = connector.connect(name, io).await.unwrap();
    io.read_u8().await.unwrap_err();
}

/// What the agent sees of an Ingress that terminates TLS, and of a kubelet that does not expect it.
#[tokio::test]
async fn an_agent_says_why_it_does_not_reach_its_kubelet() {
    let ca = Ca::generate("ca").unwrap();
    let (config, _) = ingress_config();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ingress = listener.local_addr().unwrap();
    let mut task = JoinSet::new();
    task.spawn(async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        while let Ok((io, _)) = listener.accept().await {
            drop(acceptor.accept(io).await);
        }
    });
    let caller = Caller::new("a/1", 1, "login1");
    let credentials = issued(&ca, &agent());
    let error = dial_out::dial(&target(ingress), &credentials, &caller).await;
    let text = chain(&error.unwrap_err());
    assert!(
        text.contains("foreign certificate") && text.contains("terminates TLS"),
        "{text}"
    );
    let kubelet = kubelet_with(issued(&ca, &kubelet()));
    let stranger = Identity::Agent { site: "b".into() };
    let error = dial_out::dial(&target(kubelet.address), &issued(&ca, &stranger), &caller).await;
    let text = chain(&error.unwrap_err());
    assert!(text.contains("the peer refused our certificate"), "{text}");
}

/// A server with a certificate as any web server has it.
fn ingress_config() -> (rustls::ServerConfig, ()) {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["kubelet.example.org".to_owned()]).unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let der = rustls_pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(crate::verifier::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], der)
        .unwrap();
    (config, ())
}

/// Two ends of a connection over a proxy that cuts what is silent for a minute.
fn through_an_impatient_proxy() -> (Connection, Connection, JoinSet<()>) {
    let (near, mut near_end) = tokio::io::duplex(1 << 16);
    let (far, mut far_end) = tokio::io::duplex(1 << 16);
    let mut task = JoinSet::new();
    task.spawn(async move {
        let (mut from_near, mut from_far) = ([0; 4096], [0; 4096]);
        loop {
            let idle = tokio::time::sleep(Duration::from_mins(1));
            tokio::select! {
                read = near_end.read(&mut from_near) => match read {
                    Ok(size @ 1..) => far_end.write_all(&from_near[..size]).await.unwrap(),
                    _ => return,
                },
                read = far_end.read(&mut from_far) => match read {
                    Ok(size @ 1..) => near_end.write_all(&from_far[..size]).await.unwrap(),
                    _ => return,
                },
                () = idle => return,
            }
        }
    });
    let peer = Peer::Unix { uid: 0, pid: None };
    (
        Connection::new(near, peer.clone()),
        Connection::new(far, peer),
        task,
    )
}

#[tokio::test(start_paused = true)]
async fn a_proxy_that_cuts_silent_connections_cuts_none_of_ours() {
    let (near, far, _proxy) = through_an_impatient_proxy();
    let (ask_for_it, asked) = oneshot::channel();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        tokio::time::sleep(Duration::from_mins(10)).await;
        ask_for_it.send(()).unwrap();
    });
    let waiting = dial_out::Waiting::over(far);
    let take = async {
        let Attended::Ready(mut near) = attend(near, asked, false).await else {
            panic!("the connection was lost while it waited");
        };
        near.write_u8(greeting::HTTP2).await.unwrap();
    };
    let (far, ()) = tokio::join!(waiting.taken(), take);
    far.unwrap();
    let (near, far, _proxy) = through_an_impatient_proxy();
    let _server = {
        let mut server = crate::server();
        let serving = server
            .add_routes(tonic::service::Routes::default())
            .serve_with_incoming(far_side(far));
        tasks.spawn(serving.map(drop))
    };
    // This side cannot connect again.
    let channel = near_side(near);
    for _ in 0..3 {
        assert_eq!(ask(channel.clone()).await.code(), Code::Unimplemented);
        tokio::time::sleep(Duration::from_mins(10)).await;
    }
}
