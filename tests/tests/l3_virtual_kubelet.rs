//! The nine tests of virtual-kubelet's own end-to-end suite (test/e2e/basic.go), ported by name to our client library.
//!
//! The kubelet is queried as in the original: through the API server's proxy, `nodes/NODE/proxy/…`. Upstream's `nginx` is our test
//! image. The ports differ in these points, in which we follow a real kubelet:
//!
//! - A missing Secret or ConfigMap: virtual-kubelet reports events of its own (`MandatorySecretNotFound`,
//!   `OptionalConfigMapNotFound` and so on). A kubelet keeps the container waiting as `CreateContainerConfigError` with
//!   the object's name, reports `Failed`, and reports nothing about optional objects; these ports expect that.
//! - Upstream waits for a pod IP too; our pods have none (the network of compute nodes is not the cluster's).
//! - Upstream sleeps before it checks; here each check is repeated until it succeeds, with a deadline.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::{List, api::core::v1::Pod};
use knoc_tests::{
    PodBuilder, World, wait_for,
    world::{SOON, container_reason, has_condition, phase_of},
};
use kube::{ResourceExt as _, api::DeleteParams};
use serde_json::{Value, json};

/// The time until a deleted pod no longer runs.
const GONE: Duration = Duration::from_mins(2);

/// Uses a little CPU time, so that there is something to measure, and keeps running.
const WORK: &str = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; exec sleep 3600";

fn pod(name: &str) -> PodBuilder {
    PodBuilder::new(name).command(["sleep", "3600"])
}

fn three_containers(name: &str) -> PodBuilder {
    PodBuilder::new(name)
        .sh(WORK)
        .container("second")
        .sh(WORK)
        .container("third")
        .sh(WORK)
}

/// A pod with a variable from a key of an object that does not exist.
fn referring(name: &str, kind: &str, optional: bool) -> PodBuilder {
    let reference = json!({"name": "inexistent", "key": "key", "optional": optional});
    pod(name).set(
        "env",
        json!([{"name": "WANTED", "valueFrom": {kind: reference}}]),
    )
}

async fn ready(world: &World, pod: &PodBuilder) -> anyhow::Result<()> {
    world.create(pod).await?;
    world
        .wait_for_state(pod.name(), "Running and Ready", SOON, |pod| {
            (phase_of(pod) == "Running" && has_condition(pod, "Ready")).then_some(())
        })
        .await
}

/// The names of our pods in a list from the kubelet.
async fn listed(world: &World, path: &str) -> anyhow::Result<Vec<String>> {
    let list: List<Pod> = serde_json::from_str(&world.kubelet(path).await?)?;
    let ours = |pod: &Pod| pod.namespace().as_deref() == Some(world.namespace.as_str());
    Ok(list
        .items
        .iter()
        .filter(|pod| ours(pod))
        .map(Pod::name_any)
        .collect())
}

async fn runs(world: &World, name: &str) -> anyhow::Result<()> {
    let running = listed(world, "runningpods/").await?;
    ensure!(
        running.iter().any(|one| one == name),
        "running: {running:?}"
    );
    Ok(())
}

async fn runs_no_more(world: &World, name: &str) -> anyhow::Result<()> {
    wait_for(&format!("{name} runs no more"), GONE, async || {
        let running = listed(world, "runningpods/").await?;
        ensure!(
            running.iter().all(|one| one != name),
            "running: {running:?}"
        );
        Ok(())
    })
    .await
}

#[tokio::test]
async fn test_get_pods() -> anyhow::Result<()> {
    let world = World::new("vk-pods").await?;
    ready(&world, &pod("nginx")).await?;
    let list: List<Pod> = serde_json::from_str(&world.kubelet("pods").await?)?;
    for pod in &list.items {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        ensure!(
            node == Some(world.node.as_str()),
            "{}: on {node:?}",
            pod.name_any()
        );
    }
    let uid = world.pod("nginx").await?.uid();
    ensure!(
        list.items.iter().any(|pod| pod.uid() == uid),
        "our pod is not in it"
    );
    world.finish().await
}

#[tokio::test]
async fn test_get_stats_summary() -> anyhow::Result<()> {
    let world = World::new("vk-stats").await?;
    ready(&world, &three_containers("nginx")).await?;
    wait_for("stats of three containers", SOON, async || {
        let summary: Value = serde_json::from_str(&world.kubelet("stats/summary").await?)?;
        let node = &summary["node"]["nodeName"];
        ensure!(*node == json!(world.node), "stats of the node {node}");
        let pods = summary["pods"].as_array().context("no pods")?;
        let own = json!({"name": "nginx", "namespace": world.namespace});
        let ours = pods.iter().find(|pod| {
            let of = &pod["podRef"];
            of["name"] == own["name"] && of["namespace"] == own["namespace"]
        });
        let ours = ours.with_context(|| format!("our pod is not among {} pods", pods.len()))?;
        let containers = ours["containers"].as_array().map_or(0, Vec::len);
        ensure!(containers == 3, "{containers} containers: {ours}");
        Ok(())
    })
    .await?;
    world.finish().await
}

