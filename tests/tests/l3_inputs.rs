//! The inputs of pods on the real stack (volumes, variables, images), and which of them are rejected.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use knoc_tests::{
    PodBuilder, World, wait_for,
    world::{SOON, container_reason, why},
};
use serde_json::json;

#[tokio::test]
async fn volumes_and_variables_arrive() -> anyhow::Result<()> {
    let world = World::new("inputs").await?;
    let config = [
        "create",
        "configmap",
        "settings",
        "--from-literal=colour=blue",
        "--from-literal=size=9",
    ];
    world.kubectl(config).ok().await?;
    let secret = [
        "create",
        "secret",
        "generic",
        "hidden",
        "--from-literal=password=a b'c\"$d",
    ];
    world.kubectl(secret).ok().await?;
    let pod = PodBuilder::new("inputs")
        .spec(
            "volumes",
            json!([
                {"name": "config", "configMap": {"name": "settings"}},
                {"name": "secret", "secret": {"secretName": "hidden", "defaultMode": 256}},
                {"name": "space", "emptyDir": {}},
            ]),
        )
        .sh("cat /config/colour; echo; cat /secret/password; echo; stat -L -c %a /secret/password; \
             echo kept >/space/file; cat /space/file; echo \"$PASSWORD\"; echo $size; echo $POD; echo $EXPANDED")
        .set(
            "volumeMounts",
            json!([
                {"name": "config", "mountPath": "/config"},
                {"name": "secret", "mountPath": "/secret", "readOnly": true},
                {"name": "space", "mountPath": "/space"},
            ]),
        )
        .set("envFrom", json!([{"configMapRef": {"name": "settings"}}]))
        .set(
            "env",
            json!([
                {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "hidden", "key": "password"}}},
                {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "EXPANDED", "value": "$(POD)-$(colour)"},
            ]),
        );
    world.run(&pod, "Succeeded").await?;
    let log = world.logs("inputs", "main").await?;
    ensure!(
        log == "blue\na b'c\"$d\n400\nkept\na b'c\"$d\n9\ninputs\ninputs-blue\n",
        "{log}"
    );
    world.finish().await
}

/// How long a change at the API server may take to reach a container.
const LIVE: Duration = Duration::from_secs(5);

/// How many changes are made until one is in time. A busy machine may delay some of them; a kubelet that does not watch the
/// objects is late with all.
const TRIES: usize = 20;

/// Waits until the container shows what the objects now contain: a ConfigMap, a Secret, an annotation, and the
/// ConfigMap once more in a projected volume.
async fn shows(world: &World, uid: &str, wanted: &str) -> anyhow::Result<()> {
    let show = "cat /config/k /secret/k /pod/note; echo ,; cat /all/k";
    wait_for(&format!("{wanted:?} in the container"), SOON, async || {
        let shown = world.exec(uid, "main", ["sh", "-c", show]).ok().await?;
        let shown = shown.text().replace('\n', "");
        ensure!(shown == wanted, "{shown:?}");
        Ok(())
    })
    .await
}

/// Gives an object one value after the other, until one reaches the container in time; returns that value.
async fn changes(
    world: &World,
    uid: &str,
    change: impl AsyncFn(&str) -> anyhow::Result<()>,
    shown: impl Fn(&str) -> String,
) -> anyhow::Result<String> {
    let mut times = Vec::new();
    for number in 0..TRIES {
        let value = format!("new{number}");
        change(&value).await?;
        let began = Instant::now();
        shows(world, uid, &shown(&value)).await?;
        times.push(began.elapsed());
        if began.elapsed() <= LIVE {
            return Ok(value);
        }
    }
    anyhow::bail!("none of the changes arrived within {LIVE:?}: {times:?}")
}

