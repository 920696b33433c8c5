//! Metrics, stats, `/configz` and `/runningpods/` over real TLS, with a fake backend.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::{
    server::PodView,
    stats::{Snapshot, tests::snapshot},
};

use super::harness::*;

async fn json_of(client: &mut Client, path: &str) -> Value {
    let (status, body) = client.get(path).await;
    assert_eq!(status, 200, "{path}: {body}");
    serde_json::from_str(&body).unwrap()
}

#[tokio::test]
async fn usage_is_served_as_text_and_as_json() {
    let backend = FakeBackend {
        snapshot: snapshot(),
        ..FakeBackend::default()
    };
    let fixture = Fixture::new(backend, FakeCluster::default()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let response = client.send("GET", "/metrics/resource", None).await;
    let kind = response.headers()["content-type"].to_str().unwrap();
    assert_eq!(kind, "text/plain; version=0.0.4; charset=utf-8");
    drop(response);
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let (_, text) = client.get("/metrics/resource").await;
    assert_eq!(text, crate::stats::resource::render(&snapshot()));
    let whole = json_of(&mut client, "/stats/summary").await;
    assert_eq!(whole["node"]["nodeName"], "virtual");
    assert!(whole["pods"][0].get("process_stats").is_some());
    let small = json_of(&mut client, "/stats/summary?only_cpu_and_memory=true").await;
    assert!(small["pods"][0].get("process_stats").is_none());
    assert_eq!(client.get("/stats/summary?x=%zz").await.0, 400);
    let post = client.send("POST", "/stats/summary", None).await;
    assert_eq!(post.status(), 405);
}

#[tokio::test]
async fn own_metrics_count_rejected_requests_too() {
    let fixture = Fixture::new(FakeBackend::default(), FakeCluster::default()).await;
    let mut stranger = fixture.connect(None).await;
    assert_eq!(stranger.get("/metrics").await.0, 401);
    assert_eq!(stranger.get("/nowhere/at/all").await.0, 401);
    let mut client = fixture.connect(Some(&fixture.master())).await;
    client.get("/containerLogs/a/b/c").await;
    let (status, text) = client.get("/metrics").await;
    assert_eq!(status, 200);
    for line in [
        "knoc_http_requests_total{path=\"/metrics\",verb=\"get\",code=\"401\"} 1",
        "knoc_http_requests_total{path=\"other\",verb=\"get\",code=\"401\"} 1",
        "knoc_http_requests_total{path=\"/containerLogs/{namespace}/{pod}/{container}\",verb=\"get\",code=\"404\"} 1",
        "knoc_streams_open 0",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    let (status, probes) = client.get("/metrics/probes").await;
    assert_eq!((status, probes), (200, crate::metrics::render_probes()));
}

#[tokio::test]
async fn running_pods_are_those_with_a_running_container() {
    // This pod is known to both sides, and none of its containers runs.
    let waiting = PodView {
        observed: Some(Arc::default()),
        ..running("a", "queued", &["c"])
    };
    let backend = FakeBackend {
        pods: vec![
            running("b", "two", &["c"]),
            waiting,
            running("a", "one", &["x", "y"]),
        ],
        ..FakeBackend::default()
    };
    let fixture = Fixture::new(backend, FakeCluster::default()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let list = json_of(&mut client, "/runningpods/").await;
    assert_eq!(list["kind"], "PodList");
    let names: Vec<_> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pod| pod["metadata"]["name"].clone())
        .collect();
    assert_eq!(names, [json!("one"), json!("two")]);
    let containers = &list["items"][0]["spec"]["containers"];
    assert_eq!(containers[1]["name"], "y");
}

#[tokio::test]
async fn the_configuration_is_shown_and_a_checkpoint_rejected_by_name() {
    let fixture = Fixture::new(FakeBackend::default(), FakeCluster::default()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let shown = json_of(&mut client, "/configz").await;
    assert_eq!(
        shown,
        json!({"kubeletconfig": {"node": {"name": "virtual"}}})
    );
    let refused = client.send("POST", "/checkpoint/a/b/c", None).await;
    assert_eq!(refused.status(), 501);
}

#[tokio::test]
async fn each_path_has_its_own_right() {
    let cluster = FakeCluster {
        allowed: vec!["scraper get metrics", "reader get stats", "lister get pods"],
        ..FakeCluster::default()
    };
    let backend = FakeBackend {
        snapshot: Snapshot::default(),
        ..FakeBackend::default()
    };
    let fixture = Fixture::new(backend, cluster).await;
    for (name, allowed) in [
        (
            "scraper",
            [
                "/metrics/resource",
                "/metrics/cadvisor",
                "/metrics",
                "/metrics/probes",
                "/metrics/slis",
            ]
            .as_slice(),
        ),
        ("reader", &["/stats/summary"]),
        ("lister", &["/runningpods", "/runningpods/", "/pods/"]),
    ] {
        let mut client = fixture.connect(Some(&fixture.ca.client(name, &[]))).await;
        for path in [
            "/metrics/resource",
            "/metrics/cadvisor",
            "/metrics",
            "/metrics/probes",
            "/metrics/slis",
            "/stats/summary",
            "/runningpods",
            "/runningpods/",
            "/pods/",
            "/configz",
            "/checkpoint/a/b/c",
        ] {
            let expected = if allowed.contains(&path) { 200 } else { 403 };
            assert_eq!(client.get(path).await.0, expected, "{name} {path}");
        }
    }
}
