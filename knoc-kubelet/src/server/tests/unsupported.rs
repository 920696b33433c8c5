//! Unsupported routes, which are rejected by name, and methods that a route does not have.

use super::harness::*;

#[tokio::test]
async fn unsupported_routes_are_rejected_by_name() {
    let fixture = Fixture::new(FakeBackend::default(), FakeCluster::default()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let cases = [
        (
            "POST",
            "/run/ns/pod/c?cmd=ls",
            501,
            "run is not supported by this node, use exec\n",
        ),
        (
            "POST",
            "/run/ns/pod/uid/c?cmd=ls",
            501,
            "run is not supported by this node, use exec\n",
        ),
        ("GET", "/logs/", 405, "logs endpoint is disabled.\n"),
        ("GET", "/logs/syslog", 405, "logs endpoint is disabled.\n"),
        (
            "GET",
            "/debug/pprof/heap",
            405,
            "profiling endpoint is disabled.\n",
        ),
        ("GET", "/nowhere", 404, "404 page not found\n"),
    ];
    for (method, path, status, text) in cases {
        assert_eq!(
            client.ask(method, path).await,
            (status, text.to_owned()),
            "{path}"
        );
    }
}

#[tokio::test]
async fn other_methods_are_answered_with_the_allowed_ones() {
    let fixture = Fixture::new(FakeBackend::default(), FakeCluster::default()).await;
    let mut client = fixture.connect(Some(&fixture.master())).await;
    let cases = [
        ("POST", "/pods", "GET"),
        ("DELETE", "/containerLogs/ns/pod/c", "GET"),
        ("PUT", "/exec/ns/pod/c", "GET,POST"),
        ("PUT", "/attach/ns/pod/uid/c", "GET,POST"),
        ("DELETE", "/portForward/ns/pod", "GET,POST"),
        ("GET", "/run/ns/pod/c", "POST"),
        ("GET", "/checkpoint/ns/pod/c", "POST"),
        ("POST", "/logs/", "GET"),
    ];
    for (method, path, allowed) in cases {
        let response = client.send(method, path, None).await;
        assert_eq!(response.status(), 405, "{method} {path}");
        let allow = response.headers()["allow"].to_str().unwrap().to_owned();
        let listed: Vec<&str> = allow.split(',').filter(|it| *it != "HEAD").collect();
        assert_eq!(listed.join(","), allowed, "{method} {path}");
        client.drain(response).await;
    }
}
