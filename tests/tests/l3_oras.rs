//! SIF files in a registry (`oras://`), where `apptainer push` of an ordinary user has put them: pull policies with a tag that moves,
//! credentials, images of the other kind, and sources that are not supported.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Pod;
use knoc_tests::{
    PodBuilder, World,
    world::{SOON, container_reason, why},
};
use serde_json::{Value, json};

/// The time for a pull and a job, after those of other tests.
const PULLED: Duration = Duration::from_mins(5);
/// The registry's storage folder on its node.
const STORE: &str = "/var/spool/registry/docker/registry/v2/repositories/library";
/// What the image `own` prints.
const OWN: &str = "[/bin/show][entry][cmd][two words] in /srv/own, colour=blue size=7\n";
/// The password of the registry on ctl:5001 for the user ann.
const PASSWORD: &str = "--docker-password=pull-s3cr3t-of-ann";

/// The name of the test's own image without its scheme.
fn name(world: &World) -> String {
    let own = format!("{}:1", world.namespace);
    PodBuilder::image_name().replace("busybox:latest", &own)
}

/// Pushes a SIF file of the test bed as the test's own image.
async fn push(world: &World, sif: &str) -> anyhow::Result<()> {
    let target = format!("oras://{}", name(world));
    let push = ["apptainer", "push", "--no-https", sif, &target];
    world.on("login", push).deadline(SOON).ok().await?;
    Ok(())
}

async fn remove(world: &World) -> anyhow::Result<()> {
    let folder = format!("{STORE}/{}", world.namespace);
    world.on_as_root("ctl", ["rm", "-r", &folder]).ok().await?;
    Ok(())
}

/// A pod that runs the image as it is.
fn pod(name: &str, image: &str, policy: &str) -> PodBuilder {
    let pod = PodBuilder::new(name).image(image);
    pod.set("command", Value::Null)
        .set("imagePullPolicy", json!(policy))
}

/// Runs the pod to its end; returns its log and the ID of its image.
async fn run(world: &World, pod: &PodBuilder) -> anyhow::Result<(String, String)> {
    world.create(pod).await?;
    let ended = world.wait_phase(pod.name(), "Succeeded", PULLED).await?;
    let id = image_id(&ended).context("no image ID")?;
    Ok((world.logs(pod.name(), "main").await?, id))
}

fn image_id(pod: &Pod) -> Option<String> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    Some(statuses.first()?.image_id.clone())
}

/// Waits until the pod's container cannot pull its image for this reason.
async fn fails(world: &World, pod: &PodBuilder, expected: &str) -> anyhow::Result<()> {
    world.create(pod).await?;
    let failed = world.wait_for_state(pod.name(), expected, PULLED, |pod| {
        let (_, message) = container_reason(pod, "main")?;
        message.contains(expected).then_some(message)
    });
    failed.await?;
    Ok(())
}

#[tokio::test]
async fn a_pushed_sif_runs_as_it_says_and_always_follows_its_tag() -> anyhow::Result<()> {
    let world = World::new("oras").await?;
    push(&world, "/images/own.sif").await?;
    let oras = format!("oras://{}", name(&world));
    let (log, first) = run(&world, &pod("first", &oras, "IfNotPresent")).await?;
    ensure!(log == OWN, "{log}");
    ensure!(
        first.starts_with("oras://") && first.contains("@sha256:"),
        "{first}"
    );
    push(&world, "/images/busybox.sif").await?;
    let (_, stays) = run(&world, &pod("stays", &oras, "IfNotPresent")).await?;
    ensure!(stays == first, "{stays} instead of {first}");
    let hello = pod("follows", &oras, "Always").sh("echo hello");
    let (log, follows) = run(&world, &hello).await?;
    ensure!(log == "hello\n" && follows != first, "{log}, {follows}");
    // By its digest too, and as a volume.
    let volume = json!([{"name": "own", "image": {"reference": first, "pullPolicy": "Never"}}]);
    let mount = json!([{"name": "own", "mountPath": "/own"}]);
    let shown = pod("mounts", &first, "Never")
        .sh("cat /own/bin/show | head -n 1")
        .spec("volumes", volume)
        .set("volumeMounts", mount);
    let (log, _) = run(&world, &shown).await?;
    ensure!(log == "#!/bin/sh\n", "{log}");
    remove(&world).await?;
    world.finish().await
}

#[tokio::test]
async fn a_name_of_the_other_kind_says_what_to_write() -> anyhow::Result<()> {
    let world = World::new("oras-other").await?;
    push(&world, "/images/own.sif").await?;
    let plain = pod("plain", &name(&world), "Always");
    fails(&world, &plain, "write oras:// before its name").await?;
    let layers = format!("oras://{}", PodBuilder::image_name());
    let layers = pod("layers", &layers, "Always");
    fails(&world, &layers, "leave oras:// out").await?;
    // What Apptainer fetches from elsewhere.
    let library = pod("library", "library://alice/tools/one:1", "IfNotPresent");
    world.create(&library).await?;
    let rejected = world.wait_phase("library", "Failed", SOON).await?;
    let (_, message) = why(&rejected);
    ensure!(message.contains("apptainer pull"), "{message}");
    remove(&world).await?;
    world.finish().await
}

#[tokio::test]
async fn a_private_sif_runs_for_those_who_have_its_password() -> anyhow::Result<()> {
    let world = World::new("oras-private").await?;
    // Under a name of its own it is another image than that of the other tests, which everybody may use.
    let own = format!("/tmp/{}.sif", world.namespace);
    world
        .on("login", ["cp", "/images/own.sif", &own])
        .ok()
        .await?;
    push(&world, &own).await?;
    world.on("login", ["rm", &own]).ok().await?;
    let oras = format!("oras://{}", name(&world).replace("ctl:5000", "ctl:5001"));
    let nobody = pod("nobody", &oras, "IfNotPresent");
    fails(&world, &nobody, "user name and a password").await?;
    let create = [
        "create",
        "secret",
        "docker-registry",
        "login",
        "--docker-server=http://ctl:5001",
        "--docker-username=ann",
        PASSWORD,
    ];
    world.kubectl(create).ok().await?;
    let own = pod("own", &oras, "IfNotPresent");
    let own = own.spec("imagePullSecrets", json!([{"name": "login"}]));
    let (log, _) = run(&world, &own).await?;
    ensure!(log == OWN, "{log}");
    // It is in the cache, and still not for others.
    let stranger = pod("stranger", &oras, "Never");
    fails(&world, &stranger, "no credential of the pod").await?;
    remove(&world).await?;
    world.finish().await
}
