//! Level 3: agent and kubelet die on the real stack, at each boundary of an effect and at random
//! moments under load. The tests run alone, one after the other, because all tests share the processes that they kill.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use futures::future::{try_join, try_join_all};
use knoc_tests::{
    PodBuilder, World, wait_for,
    world::{STATE, why},
};

/// The time from a restart to the correct state.
const RIGHT: Duration = Duration::from_mins(4);

/// The number of kills under load: fifty. A kubelet takes longer to start, so there are fewer kills in the same time.
const AGENT_KILLS: usize = 30;
const KUBELET_KILLS: usize = 20;

/// The number of pods at the beginning of the load; each kill of the agent adds another one.
const LOAD: usize = 20;

/// The agent's site file.
const SITE: &str = "/home/hpcuser/.config/knoc/agent.toml";

/// The file in which jobs of the partition `short` find the point at which their shim dies.
const ARMED: &str = "/home/hpcuser/knoc-crash-at";

/// The exit code of a job that lost its claim.
const SURPLUS: &str = "|66:";

/// Starts the service with that crash point armed, or normally if there is none.
async fn start(world: &World, script: &str, point: &str) -> anyhow::Result<()> {
    let run = world.service(script, "up");
    if point.is_empty() {
        run.ok().await?;
    } else {
        // It may die before the script sees that it is ready.
        run.env("KNOC_CRASH_AT", point).output().await?;
    }
    Ok(())
}

/// Creates a namespace and starts both services, whatever an earlier test left.
async fn whole(test: &str) -> anyhow::Result<World> {
    let world = World::new(test).await?;
    for script in ["agent.sh", "kubelet.sh"] {
        start(&world, script, "").await?;
    }
    Ok(world)
}

async fn dead(world: &World, script: &str, point: &str) -> anyhow::Result<()> {
    wait_for(&format!("{script} dies at {point}"), RIGHT, async || {
        let running = world.service(script, "running").output().await;
        let running = running.map_err(|error| format!("{error:#}"))?;
        if running.code == 0 {
            Err("it runs".to_owned())
        } else {
            Ok(())
        }
    })
    .await
}

/// Waits until, by Slurm's accounting, exactly one job of the pod ran its containers, not counting jobs that lost the claim.
/// The accounting learns of the end of a job a moment after the agent.
async fn ran_once(world: &World, uid: &str, point: &str) -> anyhow::Result<()> {
    wait_for(&format!("{point}: one job ran"), RIGHT, async || {
        let jobs = world.jobs(uid).await?;
        let ran = jobs.iter().filter(|job| !job.contains(SURPLUS)).count();
        ensure!(ran == 1, "{jobs:?}");
        Ok(())
    })
    .await
}

async fn dies_at(script: &str, point: &str) -> anyhow::Result<()> {
    let world = whole("crash").await?;
    let deleting = point.contains("delete");
    // The API server itself removes a pod that has ended; the kubelet deletes only pods that were still running.
    let script_of_pod = if deleting {
        "trap 'exit 0' TERM; while :; do sleep 0.1; done"
    } else {
        "echo once; sleep 1; echo end"
    };
    let pod = PodBuilder::new("crash").sh(script_of_pod);
    world.service(script, "kill").ok().await?;
    start(&world, script, if deleting { "" } else { point }).await?;
    let uid = world.create(&pod).await?;
    if deleting {
        world.wait_phase("crash", "Running", RIGHT).await?;
        world.service(script, "kill").ok().await?;
        start(&world, script, point).await?;
        world.delete("crash", None).await?;
    }
    dead(&world, script, point).await?;
    start(&world, script, "").await?;
    if !deleting {
        world.wait_phase("crash", "Succeeded", RIGHT).await?;
        let log = world.logs("crash", "main").await?;
        ensure!(log == "once\nend\n", "{point}: {log:?}");
        world.delete("crash", None).await?;
    }
    world.wait_gone("crash", RIGHT).await?;
    world.wait_no_job(&uid, RIGHT).await?;
    ran_once(&world, &uid, point).await?;
    world.finish().await
}

