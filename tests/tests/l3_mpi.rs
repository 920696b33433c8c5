//! Pods of several ranks on the real stack: srun of the bed's Slurm starts them, on two of its nodes, with MPICH and Open
//! MPI as Debian packages them.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use knoc_tests::{
    PodBuilder, Run, World, wait_for,
    world::{SOON, container_reason, exit_code, why},
};
use serde_json::json;

/// The image of the MPI programs, as the nodes see it.
const IMAGE: &str = "/images/mpi";

/// How long the image may take: its packages are downloaded once.
const BUILD: Duration = Duration::from_mins(8);

/// How many bytes a rank writes that floods its log. The whole log is kept.
const FLOOD: usize = 20 << 20;

/// A pod of two ranks, one on each of two nodes, which find each other by nothing but Slurm's variables.
fn ranks(name: &str, script: &str) -> PodBuilder {
    let resources = json!({"requests": {"cpu": "200m"}, "limits": {"memory": "256Mi"}});
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

/// Waits until the log of the pod contains `text` so many times.
async fn wait_log(world: &World, pod: &str, text: &str, times: usize) -> anyhow::Result<()> {
    wait_for(&format!("{times} times {text:?}"), SOON, async || {
        let log = world.logs(pod, "main").await?;
        ensure!(log.matches(text).count() == times, "{log}");
        Ok(())
    })
    .await
}

async fn image() -> anyhow::Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("testbed/mpi/image.sh");
    Run::new(script).deadline(BUILD).ok().await.map(drop)
}

/// Runs `/ring-NAME` in four ranks on two nodes.
async fn ring(world: &World, name: &str, interface: &str) -> anyhow::Result<()> {
    let resources = json!({"requests": {"cpu": "4"}, "limits": {"memory": "512Mi"}});
    let pod = PodBuilder::new(name)
        .annotation("knoc.io/nodes", "2")
        .annotation("knoc.io/mpi", interface)
        .annotation("slurm-job.knoc.io/mpi-flags", "-np 4 --map-by ppr:2:node")
        .image(IMAGE)
        .command([&*format!("/ring-{name}")])
        .set("resources", resources);
    world.run(&pod, "Succeeded").await?;
    let log = world.logs(name, "main").await?;
    let mut hosts = BTreeSet::new();
    let tokens = [0, 1, 3, 6];
    for (rank, token) in tokens.into_iter().enumerate() {
        let begin = format!("rank {rank} of 4 on ");
        let said = by_rank(&log)
            .into_iter()
            .find(|(number, text)| *number == rank.to_string() && text.starts_with(&begin));
        let (_, said) = said.with_context(|| format!("rank {rank}: {log}"))?;
        let end = format!(": sum 10, token {token}");
        let host = said.trim_start_matches(&begin).strip_suffix(&*end);
        hosts.insert(host.with_context(|| format!("rank {rank}: {log}"))?);
    }
    ensure!(hosts.len() == 2, "all ranks ran on one node: {log}");
    Ok(())
}

#[tokio::test]
async fn mpich_and_open_mpi_of_debian_run_on_two_nodes() -> anyhow::Result<()> {
    image().await?;
    let world = World::new("mpi-ring").await?;
    ring(&world, "mpich", "pmi2").await?;
    ring(&world, "openmpi", "pmix").await?;
    world.finish().await
}

#[tokio::test]
async fn open_mpi_of_debian_uses_nothing_but_shared_memory_on_one_node() -> anyhow::Result<()> {
    image().await?;
    let world = World::new("mpi-memory").await?;
    let resources = json!({"requests": {"cpu": "2"}, "limits": {"memory": "512Mi"}});
    // With another transport than this one, the ranks would not reach each other.
    let env = json!([
        {"name": "OMPI_MCA_pml", "value": "ob1"},
        {"name": "OMPI_MCA_btl", "value": "self,sm"},
    ]);
    let pod = PodBuilder::new("memory")
        .annotation("knoc.io/ntasks", "2")
        .annotation("knoc.io/mpi", "pmix")
        .image(IMAGE)
        .command(["/ring-openmpi"])
        .set("env", env)
        .set("resources", resources);
    world.run(&pod, "Succeeded").await?;
    let log = world.logs("memory", "main").await?;
    for rank in 0..2 {
        // The sum of the numbers up to its own.
        let (begin, end) = (
            format!("rank {rank} of 2 on "),
            format!(": sum 3, token {rank}"),
        );
        let said = by_rank(&log)
            .into_iter()
            .any(|(_, text)| text.starts_with(&begin) && text.ends_with(&end));
        ensure!(said, "rank {rank}: {log}");
    }
    world.finish().await
}

