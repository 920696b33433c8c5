//! What `doctor` asks of Slurm: each command present, the controller, the accounting, the partitions.

use std::path::Path;

use knoc_proto::{error, pb};

use super::{Slurm, round};
use crate::scheduler::SchedulerError;

impl Slurm {
    /// Findings in the order of the chain.
    pub(in crate::scheduler) async fn checks(&self) -> Vec<pb::Finding> {
        let site = &self.settings;
        let mut all = Vec::new();
        for (name, program) in [
            ("sbatch", &site.sbatch),
            ("squeue", &site.squeue),
            ("scancel", &site.scancel),
            ("sinfo", &site.sinfo),
            ("scontrol", &site.scontrol),
        ] {
            all.push(self.tool(name, program).await);
        }
        all.push(self.controller().await);
        all.push(self.accounting().await);
        all
    }

    async fn tool(&self, name: &str, program: &Path) -> pb::Finding {
        let check = format!("slurm: {name}");
        match self.command(program).arg("--version").run().await {
            Ok(output) => ok(
                check,
                format!("{} {}", site_path(self, program), output.text().trim()),
            ),
            Err(err) => bad(
                check,
                &err,
                "set PATH or tools in the site file, then run doctor again",
            ),
        }
    }

    async fn controller(&self) -> pb::Finding {
        let check = "slurm: controller".to_owned();
        match self.node_info().await {
            Ok(info) if info.partitions.is_empty() => pb::Finding {
                check,
                ok: false,
                detail: "no partition that this user may see".to_owned(),
                cure: "check policy.partitions in the site file against `sinfo`".to_owned(),
            },
            Ok(info) => {
                let names: Vec<&str> = info.partitions.iter().map(|p| p.name.as_str()).collect();
                let (up, all) = (info.nodes_available, info.nodes_total);
                ok(
                    check,
                    format!(
                        "{up} of {all} nodes usable; partitions {}",
                        names.join(", ")
                    ),
                )
            }
            Err(err) => bad(
                check,
                &err,
                "ask the site whether slurmctld is up; check SLURM_CONF",
            ),
        }
    }

    async fn accounting(&self) -> pb::Finding {
        let check = "slurm: accounting".to_owned();
        match self
            .answer("sacct", self.sacct().args(["-S", "now-1minute"]))
            .await
        {
            Ok(_) => ok(check, "sacct answers".to_owned()),
            Err(SchedulerError::Command(err)) if round::accounting_disabled(&err) => ok(
                check,
                "this site has none: exit codes come from the controller".to_owned(),
            ),
            Err(err) => bad(
                check,
                &err,
                "jobs run on; codes of jobs that left the queue wait for it",
            ),
        }
    }
}

fn site_path(slurm: &Slurm, program: &Path) -> String {
    slurm.settings.find(program).display().to_string()
}

fn ok(check: String, detail: String) -> pb::Finding {
    pb::Finding {
        check,
        ok: true,
        detail,
        cure: String::new(),
    }
}

fn bad(check: String, err: &(dyn std::error::Error + 'static), cure: &str) -> pb::Finding {
    pb::Finding {
        check,
        ok: false,
        detail: error::chain(err),
        cure: cure.to_owned(),
    }
}
