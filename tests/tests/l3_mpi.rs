//! Pods of several ranks on the real stack: srun of the bed's Slurm starts them, on two of its nodes.

use std::collections::BTreeSet;

use anyhow::{Context as _, ensure};
use knoc_tests::{
    PodBuilder, World, wait_for,
    world::{SOON, exit_code, why},
};
use serde_json::json;

/// A pod of two ranks, one on each of two nodes, which find each other by nothing but Slurm's variables.
fn ranks(name: &str, script: &str) -> PodBuilder {
    let resources = json!({"requests": {"cpu": "200m"}, "limits": {"memory": "64Mi"}});
    PodBuilder::new(name)
        .annotation("knoc.io/nodes", "2")
        .annotation("knoc.io/ntasks", "2")
        .annotation("knoc.io/mpi", "none")
        .sh(script)
        .set("resources", resources)
}

/// What the ranks have written: number and text.
fn by_rank(log: &str) -> Vec<(&str, &str)> {
    let mut lines: Vec<_> = log
        .lines()
        .filter_map(|line| line.trim_start().split_once(": "))
        .collect();
    lines.sort_unstable();
    lines
}

#[tokio::test]
async fn ranks_on_two_nodes_write_into_one_log() -> anyhow::Result<()> {
    let world = World::new("mpi-log").await?;
    let pod = ranks(
        "hello",
        "echo \"$SLURM_PROCID of $SLURM_NTASKS on $(hostname)\"; echo done >&2",
    );
    world.run(&pod, "Succeeded").await?;
    let log = world.logs("hello", "main").await?;
    let lines = by_rank(&log);
    ensure!(lines.len() == 4, "{log}");
    let mut hosts = BTreeSet::new();
    for rank in ["0", "1"] {
        let own: Vec<_> = lines.iter().filter(|(number, _)| *number == rank).collect();
        let said = own.first().map(|(_, text)| *text);
        let host = said.and_then(|text| text.strip_prefix(&*format!("{rank} of 2 on ")));
        hosts.insert(host.with_context(|| format!("rank {rank}: {log}"))?);
        ensure!(own.iter().any(|(_, text)| *text == "done"), "{log}");
    }
    ensure!(hosts.len() == 2, "both ranks ran on one node: {log}");
    world.finish().await
}

#[tokio::test]
async fn the_rank_that_fails_gives_the_container_its_exit_code() -> anyhow::Result<()> {
    let world = World::new("mpi-fail").await?;
    let script = "if test \"$SLURM_PROCID\" = 1; then exit 3; fi; sleep 600";
    let failed = world.run(&ranks("fails", script), "Failed").await?;
    ensure!(exit_code(&failed, "main") == Some(3), "{failed:?}");
    world.finish().await
}

#[tokio::test]
async fn exec_reaches_rank_0_and_a_deletion_stops_all_ranks() -> anyhow::Result<()> {
    let world = World::new("mpi-stop").await?;
    let script = "trap 'echo stopped; exit 0' TERM; echo ready; while :; do sleep 0.1; done";
    let uid = world.running(&ranks("waits", script)).await?;
    wait_for("both ranks run", SOON, async || {
        let log = world.logs("waits", "main").await?;
        ensure!(log.matches("ready").count() == 2, "{log}");
        Ok(())
    })
    .await?;
    let first = ["sh", "-c", "tr '\\0' '\\n' </proc/1/environ"];
    let environment = world.exec(&uid, "main", first).ok().await?.text();
    ensure!(
        environment.lines().any(|line| line == "SLURM_PROCID=0"),
        "{environment}"
    );
    world.delete("waits", None).await?;
    world.wait_gone("waits", SOON).await?;
    world.wait_no_job(&uid, SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn secrets_reach_the_other_node_and_no_argv() -> anyhow::Result<()> {
    let world = World::new("mpi-secret").await?;
    let pod = ranks("secret", "echo \"has $TOKEN\"; sleep 600")
        .set("env", json!([{"name": "TOKEN", "value": "m4gic-t0ken"}]));
    let uid = world.running(&pod).await?;
    wait_for("both ranks have it", SOON, async || {
        let log = world.logs("secret", "main").await?;
        ensure!(log.matches("has m4gic-t0ken").count() == 2, "{log}");
        Ok(())
    })
    .await?;
    for node in ["c1", "c2"] {
        let all = world.on(
            node,
            ["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"],
        );
        // A process may end while it is read.
        let all = all.output().await?.text();
        // The script has the name of the variable, and the argv of the program is its own.
        ensure!(!all.contains("m4gic-t0ken"), "{node}: {all}");
    }
    world.delete("secret", Some(1)).await?;
    world.wait_no_job(&uid, SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn what_ranks_cannot_have_is_refused_by_name() -> anyhow::Result<()> {
    let world = World::new("mpi-refuse").await?;
    let pod = ranks("refused", "true")
        .annotation("slurm-job.knoc.io/mpi-flags", "--hostfile /etc/hosts")
        .set("tty", json!(true))
        .empty_dir("/work");
    let refused = world.run(&pod, "Failed").await?;
    let (reason, message) = why(&refused);
    for named in ["--hostfile", "tty", "emptyDir"] {
        ensure!(message.contains(named), "{named}: {reason}: {message}");
    }
    world.finish().await
}
