//! `knocctl doctor` on the real stack: from the host over the link, and on the login node without a certificate.

use std::time::Duration;

use anyhow::ensure;
use knoc_tests::{World, doctor, wait_for, world::STATE};

/// A job of one minute that may wait for others.
const PROBE: Duration = Duration::from_mins(6);

/// Pods of other tests may have started but not yet connected, which is not a fault.
const MAY_BE_BUSY: &str = "link: shims";

#[tokio::test]
async fn a_probe_job_checks_the_whole_chain_through_slurm() -> anyhow::Result<()> {
    let world = World::new("probe").await?;
    let run = world.knocctl(["doctor", "--probe"]).deadline(PROBE);
    let findings = doctor::examine(run).await?;
    let job = doctor::probed(&findings)?;
    let broken: Vec<_> = findings.iter().filter(|finding| !finding.ok).collect();
    ensure!(
        broken.iter().all(|finding| finding.check == MAY_BE_BUSY),
        "{broken:#?}"
    );
    // According to Slurm's accounting, it was a one-minute job that succeeded.
    let row = wait_for("the probe's job has ended", PROBE, async || {
        let what = "jobname%40,state,exitcode,timelimitraw";
        let sacct = ["sacct", "-X", "-n", "-P", "-o", what, "-j", &job];
        let row = world.on("login", sacct).ok().await?.text();
        ensure!(row.contains("COMPLETED"), "{row}");
        Ok(row)
    })
    .await?;
    let uid = row
        .strip_prefix("knoc-")
        .and_then(|row| row.split('|').next());
    let uid = uid.unwrap_or_default();
    ensure!(
        uid.starts_with("doctor-") && row.ends_with("|COMPLETED|0:0|1"),
        "{row}"
    );
    let left = world
        .on("login", ["ls", &format!("{STATE}/pods")])
        .ok()
        .await?;
    ensure!(!left.text().contains(uid), "{left}");
    world.finish().await
}

#[tokio::test]
async fn on_the_login_node_no_certificate_is_needed() -> anyhow::Result<()> {
    let world = World::new("doctor").await?;
    let without = [
        "env",
        "HOME=/nonexistent",
        "XDG_RUNTIME_DIR=/run/user/2001",
        "/home/hpcuser/bin/knocctl",
        "doctor",
    ];
    let findings = doctor::examine(world.on("login", without)).await?;
    let by = findings.iter().find(|finding| finding.check == "link");
    ensure!(
        by.is_some_and(|link| link.ok && link.detail.starts_with("unix:")),
        "{findings:#?}"
    );
    // Its networks and those of the cluster do not overlap.
    let ranges = findings.iter().find(|one| one.check == "network: ranges");
    ensure!(
        ranges
            .is_some_and(|one| one.ok && one.detail.starts_with("no network of this host is in ")),
        "{findings:#?}"
    );
    let broken: Vec<_> = findings.iter().filter(|finding| !finding.ok).collect();
    ensure!(
        broken.iter().all(|finding| finding.check == MAY_BE_BUSY),
        "{broken:#?}"
    );
    world.finish().await
}
