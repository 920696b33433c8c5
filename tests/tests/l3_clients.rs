//! Python's client of Kubernetes, unmodified, in pods on the real stack: with the pod's own token it reads and watches what RBAC lets it, and
//! nothing else. That kubectl does so is tested in `l3_egress`, and client-go in `l3_cluster`.

use std::time::Duration;

use anyhow::ensure;
use knoc_tests::{PodBuilder, World};
use serde_json::json;

/// The image with Python and the client (tests/testbed/python.sh), as the nodes see it.
const IMAGE: &str = "/images/python";
/// The time to make the image.
const MADE: Duration = Duration::from_mins(8);
/// The time for Python to load the client on a busy machine, and to end.
const RUN: Duration = Duration::from_mins(5);

/// Lists and watches the pods of its own namespace, and tries what its token is not for.
const PROGRAM: &str = r#"
import sys
from kubernetes import client, config, watch
config.load_incluster_config()
api = client.CoreV1Api()
own, other = sys.argv[1:]
for pod in api.list_namespaced_pod(own).items:
    print("listed", pod.metadata.name)
for event in watch.Watch().stream(api.list_namespaced_pod, own, timeout_seconds=120):
    print("watched", event["type"], event["object"].metadata.name)
    break
for attempt in (
    lambda: api.list_namespaced_pod(other),
    lambda: api.list_namespaced_secret(own),
    lambda: api.delete_namespaced_pod("none", own),
):
    try:
        attempt()
        print("allowed")
    except client.ApiException as error:
        print("denied", error.status)
"#;

async fn allow_reading(world: &World) -> anyhow::Result<()> {
    let account = format!("--serviceaccount={}:default", world.namespace);
    let binding = ["create", "rolebinding", "view", "--clusterrole=view"];
    let binding = world.kubectl(binding).args([account]);
    binding.ok().await.map(drop)
}

#[tokio::test]
async fn the_python_client_has_the_rights_of_the_pod_and_no_others() -> anyhow::Result<()> {
    let world = World::new("python").await?;
    let made = world.service("python.sh", "image").deadline(MADE);
    made.ok().await?;
    allow_reading(&world).await?;
    for network in ["private", "host"] {
        let command = [
            "/usr/local/bin/kubernetes-python",
            "-c",
            PROGRAM,
            &world.namespace,
            "kube-system",
        ];
        let pod = PodBuilder::new(network)
            .annotation("knoc.io/network", network)
            .spec("automountServiceAccountToken", json!(true))
            .image(IMAGE)
            .memory("512Mi")
            .command(command);
        world.create(&pod).await?;
        world.wait_phase(network, "Succeeded", RUN).await?;
        let log = world.logs(network, "main").await?;
        for expected in [&*format!("listed {network}\n"), "watched ADDED "] {
            ensure!(log.contains(expected), "{network}: {expected}: {log}");
        }
        let denied = log.matches("denied 403\n").count();
        ensure!(denied == 3 && !log.contains("allowed"), "{network}: {log}");
    }
    world.finish().await
}
