//! T1, T2 and T3 of pods that are created at once. The times come from the watch of a second client, from the agent's
//! record of its submissions, and from the output of the pods' program.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use futures::future::try_join_all;
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use knoc_proto::pb;
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use serde_json::json;
use tokio::task::JoinSet;

use super::bed::Bed;
use super::cost::{Cost, Counters};
use super::floor::{self, Job, Root, Submission};
use super::stats::{Series, now, span};
use crate::{PodBuilder, wait_for};

/// How long the program sleeps, in milliseconds: the same as when other projects were measured.
const PAYLOAD: &str = "1000";

/// The time limit for a batch, from creation to the last terminal phase.
const BATCH: Duration = Duration::from_mins(5);

/// All rounds with one number of pods at once.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) pods: usize,
    /// `nodeName` seen → `sbatch` exited.
    pub(super) t1: Series,
    /// The same without the time that `sbatch` itself takes.
    pub(super) t1_share: Series,
    /// T1 of the pod whose `sbatch` exited last, once per round.
    pub(super) t1_last: Series,
    /// First `nodeName` seen → last `sbatch` exited, once per round: includes the time that the scheduler takes to bind all pods.
    pub(super) t1_all: Series,
    /// Each `sbatch` without KNoC.
    pub(super) sbatch: Series,
    /// As many `sbatch` in a row without KNoC, once per round.
    pub(super) sbatch_row: Series,
    /// Created → the program's first line.
    pub(super) t2: Series,
    /// Start of `sbatch` → the program's first line, without KNoC.
    pub(super) t2_hand: Series,
    /// Created → `sbatch` accepted.
    pub(super) t2_before: Series,
    /// Job began → the program's first line.
    pub(super) t2_start: Series,
    /// Job began → the program's first line, without KNoC, with a writable root as in a pod.
    pub(super) t2_apptainer: Series,
    /// The same with a read-only root.
    pub(super) t2_read_only: Series,
    /// The program's last line → the terminal phase is seen.
    pub(super) t3: Series,
    /// Its first part: the program's last line → the shim has seen the program's end and read the rest of its output.
    pub(super) t3_shim: Series,
    /// Its second part: → the agent has the shim's report.
    pub(super) t3_agent: Series,
    /// Its third part: → the terminal phase is seen.
    pub(super) t3_kubelet: Series,
    /// What the pods cost the API server, until their deletion.
    pub(super) cost: Cost,
}

/// The times at which a watch saw the states of one pod.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    pub(super) bound: Option<i64>,
    terminal: Option<i64>,
}

pub(super) type Sightings = Arc<Mutex<BTreeMap<String, Seen>>>;

impl Batch {
    pub(super) fn new(pods: usize) -> Self {
        Self {
            pods,
            ..Self::default()
        }
    }

    /// KNoC's share of T2: created → accepted, and job start → program without the time of a comparable `apptainer exec`.
    pub(super) fn t2_share(&self) -> f64 {
        self.t2_before.median() + self.t2_start.median() - self.t2_apptainer.median()
    }

    /// Measures one round: the pods, then their floors.
    pub(super) async fn round(&mut self, bed: &Bed, round: usize) -> anyhow::Result<()> {
        self.measure(bed, round).await?;
        let row = floor::sbatch_row(bed, self.pods, None).await?;
        if let (Some(first), Some(last)) = (row.first(), row.last()) {
            self.sbatch_row.push(span(first.began, last.ended));
        }
        for Submission { began, ended } in row {
            self.sbatch.push(span(began, ended));
        }
        for Job {
            submission,
            began,
            program,
        } in floor::jobs(bed, self.pods, Root::Writable).await?
        {
            self.t2_hand.push(span(submission.began, program));
            self.t2_apptainer.push(span(began, program));
        }
        for job in floor::jobs(bed, self.pods, Root::ReadOnly).await? {
            self.t2_read_only.push(span(job.began, job.program));
        }
        Ok(())
    }

    /// The pods of one round, without their floors.
    pub(super) async fn measure(&mut self, bed: &Bed, round: usize) -> anyhow::Result<()> {
        let pods: Api<Pod> = bed.world.api();
        let sightings = Sightings::default();
        let mut watching = JoinSet::new();
        let version = pods
            .list(&ListParams::default())
            .await?
            .metadata
            .resource_version;
        let watch = watch(
            pods.clone(),
            version.unwrap_or_default(),
            Arc::clone(&sightings),
        );
        watching.spawn(watch);
        let names: Vec<String> = (0..self.pods)
            .map(|at| format!("bench-{}-{round}-{at}", self.pods))
            .collect();
        let before = Counters::read(bed).await?;
        let created = try_join_all(names.iter().map(|name| create(bed, name))).await?;
        wait_for("all pods have ended", BATCH, async || {
            let seen = sightings.lock().unwrap_or_else(PoisonError::into_inner);
            let ended = seen.values().filter(|seen| seen.terminal.is_some()).count();
            if ended == names.len() {
                Ok(())
            } else {
                Err(format!("{ended} of {}", names.len()))
            }
        })
        .await?;
        self.cost.add(bed, self.pods, &before).await?;
        watching.shutdown().await;
        let seen = sightings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let (mut first, mut last) = (i64::MAX, (0, 0));
        for (name, (uid, created)) in names.iter().zip(created) {
            let seen = seen.get(name).copied().unwrap_or_default();
            let bound = seen.bound.context("the watch never saw a node name")?;
            let ended = self
                .pod(bed, &uid, created, seen)
                .await
                .with_context(|| name.clone())?;
            first = first.min(bound);
            last = last.max((ended, bound));
        }
        let (ended, bound) = last;
        self.t1_last.push(span(bound, ended));
        self.t1_all.push(span(first, ended));
        let deletions = names.iter().map(|name| bed.world.delete(name, Some(0)));
        try_join_all(deletions).await?;
        for name in &names {
            bed.world.wait_gone(name, BATCH).await?;
        }
        Ok(())
    }

