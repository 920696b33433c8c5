//! Level 2: the resource use of pods, measured by the real shim and queried from the real agent.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use knoc_proto::pb::{self, agent_client::AgentClient};
use knoc_tests::{
    site::{Options, Pod, Site, container},
    wait_for,
};
use tonic::transport::Channel;

const SOON: Duration = Duration::from_mins(5);
const SECOND: u64 = 1_000_000_000;
const MIB: u64 = 1 << 20;

/// Holds this much memory and copies it from /dev/zero to /dev/null forever.
const BUSY: &str = "exec dd if=/dev/zero of=/dev/null bs=64M count=1000000 2>/dev/null";
/// A program whose work is done by child processes that end.
const FORKS: &str = "while :; do sh -c 'i=0; while [ $$i -lt 2000 ]; do i=$$((i+1)); done'; done";

fn shell(name: &str, script: &str) -> pb::Container {
    container(name, &["/bin/sh", "-c", script], &[])
}

/// The agent's current measurement of the pod.
async fn stats(client: &AgentClient<Channel>, uid: &str) -> anyhow::Result<pb::PodStats> {
    let request = pb::GetStatsRequest {
        uids: vec![uid.to_owned()],
    };
    let mut answer = client.clone().get_stats(request).await?.into_inner();
    let first = answer.message().await?;
    first.with_context(|| format!("nothing is known of {uid}"))
}

fn usage(stats: &pb::PodStats, container: &str) -> anyhow::Result<pb::Usage> {
    let mut all = stats.containers.iter();
    let found = all.find(|one| one.name == container);
    let usage = found.and_then(|one| one.usage);
    usage.with_context(|| format!("{container} is not in {stats:?}"))
}

/// Waits until a container has used this much CPU time and checks that no counter decreases meanwhile; returns the measurement.
async fn used(
    client: &AgentClient<Channel>,
    uid: &str,
    container: &str,
    nanos: u64,
) -> anyhow::Result<pb::Usage> {
    let mut before = 0;
    wait_for(&format!("{container} used {nanos} ns"), SOON, async || {
        let now = usage(&stats(client, uid).await?, container)?;
        assert!(now.cpu_nanoseconds >= before, "{before} then {now:?}");
        before = now.cpu_nanoseconds;
        if before >= nanos {
            Ok(now)
        } else {
            Err(anyhow::anyhow!("{now:?}"))
        }
    })
    .await
}

#[tokio::test]
async fn cpu_and_memory_of_each_container_are_measured() -> anyhow::Result<()> {
    let (_site, _agent, client) = Site::start(Options::default()).await?;
    let containers = vec![
        shell("busy", BUSY),
        shell("forks", FORKS),
        shell("idle", "exec sleep 600"),
    ];
    let pod = Pod::new("measured", containers);
    pod.ensure(&client).await?;
    let first = used(&client, pod.uid(), "busy", SECOND).await?;
    let second = used(&client, pod.uid(), "busy", first.cpu_nanoseconds + SECOND).await?;
    // One thread on a shared machine never uses more than one core.
    let span = u64::try_from(second.time - first.time)?;
    let cpu = second.cpu_nanoseconds - first.cpu_nanoseconds;
    ensure!(
        cpu <= span + span / 5 && cpu >= span / 50,
        "{cpu} ns of CPU time in {span} ns"
    );
    for memory in [second.working_set_bytes, second.usage_bytes] {
        ensure!((64 * MIB..80 * MIB).contains(&memory), "{second:?}");
    }
    ensure!(second.rss_bytes >= 64 * MIB, "{second:?}");
    ensure!(second.page_faults > 0, "{second:?}");
    ensure!(second.process_count == 1, "{second:?}");
    // The time of children that ended is not lost.
    used(&client, pod.uid(), "forks", SECOND / 2).await?;
    let whole = stats(&client, pod.uid()).await?;
    let idle = usage(&whole, "idle")?;
    ensure!(
        idle.cpu_nanoseconds > 0 && idle.cpu_nanoseconds < SECOND / 2,
        "a program that sleeps has a little: {idle:?}"
    );
    ensure!(idle.working_set_bytes < 16 * MIB, "{idle:?}");
    // There is no cgroup of a job here, so the pod's use is the sum of its containers.
    let sum: u64 = ["busy", "forks", "idle"]
        .into_iter()
        .map(|name| usage(&whole, name).map(|one| one.cpu_nanoseconds))
        .sum::<anyhow::Result<u64>>()?;
    let pod_usage = whole.usage.context("no usage of the pod")?;
    ensure!(pod_usage.cpu_nanoseconds == sum, "{whole:?}");
    ensure!(pod_usage.working_set_bytes >= 64 * MIB, "{whole:?}");
    Ok(())
}

#[tokio::test]
async fn the_last_counters_stay_although_nothing_asked_for_them() -> anyhow::Result<()> {
    let (site, agent, client) = Site::start(Options::default()).await?;
    // So much work, however long it takes: about a second.
    let work = "i=0; while [ $$i -lt 1000000 ]; do i=$$((i+1)); done";
    let pod = Pod::new("brief", vec![shell("main", work)]);
    let began = Instant::now();
    pod.ensure(&client).await?;
    pod.finished(&client, SOON).await?;
    let last = async |client: &AgentClient<Channel>| -> anyhow::Result<u64> {
        let seen = pod.state(client).await?;
        let usage = seen.last_usage.context("no last usage")?;
        Ok(usage.cpu_nanoseconds)
    };
    let cpu = last(&client).await?;
    let span = began.elapsed();
    ensure!(
        cpu >= SECOND / 20 && u128::from(cpu) <= span.as_nanos(),
        "{cpu} ns of CPU time in {span:?}"
    );
    // The value is stored on disk with the report.
    agent.kill().await?;
    let _agent = site.agent(&[]).await?;
    let client = site.client()?;
    let again = wait_for("the agent is back", SOON, async || last(&client).await).await?;
    ensure!(again == cpu, "{cpu} then {again}");
    // A pod that has ended is not measured.
    let request = pb::GetStatsRequest::default();
    let mut answer = client.clone().get_stats(request).await?.into_inner();
    ensure!(answer.message().await?.is_none());
    Ok(())
}

#[tokio::test]
async fn top_shows_which_container_uses_the_cpu() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let pod = Pod::new(
        "hot",
        vec![shell("busy", BUSY), shell("idle", "exec sleep 600")],
    );
    pod.ensure(&client).await?;
    used(&client, pod.uid(), "busy", SECOND / 10).await?;
    // It is known after two measurements.
    wait_for("the CPU that each uses", SOON, async || {
        let top = site.knocctl(["top", "hot", "--containers", "-o", "json"])?;
        let top = top.ok().await?;
        let pods: serde_json::Value = serde_json::from_slice(&top.stdout)?;
        let cores = |name: &str| {
            let all = pods[0]["containers"].as_array()?;
            let one = all.iter().find(|one| one["name"] == name)?;
            one["cpu"]["nanoCores"].as_u64()
        };
        let (busy, idle) = (cores("busy"), cores("idle"));
        ensure!(busy > Some(SECOND / 20) && busy > idle, "{top}");
        Ok(())
    })
    .await?;
    let table = site.knocctl(["top"])?.ok().await?;
    ensure!(table.text().contains("hot"), "{table}");
    Ok(())
}
