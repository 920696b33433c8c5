//! Sidecars, restart rules, shared processes and resizes on the real stack.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use knoc_tests::{PodBuilder, World, wait_for, world::SOON};
use kube::api::{Patch, PatchParams};
use serde_json::json;

const LATER: Duration = Duration::from_mins(5);

/// The status of a container or init container.
fn status<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    let init = status.init_container_statuses.iter().flatten();
    let mut all = status.container_statuses.iter().flatten().chain(init);
    all.find(|one| one.name == name)
}

fn is_true(pod: &Pod, kind: &str) -> bool {
    let conditions = pod.status.iter().flat_map(|status| &status.conditions);
    let mut all = conditions.flatten();
    all.any(|one| one.type_ == kind && one.status == "True")
}

#[tokio::test]
async fn a_pod_with_a_sidecar_starts_behind_it_and_completes_without_it() -> anyhow::Result<()> {
    let world = World::new("sidecar").await?;
    let pod = PodBuilder::new("job")
        .sh("test -e /shared/up && echo after the sidecar; sleep 2")
        .spec("terminationGracePeriodSeconds", json!(60))
        .empty_dir("/shared")
        .init_container("proxy")
        .sh("trap 'echo told; exit 0' TERM; sleep 2; touch /shared/up; while :; do sleep 0.2; done")
        .set("restartPolicy", json!("Always"))
        .set("volumeMounts", json!([{"name": "data", "mountPath": "/shared"}]))
        .set(
            "startupProbe",
            json!({"exec": {"command": ["test", "-e", "/shared/up"]}, "periodSeconds": 1, "failureThreshold": 600}),
        );
    let done = world.run(&pod, "Succeeded").await?;
    let code = |name: &str| {
        let state = status(&done, name)?.state.as_ref()?;
        Some(state.terminated.as_ref()?.exit_code)
    };
    ensure!(code("main") == Some(0), "{done:?}");
    ensure!(code("proxy").is_some(), "{done:?}");
    let log = world.logs("job", "main").await?;
    ensure!(log == "after the sidecar\n", "{log}");
    let log = world.logs("job", "proxy").await?;
    ensure!(log == "told\n", "{log}");
    world.finish().await
}

#[tokio::test]
async fn a_sidecar_is_part_of_the_pods_readiness() -> anyhow::Result<()> {
    let world = World::new("sidecar-ready").await?;
    let pod = PodBuilder::new("web")
        .sh("sleep 600")
        .init_container("proxy")
        .sh("sleep 600")
        .set("restartPolicy", json!("Always"))
        .set(
            "readinessProbe",
            json!({"exec": {"command": ["test", "-e", "/tmp/ready"]}, "periodSeconds": 1}),
        );
    let uid = world.running(&pod).await?;
    let seen = |pod: &Pod| {
        let runs = status(pod, "main")?.state.as_ref()?.running.is_some();
        (runs && is_true(pod, "Initialized")).then(|| is_true(pod, "ContainersReady"))
    };
    let ready = world.wait_for_state("web", "it runs", SOON, seen).await?;
    ensure!(!ready, "it is ready without its sidecar");
    world
        .exec(&uid, "proxy", ["touch", "/tmp/ready"])
        .ok()
        .await?;
    let is_ready = |pod: &Pod| is_true(pod, "Ready").then_some(());
    world
        .wait_for_state("web", "it is ready", SOON, is_ready)
        .await?;
    world.finish().await
}

