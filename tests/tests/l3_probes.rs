//! Probes and hooks on the real stack: Kubernetes sees what the job finds out.

use anyhow::ensure;
use k8s_openapi::api::core::v1::{Event, Pod};
use knoc_tests::{
    PodBuilder, World,
    ports::some_port,
    wait_for,
    world::{SOON, container_reason, phase_of, why},
};
use kube::api::ListParams;
use serde_json::json;

/// The status and the reason of a condition.
fn condition(pod: &Pod, kind: &str) -> Option<(String, String)> {
    let mut all = pod.status.as_ref()?.conditions.iter().flatten();
    let one = all.find(|one| one.type_ == kind)?;
    Some((one.status.clone(), one.reason.clone().unwrap_or_default()))
}

async fn wait_ready(world: &World, name: &str, ready: &str, reason: &str) -> anyhow::Result<Pod> {
    let wanted = Some((ready.to_owned(), reason.to_owned()));
    let is = |pod: &Pod| (condition(pod, "Ready") == wanted).then(|| pod.clone());
    let what = format!("Ready is {ready} {reason}");
    world.wait_for_state(name, &what, SOON, is).await
}

/// Waits for the pod's Event of this reason whose message contains `text`.
async fn wait_event(world: &World, name: &str, reason: &str, text: &str) -> anyhow::Result<Event> {
    wait_for(&format!("{name}: {reason}: {text}"), SOON, async || {
        let of = ListParams::default().fields(&format!("involvedObject.name={name}"));
        let all = world.api::<Event>().list(&of).await?.items;
        let found = all.iter().find(|event| {
            let message = event.message.as_deref().unwrap_or_default();
            event.reason.as_deref() == Some(reason) && message.contains(text)
        });
        found.cloned().ok_or_else(|| anyhow::anyhow!("{all:?}"))
    })
    .await
}

/// A pod that serves what is in `/www` on a port named `web`.
fn server(name: &str) -> PodBuilder {
    let port = some_port();
    PodBuilder::new(name)
        .sh(&format!(
            "mkdir /www; exec httpd -f -p 127.0.0.1:{port} -h /www"
        ))
        .set("ports", json!([{"name": "web", "containerPort": port}]))
}

#[tokio::test]
async fn a_pod_is_ready_while_its_readiness_probe_passes() -> anyhow::Result<()> {
    let world = World::new("readiness").await?;
    let pod = server("web")
        .set("startupProbe", json!({"tcpSocket": {"port": "web"}, "periodSeconds": 1, "failureThreshold": 600}))
        .set(
            "readinessProbe",
            json!({"httpGet": {"port": "web", "path": "/ok"}, "periodSeconds": 1, "failureThreshold": 1}),
        );
    let uid = world.running(&pod).await?;
    let unready = wait_ready(&world, "web", "False", "ContainersNotReady").await?;
    ensure!(condition(&unready, "ContainersReady").is_some_and(|(status, _)| status == "False"));
    let event = wait_event(&world, "web", "Unhealthy", "statuscode: 404").await?;
    ensure!(event.type_.as_deref() == Some("Warning"), "{event:?}");
    let field = event.involved_object.field_path.as_deref();
    ensure!(field == Some("spec.containers{main}"), "{event:?}");
    world.exec(&uid, "main", ["touch", "/www/ok"]).ok().await?;
    wait_ready(&world, "web", "True", "").await?;
    world.exec(&uid, "main", ["rm", "/www/ok"]).ok().await?;
    wait_ready(&world, "web", "False", "ContainersNotReady").await?;
    // The same failure is one Event, which counts.
    wait_for("the Event counts", SOON, async || {
        let event = wait_event(&world, "web", "Unhealthy", "statuscode: 404").await?;
        ensure!(event.count > Some(1), "{event:?}");
        anyhow::Ok(())
    })
    .await?;
    world.finish().await
}

