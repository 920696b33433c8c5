//! What a pod says about its names, its user and its paths on the real stack: host name and domain, `/etc/hosts`, `/etc/resolv.conf`,
//! `subPathExpr`, `runAsNonRoot`, kernel parameters, and resources that somebody else put on the node.

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use knoc_tests::{
    PodBuilder, World,
    world::{SOON, container_reason, phase_of, why},
};
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

/// Runs the pod to its end and returns the log of `main`.
async fn said(world: &World, name: &str, pod: &PodBuilder) -> anyhow::Result<String> {
    world.run(pod, "Succeeded").await?;
    world.logs(name, "main").await
}

#[tokio::test]
async fn a_pod_has_the_names_and_aliases_that_it_asks_for() -> anyhow::Result<()> {
    let world = World::new("names").await?;
    let namespace = &world.namespace;
    let named = |name: &str| {
        PodBuilder::new(name)
            .sh("hostname; cat /etc/hosts")
            .spec("subdomain", json!("web"))
            .spec("hostname", json!("h"))
            .spec(
                "hostAliases",
                json!([{"ip": "10.9.8.7", "hostnames": ["a.example", "b"]}]),
            )
    };
    let domain = format!("h.web.{namespace}.svc.cluster.local");
    let log = said(&world, "short", &named("short")).await?;
    let (first, hosts) = log.split_once('\n').context("no lines")?;
    ensure!(first == "h", "{log}");
    ensure!(hosts.contains(&format!("\t{domain}\th\n")), "{log}");
    ensure!(hosts.contains("10.9.8.7\ta.example\tb\n"), "{log}");
    // The kernel takes 64 characters.
    let full = named("full").spec("setHostnameAsFQDN", json!(true));
    if domain.len() <= 64 {
        let log = said(&world, "full", &full).await?;
        ensure!(log.starts_with(&format!("{domain}\n")), "{log}");
    } else {
        world.create(&full).await?;
        let failed = world.wait_phase("full", "Failed", SOON).await?;
        ensure!(why(&failed).1.contains("64 characters"), "{failed:?}");
    }
    let replaced = named("replaced").spec("hostnameOverride", json!("my.own.example"));
    let log = said(&world, "replaced", &replaced).await?;
    ensure!(log.starts_with("my.own.example\n"), "{log}");
    ensure!(log.contains("\tmy.own.example\n"), "{log}");
    world.finish().await
}

#[tokio::test]
async fn a_pod_has_the_resolver_that_it_asks_for() -> anyhow::Result<()> {
    let world = World::new("resolver").await?;
    let config = json!({
        "nameservers": ["192.0.2.53"], "searches": ["a.example"],
        "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}],
    });
    let pod = PodBuilder::new("own")
        .sh("cat /etc/resolv.conf")
        .spec("dnsPolicy", json!("None"))
        .spec("dnsConfig", config);
    let log = said(&world, "own", &pod).await?;
    let wanted = "search a.example\nnameserver 192.0.2.53\noptions ndots:2 edns0\n";
    ensure!(log == wanted, "{log}");
    world.finish().await
}

#[tokio::test]
async fn a_sub_path_waits_for_its_variables_and_stays_in_the_volume() -> anyhow::Result<()> {
    let world = World::new("sub-path").await?;
    let pod = |name: &str, value: &str| {
        PodBuilder::new(name)
            .sh("echo hello >/sub/file; ls /all/*/*/*")
            .set(
                "env",
                json!([
                    {"name": "NAME", "value": value},
                    {"name": "NOTE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['note']"}}},
                ]),
            )
            .set(
                "volumeMounts",
                json!([
                    {"name": "v", "mountPath": "/all"},
                    {"name": "v", "mountPath": "/sub", "subPathExpr": "$(NOTE)/$(NAME)"},
                ]),
            )
            .spec("volumes", json!([{"name": "v", "emptyDir": {}}]))
    };
    let waits = |world: &World, name: &'static str, words: &'static str| {
        let waiting = move |pod: &Pod| {
            let (reason, message) = container_reason(pod, "main")?;
            let waits = reason == "CreateContainerConfigError" && message.contains(words);
            (waits && phase_of(pod) == "Pending").then_some(())
        };
        let world = world.clone();
        async move { world.wait_for_state(name, words, SOON, waiting).await }
    };
    world.create(&pod("late", "foo")).await?;
    waits(&world, "late", "missing value for NOTE").await?;
    world
        .kubectl(["annotate", "pod", "late", "note=bar"])
        .ok()
        .await?;
    world.wait_phase("late", "Succeeded", SOON).await?;
    let log = world.logs("late", "main").await?;
    ensure!(log == "/all/bar/foo/file\n", "{log}");
    world
        .create(&pod("up", "..").annotation("note", "x"))
        .await?;
    waits(&world, "up", "must not contain '..'").await?;
    world.finish().await
}