#[tokio::test]
async fn a_rule_restarts_a_container_that_its_policy_would_not() -> anyhow::Result<()> {
    let world = World::new("rules").await?;
    let pod = PodBuilder::new("ruled")
        .sh("test -e /data/again && exit 0; touch /data/again; exit 42")
        .empty_dir("/data")
        .set("restartPolicy", json!("Never"))
        .set(
            "restartPolicyRules",
            json!([{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]),
        );
    let done = world.run(&pod, "Succeeded").await?;
    let restarts = status(&done, "main").map(|main| main.restart_count);
    ensure!(restarts == Some(1), "{done:?}");
    world.finish().await
}

/// Whether the API server accepts rules that restart all containers of a pod.
async fn knows_restart_all(world: &World) -> anyhow::Result<bool> {
    let version = world.server_version().await?;
    let minor = version.split('.').nth(1).and_then(|it| it.parse().ok());
    let minor: u32 = minor.with_context(|| version.clone())?;
    Ok(minor >= 36)
}

#[tokio::test]
async fn an_exit_code_restarts_all_containers_in_the_same_job() -> anyhow::Result<()> {
    let world = World::new("restart-all").await?;
    if !knows_restart_all(&world).await? {
        return world.finish().await;
    }
    let rules = json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [42]}}]);
    let pod = PodBuilder::new("all")
        .sh("test -e /data/again && exec sleep 600; touch /data/again; sleep 2; exit 42")
        .empty_dir("/data")
        .set("restartPolicy", json!("Never"))
        .set("restartPolicyRules", rules)
        .container("other")
        .set("resources", json!({"requests": {"cpu": "100m"}}))
        .sh("sleep 600")
        .init_container("init")
        .sh("echo ran")
        .init_container("side")
        .set("resources", json!({"requests": {"cpu": "100m"}}))
        .sh("sleep 600")
        .set("restartPolicy", json!("Always"));
    let uid = world.create(&pod).await?;
    let restarted = |pod: &Pod| {
        let all = ["init", "side", "main", "other"];
        let once = all.into_iter().all(|name| {
            status(pod, name).is_some_and(|one| {
                let last = one.last_state.as_ref();
                one.restart_count == 1 && last.is_some_and(|last| last.terminated.is_some())
            })
        });
        let false_again = pod
            .status
            .as_ref()?
            .conditions
            .iter()
            .flatten()
            .any(|one| one.type_ == "AllContainersRestarting" && one.status == "False");
        (once && false_again && is_true(pod, "Ready")).then(|| {
            let code = |name| {
                let last = status(pod, name)?.last_state.as_ref()?;
                Some(last.terminated.as_ref()?.exit_code)
            };
            [code("main"), code("other"), code("side")]
        })
    };
    let codes = world
        .wait_for_state("all", "all were restarted once", LATER, restarted)
        .await?;
    ensure!(codes == [Some(42), Some(137), Some(137)], "{codes:?}");
    world.one_job(&uid, "RUNNING").await?;
    world.delete("all", Some(1)).await?;
    world.wait_gone("all", LATER).await?;
    world.finish().await
}

#[tokio::test]
async fn containers_share_their_processes_and_one_may_end_that_of_another() -> anyhow::Result<()> {
    let world = World::new("shared").await?;
    let pod = PodBuilder::new("both")
        .spec("shareProcessNamespace", json!(true))
        .sh("echo here; while :; do sleep 0.2; done")
        .container("other")
        .sh("sleep 601");
    let uid = world.running(&pod).await?;
    let seen = async |container: &str| {
        let ps = world.exec(&uid, container, ["ps", "-o", "args"]);
        anyhow::Ok(ps.ok().await?.text())
    };
    wait_for("both see each other", SOON, async || {
        let all = seen("main").await?;
        ensure!(all.contains("sleep 601") && all.contains("hold"), "{all}");
        let all = seen("other").await?;
        ensure!(all.contains("echo here"), "{all}");
        anyhow::Ok(())
    })
    .await?;
    // One may end the other's program.
    let end = "kill $(ps -o pid,args | awk '/[s]leep 601/ {print $1}')";
    world.exec(&uid, "main", ["sh", "-c", end]).ok().await?;
    let ended = |pod: &Pod| {
        let state = status(pod, "other")?.state.as_ref()?;
        Some(state.terminated.as_ref()?.exit_code)
    };
    let code = world
        .wait_for_state("both", "the other has ended", SOON, ended)
        .await?;
    ensure!(code == 143, "{code}");
    // PID 1 is not theirs, so the end of one leaves the other running.
    let all = seen("main").await?;
    ensure!(all.contains("echo here"), "{all}");
    world.delete("both", Some(5)).await?;
    world.wait_gone("both", LATER).await?;
    world.finish().await
}

/// Its other processes would be in the namespace in which the runtime of the ephemeral container starts.
#[tokio::test]
async fn nothing_shares_the_processes_of_a_program_that_has_entered_further_namespaces()
-> anyhow::Result<()> {
    let world = World::new("unshared").await?;
    for network in ["host", "private"] {
        let name = format!("hides-{network}");
        let pod = PodBuilder::new(&name)
            .annotation("knoc.io/network", network)
            .memory("256Mi")
            .sh("while :; do sleep 1; done & exec unshare -U -m sh -c 'echo unshared; exec sleep 600'");
        world.create(&pod).await?;
        world.wait_log(&name, "main", "unshared").await?;
        let image = format!("--image={}", PodBuilder::image_name());
        let debug = [
            "debug",
            &name,
            "--attach=false",
            "--target=main",
            "-c",
            "helper",
        ];
        let run = world.kubectl(debug).arg(&image);
        run.args(["--", "sleep", "600"]).ok().await?;
        let refused = |pod: &Pod| {
            let all = pod.status.as_ref()?.ephemeral_container_statuses.as_ref()?;
            let state = all.first()?.state.as_ref()?;
            let message = state.terminated.as_ref()?.message.clone()?;
            message.contains("namespaces of its own").then_some(())
        };
        world
            .wait_for_state(&name, "it is refused", SOON, refused)
            .await?;
    }
    world.finish().await
}

