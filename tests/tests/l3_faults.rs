//! Faults on the real stack: a node that loses power, an agent and a controller that are down, a job that cannot start.
//! They affect parts that other tests share, so this suite runs alone, one test after the other.

use std::time::Duration;

use anyhow::ensure;
use k8s_openapi::api::core::v1::Pod;
use knoc_tests::{
    PodBuilder, World, wait_for,
    world::{SOON, STATE, exit_code, has_condition, why},
};

const MINUTES: Duration = Duration::from_mins(6);

/// How long nothing may happen to a pod. Its job has ended before, or cannot be submitted.
const A_WHILE: Duration = Duration::from_secs(5);

/// A pod that ends with this code when it is [told](Ending::now) to, also while no agent or no kubelet runs.
struct Ending {
    program: String,
    pod: PodBuilder,
}

impl Ending {
    fn new(name: &str, code: u8) -> Self {
        let program = format!("sleep {}", rand::random_range(100_000..1_000_000));
        let pod = PodBuilder::new(name).sh(&format!("{program}; exit {code}"));
        Self { program, pod }
    }

    /// Ends the pod's program on that node, and waits for the end of its job.
    async fn now(&self, world: &World, node: &str, uid: &str) -> anyhow::Result<()> {
        // The pattern is the whole command line: the shell's is longer.
        let pattern = format!("^{}$", self.program);
        wait_for("its program has run, and is ended", SOON, async || {
            world.on(node, ["pkill", "-f", &pattern]).ok().await
        })
        .await?;
        world.wait_no_job(uid, SOON).await
    }
}

/// Creates a pod whose job waits in the queue behind the job of the running pod `first`; returns its UID.
async fn queued_behind_first(world: &World) -> anyhow::Result<String> {
    let first = world
        .running(&PodBuilder::new("first").sh("sleep 600"))
        .await?;
    let job = world.wait_job(&first).await?;
    let second =
        PodBuilder::new("second").annotation("knoc.io/dependency", &format!("afterany:{job}"));
    let second = world.create(&second).await?;
    world.wait_job(&second).await?;
    Ok(second)
}

/// Ends `first`, so that the job of `second` starts; returns the pod `second` once it has failed.
async fn second_fails(world: &World) -> anyhow::Result<Pod> {
    world.delete("first", Some(0)).await?;
    world.wait_phase("second", "Failed", MINUTES).await
}

#[tokio::test]
async fn a_node_that_loses_power_fails_a_pod_whose_ranks_run_on_other_nodes_too()
-> anyhow::Result<()> {
    let world = World::new("power-ranks").await?;
    let ranks = PodBuilder::new("ranks")
        .annotation("knoc.io/nodes", "2")
        .annotation("knoc.io/mpi", "none")
        .sh("echo ready; sleep 600");
    let uid = world.running(&ranks).await?;
    wait_for("both ranks run", SOON, async || {
        let log = world.logs("ranks", "main").await?;
        ensure!(log.matches("ready").count() == 2, "{log}");
        Ok(())
    })
    .await?;
    let nodes = world.compute_node(&uid).await?;
    let names = world.on("login", ["scontrol", "show", "hostnames", &nodes]);
    let names = names.ok().await?.text();
    let second = names.lines().nth(1).unwrap_or_default().to_owned();
    world.power("node-down", &second).ok().await?;
    let ended = world.wait_phase("ranks", "Failed", MINUTES).await;
    let gone = world.wait_no_job(&uid, MINUTES).await;
    world.power("node-up", &second).ok().await?;
    let ended = ended?;
    // Whoever notices it first says it: Slurm, which ends the job, or the shim on the other node.
    ensure!(
        has_condition(&ended, "DisruptionTarget") && why(&ended).0 == "NodeFailed",
        "{:?}",
        ended.status
    );
    gone?;
    wait_idle(&world, &second).await?;
    world.finish().await
}

/// Waits until Slurm uses the node again.
async fn wait_idle(world: &World, node: &str) -> anyhow::Result<()> {
    wait_for("the node is idle again", SOON, async || {
        let args = ["sinfo", "-h", "-N", "-p", "main", "-n", node, "-o", "%T"];
        let state = world.on("login", args).ok().await?.text();
        ensure!(state == "idle", "{state}");
        Ok::<_, anyhow::Error>(())
    })
    .await
}

#[tokio::test]
async fn a_node_that_loses_power_fails_its_pods_as_a_disruption() -> anyhow::Result<()> {
    let world = World::new("power").await?;
    let uid = world
        .running(&PodBuilder::new("unlucky").sh("sleep 600"))
        .await?;
    let node = world.compute_node(&uid).await?;
    world.power("node-down", &node).ok().await?;
    let ended = world.wait_phase("unlucky", "Failed", MINUTES).await;
    world.power("node-up", &node).ok().await?;
    let ended = ended?;
    ensure!(
        has_condition(&ended, "DisruptionTarget"),
        "{:?}",
        ended.status
    );
    ensure!(why(&ended).0 == "NodeFailed", "{:?}", why(&ended));
    wait_idle(&world, &node).await?;
    world.finish().await
}

/// What doctor says of an agent that does not run, cause and cure, by the way of the profile.
fn unreachable() -> anyhow::Result<(&'static str, &'static str)> {
    Ok(match std::env::var("PROFILE")?.as_str() {
        "direct" | "isolated" => (
            "✗ link: port: connect to tcp:10.77.0.2:10350: Connection refused",
            "\n  → nobody listens there: start the agent (`knoc-agent serve`)",
        ),
        _ => ("✗ link: ", "start the agent"),
    })
}

