//! T1 of pods at once whose jobs wait in the queue, alternating with as many `sbatch` in a row. The partition is down, so that no
//! container starts while the agent submits: on a cluster they start on other machines, here on the same processors.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Pod;
use knoc_proto::pb;
use kube::api::{Api, ListParams};
use tokio::task::JoinSet;

use super::bed::Bed;
use super::floor;
use super::pods::{Sightings, watch};
use super::stats::{Series, span};
use crate::{PodBuilder, wait_for};

/// The time limit until all pods of a round are submitted, and until they are gone.
const SOON: Duration = Duration::from_mins(2);

/// All rounds.
#[derive(Debug, Default)]
pub(super) struct Submitted {
    pub(super) pods: usize,
    /// T1 of the pod whose `sbatch` exited last, once per round.
    pub(super) last: Series,
    /// First `nodeName` seen → last `sbatch` exited, once per round: includes the time that the scheduler takes to bind all pods.
    pub(super) all: Series,
    /// As many `sbatch` in a row without KNoC, once per round.
    pub(super) row: Series,
}

/// Measures rounds of that many pods at once, in a partition of its own.
pub(super) async fn measure(bed: &Bed, pods: usize, rounds: usize) -> anyhow::Result<Submitted> {
    let partition = format!("{}-down", bed.world.namespace);
    let create = format!("scontrol create PartitionName={partition} Nodes=ALL State=DOWN");
    as_root(bed, &create).await?;
    let mut submitted = Submitted {
        pods,
        ..Submitted::default()
    };
    let mut outcome = Ok(());
    for round in 1..=rounds {
        outcome = submitted.round(bed, &partition, round).await;
        if outcome.is_err() {
            break;
        }
    }
    let delete = format!("scontrol delete PartitionName={partition}");
    // Slurm keeps a partition for as long as it has jobs.
    let deleted = wait_for(&delete, SOON, async || as_root(bed, &delete).await).await;
    outcome.context("pods that are only submitted")?;
    deleted?;
    Ok(submitted)
}

async fn as_root(bed: &Bed, command: &str) -> anyhow::Result<()> {
    let run = bed.world.on_as_root("ctl", ["sh", "-c", command]);
    run.ok().await.map(drop)
}

impl Submitted {
    async fn round(&mut self, bed: &Bed, partition: &str, round: usize) -> anyhow::Result<()> {
        let names = (0..self.pods).map(|at| format!("submitted-{round}-{at}"));
        let names: Vec<String> = names.collect();
        let api: Api<Pod> = bed.world.api();
        let version = api.list(&ListParams::default()).await?.metadata;
        let version = version.resource_version.unwrap_or_default();
        let sightings = Sightings::default();
        let mut watching = JoinSet::new();
        watching.spawn(watch(api, version, Arc::clone(&sightings)));
        let builders = names.iter().map(|name| {
            PodBuilder::new(name)
                .image(&Bed::image_path())
                .annotation("knoc.io/partition", partition)
                .command(["true"])
        });
        let builders: Vec<PodBuilder> = builders.collect();
        let uids = try_join_all(builders.iter().map(|pod| bed.world.create(pod))).await?;
        let (mut first, mut last) = (i64::MAX, (0, 0));
        for (name, uid) in names.iter().zip(uids) {
            let ended = wait_for(name, SOON, async || submission(bed, &uid).await).await?;
            let bound = wait_for(name, SOON, async || {
                let seen = sightings.lock().unwrap_or_else(PoisonError::into_inner);
                let bound = seen.get(name).and_then(|seen| seen.bound);
                bound.context("the watch has not shown its node")
            })
            .await?;
            first = first.min(bound);
            last = last.max((ended, bound));
        }
        watching.shutdown().await;
        self.last.push(span(last.1, last.0));
        self.all.push(span(first, last.0));
        let deletions = names.iter().map(|name| bed.world.delete(name, Some(0)));
        try_join_all(deletions).await?;
        for name in &names {
            bed.world.wait_gone(name, SOON).await?;
        }
        self.row(bed, partition).await
    }

    /// As many `sbatch` in a row, whose jobs wait as well.
    async fn row(&mut self, bed: &Bed, partition: &str) -> anyhow::Result<()> {
        let row = floor::sbatch_row(bed, self.pods, Some(partition)).await?;
        if let (Some(first), Some(last)) = (row.first(), row.last()) {
            self.row.push(span(first.began, last.ended));
        }
        let cancel = format!("scancel --partition={partition} --name=knoc-floor");
        bed.shell("login", &cancel).ok().await.map(drop)
    }
}

/// The time at which the `sbatch` of a pod exited.
async fn submission(bed: &Bed, uid: &str) -> anyhow::Result<i64> {
    let request = pb::GetPodRequest {
        uid: uid.to_owned(),
    };
    let observed = bed.agent.clone().get_pod(request).await?.into_inner();
    let ended = observed.job.map_or(0, |job| job.sbatch_ended);
    anyhow::ensure!(ended > 0, "no job yet");
    Ok(ended)
}