/// A pod that has the objects which [`shows`] looks at, as volumes.
fn showing_its_objects() -> PodBuilder {
    let note = json!([{"path": "note", "fieldRef": {"fieldPath": "metadata.annotations['note']"}}]);
    PodBuilder::new("live")
        .annotation("note", "old")
        .spec(
            "volumes",
            json!([
                {"name": "config", "configMap": {"name": "map"}},
                {"name": "secret", "secret": {"secretName": "hidden"}},
                {"name": "pod", "downwardAPI": {"items": note}},
                {"name": "all", "projected": {"sources": [{"configMap": {"name": "map"}}]}},
            ]),
        )
        .set(
            "volumeMounts",
            json!([
                {"name": "config", "mountPath": "/config"},
                {"name": "secret", "mountPath": "/secret"},
                {"name": "pod", "mountPath": "/pod"},
                {"name": "all", "mountPath": "/all"},
            ]),
        )
        .sh("sleep 600")
}

#[tokio::test]
async fn a_changed_object_reaches_the_container_within_five_seconds() -> anyhow::Result<()> {
    let world = World::new("live").await?;
    for object in ["configmap map", "secret generic hidden"] {
        let create = world.kubectl(["create"]).args(object.split(' '));
        create.args(["--from-literal=k=old,"]).ok().await?;
    }
    let uid = world.running(&showing_its_objects()).await?;
    shows(&world, &uid, "old,old,old,old,").await?;
    let patch = async |kind: &str, name: &str, patch: serde_json::Value| {
        let patch = patch.to_string();
        let patch = world.kubectl(["patch", kind, name, "-p", &patch]);
        patch.ok().await.map(drop)
    };
    let map = changes(
        &world,
        &uid,
        async |value| {
            let data = json!({"data": {"k": format!("{value},")}});
            patch("configmap", "map", data).await
        },
        |value| format!("{value},old,old,{value},"),
    )
    .await?;
    let hidden = changes(
        &world,
        &uid,
        async |value| {
            let data = json!({"stringData": {"k": format!("{value},")}});
            patch("secret", "hidden", data).await
        },
        |value| format!("{map},{value},old,{map},"),
    )
    .await?;
    let note = changes(
        &world,
        &uid,
        async |value| {
            let note = json!({"metadata": {"annotations": {"note": value}}});
            patch("pod", "live", note).await
        },
        |value| format!("{map},{hidden},{value},{map},"),
    )
    .await?;
    // The volume keeps its files if its object is gone, and gets those of a new one.
    world.kubectl(["delete", "configmap", "map"]).ok().await?;
    wait_for("an Event", SOON, async || {
        let events = world.events("live").await?;
        let kept = |event: &String| event.contains("FailedMount: The pod keeps its present files");
        ensure!(events.iter().any(kept), "{events:?}");
        Ok(())
    })
    .await?;
    shows(&world, &uid, &format!("{map},{hidden},{note},{map},")).await?;
    let create = ["create", "configmap", "map", "--from-literal=k=again,"];
    world.kubectl(create).ok().await?;
    shows(&world, &uid, &format!("again,{hidden},{note},again,")).await?;
    world.finish().await
}

#[tokio::test]
async fn a_default_pod_has_its_service_account_token() -> anyhow::Result<()> {
    let world = World::new("token").await?;
    let folder = "/var/run/secrets/kubernetes.io/serviceaccount";
    let pod = PodBuilder::new("default")
        .spec("automountServiceAccountToken", json!(true))
        .sh(&format!(
            "cd {folder} && cat namespace && head -1 ca.crt && cut -d. -f2 token | wc -c"
        ));
    world.run(&pod, "Succeeded").await?;
    let log = world.logs("default", "main").await?;
    ensure!(
        log.starts_with(&format!("{}-----BEGIN CERTIFICATE-----", world.namespace)),
        "{log}"
    );
    ensure!(
        log.lines()
            .last()
            .is_some_and(|line| line.trim().parse::<u32>().is_ok_and(|n| n > 100)),
        "{log}"
    );
    world.finish().await
}

