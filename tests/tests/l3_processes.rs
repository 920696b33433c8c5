//! The processes of a pod on the real stack: their limits, who can inspect our processes, and what they may leave behind.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use knoc_tests::{PodBuilder, World, wait_for, world::SOON};
use serde_json::json;

/// The time to create that many folders, and for several restarts.
const MINUTES: Duration = Duration::from_mins(8);

/// Soft limits that no site sets and that do not affect the running agent: file size, CPU time.
const ODD: [(&str, &str); 2] = [("--fsize", "1099511627009"), ("--cpu", "864007")];

/// A login node limits its processes, including the agent. These limits must not apply to pods.
#[tokio::test]
async fn a_pod_has_the_limits_of_its_job_and_not_those_of_the_agent() -> anyhow::Result<()> {
    let world = World::new("limits").await?;
    let find = ["pgrep", "-u", "hpcuser", "-f", "knoc-agent serve"];
    let agents = world.on("login", find).ok().await?.text();
    let agent = agents.lines().next().context("no agent")?.to_owned();
    let limit = async |values: [String; 2]| {
        let [one, two] = &values;
        let command = ["prlimit", "--pid", &agent, one, two];
        world.on("login", command).ok().await.map(drop)
    };
    limit(ODD.map(|(name, value)| format!("{name}={value}:"))).await?;
    let shown = world.on("login", ["cat", &format!("/proc/{agent}/limits")]);
    let shown = shown.ok().await?.text();
    ensure!(
        shown.contains(ODD[0].1),
        "the agent has no such limit: {shown}"
    );
    let pod = PodBuilder::new("limited").sh("cat /proc/self/limits; ulimit -n; ulimit -s");
    let ended = world.run(&pod, "Succeeded").await;
    limit(ODD.map(|(name, _)| format!("{name}=unlimited:"))).await?;
    ended?;
    let log = world.logs("limited", "main").await?;
    for (name, value) in ODD {
        ensure!(
            !log.contains(value),
            "{name} of the agent reached the pod: {log}"
        );
    }
    // Soft and hard limits are equal, except for the two that have conventional values.
    for line in log.lines().filter(|line| line.starts_with("Max ")) {
        let mut words = line.split_whitespace().rev().peekable();
        let unit = words
            .peek()
            .is_some_and(|word| word.chars().all(char::is_alphabetic) && *word != "unlimited");
        let mut values = words.skip(usize::from(unit));
        let (hard, soft) = (values.next(), values.next());
        let usual = line.starts_with("Max open files") || line.starts_with("Max stack size");
        ensure!(usual || soft == hard, "{line}");
    }
    ensure!(log.trim_end().ends_with("\n1024\n8192"), "{log}");
    world.finish().await
}

/// Prints for each process of the user its program, the owner of its `/proc` files (root if it is not dumpable), and its soft and
/// hard core limits.
const LOOK: &str = "for p in $(pgrep -u hpcuser); do \
    echo $(tr '\\0' ' ' </proc/$p/cmdline | cut -c1-200) \
    , $(stat -c %U /proc/$p/fd) $(sed -n 's/^Max core file size *//p' /proc/$p/limits); done 2>/dev/null";

#[tokio::test]
async fn our_processes_are_closed_to_others_and_those_of_the_pod_are_not() -> anyhow::Result<()> {
    let world = World::new("private").await?;
    let uid = world
        .running(&PodBuilder::new("keeper").sh("sleep 7654"))
        .await?;
    let node = world.compute_node(&uid).await?;
    let command = world.exec(&uid, "main", ["sleep", "4567"]);
    let command = command.deadline(MINUTES);
    let looking = async {
        // The programs may still be starting: until its end, a start is ours.
        wait_for(
            "both programs run, and are as open as is right",
            SOON,
            async || {
                let seen = world.on(&node, ["sh", "-c", LOOK]).ok().await?.text();
                let line = |words: &str| {
                    let mut lines = seen.lines().filter(|line| line.contains(words));
                    lines
                        .next()
                        .with_context(|| format!("no {words:?}: {seen}"))
                };
                for ours in ["knoc-agent shim", "knoc-agent enter"] {
                    let line = line(ours)?;
                    ensure!(
                        line.contains(", root 0 "),
                        "{ours} is open to others: {line}"
                    );
                }
                for theirs in ["sleep 7654", "sleep 4567"] {
                    let line = line(theirs)?;
                    let (_, state) = line.rsplit_once(", ").context("a state")?;
                    let words: Vec<_> = state.split_whitespace().collect();
                    ensure!(words[0] == "hpcuser" && words[1] == words[2], "{line}");
                }
                Ok(())
            },
        )
        .await?;
        let login = world.on("login", ["sh", "-c", LOOK]).ok().await?.text();
        let agent = login.lines().find(|line| line.contains("knoc-agent serve"));
        ensure!(
            agent.is_some_and(|line| line.contains(", root 0 ")),
            "{login}"
        );
        world.delete("keeper", Some(0)).await
    };
    let (_, looked) = tokio::join!(command.output(), looking);
    looked?;
    world.finish().await
}

/// Creates 15,000 nested folders, so deep that recursion over them crashes a process, and longer than any path can be: fifteen chains
/// of a thousand, each moved to the end of the next.
const DEEP: &str = "test -e /shared/again && exec sleep 7654; touch /shared/again; cd /tmp; \
    chain=$(printf 'd/%.0s' $(seq 1000)); mkdir -p x/$chain; i=1; \
    while [ $i -lt 15 ]; do mkdir -p y/$chain && mv x y/$chain && mv y x && i=$((i+1)); done; echo made $i; exit 3";

#[tokio::test]
async fn a_very_deep_tree_costs_no_other_container_anything() -> anyhow::Result<()> {
    let world = World::new("deep").await?;
    let mount = json!([{"name": "shared", "mountPath": "/shared"}]);
    let pod = PodBuilder::new("deep")
        .restart("Always")
        .spec("volumes", json!([{"name": "shared", "emptyDir": {}}]))
        .sh(DEEP)
        .set("volumeMounts", mount)
        .container("other")
        .sh("echo begun; while :; do sleep 1; done");
    world.create(&pod).await?;
    let again = "the container runs again";
    let found = world
        .wait_for_state("deep", again, MINUTES, |pod| {
            let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
            let main = statuses.iter().find(|status| status.name == "main")?;
            (main.restart_count == 1 && main.started == Some(true)).then(|| pod.clone())
        })
        .await?;
    let log = world
        .kubectl(["logs", "-p", "deep", "-c", "main"])
        .ok()
        .await?;
    ensure!(log.text().contains("made 15"), "{}", log.text());
    let statuses = found.status.unwrap_or_default().container_statuses;
    let other = statuses
        .unwrap_or_default()
        .into_iter()
        .find(|one| one.name == "other");
    let other = other.context("the other container")?;
    ensure!(other.restart_count == 0 && other.ready, "{other:?}");
    // The folders are removed while the pod continues to run.
    let uid = found.metadata.uid.context("a uid")?;
    let node = world.compute_node(&uid).await?;
    let left = "ls -d /tmp/knoc-shim-*/trash/* 2>/dev/null | wc -l";
    wait_for("the tree is removed", MINUTES, async || {
        let count = world.on(&node, ["sh", "-c", left]).ok().await;
        let count = count.map_err(|error| error.to_string())?.text();
        if count == "0" { Ok(()) } else { Err(count) }
    })
    .await?;
    world.finish().await
}
