//! Probes over TLS and over gRPC on the real stack, of servers that others have written: Python's, and gRPC's own in C. The image is made of
//! Debian's packages.

use std::time::Duration;

use anyhow::ensure;
use k8s_openapi::api::core::v1::Pod;
use knoc_tests::{
    PodBuilder, World, wait_for,
    world::{SOON, has_condition},
};
use serde_json::{Value, json};

/// The time to make the image (tests/testbed/health.sh).
const MADE: Duration = Duration::from_mins(8);

/// The time in which two containers start Python on a busy machine.
const STARTED: Duration = Duration::from_mins(3);

const IMAGE: &str = "/images/health";

/// Two servers, each of which is well while a file in `/tmp` with the name of its kind exists: one over HTTPS, whose certificate nobody
/// knows, and one with the health service of gRPC, whose answers are one number: 1 is SERVING, and 2 NOT_SERVING.
const SERVER: &str = r#"
import http.server, os, ssl, sys
from concurrent import futures

def well():
    return os.path.exists("/tmp/" + sys.argv[1])

class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if well() else 503)
        self.end_headers()

def https():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("/tls/tls.crt", "/tls/tls.key")
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 8443), Page)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()

def rpc():
    import grpc
    check = grpc.unary_unary_rpc_method_handler(lambda request, context: b"\x08\x01" if well() else b"\x08\x02")
    service = grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((service,))
    server.add_insecure_port("0.0.0.0:9000")
    server.start()
    server.wait_for_termination()

{"https": https, "grpc": rpc}[sys.argv[1]]()
"#;

/// Creates the program, and a certificate that signs itself.
async fn prepare(world: &World) -> anyhow::Result<()> {
    let made = world.service("health.sh", "image").deadline(MADE);
    made.ok().await?;
    let pair = knoc_link::pki::self_signed("health")?;
    let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "program"},
            "data": {"server.py": SERVER},
        },
        {
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": {"name": "pair"},
            "stringData": {"tls.crt": pair.cert_pem, "tls.key": pair.key_pem},
        },
    ]});
    let apply = world.kubectl(["apply", "-f", "-"]);
    apply.stdin(objects.to_string()).ok().await?;
    Ok(())
}

/// Makes a server of the container: readiness begins once it listens, however long that takes. No probe fails each second: of a pod that has
/// many Events in a row, a kubelet tells no more.
fn server(pod: PodBuilder, kind: &str, port: u16, probe: Value) -> PodBuilder {
    let mut readiness = probe;
    readiness["periodSeconds"] = json!(5);
    readiness["failureThreshold"] = json!(1);
    readiness["timeoutSeconds"] = json!(60);
    let listens = json!({"tcpSocket": {"port": port}, "periodSeconds": 10, "failureThreshold": 60});
    pod.image(IMAGE)
        .memory("256Mi")
        .command(["python3", "/srv/server.py", kind])
        .set(
            "volumeMounts",
            json!([{"name": "program", "mountPath": "/srv"}, {"name": "pair", "mountPath": "/tls"}]),
        )
        .set("startupProbe", listens)
        .set("readinessProbe", readiness)
}

/// Waits until exactly these of the containers are ready.
async fn wait_ready(world: &World, main: bool, rpc: bool) -> anyhow::Result<()> {
    let is = |pod: &Pod| {
        let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
        let ready = |name: &str| Some(statuses.iter().find(|one| one.name == name)?.ready);
        let whole = has_condition(pod, "Ready") == (main && rpc);
        (whole && ready("main")? == main && ready("rpc")? == rpc).then_some(())
    };
    let what = format!("ready: https {main}, gRPC {rpc}");
    world.wait_for_state("servers", &what, STARTED, is).await
}

/// Waits for the Event of the failed probe with that text.
async fn told(world: &World, text: &str) -> anyhow::Result<()> {
    let expected = format!("Unhealthy: Readiness probe failed: {text}");
    wait_for(&expected, STARTED, async || {
        let events = world.events("servers").await?;
        ensure!(
            events.iter().any(|event| event.starts_with(&expected)),
            "{events:?}"
        );
        Ok(())
    })
    .await
}

#[tokio::test]
async fn probes_over_tls_and_grpc_follow_what_real_servers_answer() -> anyhow::Result<()> {
    let world = World::new("probes-tls").await?;
    prepare(&world).await?;
    let page = json!({"httpGet": {"port": 8443, "path": "/health", "scheme": "HTTPS"}});
    // The pod has all ports for itself.
    let pod = PodBuilder::new("servers").annotation("knoc.io/network", "private");
    let pod = server(pod, "https", 8443, page).container("rpc");
    let pod = server(pod, "grpc", 9000, json!({"grpc": {"port": 9000}})).spec(
        "volumes",
        json!([
            {"name": "program", "configMap": {"name": "program"}},
            {"name": "pair", "secret": {"secretName": "pair"}},
        ]),
    );
    let uid = world.create(&pod).await?;
    world.wait_phase("servers", "Running", STARTED).await?;
    told(&world, "HTTP probe failed with statuscode: 503").await?;
    let unhealthy = "service unhealthy (responded with \"NOT_SERVING\")";
    told(&world, unhealthy).await?;
    wait_ready(&world, false, false).await?;
    for (container, file) in [("main", "/tmp/https"), ("rpc", "/tmp/grpc")] {
        let touch = world.exec(&uid, container, ["touch", file]);
        touch.ok().await?;
        wait_ready(&world, true, container == "rpc").await?;
    }
    let remove = world.exec(&uid, "rpc", ["rm", "/tmp/grpc"]);
    remove.ok().await?;
    wait_ready(&world, true, false).await?;
    world.delete("servers", Some(0)).await?;
    world.wait_gone("servers", SOON).await?;
    world.finish().await
}
