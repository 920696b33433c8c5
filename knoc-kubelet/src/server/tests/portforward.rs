//! Port-forward over all its carriers: pairs in any order, half-closes, errors, and halves without a partner.

mod channels;

use std::{collections::BTreeMap, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::{FutureExt as _, StreamExt as _, stream};
use http_body_util::BodyExt as _;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use knoc_proto::pb::{self, port_forward_input::Input, port_forward_output::Output};
use knoc_remotecommand::spdy::peer::{Frame, Peer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_tungstenite::tungstenite::Message;

use super::websocket::{self, Socket};
use crate::server::PortForwardStream;

use super::harness::*;

pub(super) const UPGRADE: [(&str, &str); 3] = [
    ("connection", "Upgrade"),
    ("upgrade", "SPDY/3.1"),
    ("x-stream-protocol-version", "portforward.k8s.io"),
];

#[expect(clippy::unnecessary_wraps, reason = "the item of a stream")]
fn answer(output: Output) -> Result<pb::PortForwardOutput, tonic::Status> {
    let output = Some(output);
    Ok(pb::PortForwardOutput { output })
}

/// Listens on every port but 81, greets with the port, and echoes what it receives; after the client's end it sends
/// "bye".
pub(super) fn echo(
    mut input: mpsc::Receiver<pb::PortForwardInput>,
) -> Result<PortForwardStream, tonic::Status> {
    let (sender, receiver) = mpsc::channel(1);
    let first = input
        .recv()
        .now_or_never()
        .flatten()
        .and_then(|it| it.input);
    let Some(Input::Start(start)) = first else {
        panic!("{first:?}");
    };
    assert_eq!(start.uid, "ns-pod");
    if start.port == 81 {
        let text = "dial tcp4 127.0.0.1:81: connect: connection refused";
        return Err(tonic::Status::failed_precondition(text));
    }
    let echo = async move {
        let greeting = Output::Data(Bytes::from(format!("{}:", start.port)));
        for output in [Output::Connected(true), greeting] {
            sender.send(answer(output)).await.unwrap();
        }
        while let Some(message) = input.recv().await {
            let output = match message.input {
                Some(Input::Data(data)) => Output::Data(data),
                Some(Input::Closed(_)) => break,
                other => panic!("{other:?}"),
            };
            if sender.send(answer(output)).await.is_err() {
                return;
            }
        }
        drop(sender.send(answer(Output::Data(Bytes::from("bye")))).await);
        drop(sender.send(answer(Output::Closed(true))).await);
    };
    let echo = Box::pin(stream::once(echo).filter_map(async |()| None));
    Ok(stream::select(ReceiverStream::new(receiver), echo).boxed())
}

async fn with_ports(port: Port) -> Fixture {
    let backend = FakeBackend {
        pods: vec![running("ns", "pod", &["c"])],
        ports: Some(port),
        ..FakeBackend::default()
    };
    Fixture::new(backend, FakeCluster::default()).await
}

pub(super) type SpdyPeer = Peer<TokioIo<Upgraded>>;

pub(super) async fn spdy(fixture: &Fixture) -> (SpdyPeer, Client) {
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let response = client
        .send_with("POST", "/portForward/ns/pod", &UPGRADE)
        .await;
    assert_eq!(response.status(), 101);
    assert_eq!(
        response.headers()["x-stream-protocol-version"],
        "portforward.k8s.io"
    );
    let io = hyper::upgrade::on(response).await.unwrap();
    (Peer::new(TokioIo::new(io)), client)
}

/// Opens a pair: the error stream `id` and the data stream after it.
pub(super) async fn pair<Io: AsyncRead + AsyncWrite + Unpin>(
    peer: &mut Peer<Io>,
    id: u32,
    port: &str,
) {
    let request = id.to_string();
    let headers = |kind| {
        [
            ("streamtype", kind),
            ("port", port),
            ("requestid", request.as_str()),
        ]
    };
    peer.open(id, &headers("error")).await;
    peer.data(id, b"", true).await;
    peer.open(id + 2, &headers("data")).await;
}

/// Reads until these streams have ended, with FIN or reset; returns the bytes by stream.
pub(super) async fn until<Io: AsyncRead + AsyncWrite + Unpin>(
    peer: &mut Peer<Io>,
    ends: &[u32],
) -> (BTreeMap<u32, BytesMut>, Vec<u32>) {
    let (mut bytes, mut left, mut reset) =
        (BTreeMap::<u32, BytesMut>::new(), ends.to_vec(), Vec::new());
    while !left.is_empty() {
        match peer.next().await {
            Some(Frame::Data { id, data, fin }) => {
                bytes.entry(id).or_default().extend_from_slice(&data);
                left.retain(|it| !fin || *it != id);
            }
            Some(Frame::Reset { id }) => {
                left.retain(|it| *it != id);
                reset.push(id);
            }
            Some(Frame::SynReply { .. }) => {}
            other => panic!("{other:?}, {left:?} still open"),
        }
    }
    (bytes, reset)
}

#[tokio::test]
async fn a_pair_carries_a_connection_with_its_half_closes() {
    let fixture = with_ports(Box::new(echo)).await;
    let (mut peer, _client) = spdy(&fixture).await;
    pair(&mut peer, 1, "80").await;
    peer.data(3, b"hello ", false).await;
    peer.data(3, b"", true).await;
    let (bytes, reset) = until(&mut peer, &[1, 3]).await;
    assert_eq!(
        bytes[&3], "80:hello bye",
        "what comes after the client's end arrives"
    );
    assert!(
        bytes[&1].is_empty() && reset.is_empty(),
        "{bytes:?} {reset:?}"
    );
    // The connection stays open without a stream, for the next pair.
    pair(&mut peer, 5, "8080").await;
    peer.data(7, b"again", true).await;
    let (bytes, _) = until(&mut peer, &[5, 7]).await;
    assert_eq!(bytes[&7], "8080:againbye");
    peer.go_away().await;
    assert_eq!(
        peer.next().await,
        Some(Frame::GoAway),
        "and ends when the client says so"
    );
    let counted = "{verb=\"portforward\",protocol=\"spdy/portforward.k8s.io\"} 1";
    assert_eq!(fixture.sessions(), [counted], "sessions, not connections");
}

#[tokio::test]
async fn pairs_find_each_other_in_any_order_and_without_an_id() {
    let fixture = with_ports(Box::new(echo)).await;
    let (mut peer, _client) = spdy(&fixture).await;
    let named = |kind, request| [("streamtype", kind), ("port", "80"), ("requestid", request)];
    peer.open(1, &named("data", "b")).await;
    peer.open(3, &named("error", "a")).await;
    peer.open(5, &named("data", "a")).await;
    peer.open(7, &named("error", "b")).await;
    peer.open(9, &[("streamtype", "error"), ("port", "82")])
        .await;
    peer.open(11, &[("streamtype", "data"), ("port", "82")])
        .await;
    for (id, text) in [(1, &b"one"[..]), (5, b"five"), (11, b"eleven")] {
        peer.data(id, text, true).await;
    }
    let (bytes, _) = until(&mut peer, &[1, 3, 5, 7, 9, 11]).await;
    assert_eq!(
        (&bytes[&1][..], &bytes[&5][..]),
        (&b"80:onebye"[..], &b"80:fivebye"[..])
    );
    assert_eq!(bytes[&11], "82:elevenbye");
}

#[tokio::test]
async fn a_refused_connection_is_reported_on_its_error_stream_only() {
    let fixture = with_ports(Box::new(echo)).await;
    let (mut peer, _client) = spdy(&fixture).await;
    pair(&mut peer, 1, "80").await;
    pair(&mut peer, 5, "81").await;
    let (bytes, reset) = until(&mut peer, &[5, 7]).await;
    assert_eq!(
        bytes[&5],
        "error forwarding port 81 to pod pod, uid ns-pod: dial tcp4 127.0.0.1:81: connect: connection refused"
    );
    assert_eq!(reset, [7]);
    peer.data(3, b"still here", true).await;
    let (bytes, _) = until(&mut peer, &[1, 3]).await;
    assert!(bytes[&3].ends_with(b"still herebye"), "{bytes:?}");
}

#[tokio::test]
async fn a_connection_that_breaks_off_is_no_end() {
    let broken: Port = Box::new(|_| {
        let lost = Err(tonic::Status::unavailable("the shim's link is down"));
        let outputs = [
            answer(Output::Connected(true)),
            answer(Output::Data(Bytes::from("half"))),
            lost,
        ];
        Ok(stream::iter(outputs).boxed())
    });
    let fixture = with_ports(broken).await;
    let (mut peer, _client) = spdy(&fixture).await;
    pair(&mut peer, 1, "80").await;
    let (bytes, reset) = until(&mut peer, &[1, 3]).await;
    assert_eq!(bytes[&3], "half");
    assert!(
        bytes[&1].ends_with(b": the shim's link is down"),
        "{bytes:?}"
    );
    assert_eq!(reset, [3]);
}

#[tokio::test]
async fn a_reset_or_a_lost_client_ends_the_connection_to_the_port() {
    let (held, mut live) = mpsc::channel::<()>(1);
    let port: Port = Box::new(move |input| {
        let held = (held.clone(), input);
        let outputs =
            stream::pending().inspect(move |_: &Result<pb::PortForwardOutput, tonic::Status>| {
                let _held = &held;
            });
        Ok(outputs.boxed())
    });
    let fixture = with_ports(port).await;
    let (mut peer, client) = spdy(&fixture).await;
    pair(&mut peer, 1, "80").await;
    peer.reset(3).await;
    let (_, reset) = until(&mut peer, &[1, 3]).await;
    assert_eq!(reset, [1, 3]);
    pair(&mut peer, 5, "80").await;
    drop((peer, client));
    // The fixture itself holds the last sender.
    drop(fixture);
    let gone = tokio::time::timeout(PATIENCE, live.recv()).await;
    assert_eq!(gone.expect("all connections have ended"), None);
}

#[tokio::test]
async fn only_streams_with_wrong_headers_are_rejected() {
    let fixture = with_ports(Box::new(echo)).await;
    let (mut peer, _client) = spdy(&fixture).await;
    let wrong: [&[(&str, &str)]; 4] = [
        &[("streamtype", "data")],
        &[("streamtype", "data"), ("port", "0")],
        &[("streamtype", "data"), ("port", "65536")],
        &[("streamtype", "resize"), ("port", "80")],
    ];
    for (number, headers) in (0..).zip(wrong) {
        let id = 2 * number + 1;
        peer.open(id, headers).await;
        assert_eq!(peer.next().await, Some(Frame::Reset { id }));
    }
    pair(&mut peer, 101, "80").await;
    peer.data(103, b"", true).await;
    let (bytes, _) = until(&mut peer, &[101, 103]).await;
    assert_eq!(bytes[&103], "80:bye");
}

#[tokio::test]
async fn a_hundred_connections_at_once() {
    const PAIRS: u32 = 100;
    let fixture = with_ports(Box::new(echo)).await;
    let (mut peer, _client) = spdy(&fixture).await;
    let ids = || (0..PAIRS).map(|number| 4 * number + 1);
    for id in ids() {
        pair(&mut peer, id, "80").await;
        peer.data(id + 2, &id.to_le_bytes().repeat(1000), true)
            .await;
    }
    let ends: Vec<u32> = ids().flat_map(|id| [id, id + 2]).collect();
    let (bytes, reset) = until(&mut peer, &ends).await;
    assert!(reset.is_empty(), "{reset:?}");
    for id in ids() {
        let expected = [b"80:", &id.to_le_bytes().repeat(1000)[..], b"bye"].concat();
        assert!(bytes[&(id + 2)] == expected, "stream {}", id + 2);
    }
}

#[tokio::test]
async fn spdy_runs_through_a_websocket() {
    let fixture = with_ports(Box::new(echo)).await;
    let protocol = "SPDY/3.1+portforward.k8s.io";
    let offered = format!("{protocol}, v4.channel.k8s.io");
    let Socket { socket, .. } =
        &mut websocket::open(&fixture, "/portForward/ns/pod", &offered, Some(protocol)).await;
    // Our side of the pipe speaks SPDY, its other end is carried in messages that are cut in odd places.
    let (near, far) = tokio::io::duplex(1 << 20);
    let carry = carry(socket, far);
    let client = async {
        let mut peer = Peer::new(near);
        pair(&mut peer, 1, "80").await;
        let large = vec![9; 3 << 20];
        peer.data(3, &large, true).await;
        let (bytes, _) = until(&mut peer, &[1, 3]).await;
        assert_eq!(bytes[&3].len(), 3 + large.len() + 3);
        peer.ping(77).await;
        assert_eq!(peer.next().await, Some(Frame::Ping { id: 77 }));
        peer.go_away().await;
        assert_eq!(peer.next().await, Some(Frame::GoAway));
    };
    let both = async { tokio::join!(carry, client) };
    tokio::time::timeout(PATIENCE, both)
        .await
        .expect("the tunnel moves");
    let counted = format!("{{verb=\"portforward\",protocol=\"websocket/{protocol}\"}} 1");
    assert_eq!(fixture.sessions(), [counted]);
}

async fn carry(
    socket: &mut tokio_tungstenite::WebSocketStream<TokioIo<Upgraded>>,
    far: tokio::io::DuplexStream,
) {
    use futures::SinkExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let (mut sink, mut messages) = socket.split();
    let (mut read, mut write) = tokio::io::split(far);
    let up = async {
        let mut piece = [0; 7001];
        loop {
            match read.read(&mut piece).await.unwrap() {
                0 => break,
                length => {
                    let message = Message::Binary(Bytes::copy_from_slice(&piece[..length]));
                    sink.send(message).await.unwrap();
                }
            }
        }
        // Still answered when nothing else is sent.
        drop(sink.send(Message::Ping(Bytes::new())).await);
    };
    let down = async {
        while let Some(Ok(message)) = messages.next().await {
            if message.is_binary() {
                write.write_all(&message.into_data()).await.unwrap();
            }
        }
        write.shutdown().await.unwrap();
    };
    tokio::join!(up, down);
}

#[tokio::test]
async fn a_tunnel_whose_client_closes_first_is_closed_in_order() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let fixture = with_ports(Box::new(echo)).await;
    let protocol = "SPDY/3.1+portforward.k8s.io";
    let (mut io, _client) =
        websocket::upgraded(&fixture, "/portForward/ns/pod", protocol, Some(protocol)).await;
    // Masked, with the code 1000.
    io.write_all(&[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8])
        .await
        .unwrap();
    let mut rest = Vec::new();
    let read = tokio::time::timeout(PATIENCE, io.read_to_end(&mut rest)).await;
    read.unwrap().expect("TLS has an end");
    assert_eq!(rest, [0x88, 2, 0x03, 0xe8]);
}

type Headers<'a> = &'a [(&'a str, &'a str)];

#[tokio::test]
async fn rejects_before_the_upgrade_with_the_texts_of_a_kubelet() {
    let fixture = with_ports(Box::new(echo)).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let foreign = [
        UPGRADE[0],
        UPGRADE[1],
        ("x-stream-protocol-version", "v4.channel.k8s.io"),
    ];
    let socket = &websocket::UPGRADE[..];
    let cases: [(&str, &str, Headers<'_>, u16, &str); 7] = [
        ("POST", "ns/none", &UPGRADE, 404, "pod does not exist"),
        ("POST", "ns/pod/other", &UPGRADE, 404, "pod not found"),
        (
            "POST",
            "ns/pod",
            &foreign,
            403,
            "none of the protocol versions",
        ),
        (
            "POST",
            "ns/pod",
            &UPGRADE[..2],
            400,
            "x-stream-protocol-version is required",
        ),
        ("GET", "ns/pod", &[], 400, "missing upgrade headers"),
        (
            "GET",
            "ns/pod",
            socket,
            400,
            "query parameter \"port\" is required",
        ),
        (
            "GET",
            "ns/pod?port=x",
            socket,
            400,
            "unable to parse \"x\" as a port",
        ),
    ];
    for (method, path, headers, status, text) in cases {
        let path = format!("/portForward/{path}");
        let response = client.send_with(method, &path, headers).await;
        assert_eq!(response.status(), status, "{path}");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body = String::from_utf8_lossy(&body);
        assert!(body.contains(text), "{path}: {body}");
    }
}

#[tokio::test]
async fn only_the_stream_whose_headers_are_too_long_is_rejected() {
    let fixture = with_ports(Box::new(echo)).await;
    let (mut peer, _client) = spdy(&fixture).await;
    let (most, more) = ("r".repeat(64), "r".repeat(65));
    let port = "8".repeat(65);
    let named = |request, port| {
        [
            ("streamtype", "error"),
            ("port", port),
            ("requestid", request),
        ]
    };
    peer.open(1, &named(&more, "80")).await;
    assert_eq!(peer.next().await, Some(Frame::Reset { id: 1 }));
    peer.open(3, &named("3", &port)).await;
    assert_eq!(peer.next().await, Some(Frame::Reset { id: 3 }));
    peer.open(5, &named(&most, "80")).await;
    let data = [
        ("streamtype", "data"),
        ("port", "80"),
        ("requestid", most.as_str()),
    ];
    peer.open(7, &data).await;
    peer.data(7, b"", true).await;
    let (bytes, _) = until(&mut peer, &[5, 7]).await;
    assert_eq!(bytes[&7], "80:bye");
}

/// Without TLS and with paused time, which only the session's own timers advance.
#[tokio::test(start_paused = true)]
async fn half_a_pair_is_given_up_after_thirty_seconds() {
    use crate::server::portforward::tests::serve;
    let (near, far) = tokio::io::duplex(1 << 16);
    let port: Port = Box::new(echo);
    let served = serve(near, port);
    let client = async {
        let mut peer = Peer::new(far);
        let named = |kind, request| [("streamtype", kind), ("port", "80"), ("requestid", request)];
        let began = tokio::time::Instant::now();
        peer.open(1, &named("error", "lonely")).await;
        peer.open(3, &named("data", "other")).await;
        let (bytes, reset) = until_patient(&mut peer, &[1, 3]).await;
        assert_eq!(bytes[&1], "(request=lonely) timed out waiting for streams");
        assert_eq!(reset, [3]);
        let took = began.elapsed();
        assert!((30..31).contains(&took.as_secs()), "{took:?}");
        // One that comes too late starts a new pair.
        peer.open(5, &named("data", "lonely")).await;
        peer.open(7, &named("error", "lonely")).await;
        peer.data(5, b"", true).await;
        let (bytes, _) = until_patient(&mut peer, &[5, 7]).await;
        assert_eq!(bytes[&5], "80:bye");
    };
    tokio::select! {
        () = served => panic!("the session ended"),
        () = client => {}
    }
}

#[tokio::test]
async fn shutdown_is_told_on_every_error_stream() {
    let mut fixture = with_ports(Box::new(echo)).await;
    let (mut peer, _client) = spdy(&fixture).await;
    pair(&mut peer, 1, "80").await;
    let lonely = [("streamtype", "error"), ("port", "80"), ("requestid", "x")];
    peer.open(5, &lonely).await;
    peer.data(5, b"", true).await;
    fixture.shutdown.cancel();
    let (bytes, reset) = until(&mut peer, &[1, 3, 5]).await;
    assert_eq!(
        bytes[&1],
        "error forwarding port 80 to pod pod, uid ns-pod: the kubelet is shutting down"
    );
    assert_eq!(bytes[&5], "(request=x) the kubelet is shutting down");
    assert_eq!(reset, [3], "its bytes have not come to their end");
    assert_eq!(peer.next().await, Some(Frame::GoAway));
    let joined = tokio::time::timeout(PATIENCE, fixture.tasks.join_next()).await;
    assert!(joined.unwrap().unwrap().is_ok(), "the server has ended");
}

/// Like [`until`], with a timeout longer than the deadline of halves.
async fn until_patient<Io: AsyncRead + AsyncWrite + Unpin>(
    peer: &mut Peer<Io>,
    ends: &[u32],
) -> (BTreeMap<u32, BytesMut>, Vec<u32>) {
    peer.patience = Duration::from_mins(2);
    until(peer, ends).await
}
