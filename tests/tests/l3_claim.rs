//! The claim on the real stack: however many processes use one job directory, the containers of its pod run once.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures::future::try_join_all;
use knoc_tests::{
    Output, PodBuilder, World, wait_for,
    world::{SOON, STATE, exit_code, has_condition, phase_of, why},
};

/// Pairs that are started together; each pair is one more chance to detect a race.
const PAIRS: usize = 5;

/// The time from the submission to the end of all jobs that wait for each other.
const RACE: Duration = Duration::from_mins(6);

/// The exit codes of a job whose pod succeeded, and of one that lost its claim.
const WON: i32 = 0;
const SURPLUS: i32 = 66;

/// The agent's binary as jobs execute it.
async fn installed_agent(world: &World) -> anyhow::Result<String> {
    let versions = format!("{STATE}/versions");
    let find = ["find", &versions, "-name", "knoc-agent"];
    let found = world.on("login", find).ok().await?.text();
    let first = found.lines().next().context("no version is installed")?;
    Ok(first.to_owned())
}

#[tokio::test]
async fn of_two_processes_that_claim_one_job_directory_one_runs() -> anyhow::Result<()> {
    let world = World::new("claim").await?;
    let pod = PodBuilder::new("once").sh("echo ran; sleep 600");
    let uid = world.running(&pod).await?;
    world.wait_log("once", "main", "ran\n").await?;
    // A second job in the same directory exits with the code of a surplus job.
    let wrap = format!("{} shim {STATE}/pods/{uid}", installed_agent(&world).await?);
    let surplus = submit_and_wait(&world, "c1", "/dev/null", &wrap).await?;
    ensure!(surplus.code == SURPLUS, "{surplus}");
    let log = world.logs("once", "main").await?;
    ensure!(log == "ran\n", "{log}");
    // The end of the second job does not affect the first.
    world.exec(&uid, "main", ["true"]).ok().await?;
    let pod = world.pod("once").await?;
    ensure!(phase_of(&pod) == "Running", "{:?}", pod.status);
    world.delete("once", Some(1)).await?;
    world.wait_gone("once", SOON).await?;
    world.finish().await
}

/// Runs the script as a job on that node to its end; returns the job's id and exit code.
async fn submit_and_wait(
    world: &World,
    node: &str,
    output: &str,
    wrap: &str,
) -> anyhow::Result<Output> {
    let node = format!("--nodelist={node}");
    let job = [
        "sbatch",
        "--parsable",
        "--wait",
        "--job-name=contender",
        "--mem=200",
        "--time=10",
        &node,
        "--output",
        output,
        "--wrap",
        wrap,
    ];
    world.on("login", job).deadline(RACE).output().await
}

/// Two new processes on two nodes, and a job directory that nobody has claimed.
struct Pair<'a> {
    world: &'a World,
    agent: &'a str,
    /// The folder in which all pairs report that they are ready and are started.
    meeting: &'a str,
    /// The job directory of the pair.
    folder: String,
}

