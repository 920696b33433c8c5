//! The cost of running pods: memory, and calls to slurmctld.

use std::time::Duration;

use anyhow::Context as _;
use futures::future::try_join_all;

use super::bed::Bed;
use super::machine::{anonymous, resident};
use crate::PodBuilder;

/// The time limit until all pods run.
const RUNNING: Duration = Duration::from_mins(5);

/// The results of a minute in which the pods do nothing.
#[derive(Debug, Default)]
pub(super) struct Load {
    pub(super) pods: usize,
    pub(super) memory: Memory,
    /// Median and maximum of the shims' anonymous memory in KiB, which is charged to every job.
    pub(super) shim: (u64, u64),
    /// Calls of the agent's user to slurmctld per minute.
    pub(super) rpcs: u64,
}

/// Resident memory in KiB.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pub(super) agent: u64,
    pub(super) kubelet: u64,
}

/// The resident memory of agent and kubelet now.
pub(super) fn memory() -> Memory {
    let largest =
        |program: &str, word: &str| resident(program, word).into_iter().max().unwrap_or(0);
    Memory {
        agent: largest("knoc-agent", "serve"),
        kubelet: largest("knoc-kubelet", ""),
    }
}

/// Runs `pods` pods and measures for `seconds` seconds.
pub(super) async fn measure(bed: &Bed, pods: usize, seconds: u64) -> anyhow::Result<Load> {
    let names: Vec<String> = (0..pods).map(|at| format!("load-{at}")).collect();
    let builder = |name: &String| {
        PodBuilder::new(name)
            .image(&Bed::image_path())
            .command(["/knoc-stamp", "600000"])
    };
    let builders: Vec<PodBuilder> = names.iter().map(builder).collect();
    try_join_all(builders.iter().map(|pod| bed.world.create(pod))).await?;
    for name in &names {
        bed.world.wait_phase(name, "Running", RUNNING).await?;
    }
    let before = rpcs(bed).await?;
    // This sleep is the measured time and not a wait for a state.
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let calls = rpcs(bed).await? - before;
    let mut shims = anonymous("knoc-agent", "shim");
    shims.sort_unstable();
    let load = Load {
        pods: shims.len(),
        memory: memory(),
        shim: (
            shims.get(shims.len() / 2).copied().unwrap_or(0),
            shims.last().copied().unwrap_or(0),
        ),
        rpcs: calls * 60 / seconds,
    };
    try_join_all(names.iter().map(|name| bed.world.delete(name, Some(0)))).await?;
    for name in &names {
        bed.world.wait_gone(name, RUNNING).await?;
    }
    Ok(load)
}

/// The number of calls that slurmctld has counted for the user.
async fn rpcs(bed: &Bed) -> anyhow::Result<u64> {
    let text = bed.world.on_as_root("ctl", ["sdiag"]).ok().await?.text();
    let (_, users) = text
        .split_once("statistics by user")
        .context("sdiag has no users")?;
    let line = users
        .lines()
        .find(|line| line.trim_start().starts_with("hpcuser"));
    let count = line.and_then(|line| line.split_once("count:")?.1.split_whitespace().next());
    count.map_or(Ok(0), |count| Ok(count.parse()?))
}
