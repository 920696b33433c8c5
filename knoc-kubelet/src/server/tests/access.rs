//! Which requests get in, and how the others are answered.

use super::harness::*;
use crate::server::User;

fn user(name: &str) -> User {
    User {
        name: name.to_owned(),
        ..User::default()
    }
}

const EVERY_PATH: [&str; 14] = [
    "/metrics",
    "/metrics/resource",
    "/metrics/cadvisor",
    "/metrics/probes",
    "/stats/summary",
    "/configz",
    "/runningpods/",
    "/checkpoint/ns/pod/c",
    "/healthz",
    "/healthz/ping",
    "/pods",
    "/containerLogs/ns/pod/c",
    "/exec/ns/pod/c",
    "/nowhere",
];

#[tokio::test]
async fn nobody_without_identity_is_answered() {
    let fixture = Fixture::new(FakeBackend::default(), FakeCluster::default()).await;
    let stranger = TestCa::new("cluster").client("kube-apiserver", &["system:masters"]);
    let expired = fixture.ca.expired("kube-apiserver", &["system:masters"]);
    let server = fixture.ca.no_client("kube-apiserver", &["system:masters"]);
    for identity in [None, Some(&stranger), Some(&expired), Some(&server)] {
        let mut client = fixture.connect(identity).await;
        for path in EVERY_PATH {
            let answer = client.get(path).await;
            assert_eq!(answer, (401, "Unauthorized".to_owned()), "{path}");
        }
        let unknown = client.get_as("/pods", Some("guess")).await;
        assert_eq!(unknown, (401, "Unauthorized".to_owned()));
    }
    // A serving certificate is none for a client.
    let mut server = fixture.connect(Some(&fixture.ca.server())).await;
    assert_eq!(
        server.get("/pods").await.0,
        200 + 203,
        "no usage named: RBAC decides"
    );
}

#[tokio::test]
async fn masters_need_no_review() {
    let fixture = Fixture::new(FakeBackend::default(), FakeCluster::default()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    assert_eq!(client.get("/healthz").await, (200, "ok".to_owned()));
    let verbose = "[+]ping ok\n[+]log ok\n[+]syncloop ok\nhealthz check passed\n";
    assert_eq!(
        client.get("/healthz?verbose").await,
        (200, verbose.to_owned())
    );
    assert_eq!(client.get("/nowhere").await.0, 404);
    assert_eq!(client.get("/exec/ns/pod/c").await.0, 400, "no upgrade");
    let post = client.send("POST", "/pods", None).await;
    assert_eq!(post.status(), 405);
    assert!(post.headers()["allow"].to_str().unwrap().contains("GET"));
    assert!(fixture.cluster.reviews.lock().unwrap().is_empty());
}

#[tokio::test]
async fn others_are_reviewed_once_by_each_subresource() {
    let cluster = FakeCluster {
        tokens: [("t".to_owned(), user("prometheus"))].into(),
        allowed: vec!["prometheus get proxy"],
        ..FakeCluster::default()
    };
    let fixture = Fixture::new(FakeBackend::default(), cluster).await;
    let mut client = fixture.connect(None).await;
    for _ in 0..3 {
        assert_eq!(client.get_as("/pods", Some("t")).await.0, 200);
    }
    let denied = client.get_as("/exec/ns/pod/c", Some("t")).await;
    let text = "Forbidden (user=prometheus, verb=create, resource=nodes, subresource(s)=[proxy])\n";
    assert_eq!(
        denied,
        (403, text.to_owned()),
        "get nodes/proxy is not exec"
    );
    assert_eq!(
        *fixture.cluster.reviews.lock().unwrap(),
        [
            "token",
            "prometheus get pods",
            "prometheus get proxy",
            "prometheus create proxy"
        ]
    );
}

#[tokio::test]
async fn a_certificate_of_the_ca_is_reviewed_too() {
    let cluster = FakeCluster {
        allowed: vec!["metrics get healthz"],
        ..FakeCluster::default()
    };
    let fixture = Fixture::new(FakeBackend::default(), cluster).await;
    let pair = fixture.ca.client("metrics", &["monitoring"]);
    let mut client = fixture.connect(Some(&pair)).await;
    assert_eq!(client.get("/healthz").await.0, 200);
    let text = "Forbidden (user=metrics, verb=get, resource=nodes, subresource(s)=[pods proxy])\n";
    assert_eq!(client.get("/pods").await, (403, text.to_owned()));
}

#[tokio::test]
async fn streams_need_create_whatever_the_method_and_the_spelling() {
    let cluster = FakeCluster {
        tokens: [("t".to_owned(), user("monitor"))].into(),
        allowed: vec!["monitor get proxy", "monitor get pods"],
        ..FakeCluster::default()
    };
    let fixture = Fixture::new(FakeBackend::default(), cluster).await;
    let mut client = fixture.connect(None).await;
    for path in [
        "/exec/ns/pod/c?command=id",
        "/exec/ns/pod/uid/c",
        "/attach/ns/pod/c",
        "/run/ns/pod/c",
        "/portForward/ns/pod",
    ] {
        for method in ["GET", "POST"] {
            let answer = client.send(method, path, Some("t")).await;
            assert_eq!(answer.status(), 403, "{method} {path}");
        }
    }
    // Spelled otherwise it is another path, and nobody's.
    for path in ["/%65xec/ns/pod/c", "//exec/ns/pod/c", "/x/../exec/ns/pod/c"] {
        assert_eq!(client.get_as(path, Some("t")).await.0, 404, "{path}");
    }
}

#[tokio::test]
async fn an_authorizer_that_does_not_answer_is_a_500() {
    let cluster = FakeCluster {
        tokens: [("t".to_owned(), user("prometheus"))].into(),
        broken: true,
        ..FakeCluster::default()
    };
    let fixture = Fixture::new(FakeBackend::default(), cluster).await;
    let mut client = fixture.connect(None).await;
    let (status, text) = client.get_as("/pods", Some("t")).await;
    assert_eq!(status, 500);
    assert!(text.starts_with("Authorization error (user=prometheus"));
}

#[tokio::test]
async fn health_says_when_the_loop_is_stuck() {
    let backend = FakeBackend {
        stuck: true,
        ..FakeBackend::default()
    };
    let fixture = Fixture::new(backend, FakeCluster::default()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let (status, text) = client.get("/healthz").await;
    assert_eq!(status, 500);
    assert!(
        text.contains("[-]syncloop failed: reason withheld"),
        "{text}"
    );
    let (status, text) = client.get("/healthz/syncloop").await;
    assert_eq!(status, 500);
    assert!(text.contains("took longer than expected"), "{text}");
    let (status, text) = client.get("/metrics/slis").await;
    assert_eq!(status, 200);
    for line in [
        "kubernetes_healthcheck{name=\"ping\",type=\"healthz\"} 1",
        "kubernetes_healthcheck{name=\"syncloop\",type=\"healthz\"} 0",
    ] {
        assert!(text.lines().any(|found| found == line), "{text}");
    }
}

#[tokio::test]
async fn pods_are_a_v1_pod_list() {
    let backend = FakeBackend {
        pods: vec![running("ns", "a", &["c"]), running("ns", "b", &["c"])],
        ..FakeBackend::default()
    };
    let fixture = Fixture::new(backend, FakeCluster::default()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let (status, text) = client.get("/pods").await;
    assert_eq!(status, 200);
    let list: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&list["kind"], &list["apiVersion"]),
        (&"PodList".into(), &"v1".into())
    );
    assert_eq!(list["items"][1]["metadata"]["name"], "b");
}
