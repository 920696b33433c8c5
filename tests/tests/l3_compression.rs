//! Compute nodes whose runtime cannot mount what the login node compresses with zstd: pods run all the same, an Event says why they
//! start slowly, and the agent goes back to gzip. The pods run under a separate agent on the login node, whose `apptainer` is a
//! script that mounts no image. They are controlled by `knocctl` there.

use anyhow::ensure;
use knoc_tests::{PodBuilder, World, second_agent::SecondAgent, wait_for, world::SOON};

/// Starts a container only from unpacked files, as if its squashfuse could not read zstd.
const MOUNTS_NOTHING: &str = r#"#!/bin/sh
case " $* " in
*" exec "*" --unsquash "*) ;;
*" exec "*)
    echo 'FATAL:   container creation failed: image driver squashfuse_ll instance exited with error: squashfuse_ll exited: Squashfs image uses zstd compression, this version supports only zlib.' >&2
    exit 255
    ;;
esac
exec @APPTAINER@ "$@"
"#;

/// The compressions of all cached images: the number in the superblock of each squashfs, in order.
async fn compressions(world: &World, agent: &SecondAgent<'_>) -> anyhow::Result<Vec<String>> {
    let script = format!(
        "for sif in {}/.local/state/knoc/images/*.sif; do \
         start=$(apptainer sif list $sif | awk -F'|' '/Squashfs/ {{ split($4, a, \"-\"); print a[1] + 0 }}') && \
         od -An -tu2 -j $((start + 20)) -N 2 $sif || exit 1; done",
        agent.home()
    );
    let read = world.on("login", ["sh", "-c", &script]).ok().await?;
    let text = read.text();
    let mut all: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
    all.sort();
    Ok(all)
}

#[tokio::test]
async fn a_node_that_cannot_mount_an_image_unpacks_it_and_the_next_one_is_gzip()
-> anyhow::Result<()> {
    let world = World::new("unmounted").await?;
    let agent = SecondAgent::start(&world, MOUNTS_NOTHING, "").await?;
    let busybox = PodBuilder::image_name();
    let (uid, log) = agent.run("unpacks", &busybox).await?;
    ensure!(log.contains("it runs"), "{log}");
    ensure!(compressions(&world, &agent).await? == ["6"], "zstd is 6");
    let described = agent.knocctl(&format!("describe {uid}")).ok().await?.text();
    ensure!(
        described.contains("ImageUnpacked") && described.contains("zstd"),
        "{described}"
    );
    // It names the node, and so its exit code is that of an error.
    let doctor = agent.knocctl("doctor").output().await?.text();
    ensure!(
        doctor.contains("images: compression") && doctor.contains("could not mount an image"),
        "{doctor}"
    );
    // The next image is one that this runtime would have mounted, if it mounted any: the script refuses it too, and the
    // shim does not unpack what is compressed with gzip.
    let own = busybox.replace("busybox:latest", "own:1");
    let (uid, _) = agent.run("mounts", &own).await?;
    let found = compressions(&world, &agent).await?;
    ensure!(found == ["1", "6"], "{found:?}");
    let described = agent.knocctl(&format!("describe {uid}")).ok().await?.text();
    ensure!(!described.contains("ImageUnpacked"), "{described}");
    // Nothing that was unpacked is left on the nodes.
    let left = "ls -d /tmp/*/*/rootfs-* /tmp/rootfs-* 2>/dev/null";
    for node in ["c1", "c2", "c3"] {
        wait_for(&format!("nothing is left on {node}"), SOON, async || {
            let found = world.on(node, ["sh", "-c", left]).output().await?;
            ensure!(found.stdout.is_empty(), "{found:?}");
            Ok(())
        })
        .await?;
    }
    agent.stop().await?;
    world.finish().await
}