#[tokio::test]
async fn the_kubelet_dies_at_each_boundary() -> anyhow::Result<()> {
    for effect in ["ensure", "patch", "delete"] {
        for side in ["before", "after"] {
            let point = format!("kubelet.{effect}.{side}");
            dies_at("kubelet.sh", &point).await.context(point)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_agent_dies_at_each_boundary() -> anyhow::Result<()> {
    for effect in ["record", "sbatch", "report"] {
        for side in ["before", "after"] {
            let point = format!("agent.{effect}.{side}");
            dies_at("agent.sh", &point).await.context(point)?;
        }
    }
    Ok(())
}

/// Sets the site's prelude and restarts the agent; returns the previous site file.
async fn set_prelude(world: &World, prelude: &str) -> anyhow::Result<Vec<u8>> {
    let before = world.on("login", ["cat", SITE]).ok().await?.stdout;
    let text = String::from_utf8(before.clone())?;
    let line = text.lines().find(|line| line.starts_with("prelude = "));
    let line = line.context("no prelude in the site file")?;
    let text = text.replacen(line, &format!("prelude = '{prelude}'"), 1);
    set_site(world, text.into_bytes()).await?;
    Ok(before)
}

async fn set_site(world: &World, text: Vec<u8>) -> anyhow::Result<()> {
    let write = format!("cat >{SITE}");
    let write = world.on("login", ["sh", "-c", &write]);
    write.stdin(text).ok().await?;
    world.service("agent.sh", "down").ok().await?;
    start(world, "agent.sh", "").await
}

/// Waits until no process on any node has this text in its command line.
async fn nothing_left(world: &World, text: &str) -> anyhow::Result<()> {
    for node in ["c1", "c2", "c3"] {
        wait_for(
            &format!("nothing of {text:?} on {node}"),
            RIGHT,
            async || {
                let found = world.on(node, ["pgrep", "-af", text]).output().await?;
                ensure!(found.code == 1, "{found}");
                Ok(())
            },
        )
        .await?;
    }
    Ok(())
}

/// The shim dies at the point: the pod fails with a reason, its containers do not outlive it, and nothing replaces it.
async fn shim_dies_at(point: &str) -> anyhow::Result<()> {
    let world = World::new("shim").await?;
    let arm = format!("echo {point} >{ARMED}");
    world.on("login", ["sh", "-c", &arm]).ok().await?;
    let program = format!("sleep {}", rand::random_range(100_000..1_000_000));
    let pod = PodBuilder::new("shim")
        .annotation("knoc.io/partition", "short")
        .sh(&format!("echo ran; exec {program}"));
    let uid = world.create(&pod).await?;
    let ended = world.wait_phase("shim", "Failed", RIGHT).await?;
    let (reason, message) = why(&ended);
    ensure!(
        reason == "ContainerStatusUnknown" && message.contains("FAILED, exit code 0, signal 6"),
        "{reason}: {message}"
    );
    nothing_left(&world, &program).await?;
    // The files that the job left: the shim's last messages, its claims, and how often the program ran.
    let look = format!(
        "cd {STATE}/pods/{uid}; cat batch.out; ls claim.* | wc -l; cat logs/main/* | grep -c ran"
    );
    let found = world.on("login", ["sh", "-c", &look]).output().await?;
    let text = found.text();
    let message = format!("{point}: aborting here");
    ensure!(text.contains(&message), "{found}");
    let lines: Vec<&str> = text.lines().rev().take(2).collect();
    let [ran, claims] = lines.as_slice() else {
        bail!("{found}");
    };
    let (claimed, may_run) = match point {
        "shim.claim.before" => ("0", false),
        "shim.claim.after" => ("1", false),
        _ => ("1", true),
    };
    ensure!(*claims == claimed, "{claims} claims: {found}");
    ensure!(
        *ran == "0" || (may_run && *ran == "1"),
        "it ran {ran} times: {found}"
    );
    world.delete("shim", None).await?;
    world.wait_gone("shim", RIGHT).await?;
    world.one_job(&uid, "").await?;
    world.finish().await
}

#[tokio::test]
async fn the_shim_dies_at_each_boundary() -> anyhow::Result<()> {
    let world = whole("prelude").await?;
    let prelude = format!(
        "[ ! -r {ARMED} ] || [ $SLURM_JOB_PARTITION != short ] || export KNOC_CRASH_AT=$(cat {ARMED})"
    );
    let before = set_prelude(&world, &prelude).await?;
    let deaths = async {
        for effect in ["claim", "report"] {
            for side in ["before", "after"] {
                let point = format!("shim.{effect}.{side}");
                shim_dies_at(&point).await.context(point)?;
            }
        }
        anyhow::Ok(())
    };
    let deaths = deaths.await;
    world.on("login", ["rm", ARMED]).ok().await?;
    // No process dies unless a crash point is armed.
    let well = PodBuilder::new("well").annotation("knoc.io/partition", "short");
    let well = world.run(&well, "Succeeded").await.map(drop);
    set_site(&world, before).await?;
    deaths.and(well)?;
    world.finish().await
}

#[tokio::test]
async fn a_job_that_is_requeued_while_the_agent_is_away_finds_its_claim_taken() -> anyhow::Result<()>
{
    let world = whole("requeue").await?;
    let pod = PodBuilder::new("once").sh("echo ran; exec sleep 600");
    let uid = world.running(&pod).await?;
    world.wait_log("once", "main", "ran\n").await?;
    let job = world.wait_job(&uid).await?;
    world.service("agent.sh", "kill").ok().await?;
    let second = async {
        world.requeue(&job).await?;
        wait_for("the job has stood back", RIGHT, async || {
            let lives = world.jobs(&uid).await?;
            let stood = lives.len() == 2 && lives.iter().any(|life| life.contains(SURPLUS));
            ensure!(stood, "{lives:?}");
            Ok(())
        })
        .await
    };
    let second = second.await;
    start(&world, "agent.sh", "").await?;
    second?;
    let ended = world.wait_phase("once", "Failed", RIGHT).await?;
    let (reason, message) = why(&ended);
    ensure!(reason == "SlurmJobRequeued", "{reason}: {message}");
    let log = world.logs("once", "main").await?;
    ensure!(log == "ran\n", "{log:?}");
    world.delete("once", None).await?;
    world.wait_gone("once", RIGHT).await?;
    world.finish().await
}

/// Kills the service that many times, each time at a random moment after its start.
async fn die_often(
    world: &World,
    script: &str,
    kills: usize,
    mut before: impl AsyncFnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for kill in 0..kills {
        before(kill).await?;
        let moment = Duration::from_millis(rand::random_range(0..1500));
        tokio::time::sleep(moment).await;
        world.service(script, "kill").ok().await?;
        start(world, script, "")
            .await
            .with_context(|| format!("{script}, kill {kill}"))?;
    }
    Ok(())
}

fn load(at: usize) -> PodBuilder {
    PodBuilder::new(&format!("load-{at}")).sh(&format!("echo ran; sleep {}", at % 7))
}

#[tokio::test]
async fn agent_and_kubelet_die_at_random_moments_under_load() -> anyhow::Result<()> {
    let world = whole("random").await?;
    let mut pods: Vec<PodBuilder> = (0..LOAD).map(load).collect();
    let mut uids = try_join_all(pods.iter().map(|pod| world.create(pod))).await?;
    // Each is killed at its own moments, so sometimes both are down.
    let kubelet = die_often(&world, "kubelet.sh", KUBELET_KILLS, async |_| Ok(()));
    let agent = die_often(&world, "agent.sh", AGENT_KILLS, async |kill| {
        let pod = load(LOAD + kill);
        uids.push(world.create(&pod).await?);
        pods.push(pod);
        Ok(())
    });
    try_join(agent, kubelet).await?;
    for (pod, uid) in pods.iter().zip(&uids) {
        world.wait_phase(pod.name(), "Succeeded", RIGHT).await?;
        ran_once(&world, uid, pod.name()).await?;
        let log = world.logs(pod.name(), "main").await?;
        ensure!(log == "ran\n", "{}: {log:?}", pod.name());
        world.delete(pod.name(), None).await?;
    }
    for (pod, uid) in pods.iter().zip(&uids) {
        world.wait_gone(pod.name(), RIGHT).await?;
        world.wait_no_job(uid, RIGHT).await?;
    }
    world.finish().await
}