#[tokio::test]
async fn a_container_that_would_be_root_waits_if_the_pod_forbids_it() -> anyhow::Result<()> {
    let world = World::new("non-root").await?;
    for (name, user, words) in [
        ("image", Value::Null, "image will run as root"),
        ("pod", json!(0), "runAsUser breaks non-root policy"),
    ] {
        let context = json!({"runAsNonRoot": true, "runAsUser": user});
        let pod = PodBuilder::new(name).set("securityContext", context);
        let uid = world.create(&pod).await?;
        let waiting = |pod: &Pod| {
            let (reason, message) = container_reason(pod, "main")?;
            (reason == "CreateContainerConfigError" && message.contains(words)).then_some(())
        };
        world.wait_for_state(name, words, SOON, waiting).await?;
        let jobs = world.jobs(&uid).await?;
        ensure!(jobs.is_empty(), "{jobs:?}");
    }
    let context = json!({"runAsNonRoot": true, "runAsUser": 1000});
    let pod = PodBuilder::new("other").set("securityContext", context);
    world.run(&pod, "Succeeded").await?;
    world.finish().await
}

#[tokio::test]
async fn an_unsafe_kernel_parameter_is_forbidden() -> anyhow::Result<()> {
    let world = World::new("sysctl").await?;
    let context = json!({"sysctls": [{"name": "kernel.msgmax", "value": "65536"}]});
    let pod = PodBuilder::new("unsafe").spec("securityContext", context);
    world.create(&pod).await?;
    let failed = world.wait_phase("unsafe", "Failed", SOON).await?;
    let (reason, message) = why(&failed);
    ensure!(reason == "SysctlForbidden", "{reason}: {message}");
    ensure!(
        message.contains("\"kernel.msgmax\" not allowlisted"),
        "{message}"
    );
    world.finish().await
}

#[tokio::test]
async fn what_somebody_else_put_on_the_node_is_kept_and_counted() -> anyhow::Result<()> {
    let world = World::new("foreign").await?;
    let resource = format!("example.com/{}", world.namespace);
    let nodes = world.cluster_api::<Node>();
    let set = async |amount: Value| {
        let patch = Patch::Merge(json!({"status": {
            "capacity": {&resource: amount}, "allocatable": {&resource: amount},
        }}));
        let params = PatchParams::default();
        nodes.patch_status(&world.node, &params, &patch).await
    };
    set(json!("3")).await?;
    let pod = |name: &str| {
        let pieces = json!({&resource: "2"});
        PodBuilder::new(name)
            .sh("until [ -e /tmp/go ]; do sleep 0.1; done")
            .set(
                "resources",
                json!({"requests": {"cpu": "1", &resource: "2"}, "limits": pieces}),
            )
    };
    world.running(&pod("first")).await?;
    // Past the scheduler, which counts too.
    let second = pod("second").spec("nodeName", json!(world.node));
    world.create(&second).await?;
    let failed = world.wait_phase("second", "Failed", SOON).await?;
    ensure!(
        why(&failed).0 == format!("OutOf{resource}"),
        "{:?}",
        why(&failed)
    );
    let node = nodes.get(&world.node).await?;
    let kept = node.status.and_then(|status| status.allocatable);
    let kept = kept.and_then(|all| all.get(&resource).map(|amount| amount.0.clone()));
    ensure!(kept.as_deref() == Some("3"), "{kept:?}");
    set(Value::Null).await?;
    world.finish().await
}
