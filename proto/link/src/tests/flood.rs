//! One address keeps thousands of connections open that come to nothing, and everybody else is served.

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
/// What a connection that was closed waits before it is opened again.
const AGAIN: Duration = Duration::from_secs(1);
/// One flood at a time: they would measure each other.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
const PATIENCE: Duration = Duration::from_secs(20);

/// What the attacker's connections do.
#[derive(Clone)]
enum Habit {
    Silent,
    /// A byte now and then, of a record that never ends.
    Trickle,
    /// The handshake with a certificate that is accepted, and nothing after it.
    Mute(Credentials),
}

async fn from(address: Ipv4Addr, target: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((address, 0).into())?;
    socket.connect(target).await
}

/// Sends what its habit is until the other side has had enough.
async fn bother(mut stream: TcpStream, habit: &Habit) -> std::io::Result<()> {
    match habit {
        Habit::Silent => stream.read_u8().await.map(drop),
        Habit::Trickle => loop {
            for byte in [0x16, 3, 1, 0x40, 0] {
                stream.write_all(&[byte]).await?;
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        },
        Habit::Mute(credentials) => {
            let material = credentials.material();
            let (roots, key) = (&material.roots, &material.key);
            let config = tls::client(roots, key, ExpectPeer::AnyAgent, tls::Seen::default());
            let connector = tokio_rustls::TlsConnector::from(Arc::new(config.unwrap()));
            let name = rustls_pki_types::ServerName::IpAddress(ATTACKER.into());
            let mut stream = connector.connect(name, stream).await?;
            stream.read_u8().await.map(drop)
        }
    }
}

/// For both ends of thousands of connections in one process.
fn raise_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}

/// Keeps connections open until dropped; returns once all of them have been tried.
async fn flood(target: SocketAddr, count: usize, habit: Habit) -> JoinSet<()> {
    let tried = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..count {
        let (tried, habit) = (Arc::clone(&tried), habit.clone());
        tasks.spawn(async move {
            let mut first = true;
            loop {
                let opened = from(ATTACKER, target).await;
                if std::mem::take(&mut first) {
                    tried.fetch_add(1, Ordering::Relaxed);
                }
                if let Ok(stream) = opened {
                    // Closed by the other side, which is what an attacker has to expect.
                    bother(stream, &habit).await.ok();
                }
                // A handshake costs both sides computing time, of which a test machine has little.
                let again = match habit {
                    Habit::Silent | Habit::Trickle => AGAIN,
                    Habit::Mute(_) => 5 * AGAIN,
                };
                tokio::time::sleep(again).await;
            }
        });
    }
    let began = Instant::now();
    while tried.load(Ordering::Relaxed) < count {
        assert!(
            began.elapsed() < PATIENCE,
            "{tried:?} of {count} connections"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tasks
}

/// How long a client at this address takes until it is answered, at the best of several times: tests run side by side.
async fn answered(address: Ipv4Addr, target: SocketAddr, credentials: &Credentials) -> Duration {
    let mut best = PATIENCE;
    for _ in 0..3 {
        let began = Instant::now();
        let (client, dialled) = (credentials.clone(), ExpectPeer::AnyAgent);
        let connector = tower::service_fn(move |_: tonic::transport::Uri| {
            let (client, dialled) = (client.clone(), dialled.clone());
            async move {
                let stream = from(address, target).await?;
                let material = client.material();
                let (roots, key) = (&material.roots, &material.key);
                let config = tls::client(roots, key, dialled, tls::Seen::default());
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

/// The goal, against a flood of this habit.
async fn both_are_served(count: usize, habit: impl FnOnce(Credentials) -> Habit) {
    let _alone = ONE_AT_A_TIME.lock().await;
    raise_limit();
    let ca = Ca::generate("ca").unwrap();
    let (_server, carrier) = bound(issued(&ca, &agent())).await;
    let Carrier::Tcp(address) = &carrier else {
        unreachable!()
    };
    let target: SocketAddr = address.parse().unwrap();
    let credentials = issued(&ca, &kubelet());
    let _flood = flood(target, count, habit(credentials.clone())).await;
    let elsewhere = answered(Ipv4Addr::LOCALHOST, target, &credentials).await;
    assert!(
        elsewhere < Duration::from_secs(1),
        "at another address: {elsewhere:?}"
    );
    let beside = answered(ATTACKER, target, &credentials).await;
    assert!(
        beside < Duration::from_secs(3),
        "at the same address: {beside:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_silent_connections_keep_nobody_out() {
    both_are_served(CONNECTIONS, |_| Habit::Silent).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_trickle_bytes_keep_nobody_out() {
    both_are_served(1500, |_| Habit::Trickle).await;
}

/// They have a certificate that is accepted, and are closed all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_never_ask_anything_after_their_handshake_keep_nobody_out() {
    both_are_served(100, Habit::Mute).await;
    let ca = Ca::generate("ca").unwrap();
    let (_server, carrier) = bound(issued(&ca, &agent())).await;
    let credentials = issued(&ca, &kubelet());
    let mute = connect(&carrier, Some(&credentials), &ExpectPeer::AnyAgent);
    let mut mute = mute.await.unwrap();
    let closed = tokio::time::timeout(PATIENCE, mute.read_u8()).await;
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
    let _flood = flood(target, CONNECTIONS, Habit::Silent).await;
    let mut best = PATIENCE;
    for _ in 0..3 {
        let began = Instant::now();
        pinned::dial(&target.to_string(), &shim, &spki)
            .await
            .unwrap();
        best = best.min(began.elapsed());
    }
    assert!(best < Duration::from_secs(1), "{best:?}");
}

/// What the listener has open of connections that come to nothing stays within its bounds, and none of it stays for good.
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
    // More than any listener takes of one source.
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
    let closed = tokio::time::timeout(PATIENCE, newest.read_u8()).await;
    assert!(closed.unwrap().is_err());
    let took = began.elapsed();
    let expected = Duration::from_secs(3)..Duration::from_secs(10);
    assert!(
        expected.contains(&took),
        "the newest has some seconds, it had {took:?}"
    );
}
