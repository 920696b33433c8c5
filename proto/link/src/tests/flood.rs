//! One address keeps thousands of useless connections open, and everybody else is still served.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpSocket, TcpStream};

use super::*;

const ATTACKER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const CONNECTIONS: usize = 5000;
/// How long the attacker waits before it reopens a connection that was closed.
const REOPEN_AFTER: Duration = Duration::from_secs(1);
/// Only one flood runs at a time; otherwise they would disturb each other's measurements.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
const DEADLINE: Duration = Duration::from_secs(20);

/// How the attacker's connections behave.
#[derive(Clone)]
enum Behaviour {
    Silent,
    /// Sends single bytes of a record that never ends.
    Trickle,
    /// Finishes the handshake with a certificate that is accepted, and then sends nothing.
    Mute(Credentials),
}

async fn from(address: Ipv4Addr, target: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((address, 0).into())?;
    socket.connect(target).await
}

/// Behaves as told until the server closes the connection.
async fn attack(mut stream: TcpStream, behaviour: &Behaviour) -> std::io::Result<()> {
    match behaviour {
        Behaviour::Silent => stream.read_u8().await.map(drop),
        Behaviour::Trickle => loop {
            for byte in [0x16, 3, 1, 0x40, 0] {
                stream.write_all(&[byte]).await?;
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        },
        Behaviour::Mute(credentials) => {
            let material = credentials.material();
            let (roots, key) = (&material.roots, &material.key);
            let config = tls::client(
                roots,
                key,
                ExpectPeer::AnyAgent,
                tls::ClaimedIdentity::default(),
            );
            let connector = tokio_rustls::TlsConnector::from(Arc::new(config.unwrap()));
            let name = rustls_pki_types::ServerName::IpAddress(ATTACKER.into());
            let mut stream = connector.connect(name, stream).await?;
            stream.read_u8().await.map(drop)
        }
    }
}

/// Raises the limit of open files, since this process has both ends of thousands of connections.
fn raise_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}