#[tokio::test]
async fn a_missing_config_map_is_waited_for() -> anyhow::Result<()> {
    let world = World::new("waits").await?;
    let pod = PodBuilder::new("waits")
        .sh("echo $colour")
        .set("envFrom", json!([{"configMapRef": {"name": "settings"}}]));
    world.create(&pod).await?;
    world
        .wait_for_state("waits", "waiting reason", SOON, |pod| {
            container_reason(pod, "main")
                .filter(|(reason, _)| reason == "CreateContainerConfigError")
        })
        .await?;
    world
        .kubectl([
            "create",
            "configmap",
            "settings",
            "--from-literal=colour=red",
        ])
        .ok()
        .await?;
    world.wait_phase("waits", "Succeeded", SOON).await?;
    ensure!(world.logs("waits", "main").await? == "red\n");
    world.finish().await
}

#[tokio::test]
async fn a_volume_that_is_missing_and_a_name_that_is_none_keep_a_container_waiting()
-> anyhow::Result<()> {
    let world = World::new("mount").await?;
    let volume = json!([{"name": "cfg", "configMap": {"name": "settings"}}]);
    let pod = PodBuilder::new("mount")
        .sh("cat /cfg/colour")
        .spec("volumes", volume)
        .set(
            "volumeMounts",
            json!([{"name": "cfg", "mountPath": "/cfg"}]),
        );
    world.create(&pod).await?;
    let failed = "FailedMount: MountVolume.SetUp failed for volume \"cfg\" : configmap \"settings\" not found";
    wait_for("an Event of the mount", SOON, async || {
        let events = world.events("mount").await?;
        ensure!(events.iter().any(|event| event == failed), "{events:?}");
        Ok(())
    })
    .await?;
    let creating =
        |pod: &_| container_reason(pod, "main").filter(|(reason, _)| reason == "ContainerCreating");
    world
        .wait_for_state("mount", "ContainerCreating", SOON, creating)
        .await?;
    let create = [
        "create",
        "configmap",
        "settings",
        "--from-literal=colour=red",
    ];
    world.kubectl(create).ok().await?;
    world.wait_phase("mount", "Succeeded", SOON).await?;
    ensure!(world.logs("mount", "main").await? == "red");
    // If the pod failed, a Deployment would create the next one at once.
    world
        .create(&PodBuilder::new("name").image("Busy Box"))
        .await?;
    let invalid =
        |pod: &_| container_reason(pod, "main").filter(|(reason, _)| reason == "InvalidImageName");
    let (_, message) = world
        .wait_for_state("name", "InvalidImageName", SOON, invalid)
        .await?;
    ensure!(message.contains("Busy Box"), "{message}");
    world.finish().await
}

#[tokio::test]
async fn a_pod_with_unsupported_fields_fails_with_all_reasons_and_no_job() -> anyhow::Result<()> {
    let world = World::new("refused").await?;
    let pod = PodBuilder::new("refused")
        .spec("hostPID", json!(true))
        .spec(
            "volumes",
            json!([{"name": "share", "iscsi": {"targetPortal": "s", "iqn": "iqn.2001-04.com.example:p", "lun": 0}}]),
        )
        .set("securityContext", json!({"privileged": true}));
    let uid = world.create(&pod).await?;
    let ended = world.wait_phase("refused", "Failed", SOON).await?;
    let (reason, message) = why(&ended);
    for word in ["hostPID", "iscsi", "privileged"] {
        ensure!(message.contains(word), "{reason}: {message}");
    }
    let jobs = world.jobs(&uid).await?;
    ensure!(jobs.is_empty(), "{jobs:?}");
    world.finish().await
}

#[tokio::test]
async fn an_unknown_partition_fails_with_the_message_of_slurm() -> anyhow::Result<()> {
    let world = World::new("partition").await?;
    let pod = PodBuilder::new("nowhere").annotation("knoc.io/partition", "nonesuch");
    let ended = world.run(&pod, "Failed").await?;
    let (reason, message) = why(&ended);
    ensure!(message.contains("invalid partition"), "{reason}: {message}");
    world.finish().await
}

