//! What a compute node lacks, on the real stack: pasta, room for what containers write, and room for their logs. The node is the only one of
//! a partition, and others use it too, so this suite runs alone, one test after the other.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use knoc_tests::{
    PodBuilder, World, wait_for,
    world::{SOON, STATE, exit_code},
};

/// The partition with one node.
const PARTITION: &str = "gpu";

const FULL: &str = "No space left on device";

/// The time for a job to start and end on a busy machine, after those that are ending.
const RUN: Duration = Duration::from_mins(4);

/// The node of the partition.
async fn node(world: &World) -> anyhow::Result<String> {
    let args = ["sinfo", "-h", "-N", "-p", PARTITION, "-o", "%N"];
    let names = world.on("login", args).ok().await?.text();
    let mut names = names.lines();
    let name = names.next().context("the partition has no node")?;
    ensure!(names.next().is_none(), "it has several");
    Ok(name.to_owned())
}

/// A pod on that node.
fn pod(name: &str) -> PodBuilder {
    PodBuilder::new(name).annotation("knoc.io/partition", PARTITION)
}

/// Mounts something on the node. The arguments are those of mount(8).
async fn mount(world: &World, node: &str, arguments: &str) -> anyhow::Result<()> {
    let mount = format!("mount {arguments}");
    world.on_as_root(node, ["sh", "-c", &mount]).ok().await?;
    Ok(())
}

/// Takes the mount away, once nothing uses it. If something goes on using it, later tests see it no more all the same.
async fn unmount(world: &World, node: &str, path: &str) -> anyhow::Result<()> {
    let what = format!("{path} is unmounted");
    let gone = wait_for(&what, SOON, async || {
        world.on_as_root(node, ["umount", path]).ok().await
    });
    let gone = gone.await;
    if gone.is_err() {
        let lazily = ["umount", "-l", path];
        world.on_as_root(node, lazily).output().await?;
    }
    gone.map(drop)
}

/// Waits for the pod's Event of this reason, and returns its message.
async fn told(world: &World, name: &str, reason: &str) -> anyhow::Result<String> {
    let reason = format!("{reason}: ");
    wait_for(&format!("{name}: {reason}"), SOON, async || {
        let events = world.events(name).await?;
        let mut messages = events
            .iter()
            .filter_map(|event| event.strip_prefix(&reason));
        let message = messages.next().map(str::to_owned);
        message.with_context(|| format!("{events:?}"))
    })
    .await
}

/// The address that the pod's host name has in the pod.
async fn own_address(world: &World, uid: &str) -> anyhow::Result<String> {
    let run = world.exec(uid, "main", ["hostname", "-i"]);
    Ok(run.ok().await?.text())
}

async fn without_pasta(world: &World) -> anyhow::Result<()> {
    let alone = pod("alone").annotation("knoc.io/network", "private");
    let alone = world.running(&alone.sh("sleep 600")).await?;
    let message = told(world, "alone", "NetworkUnavailable").await?;
    for part in [
        "pasta (package passt) is not installed on the compute node",
        "knoc.io/network: host",
    ] {
        ensure!(message.contains(part), "{message}");
    }
    // Its own network is there nevertheless.
    let address = own_address(world, &alone).await?;
    ensure!(address == "192.0.0.2", "{address}");
    // A pod that did not ask for one of its own is in the node's.
    let any = world.running(&pod("any").sh("sleep 600")).await?;
    let address = own_address(world, &any).await?;
    ensure!(address != "192.0.0.2", "{address}");
    let doctor = knoc_tests::doctor::examine(world.knocctl(["doctor"])).await?;
    let pods = doctor.iter().find(|one| one.check == "network: pods");
    let pods = pods.context("no finding about networks")?;
    ensure!(pods.detail.contains("pasta"), "{pods:#?}");
    for name in ["alone", "any"] {
        world.delete(name, Some(0)).await?;
        world.wait_gone(name, SOON).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_node_without_pasta_is_named_by_an_event_and_by_doctor() -> anyhow::Result<()> {
    const PASTA: &str = "/usr/bin/pasta";
    let world = World::new("no-pasta").await?;
    let node = node(&world).await?;
    mount(&world, &node, &format!("--bind /dev/null {PASTA}")).await?;
    let seen = without_pasta(&world).await;
    let gone = unmount(&world, &node, PASTA).await;
    seen?;
    gone?;
    world.finish().await
}

#[tokio::test]
async fn a_program_that_fills_the_disk_of_the_node_is_told_so_and_goes_on() -> anyhow::Result<()> {
    let world = World::new("full-node").await?;
    let node = node(&world).await?;
    mount(&world, &node, "-t tmpfs -o mode=1777,size=16m none /tmp").await?;
    let script = format!(
        "dd if=/dev/zero of=/data/fill bs=64k count=1024 2>&1 | grep -o '{FULL}'; rm /data/fill; \
         echo more >/data/more; cat /data/more"
    );
    let seen = async {
        let uid = world
            .create(&pod("filler").sh(&script).empty_dir("/data"))
            .await?;
        world.wait_phase("filler", "Succeeded", RUN).await?;
        world.wait_no_job(&uid, SOON).await?;
        world.logs("filler", "main").await
    };
    let seen = seen.await;
    let gone = unmount(&world, &node, "/tmp").await;
    let log = seen?;
    gone?;
    ensure!(log == format!("{FULL}\nmore\n"), "{log}");
    world.finish().await
}

/// Creates a pod that writes a mebibyte of lines and then ends with the code 7; it waits in the queue until the pod `first` is deleted.
async fn chatty_behind_first(world: &World) -> anyhow::Result<String> {
    let first = PodBuilder::new("first").sh("sleep 600");
    let first = world.running(&first).await?;
    let job = world.wait_job(&first).await?;
    let write = "dd if=/dev/zero bs=1k count=1024 2>/dev/null | tr '\\0' x | fold -w 100; exit 7";
    let chatty = pod("chatty").annotation("knoc.io/dependency", &format!("afterany:{job}"));
    let chatty = world.create(&chatty.sh(write)).await?;
    world.wait_job(&chatty).await?;
    Ok(chatty)
}

#[tokio::test]
async fn a_log_that_has_no_room_holds_up_no_program_and_its_end_is_reported() -> anyhow::Result<()>
{
    let world = World::new("full-log").await?;
    let node = node(&world).await?;
    let uid = chatty_behind_first(&world).await?;
    // A file system of its own on this node only; as root, because it is to be the user's.
    let logs = format!("{STATE}/pods/{uid}/logs");
    let owner = "uid=$(id -u hpcuser),gid=$(id -g hpcuser),mode=700";
    let small = format!("-t tmpfs -o size=64k,{owner} none {logs}");
    mount(&world, &node, &small).await?;
    let seen = async {
        world.delete("first", Some(0)).await?;
        let ended = world.wait_phase("chatty", "Failed", RUN).await?;
        ensure!(exit_code(&ended, "main") == Some(7), "{:?}", ended.status);
        world.wait_no_job(&uid, SOON).await?;
        told(&world, "chatty", "LogLinesLost").await
    };
    let seen = seen.await;
    let gone = unmount(&world, &node, &logs).await;
    let message = seen?;
    gone?;
    ensure!(
        message.contains("log lines could not be written") && message.contains(FULL),
        "{message}"
    );
    world.finish().await
}
