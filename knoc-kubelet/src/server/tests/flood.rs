//! One address keeps useless connections open, and the API server and a scraper are still served.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustls::pki_types::ServerName;
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpSocket, TcpStream},
    task::JoinSet,
};

use crate::server::User;

use super::harness::*;

const ATTACKER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// Allows one flood at a time, since they would disturb each other's measurements.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
/// The pause before a closed connection is opened again.
const AGAIN: Duration = Duration::from_secs(1);

async fn from(address: Ipv4Addr, fixture: &Fixture) -> std::io::Result<TcpStream> {
    open(address, fixture.address).await
}

async fn open(address: Ipv4Addr, target: std::net::SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((address, 0).into())?;
    socket.connect(target).await
}

/// Either kind of connection.
trait Stream: tokio::io::AsyncRead + Send + Unpin {}

impl<S: tokio::io::AsyncRead + Send + Unpin> Stream for S {}

/// Opens a connection, with a handshake if wanted and if the server does not close it before.
async fn begin(
    stream: TcpStream,
    connector: Option<&tokio_rustls::TlsConnector>,
) -> Option<Box<dyn Stream>> {
    let Some(connector) = connector else {
        return Some(Box::new(stream));
    };
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let stream = connector.connect(name, stream).await.ok()?;
    Some(Box::new(stream))
}

/// Keeps `count` connections open until dropped: silent ones, or ones that finish their handshake and send no request.
async fn flood(fixture: &Fixture, count: usize, handshake: bool) -> JoinSet<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    let connector = handshake
        .then(|| tokio_rustls::TlsConnector::from(Arc::new(client_config(&fixture.ca.pem, None))));
    let (tried, target) = (Arc::new(AtomicUsize::new(0)), fixture.address);
    let mut tasks = JoinSet::new();
    for _ in 0..count {
        let (tried, connector) = (Arc::clone(&tried), connector.clone());
        tasks.spawn(async move {
            let mut first = true;
            loop {
                let mut stream = match open(ATTACKER, target).await {
                    Err(_) => None,
                    Ok(stream) => begin(stream, connector.as_ref()).await,
                };
                if std::mem::take(&mut first) {
                    tried.fetch_add(1, Ordering::Relaxed);
                }
                if let Some(stream) = &mut stream {
                    // Until the server closes it.
                    stream.read_u8().await.ok();
                }
                drop(stream);
                // A handshake takes CPU time on both sides, which is scarce on a test machine.
                tokio::time::sleep(if handshake { 5 * AGAIN } else { AGAIN }).await;
            }
        });
    }
    let began = Instant::now();
    while tried.load(Ordering::Relaxed) < count {
        assert!(began.elapsed() < PATIENCE, "{tried:?} of {count}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tasks
}

async fn fixture() -> Fixture {
    let scraper = User {
        name: "scraper".to_owned(),
        ..User::default()
    };
    let cluster = FakeCluster {
        tokens: [("t".to_owned(), scraper)].into(),
        allowed: vec!["scraper get healthz"],
        ..FakeCluster::default()
    };
    Fixture::new(FakeBackend::default(), cluster).await
}

/// New connections of an API server and of a scraper, at both addresses, are answered in time.
async fn both_are_served(fixture: &Fixture) {
    let master = fixture.master();
    for (address, goal) in [(Ipv4Addr::LOCALHOST, 1), (ATTACKER, 3)] {
        for (identity, token) in [(Some(&master), None), (None, Some("t"))] {
            // The best of several attempts, since tests run in parallel.
            let mut best = PATIENCE;
            for _ in 0..3 {
                let began = Instant::now();
                let stream = from(address, fixture).await.unwrap();
                let mut client = Fixture::connect_over(stream, &fixture.ca.pem, identity).await;
                assert_eq!(client.get_as("/healthz", token).await.0, 200);
                best = best.min(began.elapsed());
            }
            assert!(
                best < Duration::from_secs(goal),
                "{address} {token:?}: {best:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_silent_connections_lock_nobody_out() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let fixture = fixture().await;
    let _flood = flood(&fixture, 5000, false).await;
    both_are_served(&fixture).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_never_show_an_identity_lock_nobody_out() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let fixture = fixture().await;
    // These were connected before and stay connected: identified clients are never closed for others.
    let master = fixture.master();
    let mut api_server = fixture.connect(Some(&master)).await;
    let mut scraper = fixture.connect(None).await;
    assert_eq!(scraper.get_as("/healthz", Some("t")).await.0, 200);
    let flood = flood(&fixture, 300, true).await;
    both_are_served(&fixture).await;
    drop(flood);
    assert_eq!(api_server.get("/healthz").await.0, 200);
    assert_eq!(scraper.get_as("/healthz", Some("t")).await.0, 200);
}

#[tokio::test]
async fn a_flood_of_unknown_tokens_costs_few_reviews_and_delays_no_known_one() {
    let fixture = fixture().await;
    let mut scraper = fixture.connect(None).await;
    assert_eq!(scraper.get_as("/healthz", Some("t")).await.0, 200);
    let stream = from(ATTACKER, &fixture).await.unwrap();
    let mut attacker = Fixture::connect_over(stream, &fixture.ca.pem, None).await;
    let began = Instant::now();
    let mut told = [0_usize; 2];
    for number in 0..500 {
        let guess = format!("guess {number}");
        let (status, text) = attacker.get_as("/healthz", Some(&guess)).await;
        match status {
            401 => told[0] += 1,
            429 => told[1] += 1,
            other => panic!("{other} {text}"),
        }
    }
    let [reviewed, busy] = told;
    let most = 20 + usize::try_from(began.elapsed().as_millis() / 100).unwrap() + 1;
    assert!(
        reviewed <= most && busy > 0,
        "{reviewed} of at most {most}, {busy} busy"
    );
    let reviews = fixture.cluster.reviews.lock().unwrap().clone();
    let tokens = reviews.iter().filter(|review| *review == "token").count();
    assert_eq!(tokens, reviewed + 1);
    assert_eq!(scraper.get_as("/healthz", Some("t")).await.0, 200);
}
