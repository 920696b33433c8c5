//! Exec by a SPDY client over TLS: errors before the upgrade, bytes both ways, exit codes, and all kinds of ends.

use std::{collections::BTreeMap, sync::Mutex, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, stream};
use http_body_util::BodyExt as _;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use knoc_proto::{
    pb::{self, exec_output::Output},
    reason::ErrorReason,
};
use knoc_remotecommand::{
    protocol::{Version, Wanted},
    query::Query,
    spdy::{
        self,
        peer::{Frame, Peer},
    },
};
use tokio::{io::DuplexStream, sync::oneshot};
use tokio_util::sync::CancellationToken;

use crate::server::{
    remote::{self, RemoteError, Start, Streams},
    stop::Stop,
    upgrade::run_session,
};

use super::commands::*;
use super::harness::*;

pub(super) const UPGRADE: [(&str, &str); 3] = [
    ("connection", "Upgrade"),
    ("upgrade", "SPDY/3.1"),
    ("x-stream-protocol-version", "v4.channel.k8s.io"),
];

/// The client's side of an exec.
pub(super) struct Exec {
    peer: Peer<TokioIo<Upgraded>>,
    _client: Client,
}

/// Upgrades and opens streams of these types with ids 1, 3, 5 …
pub(super) async fn exec(fixture: &Fixture, query: &str, streams: &[&str]) -> Exec {
    streams_of(fixture, &format!("/exec/ns/pod/c?{query}"), streams).await
}

async fn streams_of(fixture: &Fixture, path: &str, streams: &[&str]) -> Exec {
    spoken(fixture, path, UPGRADE[2].1, streams).await
}

/// Does the same as a client that offers only this version.
async fn spoken(fixture: &Fixture, path: &str, version: &str, streams: &[&str]) -> Exec {
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let headers = [UPGRADE[0], UPGRADE[1], (UPGRADE[2].0, version)];
    let response = client.send_with("POST", path, &headers).await;
    assert_eq!(response.status(), 101);
    let agreed = &response.headers()["x-stream-protocol-version"];
    assert_eq!(agreed, version);
    let io = hyper::upgrade::on(response).await.unwrap();
    let mut peer = Peer::new(TokioIo::new(io));
    for (number, kind) in (0..).zip(streams) {
        peer.open(2 * number + 1, &[("streamtype", kind)]).await;
        assert!(matches!(peer.next().await, Some(Frame::SynReply { .. })));
    }
    Exec {
        peer,
        _client: client,
    }
}

impl Exec {
    /// Reads until every stream has ended; returns the bytes by id, and the ids in the order of their ends.
    async fn output(&mut self, open: usize) -> (BTreeMap<u32, BytesMut>, Vec<u32>) {
        let (mut bytes, mut ended) = (BTreeMap::<u32, BytesMut>::new(), Vec::new());
        while ended.len() < open {
            let frame = self.peer.next().await;
            let Some(Frame::Data { id, data, fin }) = frame else {
                panic!("{frame:?}");
            };
            bytes.entry(id).or_default().extend_from_slice(&data);
            if fin {
                ended.push(id);
            }
        }
        assert_eq!(self.peer.next().await, Some(Frame::GoAway));
        (bytes, ended)
    }
}

#[tokio::test]
async fn output_is_whole_before_the_status_comes() {
    let chunk = Bytes::from(vec![7; 100_000]);
    let mut outputs = vec![Output::Started(true)];
    outputs.extend((0..50).map(|_| Output::Stdout(chunk.clone())));
    outputs.push(Output::Stderr(Bytes::from("oops")));
    outputs.push(exit(3));
    let fixture = with_command(says(outputs)).await;
    let mut exec = exec(
        &fixture,
        "command=x&output=1&error=1",
        &["error", "stdout", "stderr"],
    )
    .await;
    let (bytes, ended) = exec.output(3).await;
    assert_eq!(bytes[&3].len(), 5_000_000);
    assert_eq!(bytes[&5], "oops");
    let status: serde_json::Value = serde_json::from_slice(&bytes[&1]).unwrap();
    assert_eq!(status["details"]["causes"][0]["message"], "3");
    assert_eq!(ended.last(), Some(&1), "the status is last");
    let counted = "{verb=\"exec\",protocol=\"spdy/v4.channel.k8s.io\"} 1";
    assert_eq!(fixture.sessions(), [counted]);
}

