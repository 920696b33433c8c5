//! The findings of `knocctl doctor`.

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use crate::{Output, Run};

/// A finding, as `knocctl doctor` prints it in JSON.
#[derive(Clone, Debug, Deserialize)]
pub struct Finding {
    /// The name of the check.
    pub check: String,
    /// Whether the check succeeded.
    pub ok: bool,
    /// The result of the check in plain text.
    pub detail: String,
    /// What to do; empty if the check succeeded.
    pub cure: String,
}

/// Runs `doctor` with machine-readable output. Its exit code says whether all checks succeeded.
pub async fn examine(doctor: Run) -> anyhow::Result<Vec<Finding>> {
    let output = doctor.args(["-o", "json"]).output().await?;
    let findings = findings(&output).with_context(|| output.to_string())?;
    let well = findings.iter().all(|finding| finding.ok);
    ensure!(well == (output.code == 0), "{output}");
    let cured = findings
        .iter()
        .all(|finding| finding.ok == finding.cure.is_empty());
    ensure!(cured, "a cure where none is needed, or none: {output}");
    Ok(findings)
}

fn findings(output: &Output) -> anyhow::Result<Vec<Finding>> {
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Checks that the probe job succeeded; returns the job's id.
pub fn probed(findings: &[Finding]) -> anyhow::Result<String> {
    let (prefix, all) = ("probe: ", ["submit", "start", "report", "link"]);
    let probe = findings
        .iter()
        .filter_map(|finding| Some((finding.check.strip_prefix(prefix)?, finding)));
    let probe: Vec<_> = probe.collect();
    let names: Vec<_> = probe.iter().map(|(name, _)| *name).collect();
    ensure!(names == all, "{findings:#?}");
    ensure!(probe.iter().all(|(_, finding)| finding.ok), "{findings:#?}");
    // "job 12 was accepted in 9 ms"
    let job = probe[0].1.detail.split(' ').nth(1);
    Ok(job.context("no job is named")?.to_owned())
}
