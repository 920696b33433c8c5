//! Certificates that are replaced, mistakes at start, and the end of the server.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::BodyExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::server::{ClientCa, Server, ServerError, Serving, Settings};

use super::harness::*;

/// Repeats a request until the answer has this status.
async fn until_status(fixture: &Fixture, identity: &Pair, status: u16) {
    let mut last = 0;
    let wait = async {
        while last != status {
            let mut client = fixture.connect(Some(identity)).await;
            last = client.get("/healthz").await.0;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    assert!(waited.is_ok(), "last answer {last}, not yet {status}");
}

#[tokio::test]
async fn a_replaced_client_ca_counts_on_open_connections() {
    let fixture = Fixture::new(FakeBackend::default(), FakeCluster::default()).await;
    let old = fixture.master();
    let mut open = fixture.connect(Some(&old)).await;
    assert_eq!(open.get("/healthz").await.0, 200);
    let next = TestCa::new("next");
    put(&fixture.folder.path().join("ca.crt"), &next.pem);
    let new = next.client("kube-apiserver", &["system:masters"]);
    until_status(&fixture, &new, 200).await;
    assert_eq!(open.get("/healthz").await.0, 401);
}

#[tokio::test]
async fn a_broken_file_changes_nothing() {
    let fixture = Fixture::new(FakeBackend::default(), FakeCluster::default()).await;
    let identity = fixture.master();
    put(&fixture.folder.path().join("ca.crt"), "not PEM");
    put(&fixture.folder.path().join("tls.key"), "");
    tokio::time::sleep(Duration::from_millis(100)).await;
    until_status(&fixture, &identity, 200).await;
}

#[tokio::test]
async fn the_serving_certificate_is_replaced_without_a_restart() {
    let fixture = Fixture::new(FakeBackend::default(), FakeCluster::default()).await;
    let identity = fixture.master();
    let before = fixture.connect(Some(&identity)).await.served_by;
    let renewed = fixture.ca.server();
    // Certificate and key are two files: until both are replaced they do not match, and the old pair stays.
    put(&fixture.folder.path().join("tls.crt"), &renewed.certificate);
    put(&fixture.folder.path().join("tls.key"), &renewed.key);
    let wait = async {
        while fixture.connect(Some(&identity)).await.served_by == before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    assert!(waited.is_ok(), "the server still has the old certificate");
}

#[tokio::test]
async fn shutdown_lets_a_request_finish_and_cuts_what_never_ends() {
    let (sender, receiver) = mpsc::channel(1);
    let backend = FakeBackend {
        pods: vec![running("ns", "pod", &["c"])],
        log: Some(Ok(ReceiverStream::new(receiver).boxed())).into(),
        ..FakeBackend::default()
    };
    let mut fixture = Fixture::new(backend, FakeCluster::default()).await;
    let identity = fixture.master();
    let mut idle = fixture.connect(Some(&identity)).await;
    assert_eq!(idle.get("/healthz").await.0, 200);
    let mut client = fixture.connect(Some(&identity)).await;
    let response = client
        .send("GET", "/containerLogs/ns/pod/c?follow=true", None)
        .await;
    fixture.shutdown.cancel();
    let closed = tokio::time::timeout(PATIENCE, idle.tasks.join_next()).await;
    assert!(closed.is_ok(), "an idle connection closes at once");
    let mut body = response.into_body();
    sender.send(Ok(Bytes::from("late\n"))).await.unwrap();
    let frame = body.frame().await.unwrap().unwrap();
    assert_eq!(
        frame.into_data().unwrap(),
        "late\n",
        "under way, so it goes on"
    );
    let cut = tokio::time::timeout(PATIENCE, body.frame()).await.unwrap();
    assert!(cut.unwrap().is_err(), "cut, not ended");
    let joined = tokio::time::timeout(PATIENCE, fixture.tasks.join_next()).await;
    assert!(joined.unwrap().unwrap().is_ok(), "the server has ended");
}

#[tokio::test]
async fn mistakes_are_errors_at_start() {
    let folder = tempfile::tempdir().unwrap();
    let ca = TestCa::new("cluster");
    let (mine, other) = (ca.server(), ca.server());
    let path = |name: &str| folder.path().join(name);
    put(&path("ca.crt"), &ca.pem);
    put(&path("tls.crt"), &mine.certificate);
    put(&path("tls.key"), &mine.key);
    put(&path("other.key"), &other.key);
    put(&path("empty"), "");
    let cases = [
        ("tls.crt", "tls.key", "nowhere", "nowhere"),
        ("tls.crt", "tls.key", "empty", "no certificate in"),
        ("tls.crt", "other.key", "ca.crt", "tls.crt"),
        ("tls.crt", "empty", "ca.crt", "empty"),
        ("nowhere", "tls.key", "ca.crt", "nowhere"),
    ];
    for (certificate, key, client_ca, named) in cases {
        let settings = Settings {
            bind: "127.0.0.1:0".parse().unwrap(),
            node: "virtual".to_owned(),
            serving: Serving::Files {
                certificate: path(certificate),
                key: path(key),
            },
            client_ca: ClientCa::File(path(client_ca)),
        };
        let backend = Arc::new(FakeBackend::default());
        let bound = Server::bind(settings, backend, Arc::new(FakeCluster::default())).await;
        let Err(error @ ServerError::Tls { .. }) = bound else {
            panic!("started with {certificate} {key} {client_ca}");
        };
        let text = knoc_proto::error::chain(&error);
        assert!(text.contains(named), "{text}");
    }
}