impl Pair<'_> {
    /// Waits until both have ended; returns the id and exit code of each job.
    async fn race(&self) -> anyhow::Result<[Output; 2]> {
        let (first, second) =
            futures::future::try_join(self.contender("c1"), self.contender("c2")).await?;
        Ok([first, second])
    }

    async fn contender(&self, node: &str) -> anyhow::Result<Output> {
        let Self {
            meeting,
            agent,
            folder,
            ..
        } = self;
        let wrap = format!(
            "touch {meeting}/ready.$SLURM_JOB_ID; until [ -e {meeting}/go ]; do sleep 0.01; done; \
             exec {agent} shim {folder}"
        );
        submit_and_wait(self.world, node, &format!("{folder}/{node}.out"), &wrap).await
    }

    /// Checks that one ran the containers once, and that the other exited and says which process has the claim.
    async fn judge(&self, ends: &[Output; 2]) -> anyhow::Result<()> {
        let folder = &self.folder;
        let show = format!(
            "cat {folder}/claim.1; echo; ls {folder} | grep -c '^claim'; \
             cat {folder}/logs/main/*; cat {folder}/c?.out"
        );
        let seen = self.world.on("login", ["sh", "-c", &show]).ok().await?;
        let seen = format!("{ends:?}\n{}", seen.text());
        let mut codes = ends.each_ref().map(|end| end.code);
        codes.sort_unstable();
        ensure!(codes == [WON, SURPLUS], "{seen}");
        let winner = ends.iter().find(|end| end.code == WON).map(Output::text);
        let winner = winner.context("nobody won")?;
        ensure!(
            seen.contains(&format!("\"job_id\":\"{winner}\"")),
            "job {winner} won: {seen}"
        );
        ensure!(seen.contains("\n1\n"), "one claim was expected: {seen}");
        ensure!(seen.matches("the-program-ran").count() == 1, "{seen}");
        let told = format!("another one runs the pod: job {winner} (restart 0) on");
        ensure!(seen.contains(&told), "{told:?} is not in {seen}");
        Ok(())
    }
}

/// Creates a pod whose job waits for a held job; returns that job.
async fn queued(world: &World, pod: &str, program: &str) -> anyhow::Result<(String, String)> {
    let hold = ["sbatch", "--parsable", "--hold", "--wrap", "true"];
    let gate = world.on("login", hold).ok().await?.text();
    let pod = PodBuilder::new(pod)
        .annotation("knoc.io/dependency", &format!("afterany:{gate}"))
        .sh(program);
    let uid = world.create(&pod).await?;
    world.wait_job(&uid).await?;
    Ok((uid, gate))
}

