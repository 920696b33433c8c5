//! The Slurm jobs of a test's pods.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::{SOON, World};
use crate::wait_for;

impl World {
    /// The jobs that Slurm ever had for the pod, as `JOBID|STATE|EXIT` each.
    pub async fn jobs(&self, uid: &str) -> anyhow::Result<Vec<String>> {
        let name = format!("knoc-{uid}");
        let rows = self
            .on(
                "login",
                [
                    "sacct",
                    "-X",
                    "-n",
                    "-P",
                    "-D",
                    "-o",
                    "jobid,state,exitcode",
                    "--name",
                    &name,
                ],
            )
            .ok()
            .await?;
        Ok(rows.text().lines().map(str::to_owned).collect())
    }

    /// Waits until Slurm's accounting has one job of the pod, and no other, whose row contains `state`. The accounting
    /// learns of everything a moment after everybody else.
    pub async fn one_job(&self, uid: &str, state: &str) -> anyhow::Result<()> {
        wait_for(
            &format!("one job of pod {uid}: {state}"),
            SOON,
            async || match self.jobs(uid).await?.as_slice() {
                [job] if job.contains(state) => Ok(()),
                jobs => Err(anyhow::anyhow!("{jobs:?}")),
            },
        )
        .await
    }

    /// Waits until the pod has a job; returns its id.
    pub async fn wait_job(&self, uid: &str) -> anyhow::Result<String> {
        wait_for(&format!("a job of pod {uid}"), SOON, async || {
            self.live_jobs(uid, "%i")
                .await?
                .lines()
                .next()
                .map(str::to_owned)
                .context("squeue shows none")
        })
        .await
    }

    /// The compute node that the pod's job runs on.
    pub async fn compute_node(&self, uid: &str) -> anyhow::Result<String> {
        let job = self.wait_job(uid).await?;
        let rows = self.on("login", ["squeue", "-h", "-o", "%N", "-j", &job]);
        Ok(rows.ok().await?.text())
    }

    /// Starts no jobs on these nodes (`c1`, or `c1,c3`) while `then` runs, so that Slurm chooses others. `tests/testbed/conformance/nodes.sh`
    /// undoes it if a test is killed meanwhile.
    pub async fn away_from<T>(
        &self,
        nodes: &str,
        then: impl AsyncFnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let nodes = format!("NodeName={nodes}");
        let set = async |state: &str| {
            let update = ["scontrol", "update", &nodes, state, "Reason=knoc-tests"];
            self.on_as_root("ctl", update).ok().await
        };
        set("State=drain").await?;
        let done = then().await;
        let resumed = set("State=resume").await;
        match (done, resumed) {
            (Err(error), Err(also)) => Err(error.context(format!("{nodes}: resume: {also:#}"))),
            (done, Ok(_)) => done,
            (Ok(_), Err(error)) => Err(error.context(format!("{nodes}: resume"))),
        }
    }

    /// Makes Slurm requeue a running job. The job was submitted with `--no-requeue`, which its owner can change.
    pub async fn requeue(&self, job: &str) -> anyhow::Result<()> {
        let of = format!("jobid={job}");
        let allow = ["scontrol", "update", &of, "requeue=1"];
        self.on("login", allow).ok().await?;
        let requeue = ["scontrol", "requeue", job];
        self.on("login", requeue).ok().await?;
        Ok(())
    }

    /// Waits until Slurm has no live job of the pod.
    pub async fn wait_no_job(&self, uid: &str, limit: Duration) -> anyhow::Result<()> {
        wait_for(&format!("no job of pod {uid}"), limit, async || {
            let rows = self.live_jobs(uid, "%i %T %R").await?;
            ensure!(rows.is_empty(), rows);
            Ok(())
        })
        .await
    }

    /// What squeue prints of the pod's jobs in this format, a line for each.
    async fn live_jobs(&self, uid: &str, format: &str) -> anyhow::Result<String> {
        let name = format!("knoc-{uid}");
        let rows = self.on("login", ["squeue", "-h", "-o", format, "--name", &name]);
        Ok(rows.ok().await?.text())
    }
}
