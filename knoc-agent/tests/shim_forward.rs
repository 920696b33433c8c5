//! Port-forward at the shim, over its link.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod harness;

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use harness::{
    DEADLINE, sh,
    streams::{stop, up},
};
use knoc_proto::{
    pb::{
        self, PortForwardInput, PortForwardStart, port_forward_input::Input as ToPod,
        port_forward_output::Output as FromPod, shim_client::ShimClient,
    },
    reason::ErrorReason,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

/// One forwarded connection.
struct Forwarded {
    input: mpsc::Sender<PortForwardInput>,
    output: Streaming<pb::PortForwardOutput>,
}

impl Forwarded {
    async fn new(shim: &ShimClient<Channel>, port: u16) -> Result<Self, Status> {
        let (input, inputs) = mpsc::channel(4);
        let start = PortForwardStart {
            port: port.into(),
            ..Default::default()
        };
        let forwarded = |output| Self {
            input: input.clone(),
            output,
        };
        let sent = input.send(PortForwardInput {
            input: Some(ToPod::Start(start)),
        });
        sent.await.unwrap();
        let answer = shim
            .clone()
            .port_forward(ReceiverStream::new(inputs))
            .await?;
        let mut forwarded = forwarded(answer.into_inner());
        let first = forwarded.next().await?;
        assert_eq!(first, Some(FromPod::Connected(true)));
        Ok(forwarded)
    }

    async fn next(&mut self) -> Result<Option<FromPod>, Status> {
        let next = tokio::time::timeout(DEADLINE, self.output.message());
        let next = next.await.expect("the connection says nothing")?;
        Ok(next.and_then(|message| message.output))
    }

    async fn send(&self, input: ToPod) {
        self.input
            .send(PortForwardInput { input: Some(input) })
            .await
            .unwrap();
    }

    /// All that comes until the pod has closed its side.
    async fn all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            match self.next().await.unwrap() {
                Some(FromPod::Data(data)) => all.extend_from_slice(&data),
                Some(FromPod::Closed(_)) => return all,
                other => panic!("{other:?} after {} bytes", all.len()),
            }
        }
    }
}

/// A port that is free, and not one of those which the kernel gives to whoever asks for any.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = std::process::id() * 20 + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = u16::try_from(22_000 + number % 8000).unwrap();
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Answers each connection, after its end, with what it said and `-end`.
const ECHO: &str = r#"
import socket, sys, threading
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.socket(family)
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind((sys.argv[1], int(sys.argv[2])))
server.listen(64)
print("up", flush=True)
def serve(peer):
    try:
        total = b""
        while data := peer.recv(65536):
            total += data
        peer.sendall(total + b"-end")
    except ConnectionResetError:
        print("reset", flush=True)
    peer.close()
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"#;

fn listening(address: &str, port: u16) -> pb::Container {
    let port = port.to_string();
    let words = ["python3", "-c", ECHO, address, &port];
    pb::Container {
        command: words.map(str::to_owned).to_vec(),
        ..sh("a", "")
    }
}

#[tokio::test]
async fn both_directions_close_on_their_own() {
    let port = free_port();
    let (mut job, _agent, mut shim) = up(listening("127.0.0.1", port)).await;
    let data: Vec<u8> = (0..20_u32 << 20)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    let mut connection = Forwarded::new(&shim, port).await.unwrap();
    for piece in data.chunks(50_000) {
        connection.send(ToPod::Data(piece.to_vec().into())).await;
    }
    // The program answers after the end of what we say: half-close.
    connection.send(ToPod::Closed(true)).await;
    let all = connection.all().await;
    assert!(
        all.strip_suffix(b"-end") == Some(&data),
        "{} bytes",
        all.len()
    );
    assert_eq!(connection.next().await.unwrap(), None);
    // The end of the call's own input is an end as well.
    let mut connection = Forwarded::new(&shim, port).await.unwrap();
    connection.send(ToPod::Data("x".into())).await;
    let Forwarded { input, output } = connection;
    drop(input);
    connection = Forwarded {
        input: mpsc::channel(1).0,
        output,
    };
    assert_eq!(connection.all().await, b"x-end");
    stop(&mut shim).await;
    job.code().await;
}

#[tokio::test]
async fn many_connections_at_once_on_ipv6() {
    let port = free_port();
    let (mut job, _agent, mut shim) = up(listening("::1", port)).await;
    let all = (0..100).map(|n| {
        let shim = shim.clone();
        async move {
            let mut connection = Forwarded::new(&shim, port).await.unwrap();
            connection.send(ToPod::Data(format!("{n}").into())).await;
            connection.send(ToPod::Closed(true)).await;
            assert_eq!(connection.all().await, format!("{n}-end").into_bytes());
        }
    });
    futures::future::join_all(all).await;
    stop(&mut shim).await;
    job.code().await;
}