#[tokio::test]
async fn of_two_new_processes_that_race_for_one_claim_one_runs() -> anyhow::Result<()> {
    let world = World::new("fight").await?;
    let (uid, gate) = queued(&world, "fresh", "echo the-program-ran; sleep 2").await?;
    let agent = installed_agent(&world).await?;
    let meeting = format!("/scratch/{}", world.namespace);
    let mut pairs = Vec::new();
    for number in 0..PAIRS {
        // A copy of the complete job directory that the agent wrote, which no job has used yet.
        let folder = format!("{meeting}/{number}/pods/{uid}");
        let copy = format!("mkdir -p {meeting}/{number}/pods && cp -a {STATE}/pods/{uid} {folder}");
        world.on("login", ["sh", "-c", &copy]).ok().await?;
        let (world, agent, meeting) = (&world, agent.as_str(), meeting.as_str());
        pairs.push(Pair {
            world,
            agent,
            meeting,
            folder,
        });
    }
    let release = async {
        let count = format!("ls {meeting} | grep -c '^ready' || true");
        let all = (2 * PAIRS).to_string();
        wait_for("all contenders are at the start", RACE, async || {
            let ready = world.on("login", ["sh", "-c", &count]).ok().await?.text();
            ensure!(ready == all, "{ready} of {all}");
            Ok(())
        })
        .await?;
        let go = format!("{meeting}/go");
        world.on("login", ["touch", &go]).ok().await
    };
    let races = try_join_all(pairs.iter().map(Pair::race));
    let (ends, _) = futures::future::try_join(races, release).await?;
    for (pair, ends) in pairs.iter().zip(&ends) {
        pair.judge(ends).await?;
    }
    world.on("login", ["scancel", &gate]).ok().await?;
    world.on("login", ["rm", "-r", &meeting]).ok().await?;
    world.wait_phase("fresh", "Succeeded", SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn slurm_refuses_to_requeue_the_job_of_a_pod_which_runs_on() -> anyhow::Result<()> {
    let world = World::new("no-requeue").await?;
    let uid = world
        .running(&PodBuilder::new("steady").sh("echo ran; exec sleep 600"))
        .await?;
    let job = world.wait_job(&uid).await?;
    let requeue = ["scontrol", "requeue", &job];
    let refused = world.on("login", requeue).output().await?;
    ensure!(
        refused.code != 0
            && refused
                .stderr
                .contains("Requested operation is presently disabled"),
        "{refused}"
    );
    world.exec(&uid, "main", ["true"]).ok().await?;
    let pod = world.pod("steady").await?;
    ensure!(phase_of(&pod) == "Running", "{:?}", pod.status);
    world.one_job(&uid, "RUNNING").await?;
    world.delete("steady", Some(1)).await?;
    world.wait_gone("steady", SOON).await?;
    world.finish().await
}

/// Somebody makes Slurm requeue the running job of the pod.
async fn requeued(test: &str, policy: &str) -> anyhow::Result<()> {
    let world = World::new(test).await?;
    let pod = PodBuilder::new("once")
        .restart(policy)
        .sh("echo ran; exec sleep 600");
    let uid = world.running(&pod).await?;
    // Its program, which is to run once, has run.
    world.wait_log("once", "main", "ran\n").await?;
    let job = world.wait_job(&uid).await?;
    world.requeue(&job).await?;
    let ended = world.wait_phase("once", "Failed", SOON).await?;
    let (reason, message) = why(&ended);
    ensure!(reason == "SlurmJobRequeued", "{reason}: {message}");
    ensure!(
        has_condition(&ended, "DisruptionTarget"),
        "{:?}",
        ended.status
    );
    ensure!(
        exit_code(&ended, "main").is_some_and(|code| code != 0),
        "{:?}",
        ended.status
    );
    // No job waits in the queue for another run, and the pod did not run again.
    world.wait_no_job(&uid, SOON).await?;
    let look = format!("cd {STATE}/pods/{uid}; ls claim.* | wc -l; cat logs/main/*");
    let found = world.on("login", ["sh", "-c", &look]).ok().await?.text();
    ensure!(found.starts_with("1\n"), "one claim was expected: {found}");
    ensure!(found.matches("ran").count() == 1, "it ran again: {found}");
    world.delete("once", None).await?;
    world.wait_gone("once", SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn a_pod_whose_job_is_requeued_never_runs_again_and_says_why() -> anyhow::Result<()> {
    requeued("requeue-never", "Never").await
}

#[tokio::test]
async fn a_pod_that_restarts_its_containers_never_runs_again_when_requeued() -> anyhow::Result<()> {
    requeued("requeue-always", "Always").await
}

/// Nobody releases the job, so that it would never come back to say that its containers are gone.
#[tokio::test]
async fn a_pod_whose_shim_was_killed_and_whose_job_is_held_does_not_stay_running()
-> anyhow::Result<()> {
    let world = World::new("requeue-hold").await?;
    let pod = PodBuilder::new("held").sh("echo ran; exec sleep 600");
    let uid = world.running(&pod).await?;
    world.wait_log("held", "main", "ran\n").await?;
    let job = world.wait_job(&uid).await?;
    let node = world.compute_node(&uid).await?;
    let of = format!("jobid={job}");
    let allow = ["scontrol", "update", &of, "requeue=1"];
    world.on("login", allow).ok().await?;
    let shim = format!("knoc-agent shim .*/{uid}");
    world
        .on(node.trim(), ["pkill", "-KILL", "-f", &shim])
        .ok()
        .await?;
    // Not while the job is completing.
    wait_for("the job is held", SOON, async || {
        let hold = ["scontrol", "requeuehold", &job];
        world.on("login", hold).ok().await.map(drop)
    })
    .await?;
    let ended = world.wait_phase("held", "Failed", 2 * SOON).await?;
    let (reason, message) = why(&ended);
    ensure!(reason == "SlurmJobRequeued", "{reason}: {message}");
    ensure!(
        exit_code(&ended, "main").is_some_and(|code| code != 0),
        "{:?}",
        ended.status
    );
    world.wait_no_job(&uid, SOON).await?;
    world.delete("held", None).await?;
    world.wait_gone("held", SOON).await?;
    world.finish().await
}