#[tokio::test]
async fn a_failed_liveness_probe_restarts_the_container_and_kubernetes_knows_why()
-> anyhow::Result<()> {
    let world = World::new("liveness").await?;
    // The startup probe waits for the file after each start, so that liveness fails only once it was removed. A slow
    // command is no failure.
    let action = json!({"command": ["cat", "/tmp/alive"]});
    let pod = PodBuilder::new("alive")
        .sh("touch /tmp/alive; exec sleep 600")
        .restart("Always")
        .set(
            "startupProbe",
            json!({"exec": action, "periodSeconds": 1, "failureThreshold": 600, "timeoutSeconds": 60}),
        )
        .set(
            "livenessProbe",
            json!({"exec": action, "periodSeconds": 1, "failureThreshold": 1, "timeoutSeconds": 60,
                   "terminationGracePeriodSeconds": 1}),
        );
    let uid = world.running(&pod).await?;
    let status = |pod: &Pod| {
        let status = pod.status.as_ref()?.container_statuses.as_ref()?.first()?;
        (status.started == Some(true) && status.ready).then_some(status.restart_count)
    };
    let restarts = world
        .wait_for_state("alive", "its file is there", SOON, status)
        .await?;
    ensure!(restarts == 0, "{restarts} restarts");
    world.exec(&uid, "main", ["rm", "/tmp/alive"]).ok().await?;
    let text = "Liveness probe failed: cat: can't open '/tmp/alive'";
    wait_event(&world, "alive", "Unhealthy", text).await?;
    let text = "Container main failed liveness probe, will be restarted";
    wait_event(&world, "alive", "Killing", text).await?;
    let restarted = |pod: &Pod| status(pod).filter(|restarts| *restarts > 0);
    let what = "it was restarted and is ready";
    let restarts = world.wait_for_state("alive", what, SOON, restarted).await?;
    ensure!(restarts == 1, "{restarts} restarts");
    world.finish().await
}

#[tokio::test]
async fn hooks_run_in_the_container_and_their_failures_are_events() -> anyhow::Result<()> {
    let world = World::new("hooks").await?;
    let pod = PodBuilder::new("hooked")
        .sh("trap 'exit 0' TERM; while :; do sleep 0.1; done")
        .set(
            "lifecycle",
            json!({
                "postStart": {"exec": {"command": [
                    "sh", "-c", "until test -e /tmp/go; do sleep 0.1; done; touch /tmp/started",
                ]}},
                "preStop": {"exec": {"command": ["sh", "-c", "exit 3"]}},
            }),
        )
        .set(
            "readinessProbe",
            json!({"exec": {"command": ["test", "-e", "/tmp/started"]}, "periodSeconds": 600, "timeoutSeconds": 60}),
        );
    let uid = world.create(&pod).await?;
    wait_event(&world, "hooked", "Started", "main").await?;
    let waits = |pod: &Pod| {
        let (reason, _) = container_reason(pod, "main")?;
        (reason == "ContainerCreating" && phase_of(pod) == "Pending").then_some(())
    };
    world
        .wait_for_state("hooked", "it is shown as waiting", SOON, waits)
        .await?;
    // Exec does not ask what is shown.
    world.exec(&uid, "main", ["touch", "/tmp/go"]).ok().await?;
    // It is tried once only: it comes after the hook.
    wait_ready(&world, "hooked", "True", "").await?;
    world.delete("hooked", Some(20)).await?;
    wait_event(&world, "hooked", "FailedPreStopHook", "PreStopHook failed").await?;
    world.wait_gone("hooked", SOON).await?;
    let pod = PodBuilder::new("unhooked").sh("exec sleep 600").set(
        "lifecycle",
        json!({"postStart": {"exec": {"command": ["/no/such/program"]}}}),
    );
    world.run(&pod, "Failed").await?;
    wait_event(
        &world,
        "unhooked",
        "FailedPostStartHook",
        "PostStartHook failed",
    )
    .await?;
    world.finish().await
}

#[tokio::test]
async fn a_probe_or_hook_with_a_foreign_host_is_rejected_by_name() -> anyhow::Result<()> {
    let world = World::new("foreign-host").await?;
    let pod = PodBuilder::new("foreign")
        .set(
            "livenessProbe",
            json!({"httpGet": {"port": 80, "host": "10.0.0.1"}}),
        )
        .set(
            "readinessProbe",
            json!({"tcpSocket": {"port": 80, "host": "db.example"}}),
        )
        .set(
            "lifecycle",
            json!({"preStop": {"httpGet": {"port": 80, "host": "169.254.169.254"}}}),
        );
    let failed = world.run(&pod, "Failed").await?;
    let (reason, message) = why(&failed);
    ensure!(reason == "UnsupportedPodSpec", "{reason}: {message}");
    for field in [
        "spec.containers[main].livenessProbe.httpGet.host (`10.0.0.1`)",
        "spec.containers[main].readinessProbe.tcpSocket.host (`db.example`)",
        "spec.containers[main].lifecycle.preStop.httpGet.host (`169.254.169.254`)",
    ] {
        ensure!(message.contains(field), "{field}: {message}");
    }
    world.finish().await
}