/// What a rank does that shares a node with another one. It waits for the file `go` and ends then, if it is the one that ends first.
/// Otherwise it waits until the other one is gone, and goes on for a while.
fn beside(first: &str) -> String {
    // Kubernetes makes one dollar sign of two.
    format!(
        "touch /tmp/i-am-$SLURM_PROCID; echo $$$$ >/dev/shm/pid-$SLURM_PROCID; echo ready; \
         while ! test -e /dev/shm/go; do sleep 0.1; done; \
         if test $SLURM_PROCID = {first}; then exit 0; fi; \
         while test -d /proc/$(cat /dev/shm/pid-{first}); do sleep 0.1; done; sleep 2; echo outlived"
    )
}

/// Of which ranks, or of the node, a rank reaches the files by the processes that it sees.
const REACHES: &str = "for process in /proc/[0-9]*; do \
     for one in 0 1; do [ ! -e $process/root/tmp/i-am-$one ] || echo $one; done; \
     [ ! -e $process/root/home/hpcuser ] || echo the node; done | sort -u";

#[tokio::test]
async fn ranks_on_one_node_share_processes_and_memory_and_reach_their_own_files_only()
-> anyhow::Result<()> {
    let world = World::new("mpi-beside").await?;
    // Either of them may be the one whose helper holds what they share.
    for first in ["0", "1"] {
        let name = format!("beside-{first}");
        let resources = json!({"requests": {"cpu": "200m"}, "limits": {"memory": "256Mi"}});
        let pod = PodBuilder::new(&name)
            .annotation("knoc.io/ntasks", "2")
            .annotation("knoc.io/mpi", "none")
            .sh(&beside(first))
            .set("resources", resources);
        let uid = world.running(&pod).await?;
        wait_log(&world, &name, "ready", 2).await?;
        for rank in ["0", "1"] {
            let in_rank = async |script: &str| {
                let exec = ["exec", &uid, "--rank", rank, "--", "sh", "-c", script];
                anyhow::Ok(world.knocctl(exec).ok().await?.text())
            };
            let pids = in_rank("cd /dev/shm && cat pid-0 pid-1").await?;
            let (zero, one) = pids.split_once('\n').with_context(|| pids.clone())?;
            ensure!(zero != one, "{pids}");
            let seen = in_rank(&format!("ls -d /proc/{zero} /proc/{one}")).await?;
            ensure!(seen.lines().count() == 2, "rank {rank}: {seen}");
            wait_for("it reaches its own files only", SOON, async || {
                let reached = in_rank(REACHES).await?;
                ensure!(reached == rank, "rank {rank}: {reached:?}");
                anyhow::Ok(())
            })
            .await?;
        }
        let go = ["exec", &uid, "--", "touch", "/dev/shm/go"];
        world.knocctl(go).ok_or_killed().await?;
        world.wait_phase(&name, "Succeeded", SOON).await?;
        wait_log(&world, &name, "outlived", 1).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn the_example_runs_on_two_nodes() -> anyhow::Result<()> {
    let world = World::new("mpi-example").await?;
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/mpi.yaml");
    world.kubectl(["apply", "-f"]).arg(example).ok().await?;
    world.wait_phase("mpi", "Succeeded", SOON).await?;
    let log = world.logs("mpi", "main").await?;
    let hosts: BTreeSet<_> = log
        .lines()
        .filter_map(|line| line.rsplit(' ').next())
        .collect();
    ensure!(log.lines().count() == 4 && hosts.len() == 2, "{log}");
    world.finish().await
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
        let host = host.with_context(|| format!("rank {rank}: {log}"))?;
        hosts.insert(host);
        ensure!(own.iter().any(|(_, text)| *text == "done"), "{log}");
        let pod = format!("{}/hello", world.namespace);
        let alone = world.knocctl(["logs", &pod, "--rank", rank]).ok().await?;
        let mut alone: Vec<_> = alone.text().lines().map(str::to_owned).collect();
        alone.sort_unstable();
        ensure!(alone == [format!("{rank} of 2 on {host}"), "done".to_owned()]);
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
    let (reason, message) = container_reason(&failed, "main").unwrap_or_default();
    ensure!(
        reason == "Error" && message.starts_with("rank 1 on "),
        "{reason}: {message}"
    );
    world.finish().await
}

#[tokio::test]
async fn exec_reaches_each_rank_and_a_deletion_stops_all_ranks() -> anyhow::Result<()> {
    let world = World::new("mpi-stop").await?;
    let script = "trap 'echo stopped; exit 0' TERM; echo ready; while :; do sleep 0.1; done";
    let uid = world.running(&ranks("waits", script)).await?;
    wait_log(&world, "waits", "ready", 2).await?;
    let first = ["sh", "-c", "tr '\\0' '\\n' </proc/1/environ"];
    let environment = world.exec(&uid, "main", first).ok().await?.text();
    ensure!(
        environment.lines().any(|line| line == "SLURM_PROCID=0"),
        "{environment}"
    );
    let mut hosts = BTreeSet::new();
    for rank in ["0", "1"] {
        let exec = ["exec", "-i", &uid, "--rank", rank, "--"];
        let script = "cat; hostname; exit 5";
        let ran = world.knocctl(exec).args(["sh", "-c", script]);
        let ran = ran.stdin("to the rank\n").output().await?;
        ensure!(ran.code == 5, "{ran}");
        let text = ran.text();
        let host = text.strip_prefix("to the rank\n");
        hosts.insert(host.with_context(|| text.clone())?.to_owned());
    }
    ensure!(hosts.len() == 2, "{hosts:?}");
    let none = ["exec", &uid, "--rank", "2", "--", "true"];
    let none = world.knocctl(none).output().await?;
    ensure!(
        none.code != 0 && none.stderr.contains("ranks of this container are 0 to 1"),
        "{none}"
    );
    world.delete("waits", None).await?;
    world.wait_gone("waits", SOON).await?;
    world.wait_no_job(&uid, SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn a_rank_that_never_ends_is_killed_after_the_grace_period() -> anyhow::Result<()> {
    let world = World::new("mpi-never").await?;
    let script = "trap '' TERM INT HUP; echo ready; while :; do sleep 0.1; done";
    let uid = world.running(&ranks("never", script)).await?;
    wait_log(&world, "never", "ready", 2).await?;
    world.delete("never", Some(2)).await?;
    world.wait_gone("never", SOON).await?;
    world.wait_no_job(&uid, SOON).await?;
    // The job directory, with the pod's uid, is in the argv of the helpers.
    for node in ["c1", "c2", "c3"] {
        wait_for(&format!("no helper is left on {node}"), SOON, async || {
            let left = world.on_as_root(node, ["pgrep", "-af", &uid]).output();
            let left = left.await?.text();
            ensure!(left.is_empty(), "{left}");
            Ok(())
        })
        .await?;
    }
    world.finish().await
}

/// The nodes of the pod's job, the first one first.
async fn nodes_of(world: &World, uid: &str) -> anyhow::Result<Vec<String>> {
    let nodes = world.compute_node(uid).await?;
    let names = world.on("login", ["scontrol", "show", "hostnames", &nodes]);
    let names = names.ok().await?.text();
    Ok(names.lines().map(str::to_owned).collect())
}

#[tokio::test]
async fn a_rank_that_floods_its_log_hides_no_other_rank_and_speaks_for_none() -> anyhow::Result<()>
{
    let world = World::new("mpi-flood").await?;
    let script = format!(
        "if test \"$SLURM_PROCID\" = 1; then \
           head -c {FLOOD} /dev/zero | tr '\\0' x; printf '\\033[2J\\n0: forged\\n'; echo end of flood; \
         else echo quiet; fi"
    );
    world.create(&ranks("flood", &script)).await?;
    world.wait_phase("flood", "Succeeded", SOON * 2).await?;
    let pod = format!("{}/flood", world.namespace);
    let quiet = world.knocctl(["logs", &pod, "--rank", "0"]).ok().await?;
    ensure!(quiet.text() == "quiet", "{quiet}");
    let flood = world.knocctl(["logs", &pod, "--rank", "1"]).ok().await?;
    let written = flood.text().matches('x').count();
    ensure!(written == FLOOD, "{written} bytes");
    ensure!(
        flood.text().ends_with("\n0: forged\nend of flood"),
        "the end"
    );
    world.finish().await
}

#[tokio::test]
async fn secrets_reach_the_other_node_and_no_argv() -> anyhow::Result<()> {
    let world = World::new("mpi-secret").await?;
    let pod = ranks("secret", "echo \"has $TOKEN\"; sleep 600")
        .set("env", json!([{"name": "TOKEN", "value": "m4gic-t0ken"}]));
    let uid = world.running(&pod).await?;
    wait_log(&world, "secret", "has m4gic-t0ken", 2).await?;
    let nodes = nodes_of(&world, &uid).await?;
    ensure!(nodes.len() == 2, "{nodes:?}");
    for node in &nodes {
        let all = world.on_as_root(
            node,
            ["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"],
        );
        // A process may end while it is read.
        let all = all.output().await?.text();
        ensure!(all.contains("knoc-agent rank"), "{node}: {all}");
        // The script has the name of the variable, and the argv of the program is its own.
        ensure!(!all.contains("m4gic-t0ken"), "{node}: {all}");
    }
    world.delete("secret", Some(1)).await?;
    world.wait_no_job(&uid, SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn another_user_gets_nothing_at_the_port_of_the_ranks() -> anyhow::Result<()> {
    let world = World::new("mpi-stranger").await?;
    let pod = ranks(
        "guarded",
        "echo ready; while ! test -e /tmp/go; do sleep 0.1; done; echo end",
    );
    let uid = world.running(&pod).await?;
    wait_log(&world, "guarded", "ready", 2).await?;
    let nodes = nodes_of(&world, &uid).await?;
    let [first, second] = nodes.as_slice() else {
        anyhow::bail!("{nodes:?}");
    };
    // The argv of the helpers, which anybody can see, names the port.
    let find = format!(
        "tr '\\0' ' ' </proc/$(pgrep -f '[k]noc-agent rank .*{uid}' | head -n 1)/cmdline; echo"
    );
    let argv = world
        .on_as_root(first, ["sh", "-c", &find])
        .ok()
        .await?
        .text();
    let address = argv.split(' ').find(|word| word.starts_with("10.78.0."));
    let address = address.with_context(|| argv.clone())?;
    let (ip, port) = address.split_once(':').context("an address")?;
    let prefix = std::env::var("HPC_PREFIX").context("HPC_PREFIX is not set: make up")?;
    let hpc = PathBuf::from(prefix).join("bin/hpc");
    for node in ["login", first, second] {
        for send in [
            "exec 3<>/dev/tcp/$0/$1; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; timeout 30 cat <&3 | wc -c",
            "curl -sk --max-time 20 https://$0:$1/ | wc -c",
        ] {
            let stranger = ["exec", node, "-u", "hpcuser2", "bash", "-c", send, ip, port];
            let got = Run::new(&hpc).args(stranger).ok().await?.text();
            // The alert with which TLS refuses the connection has seven bytes.
            let bytes: u32 = got.trim().parse().with_context(|| got.clone())?;
            ensure!(bytes <= 7, "{node} got {bytes} bytes");
        }
    }
    for rank in ["0", "1"] {
        let go = ["exec", &uid, "--rank", rank, "--", "touch", "/tmp/go"];
        world.knocctl(go).ok_or_killed().await?;
    }
    world.wait_phase("guarded", "Succeeded", SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn what_ranks_cannot_have_is_refused_by_name() -> anyhow::Result<()> {
    let world = World::new("mpi-refuse").await?;
    let pod = ranks("refused", "true")
        .annotation("slurm-job.knoc.io/mpi-flags", "--task-prolog=/bin/hostname")
        .set("tty", json!(true))
        .empty_dir("/work");
    let refused = world.run(&pod, "Failed").await?;
    let (reason, message) = why(&refused);
    for named in ["--task-prolog", "tty", "emptyDir"] {
        ensure!(message.contains(named), "{named}: {reason}: {message}");
    }
    world.finish().await
}
