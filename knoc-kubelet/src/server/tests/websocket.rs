//! Exec and attach by a WebSocket client (tungstenite) over TLS: every subprotocol, errors, and ends.

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _, stream};
use http_body_util::BodyExt as _;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use knoc_proto::{pb::exec_output::Output, reason::ErrorReason};
use tokio::sync::oneshot;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{Role, WebSocketConfig},
    },
};

use super::commands::*;
use super::harness::*;

pub(super) const UPGRADE: [(&str, &str); 4] = [
    ("connection", "keep-alive, Upgrade"),
    ("upgrade", "WebSocket"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

/// The client's side of a session.
pub(super) struct Socket {
    pub(super) socket: WebSocketStream<TokioIo<Upgraded>>,
    _client: Client,
}

/// Upgrades and offers `protocols`; the server must agree on `agreed`.
pub(super) async fn open(
    fixture: &Fixture,
    path: &str,
    protocols: &str,
    agreed: Option<&str>,
) -> Socket {
    let (io, client) = upgraded(fixture, path, protocols, agreed).await;
    let config = WebSocketConfig::default();
    let socket = WebSocketStream::from_raw_socket(io, Role::Client, Some(config)).await;
    Socket {
        socket,
        _client: client,
    }
}

pub(super) async fn upgraded(
    fixture: &Fixture,
    path: &str,
    protocols: &str,
    agreed: Option<&str>,
) -> (TokioIo<Upgraded>, Client) {
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let mut headers = UPGRADE.to_vec();
    if !protocols.is_empty() {
        headers.push(("sec-websocket-protocol", protocols));
    }
    let response = client.send_with("GET", path, &headers).await;
    assert_eq!(response.status(), 101);
    let accept = &response.headers()["sec-websocket-accept"];
    assert_eq!(accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    let answered = response.headers().get("sec-websocket-protocol");
    assert_eq!(answered.map(|it| it.to_str().unwrap()), agreed);
    let io = hyper::upgrade::on(response).await.unwrap();
    (TokioIo::new(io), client)
}

impl Socket {
    /// The next message that is not a ping or pong; `None` after the close.
    pub(super) async fn next(&mut self) -> Option<Message> {
        let next = async {
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                    Some(Ok(Message::Close(frame))) => {
                        assert_eq!(u16::from(frame.unwrap().code), 1000);
                        return None;
                    }
                    Some(Ok(message)) => return Some(message),
                    Some(Err(error)) => panic!("{error}"),
                    None => return None,
                }
            }
        };
        tokio::time::timeout(PATIENCE, next)
            .await
            .expect("no message")
    }

    pub(super) async fn say(&mut self, message: impl Into<Message>) {
        self.socket.send(message.into()).await.unwrap();
    }

    /// Reads until the close; returns the bytes by channel.
    pub(super) async fn rest(&mut self) -> [Vec<u8>; 5] {
        let mut all = <[Vec<u8>; 5]>::default();
        while let Some(message) = self.next().await {
            let bytes = message.into_data();
            all[usize::from(bytes[0])].extend_from_slice(&bytes[1..]);
        }
        all
    }
}

fn binary(bytes: &'static [u8]) -> Message {
    Message::Binary(Bytes::from_static(bytes))
}

const V5: &str = "v5.channel.k8s.io";

#[tokio::test]
async fn shutdown_is_reported_to_a_running_exec() {
    let fixture = with_command(Box::new(|_| stream::pending().boxed())).await;
    let mut socket = open(&fixture, "/exec/ns/pod/c?output=1", V5, Some(V5)).await;
    fixture.shutdown.cancel();
    let status: serde_json::Value = serde_json::from_slice(&socket.rest().await[3]).unwrap();
    let message = status["message"].as_str().unwrap();
    assert!(
        message.ends_with("the kubelet is shutting down"),
        "{message}"
    );
}
const SUCCESS: &[u8] = br#"{"metadata":{},"status":"Success"}"#;

#[tokio::test]
async fn v5_carries_bytes_sizes_and_the_end_of_the_input() {
    let (seen, start) = oneshot::channel();
    let fixture = with_command(echo(seen)).await;
    let path = "/exec/ns/pod/c?command=cat&input=1&output=1&tty=1";
    let offered = "v6.channel.k8s.io, v5.channel.k8s.io, v4.channel.k8s.io";
    let mut exec = open(&fixture, path, offered, Some(V5)).await;
    assert_eq!(exec.next().await, Some(binary(b"\x01")), "ready");
    let Begun::Exec(start) = start.await.unwrap() else {
        panic!("no exec");
    };
    assert!(start.tty && start.stdin && start.stdout && !start.stderr);
    // These are ignored: a channel that the client reads, one that does not exist, an empty message, and an end of
    // such.
    for nothing in [&b"\x01x"[..], b"\x09x", b"", b"\xff\x01", b"\xff\x09"] {
        exec.say(binary(nothing)).await;
    }
    exec.say(binary(b"\x04{\"Width\":80,\"Height\":24}")).await;
    assert_eq!(exec.next().await, Some(binary(b"\x01[80x24]")));
    exec.say(binary(b"\x00\x00\xff\x01")).await;
    assert_eq!(exec.next().await, Some(binary(b"\x01\x00\xff\x01")));
    exec.say(binary(b"\xff\x00")).await;
    let status = [b"\x03", SUCCESS].concat();
    assert_eq!(exec.next().await, Some(Message::Binary(status.into())));
    assert_eq!(exec.next().await, None);
}

#[tokio::test]
async fn older_forms_frame_and_tell_ends_in_their_own_way() {
    // The subprotocol, its ready message, its message for "out", and its status for exit code 3.
    let text = "command terminated with non-zero exit code: command terminated with exit code 3";
    let cases: [(&str, &[u8], &[u8], &str); 5] = [
        ("v4.channel.k8s.io", b"\x01", b"\x01out", "\x03{"),
        ("v4.base64.channel.k8s.io", b"1", b"1b3V0", "3e"),
        (
            "channel.k8s.io",
            b"\x01",
            b"\x01out",
            &format!("\x03{text}"),
        ),
        (
            "base64.channel.k8s.io",
            b"1",
            b"1b3V0",
            "3Y29tbWFuZCB0ZXJtaW5hdGVkIH",
        ),
        ("", b"\x01", b"\x01out", &format!("\x03{text}")),
    ];
    for (protocol, ready, out, told) in cases {
        let fixture = with_command(says(vec![Output::Stdout(Bytes::from("out")), exit(3)])).await;
        let path = "/exec/ns/pod/c?command=x&output=1&error=1";
        let agreed = (!protocol.is_empty()).then_some(protocol);
        let mut exec = open(&fixture, path, protocol, agreed).await;
        let text = protocol.contains("base64");
        for expected in [ready, out] {
            let message = exec.next().await.unwrap();
            assert_eq!(message.is_text(), text, "{protocol}");
            assert_eq!(message.into_data(), expected, "{protocol}");
        }
        let status = exec.next().await.unwrap().into_data();
        assert!(
            status.starts_with(told.as_bytes()),
            "{protocol}: {status:?}"
        );
        assert_eq!(exec.next().await, None, "{protocol}");
        let name = agreed.unwrap_or("none");
        let counted = format!("{{verb=\"exec\",protocol=\"websocket/{name}\"}} 1");
        assert_eq!(fixture.sessions(), [counted]);
    }
}

#[tokio::test]
async fn base64_input_arrives_as_bytes() {
    let (seen, _start) = oneshot::channel();
    let fixture = with_command(echo(seen)).await;
    let protocol = "v4.base64.channel.k8s.io";
    let path = "/attach/ns/terminal/c?input=1&output=1&tty=1";
    let mut attach = open(&fixture, path, protocol, Some(protocol)).await;
    assert_eq!(attach.next().await.unwrap().into_data(), "1");
    attach.say(Message::text("0AAH/")).await;
    assert_eq!(attach.next().await, Some(Message::text("1AAH/")));
    attach
        .say(Message::text("4eyJXaWR0aCI6MSwiSGVpZ2h0IjoyfQ=="))
        .await;
    assert_eq!(
        attach.next().await,
        Some(Message::text("1WzF4Ml0=")),
        "[1x2]"
    );
}

#[tokio::test]
async fn messages_of_any_size_pass_both_ways_and_the_status_is_last() {
    let (seen, _start) = oneshot::channel();
    let fixture = with_command(echo(seen)).await;
    let path = "/exec/ns/pod/c?command=cat&input=1&output=1&error=1";
    let exec = open(&fixture, path, V5, Some(V5)).await;
    let mut whole = vec![0];
    whole.extend(
        (0..9_000_000_u32).map(|number| number.to_le_bytes()[usize::from(number % 3 == 0)]),
    );
    let sent = Bytes::from(whole);
    let (mut sink, stream) = exec.socket.split();
    let message = Message::Binary(sent.clone());
    let write = async {
        sink.send(message).await.unwrap();
        sink.send(binary(b"\xff\x00")).await.unwrap();
    };
    let read = stream.map(Result::unwrap).take_while(|it| {
        let goes_on = !it.is_close();
        async move { goes_on }
    });
    let both = async { tokio::join!(write, read.collect::<Vec<_>>()).1 };
    let messages = tokio::time::timeout(PATIENCE, both).await.unwrap();
    let (last, output) = messages.split_last().unwrap();
    assert_eq!(last.clone().into_data()[1..], *SUCCESS);
    let output: Vec<u8> = output
        .iter()
        .flat_map(|it| it.clone().into_data().slice(1..))
        .collect();
    assert!(output == sent[1..], "{} bytes came back", output.len());
}

#[tokio::test]
async fn pings_are_answered_while_nothing_else_happens() {
    let command: Command = Box::new(|_| stream::pending().boxed());
    let fixture = with_command(command).await;
    let path = "/exec/ns/pod/c?command=x&error=1";
    let mut exec = open(&fixture, path, V5, Some(V5)).await;
    assert_eq!(exec.next().await, Some(binary(b"\x02")), "ready, on stderr");
    exec.say(Message::Ping(Bytes::from("are you there"))).await;
    let pong = tokio::time::timeout(PATIENCE, exec.socket.next()).await;
    let pong = pong.unwrap().unwrap().unwrap();
    assert_eq!(pong, Message::Pong(Bytes::from("are you there")));
}

#[tokio::test]
async fn what_goes_wrong_later_is_on_the_error_channel() {
    let broken: Command = Box::new(|_| {
        let status = ErrorReason::ShimUnreachable.status("the shim's link is down");
        stream::iter([Err(status)]).boxed()
    });
    let fixture = with_command(broken).await;
    let path = "/attach/ns/pod/c?output=1";
    let mut attach = open(&fixture, path, V5, Some(V5)).await;
    let [_, _, _, status, _] = attach.rest().await;
    let status: serde_json::Value = serde_json::from_slice(&status).unwrap();
    assert_eq!(
        status["message"],
        "Internal error occurred: error attaching to container: the shim's link is down"
    );
}

#[tokio::test]
async fn a_client_that_closes_ends_the_command_and_gets_a_close() {
    let (command, ended) = deaf();
    let fixture = with_command(command).await;
    let mut exec = open(&fixture, "/exec/ns/pod/c?output=1", V5, Some(V5)).await;
    assert_eq!(exec.next().await, Some(binary(b"\x01")));
    exec.socket.close(None).await.unwrap();
    assert_eq!(exec.next().await, None);
    let told = tokio::time::timeout(PATIENCE, ended).await;
    assert!(told.expect("the command has ended").is_err());
}

#[tokio::test]
async fn a_client_that_breaks_the_protocol_gets_a_protocol_error() {
    for nonsense in [Message::text("0a"), Message::text("0!!!!")] {
        let command: Command = Box::new(|_| stream::pending().boxed());
        let fixture = with_command(command).await;
        let protocol = "v4.base64.channel.k8s.io";
        let path = "/exec/ns/pod/c?input=1";
        let mut exec = open(&fixture, path, protocol, Some(protocol)).await;
        exec.say(nonsense).await;
        assert_eq!(
            exec.next().await.unwrap().into_data(),
            "3",
            "ready, on the error channel"
        );
        let close = tokio::time::timeout(PATIENCE, exec.socket.next()).await;
        let Some(Ok(Message::Close(Some(frame)))) = close.unwrap() else {
            panic!("no close");
        };
        assert_eq!(u16::from(frame.code), 1002);
    }
}

/// The headers of an upgrade with one of them changed.
fn with(name: &'static str, value: &'static str) -> Vec<(&'static str, &'static str)> {
    let mut headers: Vec<_> = UPGRADE.into_iter().filter(|(it, _)| *it != name).collect();
    headers.push((name, value));
    headers
}

/// Method, path, headers, status, and a part of the text.
type Case = (
    &'static str,
    &'static str,
    Vec<(&'static str, &'static str)>,
    u16,
    &'static str,
);

fn refused() -> Vec<Case> {
    let foreign = with("sec-websocket-protocol", "v9.channel.k8s.io, tty");
    let old = with("sec-websocket-version", "8");
    vec![
        (
            "GET",
            "ns/pod/c?output=1",
            foreign,
            403,
            "v9.channel.k8s.io, tty",
        ),
        (
            "GET",
            "ns/pod/c?output=1",
            old,
            400,
            "Sec-WebSocket-Version must be 13",
        ),
        (
            "GET",
            "ns/pod/c?output=1",
            with("sec-websocket-key", "x"),
            400,
            "Sec-WebSocket-Key",
        ),
        (
            "POST",
            "ns/pod/c?output=1",
            UPGRADE.to_vec(),
            400,
            "missing upgrade headers",
        ),
        (
            "GET",
            "ns/pod/c?output=1",
            with("upgrade", "h2c"),
            400,
            "missing upgrade headers",
        ),
        (
            "GET",
            "ns/pod/c",
            UPGRADE.to_vec(),
            400,
            "at least 1 of stdin, stdout, stderr",
        ),
        (
            "GET",
            "ns/none/c?output=1",
            UPGRADE.to_vec(),
            404,
            "pod does not exist",
        ),
    ]
}

#[tokio::test]
async fn rejects_before_the_upgrade() {
    let fixture = with_command(nothing()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    for (method, path, headers, status, text) in refused() {
        let path = format!("/exec/{path}");
        let response = client.send_with(method, &path, &headers).await;
        assert_eq!(response.status(), status, "{path} {headers:?}");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body = String::from_utf8_lossy(&body);
        assert!(body.contains(text), "{path}: {body}");
    }
}