#[tokio::test]
async fn older_versions_tell_ends_as_text_and_open_fewer_streams() {
    let failed = "command terminated with non-zero exit code: command terminated with exit code 3";
    let piped = ("output=1&error=1", &["error", "stdout", "stderr"][..]);
    let terminal = ("output=1&tty=1", &["error", "stdout"][..]);
    let resized = ("output=1&tty=1", &["error", "resize", "stdout"][..]);
    let versions = [
        ("v3.channel.k8s.io", resized),
        ("v2.channel.k8s.io", terminal),
        ("channel.k8s.io", terminal),
    ];
    for (version, with_terminal) in versions {
        for (query, streams) in [piped, with_terminal] {
            for (code, told) in [(3, failed), (0, "")] {
                let fixture = with_command(says(vec![exit(code)])).await;
                let path = format!("/exec/ns/pod/c?command=x&{query}");
                let mut exec = spoken(&fixture, &path, version, streams).await;
                let ours = streams.iter().filter(|kind| **kind != "resize").count();
                let (bytes, _) = exec.output(ours).await;
                assert_eq!(bytes[&1], told, "{version} {query}");
            }
        }
    }
}

#[tokio::test]
async fn input_arrives_with_its_end_and_sizes_too() {
    let (seen, start) = oneshot::channel();
    let fixture = with_command(echo(seen)).await;
    let mut exec = exec(
        &fixture,
        "command=sh&command=-c&command=cat+%261&input=1&output=1&tty=1&error=1",
        &["error", "stdin", "stdout", "resize"],
    )
    .await;
    let Begun::Exec(start) = start.await.unwrap() else {
        panic!("no exec");
    };
    assert_eq!(start.command, ["sh", "-c", "cat &1"]);
    assert!(start.tty && start.stdin && !start.stderr);
    assert_eq!(
        (start.uid.as_str(), start.container.as_str()),
        ("ns-pod", "c")
    );
    exec.peer
        .data(7, br#"{"Width":80,"Height":24}"#, false)
        .await;
    let Some(Frame::Data { id: 5, data, .. }) = exec.peer.next().await else {
        panic!("no size");
    };
    assert_eq!(data, "[80x24]");
    exec.peer.data(3, &[1, 2, 0, 255], false).await;
    exec.peer.data(3, &[], true).await;
    let (bytes, _) = exec.output(2).await;
    assert_eq!(bytes[&5][..], [1, 2, 0, 255]);
    assert_eq!(bytes[&1], r#"{"metadata":{},"status":"Success"}"#);
}

#[tokio::test]
async fn what_goes_wrong_later_is_on_the_error_stream() {
    let broken: Command = Box::new(|_| {
        let status = ErrorReason::ShimUnreachable.status("the shim's link is down");
        stream::iter([Err(status)]).boxed()
    });
    let cut: Command = Box::new(|_| {
        let status = tonic::Status::unknown("h2 protocol error");
        stream::iter([Err(status)]).boxed()
    });
    let no_program = Output::Exit(pb::ExecExit {
        code: 127,
        error: "exec: \"nope\": no such file or directory".to_owned(),
        ..pb::ExecExit::default()
    });
    for (command, text) in [
        (broken, "container: the shim's link is down"),
        (cut, "the link to the agent was lost: h2 protocol error"),
        (says(vec![no_program]), "no such file or directory"),
        (nothing(), "ended before the command"),
    ] {
        let fixture = with_command(command).await;
        let mut exec = exec(&fixture, "command=x&output=1", &["error", "stdout"]).await;
        let (bytes, _) = exec.output(2).await;
        let status: serde_json::Value = serde_json::from_slice(&bytes[&1]).unwrap();
        assert_eq!(status["reason"], "InternalError");
        let message = status["message"].as_str().unwrap();
        assert!(message.contains(text), "{message}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_command() {
    let (command, ended) = deaf();
    let fixture = with_command(command).await;
    let exec = exec(&fixture, "command=x&output=1", &["error", "stdout"]).await;
    drop(exec);
    let told = tokio::time::timeout(PATIENCE, ended).await;
    assert!(told.expect("the command has ended").is_err());
}

#[tokio::test]
async fn a_client_that_leaves_while_its_input_waits_ends_the_command() {
    let (command, ended) = deaf();
    let fixture = with_command(command).await;
    let mut exec = exec(&fixture, "command=x&input=1", &["error", "stdin"]).await;
    // More pieces than all queues hold: the socket is not read any more, and neither is its end.
    for _ in 0..500 {
        exec.peer.data(3, b"input", false).await;
    }
    drop(exec);
    let told = tokio::time::timeout(PATIENCE, ended).await;
    assert!(told.expect("the command has ended").is_err());
}

#[tokio::test]
async fn shutdown_is_reported_to_a_running_exec() {
    let command: Command = Box::new(|_| stream::pending().boxed());
    let mut fixture = with_command(command).await;
    let mut exec = exec(&fixture, "command=x&output=1", &["error", "stdout"]).await;
    fixture.shutdown.cancel();
    let (bytes, ended) = exec.output(2).await;
    assert_eq!(failure(&bytes[&1]), "the kubelet is shutting down");
    assert_eq!(ended.last(), Some(&1), "the status is last");
    assert_eq!(exec.peer.next().await, None);
    let joined = tokio::time::timeout(PATIENCE, fixture.tasks.join_next()).await;
    assert!(joined.unwrap().unwrap().is_ok(), "the server has ended");
}

/// The reason of the failure in an exec's status.
fn failure(status: &[u8]) -> String {
    let status: serde_json::Value = serde_json::from_slice(status).unwrap();
    assert_eq!(status["status"], "Failure");
    let message = status["message"].as_str().unwrap();
    let about = "Internal error occurred: error executing command in container: ";
    message.strip_prefix(about).unwrap().to_owned()
}

/// An exec of a silent command without TLS and with paused time, which only the session's own timers advance. Returns
/// at the end of the session.
async fn still<C: Future>(client: impl FnOnce(Peer<DuplexStream>) -> C) -> C::Output {
    let backend = FakeBackend {
        command: Mutex::new(Some(Box::new(|_| stream::pending().boxed()))),
        ..FakeBackend::default()
    };
    let (near, far) = tokio::io::duplex(1 << 16);
    let (session, incoming) = spdy::session(near);
    let stop = Stop::new(CancellationToken::new(), session.activity());
    let wanted = Wanted::parse(&Query::parse("output=1").unwrap()).unwrap();
    let relay = async {
        let streams = Streams::of_spdy(incoming, wanted, Version::V4).await?;
        let start = Start::Exec(pb::ExecStart::default());
        remote::serve(&backend, start, streams, Version::V4, &stop).await;
        Ok::<(), RemoteError>(())
    };
    let mut peer = Peer::new(far);
    peer.patience = Duration::from_hours(5);
    let session = run_session(session.run(), relay, &stop, "ns/pod/c");
    let ((), said) = tokio::join!(session, client(peer));
    said
}

#[tokio::test(start_paused = true)]
async fn an_idle_exec_is_ended_with_a_reason() {
    let told = still(async |mut peer| {
        for (id, kind) in [(1, "error"), (3, "stdout")] {
            peer.open(id, &[("streamtype", kind)]).await;
            assert!(matches!(peer.next().await, Some(Frame::SynReply { .. })));
        }
        let mut last = BytesMut::new();
        while let Some(Frame::Data { id, data, .. }) = peer.next().await {
            if id == 1 {
                last.extend_from_slice(&data);
            }
        }
        failure(&last)
    });
    assert_eq!(told.await, "nothing moved for 4 h");
}

#[tokio::test(start_paused = true)]
async fn streams_are_waited_for_and_the_same_one_twice_is_none() {
    let began = tokio::time::Instant::now();
    still(async |mut peer| {
        peer.open(1, &[("streamtype", "error")]).await;
        assert!(matches!(peer.next().await, Some(Frame::SynReply { .. })));
        for (id, kind) in [(3, "error"), (5, "nonsense")] {
            peer.open(id, &[("streamtype", kind)]).await;
            assert_eq!(peer.next().await, Some(Frame::Reset { id }));
        }
        assert_eq!(peer.next().await, Some(Frame::GoAway));
    })
    .await;
    let took = began.elapsed();
    assert!((30..33).contains(&took.as_secs()), "{took:?}");
}

/// Path, upgrade headers, status, and a part of the text.
type RejectedCase = (
    &'static str,
    &'static [(&'static str, &'static str)],
    u16,
    &'static str,
);

const FOREIGN: [(&str, &str); 3] = [UPGRADE[0], UPGRADE[1], ("x-stream-protocol-version", "v9")];

const REJECTED: [RejectedCase; 8] = [
    (
        "ns/pod/c?command=x",
        &UPGRADE,
        400,
        "at least 1 of stdin, stdout, stderr",
    ),
    (
        "ns/pod/c?command=%zz&output=1",
        &UPGRADE,
        400,
        "malformed percent escape",
    ),
    ("ns/none/c?output=1", &UPGRADE, 404, "pod does not exist"),
    (
        "ns/pod/x?output=1",
        &UPGRADE,
        500,
        "container not found (\"x\")",
    ),
    (
        "ns/queued/c?output=1",
        &UPGRADE,
        500,
        "container not found (\"c\")",
    ),
    (
        "ns/pod/other/c?output=1",
        &UPGRADE,
        500,
        "container not found (\"c\")",
    ),
    (
        "ns/pod/ns-pod/c?output=1",
        UPGRADE.split_at(2).0,
        400,
        "x-stream-protocol-version",
    ),
    (
        "ns/pod/c?output=1",
        &FOREIGN,
        403,
        "none of the protocol versions",
    ),
];

#[tokio::test]
async fn rejects_before_the_upgrade_with_the_texts_of_a_kubelet() {
    let fixture = with_command(nothing()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    for (path, headers, status, text) in REJECTED {
        let path = format!("/exec/{path}");
        let response = client.send_with("POST", &path, headers).await;
        assert_eq!(response.status().as_u16(), status, "{path}");
        if status == 403 {
            let ours = response
                .headers()
                .get_all("x-accepted-stream-protocol-versions");
            assert_eq!(ours.iter().count(), 4);
        }
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body = String::from_utf8_lossy(&body);
        assert!(body.contains(text), "{path}: {body}");
    }
}

#[tokio::test]
async fn an_attach_takes_the_terminal_of_the_container_and_ends_with_success() {
    let (seen, start) = oneshot::channel();
    let fixture = with_command(echo(seen)).await;
    let mut attach = streams_of(
        &fixture,
        "/attach/ns/terminal/c?input=1&output=1&tty=1",
        &["error", "stdin", "stdout", "resize"],
    )
    .await;
    let start = match start.await.unwrap() {
        Begun::Attach(start) => start,
        begun @ Begun::Exec(_) => panic!("{begun:?}"),
    };
    let identity = (start.uid.as_str(), start.container.as_str());
    assert_eq!(identity, ("ns-terminal", "c"));
    assert!(start.tty && start.stdin && start.stdout && !start.stderr);
    attach.peer.data(3, b"hi", true).await;
    let (bytes, _) = attach.output(2).await;
    assert_eq!(bytes[&5], "hi");
    // The pod's status has the container's own exit code, which is 7 here.
    assert_eq!(bytes[&1], r#"{"metadata":{},"status":"Success"}"#);
}

#[tokio::test]
async fn an_attach_without_the_containers_input_lets_the_clients_go() {
    let (seen, start) = oneshot::channel();
    let fixture = with_command(echo(seen)).await;
    let mut attach = streams_of(
        &fixture,
        "/attach/ns/pod/ns-pod/c?input=1&output=1&error=1",
        &["error", "stdin", "stdout", "stderr"],
    )
    .await;
    let Begun::Attach(start) = start.await.unwrap() else {
        panic!("no attach");
    };
    assert!(!start.stdin && start.stderr && !start.tty);
    attach.peer.data(3, &vec![0; 4 << 20], true).await;
    // Still answered: discarded input does not stop the reading.
    attach.peer.ping(9).await;
    assert_eq!(attach.peer.next().await, Some(Frame::Ping { id: 9 }));
}

#[tokio::test]
async fn an_attach_is_rejected_with_the_texts_of_a_kubelet() {
    let fixture = with_command(nothing()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let cases = [
        ("ns/none/c", 404, "pod does not exist"),
        ("ns/pod/x", 500, "container x not found in pod pod_ns"),
        ("ns/queued/c", 500, "container c not found in pod queued_ns"),
        ("ns/pod/other/c", 500, "pod pod_ns not found"),
        (
            "ns/terminal/debugger",
            500,
            "container debugger not found in pod terminal_ns",
        ),
    ];
    for (path, status, text) in cases {
        let path = format!("/attach/{path}?output=1");
        let response = client.send_with("POST", &path, &UPGRADE).await;
        assert_eq!(response.status(), status, "{path}");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, text, "{path}");
    }
}