#[tokio::test]
async fn a_missing_image_is_err_image_pull_with_back_off() -> anyhow::Result<()> {
    let world = World::new("image").await?;
    let image = PodBuilder::image_name().replace("busybox", "nonesuch");
    let since = world.version().await?;
    world
        .create(&PodBuilder::new("no-image").image(&image))
        .await?;
    let of = |wanted: &'static str| {
        move |pod: &_| container_reason(pod, "main").filter(|(reason, _)| reason == wanted)
    };
    // It stays for a second, and is back with the next attempt.
    let (_, message) = world
        .saw("no-image", &since, SOON, of("ErrImagePull"))
        .await?;
    ensure!(message.contains("nonesuch"), "{message}");
    world
        .wait_for_state("no-image", "ImagePullBackOff", SOON, of("ImagePullBackOff"))
        .await?;
    world.delete("no-image", None).await?;
    world.wait_gone("no-image", SOON).await?;
    world.finish().await
}

/// Whoever owns the image, a program has its temporary folders.
const WRITES: &str = "mkdir /tmp/a && echo a >/tmp/a/b && touch /dev/shm/c";

#[tokio::test]
async fn images_come_from_files_folders_and_mirrors() -> anyhow::Result<()> {
    let world = World::new("images").await?;
    for (name, image) in [
        ("sif", "/images/busybox.sif"),
        ("sandbox", "/images/busybox"),
        ("mirror", "busybox"),
        ("scheme", "docker://busybox:latest"),
    ] {
        world
            .create(&PodBuilder::new(name).image(image).sh(WRITES))
            .await?;
    }
    for name in ["sif", "sandbox", "mirror", "scheme"] {
        world.wait_phase(name, "Succeeded", SOON).await?;
    }
    world
        .create(&PodBuilder::new("outside").image("/etc"))
        .await?;
    let refused = world
        .wait_for_state("outside", "InvalidImageName", SOON, |pod| {
            container_reason(pod, "main").filter(|(reason, _)| reason == "InvalidImageName")
        })
        .await?;
    ensure!(refused.1.contains("/etc"), "{refused:?}");
    world.delete("outside", None).await?;
    world.wait_gone("outside", SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn a_command_that_is_not_there_is_a_start_error() -> anyhow::Result<()> {
    let world = World::new("start-error").await?;
    let ended = world
        .run(
            &PodBuilder::new("nothing").command(["/no/such/program"]),
            "Failed",
        )
        .await?;
    let (reason, message) = container_reason(&ended, "main").context("no reason")?;
    ensure!(
        reason == "StartError" || reason == "ContainerCannotRun",
        "{reason}: {message}"
    );
    ensure!(message.contains("/no/such/program"), "{message}");
    world.finish().await
}

/// The reason of ADR 0022: jobs get `--export=ALL` with an explicit environment, and not a list of names.
#[tokio::test]
async fn a_job_gets_the_named_environment_and_no_login_shell() -> anyhow::Result<()> {
    let world = World::new("export").await?;
    let environment = async |export: &str| {
        let out = format!("/home/hpcuser/export-{}.out", world.namespace);
        let (export, output) = (format!("--export={export}"), format!("--output={out}"));
        let job = [
            "env",
            "-i",
            "PATH=/usr/local/bin:/usr/bin:/bin",
            "NAMED=1",
            "sbatch",
            "--wait",
            "--time=1",
            &export,
            &output,
            "--wrap",
            "env",
        ];
        // `--wait` looks at the job after 2, 4, 8, 16 and 32 s, and every 32 s from then on.
        world.on("login", job).deadline(SOON * 3).ok().await?;
        let text = world.on("login", ["cat", &out]).ok().await?.text();
        world.on("login", ["rm", &out]).ok().await?;
        anyhow::Ok(text)
    };
    let all = environment("ALL").await?;
    ensure!(
        all.contains("NAMED=1") && !all.contains("SLURM_GET_USER_ENV"),
        "{all}"
    );
    for export in ["PATH,NAMED", "NONE"] {
        let list = environment(export).await?;
        ensure!(list.contains("SLURM_GET_USER_ENV=1"), "{export}: {list}");
    }
    world.finish().await
}
