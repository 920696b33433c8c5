//! The network of a pod on the real stack: one of its own, and that of the compute node.

use std::time::{Duration, Instant};

use anyhow::ensure;
use knoc_tests::{Forward, PodBuilder, World, wait_for, web, world::SOON};
use serde_json::json;

/// The time in which a command in a container answers that waits for nobody.
const AT_ONCE: Duration = Duration::from_secs(15);

/// A container that needs little of the CPUs of the node.
fn small(pod: PodBuilder) -> PodBuilder {
    let resources = json!({"requests": {"cpu": "100m"}, "limits": {"memory": "128Mi"}});
    pod.set("resources", resources)
}

/// A pod in a network of its own, one of whose containers serves its name on port 80 of the loopback interface, while the
/// other one, `main`, waits.
fn on_loopback(name: &str) -> PodBuilder {
    let serve =
        format!("mkdir /www && echo {name} >/www/name && exec httpd -f -p 127.0.0.1:80 -h /www");
    let pod = PodBuilder::new(name)
        .annotation("knoc.io/network", "private")
        // It has one node.
        .annotation("knoc.io/partition", "gpu")
        .command(["sleep", "600"]);
    small(small(pod).container("web")).sh(&serve)
}

const ASK: &str = "until wget -qO- http://127.0.0.1/name; do sleep 0.1; done";

#[tokio::test]
async fn pods_on_one_node_listen_on_the_same_port_and_their_containers_share_the_loopback()
-> anyhow::Result<()> {
    let world = World::new("network").await?;
    let mut nodes = Vec::new();
    for name in ["one", "two"] {
        let uid = world.running(&on_loopback(name)).await?;
        nodes.push(world.compute_node(&uid).await?);
        // From the other container, by exec.
        let asked = world
            .exec(&uid, "main", ["sh", "-c", ASK])
            .ok()
            .await?
            .text();
        ensure!(asked == name, "{name} was answered {asked:?}");
    }
    ensure!(nodes[0] == nodes[1], "{nodes:?}");
    for name in ["one", "two"] {
        let forward = Forward::start(world.kubectl(["port-forward", name, ":80"])).await?;
        let answer = web::name(forward.address()).await?;
        ensure!(answer == name, "{name}: {answer:?}");
    }
    // Nobody listens on another port, although slurmd does on the node.
    let mut forward = Forward::start(world.kubectl(["port-forward", "one", ":6818"])).await?;
    let answer = forward.exchange(b"?").await.unwrap_or_default();
    ensure!(answer.is_empty(), "{answer:?}");
    forward.program.expect("connection refused").await?;
    world.finish().await
}

#[tokio::test]
async fn probes_reach_a_pod_in_a_network_of_its_own() -> anyhow::Result<()> {
    let world = World::new("network-probes").await?;
    // Liveness does not count before the server listens, however long that takes.
    let port = json!({"port": 80});
    let pod = on_loopback("web")
        .set(
            "startupProbe",
            json!({"tcpSocket": port, "periodSeconds": 1, "failureThreshold": 600}),
        )
        .set(
            "livenessProbe",
            json!({"tcpSocket": port, "periodSeconds": 1, "timeoutSeconds": 60}),
        )
        .set(
            "readinessProbe",
            json!({"httpGet": {"port": 80, "path": "/name"}, "periodSeconds": 1}),
        );
    world.running(&pod).await?;
    let ready = |pod: &k8s_openapi::api::core::v1::Pod| {
        let conditions = pod.status.as_ref()?.conditions.as_ref()?;
        let ready = conditions.iter().find(|one| one.type_ == "Ready")?;
        (ready.status == "True").then_some(())
    };
    world
        .wait_for_state("web", "it is ready", SOON, ready)
        .await?;
    world.finish().await
}

#[tokio::test]
async fn a_network_of_its_own_leads_to_other_networks_and_not_to_the_nodes_loopback()
-> anyhow::Result<()> {
    let world = World::new("network-out").await?;
    let pod = PodBuilder::new("out")
        .annotation("knoc.io/network", "private")
        .command(["sleep", "600"]);
    let uid = world.running(&pod).await?;
    let inside = async |script: &str| {
        let run = world.exec(&uid, "main", ["sh", "-c", script]);
        anyhow::Ok(run.output().await?)
    };
    let registry = PodBuilder::image_name();
    let registry = registry.split('/').next().unwrap_or_default();
    let reached = inside(&format!("wget -qO- http://{registry}/v2/")).await?;
    ensure!(reached.text() == "{}", "{reached}");
    // slurmd listens on all addresses of the node. The gateway must not stand for its loopback interface.
    for target in ["127.0.0.1", "192.0.0.1", "::1"] {
        let reached = inside(&format!("nc -w 2 {target} 6818 </dev/null")).await?;
        ensure!(reached.code != 0, "{target}: {reached}");
    }
    // IPv6 is not reached, and a program learns so at once instead of waiting.
    for target in ["2001:db8::1", "fd00::1"] {
        // A busy machine may delay some of the answers.
        wait_for("it learns so at once", SOON, async || {
            let began = Instant::now();
            let dialled = inside(&format!("nc -w 30 {target} 80 </dev/null")).await?;
            ensure!(
                dialled.stderr.contains("unreachable"),
                "{target}: {dialled}"
            );
            let took = began.elapsed();
            ensure!(took < AT_ONCE, "{target}: {took:?}");
            Ok(())
        })
        .await?;
    }
    // It has no rights over its network.
    let changed = inside("ip link set lo down").await?;
    ensure!(changed.stderr.contains("not permitted"), "{changed}");
    let resolved = inside("hostname -i").await?;
    ensure!(resolved.text() == "192.0.0.2", "{resolved}");
    world.finish().await
}

#[tokio::test]
async fn the_host_network_is_the_nodes() -> anyhow::Result<()> {
    let world = World::new("network-host").await?;
    let pod = PodBuilder::new("host")
        .spec("hostNetwork", json!(true))
        .command(["sleep", "600"]);
    let uid = world.running(&pod).await?;
    // As with a kubelet, it has the node's name too.
    let node = world.compute_node(&uid).await?;
    let script = ["sh", "-c", "echo $(hostname) $HOSTNAME"];
    let named = world.exec(&uid, "main", script).ok().await?.text();
    ensure!(named == format!("{node} {node}"), "{named} on {node}");
    // slurmd.
    wait_for("the node's own listener is reached", SOON, async || {
        let script = ["sh", "-c", "nc -w 2 127.0.0.1 6818 </dev/null"];
        world.exec(&uid, "main", script).ok().await.map(drop)
    })
    .await?;
    world.finish().await
}