#[tokio::test]
async fn a_client_that_goes_away_resets_the_connection() {
    let port = free_port();
    let (mut job, _agent, mut shim) = up(listening("0.0.0.0", port)).await;
    let connection = Forwarded::new(&shim, port).await.unwrap();
    connection.send(ToPod::Data("half a request".into())).await;
    drop(connection);
    let began = Instant::now();
    while job.log("a", 0) != "up\nreset\n" {
        assert!(began.elapsed() < DEADLINE, "{}", job.log("a", 0));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    stop(&mut shim).await;
    job.code().await;
}

#[tokio::test]
async fn only_the_pods_own_listeners_are_forwarded_to() {
    let (mut job, _agent, mut shim) = up(sh("a", harness::streams::SLEEPER)).await;
    let port = free_port();
    let outside = tokio::net::TcpListener::bind(("127.0.0.1", port));
    let outside = outside.await.unwrap();
    let status = Forwarded::new(&shim, port).await.err().unwrap();
    assert_eq!(ErrorReason::of(&status), Some(ErrorReason::NotListening));
    assert!(status.message().contains("outside the pod"), "{status}");
    let nobody = tokio::time::timeout(Duration::from_millis(50), outside.accept()).await;
    nobody.expect_err("the listener was dialled all the same");
    drop(outside);
    let status = Forwarded::new(&shim, port).await.err().unwrap();
    assert!(
        status.message().ends_with("connect: connection refused"),
        "{status}"
    );
    let status = Forwarded::new(&shim, 0).await.err().unwrap();
    assert_eq!(ErrorReason::of(&status), Some(ErrorReason::InvalidRequest));
    stop(&mut shim).await;
    job.code().await;
}

/// Listens for one connection, answers it and ends, as `nc -l` does: the listener is gone at once.
const ONCE: &str = r#"
import socket, sys
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(("127.0.0.1", int(sys.argv[1])))
server.listen(1)
peer = server.accept()[0]
server.close()
peer.sendall(b"once")
if sys.argv[2] == "stays":
    peer.shutdown(socket.SHUT_WR)
    while peer.recv(65536):
        pass
peer.close()
"#;

/// `how`: does the program keep its end until the client has closed its own, or is it gone before anybody can look?
async fn listeners_for_one_connection_are_forwarded_to(how: &str) {
    let port = free_port();
    let serve = format!("echo up; while :; do python3 -c '{ONCE}' {port} {how} 2>/dev/null; done");
    let (mut job, _agent, mut shim) = up(sh("a", &serve)).await;
    let began = Instant::now();
    let mut answered = 0;
    while answered < 20 {
        assert!(began.elapsed() < DEADLINE * 2, "{answered} were answered");
        match Forwarded::new(&shim, port).await {
            Ok(mut connection) => {
                connection.send(ToPod::Closed(true)).await;
                assert_eq!(connection.all().await, b"once");
                answered += 1;
            }
            // Between one and the next, as on any node.
            Err(status) if status.message().contains("refused") => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(status) => panic!("{status}"),
        }
    }
    stop(&mut shim).await;
    job.code().await;
}

#[tokio::test]
async fn a_listener_for_one_connection_that_stays_is_forwarded_to() {
    listeners_for_one_connection_are_forwarded_to("stays").await;
}

#[tokio::test]
async fn a_listener_for_one_connection_that_is_gone_at_once_is_forwarded_to() {
    listeners_for_one_connection_are_forwarded_to("goes").await;
}

#[tokio::test]
async fn a_reader_that_stops_holds_up_the_program_not_the_shim() {
    let port = free_port();
    let server = format!(
        "import socket\ns = socket.create_server(('127.0.0.1', {port}))\nprint('up', flush=True)\np = s.accept()[0]\n\
         p.settimeout(1)\nn = 0\ntry:\n    while True: n += p.send(b'x' * 65536)\nexcept TimeoutError: print('stuck', n < 64 << 20, flush=True)\n\
         p.settimeout(None)\np.recv(1)"
    );
    let words = ["python3", "-c", &server];
    let container = pb::Container {
        command: words.map(str::to_owned).to_vec(),
        ..sh("a", "")
    };
    let (mut job, _agent, shim) = up(container).await;
    let mut connection = Forwarded::new(&shim, port).await.unwrap();
    let began = Instant::now();
    while job.log("a", 0) != "up\nstuck True\n" {
        assert!(began.elapsed() < DEADLINE, "{}", job.log("a", 0));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Nothing of what was on the way is lost.
    connection.send(ToPod::Data("x".into())).await;
    let all = connection.all().await;
    assert!(!all.is_empty() && all.iter().all(|byte| *byte == b'x'));
    job.code().await;
}
