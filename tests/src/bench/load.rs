//! What KNoC takes while pods run: memory, and calls to slurmctld.

use std::time::Duration;

use anyhow::Context as _;
use futures::future::try_join_all;

use super::bed::Bed;
use super::machine::{anonymous, resident};
use crate::PodBuilder;

/// Until all pods run.
const RUNNING: Duration = Duration::from_mins(5);

/// The figures of a quiet minute.
#[derive(Debug, Default)]
pub(super) struct Load {
    pub(super) pods: usize,
    /// KiB.
    pub(super) agent: u64,
    pub(super) kubelet: u64,
    /// Median and largest of all shims: anonymous memory, which every job pays.
    pub(super) shim: (u64, u64),
    /// Of the user, a minute.
    pub(super) rpcs: u64,
}

/// Runs so many pods and looks at them for so many seconds.
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
    // The one span here that is not waited for but measured.
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let calls = rpcs(bed).await? - before;
    let mut shims = anonymous("knoc-agent", "shim");
    shims.sort_unstable();
    let largest =
        |program: &str, word: &str| resident(program, word).into_iter().max().unwrap_or(0);
    let load = Load {
        pods: shims.len(),
        agent: largest("knoc-agent", "serve"),
        kubelet: largest("knoc-kubelet", ""),
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

/// Calls that slurmctld counted for the user since it began to count.
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
