//! Images that are converted in Slurm jobs (`convert = "job"`), by separate agents on the login node: a job that runs, one that
//! waits while its agent is killed, one whose pod is deleted, and one that Slurm refuses.

use anyhow::{Context as _, ensure};
use knoc_tests::{
    PodBuilder, World,
    second_agent::{PLAIN, SecondAgent},
    wait_for,
    world::SOON,
};

/// The partition `short` has no longer jobs than those of two minutes.
fn jobs_in(partition: &str) -> String {
    format!(
        "convert = \"job\"\nconvert_partition = \"{partition}\"\nconvert_cpus = 1\nconvert_memory = \"512MiB\"\nconvert_time = \"2m\""
    )
}

/// The jobs of this user in the partition that have not ended, as `ID NAME`.
async fn queued(world: &World, partition: &str) -> anyhow::Result<Vec<String>> {
    let command = ["squeue", "-h", "-a", "-o", "%i %j", "-p", partition];
    let rows = world.on("login", command).ok().await?.text();
    Ok(rows.lines().map(str::to_owned).collect())
}

/// Waits until there is one job in the partition, and another one than `before`.
async fn one_queued(world: &World, partition: &str, before: &str) -> anyhow::Result<String> {
    wait_for("one job that converts", SOON, async || {
        let jobs = queued(world, partition).await?;
        match jobs.as_slice() {
            [job] if job != before => Ok(job.clone()),
            _ => Err(anyhow::anyhow!("{jobs:?}, before it was {before:?}")),
        }
    })
    .await
}

/// Waits until all jobs of the partition have ended.
async fn none_queued(world: &World, partition: &str) -> anyhow::Result<()> {
    wait_for("the job is cancelled", SOON, async || {
        let jobs = queued(world, partition).await?;
        ensure!(jobs.is_empty(), "{jobs:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn an_image_is_converted_by_a_job_with_the_limits_of_the_site() -> anyhow::Result<()> {
    let world = World::new("by-job").await?;
    let agent = SecondAgent::start(&world, PLAIN, &jobs_in("short")).await?;
    let (_, log) = agent.run("converted", &PodBuilder::image_name()).await?;
    ensure!(log.contains("it runs"), "{log}");
    let folder = agent.home();
    wait_for("the accounting knows the job", SOON, async || {
        let fields = "jobname,partition,state,alloccpus,workdir%200";
        let rows = ["sacct", "-X", "-n", "-P", "-S", "now-1hours", "-o", fields];
        let rows = world.on("login", rows).ok().await?.text();
        let ours = rows.lines().filter(|row| row.contains(folder));
        let ours: Vec<&str> = ours.filter(|row| row.starts_with("knoc_image_")).collect();
        // If the controller's answer to sbatch is lost, the agent cancels what may be there and submits the job again.
        let (cancelled, others): (Vec<&str>, Vec<&str>) = ours
            .iter()
            .partition(|row| row.contains("|short|CANCELLED"));
        let [one] = others.as_slice() else {
            anyhow::bail!("{others:?}, cancelled: {cancelled:?}");
        };
        ensure!(one.contains("|short|COMPLETED|1|"), "{one}");
        Ok(())
    })
    .await?;
    agent.stop().await?;
    world.finish().await
}

/// Lets pods wait for a partition that is down, and goes through what may happen meanwhile.
async fn waits_in(world: &World, partition: &str) -> anyhow::Result<()> {
    let mut agent = SecondAgent::start(world, PLAIN, &jobs_in(partition)).await?;
    let busybox = PodBuilder::image_name();
    let uid = agent.submit("waits", &busybox).await?;
    let first = one_queued(world, partition, "").await?;
    let (_, name) = first.split_once(' ').context("no name")?;
    ensure!(name.starts_with("knoc_image_"), "{first}");
    agent
        .described(&uid, &format!("the Slurm job {name}"))
        .await?;
    // The next agent cancels the job of a pull that was left, and converts the image again.
    agent.kill_and_start().await?;
    let second = one_queued(world, partition, &first).await?;
    // Another pod with the same image waits for the same job, and its deletion cancels nothing.
    let also = agent.submit("also", &busybox).await?;
    agent.described(&also, "Pulling").await?;
    agent.knocctl(&format!("delete {also}")).ok().await?;
    ensure!(queued(world, partition).await? == [second]);
    // With the last pod that waits for it, the job goes.
    agent.knocctl(&format!("delete {uid}")).ok().await?;
    none_queued(world, partition).await?;
    // An administrator cancels it. Slurm says that its exit code is 0.
    let cancelled = agent.submit("cancelled", &busybox).await?;
    let job = one_queued(world, partition, "").await?;
    let (id, _) = job.split_once(' ').context("no id")?;
    world.on_as_root("ctl", ["scancel", id]).ok().await?;
    agent
        .described(&cancelled, "it may have been cancelled")
        .await?;
    agent.knocctl(&format!("delete {cancelled}")).ok().await?;
    none_queued(world, partition).await?;
    let last = agent.submit("last", &busybox).await?;
    one_queued(world, partition, "").await?;
    let up = format!("scontrol update PartitionName={partition} State=UP");
    world.on_as_root("ctl", ["sh", "-c", &up]).ok().await?;
    let log = agent.ended(&last).await?;
    ensure!(log.contains("it runs"), "{log}");
    agent.stop().await
}

#[tokio::test]
async fn a_job_that_waits_is_cancelled_with_its_agent_or_its_last_pod() -> anyhow::Result<()> {
    let world = World::new("waiting-job").await?;
    let partition = world.namespace.clone();
    let create =
        format!("scontrol create PartitionName={partition} Nodes=c1 State=DOWN MaxTime=10");
    world.on_as_root("ctl", ["sh", "-c", &create]).ok().await?;
    let outcome = waits_in(&world, &partition).await;
    let delete = format!("scontrol delete PartitionName={partition}");
    let deleted = wait_for(&delete, SOON, async || {
        world.on_as_root("ctl", ["sh", "-c", &delete]).ok().await
    });
    let deleted = deleted.await;
    outcome?;
    deleted?;
    world.finish().await
}

#[tokio::test]
async fn a_job_that_slurm_refuses_is_named_by_the_pod() -> anyhow::Result<()> {
    let world = World::new("refused-job").await?;
    let agent = SecondAgent::start(&world, PLAIN, &jobs_in("nowhere")).await?;
    let uid = agent.submit("refused", &PodBuilder::image_name()).await?;
    agent.described(&uid,
        "the Slurm job that is to convert the image: sbatch: error: invalid partition specified: nowhere",
    )
    .await?;
    agent.knocctl(&format!("delete {uid}")).ok().await?;
    agent.stop().await?;
    world.finish().await
}