/// A sandbox that the program makes for itself is not the container.
#[tokio::test]
async fn commands_enter_the_container_of_a_program_that_has_entered_further_namespaces()
-> anyhow::Result<()> {
    let world = World::new("sandboxed").await?;
    let hides = "mount -t tmpfs none /tmp && echo unshared; exec sleep 600";
    let program = format!("echo seen >/tmp/mark; exec unshare -U -r -m sh -c '{hides}'");
    for (network, context) in [
        ("host", json!({})),
        ("private", json!({})),
        ("private", json!({"runAsUser": 1234})),
    ] {
        let user = if context == json!({}) { "own" } else { "other" };
        let name = format!("{network}-{user}");
        let pod = PodBuilder::new(&name)
            .annotation("knoc.io/network", network)
            .set("securityContext", context)
            .sh(&program);
        let uid = world.running(&pod).await?;
        world.wait_log(&name, "main", "unshared").await?;
        let ran = world.exec(&uid, "main", ["cat", "/tmp/mark"]).ok().await?;
        ensure!(ran.text() == "seen", "{name}: {ran}");
        world.delete(&name, Some(1)).await?;
        world.wait_gone(&name, LATER).await?;
    }
    world.finish().await
}

/// Which containers' files, or the node's, a container reaches by the processes that it sees.
const REACHES: &str = "for process in /proc/[0-9]*; do \
     for one in main other helper; do [ ! -e $process/root/tmp/i-am-$one ] || echo $one; done; \
     [ ! -e $process/root/home/hpcuser ] || echo the node; done | sort -u";

/// A program that can be recognised by a file.
fn recognised(name: &str) -> String {
    format!("touch /tmp/i-am-{name}; while :; do sleep 1; done")
}

#[tokio::test]
async fn through_shared_processes_a_container_reaches_its_own_files_only() -> anyhow::Result<()> {
    let world = World::new("shared-files").await?;
    for network in ["host", "private"] {
        let (target, shared) = (format!("target-{network}"), format!("shared-{network}"));
        // In one of them the programs see themselves as other users, in namespaces further below.
        let context = match network {
            "private" => json!({"runAsUser": 1234}),
            _ => json!({}),
        };
        let pod = |name: &str| {
            let pod = PodBuilder::new(name).annotation("knoc.io/network", network);
            // The target has another container and commands beside its own.
            let pod = pod.memory("256Mi");
            pod.set("securityContext", context.clone())
        };
        let of_target = world.running(&pod(&target).sh(&recognised("main"))).await?;
        let both = pod(&shared)
            .spec("shareProcessNamespace", json!(true))
            .sh(&recognised("main"))
            .container("other")
            .sh(&recognised("other"));
        let of_shared = world.running(&both).await?;
        let image = format!("--image={}", PodBuilder::image_name());
        let debug = [
            "debug",
            &target,
            "--attach=false",
            "--target=main",
            "-c",
            "helper",
        ];
        let run = world.kubectl(debug).arg(&image);
        let program = recognised("helper");
        run.args(["--", "sh", "-c", &program]).ok().await?;
        for (uid, container) in [
            (&of_target, "helper"),
            (&of_target, "main"),
            (&of_shared, "main"),
            (&of_shared, "other"),
        ] {
            wait_for("it reaches its own files only", SOON, async || {
                let look = world.exec(uid, container, ["sh", "-c", REACHES]);
                let reached = look.ok().await?.text();
                ensure!(
                    reached == container,
                    "{container} of {network}: {reached:?}"
                );
                anyhow::Ok(())
            })
            .await?;
        }
    }
    world.finish().await
}

#[tokio::test]
async fn a_resize_is_answered_with_infeasible_and_taken_back() -> anyhow::Result<()> {
    let world = World::new("resize").await?;
    world
        .running(&PodBuilder::new("target").sh("sleep 600"))
        .await?;
    let resize = async |cpu: &str| {
        let resources = json!({"requests": {"cpu": cpu}});
        let patch = json!({"spec": {"containers": [{"name": "main", "resources": resources}]}});
        let patch = Patch::Strategic(patch);
        let api = world.api::<Pod>();
        api.patch_subresource("resize", "target", &PatchParams::default(), &patch)
            .await
            .context("resize")
    };
    resize("2").await?;
    let pending = |pod: &Pod| {
        let conditions = pod.status.as_ref()?.conditions.as_ref()?;
        let one = conditions
            .iter()
            .find(|one| one.type_ == "PodResizePending")?;
        one.reason.clone()
    };
    let reason = world
        .wait_for_state("target", "it is refused", SOON, pending)
        .await?;
    ensure!(reason == "Infeasible", "{reason}");
    let pod = world.pod("target").await?;
    let main = status(&pod, "main").context("no status")?;
    let shown = main.resources.as_ref().and_then(|own| own.requests.clone());
    let shown = shown.and_then(|requests| requests.get("cpu").map(|cpu| cpu.0.clone()));
    ensure!(
        shown.as_deref() == Some("1") && main.restart_count == 0,
        "{main:?}"
    );
    resize("1").await?;
    let gone = |pod: &Pod| pending(pod).is_none().then_some(());
    world
        .wait_for_state("target", "the condition is gone", SOON, gone)
        .await?;
    world.finish().await
}