#[tokio::test]
async fn test_get_metrics_resource() -> anyhow::Result<()> {
    let world = World::new("vk-metrics").await?;
    ready(&world, &three_containers("nginx")).await?;
    let own = [
        "pod=\"nginx\"".to_owned(),
        format!("namespace=\"{}\"", world.namespace),
    ];
    wait_for("metrics of three containers", SOON, async || {
        let text = world.kubelet("metrics/resource").await?;
        let count = |metric: &str| {
            let lines = text.lines().filter(|line| line.starts_with(metric));
            lines
                .filter(|line| own.iter().all(|label| line.contains(label)))
                .count()
        };
        let pods = count("pod_cpu_usage_seconds_total{");
        let containers = count("container_cpu_usage_seconds_total{");
        ensure!(
            (pods, containers) == (1, 3),
            "{pods} pods, {containers} containers in\n{text}"
        );
        Ok(())
    })
    .await?;
    world.finish().await
}

#[tokio::test]
async fn test_pod_lifecycle_graceful_delete() -> anyhow::Result<()> {
    let world = World::new("vk-delete").await?;
    ready(&world, &pod("nginx")).await?;
    runs(&world, "nginx").await?;
    let deleted = world
        .api::<Pod>()
        .delete("nginx", &DeleteParams::default())
        .await?;
    let last = deleted.left().context("no pod in the answer")?;
    let grace = last.metadata.deletion_grace_period_seconds;
    ensure!(grace.is_some_and(|seconds| seconds > 0), "grace {grace:?}");
    world.wait_gone("nginx", GONE).await?;
    runs_no_more(&world, "nginx").await?;
    world.finish().await
}

#[tokio::test]
async fn test_pod_lifecycle_force_delete() -> anyhow::Result<()> {
    let world = World::new("vk-force").await?;
    ready(&world, &pod("nginx")).await?;
    runs(&world, "nginx").await?;
    world.delete("nginx", Some(0)).await?;
    world.wait_gone("nginx", GONE).await?;
    runs_no_more(&world, "nginx").await?;
    world.finish().await
}

/// Checks that the pod runs without the variable and without an error.
async fn optional(test: &str, kind: &str) -> anyhow::Result<()> {
    let world = World::new(test).await?;
    ready(&world, &referring("nginx", kind, true)).await?;
    runs(&world, "nginx").await?;
    let variable = ["exec", "nginx", "--", "sh", "-c", "echo ${WANTED-unset}"];
    let shown = world.kubectl(variable).ok().await?.text();
    ensure!(shown == "unset", "WANTED is {shown:?}");
    let events = world.events("nginx").await?;
    ensure!(
        events.iter().all(|event| !event.contains("inexistent")),
        "{events:?}"
    );
    world.finish().await
}

/// Checks that the container waits with the object's name in its message, and that no job was submitted.
async fn mandatory(test: &str, kind: &str, expected: &str) -> anyhow::Result<()> {
    let world = World::new(test).await?;
    let uid = world.create(&referring("nginx", kind, false)).await?;
    let waiting = |pod: &Pod| {
        container_reason(pod, "main").filter(|(reason, _)| reason == "CreateContainerConfigError")
    };
    let (_, message) = world
        .wait_for_state("nginx", "waiting", SOON, waiting)
        .await?;
    ensure!(message.contains(expected), "{message:?}");
    wait_for("an event", SOON, async || {
        let events = world.events("nginx").await?;
        let told = |event: &String| event.starts_with("Failed: ") && event.contains(expected);
        ensure!(events.iter().any(told), "{events:?}");
        Ok(())
    })
    .await?;
    let running = listed(&world, "runningpods/").await?;
    ensure!(running.is_empty(), "running: {running:?}");
    let jobs = world.jobs(&uid).await?;
    ensure!(jobs.is_empty(), "jobs: {jobs:?}");
    world.finish().await
}

#[tokio::test]
async fn test_create_pod_with_optional_inexistent_secrets() -> anyhow::Result<()> {
    optional("vk-optional-secret", "secretKeyRef").await
}

#[tokio::test]
async fn test_create_pod_with_mandatory_inexistent_secrets() -> anyhow::Result<()> {
    mandatory(
        "vk-secret",
        "secretKeyRef",
        "secret \"inexistent\" not found",
    )
    .await
}

#[tokio::test]
async fn test_create_pod_with_optional_inexistent_config_map() -> anyhow::Result<()> {
    optional("vk-optional-map", "configMapKeyRef").await
}

#[tokio::test]
async fn test_create_pod_with_mandatory_inexistent_config_map() -> anyhow::Result<()> {
    mandatory(
        "vk-map",
        "configMapKeyRef",
        "configmap \"inexistent\" not found",
    )
    .await
}
