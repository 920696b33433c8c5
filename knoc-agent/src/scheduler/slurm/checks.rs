//! What `doctor` checks about Slurm: its commands, the controller, the accounting database and the
//! partitions.

use std::path::Path;

use knoc_proto::{error, pb};

use super::{Slurm, parse, round};
use crate::scheduler::SchedulerError;

impl Slurm {
    /// The findings, in the order in which a job is submitted.
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
        all.extend(self.controller().await);
        all.push(self.accounting().await);
        all
    }

    async fn tool(&self, name: &str, program: &Path) -> pb::Finding {
        let check = format!("slurm: {name}");
        match self.command(program).arg("--version").run().await {
            Ok(output) => {
                let text = output.text();
                let detail = format!("{} {}", site_path(self, program), text.trim());
                let is_version = text.split_whitespace().any(|word| {
                    word.contains('.') && word.starts_with(|first: char| first.is_ascii_digit())
                });
                pb::Finding {
                    check,
                    ok: is_version,
                    detail,
                    cure: if is_version {
                        String::new()
                    } else {
                        "this is not Slurm's own answer to --version: name the real program in [tools]"
                            .to_owned()
                    },
                }
            }
            Err(err) => bad(
                check,
                &err,
                "set PATH or tools in the site file, then run doctor again",
            ),
        }
    }

    /// Checks the controller, and whether it knows the nodes' local disk.
    async fn controller(&self) -> Vec<pb::Finding> {
        let check = "slurm: controller".to_owned();
        match self.node_info().await {
            Ok(info) if info.partitions.is_empty() => vec![self.nothing_shown(check).await],
            Ok(info) => {
                let names: Vec<&str> = info.partitions.iter().map(|p| p.name.as_str()).collect();
                let (up, all) = (info.nodes_available, info.nodes_total);
                let text = format!(
                    "{up} of {all} nodes usable; partitions {}",
                    names.join(", ")
                );
                vec![ok(check, text), self.local_disk()]
            }
            Err(err) => vec![bad(
                check,
                &err,
                "ask the site whether slurmctld is up; check SLURM_CONF",
            )],
        }
    }

    /// Finds out why sinfo shows no node of this site's partitions.
    async fn nothing_shown(&self, check: String) -> pb::Finding {
        let command = self.question(&self.settings.scontrol);
        let config = self
            .answer("scontrol", command.args(["show", "config"]))
            .await;
        let private = config.ok().and_then(|text| parse::private_data(&text));
        let hidden = private.filter(|private| private.iter().any(|what| what == "nodes"));
        let (detail, cure) = match hidden {
            Some(private) => (
                format!(
                    "Slurm hides its nodes from this user: PrivateData={} in slurm.conf",
                    private.join(",")
                ),
                "ask Slurm's administrators to remove `nodes` from PrivateData, or to make this user an operator; until then the \
                 node has no capacity, and pods get no time limit of their partition",
            ),
            None => (
                "no partition that this user may see".to_owned(),
                "check policy.partitions in the site file against `sinfo`",
            ),
        };
        pb::Finding {
            check,
            ok: false,
            detail,
            cure: cure.to_owned(),
        }
    }

    /// Informational: it is never a failure.
    fn local_disk(&self) -> pb::Finding {
        let limits = self.known_limits().unwrap_or_default();
        let without: Vec<&str> = limits
            .iter()
            .filter(|partition| partition.tmp_mib <= 0)
            .map(|partition| partition.name.as_str())
            .collect();
        let text = if without.is_empty() {
            "pods reserve ephemeral-storage with --tmp".to_owned()
        } else {
            format!(
                "pods reserve no ephemeral-storage in {}: no node there has TmpDisk in slurm.conf",
                without.join(", ")
            )
        };
        ok("slurm: TmpDisk".to_owned(), text)
    }

    async fn accounting(&self) -> pb::Finding {
        let check = "slurm: accounting".to_owned();
        match self
            .answer(
                "sacct",
                self.sacct(parse::SACCT_FORMAT).args(["-S", "now-1minute"]),
            )
            .await
            .and_then(|text| {
                parse::sacct(&text).map_err(|problem| round::unreadable("sacct", problem))
            }) {
            Ok(_) => ok(check, "sacct answers".to_owned()),
            Err(SchedulerError::Command(err)) if round::accounting_disabled(&err) => ok(
                check,
                "accounting storage is disabled: exit codes come from the controller".to_owned(),
            ),
            Err(err) => bad(
                check,
                &err,
                "jobs keep running, but the exit codes of jobs that left the queue are not known until sacct answers",
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