/// Keeps `count` connections open until the returned set is dropped. Returns once each has been tried.
async fn flood(target: SocketAddr, count: usize, behaviour: Behaviour) -> JoinSet<()> {
    let tried = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..count {
        let (tried, behaviour) = (Arc::clone(&tried), behaviour.clone());
        tasks.spawn(async move {
            let mut first = true;
            loop {
                let opened = from(ATTACKER, target).await;
                if std::mem::take(&mut first) {
                    tried.fetch_add(1, Ordering::Relaxed);
                }
                if let Ok(stream) = opened {
                    // The server closes it, as an attacker must expect.
                    attack(stream, &behaviour).await.ok();
                }
                // A handshake costs both sides CPU time, of which a test machine has little.
                let pause = match behaviour {
                    Behaviour::Silent | Behaviour::Trickle => REOPEN_AFTER,
                    Behaviour::Mute(_) => 5 * REOPEN_AFTER,
                };
                tokio::time::sleep(pause).await;
            }
        });
    }
    let began = Instant::now();
    while tried.load(Ordering::Relaxed) < count {
        assert!(
            began.elapsed() < DEADLINE,
            "{tried:?} of {count} connections"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tasks
}

/// How long a client at this address waits for its response: the best of several attempts, since tests run in parallel.
async fn answered(address: Ipv4Addr, target: SocketAddr, credentials: &Credentials) -> Duration {
    let mut best = DEADLINE;
    for _ in 0..3 {
        let began = Instant::now();
        let (client, dialled) = (credentials.clone(), ExpectPeer::AnyAgent);
        let connector = tower::service_fn(move |_: tonic::transport::Uri| {
            let (client, dialled) = (client.clone(), dialled.clone());
            async move {
                let stream = from(address, target).await?;
                let material = client.material();
                let (roots, key) = (&material.roots, &material.key);
                let config = tls::client(roots, key, dialled, tls::ClaimedIdentity::default());
                let connector = tokio_rustls::TlsConnector::from(Arc::new(config.unwrap()));
                let name = rustls_pki_types::ServerName::IpAddress(address.into());
                let stream = connector.connect(name, stream).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let status = ask(endpoint().connect_with_connector_lazy(connector)).await;
        assert_eq!(status.code(), Code::Unimplemented, "{status:?}");
        best = best.min(began.elapsed());
    }
    best
}

/// Checks that clients at another and at the attacker's own address are served during a flood of this behaviour.
async fn both_are_served(count: usize, behaviour: impl FnOnce(Credentials) -> Behaviour) {
    let _alone = ONE_AT_A_TIME.lock().await;
    raise_limit();
    let ca = Ca::generate("ca").unwrap();
    let (_server, carrier) = bound(issued(&ca, &agent())).await;
    let Carrier::Tcp(address) = &carrier else {
        unreachable!()
    };
    let target: SocketAddr = address.parse().unwrap();
    let credentials = issued(&ca, &kubelet());
    let _flood = flood(target, count, behaviour(credentials.clone())).await;
    let elsewhere = answered(Ipv4Addr::LOCALHOST, target, &credentials).await;
    assert!(
        elsewhere < Duration::from_secs(1),
        "at another address: {elsewhere:?}"
    );
    let same_address = answered(ATTACKER, target, &credentials).await;
    assert!(
        same_address < Duration::from_secs(3),
        "at the same address: {same_address:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_silent_connections_keep_nobody_out() {
    both_are_served(CONNECTIONS, |_| Behaviour::Silent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_trickle_bytes_keep_nobody_out() {
    both_are_served(1500, |_| Behaviour::Trickle).await;
}

/// They present an accepted certificate and are closed nevertheless.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_never_ask_anything_after_their_handshake_keep_nobody_out() {
    both_are_served(100, Behaviour::Mute).await;
    let ca = Ca::generate("ca").unwrap();
    let (_server, carrier) = bound(issued(&ca, &agent())).await;
    let credentials = issued(&ca, &kubelet());
    let mute = connect(&carrier, Some(&credentials), &ExpectPeer::AnyAgent);
    let mut mute = mute.await.unwrap();
    let closed = tokio::time::timeout(DEADLINE, mute.read_u8()).await;
    assert!(closed.is_ok(), "it is still open");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_silent_connections_keep_no_shim_out() {
    let _alone = ONE_AT_A_TIME.lock().await;
    raise_limit();
    let [agent, shim] = ["a", "s"].map(|name| pinned::KeyPair::generate(name).unwrap());
    let spki = agent.spki().to_owned();
    let mut incoming = pinned::listen(([127, 0, 0, 1], 0).into(), agent)
        .await
        .unwrap();
    let target = incoming.local_addr().unwrap();
    let mut server = JoinSet::new();
    server.spawn(async move {
        let mut links = Vec::new();
        while let Some(link) = incoming.next().await {
            links.push(link);
        }
    });
    let _flood = flood(target, CONNECTIONS, Behaviour::Silent).await;
    let mut best = DEADLINE;
    for _ in 0..3 {
        let began = Instant::now();
        pinned::dial(&target.to_string(), &shim, &spki)
            .await
            .unwrap();
        best = best.min(began.elapsed());
    }
    assert!(best < Duration::from_secs(1), "{best:?}");
}

/// The useless connections that a listener has open stay within its bounds, and each is closed in the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_are_bounded_and_end() {
    let _alone = ONE_AT_A_TIME.lock().await;
    raise_limit();
    let ca = Ca::generate("ca").unwrap();
    let (_server, carrier) = bound(issued(&ca, &agent())).await;
    let Carrier::Tcp(address) = &carrier else {
        unreachable!()
    };
    let target: SocketAddr = address.parse().unwrap();
    let mut streams = Vec::new();
    // More connections than any listener admits of one source.
    for _ in 0..3200 {
        streams.push(from(ATTACKER, target).await.unwrap());
    }
    let began = Instant::now();
    let closed = tokio::time::timeout(Duration::from_secs(2), streams[0].read_u8()).await;
    assert!(
        closed.unwrap().is_err(),
        "the oldest is closed for a newer one"
    );
    let newest = streams.last_mut().unwrap();
    let closed = tokio::time::timeout(DEADLINE, newest.read_u8()).await;
    assert!(closed.unwrap().is_err());
    let took = began.elapsed();
    let expected = Duration::from_secs(3)..Duration::from_secs(10);
    assert!(
        expected.contains(&took),
        "the newest has some seconds, it had {took:?}"
    );
}
