//! The limits over all connections: further requests are rejected with the reason, and accepted again when a slot is
//! free.

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http_body_util::BodyExt as _;
use tokio::sync::oneshot;

use super::harness::*;
use super::{exec, portforward};
use crate::server::limits::{MAX_CALLS, MAX_SESSIONS};

const LOG: &str = "/containerLogs/ns/pod/c?follow=true";
const EXEC: &str = "/exec/ns/pod/c?command=x&output=1";
const FORWARD: &str = "/portForward/ns/pod";

/// A silent log, a silent command, and ports that greet.
async fn silent(gone: oneshot::Sender<()>) -> Fixture {
    let log = stream::once(async move {
        let _gone = gone;
        std::future::pending::<Result<Bytes, tonic::Status>>().await
    });
    let backend = FakeBackend {
        pods: vec![running("ns", "pod", &["c"])],
        log: Some(Ok(log.boxed())).into(),
        command: Some(Box::new(|_| stream::pending().boxed()) as Command).into(),
        ports: Some(Box::new(portforward::echo)),
        ..FakeBackend::default()
    };
    Fixture::new(backend, FakeCluster::default()).await
}

async fn refused(fixture: &Fixture, method: &str, path: &str, headers: &[(&str, &str)]) -> String {
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let response = client.send_with(method, path, headers).await;
    assert_eq!(response.status(), 503, "{path}");
    let body = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(body.to_vec()).unwrap()
}

#[tokio::test]
async fn calls_to_the_agent_are_bounded_and_a_follower_that_leaves_gives_its_place_back() {
    let (gone, left) = oneshot::channel();
    let fixture = silent(gone).await;
    let _others: Vec<_> = (1..MAX_CALLS)
        .map(|_| fixture.calls_limit.take().unwrap())
        .collect();
    let mut follower = fixture.connect(Some(&fixture.master())).await;
    let response = follower.send("GET", LOG, None).await;
    assert_eq!(response.status(), 200);
    let text = "too many logs, execs and forwarded connections at once on this node (480)";
    for (method, path, headers) in [("GET", LOG, &[][..]), ("POST", EXEC, &exec::UPGRADE)] {
        let said = refused(&fixture, method, path, headers).await;
        assert!(said.starts_with(text), "{said}");
    }
    let (mut peer, _client) = portforward::spdy(&fixture).await;
    portforward::pair(&mut peer, 1, "80").await;
    let (bytes, reset) = portforward::until(&mut peer, &[1, 3]).await;
    let said = String::from_utf8_lossy(&bytes[&1]);
    assert!(said.contains(text), "{said}");
    assert_eq!(reset, [3]);
    drop((response, follower));
    let told = tokio::time::timeout(PATIENCE, left).await;
    assert!(told.expect("the agent's stream has ended").is_err());
    portforward::pair(&mut peer, 5, "80").await;
    peer.data(7, b"", true).await;
    let (bytes, _) = portforward::until(&mut peer, &[5, 7]).await;
    assert_eq!(bytes[&7], "80:bye");
}

#[tokio::test]
async fn sessions_are_bounded_before_the_upgrade() {
    let fixture = silent(oneshot::channel().0).await;
    let mut others: Vec<_> = (0..MAX_SESSIONS)
        .map(|_| fixture.sessions_limit.take().unwrap())
        .collect();
    let text = "too many sessions of exec, attach and port-forward at once on this node (1024)";
    for (path, headers) in [(EXEC, &exec::UPGRADE), (FORWARD, &portforward::UPGRADE)] {
        let said = refused(&fixture, "POST", path, headers).await;
        assert!(said.starts_with(text), "{said}");
    }
    others.pop();
    let session = portforward::spdy(&fixture).await;
    assert!(fixture.sessions_limit.take().is_err(), "until it ends");
    drop(session);
    let freed = async {
        while fixture.sessions_limit.take().is_err() {
            tokio::task::yield_now().await;
        }
    };
    let freed = tokio::time::timeout(PATIENCE, freed).await;
    assert!(freed.is_ok(), "an ended session frees its slot");
}

#[tokio::test]
async fn open_streams_are_counted() {
    let fixture = silent(oneshot::channel().0).await;
    let open = async |wanted: &str| {
        let mut client = fixture.connect(Some(&fixture.master())).await;
        let mut last = String::new();
        let wait = async {
            while last != format!("knoc_streams_open {wanted}") {
                let (_, text) = client.get("/metrics").await;
                let mut lines = text.lines();
                let line = lines.find(|line| line.starts_with("knoc_streams_open"));
                last = line.unwrap().to_owned();
            }
        };
        let waited = tokio::time::timeout(PATIENCE, wait).await;
        assert!(waited.is_ok(), "{last}, not {wanted}");
    };
    open("0").await;
    let session = exec::exec(&fixture, "command=x&output=1", &["error", "stdout"]).await;
    open("1").await;
    drop(session);
    open("0").await;
}