    /// Adds one pod; returns the time at which its `sbatch` exited.
    async fn pod(&mut self, bed: &Bed, uid: &str, created: i64, seen: Seen) -> anyhow::Result<i64> {
        let (bound, terminal) = seen.bound.zip(seen.terminal).context("not seen")?;
        let request = pb::GetPodRequest {
            uid: uid.to_owned(),
        };
        let observed = bed.agent.clone().get_pod(request).await?.into_inner();
        let job = observed.job.context("no job")?;
        let (began, ended) = (job.sbatch_began, job.sbatch_ended);
        anyhow::ensure!(
            began > 0 && ended > 0,
            "the agent does not say when it called sbatch"
        );
        let log = String::from_utf8_lossy(&log(bed, uid).await?).into_owned();
        let stamp = |word: &str| -> anyhow::Result<i64> {
            let line = log.lines().find_map(|line| line.strip_prefix(word));
            Ok(line
                .with_context(|| format!("no {word:?} in the log: {log:?}"))?
                .parse()?)
        };
        let (started, stopped) = (stamp("start ")?, stamp("end ")?);
        self.t1.push(span(bound, ended));
        self.t1_share.push(span(bound, ended) - span(began, ended));
        self.t2.push(span(created, started));
        self.t2_before.push(span(created, ended));
        self.t2_start.push(span(bed.job_began(uid)?, started));
        self.t3.push(span(stopped, terminal));
        let container = observed.containers.first().context("no container")?;
        let Some(pb::container_status::State::Terminated(end)) = &container.state else {
            anyhow::bail!("its container has not ended: {container:?}");
        };
        self.t3_shim.push(span(stopped, end.finished_at));
        self.t3_agent.push(span(end.finished_at, observed.since));
        self.t3_kubelet.push(span(observed.since, terminal));
        Ok(ended)
    }
}

async fn log(bed: &Bed, uid: &str) -> anyhow::Result<Vec<u8>> {
    let request = pb::ReadLogsRequest {
        uid: uid.to_owned(),
        container: "main".to_owned(),
        tail_lines: -1,
        ..pb::ReadLogsRequest::default()
    };
    let chunks = bed.agent.clone().read_logs(request).await?.into_inner();
    let all = chunks.try_fold(Vec::new(), |mut all, chunk| async move {
        all.extend_from_slice(&chunk.data);
        Ok(all)
    });
    Ok(all.await?)
}

async fn create(bed: &Bed, name: &str) -> anyhow::Result<(String, i64)> {
    let pod = PodBuilder::new(name)
        .image(&Bed::image_path())
        .command(["/knoc-stamp", PAYLOAD]);
    let created = now();
    Ok((bed.world.create(&pod).await?, created))
}

/// The second client: records the time of each state that it sees.
pub(super) async fn watch(pods: Api<Pod>, mut version: String, sightings: Sightings) {
    loop {
        let events = pods.watch(&WatchParams::default(), &version).await;
        let Ok(events) = events else { continue };
        let mut events = events.boxed();
        while let Some(Ok(event)) = events.next().await {
            let at = now();
            let (WatchEvent::Added(pod) | WatchEvent::Modified(pod)) = event else {
                continue;
            };
            version = pod.metadata.resource_version.clone().unwrap_or_default();
            let mut sightings = sightings.lock().unwrap_or_else(PoisonError::into_inner);
            let seen = sightings
                .entry(pod.metadata.name.clone().unwrap_or_default())
                .or_default();
            if pod
                .spec
                .as_ref()
                .is_some_and(|spec| spec.node_name.is_some())
            {
                seen.bound.get_or_insert(at);
            }
            if matches!(crate::world::phase_of(&pod), "Succeeded" | "Failed") {
                seen.terminal.get_or_insert(at);
            }
        }
    }
}

/// Measures how long a watch takes to show a patch of another client.
pub(super) async fn watch_delay(bed: &Bed, samples: usize) -> anyhow::Result<Series> {
    let maps: Api<ConfigMap> = bed.world.api();
    let map = serde_json::from_value(json!({"metadata": {"name": "watched"}}))?;
    let map: ConfigMap = maps.create(&PostParams::default(), &map).await?;
    let version = map.metadata.resource_version.unwrap_or_default();
    let only = WatchParams::default().fields("metadata.name=watched");
    let mut events = maps.watch(&only, &version).await?.boxed();
    let mut series = Series::default();
    for number in 0..samples {
        let patch = Patch::Merge(json!({"data": {"number": number.to_string()}}));
        let sent = now();
        let other = bed.world.api::<ConfigMap>();
        let params = PatchParams::default();
        let (patched, event) = futures::join!(other.patch("watched", &params, &patch), async {
            let event = events.next().await;
            (event, now())
        });
        patched?;
        event.0.context("the watch ended")??;
        series.push(span(sent, event.1));
    }
    Ok(series)
}
