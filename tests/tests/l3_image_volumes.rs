//! Image volumes and the stop signal of an image on the real stack.

use anyhow::{Context as _, ensure};
use knoc_tests::{
    PodBuilder, World,
    repository::{PULLED, Repository, image},
    world::{SOON, container_reason, why},
};
use serde_json::{Value, json};

#[tokio::test]
async fn an_image_is_a_volume_that_no_container_can_write() -> anyhow::Result<()> {
    let world = World::new("images-volume").await?;
    let pod = |name: &str| {
        PodBuilder::new(name).spec(
            "volumes",
            json!([{"name": "models", "image": {"reference": image("own:1"), "pullPolicy": "IfNotPresent"}}]),
        )
    };
    // The runtime has one process for each image that it mounts.
    let reads = pod("reads")
        .memory("256Mi")
        .set(
            "volumeMounts",
            json!([{"name": "models", "mountPath": "/models"}]),
        )
        .sh("head -c 2 /models/bin/show; touch /models/x 2>/dev/null || echo ' read-only'");
    // The image may have to be pulled first.
    world.create(&reads).await?;
    world.wait_phase("reads", "Succeeded", PULLED).await?;
    let log = world.logs("reads", "main").await?;
    ensure!(log == "#! read-only\n", "{log:?}");
    world.finish().await
}

/// Adds a tree with links to the image that the repository has: each leads out of the tree, or out of the image if its root were
/// not the image's.
async fn push_with_links(repository: &Repository<'_>) -> anyhow::Result<String> {
    let folder = repository.push_one_of_its_own().await?;
    let make = format!(
        "cd {folder} && mkdir -p tree/deep/real && echo real > tree/deep/real/file && echo marker > marker && \
         ln -s /tree/deep/real tree/absolute && ln -s ../tree/deep tree/within && ln -s /etc tree/out && \
         ln -s ../../../../../../../../etc tree/up && umoci insert --image oci:1 tree /tree && \
         umoci insert --image oci:1 marker /etc/marker"
    );
    let world = repository.world;
    world.on("login", ["sh", "-c", &make]).ok().await?;
    repository.push(&format!("oci:{folder}/oci:1")).await?;
    Ok(folder)
}

/// A mount of that directory of the volume `models`.
fn part(path: &str, sub_path: &str) -> Value {
    json!({"name": "models", "mountPath": path, "subPath": sub_path})
}

#[tokio::test]
async fn a_folder_of_an_image_is_a_volume_and_no_link_leads_out_of_it() -> anyhow::Result<()> {
    let world = World::new("images-folder").await?;
    let repository = Repository::new(&world);
    let folder = push_with_links(&repository).await?;
    let volumes = json!([
        {"name": "models", "image": {"reference": repository.image()}},
        {"name": "empty", "emptyDir": {}},
    ]);
    let pod = |name: &str| PodBuilder::new(name).spec("volumes", volumes.clone());
    let mounts = json!([
        part("/a", "tree/deep/real"),
        part("/srv/b", "tree/absolute"),
        part("/dev/c", "tree/within/real"),
        part("/d", "tree/out"),
        part("/e", "tree/up"),
        {"name": "models", "mountPath": "/f", "subPathExpr": "tree/$(PART)/real"},
        {"name": "models", "mountPath": "/g"},
    ]);
    // The runtime has one process for each image that it mounts.
    let reads = pod("reads")
        .memory("256Mi")
        .set("env", json!([{"name": "PART", "value": "deep"}]))
        .set("volumeMounts", mounts)
        .sh(
            "cat /a/file /srv/b/file /dev/c/file /d/marker /e/marker /f/file /g/etc/marker; ls /a; \
             touch /a/x 2>/dev/null || echo read-only",
        );
    world.create(&reads).await?;
    world.wait_phase("reads", "Succeeded", PULLED).await?;
    let log = world.logs("reads", "main").await?;
    let wanted = "real\nreal\nreal\nmarker\nmarker\nreal\nmarker\nfile\nread-only\n";
    ensure!(log == wanted, "{log:?}");
    for (name, sub_path, expected) in [
        (
            "none",
            "tree/none",
            "path \"tree/none\": the image has no such directory",
        ),
        ("file", "tree/deep/real/file", "it is not a directory"),
    ] {
        let one = pod(name).set("volumeMounts", json!([part("/a", sub_path)]));
        let failed = world.run(&one.sh("true"), "Failed").await?;
        let (reason, message) = container_reason(&failed, "main").context("no reason")?;
        let as_expected = reason == "CreateContainerError" && message.contains(expected);
        ensure!(as_expected, "{name}: {reason}: {message}");
    }
    let below = json!([part("/a", "tree"), {"name": "empty", "mountPath": "/a/deep"}]);
    let below = pod("below").set("volumeMounts", below).sh("true");
    let (_, message) = why(&world.run(&below, "Failed").await?);
    ensure!(
        message.contains("in a subPath of an image volume"),
        "{message}"
    );
    world.on("login", ["rm", "-r", &folder]).ok().await?;
    repository.remove().await?;
    world.finish().await
}

/// An image of systemd names this signal. The API server has a switch for that of a pod, and images need none.
#[tokio::test]
async fn a_program_gets_the_real_time_signal_that_its_image_names() -> anyhow::Result<()> {
    let world = World::new("images-signal").await?;
    let repository = Repository::new(&world);
    let folder = repository.push_one_of_its_own().await?;
    let name = format!("umoci config --image {folder}/oci:1 --config.stopsignal SIGRTMIN+3");
    world.on("login", ["sh", "-c", &name]).ok().await?;
    repository.push(&format!("oci:{folder}/oci:1")).await?;
    let pod = PodBuilder::new("stops")
        .image(&repository.image())
        .spec("terminationGracePeriodSeconds", json!(600))
        .sh("trap 'exit 0' 37; trap '' TERM; echo ready; while :; do sleep 0.1; done");
    world.create(&pod).await?;
    world.wait_phase("stops", "Running", PULLED).await?;
    world.wait_log("stops", "main", "ready").await?;
    world.delete("stops", None).await?;
    world.wait_gone("stops", SOON).await?;
    world.on("login", ["rm", "-r", &folder]).ok().await?;
    repository.remove().await?;
    world.finish().await
}
