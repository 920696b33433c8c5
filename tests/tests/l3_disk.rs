//! A state directory whose file system is full, as with a quota that is used up: the agent says so, and no pod is lost. The agent is a separate
//! one on the login node, and so is its file system, a small one in memory; it runs its jobs there itself, under the real Apptainer, because
//! compute nodes do not see that file system.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use knoc_tests::{
    World,
    second_agent::{PLAIN, SecondAgent},
    wait_for,
};
use serde_json::Value;

/// The agent keeps its own program there, of 10 MB, and little else.
const SIZE: &str = "64m";

/// Jobs run where the agent runs, with images of the bed.
const EDITS: &str =
    "s|^scheduler = .*|scheduler = \"local\"|\ns|^image_roots = .*|image_roots = [\"/images\"]|";

/// How long the agent may wait between two tries to write what it could not write, and then a pod.
const SAVED: Duration = Duration::from_mins(2);

const FULL: &str = "No space left on device";

/// Runs a script on the login node as root.
async fn as_root(world: &World, script: &str) -> anyhow::Result<()> {
    world
        .on_as_root("login", ["sh", "-ec", script])
        .ok()
        .await?;
    Ok(())
}

/// Submits a pod that runs this script; returns its uid, or what `knocctl` said.
async fn submit(
    agent: &SecondAgent<'_>,
    uid: &str,
    script: &str,
) -> anyhow::Result<Result<(), String>> {
    let manifest = format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {uid}}}, spec: {{restartPolicy: Never, containers: [{{name: main, \
         image: /images/busybox.sif, command: [sh, -c, '{script}'], resources: {{requests: {{memory: 64Mi}}}}}}]}}}}"
    );
    let run = agent.knocctl(&format!("run -f - --uid {uid}"));
    let ran = run.stdin(manifest).output().await?;
    Ok(if ran.code == 0 {
        Ok(())
    } else {
        Err(ran.stderr)
    })
}

/// Waits until the agent says that the pod is in that phase.
async fn phase(agent: &SecondAgent<'_>, uid: &str, phase: &str) -> anyhow::Result<()> {
    wait_for(&format!("{uid} is {phase}"), SAVED, async || {
        let shown = agent.knocctl("pods -o json").ok().await?;
        let pods: Value = serde_json::from_slice(&shown.stdout)?;
        let mut pods = pods.as_array().context("no list")?.iter();
        let found = pods.any(|pod| pod["uid"] == *uid && pod["phase"] == *phase);
        ensure!(found, "{shown}");
        Ok(())
    })
    .await
}

/// Fills the file system to the last byte.
async fn fill(world: &World, state: &str) -> anyhow::Result<()> {
    let fill = format!("dd if=/dev/zero of={state}/fill bs=64k 2>&1 | grep -q '{FULL}'");
    world.on("login", ["sh", "-c", &fill]).ok().await?;
    Ok(())
}

async fn is_full(world: &World, agent: &SecondAgent<'_>, state: &str) -> anyhow::Result<()> {
    let [before, later, last] =
        ["before", "later", "last"].map(|name| format!("{}-{name}", world.namespace));
    // It ends by itself if this fails.
    let script = "n=0; until [ -e /tmp/go ] || [ $n = 3000 ]; do n=$((n+1)); sleep 0.1; done";
    let accepted = submit(agent, &before, script).await?;
    ensure!(accepted == Ok(()), "{accepted:?}");
    wait_for("its container runs", SAVED, async || {
        let run = agent.knocctl(&format!("exec {before} -c main -- true"));
        run.ok().await
    })
    .await?;
    fill(world, state).await?;
    let rejected = submit(agent, &later, "true").await?;
    ensure!(
        rejected.as_ref().is_err_and(|said| said.contains(FULL)),
        "{rejected:?}"
    );
    // What runs goes on, and its end is seen.
    phase(agent, &before, "Running").await?;
    let go = agent.knocctl(&format!("exec {before} -c main -- touch /tmp/go"));
    go.ok_or_killed().await?;
    phase(agent, &before, "Finished").await?;
    let empty = format!("rm {state}/fill");
    world.on("login", ["sh", "-c", &empty]).ok().await?;
    let accepted = submit(agent, &last, "true").await?;
    ensure!(accepted == Ok(()), "{accepted:?}");
    for uid in [&before, &last] {
        phase(agent, uid, "Finished").await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_agent_whose_state_directory_is_full_says_so_and_loses_no_pod() -> anyhow::Result<()> {
    let world = World::new("disk").await?;
    let state = format!("/home/hpcuser/{}/.local/state/knoc", world.namespace);
    let make = ["mkdir", "-p", &state];
    world.on("login", make).ok().await?;
    let owner = "uid=$(id -u hpcuser),gid=$(id -g hpcuser),mode=700";
    let mount = format!("mount -t tmpfs -o size={SIZE},{owner} none {state}");
    as_root(&world, &mount).await?;
    let seen = async {
        let agent = SecondAgent::start_edited(&world, PLAIN, "", EDITS).await?;
        let seen = is_full(&world, &agent, &state).await;
        anyhow::Ok((agent, seen))
    };
    let seen = seen.await;
    // The agent still works there.
    as_root(&world, &format!("umount -l {state}")).await?;
    let (agent, seen) = seen?;
    let stopped = agent.stop().await;
    seen?;
    stopped?;
    world.finish().await
}
