//! Logs: what the agent is asked, and which parts of its answer reach the client, and when.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http_body_util::BodyExt as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;

use super::records::Lengths;
use crate::server::{ByteStream, PodView};

use super::harness::*;

async fn with_log(log: ByteStream) -> Fixture {
    let waiting = PodView {
        pod: Arc::new(pod("ns", "queued", &["c"])),
        ..PodView::default()
    };
    let backend = FakeBackend {
        pods: vec![running("ns", "pod", &["c", "d"]), waiting],
        log: Some(Ok(log)).into(),
        ..FakeBackend::default()
    };
    Fixture::new(backend, FakeCluster::default()).await
}

#[tokio::test]
async fn relays_every_byte() {
    let chunks: Vec<Bytes> = (0..2000_u32)
        .map(|n| n.to_le_bytes().repeat(256).into())
        .collect();
    let whole = chunks.concat();
    let fixture = with_log(stream::iter(chunks).map(Ok).boxed()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let response = client
        .send(
            "GET",
            "/containerLogs/ns/pod/c?tailLines=5&timestamps=true",
            None,
        )
        .await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/plain");
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert!(body == whole, "{} of {} bytes", body.len(), whole.len());
    let asked = fixture.backend.asked.lock().unwrap();
    assert_eq!(
        (asked[0].uid.as_str(), asked[0].container.as_str()),
        ("ns-pod", "c")
    );
    assert_eq!((asked[0].tail_lines, asked[0].timestamps), (5, true));
}

/// The API server discards bytes that it reads together with the end (see `separate_end`).
#[tokio::test]
async fn the_end_of_a_log_is_a_record_of_its_own() {
    for chunks in [0, 1, 3, 200] {
        let log: Vec<Bytes> = (0..chunks)
            .map(|n: u32| n.to_le_bytes().repeat(2500).into())
            .collect();
        let fixture = with_log(stream::iter(log).map(Ok).boxed()).await;
        let lengths = Lengths::default();
        let identity = fixture.master();
        let mut connection = fixture.connect_noting(&identity, lengths.clone()).await;
        let request =
            b"GET /containerLogs/ns/pod/c HTTP/1.1\r\nhost: k\r\nconnection: close\r\n\r\n";
        connection.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        let read = tokio::time::timeout(PATIENCE, connection.read_to_end(&mut answer));
        read.await.unwrap().unwrap();
        assert!(answer.ends_with(b"\r\n0\r\n\r\n"), "{chunks} chunks");
        // TLS 1.3 adds a type and a tag. The terminating chunk is followed by the close alert, of two bytes.
        let (chunk, alert) = (b"0\r\n\r\n".len() + 17, 2 + 17);
        let lengths = lengths.lock().unwrap();
        assert!(
            lengths.ends_with(&[chunk, alert]),
            "{chunks} chunks: {lengths:?}"
        );
    }
}

#[tokio::test]
async fn a_silent_follow_answers_at_once_and_each_line_is_flushed() {
    let (sender, receiver) = mpsc::channel(1);
    let fixture = with_log(ReceiverStream::new(receiver).boxed()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let response = client
        .send("GET", "/containerLogs/ns/pod/c?follow=true", None)
        .await;
    assert_eq!(response.status(), 200, "headers come before the first line");
    let mut body = response.into_body();
    for line in ["one\n", "two\n"] {
        sender.send(Ok(Bytes::from(line))).await.unwrap();
        let frame = tokio::time::timeout(PATIENCE, body.frame()).await.unwrap();
        assert_eq!(frame.unwrap().unwrap().into_data().unwrap(), line);
    }
    drop(sender);
    assert!(body.frame().await.is_none(), "ends with the container");
}

#[tokio::test]
async fn a_log_that_breaks_off_is_not_taken_for_a_whole_one() {
    let broken = tonic::Status::unavailable("the shim's link is down");
    let log = stream::iter([Ok(Bytes::from("half a li")), Err(broken)]);
    let fixture = with_log(log.boxed()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let response = client.send("GET", "/containerLogs/ns/pod/c", None).await;
    assert_eq!(response.status(), 200);
    let mut body = response.into_body();
    let frame = body.frame().await.unwrap().unwrap();
    assert_eq!(frame.into_data().unwrap(), "half a li");
    assert!(body.frame().await.unwrap().is_err());
}

#[tokio::test]
async fn a_reader_that_stops_delays_only_its_own_stream() {
    let pulled = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&pulled);
    let endless = stream::repeat_with(move || {
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(Bytes::from(vec![0; 64 * 1024]))
    });
    let fixture = with_log(endless.boxed()).await;
    let identity = fixture.master();
    let mut client = fixture.connect(Some(&identity)).await;
    let response = client.send("GET", "/containerLogs/ns/pod/c", None).await;
    // Nobody reads the body. Others are still served, and what was read from the source is bounded by the socket's
    // buffers.
    let mut other = fixture.connect(Some(&identity)).await;
    for _ in 0..200 {
        assert_eq!(other.get("/healthz").await.0, 200);
    }
    let bytes = pulled.load(Ordering::Relaxed) * 64 * 1024;
    assert!(
        bytes < 64 << 20,
        "{bytes} bytes pulled for a reader that reads nothing"
    );
    drop(response);
}

#[tokio::test]
async fn rejects_with_the_texts_of_a_kubelet() {
    let fixture = with_log(stream::empty().boxed()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let undecodable = r#"{"message": "Unable to decode query."}"#;
    let invalid = r#"{"message": "Invalid request."}"#;
    let cases = [
        ("ns/pod/c?tailLines=x", 400, undecodable),
        ("ns/pod/c?container=%zz", 400, undecodable),
        ("ns/pod/c?tailLines=-1", 422, invalid),
        (
            "ns/pod/c?sinceSeconds=1&sinceTime=2026-01-01T00:00:00Z",
            422,
            invalid,
        ),
        ("ns/none/c", 404, "pod \"none\" does not exist\n"),
        ("other/pod/c", 404, "pod \"pod\" does not exist\n"),
        (
            "ns/pod/x",
            404,
            "container \"x\" not found in pod \"pod\"\n",
        ),
        (
            "ns/pod/c?previous=true",
            400,
            "previous terminated container \"c\" in pod \"pod\" not found",
        ),
        (
            "ns/queued/c",
            400,
            "container \"c\" in pod \"queued\" is waiting to start: ContainerCreating",
        ),
    ];
    for (path, status, text) in cases {
        let answer = client.get(&format!("/containerLogs/{path}")).await;
        assert_eq!(answer, (status, text.to_owned()), "{path}");
    }
    let refused = tonic::Status::not_found("no log of attempt 3");
    *fixture.backend.log.lock().unwrap() = Some(Err(refused));
    assert_eq!(
        client.get("/containerLogs/ns/pod/c").await,
        (400, "no log of attempt 3".to_owned())
    );
}