#[tokio::test]
async fn an_agent_that_is_down_ends_no_pod_and_the_node_reports_it() -> anyhow::Result<()> {
    let world = World::new("agent-away").await?;
    let long = world
        .create(&PodBuilder::new("long").sh("sleep 600"))
        .await?;
    let ending = Ending::new("short", 4);
    let short = world.create(&ending.pod).await?;
    world.wait_phase("long", "Running", SOON).await?;
    world.wait_phase("short", "Running", SOON).await?;
    let node = world.compute_node(&short).await?;
    world.service("agent.sh", "kill").ok().await?;
    let away = async {
        world.wait_node_condition("AgentConnected", "False").await?;
        world.wait_node_condition("Ready", "True").await?;
        let doctor = world.knocctl(["doctor"]).output().await?;
        let (cause, cure) = unreachable()?;
        ensure!(doctor.code == 1, "{doctor}");
        ensure!(
            doctor.text().contains(cause) && doctor.text().contains(cure),
            "{}",
            doctor.text()
        );
        // Created while no agent can accept it.
        world
            .create(&PodBuilder::new("later").sh("echo late"))
            .await?;
        // Meanwhile `short` ends, and nobody reports it.
        ending.now(&world, &node, &short).await?;
        tokio::try_join!(
            world.stays_in_phase("later", "Pending", A_WHILE),
            world.stays_in_phase("short", "Running", A_WHILE),
        )?;
        anyhow::Ok(())
    };
    let away = away.await;
    world.service("agent.sh", "up").ok().await?;
    away?;
    world.wait_node_condition("AgentConnected", "True").await?;
    let ended = world.wait_phase("short", "Failed", SOON).await?;
    ensure!(exit_code(&ended, "main") == Some(4), "{:?}", ended.status);
    world.wait_phase("later", "Succeeded", SOON).await?;
    world.one_job(&long, "RUNNING").await?;
    wait_for("the shim's link is back", SOON, async || {
        world.exec(&long, "main", ["true"]).ok().await
    })
    .await?;
    world.delete("long", Some(1)).await?;
    world.wait_gone("long", SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn a_kubelet_that_was_killed_finds_its_pods_again() -> anyhow::Result<()> {
    let world = World::new("kubelet-killed").await?;
    let ending = Ending::new("short", 6);
    let uid = world.running(&ending.pod).await?;
    let node = world.compute_node(&uid).await?;
    world.service("kubelet.sh", "kill").ok().await?;
    let down = async {
        // Nobody writes the pod's status, although its job has ended.
        ending.now(&world, &node, &uid).await?;
        world.stays_in_phase("short", "Running", A_WHILE).await
    };
    let down = down.await;
    world.service("kubelet.sh", "up").ok().await?;
    down?;
    let ended = world.wait_phase("short", "Failed", SOON).await?;
    ensure!(exit_code(&ended, "main") == Some(6), "{:?}", ended.status);
    world.one_job(&uid, "").await?;
    world.finish().await
}

#[tokio::test]
async fn a_controller_that_is_down_is_reported_with_the_time_and_pods_wait() -> anyhow::Result<()> {
    let world = World::new("controller").await?;
    let uid = world
        .running(&PodBuilder::new("running").sh("until [ -e /tmp/go ]; do sleep 0.2; done"))
        .await?;
    let stop = "p=$(cat /run/slurm/slurmctld.pid); kill $p; while kill -0 $p 2>/dev/null; do sleep 0.1; done";
    world.on_as_root("ctl", ["sh", "-c", stop]).ok().await?;
    let down = async {
        world.wait_node_condition("SlurmReachable", "False").await?;
        let info = world.knocctl(["info"]).ok().await?;
        ensure!(info.text().contains("since"), "{info}");
        let pods = world.knocctl(["pods"]).ok().await?;
        ensure!(pods.text().contains("running"), "{pods}");
        world.exec(&uid, "main", ["true"]).ok().await?;
        world
            .create(&PodBuilder::new("later").sh("echo late"))
            .await?;
        anyhow::Ok(())
    };
    let down = down.await;
    let start = [
        "setpriv",
        "--reuid=slurm",
        "--regid=slurm",
        "--clear-groups",
        "slurmctld",
    ];
    world.on_as_root("ctl", start).ok().await?;
    down?;
    let touch = world.exec(&uid, "main", ["touch", "/tmp/go"]);
    touch.ok_or_killed().await?;
    world.wait_phase("running", "Succeeded", MINUTES).await?;
    world.wait_phase("later", "Succeeded", MINUTES).await?;
    world.wait_node_condition("SlurmReachable", "True").await?;
    world.one_job(&uid, "").await?;
    world.finish().await
}

#[tokio::test]
async fn a_job_whose_shim_is_missing_explains_itself() -> anyhow::Result<()> {
    let world = World::new("no-shim").await?;
    let versions = &format!("{STATE}/versions");
    let hidden = format!("{versions}.hidden");
    queued_behind_first(&world).await?;
    // The shim is hidden while the job starts.
    world.on("login", ["mv", versions, &hidden]).ok().await?;
    let ended = second_fails(&world).await;
    world.on("login", ["mv", &hidden, versions]).ok().await?;
    let (reason, message) = why(&ended?);
    ensure!(message.contains("knoc-agent"), "{reason}: {message}");
    world.finish().await
}

#[tokio::test]
async fn a_job_whose_folder_cannot_be_written_explains_itself() -> anyhow::Result<()> {
    let world = World::new("no-folder").await?;
    let second = queued_behind_first(&world).await?;
    let folder = format!("{STATE}/pods/{second}");
    world.on("login", ["chmod", "500", &folder]).ok().await?;
    let ended = second_fails(&world).await;
    world.on("login", ["chmod", "700", &folder]).ok().await?;
    let (reason, message) = why(&ended?);
    ensure!(message.contains("not writable"), "{reason}: {message}");
    world.finish().await
}
